"""``python -m benchmarks.steps``: steps of one token, ours beside XLA's.

A program is a decoding model's: one token through so many layers, each with a state of
its own, that the states are several times what L2 holds. States are given away and come
back updated. What is reported is a layer's share: its time, and the bytes that a step
cannot do without (its states read and written, everything else once) over it, as a
fraction of what an H100's memory moves at best in a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

import tk_jax
from benchmarks import results, timing
from tk_jax.ops.based_attention.features import TAYLOR

BYTES_PER_SECOND = 2.9e12
_STATE_BYTES = 256e6  # of all layers together
_MAX_LAYERS = 16
_BAR = 5e-3  # relative RMS errors
_HEDGEHOG_WINDOW = 64


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A step of an op: its state is key_dim x value_dim for each of num_heads."""

    op: str
    batch: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: str = "bfloat16"

    def __str__(self):
        return (
            f"{self.op}_step-B{self.batch}-H{self.num_heads}-K{self.key_dim}-"
            f"V{self.value_dim}-{self.dtype}"
        )

    @property
    def arrays(self) -> dict:
        """Shapes and dtypes, of the layer's parameters too."""
        heads = (self.batch, self.num_heads)
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=self.dtype)
        exact = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        keys, values = struct((*heads, self.key_dim)), struct((*heads, self.value_dim))
        if self.op == "ssd":
            group = struct((self.batch, 1, self.key_dim))
            return {
                "x": values,
                "dt": exact(heads),
                "A": exact(heads[1:]),
                "B": group,
                "C": group,
                "D": exact(heads[1:]),
                "dt_bias": exact(heads[1:]),
                "state": exact((*heads, self.value_dim, self.key_dim)),
            }
        arrays = {"q": keys, "k": keys, "v": values}
        if self.op == "linear_attention":
            state = exact((*heads, self.key_dim, self.value_dim))
            return arrays | {"log_decay": exact(heads), "state": state}
        if self.op == "based_attention":
            features = TAYLOR.num_features(self.key_dim)
            sums = exact((*heads, features, self.value_dim))
            normalizer = exact((*heads, features))
            return arrays | {"state": tk_jax.NormalizedState(sums, normalizer)}
        map_ = struct((self.num_heads, self.key_dim, 64))
        tokens = (self.batch, 2 * _HEDGEHOG_WINDOW, self.num_heads)
        return arrays | {
            "q_map": map_,
            "k_map": map_,
            "alpha": exact(heads[1:]),
            "beta": exact(heads[1:]),
            "state": tk_jax.HedgehogState(
                exact((*heads, 128, self.value_dim)),
                exact((*heads, 128)),
                struct((*tokens, self.key_dim)),
                struct((*tokens, self.value_dim)),
                jax.ShapeDtypeStruct((self.batch,), jnp.int32),
            ),
        }

    @property
    def bytes(self) -> int:
        """The states twice, what comes in and goes out once."""
        state = _size(self.arrays["state"])
        out = self.batch * self.num_heads * self.value_dim
        return _size(self.arrays) + state + out * jnp.dtype(self.dtype).itemsize

    @property
    def layers(self) -> int:
        wanted = -(-_STATE_BYTES // _size(self.arrays["state"]))
        return int(min(max(wanted, 4), _MAX_LAYERS))

    def step(self, implementation: str):
        settings = {
            "ssd": {"dt_softplus": True},
            "linear_attention": {},
            "based_attention": {},
            "hedgehog_attention": {},
        }[self.op]
        function = getattr(tk_jax, f"{self.op}_step")
        return functools.partial(function, implementation=implementation, **settings)

    def make(self, seed: int) -> dict:
        """A layer's arrays: decays that leave something, weights that are positive."""
        rng = np.random.default_rng(seed)

        def normal(struct):
            if struct.dtype == jnp.int32:
                return jnp.full(struct.shape, 1000, jnp.int32)
            x = rng.standard_normal(struct.shape, np.float32)
            return jnp.asarray(x, struct.dtype)

        arrays = jax.tree.map(normal, self.arrays)
        for name, change in (
            ("A", lambda x: -jnp.exp(x)),
            ("log_decay", jax.nn.log_sigmoid),
            ("alpha", jax.nn.sigmoid),
            ("beta", jax.nn.sigmoid),
        ):
            if name in arrays:
                arrays[name] = change(arrays[name])
        if self.op in ("based_attention", "hedgehog_attention"):
            # Sums of features: at least what one token has, far from zero.
            state = arrays["state"]
            positive = 1 + jnp.abs(state.normalizer)
            if self.op == "based_attention":
                one = TAYLOR.keys(jnp.ones((self.key_dim,)) / self.key_dim**0.5)
                positive = jnp.broadcast_to(64 * one, positive.shape)
            arrays["state"] = state._replace(normalizer=positive)
        return arrays


def _size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


CASES = [
    StepCase("ssd", 64, 64, 128, 64),
    StepCase("ssd", 64, 24, 128, 64),
    StepCase("ssd", 1, 80, 128, 64),
    StepCase("linear_attention", 64, 16, 128, 128),
    StepCase("linear_attention", 64, 32, 64, 64),
    StepCase("based_attention", 64, 16, 16, 64),
    StepCase("hedgehog_attention", 64, 16, 128, 128),
]


def program(case: StepCase, implementation: str):
    """A token through the layers: (states, the other arrays) -> (outs, states)."""
    step = case.step(implementation)

    def run(states, others):
        results = [
            step(**other, state=state)
            for state, other in zip(states, others, strict=True)
        ]
        return [out for out, _ in results], [state for _, state in results]

    return jax.jit(run, donate_argnums=0)


def complaints(case: StepCase, implementation: str) -> list[str]:
    """Against XLA's step in float32, of the same arrays."""
    arrays = case.make(0)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == case.dtype else x, arrays
    )
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(case.step("xla"))(**wide)
    got = jax.jit(case.step(implementation))(**arrays)
    found = []
    for index, (x, y) in enumerate(
        zip(*map(jax.tree.leaves, (got, expected)), strict=True)
    ):
        x, y = (np.asarray(a.astype(jnp.float32)) for a in (x, y))
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        if not error <= _BAR:
            found.append(f"result {index} has relative RMS error {error:.2e}")
    return found


def time_case(case: StepCase, names, *, rounds: int, seconds: float) -> dict:
    """Seconds of a layer, a sample for each round, by implementation."""
    calls = {}
    for name in names:
        layers = [case.make(seed) for seed in range(case.layers)]
        held = [layer.pop("state") for layer in layers]
        run = program(case, name).lower(held, layers).compile()

        def call(_, run=run, holder=[held], layers=layers):  # noqa: B006 (kept)
            outs, holder[0] = run(holder[0], layers)
            return outs

        calls[name] = call
    times = timing.measure(calls, rounds=rounds, seconds=seconds)
    return {name: [x / case.layers for x in times[name]] for name in names}


def main(argv=None, *, find_gpu=results.find_gpu) -> int:
    """Returns 0; 1 where one of ours was wrong; 2 where nothing could run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__
    )
    parser.add_argument("--cases", nargs="+", help="parts of names", default=[""])
    parser.add_argument("--impls", nargs="+", default=["tk", "xla"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.03)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file of the rows")
    options = parser.parse_args(argv)
    cases = [x for x in CASES if any(re.search(p, str(x)) for p in options.cases)]
    if not cases:
        parser.error(f"no case matches {' '.join(options.cases)}")
    gpu = find_gpu()
    if gpu is None:
        print("benchmarks: needs an NVIDIA GPU, and jax finds none", file=sys.stderr)
        return 2
    rows, failed = [], False
    for case in cases:
        names = []
        for name in options.impls:
            wrong = complaints(case, name)
            if wrong:
                print(f"{case}  {name}: WRONG, not timed: {'; '.join(wrong)}")
                failed |= name == "tk"
            else:
                names.append(name)
        if not names:
            continue
        times = time_case(case, names, rounds=options.rounds, seconds=options.seconds)
        for name, samples in times.items():
            median = statistics.median(samples)
            rate = case.bytes / median
            rows.append(
                {
                    "case": str(case),
                    "implementation": name,
                    "gpu": gpu,
                    "layers": case.layers,
                    "median_us": median * 1e6,
                    "samples_us": [x * 1e6 for x in samples],
                    "bytes": case.bytes,
                    "tbps": rate / 1e12,
                    "fraction": rate / BYTES_PER_SECOND,
                }
            )
            print(
                f"{case}  {name:<4}{median * 1e6:>9.1f} us {rate / 1e9:>7.0f} GB/s "
                f"{rate / BYTES_PER_SECOND:>6.1%} of {BYTES_PER_SECOND / 1e12} TB/s",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
