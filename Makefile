# From a machine with Python (3.11 to 3.13), gcc and make alone:
#   make test    lint and tests
#   make demo    trains a small GPT and samples from it
# Both install into .venv. Others: lint, format, bazel-test, gpu-test, matrix, wheel, clean.

VENV ?= .venv
BIN := $(VENV)/bin
TEST_JOBS ?= 2
DEMO_FLAGS ?=
WHEEL_FLAGS ?=

# Editable, so that the sources here are what runs: only these files call for a new install.
# Kernels are among them: they are compiled with the interpreter.
BUILT_FROM := pyproject.toml CMakeLists.txt $(shell find cuda -type f)
CPP_SOURCES = $(shell find cuda examples tests -name '*.h' -o -name '*.cuh' -o -name '*.cc' -o -name '*.cu')

.PHONY: test bazel-test lint format gpu-test demo matrix wheel clean

test: lint
	$(BIN)/pytest -n $(TEST_JOBS) --dist=worksteal
	sh scripts/bazel_test.sh --no-install $(abspath $(BIN)/python) --config=after-pytest

# The same sources built by Bazel, which needs the dependencies and not the package.
bazel-test: $(VENV)/.dependencies
	sh scripts/lint_build_files.sh
	sh scripts/bazel_test.sh $(abspath $(BIN)/python)

lint: $(VENV)/.installed-test,demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/pre-commit validate-config
	sh scripts/lint_build_files.sh

format: $(VENV)/.installed-test,demo
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# One process: two would take turns on the GPU and share its memory.
gpu-test: $(VENV)/.installed-cuda13,test
	$(BIN)/pytest -m gpu --require-gpu

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/train_gpt.py $(DEMO_FLAGS)

# A wheel of each Python here, installed without its sources and tested on one version of jax each.
matrix:
	bash scripts/matrix.sh

# With the kernels that ops choose by default. What `pip install .` builds has none, and needs no NVRTC.
wheel: $(VENV)/.installed-test
	rm -rf build/wheel && mkdir -p dist
	$(BIN)/pip wheel --no-deps --wheel-dir build/wheel .
	$(BIN)/python scripts/ship_kernels.py $(WHEEL_FLAGS) build/wheel/*.whl
	mv build/wheel/*.whl dist

$(VENV)/.installed-%: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

$(VENV)/.dependencies: pyproject.toml | $(BIN)/python
	$(BIN)/python scripts/requirements.py test demo > $@.txt
	$(BIN)/pip install --quiet --requirement $@.txt
	touch $@

$(BIN)/python:
	python="$(PYTHON)"; [ -n "$$python" ] || python=$$(sh scripts/find_python.sh) || exit 1; \
	  "$$python" -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist
