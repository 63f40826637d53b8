"""The only caller of ``jax.ffi``: loads the extension, registers targets, calls them.

Importing this module raises ImportError where the XLA of the installed jax is too old
for the extension. Without any extension (a source checkout that was never built) it
loads, :func:`unavailable` says why, and only calls of kernels fail.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

try:
    from tk_jax import _extension
except ImportError as error:
    _extension = None
    _import_error = str(error)

_NVRTC_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")
_TARGETS = (
    "tk_attention_fwd_v1",
    "tk_attention_bwd_v1",
    "tk_attention_bwd_bias_v1",
    "tk_based_attention_chunk_outputs_v1",
    "tk_based_attention_gradients_v1",
    "tk_based_attention_outputs_v1",
    "tk_based_attention_states_v1",
    "tk_based_attention_walked_gradients_v1",
    "tk_hedgehog_attention_document_states_v1",
    "tk_hedgehog_attention_keys_v1",
    "tk_hedgehog_attention_outputs_v1",
    "tk_hedgehog_attention_queries_v1",
    "tk_hedgehog_attention_step_v1",
    "tk_hedgehog_attention_sums_v1",
    "tk_kernel_v1",
    "tk_linear_attention_chunk_sums_v1",
    "tk_linear_attention_gate_gradients_v1",
    "tk_linear_attention_gradients_v1",
    "tk_linear_attention_head_sums_v1",
    "tk_linear_attention_outputs_v1",
    "tk_linear_attention_segment_starts_v1",
    "tk_linear_attention_segment_sums_v1",
    "tk_linear_attention_spread_v1",
    "tk_linear_attention_states_v1",
    "tk_linear_attention_step_gates_v1",
    "tk_linear_attention_step_gradients_v1",
    "tk_matmul_v1",
    "tk_state_step_v1",
)


def runtime_api_version() -> tuple[int, int]:
    """The FFI API of the XLA inside the installed jaxlib."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    found = dict(
        re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text())
    )
    return int(found["MAJOR"]), int(found["MINOR"])


def check_api_version(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Refuses what XLA would refuse later, and less clearly.

    A handler that is newer than the runtime breaks the CPU backend of the whole process
    when it is registered, and is silently dropped by the GPU's.
    """
    if built[0] == runtime[0] and built[1] <= runtime[1]:
        return
    raise ImportError(
        f"tk_jax was built for XLA FFI API {built[0]}.{built[1]}, but jaxlib "
        f"{jax.lib.__version__} has {runtime[0]}.{runtime[1]}. "
        "Install a newer jax: pip install 'jax>=0.10,<0.13'"
    )


def unavailable() -> str | None:
    """Why no kernel can be called in this installation, or None if they can."""
    if _extension is not None:
        return None
    return (
        f"tk_jax._extension cannot be imported ({_import_error}); "
        "build it with `pip install .` in the source folder, or reinstall tk_jax"
    )


def extension():
    """The extension module, or ImportError with the reason."""
    if _extension is None:
        raise ImportError(unavailable())
    return _extension


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export`` must be told about our targets, which it does not know.

    >>> import jax, tk_jax
    >>> checks = tk_jax.export_checks()
    >>> # jax.export.export(fn, platforms=["cuda"], disabled_checks=checks)(*args)
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _TARGETS]


def call(
    target: str,
    out_types,
    *arrays: jax.Array,
    in_place=None,
    vmap_method: str | None = None,
    **settings,
) -> tuple:
    """Calls a target; returns one array for each of ``out_types``.

    Args:
      target: A name of ``_TARGETS``.
      out_types: What ``jax.typeof(x).update(...)`` returns, so that a result inside
        ``shard_map`` varies over the axes that ``x`` varies over.
      *arrays: The operands.
      in_place: ``{operand: result}``, by their numbers, of those that are one array:
        XLA copies the operand beforehand wherever somebody still needs it.
      vmap_method: What ``jax.vmap`` makes of the call, in ``jax.ffi``'s words; by
        default it is refused.
      **settings: Attributes. A frozen dataclass becomes one dict attribute, decoded by
        the C++ struct of the same fields; an array stays an array.
    """
    extension()
    attributes = {
        name: to_attribute(value) if dataclasses.is_dataclass(value) else value
        for name, value in settings.items()
    }
    aliases = {} if in_place is None else {"input_output_aliases": in_place}
    function = jax.ffi.ffi_call(
        target, tuple(out_types), vmap_method=vmap_method, **aliases
    )
    return tuple(function(*arrays, **attributes))


def result_type(like: jax.Array, shape, dtype=np.float32):
    """The type of a result that varies as ``like`` does; of size 0 without a shape."""
    shape = (0,) if shape is None else shape
    return jax.typeof(like).update(shape=shape, dtype=np.dtype(dtype))


def optional(x: jax.Array | None, dtype=np.float32) -> jax.Array:
    """An operand; of size 0 where there is none."""
    return jnp.zeros((0,), dtype) if x is None else x


def to_attribute(settings) -> dict:
    """A dataclass as a dict of the exact types that the C++ side decodes."""
    return {
        field.name: _scalar(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
    }


def _scalar(value):
    # XLA refuses a float64 where float32 is declared; Python's float is one.
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return np.float32(value)
    raise TypeError(f"a setting is {value!r}, which has no FFI attribute type")


def source_root() -> pathlib.Path:
    """The folder of the device sources: installed with the package, or a checkout's."""
    package = pathlib.Path(__file__).parent
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


def nvrtc_folders() -> list[str]:
    """The folders of NVIDIA's wheels that hold NVRTC; imports none of them."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    candidates = [
        pathlib.Path(place, folder) for folder in _NVRTC_FOLDERS for place in places
    ]
    return [str(folder) for folder in candidates if folder.is_dir()]


def shipped_folders() -> list[str]:
    """Where kernels that were compiled beforehand are: TK_JAX_CUBINS, the package."""
    named = os.environ.get("TK_JAX_CUBINS", "").split(os.pathsep)
    return [*filter(None, named), str(pathlib.Path(__file__).parent / "cubins")]


@functools.cache
def interpreter():
    """The interpreter's module, with its targets registered for the CPU.

    Raises ImportError with the reason where it cannot be loaded.
    """
    try:
        from tk_jax import _interpreter
    except ImportError as error:
        raise ImportError(
            f"tk_jax._interpreter cannot be imported ({error}); "
            "build it with `pip install .` in the source folder, or reinstall tk_jax"
        ) from None
    check_api_version(_interpreter.ffi_api_version(), runtime_api_version())
    _interpreter.set_source_root(str(source_root()))
    for target, handler in _interpreter.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu", api_version=1)
    return _interpreter


@functools.cache
def _set_up() -> None:
    check_api_version(_extension.ffi_api_version(), runtime_api_version())
    _extension.set_source_root(str(source_root()))
    _extension.set_shipped_dirs(shipped_folders())
    _extension.set_nvrtc_paths(nvrtc_folders())
    for target, stages in _extension.registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA", api_version=1)


if _extension is not None:
    _set_up()
