"""The programs of one implementation and case: compiled, run once, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.cases import Case, input_structs
from benchmarks.timing import Call

Inputs = Sequence[tuple[list[jax.Array], jax.Array]]


class Programs:
    """Forward, backward, and both in one, of one function of a case's arrays.

    Backward is timed alone ("direct") where the pull-back of ``jax.vjp`` can leave a
    jitted program: its residuals are computed beforehand, for every set of inputs. For
    an implementation where it cannot, and beside it for the others, it is the time of
    both less that of forward ("difference").

    Made (traced and lowered: Python) and compiled (XLA, beside other work) apart.
    """

    clock = "wall"

    def __init__(
        self,
        function: Callable,
        case: Case,
        directions: Sequence[str],
        backward: str,
    ):
        self.directions = tuple(directions)
        self.compile_s: dict[str, float] = {}
        self.direct = "bwd" in directions and backward != "difference"
        self.difference = "bwd" in directions and backward != "direct"
        self.no_direct_reason: str | None = None
        self._function = function
        self._arrays, self._dout = input_structs(case)
        self._lowered: dict[str, jax.stages.Lowered] = {}
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._lower("fwd", function, *self._arrays)
        if self.direct:
            self._lower_pull_back()
        if self.difference:
            self._lower_both()

    def _lower_pull_back(self):
        function = self._function
        try:
            with_residuals = self._lower(
                "residuals", lambda *arrays: jax.vjp(function, *arrays), *self._arrays
            )
            residuals, structure = jax.tree.flatten(with_residuals.out_info[1])
            residuals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals]
            # Flat, so that a call does not spend time on flattening.
            self._lower(
                "bwd",
                lambda residuals, dout: jax.tree.unflatten(structure, residuals)(dout),
                residuals,
                self._dout,
            )
        except Exception as error:  # Rivals may raise anything here.
            self._no_direct(error)

    def _no_direct(self, error: Exception) -> None:
        self.direct = False
        self.no_direct_reason = f"{type(error).__name__}: {error}"[:200]
        if not self.difference:
            self.difference = True
            self._lower_both()

    def _lower_both(self) -> None:
        function = self._function
        self._lower(
            "both",
            lambda dout, *arrays: jax.vjp(function, *arrays)[1](dout),
            self._dout,
            *self._arrays,
        )

    def _lower(self, name: str, function: Callable, *args):
        start = time.perf_counter()
        self._lowered[name] = jax.jit(function).lower(*args)
        self.compile_s[name] = time.perf_counter() - start
        return self._lowered[name]

    def leave_out_backward(self) -> None:
        """Of a rival whose gradients are wrong."""
        self.directions = tuple(x for x in self.directions if x != "bwd")
        self.direct = self.difference = False

    def compile(self) -> None:
        """XLA's part, which needs neither Python's lock nor the GPU for long."""
        for name in list(self._lowered):
            start = time.perf_counter()
            self._compiled[name] = self._lowered.pop(name).compile()
            self.compile_s[name] += time.perf_counter() - start

    def first_calls(self, arrays, dout):
        """Runs everything once; returns out and, with a backward pass, gradients."""
        out = self._first("fwd", *arrays)
        gradients = None
        if self.direct:
            try:
                residuals = jax.tree.leaves(self._compiled["residuals"](*arrays)[1])
                gradients = self._first("bwd", residuals, dout)
            except Exception as error:  # Rivals may raise anything here.
                self._no_direct(error)
                self.compile()
        if self.difference:
            both = self._first("both", dout, *arrays)
            gradients = both if gradients is None else gradients
        if "bwd" in self.directions and not self.direct:
            self.compile_s["bwd"] = self.compile_s["both"]
        return out, gradients

    def _first(self, name: str, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(self._compiled[name](*args))
        self.compile_s[name] += time.perf_counter() - start
        return result

    def calls(self, inputs: Inputs) -> dict[str, Call]:
        """What to time, on rotating inputs: fwd, bwd, both, as far as they apply."""
        count = len(inputs)
        calls = {}
        # The difference needs the forward time.
        if "fwd" in self.directions or self.difference:
            forward = self._compiled["fwd"]
            calls["fwd"] = lambda index: forward(*inputs[index % count][0])
        if self.direct:
            backward = self._compiled["bwd"]
            residuals = [
                jax.tree.leaves(self._compiled["residuals"](*arrays)[1])
                for arrays, _ in inputs
            ]
            calls["bwd"] = lambda index: backward(
                residuals[index % count], inputs[index % count][1]
            )
        if self.difference:
            both = self._compiled["both"]
            calls["both"] = lambda index: both(
                inputs[index % count][1], *inputs[index % count][0]
            )
        return calls
