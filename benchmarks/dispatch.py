"""What a small call costs over its kernel.

A call of a jitted attention, back to back with others, beside one of a chain of calls
in a single program, each on the last one's result: what the first takes longer is the
launch of a program and its dispatch from Python, as far as the GPU waits for them.
Beside them ``ADD``, the least that a program of these arrays costs on the same host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import jax

from benchmarks import results
from benchmarks.cases import AttentionCase, make_inputs

CASE = AttentionCase(1, 512, 512, 16, 16, 128, False)
ADD = "q + k + v"
_CHAIN = 20


def rows(
    builders: Mapping[str, Callable], *, gpu, measure, rounds, seconds
) -> list[results.Row]:
    """A row an implementation, of direction "dispatch"; the last is ``ADD``'s."""
    case = CASE
    builders = {**builders, ADD: lambda case: lambda q, k, v: q + k + v}
    (q, k, v), _ = make_inputs(case, seed=0)
    calls = {}
    for name, builder in builders.items():
        try:
            function = builder(case)
            one = jax.jit(function)
            chain = jax.jit(_chain(function))
            jax.block_until_ready((one(q, k, v), chain(q, k, v)))
        except Exception as error:  # Rivals may raise anything.
            print(f"dispatch  {name}: left out, {type(error).__name__}: {error}"[:300])
            continue
        calls[name, "one"] = lambda index, one=one: one(q, k, v)
        calls[name, "chain"] = lambda index, chain=chain: chain(q, k, v)
    found = measure(calls, rounds=rounds, seconds=seconds) if calls else {}
    return [
        _row(case, name, found[name, "one"], found[name, "chain"], gpu)
        for name in builders
        if (name, "one") in found
    ]


def _chain(function):
    def run(q, k, v):
        for _ in range(_CHAIN):
            q = function(q, k, v)
        return q

    return run


def _row(case, name, one, chain, gpu) -> results.Row:
    kernel = statistics.median(chain) / _CHAIN
    return results.make_row(
        case,
        results.DISPATCH,
        name,
        one,
        gpu=gpu,
        compile_s=0.0,
        method="direct",
        overhead=statistics.median(one) - kernel,
    )
