"""Kernels of cuda/kernels/tile_test, which test operations of the tile library.

A test module declares its kernels when it is imported. ``ALL`` then has every one:
test_tiles_compile.py compiles them on any machine, the tests themselves run them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tk_jax import _ffi, interpret
from tk_jax.kernel import call_kernel

# What runs the kernels: the fixture tile_implementation sets it.
implementation = "tk"
# Whether the interpreter has a stand-in, which compiles by itself.
emulated = False

ALL: list[Kernel] = []

NAMES = {"float": np.float32, "tk::bf16": jnp.bfloat16, "tk::fp16": np.float16}
FLOAT, BF16, FP16 = NAMES

# All that a block has: kSharedBytes in tile_test/common.cuh.
_SHARED_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instance of a kernel: ``unary<float, tk::bf16>`` of tile_test/map.cuh."""

    family: str
    name: str
    threads: int
    uses_shared: bool
    cluster_size: int

    @property
    def id(self) -> str:
        """What pytest calls it."""
        return self.name.replace("tk::", "").replace(", ", "-")

    @property
    def launch(self) -> dict:
        """What ``call_kernel`` and the extension's ``compile`` both take."""
        return {
            "function": f"tk::tile_test::{self.name}",
            "header": f"kernels/tile_test/{self.family}.cuh",
            "symbol": f"tk_test_{self.name.split('<')[0]}",
            "threads": self.threads,
            "shared_bytes": _SHARED_BYTES if self.uses_shared else 0,
            "cluster_size": self.cluster_size,
        }

    @property
    def spec(self) -> dict:
        return self.launch | {"params_type": "tk::KernelParams"}

    def __call__(self, out_types, *arrays, grid=1, tiles=None, scalars=()):
        """Runs the kernel; returns its results as NumPy arrays.

        Results are (shape, dtype); they start as NaN or -1 wherever the memory that
        they get was free before the call.
        """
        _compile_family(self.family, implementation)
        types = [jax.ShapeDtypeStruct(*kind) for kind in out_types]
        _poison(types)
        results = call_kernel(
            self.launch["function"],
            types,
            *map(jnp.asarray, arrays),
            **{k: v for k, v in self.launch.items() if k != "function"},
            grid=grid,
            tiles=tiles,
            scalars=scalars,
            implementation=implementation,
        )
        return [np.asarray(result) for result in results]


def kernel(family, function, *arguments, threads=32, shared=False, cluster_size=1):
    """Declares an instance: template arguments are types' names and numbers."""
    name = function
    if arguments:
        name += f"<{', '.join(str(argument) for argument in arguments)}>"
    made = Kernel(family, name, threads, shared, cluster_size)
    ALL.append(made)
    return made


@functools.cache
def _compile_family(family: str, implementation: str) -> None:
    """Fills the kernel cache with what the module's tests run."""
    specs = [item.spec for item in ALL if item.family == family]
    if implementation == "tk":
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(_ffi.extension().compile, specs))
        return
    if emulated:
        return
    # One library for all; whoever comes second, in another process, finds it there.
    folder = pathlib.Path(os.environ["TK_JAX_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{family}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        interpret.compile_for_interpreter(
            [spec["function"] for spec in specs], header=specs[0]["header"]
        )


def _poison(types) -> None:
    """Leaves free memory of the results' sizes full of bits that spell NaN and -1."""
    sizes = [np.prod(kind.shape, dtype=int) * kind.dtype.itemsize for kind in types]
    blocks = [jax.device_put(np.full(size, 255, np.uint8)) for size in sizes]
    jax.block_until_ready(blocks)


def round_to(x, dtype) -> np.ndarray:
    """float32 values as ``dtype`` holds them, to nearest even, as float32."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def integers(rng, shape, dtype=np.float32, limit=8) -> np.ndarray:
    """Small whole numbers, whose sums and products are exact in float32."""
    return rng.integers(-limit, limit + 1, shape).astype(np.float32).astype(dtype)


def normals(rng, shape, dtype=np.float32) -> np.ndarray:
    """Normal values that ``dtype`` holds exactly."""
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def assert_same(result, expected) -> None:
    """Equal values, NaN where NaN is expected."""
    np.testing.assert_array_equal(
        np.asarray(result, np.float32), np.asarray(expected, np.float32)
    )
