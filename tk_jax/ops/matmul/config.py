"""Static settings of matmul: what is computed, and with which tiles.

Both classes cross to C++ field by field: cuda/kernels/matmul/matmul.h declares the
structs of the same fields, and a test compares the two.
"""

from __future__ import annotations

import dataclasses

# What one block on Hopper may use, and the part that holds barriers and alignment.
_MAX_SHARED_BYTES = 232448
_SHARED_SLACK = 2048
# Two pieces of 64 x 64 for each of two consumers.
_OUTPUT_BYTES = 2 * 2 * 2 * 64 * 64
# An H100 SXM. Another Hopper GPU has a few more or fewer: the choice is still right.
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class MatmulOptions:
    """What is computed: ``op(a) @ op(b)``, ``op`` a transposition or nothing."""

    transpose_a: bool = False
    transpose_b: bool = False


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How it is computed.

    A tile of ``block_m`` rows and ``block_n`` columns is summed in steps of
    ``block_k``; ``stages`` of these steps are in flight. ``cluster_m`` blocks along M
    share the tile of b by multicast, and ``group_m`` tiles along M are walked together,
    so that their operands stay in L2.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    cluster_m: int = 1
    group_m: int = 8

    def __post_init__(self):
        cluster_columns = 64 * self.cluster_m
        for name, holds, expected in (
            ("block_m", self.block_m in (128, 256), "128 or 256"),
            ("block_k", self.block_k == 64, "64"),
            ("stages", self.stages >= 2, "at least 2"),
            ("cluster_m", self.cluster_m in (1, 2), "1 or 2"),
            # Each block of a cluster loads its share of b, in panels of 64 columns.
            (
                "block_n",
                self.block_n > 0 and self.block_n % cluster_columns == 0,
                f"a multiple of {cluster_columns}",
            ),
            # The sums of a tile fill 128 registers of each of 256 threads.
            (
                "block_n",
                self.block_m * self.block_n <= 128 * 256,
                f"at most {128 * 256 // self.block_m}",
            ),
            (
                "group_m",
                self.group_m > 0 and self.group_m % self.cluster_m == 0,
                f"a multiple of {self.cluster_m}",
            ),
            (
                "shared_bytes",
                self.shared_bytes <= _MAX_SHARED_BYTES,
                f"at most {_MAX_SHARED_BYTES}",
            ),
        ):
            if not holds:
                raise ValueError(
                    f"MatmulConfig: {name} is {getattr(self, name)}; "
                    f"expected {expected} in {self}"
                )

    @property
    def shared_bytes(self) -> int:
        """Both operands of every stage, and pieces of c on their way out."""
        operands = 2 * self.stages * self.block_k * (self.block_m + self.block_n)
        return operands + _OUTPUT_BYTES + _SHARED_SLACK


_WIDE = MatmulConfig()
_NARROW = MatmulConfig(block_n=128, stages=6)

# All that default_config can choose, so that it can be compiled ahead and tested. Not
# clusters: on an H100 they ran at 0.98 to 1.00 of these at sizes from 4096 up.
CONFIGS = (_WIDE, _NARROW)


def default_config(m: int, n: int, batch: int) -> MatmulConfig:
    """The tiles for a product of these sizes; every tile walks all of K.

    Of wide and narrow tiles, those win whose rounds over all multiprocessors move fewer
    bytes through shared memory, which is what bounds them.
    """
    return min(CONFIGS, key=lambda config: _shared_traffic(config, m, n, batch))


def _shared_traffic(config: MatmulConfig, m: int, n: int, batch: int) -> int:
    """What a multiprocessor moves for each column of K, in elements.

    Both operands are written once; a is read once, b by each of two consumers. The wide
    tile needs the 128 bytes a clock that shared memory has, the narrow one 160.
    """
    tiles = batch * -(-m // config.block_m) * -(-n // config.block_n)
    rounds = -(-tiles // _MULTIPROCESSORS)
    return rounds * (2 * config.block_m + 3 * config.block_n)
