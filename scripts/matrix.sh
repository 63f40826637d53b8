#!/usr/bin/env bash
# Proves the wheel: builds one with each Python found, installs it away from its sources, and runs
# the smoke tests on one version of jax each, oldest to newest.
#
#   scripts/matrix.sh [--packed-by EXECUTABLE] [PYTHON:JAX ...]
#                                           default: 3.11:0.10.2 3.12:0.11.2 3.13:0.12.0.1
#
# --packed-by builds none: the wheel is that of the modules which that Python has installed in
# editable mode (pack_wheel.py). Pythons from 3.12 on can take what a newer one built.
# A Python that the machine lacks is reported and passed over; to find none is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

packed_by=
if [ "${1:-}" = --packed-by ]; then
  packed_by="$2"
  shift 2
fi

pairs=("$@")
[ ${#pairs[@]} -gt 0 ] || pairs=(3.11:0.10.2 3.12:0.11.2 3.13:0.12.0.1)
root="$PWD"
work="$root/build/matrix"
mkdir -p "$work"
report=()

for pair in "${pairs[@]}"; do
  version="${pair%%:*}" jax="${pair##*:}"
  label="Python $version, jax $jax"
  if ! python="$(sh scripts/find_python.sh "$version" 2>/dev/null)"; then
    report+=("$label: not run, this machine has no Python $version")
    continue
  fi
  echo "== $label"
  home="$work/py$version-jax$jax"
  rm -rf "$home"
  "$python" -m venv "$home"
  "$home/bin/pip" install --quiet --upgrade pip
  if [ -n "$packed_by" ]; then
    "$packed_by" scripts/pack_wheel.py "$home/wheel"
  else
    # Without the optimiser, which takes more than half of the time: this asks what loads and runs.
    "$home/bin/pip" wheel --quiet --no-deps --wheel-dir "$home/wheel" \
      --config-settings=cmake.build-type=Debug \
      --config-settings=cmake.define.CMAKE_CXX_FLAGS_DEBUG=-O0 .
  fi
  "$home/bin/pip" install --quiet "$home"/wheel/*.whl "jax==$jax" "jaxlib==$jax" \
    flatbuffers pytest pytest-timeout pytest-xdist
  # Started elsewhere and without pyproject.toml's pythonpath, so that the clone's tk_jax folder
  # cannot stand in for the installed one.
  (cd "$home" && "$home/bin/pytest" -c "$root/pyproject.toml" --rootdir "$root" \
    -o pythonpath= -p no:cacheprovider -n 2 --dist=worksteal -m smoke \
    "$root"/tests/test_{smoke,package,doctor}.py) 2>&1 | tee "$home/log"
  report+=("$label: $(tail -n 1 "$home/log" | tr -d '=')")
done

printf '\n'
printf '%s\n' "${report[@]}"
case "${report[*]}" in
  *passed*) ;;
  *) echo "no wheel was tested" >&2; exit 1 ;;
esac
