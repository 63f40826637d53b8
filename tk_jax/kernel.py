"""Calls a kernel of your own: device code over the tile library, compiled when needed.

The kernel is a device function that takes ``const tk::KernelParams&``
(``cuda/include/tk/kernel_params.h``). Its text travels inside the program, so an
exported program carries it along.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tk_jax import _dispatch, _ffi

MAX_BUFFERS = 8
MAX_SCALARS = 4


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """What ``tk_kernel_v1`` decodes; the fields of cuda/ffi/kernel_settings.h."""

    symbol: str
    header: str
    source: str
    function: str
    threads: int
    shared_bytes: int
    cluster_size: int
    grid_x: int
    grid_y: int
    grid_z: int


def call_kernel(
    function: str,
    out_types: Sequence,
    *arrays: jax.Array,
    threads: int,
    header: str = "",
    source: str = "",
    symbol: str = "tk_kernel",
    grid: int | tuple[int, int, int] = 1,
    shared_bytes: int = 0,
    cluster_size: int = 1,
    tiles: Mapping[int, tuple[int, int]] | None = None,
    scalars: Sequence[float] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Runs ``function(params)`` on a grid of blocks; returns an array for each type.

    Args:
      function: A device function, template arguments included: ``"mine::scale<64>"``.
      out_types: ``jax.ShapeDtypeStruct`` or the like, one for each result. Results
        start with undefined content.
      *arrays: The operands; ``params.buffers`` holds them, then the results.
      threads: Threads of a block.
      header: A header of the tile library or its kernels that defines the function:
        ``"kernels/matmul/kernel.cuh"``.
      source: Device code that defines it; placed after ``header``.
      symbol: The kernel's name in a profile.
      grid: Blocks along x, or along x, y and z.
      shared_bytes: Dynamic shared memory of a block.
      cluster_size: Blocks along x that form a cluster.
      tiles: For buffer ``i``, the (rows, columns) of the shared tiles that it is loaded
        into or stored from: ``params.maps[i]`` is then a tensor map over the array. Its
        dimensions are the array's from last to first, its boxes span ``rows`` of the
        second to last dimension and one panel (``tk::panel_columns``) of the last.
      scalars: Up to four numbers, as ``params.scalars``.
      implementation: None or ``"tk"`` for a Hopper GPU; ``"interpret"`` runs and checks
        the kernel on the CPU, compiled by the host's C++ compiler
        (:func:`tk_jax.interpret.compile_for_interpreter`).

    Raises:
      ValueError: too many buffers or scalars, a tile for a buffer that is not there,
        neither ``header`` nor ``source``, an unknown implementation.
      ImportError: the extension, or the interpreter, is not built.
      NotImplementedError: ``"interpret"`` on a GPU.
    """
    if implementation not in (None, "tk", "interpret"):
        raise ValueError(
            f"call_kernel: implementation is {implementation!r}; "
            "expected None, 'tk' or 'interpret'"
        )
    num_buffers = len(arrays) + len(out_types)
    tiles = tiles or {}
    if not header and not source:
        raise ValueError("call_kernel: pass header, source, or both")
    if num_buffers > MAX_BUFFERS:
        raise ValueError(
            f"call_kernel: {num_buffers} arguments and results; "
            f"a kernel takes {MAX_BUFFERS}"
        )
    if len(scalars) > MAX_SCALARS:
        raise ValueError(
            f"call_kernel: {len(scalars)} scalars; a kernel takes {MAX_SCALARS}"
        )
    # Rows and columns for every buffer; 0 and 0 for no map.
    map_tiles = np.zeros((num_buffers, 2), np.int64)
    for index, tile in tiles.items():
        if not 0 <= index < num_buffers:
            raise ValueError(
                f"call_kernel: tiles names buffer {index}; there are {num_buffers}"
            )
        map_tiles[index] = tile
    grid_x, grid_y, grid_z = (grid, 1, 1) if isinstance(grid, int) else grid
    settings = KernelSettings(
        symbol=symbol,
        header=header,
        source=source,
        function=function,
        threads=threads,
        shared_bytes=shared_bytes,
        cluster_size=cluster_size,
        grid_x=grid_x,
        grid_y=grid_y,
        grid_z=grid_z,
    )
    run = functools.partial(
        _ffi.call,
        "tk_kernel_v1",
        out_types,
        settings=settings,
        map_tiles=map_tiles.reshape(-1),
        scalars=np.asarray(scalars, np.float32),
    )
    if implementation != "interpret":
        return run(*arrays)
    _ffi.interpreter()
    return _dispatch.run_on_cpu("call_kernel", run, *arrays)
