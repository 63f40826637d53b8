"""The programs of one implementation and case: compiled, sampled, ready to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks import gate
from benchmarks.cases import Case, make_inputs
from benchmarks.timing import Call

Inputs = Sequence[tuple[list[jax.Array], jax.Array]]


class Programs:
    """Forward, backward, and both in one, of one function of a case's arrays.

    Backward is timed alone ("direct") where the pull-back of ``jax.vjp`` can leave a
    jitted program: its residuals are computed beforehand, for every set of inputs. For
    an implementation where it cannot, and beside it for the others, it is the time of
    both less that of forward ("difference").
    """

    def __init__(self, function: Callable, directions: Sequence[str], backward: str):
        self.directions = tuple(directions)
        self.compile_s: dict[str, float] = {}
        self.direct = "bwd" in directions and backward != "difference"
        self.difference = "bwd" in directions and backward != "direct"
        self.no_direct_reason: str | None = None
        self._forward = jax.jit(function)
        self._with_residuals = jax.jit(lambda *arrays: jax.vjp(function, *arrays))
        self._both = jax.jit(lambda dout, *arrays: jax.vjp(function, *arrays)[1](dout))
        self._pull_back: Callable | None = None

    def first_calls(self, case: Case) -> dict[str, np.ndarray]:
        """Compiles and runs everything once; returns samples of the results."""
        arrays, dout = make_inputs(case, seed=0)
        out = self._timed_first("fwd", self._forward, *arrays)
        gradients = None
        if self.direct:
            gradients = self._first_pull_back(arrays, dout)
        if self.difference or (gradients is None and "bwd" in self.directions):
            self.difference = True
            both = self._timed_first("both", self._both, dout, *arrays)
            gradients = both if gradients is None else gradients
            self.compile_s.setdefault("bwd", self.compile_s["both"])
        return gate.samples(case, out, gradients)

    def _first_pull_back(self, arrays, dout):
        try:
            _, pull_back = self._with_residuals(*arrays)
            residuals, structure = jax.tree.flatten(pull_back)
            # Flat, so that a call does not spend time on flattening.
            self._pull_back = jax.jit(
                lambda residuals, dout: jax.tree.unflatten(structure, residuals)(dout)
            )
            return self._timed_first("bwd", self._pull_back, residuals, dout)
        except Exception as error:  # Rivals may raise anything here.
            self.direct = False
            self.no_direct_reason = f"{type(error).__name__}: {error}"[:200]
            return None

    def _timed_first(self, name: str, function: Callable, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        self.compile_s[name] = time.perf_counter() - start
        return result

    def calls(self, inputs: Inputs) -> dict[str, Call]:
        """What to time, on rotating inputs: fwd, bwd, both, as far as they apply."""
        count = len(inputs)
        calls = {}
        # The difference needs the forward time.
        if "fwd" in self.directions or self.difference:
            calls["fwd"] = lambda index: self._forward(*inputs[index % count][0])
        if self.direct:
            residuals = [
                jax.tree.leaves(self._with_residuals(*arrays)[1])
                for arrays, _ in inputs
            ]
            calls["bwd"] = lambda index: self._pull_back(
                residuals[index % count], inputs[index % count][1]
            )
        if self.difference:
            calls["both"] = lambda index: self._both(
                inputs[index % count][1], *inputs[index % count][0]
            )
        return calls
