"""Executes PTX on the CPU: the GPU's own code of a kernel, without a GPU.

The interpreter runs a kernel's source over a tile library of its own. What NVRTC makes
of the library's other half, with its lanes, swizzles, descriptors and inline assembly,
runs here: a warpgroup is arrays of 128 numbers, which are executed side by side, apart
where a branch takes lanes apart. Copies and products are done where they are issued:
that they are waited for is the interpreter's to check, and what ptxas makes of PTX is
the GPU's.

Semantics are those of NVIDIA's "Parallel Thread Execution ISA", version 8.
"""

from __future__ import annotations

import numpy as np

from ptx import translator, types
from ptx.flow import BLOCKED, EXIT, LOCAL_BASE, PARAM_BASE, YIELD, EmulationError
from ptx.memories import Bytes, MemoryBarrier, NamedBarrier
from ptx.program import Program

_FIRST_SHARED = 1024  # what the system keeps of shared memory
_TURN = 20000  # instructions
_IDLE_ROUNDS = 64


class Block:
    def __init__(self, machine, index, cluster_rank):
        self.machine = machine
        self.index = index
        self.cluster_rank = cluster_rank
        self.cluster: list[Block] = []
        self.cluster_barrier: NamedBarrier | None = None
        self.shared = Bytes(machine.shared_bytes)
        self.barriers: dict[int, MemoryBarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.warpgroups = [
            Warpgroup(self, first, min(128, machine.threads - first))
            for first in range(0, machine.threads, 128)
        ]

    def live_threads(self) -> int:
        return sum(group.live_threads() for group in self.warpgroups)

    def barrier(self, address: int) -> MemoryBarrier:
        """Of this block, or of the one in the cluster that mapa named."""
        block = self
        if address >> 24:
            block = self.cluster[(address >> 24) - 1]
            address &= 0xFFFFFF
        if address not in block.barriers:
            raise EmulationError(f"no mbarrier was made at {address:#x}")
        self.machine.changes += 1
        return block.barriers[address]


class _Lanes:
    """Threads of a warpgroup that are at the same instruction."""

    __slots__ = ("mask", "pc", "resting", "stuck", "waits_for")

    def __init__(self, pc, mask):
        self.pc = pc
        self.mask = mask
        self.waits_for = None  # a named barrier and its generation
        self.resting = False  # until the warpgroup's next turn
        self.stuck = False  # until other lanes come


class Warpgroup:
    """128 threads, or what a smaller block has."""

    def __init__(self, block: Block, first: int, size: int):
        self.block = block
        self.first = first
        self.size = size
        self.machine = block.machine
        self.r = self.machine.empty_registers(size)
        self.local = None
        self.mask = None  # of the lanes that execute now; None: all
        self.current = _Lanes(0, np.ones(size, bool))
        self.lanes = [self.current]
        self.all = np.ones(size, bool)

    def live_threads(self) -> int:
        return sum(int(lanes.mask.sum()) for lanes in self.lanes)

    def put(self, register: int, value) -> None:
        mask = self.mask
        if mask is None:
            self.r[register] = value
        else:
            self.r[register] = np.where(mask, value, self.r[register])

    def active(self):
        return self.all if self.mask is None else self.mask

    def whole_warps(self) -> bool:
        """Whether no living lane of a warp is elsewhere."""
        if self.mask is None or len(self.lanes) == 1:
            return True
        mine = self.mask.reshape(-1, 32).any(axis=1)
        return not any(
            (other.mask.reshape(-1, 32).any(axis=1) & mine).any()
            for other in self.lanes
            if other is not self.current
        )

    def whole(self) -> bool:
        return self.mask is None or len(self.lanes) == 1

    def run(self) -> bool:
        """One turn; whether anything but waiting was done."""
        budget = _TURN
        for lanes in self.lanes:
            lanes.resting = False
        while budget > 0:
            self._wake()
            ready = [
                lanes
                for lanes in self.lanes
                if not (lanes.resting or lanes.stuck or lanes.waits_for)
            ]
            if not ready:
                break
            self.current = min(ready, key=lambda lanes: lanes.pc)
            budget = self._run_lanes(budget)
        return budget <= 0

    def _wake(self) -> None:
        for lanes in list(self.lanes):
            if lanes.waits_for:
                barrier, generation = lanes.waits_for
                if barrier.generation > generation:
                    lanes.waits_for = None
                    lanes.pc += 1
                    lanes.stuck = False
                    # Who comes from a barrier may be at what wants all at once.
                    self._merge(lanes)

    def _run_lanes(self, budget: int) -> int:
        lanes = self.current
        code = self.machine.code
        full = lanes.mask.all()
        self.mask = None if full else lanes.mask
        others = {} if full else {o.pc for o in self.lanes if o is not lanes}
        pc = lanes.pc
        while budget > 0:
            budget -= 1
            try:
                result = code[pc](self)
            except Exception as error:
                raise self._explained(error, pc) from error
            if result is None:
                pc += 1
            elif result.__class__ is int:
                pc = result
            else:
                lanes.pc = pc
                if result is YIELD:
                    lanes.pc += 1
                    lanes.resting = True
                elif result is BLOCKED:
                    lanes.stuck = not lanes.waits_for
                elif result is EXIT:
                    self._leave(lanes, self.active())
                else:
                    self._split(lanes, *result)
                return budget
            if others and pc in others:
                lanes.pc = pc
                self._merge(lanes)
                return budget
            if others and any(pc > other for other in others):
                lanes.pc = pc
                return budget
        lanes.pc = pc
        return budget

    def _leave(self, lanes, mask) -> None:
        rest = lanes.mask & ~mask
        lanes.pc += 1
        if rest.any():
            lanes.mask = rest
        else:
            self.lanes.remove(lanes)
        self._free()
        self.machine.changes += 1

    def _split(self, lanes, target: int, taken) -> None:
        other = _Lanes(target, lanes.mask & taken)
        lanes.mask = lanes.mask & ~taken
        lanes.pc += 1
        self.lanes.append(other)
        self._merge(other)
        self._merge(lanes)

    def _merge(self, lanes) -> None:
        if lanes not in self.lanes:
            return
        for other in list(self.lanes):
            if other is not lanes and other.pc == lanes.pc and not other.waits_for:
                lanes.mask = lanes.mask | other.mask
                lanes.resting = lanes.resting and other.resting
                self.lanes.remove(other)
        self._free()

    def _free(self) -> None:
        for lanes in self.lanes:
            lanes.stuck = False

    def _explained(self, error, pc):
        text = self.machine.program.instructions[pc].text[:150]
        active = np.flatnonzero(self.active()) + self.first
        return EmulationError(
            f"{error} (block {self.block.index}, threads {active[0]} to {active[-1]}, "
            f"at: {text})"
        )


class Machine:
    """Runs one launch of a program."""

    def __init__(
        self, program: Program, *, threads, shared_bytes, cluster_size, params, memory
    ):
        self.program = program
        self.threads = threads
        self.cluster_size = cluster_size
        self.memory = memory
        self.params = Bytes(len(params), PARAM_BASE)
        self.params.bytes[: len(params)] = np.frombuffer(params, np.uint8)
        self.changes = 0
        self.symbols = {program.parameter: PARAM_BASE}
        self.local_bytes = 0
        self.kept = []
        used = _FIRST_SHARED
        for name, variable in program.variables.items():
            if variable.space == "shared":
                used = -(-used // variable.align) * variable.align
                self.symbols[name] = used
                used += variable.size
            elif variable.space == "local":
                self.symbols[name] = LOCAL_BASE
                self.local_bytes = variable.size
            else:
                self._place_constants(name, variable)
        self.shared_bytes = used + shared_bytes
        self.register_index = {name: i for i, name in enumerate(program.registers)}
        self.code = translator.translate(program, self)

    def _place_constants(self, name, variable):
        values = np.zeros(max(variable.count, 1), f"u{variable.width}")
        given = [value % (1 << 8 * variable.width) for value in variable.values]
        values[: len(given)] = given
        self.kept.append(values)
        self.symbols[name] = values.ctypes.data
        self.memory.arrays.append(
            (values.ctypes.data, values.ctypes.data + values.nbytes)
        )

    def empty_registers(self, size: int) -> list:
        kinds = {
            kind: np.full(size, 0xFFFFFFFFFFFFFFFF, np.uint64).view(dtype)[:size]
            if np.dtype(dtype) != bool
            else np.ones(size, bool)
            for kind, dtype in types.REGISTERS.items()
        }
        return [kinds[kind] for kind in self.program.registers.values()]

    def run(self, grid, resident: int) -> None:
        self.grid = grid
        count = grid[0] * grid[1] * grid[2]
        waiting = iter(range(0, count, self.cluster_size))
        running: list[list[Block]] = []
        idle = 0
        while True:
            while len(running) * self.cluster_size < max(resident, self.cluster_size):
                first = next(waiting, None)
                if first is None:
                    break
                running.append(self._start_cluster(first))
            if not running:
                return
            before = self.changes
            busy = False
            for cluster in running:
                for block in cluster:
                    for warpgroup in block.warpgroups:
                        busy |= warpgroup.run()
            running = [
                cluster
                for cluster in running
                if any(block.live_threads() for block in cluster)
            ]
            idle = 0 if busy or self.changes != before else idle + 1
            if idle > _IDLE_ROUNDS:
                raise EmulationError(f"deadlock: {self._who_waits(running)}")

    def _start_cluster(self, first: int) -> list[Block]:
        blocks = []
        for rank in range(self.cluster_size):
            number = first + rank
            index = (
                number % self.grid[0],
                number // self.grid[0] % self.grid[1],
                number // (self.grid[0] * self.grid[1]),
            )
            blocks.append(Block(self, index, rank))
        barrier = NamedBarrier()
        for block in blocks:
            block.cluster, block.cluster_barrier = blocks, barrier
        return blocks

    def _who_waits(self, running) -> str:
        found = []
        for cluster in running:
            for block in cluster:
                for group in block.warpgroups:
                    for lanes in group.lanes:
                        # Who rests has just looked, in vain, whether it may go on.
                        pc = lanes.pc - lanes.resting
                        at = self.program.instructions[pc].text[:90]
                        threads = np.flatnonzero(lanes.mask) + group.first
                        found.append(
                            f"block {block.index} threads {threads[0]} to "
                            f"{threads[-1]} at: {at}"
                        )
        return "; ".join(found[:12])
