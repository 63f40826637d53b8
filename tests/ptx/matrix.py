"""Matrices of 8 x 8 and wgmma in PTX: see :mod:`ptx.machine`.

Where an element of a fragment is, and what a matrix descriptor says of shared memory:
PTX ISA, "Matrix multiply-accumulate operation using wgmma" and "Canonical layouts".
"""

from __future__ import annotations

import functools
import re

import numpy as np

from ptx import flow
from ptx.numbers import widen

_SPANS = {1: 128, 2: 64, 3: 32}  # a descriptor's mode: bytes of the swizzle


def swizzled(addresses, span: int):
    """The 16-byte chunks of a span change places by the bits above the span."""
    if span == 0:
        return addresses
    bits = {128: 7, 64: 3, 32: 1}[span]
    return addresses ^ ((addresses >> 7 & bits) << 4)


def _matrices(count: int):
    """Lanes whose addresses are rows of matrix i, and what lane l holds of each."""
    lane = np.arange(32)
    return [(np.arange(8 * i, 8 * i + 8), lane // 4, lane % 4) for i in range(count)]


def _count_of(parts) -> int:
    return int(next(p for p in parts if re.fullmatch(r"x\d", p))[1:])


def _load_matrix(t, item, parts):
    count, transposed = _count_of(parts), "trans" in parts
    names = item.operands[0]
    puts = [t.result(name, np.uint32) for name in names]
    address = t.address(item.operands[1])

    def run(w):
        addresses = address(w).reshape(-1, 32)
        found = [np.zeros(w.size, np.uint32) for _ in puts]
        for warp in _active_warps(w):
            here = slice(32 * warp, 32 * warp + 32)
            for i, (rows, row, pair) in enumerate(_matrices(count)):
                columns = _columns(addresses[warp, rows])
                matrix = w.block.shared.load(columns, 2)
                if transposed:
                    matrix = matrix.T
                found[i][here] = _pairs(matrix, row, 2 * pair)
        for put, value in zip(puts, found, strict=True):
            put(w, value)

    return flow.converged(run)


def _columns(starts):
    """Addresses of eight rows of eight 16-bit numbers."""
    if (starts % 16).any():
        raise flow.EmulationError("a matrix row that is not 16-byte aligned")
    return starts[:, None] + np.arange(0, 16, 2, dtype=np.uint64)


def _pairs(matrix, row, col):
    """Of each lane, the 16-bit numbers at its column and the next, as one register."""
    high = matrix[row, col + 1].astype(np.uint32) << np.uint32(16)
    return matrix[row, col] | high


def _put_pairs(matrix, row, col, pairs) -> None:
    matrix[row, col] = pairs.astype(np.uint16)
    matrix[row, col + 1] = (pairs >> np.uint32(16)).astype(np.uint16)


def _store_matrix(t, item, parts):
    count, transposed = _count_of(parts), "trans" in parts
    address = t.address(item.operands[0])
    values = [t.value(name, np.uint32) for name in item.operands[1]]

    def run(w):
        addresses = address(w).reshape(-1, 32)
        for warp in _active_warps(w):
            here = slice(32 * warp, 32 * warp + 32)
            for i, (rows, row, pair) in enumerate(_matrices(count)):
                pairs = np.broadcast_to(values[i](w), w.size)[here]
                matrix = np.zeros((8, 8), np.uint16)
                _put_pairs(matrix, row, 2 * pair, pairs)
                if transposed:
                    matrix = matrix.T
                w.block.shared.store(_columns(addresses[warp, rows]), matrix, 2)

    return flow.converged(run)


def _move_matrix(t, item, parts):
    put = t.result(item.operands[0], np.uint32)
    value = t.value(item.operands[1], np.uint32)
    lane = np.arange(32)

    def run(w):
        values = np.broadcast_to(value(w), w.size)
        found = np.zeros(w.size, np.uint32)
        for first in range(0, w.size, 32):
            pairs = values[first : first + 32]
            matrix = np.zeros((8, 8), np.uint16)
            row, col = lane // 4, 2 * (lane % 4)
            _put_pairs(matrix, row, col, pairs)
            found[first : first + 32] = _pairs(matrix.T, row, col)
        put(w, found)

    return flow.converged(run)


def _active_warps(w):
    return np.flatnonzero(w.active().reshape(-1, 32).any(axis=1))


@functools.lru_cache(maxsize=4096)
def operand_addresses(descriptor: int, rows: int, transposed: bool):
    """Where the elements [rows, 16] of an operand are; rows are M or N."""
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7:
        raise NotImplementedError("a descriptor with a base offset")
    mode = descriptor >> 62
    if mode not in _SPANS:
        raise NotImplementedError("a descriptor without swizzle")
    span = _SPANS[mode]
    row, k = np.ogrid[:rows, :16]
    if transposed:
        # Rows are next to each other, as many as a span has; k is in eights.
        per_span = span // 2
        offset = (
            row % per_span * 2
            + row // per_span * leading
            + k % 8 * span
            + k // 8 * stride
        )
    else:
        offset = row // 8 * stride + row % 8 * span + k * 2
    return swizzled(start + offset, span).astype(np.uint64)


def _products(t, item, parts):
    shape = next(p for p in parts if re.fullmatch(r"m64n\d+k16", p))
    n = int(re.fullmatch(r"m64n(\d+)k16", shape).group(1))
    kind = parts[-1]
    accumulators, a, b, scale, *rest = item.operands
    registers = [t.index(name) for name in accumulators]
    from_registers = isinstance(a, tuple)
    signs, transposes = [int(x) for x in rest[:2]], [int(x) for x in rest[2:]]
    if signs != [1, 1] or len(registers) != n // 2:
        raise NotImplementedError(item.text)
    transposed_b = bool(transposes[-1])
    transposed_a = bool(transposes[0]) if not from_registers else False
    a_values = (
        [t.value(name, np.uint32) for name in a]
        if from_registers
        else t.value(a, np.uint64)
    )
    b_value = t.value(b, np.uint64)
    accumulates = t.value(scale, bool)
    thread = np.arange(128)
    row = 16 * (thread // 32) + thread % 32 // 4
    pair = 2 * (thread % 4)
    index = np.arange(n // 2)
    # Element i of a thread's accumulator, for all threads.
    d_row = row + 8 * (index[:, None] // 2 % 2)
    d_col = 8 * (index[:, None] // 4) + pair + index[:, None] % 2

    def shared_operand(w, value, rows, transposed):
        descriptors = value(w)
        descriptor = int(descriptors[0]) if np.ndim(descriptors) else int(descriptors)
        if np.ndim(descriptors) and (descriptors != descriptors[0]).any():
            raise flow.EmulationError("a descriptor that differs among threads")
        addresses = operand_addresses(descriptor, rows, transposed)
        return widen(w.block.shared.load(addresses, 2), kind)

    def register_operand(w):
        matrix = np.zeros((64, 16), np.uint16)
        for j, value in enumerate(a_values):
            pairs = value(w)
            rows, cols = row + 8 * (j % 2), pair + 8 * (j // 2)
            _put_pairs(matrix, rows, cols, pairs)
        return widen(matrix, kind)

    def run(w):
        if w.size != 128:
            raise flow.EmulationError("wgmma of less than a warpgroup")
        if from_registers:
            left = register_operand(w)
        else:
            left = shared_operand(w, a_values, 64, transposed_a)
        right = shared_operand(w, b_value, n, transposed_b)
        product = (left @ right.T)[d_row, d_col]
        keep = accumulates(w)
        if np.ndim(keep):
            keep = bool(keep[0])
        for register, values in zip(registers, product, strict=True):
            w.r[register] = w.r[register] + values if keep else values

    return flow.warpgroup_converged(run)


def _wgmma_order(t, item, parts):
    return flow.warpgroup_converged(lambda w: None)


MAKERS = {
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "movmatrix": _move_matrix,
    "wgmma.mma_async": _products,
    "wgmma": _wgmma_order,
}
