"""The bridge to jax.ffi: versions, missing extension, export."""

import pathlib
import subprocess
import sys

import extension_process
import jax
import jax.numpy as jnp
import pytest

import tk_jax
from tk_jax import _ffi, kernel

_SOURCE = '#include "tk/kernel_params.h"\nvoid copy(const tk::KernelParams&) {}'


def copy(x):
    (y,) = kernel.call_kernel(
        "copy", [jax.typeof(x)], x, threads=128, source=_SOURCE, tiles={0: (64, 64)}
    )
    return y


def test_this_runtime_takes_our_handlers():
    built = _ffi.extension().ffi_api_version()
    _ffi.check_api_version(built, _ffi.runtime_api_version())


@pytest.mark.parametrize(
    ("built", "runtime"), [((0, 3), (0, 3)), ((0, 3), (0, 5)), ((1, 0), (1, 2))]
)
def test_runtimes_that_are_new_enough(built, runtime):
    _ffi.check_api_version(built, runtime)


@pytest.mark.parametrize(
    ("built", "runtime"), [((0, 3), (0, 2)), ((0, 3), (1, 0)), ((1, 0), (0, 9))]
)
def test_runtimes_that_would_refuse_our_handlers(built, runtime):
    with pytest.raises(ImportError, match="was built for XLA FFI API") as error:
        _ffi.check_api_version(built, runtime)
    assert "pip install 'jax>=0.10,<0.13'" in str(error.value)


def run_python(code: str, path: pathlib.Path | None = None):
    environment = extension_process.clean_environment() | {"JAX_PLATFORMS": "cpu"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_old_runtime_gives_one_error_and_leaves_jax_working():
    done = run_python("""
from tk_jax import _extension
class Newer:
    def __getattr__(self, name):
        return getattr(_extension, name)
    def ffi_api_version(self):
        return (0, 99)
import sys, tk_jax
sys.modules["tk_jax._extension"] = tk_jax._extension = Newer()
try:
    tk_jax.attention
except ImportError as error:
    print(error)
import jax
print(jax.jit(lambda x: x + 1)(1))
""")
    error, answer = done.stdout.splitlines()
    assert error.startswith("tk_jax was built for XLA FFI API 0.99, but jaxlib")
    assert answer == "2", done.stderr


_WITHOUT_EXTENSION = """
import sys
sys.modules["tk_jax._extension"] = None  # what a checkout that was never built has
import jax, jax.numpy as jnp, tk_jax
"""


def test_package_without_extension_runs_xla():
    done = run_python(
        _WITHOUT_EXTENSION
        + """
a = jnp.ones((16, 16), jnp.bfloat16)
q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
for implementation in (None, "xla"):
    print(tk_jax.matmul(a, a, implementation=implementation)[0, 0])
    print(tk_jax.attention(q, q, q, implementation=implementation)[0, 0, 0, 0])
"""
    )
    assert done.stdout.split() == ["16", "1", "16", "1"], done.stderr


def test_package_without_extension_says_so_where_a_kernel_is_asked_for():
    done = run_python(
        _WITHOUT_EXTENSION
        + """
a = jnp.ones((16, 16), jnp.bfloat16)
try:
    tk_jax.matmul(a, a, implementation="tk")
except NotImplementedError as error:
    print(error)
from tk_jax import _ffi
try:
    _ffi.extension()
except ImportError as error:
    print(error)
"""
    )
    for line in done.stdout.splitlines():
        assert "tk_jax._extension cannot be imported" in line
        assert "pip install ." in line
    assert len(done.stdout.splitlines()) == 2, done.stderr


def test_sources_are_where_the_runtime_looks():
    root = _ffi.source_root()
    assert (root / "include" / "tk" / "kernel_params.h").is_file()
    assert (root / "kernels" / "attention" / "attention.h").is_file()


def test_export_needs_our_checks_and_survives_a_round_trip():
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    export = jax.export.export(
        jax.jit(copy), platforms=["cuda"], disabled_checks=tk_jax.export_checks()
    )
    exported = export(x)
    again = jax.export.deserialize(exported.serialize())
    assert "tk_kernel_v1" in again.mlir_module()
    assert again.out_avals[0].shape == (64, 64)
    with pytest.raises(ValueError, match="tk_kernel_v1"):
        jax.export.export(jax.jit(copy), platforms=["cuda"])(x)


def test_export_checks_name_every_target():
    assert sorted(_ffi._TARGETS) == sorted(_ffi.extension().registrations())
    assert len(tk_jax.export_checks()) == len(_ffi._TARGETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": ""}, "pass header, source, or both"),
        ({"scalars": [1.0] * 5}, "5 scalars; a kernel takes 4"),
        ({"tiles": {2: (64, 64)}}, "tiles names buffer 2; there are 2"),
        ({"operands": 8}, "9 arguments and results; a kernel takes 8"),
    ],
)
def test_call_kernel_refuses(arguments, message):
    x = jnp.ones((64, 64), jnp.bfloat16)
    operands = [x] * arguments.pop("operands", 1)
    with pytest.raises(ValueError, match=message):
        kernel.call_kernel(
            "copy", [x], *operands, **({"threads": 128, "source": _SOURCE} | arguments)
        )
