"""Scores whose maximum moves from key block to key block, and values beyond counting.

The forward kernel keeps the maximum of a row's first key blocks while no weight grows
large, and does a tile again where one overflowed.
"""

import dataclasses

import attention_cases
import jax.numpy as jnp
import numpy as np
from attention_cases import Case
from tolerance import assert_close

import tk_jax

_LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Steps:
    """Scores that differ by block of 64 keys: what a block's have in powers of two.

    Rows take them as they are, with the other sign, or not at all, one after another.
    """

    case: Case
    levels: tuple[float, ...]  # of the first keys first
    value: float = 1.0  # multiplies v

    def __str__(self) -> str:
        levels = "_".join(f"{level:g}" for level in self.levels)
        return f"{self.case}-{levels}" + ("" if self.value == 1 else f"-v{self.value}")

    def inputs(self):
        q, k, v, dout, dlse = self.case.inputs()
        blocks = np.arange(self.case.seqlen_kv) // 64 % len(self.levels)
        unit = self.case.head_dim**0.5 / _LOG2E
        q[..., 0] = (np.arange(self.case.seqlen_q) % 3 - 1)[None, :, None]
        k[..., 0] = (np.array(self.levels)[blocks] * unit)[None, :, None]
        return q, k, (v.astype(np.float32) * self.value).astype(v.dtype), dout, dlse

    def check(self, implementation):
        inputs = self.inputs()
        got = tk_jax.attention(
            *map(jnp.asarray, inputs[:3]),
            return_lse=True,
            implementation=implementation,
            **self.case.settings,
        )
        exact = attention_cases.reference_f64(self.case, *inputs)
        low = attention_cases.low_precision(self.case, *inputs)
        for name, *arrays in zip(("out", "lse"), got, exact, low, strict=False):
            assert_close(*arrays, what=f"{self} {name}")


def _case(head_dim, mask="full", seqlen_q=130, seqlen_kv=650, **settings):
    return Case(1, seqlen_q, seqlen_kv, 2, 1, head_dim, mask, **settings)


_UP = (0, 0, 100, 100)
STEPS = [
    Steps(_case(64), _UP),
    Steps(_case(64), (0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)),
    Steps(_case(64), (0, 0, 130, 130, 130, 0)),
    Steps(_case(64), (1000, 0, 0, 0, -1000)),
    Steps(_case(64), (9,) + (0,) * 10, value=1e30),
    Steps(_case(64), (90, 60, 60, 0), value=1e30),
    Steps(_case(64, "causal", 450, 450), (1000, 0, 100, 100)),
    Steps(_case(64, "bottom_right", 192, 319), (0, 100, 0, 1000)),
    Steps(_case(64, dtype="fp16"), (0, 0, 100, 100)),
    Steps(_case(64, "causal", 450, 450, dtype="fp16"), (130, 0, 7, 7)),
    Steps(_case(64, window=(200, 10)), (130, 0, 100, 100)),
    Steps(_case(128), _UP),
    Steps(_case(128, "causal", 450, 450), (0, 40, 80, 120)),
    Steps(_case(128), (1000, 0, 0, 0, -1000)),
    Steps(_case(256), (0, 130, 0, 60)),
    Steps(_case(192, "causal", 300, 300), (9, 0, 1000, 30)),
]


# Key 5 comes in the last block, key 600 in the first.
BAD_KEYS = [
    (key, value) for key in (5, 600) for value in (np.nan, np.inf, -np.inf, 1e30)
]


def check_bad_key(key, value, implementation, head_dim=64):
    """A key that is no number spoils what it does where each maximum is looked for.

    With a mask array that hides nothing, it is.
    """
    case = _case(head_dim)
    q, k, v, *_ = case.inputs()
    q[..., 0] = np.where(np.arange(case.seqlen_q) % 2, 1, 0.5)[None, :, None]
    k[0, key, 0, 0] = value
    results = [
        tk_jax.attention(
            *map(jnp.asarray, (q, k, v)),
            mask=mask,
            return_lse=True,
            implementation=implementation,
        )
        for mask in (None, jnp.ones((1, 1, case.seqlen_q, case.seqlen_kv), bool))
    ]
    for x, y in zip(*results, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=0.02)


def check_hidden_first_blocks(implementation, head_dim=64):
    """All scores of the first blocks are -inf: their rows have no maximum yet."""
    case = _case(head_dim)
    inputs = case.inputs()
    q, k, v = inputs[:3]
    q[..., 0] = 1
    k[0, 384:, 0, 0] = -np.inf
    got = tk_jax.attention(
        *map(jnp.asarray, (q, k, v)), return_lse=True, implementation=implementation
    )
    short = dataclasses.replace(case, seqlen_kv=384)
    few = (q, k[:, :384], v[:, :384], *inputs[3:])
    exact = attention_cases.reference_f64(short, *few)
    low = attention_cases.low_precision(short, *few)
    for name, *arrays in zip(("out", "lse"), got, exact, low, strict=False):
        assert_close(*arrays, what=name)


def check_neighbours(implementation, head_dim=64):
    """What is done again in one head changes no bit of another."""
    case = Case(1, 700, 700, 4, 4, head_dim, "causal")
    q, k, v, *_ = case.inputs()
    run = [
        tk_jax.attention(
            *map(jnp.asarray, (q, keys, v)),
            is_causal=True,
            return_lse=True,
            implementation=implementation,
        )
        for keys in (k, _with_peak(k))
    ]
    for x, y in zip(*run, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(x[:, :, (0, 1, 3)], y[:, :, (0, 1, 3)])
        assert np.isfinite(y.astype(np.float32)).all()


def _with_peak(k):
    k = k.copy()
    k[0, 3, 2] *= 300
    return k
