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
    documents: int = 0  # in each row, of random lengths; 0: no segment ids
    shuffled: bool = False  # tokens of documents are anywhere in the row
    # Sizes of a mask [B, H, T, S] of which this share is seen; some blocks are seen as
    # a whole, some not at all.
    mask_shape: tuple[int, ...] | None = None
    share: float = 0.5

    def __str__(self) -> str:
        words = [super().__str__()]
        if self.documents:
            words.append(f"{self.documents}-documents" + "-shuffled" * self.shuffled)
        if self.mask_shape is not None:
            words.append("mask-" + "x".join(map(str, self.mask_shape)))
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
        arrays = {
            name: np.array(x, np.int32) for name, x in lengths.items() if x is not None
        }
        if self.documents:
            q_ids, kv_ids = self.ids()
            arrays |= {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
        if self.mask_shape is not None:
            arrays["mask"] = self.seen()
        return arrays

    def ids(self):
        rng = np.random.default_rng(17)
        # Far apart, with signs, and neighbours that float32 does not tell apart.
        known = rng.integers(-(2**31), 2**31 - 1, self.documents)
        known[1:] = np.where(
            rng.random(self.documents - 1) < 0.5, known[0] + 1, known[1:]
        )
        known = known.astype(np.int32)

        def row(length):
            cuts = np.sort(rng.integers(0, length + 1, self.documents - 1))
            ids = known[np.searchsorted(cuts, np.arange(length), "right")]
            return rng.permutation(ids) if self.shuffled else ids

        lengths = (self.seqlen_q, self.seqlen_kv)
        q_ids, kv_ids = (
            np.stack([row(length) for _ in range(self.batch)]) for length in lengths
        )
        # Packed rows: the same documents for queries and keys.
        same = self.seqlen_q == self.seqlen_kv and not self.shuffled
        return q_ids, (q_ids if same else kv_ids)

    def seen(self):
        rng = np.random.default_rng(18)
        mask = rng.random(self.mask_shape) < self.share
        rows, keys = (-(-n // 64) for n in self.mask_shape[2:])
        kinds = rng.integers(0, 3, (*self.mask_shape[:2], rows, keys))
        kinds = kinds.repeat(64, 2).repeat(64, 3)
        kinds = kinds[:, :, : self.mask_shape[2], : self.mask_shape[3]]
        return np.where(kinds == 0, False, mask | (kinds == 1))

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
        if self.documents:
            q_ids, kv_ids = self.ids()
            hidden |= q_ids[b][:, None] != kv_ids[b][None, :]
        hidden = np.broadcast_to(hidden, (self.num_heads, *hidden.shape))
        if self.mask_shape is not None:
            hidden = hidden | ~self.seen()[b % self.mask_shape[0]]
        return hidden


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
