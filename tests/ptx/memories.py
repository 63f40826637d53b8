"""Memories and barriers: see :mod:`ptx.machine`."""

from __future__ import annotations

import ctypes

import numpy as np

from ptx.flow import EmulationError

_NOWHERE = 4096  # addresses below it are no memory

# All memory of this process; accesses are checked before they are made.
_MEMORY = np.frombuffer(
    (ctypes.c_uint8 * ((1 << 47) - _NOWHERE)).from_address(_NOWHERE), np.uint8
)
_VIEWS = {size: _MEMORY.view(f"u{size}") for size in (1, 2, 4, 8)}


class GlobalMemory:
    """The arrays that a kernel was given."""

    def __init__(self, arrays):
        self.arrays = [(start, start + size) for start, size in arrays if size]

    def _holds(self, low: int, high: int) -> bool:
        return any(start <= low and high <= end for start, end in self.arrays)

    def _check(self, low: int, high: int) -> None:
        if not self._holds(low, high):
            raise EmulationError(
                f"global addresses {low:#x} to {high:#x} are in no array of the call"
            )

    def index(self, addresses, size):
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            if not self._holds(low, high + size):
                for address in addresses:
                    self._check(int(address), int(address) + size)
            if (addresses & np.uint64(size - 1)).any():
                raise EmulationError(f"a misaligned access of {size} bytes")
        return (addresses - np.uint64(_NOWHERE)) >> np.uint64(size.bit_length() - 1)

    def load(self, addresses, size):
        return _VIEWS[size][self.index(addresses, size)]

    def store(self, addresses, values, size):
        _VIEWS[size][self.index(addresses, size)] = values

    def bytes(self, address: int, count: int):
        self._check(address, address + count)
        return _MEMORY[address - _NOWHERE : address - _NOWHERE + count]


class Bytes:
    """A memory of the machine's own: shared, of parameters, or local."""

    def __init__(self, size: int, base: int = 0):
        self.base = base
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}

    def index(self, addresses, size):
        offsets = addresses.astype(np.uint64) - np.uint64(self.base)
        if (offsets & np.uint64(size - 1)).any():
            raise EmulationError(f"a misaligned access of {size} bytes")
        if offsets.size and int(offsets.max()) + size > self.bytes.size:
            raise EmulationError("an access beyond the end of a block's memory")
        return offsets >> np.uint64(size.bit_length() - 1)

    def load(self, addresses, size):
        return self.views[size][self.index(addresses, size)]

    def store(self, addresses, values, size):
        self.views[size][self.index(addresses, size)] = values


class MemoryBarrier:
    """An mbarrier: arrivals and bytes of one phase after another."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0

    def change(self, arrivals: int, more_bytes: int) -> None:
        self.pending -= arrivals
        self.bytes += more_bytes
        if self.pending < 0:
            raise EmulationError("more arrivals on an mbarrier than it expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return (self.phase & 1) != parity


class NamedBarrier:
    def __init__(self):
        self.arrived = 0
        self.generation = 0

    def arrive(self, threads: int, expected: int) -> int:
        """The generation that is complete when all have arrived."""
        mine = self.generation
        self.arrived += threads
        if self.arrived > expected:
            raise EmulationError(f"{self.arrived} of {expected} threads at a barrier")
        if self.arrived == expected:
            self.arrived = 0
            self.generation += 1
        return mine
