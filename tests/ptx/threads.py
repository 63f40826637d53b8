"""Exchanges and barriers of warps and blocks in PTX: see :mod:`ptx.machine`."""

from __future__ import annotations

import numpy as np

from ptx import flow
from ptx.memories import NamedBarrier
from ptx.types import full


def _shuffle(t, item, parts):
    mode = parts[2]
    target = item.operands[0]
    name, predicate = target if isinstance(target, tuple) else (target, None)
    put = t.result(name, np.uint32)
    put_predicate = t.result(predicate, bool) if predicate else None
    a, b, c = (t.value(operand, np.uint32) for operand in item.operands[1:4])

    def run(w):
        values = full(w, a(w))
        lane = np.arange(w.size, dtype=np.int64)
        mine = lane % 32
        by = np.asarray(b(w), np.int64) & 31
        clamp = np.asarray(c(w), np.int64) & 31
        segment = np.asarray(c(w), np.int64) >> 8 & 31
        least = mine & segment
        most = least | (clamp & ~segment)
        if mode == "up":
            source, inside = mine - by, mine - by >= most
        elif mode == "down":
            source, inside = mine + by, mine + by <= most
        elif mode == "bfly":
            source, inside = mine ^ by, (mine ^ by) <= most
        else:
            source = least | (by & ~segment)
            inside = source <= most
        source = np.where(inside, source, mine)
        put(w, values[lane - mine + source])
        if put_predicate:
            put_predicate(w, np.broadcast_to(inside, w.size))

    return flow.converged(run)


def _vote(t, item, parts):
    mode = parts[2]
    p = t.value(item.operands[1].lstrip("!"), bool)
    negated = item.operands[1].startswith("!")
    put = t.result(item.operands[0], np.uint32 if mode == "ballot" else bool)

    def run(w):
        votes = (full(w, p(w)) != negated) & w.active()
        warps = votes.reshape(-1, 32)
        if mode == "ballot":
            found = (warps.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(
                axis=1
            )
            found = found.astype(np.uint32)
        elif mode == "any":
            found = warps.any(axis=1)
        elif mode == "all":
            found = (warps | ~w.active().reshape(-1, 32)).all(axis=1)
        else:
            raise NotImplementedError(item.text)
        put(w, np.repeat(found, 32))

    return flow.converged(run)


def _elect(t, item, parts):
    target = item.operands[0]
    put = t.result(target[1], bool)

    def run(w):
        active = w.active().reshape(-1, 32)
        leaders = np.zeros_like(active)
        leaders[np.arange(len(active)), active.argmax(axis=1)] = True
        put(w, (leaders & active).reshape(-1))

    return flow.converged(run)


def _nothing(t, item, parts):
    return lambda w: None


def _sleep(t, item, parts):
    return lambda w: flow.YIELD


def _warp_sync(t, item, parts):
    return flow.converged(lambda w: None)


def _block_barrier(t, item, parts):
    waits = parts[1] == "sync"
    number = t.value(item.operands[0], np.uint32)
    count = t.value(item.operands[1], np.uint32) if len(item.operands) > 1 else None

    def run(w):
        key = int(
            np.asarray(number(w)).flat[_first(w)] if np.ndim(number(w)) else number(w)
        )
        block = w.block
        threads = int(w.active().sum())
        if count is None:
            expected = block.live_threads()
        else:
            expected = count(w)
            expected = int(expected[_first(w)] if np.ndim(expected) else expected)
        barrier = block.named.setdefault(key, NamedBarrier())
        generation = barrier.arrive(threads, expected)
        w.machine.changes += 1
        if not waits or barrier.generation > generation:
            return None
        w.current.waits_for = (barrier, generation)
        return flow.BLOCKED

    return flow.converged(run)


def _first(w) -> int:
    return int(w.active().argmax())


def _cluster_barrier(t, item, parts):
    arrives = "arrive" in parts

    def run(w):
        barrier = w.block.cluster_barrier
        if arrives:
            expected = sum(block.live_threads() for block in w.block.cluster)
            w.cluster_generation = barrier.arrive(int(w.active().sum()), expected)
            w.machine.changes += 1
            return None
        if barrier.generation > w.cluster_generation:
            return None
        w.current.waits_for = (barrier, w.cluster_generation)
        return flow.BLOCKED

    return flow.warpgroup_converged(run)


MAKERS = {
    "shfl.sync": _shuffle,
    "vote.sync": _vote,
    "elect.sync": _elect,
    "bar.warp.sync": _warp_sync,
    "bar": _block_barrier,
    "barrier.cluster": _cluster_barrier,
    "nanosleep": _sleep,
    "fence": _nothing,
    "membar": _nothing,
    "setmaxnreg": _nothing,
    "prefetch": _nothing,
}
