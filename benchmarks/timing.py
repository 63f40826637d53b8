"""Times asynchronous calls: back to back, in rounds that alternate between programs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping

import jax

# Takes the index of the set of inputs to use; returns arrays not yet computed.
Call = Callable[[int], object]


def measure(
    calls: Mapping[Hashable, Call], *, rounds: int, seconds: float
) -> dict[Hashable, list[float]]:
    """Seconds per call, one sample for each of ``rounds`` rounds.

    A sample is the wall clock of so many calls dispatched back to back that they take
    about ``seconds``, so that dispatch and the final wait, of some tens of
    microseconds, do not show. In every round each program runs once, in an order drawn
    anew, and before its sample as long untimed: a chip at its power limit is as fast as
    what ran just before lets it be, which is to be the program itself.
    """
    repeats = {name: _repeats(call, seconds) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    draw = random.Random(0)
    order = list(calls)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            _run(calls[name], repeats[name])
            samples[name].append(_sample(calls[name], repeats[name]))
    return samples


def _repeats(call: Call, seconds: float) -> int:
    jax.block_until_ready(call(0))
    estimate = min(_sample(call, 3), _sample(call, 3))
    return max(3, min(2000, round(seconds / estimate)))


def _sample(call: Call, repeats: int) -> float:
    # Of what the wall clock does not tell, the call knows better.
    own = getattr(call, "sample", None)
    if own is not None:
        return own(repeats)
    start = time.perf_counter()
    _run(call, repeats)
    return (time.perf_counter() - start) / repeats


def _run(call: Call, repeats: int) -> None:
    for index in range(repeats):
        result = call(index)
    jax.block_until_ready(result)
