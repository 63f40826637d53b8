"""Softmax of rows by a kernel of this workspace, as an XLA custom call."""

import importlib.util
import pathlib

import _softmax
import jax
import jax.numpy as jnp

_COLUMNS = 128


def softmax(x: jax.Array) -> jax.Array:
    """exp(x) / sum(exp(x)) along the rows of a bfloat16 matrix of 128 columns.

    Runs on a Hopper GPU, and on the CPU through tk_jax's interpreter of kernels.
    """
    if x.ndim != 2 or x.shape[1] != _COLUMNS or x.dtype != jnp.bfloat16:
        raise ValueError(
            f"softmax: x has shape {x.shape} and dtype {x.dtype}; "
            f"expected [rows, {_COLUMNS}] and bfloat16"
        )
    call = jax.ffi.ffi_call("example_softmax", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x)


def _set_up() -> None:
    # Beside this workspace's runfiles lie those of tk_jax, device sources among them.
    runfiles = pathlib.Path(_softmax.__file__).absolute().parents[1]
    _softmax.set_source_root(str(runfiles / "tk_jax" / "cuda"))
    nvidia = importlib.util.find_spec("nvidia")
    places = nvidia.submodule_search_locations if nvidia else []
    _softmax.set_nvrtc_paths([f"{place}/cu13/lib" for place in places])
    for platform, handler in (
        ("cpu", _softmax.cpu_handler()),
        ("CUDA", _softmax.gpu_handlers()),
    ):
        jax.ffi.register_ffi_target("example_softmax", handler, platform=platform)


_set_up()
