"""The package as a whole: what importing it costs, its metadata, its README."""

import doctest
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest

import tk_jax
from tk_jax import _ffi

ROOT = pathlib.Path(__file__).absolute().parent.parent

pytestmark = pytest.mark.smoke


def run_python(code: str, cwd: pathlib.Path, **environment: str) -> str:
    """Runs ``code`` in a fresh interpreter started in ``cwd``; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_the_same_everywhere():
    assert tk_jax.__version__ == importlib.metadata.version("tk_jax")


@pytest.mark.parametrize("name", tk_jax.__all__)
def test_every_public_name_exists(name):
    assert getattr(tk_jax, name) is not None
    assert name in dir(tk_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'tk_jax' has no attribute 'atention'"):
        _ = tk_jax.atention


def test_import_is_light(tmp_path):
    # With a platform that does not exist, touching any backend would raise.
    code = """
        import time
        import jax, jax.numpy
        start = time.process_time()
        import tk_jax
        from tk_jax import attention, explain, matmul
        print(time.process_time() - start)
        """

    def seconds():
        return float(run_python(code, tmp_path, JAX_PLATFORMS="no_such_platform"))

    # On a busy machine even a process's own time varies: one try of five must do.
    assert any(seconds() < 0.7 for _ in range(5))


def test_runtime_older_than_the_headers_is_one_clear_error(tmp_path):
    # A runtime is known by the header it ships; this one says it has FFI API 0.2.
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 2\n")
    printed = run_python(
        f"""
        import jax
        jax.ffi.include_dir = lambda: {str(tmp_path)!r}
        try:
            from tk_jax import attention
        except ImportError as error:
            print(error)
        print(jax.numpy.ones(3).sum())
        """,
        tmp_path,
    )
    message, value = printed.strip().rsplit("\n", 1)
    assert re.search(r"0\.2\b", message), message
    built = "{}.{}".format(*_ffi.extension().ffi_api_version())
    assert f"built for XLA FFI API {built}," in message
    assert "pip install" in message, message
    assert value == "3.0"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_code_runs(tmp_path):
    code = "\n".join(python_blocks("README.md"))
    printed = run_python(code, tmp_path, JAX_PLATFORMS="cpu")
    assert "attention with implementation=None runs" in printed
    assert printed.endswith("[64 64 64]\n")


def test_code_on_state_spaces_runs(tmp_path):
    (block,) = python_blocks("docs/ssm.md")
    check = "assert y.shape == packed.shape == out.shape == (2, 500, 8, 64)"
    run_python(block + check, tmp_path, JAX_PLATFORMS="cpu")


def test_code_on_adding_a_kernel_lowers_and_compiles(tmp_path):
    (block,) = python_blocks("docs/add_a_kernel.md")
    compile_it = """
        from tk_jax import _extension
        assert "my_softmax" in program.as_text()
        if _extension.nvrtc_info()["version"] is not None:
            spec = dict(
                symbol="my_softmax", source=SOURCE, function="softmax", threads=128
            )
            _extension.compile(spec, use_cache=False)
        """
    run_python(block + textwrap.dedent(compile_it), tmp_path, JAX_PLATFORMS="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "based_attention",
        "based_attention_step",
        "compile_kernels",
        "explain",
        "export_checks",
        "hedgehog_attention",
        "hedgehog_attention_step",
        "linear_attention",
        "linear_attention_step",
        "matmul",
        "ssd",
        "ssd_step",
    ],
)
def test_docstring_examples_run(name):
    function = getattr(tk_jax, name)
    module = sys.modules[function.__module__]
    finder = doctest.DocTestFinder(recurse=False)
    examples = finder.find(function, name, module, globs={"tk_jax": tk_jax})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        runner.run(example)
    assert runner.summarize().attempted > 0, f"{name} has no example"
    assert runner.summarize().failed == 0


def test_linters_of_pre_commit_are_those_of_the_test_extra():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = set(
        re.findall(
            r'"((?:ruff|clang-format)==[^"]+)"',
            (ROOT / ".pre-commit-config.yaml").read_text(),
        )
    )
    assert len(pinned) == 2
    assert pinned <= set(pyproject["project"]["optional-dependencies"]["test"])


def test_every_device_header_is_installed_but_those_of_tests():
    package = pathlib.Path(tk_jax.__file__).parent
    installed = package / "cuda"
    if not installed.exists():
        pytest.skip("editable install: the sources are read where they are")
    for folder in ("include", "kernels"):
        expected = {
            path.relative_to(ROOT / "cuda")
            for path in (ROOT / "cuda" / folder).rglob("*")
            if path.suffix in (".h", ".cuh") and "tile_test" not in path.parts
        }
        found = {
            path.relative_to(installed)
            for path in (installed / folder).rglob("*")
            if path.is_file()
        }
        assert expected == found
        assert expected
