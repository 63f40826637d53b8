"""PTX instructions as functions of a warpgroup: see :mod:`ptx.machine`.

Each opcode that kernels use has a maker, which takes the instruction apart once and
returns what executes it. An opcode without one is an error when a kernel is loaded.
"""

from __future__ import annotations

import struct

import numpy as np

from ptx import accesses, flow, matrix, numbers, threads, transfer
from ptx.types import REGISTERS

_SPECIAL = {
    "%tid.x": lambda w: np.arange(w.first, w.first + w.size, dtype=np.uint32),
    "%tid.y": lambda w: 0,
    "%tid.z": lambda w: 0,
    "%ntid.x": lambda w: w.machine.threads,
    "%ctaid.x": lambda w: w.block.index[0],
    "%ctaid.y": lambda w: w.block.index[1],
    "%ctaid.z": lambda w: w.block.index[2],
    "%nctaid.x": lambda w: w.machine.grid[0],
    "%nctaid.y": lambda w: w.machine.grid[1],
    "%nctaid.z": lambda w: w.machine.grid[2],
    "%cluster_ctarank": lambda w: w.block.cluster_rank,
    "%laneid": lambda w: np.arange(w.size, dtype=np.uint32) % 32,
}


class Translator:
    """What makers need to know of a program."""

    def __init__(self, program, machine):
        self.program = program
        self.machine = machine
        self.registers = machine.register_index

    def is_register(self, name) -> bool:
        return isinstance(name, str) and name in self.registers

    def index(self, name: str) -> int:
        return self.registers[name]

    def stored(self, name: str):
        return np.dtype(REGISTERS[self.program.registers[name]])

    def value(self, operand: str, dtype):
        """A function of a warpgroup: the operand as ``dtype``, an array or a number."""
        dtype = np.dtype(dtype)
        if self.is_register(operand):
            index, stored = self.index(operand), self.stored(operand)
            if stored == dtype:
                return lambda w: w.r[index]
            if stored.itemsize == dtype.itemsize:
                return lambda w: w.r[index].view(dtype)
            if stored.itemsize > dtype.itemsize:
                narrow = np.dtype(f"u{dtype.itemsize}")
                return lambda w: w.r[index].astype(narrow).view(dtype)
            raise NotImplementedError(f"{operand} as {dtype}")
        if operand in _SPECIAL:
            get = _SPECIAL[operand]
            return lambda w: np.broadcast_to(np.asarray(get(w)).astype(dtype), w.size)
        number = np.array(self.constant(operand, dtype), dtype)[()]
        return lambda w: number

    def constant(self, text: str, dtype):
        if text.startswith(("0f", "0F")):
            return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
        if text.startswith(("0d", "0D")):
            return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
        if text in self.machine.symbols:
            return self.machine.symbols[text]
        number = int(text.rstrip("U"), 0)
        if dtype.kind == "b":
            return number != 0
        if dtype.kind in "iu":
            bits = 8 * dtype.itemsize
            number &= (1 << bits) - 1
            if dtype.kind == "i" and number >> (bits - 1):
                number -= 1 << bits
        return number

    def result(self, name: str, dtype):
        """``put(w, value)``: a value of ``dtype`` into a register that may be wider."""
        if name == "_":
            return lambda w, value: None
        index, stored, dtype = self.index(name), self.stored(name), np.dtype(dtype)
        if stored == dtype:
            return lambda w, value: w.put(index, value)
        if stored.itemsize == dtype.itemsize:
            return lambda w, value: w.put(index, value.view(stored))
        wide = np.dtype(f"{dtype.kind}{stored.itemsize}")
        return lambda w, value: w.put(index, value.astype(wide).view(stored))

    def address(self, operand):
        """Of ``[base+offset]``: a function that gives 64-bit addresses of all lanes."""
        _, base, offset, *_ = operand
        if self.is_register(base):
            index, stored = self.index(base), self.stored(base)
            if stored.itemsize == 8:
                add = np.int64(offset).astype(np.uint64)
                if offset == 0:
                    return lambda w: w.r[index]
                return lambda w: w.r[index] + add
            add = np.int32(offset).astype(np.uint32)
            return lambda w: (w.r[index] + add).astype(np.uint64)
        number = np.uint64(self.machine.symbols[base] + offset)
        return lambda w: np.broadcast_to(number, w.size)


def translate(program, machine) -> list:
    translator = Translator(program, machine)
    return [_translate(item, translator) for item in program.instructions]


def _translate(item, translator):
    parts = item.opcode.split(".")
    if parts[0] == "bra":
        return _branch(item, translator)
    for length in range(len(parts), 0, -1):
        maker = MAKERS.get(".".join(parts[:length]))
        if maker is not None:
            break
    else:
        raise NotImplementedError(f"the PTX instruction {item.text}")
    run = maker(translator, item, parts)
    return _guarded(run, item, translator) if item.guard else run


def _guarded(run, item, translator):
    guard, negated = translator.index(item.guard), item.negated

    def guarded(w):
        chosen = w.r[guard] != negated
        before = w.mask
        mask = chosen if before is None else chosen & before
        if not mask.any():
            return None
        if before is None and mask.all():
            return run(w)
        w.mask = mask
        try:
            return run(w)
        finally:
            # What leaves is who was chosen: w.mask is looked at after.
            if run is not _exit:
                w.mask = before

    return guarded


def _branch(item, translator):
    target = translator.program.labels[item.operands[0]]
    if not item.guard:
        return lambda w: target
    guard, negated = translator.index(item.guard), item.negated

    def branch(w):
        taken = w.r[guard]
        if w.mask is None:
            if taken.all():
                return None if negated else target
            if not taken.any():
                return target if negated else None
            return (target, taken != negated)
        taken = (taken != negated) & w.mask
        if not taken.any():
            return None
        if (taken == w.mask).all():
            return target
        return (target, taken)

    return branch


def _exit(w):
    return flow.EXIT


MAKERS = {
    "ret": lambda t, item, parts: _exit,
    "exit": lambda t, item, parts: _exit,
    **numbers.MAKERS,
    **accesses.MAKERS,
    **threads.MAKERS,
    **matrix.MAKERS,
    **transfer.MAKERS,
}
