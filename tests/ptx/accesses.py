"""Loads, stores and addresses in PTX: see :mod:`ptx.machine`."""

from __future__ import annotations

import numpy as np

from ptx import flow
from ptx.memories import Bytes
from ptx.types import full, type_of


def _address_space(t, item, parts):
    """cvta: between generic addresses and those of one memory."""
    put = t.result(item.operands[0], np.uint64)
    value = t.value(item.operands[1], np.uint64)
    space = parts[2] if parts[1] == "to" else parts[1]
    if space != "shared":
        return lambda w: put(w, full(w, value(w)))
    base = np.uint64(flow.SHARED_BASE)
    if parts[1] == "to":
        return lambda w: put(w, full(w, value(w) - base))
    return lambda w: put(w, full(w, value(w) + base))


def _memory(w, space, addresses):
    """What holds the addresses, and where in it they are."""
    if space in ("global", "const"):
        return w.machine.memory, addresses
    if space == "shared":
        return w.block.shared, addresses
    if space == "param":
        return w.machine.params, addresses
    if space == "local":
        return _local(w), _local_addresses(w, addresses)
    active = addresses[w.active()]
    low, high = int(active.min()), int(active.max())
    if high < flow.SHARED_BASE:
        return w.machine.memory, addresses
    if low >= flow.LOCAL_BASE:
        return _local(w), _local_addresses(w, addresses)
    if low >= flow.PARAM_BASE:
        return w.machine.params, addresses
    if low >= flow.SHARED_BASE and high < flow.PARAM_BASE:
        return w.block.shared, addresses - np.uint64(flow.SHARED_BASE)
    raise NotImplementedError("generic addresses of several memories")


def _local_bytes(w) -> int:
    """Of a thread: whole runs of 16."""
    return -(-w.machine.local_bytes // 16) * 16


def _local(w):
    if w.local is None:
        w.local = Bytes(_local_bytes(w) * w.size)
    return w.local


def _local_addresses(w, addresses):
    lanes = np.arange(w.size, dtype=np.uint64) * np.uint64(_local_bytes(w))
    return addresses - np.uint64(flow.LOCAL_BASE) + lanes


def _space(parts) -> str:
    for part in parts[1:]:
        name = part.partition("::")[0]
        if name in ("global", "shared", "param", "local", "const"):
            return name
    return ""


def _vectors(w, space, addresses, size):
    """As _memory, of vectors of ``size`` bytes, which have to be aligned as a whole."""
    if (addresses[w.active()] % np.uint64(size)).any():
        raise flow.EmulationError(f"a misaligned access of {size} bytes")
    return _memory(w, space, addresses)


def _load(t, item, parts):
    target, source = item.operands[:2]
    names = target if isinstance(target, tuple) else (target,)
    dtype, space = type_of(parts), _space(parts)
    bits = np.dtype(f"u{dtype.itemsize}")
    puts = [t.result(name, dtype) for name in names]
    address = t.address(source)
    size = dtype.itemsize
    waits = "acquire" in parts or "volatile" in parts

    def run(w):
        memory, addresses = _vectors(w, space, address(w), size * len(names))
        for index, put in enumerate(puts):
            where = addresses + np.uint64(size * index) if index else addresses
            if w.mask is None:
                found = memory.load(where, size)
            else:
                found = np.zeros(w.size, bits)
                found[w.mask] = memory.load(where[w.mask], size)
            put(w, found.view(dtype))
        return flow.YIELD if waits else None

    return run


def _store(t, item, parts):
    target, source = item.operands[:2]
    names = source if isinstance(source, tuple) else (source,)
    dtype, space = type_of(parts), _space(parts)
    bits = np.dtype(f"u{dtype.itemsize}")
    values = [t.value(name, dtype) for name in names]
    address = t.address(target)
    size = dtype.itemsize

    def run(w):
        active = w.active()
        memory, addresses = _vectors(w, space, address(w), size * len(names))
        for index, value in enumerate(values):
            stored = np.ascontiguousarray(full(w, value(w))).view(bits)
            where = addresses + np.uint64(size * index)
            memory.store(where[active], stored[active], size)

    return run


def _reduce_global(t, item, parts):
    dtype = type_of(parts)
    if parts[-2] != "add":
        raise NotImplementedError(item.text)
    address, value = t.address(item.operands[0]), t.value(item.operands[1], dtype)

    def run(w):
        addresses, values = address(w), full(w, value(w))
        for lane in np.flatnonzero(w.active()):
            cell = w.machine.memory.bytes(int(addresses[lane]), dtype.itemsize)
            cell.view(dtype)[0] += values[lane]
        w.machine.changes += 1

    return run


def _fetch_add(t, item, parts):
    dtype = type_of(parts)
    if parts[-2] != "add":
        raise NotImplementedError(item.text)
    result, address, value = item.operands
    put, address = t.result(result, dtype), t.address(address)
    value = t.value(value, dtype)

    def run(w):
        addresses, values = address(w), full(w, value(w))
        found = np.zeros(w.size, dtype)
        for lane in np.flatnonzero(w.active()):
            cell = w.machine.memory.bytes(int(addresses[lane]), dtype.itemsize)
            found[lane] = cell.view(dtype)[0]
            cell.view(dtype)[0] += values[lane]
        put(w, found)
        w.machine.changes += 1

    return run


MAKERS = {
    "atom": _fetch_add,
    "cvta": _address_space,
    "ld": _load,
    "st": _store,
    "red": _reduce_global,
}
