"""Cases of attention whose masks are arrays: lengths, segment ids, a boolean mask."""

from __future__ import annotations

import dataclasses
import functools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import Case
from tolerance import assert_close

import tk_jax

NAMES = ("out", "lse", "dq", "dk", "dv")
_POISON_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class MaskedCase(Case):
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        words = [super().__str__()]
        for name in ("q_lengths", "kv_lengths"):
            if (lengths := getattr(self, name)) is not None:
                words.append(f"{name}-" + "-".join(map(str, lengths)))
        return "-".join(words)

    @property
    def settings(self) -> dict:
        """Those that are static."""
        aligned = self.bottom_right or self.mask == "bottom_right"
        align = "bottom_right" if aligned else "top_left"
        return {**super().settings, "causal_align": align}

    @property
    def arrays(self) -> dict:
        lengths = {
            "query_seq_lengths": self.q_lengths,
            "key_value_seq_lengths": self.kv_lengths,
        }
        return {
            name: np.array(x, np.int32) for name, x in lengths.items() if x is not None
        }

    def hidden(self) -> np.ndarray:
        """[B, H, T, S]"""
        return np.stack([self._hidden_in(b) for b in range(self.batch)])

    def _hidden_in(self, b):
        q_length = self.seqlen_q if self.q_lengths is None else self.q_lengths[b]
        kv_length = self.seqlen_kv if self.kv_lengths is None else self.kv_lengths[b]
        row, key = np.ogrid[: self.seqlen_q, : self.seqlen_kv]
        aligned = self.settings["causal_align"] == "bottom_right"
        position = row + (kv_length - q_length if aligned else 0)
        hidden = (row >= q_length) | (key >= kv_length)
        hidden |= (key > position) & (self.mask != "full")
        if self.window is not None:
            left, right = self.window
            hidden |= (key < position - left) | (key > position + right)
        return np.broadcast_to(hidden, (self.num_heads, *hidden.shape))


@functools.partial(jax.jit, static_argnums=0)
def _forward_and_backward(settings, arrays, q, k, v, dout, dlse):
    attention = functools.partial(
        tk_jax.attention, return_lse=True, **dict(settings), **arrays
    )
    (out, lse), transpose = jax.vjp(attention, q, k, v)
    return out, lse, *transpose((dout, dlse))


def run(case, inputs, arrays=None, **settings):
    """Every result; on a GPU, of arrays that lie in memory full of NaN."""
    settings = {**case.settings, **settings}
    if jax.default_backend() != "cpu":
        poison = jnp.full(_POISON_BYTES // 4, jnp.nan, jnp.float32)
        poison.block_until_ready()
        poison.delete()
    results = _forward_and_backward(
        tuple(sorted(settings.items())),
        case.arrays if arrays is None else arrays,
        *jax.device_put(inputs),
    )
    return jax.device_get(results)


def check(case, **settings):
    """Compares with the definition; returns the results."""
    inputs = case.inputs()
    got = run(case, inputs, **settings)
    exact = attention_cases.reference_f64(case, *inputs)
    low = attention_cases.low_precision(case, *inputs)
    floors = attention_cases.floors(case, *inputs[:4])
    for name, *arrays, floor in zip(NAMES, got, exact, low, floors, strict=True):
        assert_close(*arrays, what=f"{case} {name}", floor=floor)
    return got
