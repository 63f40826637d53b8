"""The copy engine and mbarriers in PTX: see :mod:`ptx.machine`.

Tensor maps are those that the interpreter encodes (cuda/interpreter/tensor_map.h).
"""

from __future__ import annotations

import ctypes

import jax.numpy as jnp
import numpy as np

from ptx import flow
from ptx.matrix import swizzled
from ptx.memories import MemoryBarrier

_RANK = 5
# bfloat16, float16, float32, int32
_DTYPES = (jnp.bfloat16, np.float16, np.float32, np.int32)


class BoxMap(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("rank", ctypes.c_int16),
        ("swizzle", ctypes.c_int16),
        ("type", ctypes.c_int32),
        ("box", ctypes.c_int32 * _RANK),
        ("dims", ctypes.c_int64 * _RANK),
        ("strides", ctypes.c_int64 * _RANK),
        ("address", ctypes.c_void_p),
    )


def _read_map(w, address: int) -> BoxMap:
    size = ctypes.sizeof(BoxMap)
    if address >= flow.PARAM_BASE:
        start = address - flow.PARAM_BASE
        raw = w.machine.params.bytes[start : start + size]
    else:
        raw = w.machine.memory.bytes(address, size)
    found = BoxMap.from_buffer_copy(raw.tobytes())
    if address % 64 or found.magic != 0x746B6D70:
        raise flow.EmulationError(f"no tensor map at {address:#x}")
    return found


def _box(box_map: BoxMap, coordinates, shared_address: int):
    """Addresses of a box: in global memory, which are inside, in shared memory."""
    rank = box_map.rank
    if len(coordinates) != rank:
        raise flow.EmulationError(
            f"{len(coordinates)} coordinates for a tensor map of rank {rank}"
        )
    dtype = np.dtype(_DTYPES[box_map.type])
    box = list(box_map.box[:rank])
    if shared_address % 128:
        raise flow.EmulationError("a tile that is not 128-byte aligned")
    source = np.zeros(box[::-1], np.int64)
    inside = np.ones(box[::-1], bool)
    for dim in range(rank):
        where = coordinates[dim] + np.arange(box[dim], dtype=np.int64)
        shape = [1] * rank
        shape[rank - 1 - dim] = box[dim]
        source += (where * box_map.strides[dim]).reshape(shape)
        inside &= ((where >= 0) & (where < box_map.dims[dim])).reshape(shape)
    offset = (
        np.arange(source.size, dtype=np.int64).reshape(source.shape) * dtype.itemsize
    )
    target = swizzled(shared_address + offset, box_map.swizzle)
    return (
        dtype,
        (source + box_map.address).astype(np.uint64),
        inside,
        target.astype(np.uint64),
    )


def _lane_numbers(w, values):
    """Python integers of each active lane, for each of the functions."""
    arrays = [np.broadcast_to(value(w), w.size) for value in values]
    return [
        tuple(int(array[lane]) for array in arrays)
        for lane in np.flatnonzero(w.active())
    ]


def _tensor_load(w, blocks, to, map_address, barrier, coordinates):
    box_map = _read_map(w, map_address)
    dtype, source, inside, target = _box(box_map, coordinates, to)
    size = dtype.itemsize
    values = np.zeros(source.shape, f"u{size}")
    values[inside] = w.machine.memory.load(source[inside], size)
    for block in blocks:
        block.shared.store(target, values, size)
        block.barriers[barrier].change(0, -values.nbytes)
    w.machine.changes += 1


def _copy(t, item, parts):
    """cp.async.bulk and cp.reduce.async.bulk of every kind used."""
    if parts[3] in ("commit_group", "wait_group"):
        return lambda w: None
    if "tensor" in parts:
        return _tensor_copy(t, item, parts)
    adds = parts[1] == "reduce"
    loads = "mbarrier::complete_tx::bytes" in parts
    if loads:
        to, source = t.address(item.operands[0]), t.address(item.operands[1])
        barrier = t.address(item.operands[3])
        count = t.value(item.operands[2], np.uint32)

        def load(w):
            for target, start, size, where in _lane_numbers(
                w, (to, source, count, barrier)
            ):
                _check_run(target, start, size)
                w.block.shared.bytes[target : target + size] = w.machine.memory.bytes(
                    start, size
                )
                w.block.barrier(where).change(0, -size)

        return load
    to, source = t.address(item.operands[0]), t.address(item.operands[1])
    count = t.value(item.operands[2], np.uint32)

    def store(w):
        for target, start, size in _lane_numbers(w, (to, source, count)):
            _check_run(target, start, size)
            values = w.block.shared.bytes[start : start + size]
            memory = w.machine.memory.bytes(target, size)
            if adds:
                memory.view(np.float32)[:] += values.view(np.float32)
            else:
                memory[:] = values
        w.machine.changes += 1

    return store


def _check_run(target, source, size):
    if target % 16 or source % 16 or size % 16:
        raise flow.EmulationError(
            f"a bulk copy of {size} bytes from {source:#x} to {target:#x}"
        )


def _tensor_copy(t, item, parts):
    adds = parts[1] == "reduce"
    if "mbarrier::complete_tx::bytes" in parts:
        to = t.address(item.operands[0])
        map_operand = item.operands[1]
        map_address = t.address(map_operand[:3])
        barrier = t.address(item.operands[2])
        coordinates = [t.value(name, np.int32) for name in map_operand[3]]
        mask = (
            t.value(item.operands[3], np.uint16)
            if "multicast::cluster" in parts
            else None
        )

        def load(w):
            for target, where, at, *lists in _lane_numbers(
                w, (to, map_address, barrier, *coordinates, *([mask] if mask else []))
            ):
                blocks = [w.block]
                if mask:
                    chosen = lists.pop()
                    blocks = [
                        block
                        for i, block in enumerate(w.block.cluster)
                        if chosen >> i & 1
                    ]
                _tensor_load(w, blocks, target, where, at, lists)

        return load
    map_operand, source = item.operands
    map_address = t.address(map_operand[:3])
    coordinates = [t.value(name, np.int32) for name in map_operand[3]]
    start = t.address(source)

    def store(w):
        for where, at, *numbers in _lane_numbers(w, (map_address, start, *coordinates)):
            box_map = _read_map(w, where)
            dtype, target, inside, shared = _box(box_map, numbers, at)
            values = w.block.shared.load(shared, dtype.itemsize)[inside]
            if adds:
                before = w.machine.memory.load(target[inside], dtype.itemsize)
                values = before.view(dtype) + values.view(dtype)
                values = values.view(before.dtype)
            w.machine.memory.store(target[inside], values, dtype.itemsize)
        w.machine.changes += 1

    return store


def _barrier_init(t, item, parts):
    address, count = t.address(item.operands[0]), t.value(item.operands[1], np.uint32)

    def run(w):
        for where, arrivals in _lane_numbers(w, (address, count)):
            w.block.barriers[where] = MemoryBarrier(arrivals)

    return run


def _barrier_arrive(t, item, parts):
    address = t.address(item.operands[1])
    expects = "expect_tx" in parts
    count = t.value(item.operands[2], np.uint32) if expects else None

    def run(w):
        values = (address, count) if expects else (address,)
        for where, *size in _lane_numbers(w, values):
            barrier = w.block.barrier(where)
            if size:
                barrier.bytes += size[0]
            barrier.change(1, 0)

    return run


def _barrier_wait(t, item, parts):
    put = t.result(item.operands[0], bool)
    address, parity = t.address(item.operands[1]), t.value(item.operands[2], np.uint32)

    def run(w):
        addresses = np.broadcast_to(address(w), w.size)
        parities = np.broadcast_to(parity(w), w.size)
        passed = np.ones(w.size, bool)
        active = w.active()
        pairs = {
            (int(a), int(p))
            for a, p in zip(addresses[active], parities[active], strict=True)
        }
        for where, bit in pairs:
            if where not in w.block.barriers:
                raise flow.EmulationError(f"no mbarrier was made at {where:#x}")
            if not w.block.barriers[where].passed(bit):
                passed &= ~((addresses == where) & (parities == bit))
        put(w, passed)
        return None if passed[active].all() else flow.YIELD

    return run


def _map_address(t, item, parts):
    put = t.result(item.operands[0], np.uint32)
    address, rank = (t.value(operand, np.uint32) for operand in item.operands[1:])
    return lambda w: put(
        w,
        np.broadcast_to((rank(w) + np.uint32(1)) << np.uint32(24) | address(w), w.size),
    )


MAKERS = {
    "cp.async.bulk": _copy,
    "cp.reduce.async.bulk": _copy,
    "mbarrier.init": _barrier_init,
    "mbarrier.arrive": _barrier_arrive,
    "mbarrier.try_wait": _barrier_wait,
    "mapa": _map_address,
}
