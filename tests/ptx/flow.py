"""How an instruction ends, and the address spaces: see :mod:`ptx.machine`."""

from __future__ import annotations

SHARED_BASE = 1 << 56  # generic addresses of shared memory
PARAM_BASE = 1 << 57
LOCAL_BASE = 1 << 58

# What an instruction returns besides None (go on), a number (jump) and a branch that
# takes lanes apart (where to, who).
BLOCKED, YIELD, EXIT = object(), object(), object()


class EmulationError(RuntimeError):
    """A kernel does what PTX does not allow, or hangs."""


def converged(run):
    """An instruction that waits until all of a warp's threads are there."""

    def wait(w):
        return run(w) if w.whole_warps() else BLOCKED

    return wait


def warpgroup_converged(run):
    """The same for a warpgroup."""

    def wait(w):
        return run(w) if w.whole() else BLOCKED

    return wait
