"""Types of PTX, and what they are to NumPy."""

from __future__ import annotations

import numpy as np

# How registers of a type are kept; other views of the same bits are taken where used.
REGISTERS = {
    "pred": bool,
    "b8": np.uint8,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
}
REGISTERS |= {
    f"{kind}{bits}": REGISTERS[f"b{bits}"] for kind in "us" for bits in (8, 16, 32, 64)
}

TYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
        for kind, code in (("u", "u"), ("s", "i"), ("b", "u"))
        for bits in (8, 16, 32, 64)
    },
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "pred": np.dtype(bool),
}


def type_of(parts) -> np.dtype:
    """Of an opcode's parts: the last is the type."""
    return TYPES[parts[-1]]


def full(w, value):
    """A value for each of a warpgroup's threads."""
    return value if np.ndim(value) else np.full(w.size, value)
