"""Stands in for the interpreter: runs launches through :mod:`ptx.machine`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json

import numpy as np

from ptx import machine, memories, program
from tk_jax import _ffi


@contextlib.contextmanager
def emulated():
    """``implementation="interpret"`` executes the PTX of kernels meanwhile."""
    interpreter = _ffi.interpreter()
    interpreter.set_stand_in(run)
    try:
        yield
    finally:
        interpreter.set_stand_in(None)


@functools.lru_cache(maxsize=64)
def _program(spec: str):
    return program.parse(program.ptx_of(json.loads(spec)))


def run(spec, grid, params: int, arrays, multiprocessors: int) -> None:
    """Executes one launch; raises what is wrong with it."""
    kernel = _program(json.dumps(spec))
    launch = machine.Machine(
        kernel,
        threads=spec["threads"],
        shared_bytes=spec["shared_bytes"],
        cluster_size=spec["cluster_size"],
        params=ctypes.string_at(params, kernel.parameter_bytes),
        memory=memories.GlobalMemory(arrays),
    )
    with np.errstate(all="ignore"):
        launch.run(grid, multiprocessors * spec["min_blocks"])
