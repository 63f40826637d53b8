"""The cases that are measured, in named sets.

In a set of attention the families (head dim, heads) alternate, so that a run that is
cut short has some samples of each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from benchmarks import recurrent
from benchmarks.cases import CASE_TYPES, AttentionCase, Case, MatmulCase

# Head dim, heads, heads of keys: a width of 2048, and one with fewer heads of keys.
_FAMILIES = ((128, 16, 16), (64, 32, 32), (128, 32, 8), (256, 8, 8))
_TOKENS = 16384
_SEQLENS = (4096, 1024, 16384, 2048, 8192, 512)
_MASKS = (False, True)


def _attention(batch, seqlen, heads, kv_heads, head_dim, is_causal, **more):
    return AttentionCase(
        batch, seqlen, seqlen, heads, kv_heads, head_dim, is_causal, **more
    )


def _grid() -> Iterable[AttentionCase]:
    """16384 tokens in rows of each length."""
    for seqlen, family, is_causal in itertools.product(_SEQLENS, _FAMILIES, _MASKS):
        head_dim, heads, kv_heads = family
        yield _attention(
            _TOKENS // seqlen, seqlen, heads, kv_heads, head_dim, is_causal
        )


def _small() -> Iterable[AttentionCase]:
    """Little work, and lengths that no tile divides beside those of whole tiles."""
    for seqlen, is_causal in itertools.product((512, 2048), _MASKS):
        yield _attention(1, seqlen, 16, 16, 128, is_causal)
    for batch, seqlens in ((16, (1000, 1024)), (4, (4097, 4224))):
        for is_causal, seqlen in itertools.product(_MASKS, seqlens):
            yield _attention(batch, seqlen, 16, 16, 128, is_causal)


def _masks() -> Iterable[AttentionCase]:
    """Windows and packed documents, beside the rows without them."""
    for head_dim, heads in ((128, 16), (64, 32)):
        row = (1, _TOKENS, heads, heads, head_dim)
        yield _attention(*row, True)
        yield _attention(*row, True, window=1024)
        yield _attention(*row, True, documents=16)
        yield _attention(*row, False)
        yield _attention(*row, False, documents=16)
    yield _attention(4, 4096, 16, 16, 128, True, window=1024)


def _values() -> Iterable[AttentionCase]:
    """Values of another head dim than keys, as in multi-head latent attention."""
    for seqlen, is_causal in itertools.product((4096, 16384, 1024), _MASKS):
        yield _attention(
            _TOKENS // seqlen, seqlen, 16, 16, 192, is_causal, head_dim_v=128
        )


def _products() -> Iterable[MatmulCase]:
    for size in (
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (16384, 2048, 8192),
        (4096, 14336, 4096),
    ):
        yield MatmulCase(1, *size)


SETS = {
    "attention": {
        "grid": _grid,
        "small": _small,
        "masks": _masks,
        "values": _values,
    },
    "matmul": {"grid": _products},
    **recurrent.CASE_SETS,
}
DEFAULT_SET = "grid"
SET_NAMES = (*SETS["attention"], "all")


def cases_of(op: str, name: str) -> list[Case]:
    """The cases of a set; those of every set for "all"."""
    known = SETS[op]
    if name != "all" and name not in known:
        raise ValueError(f"{op} has no set {name!r}; it has {', '.join(known)}, all")
    sets = known.values() if name == "all" else [known[name]]
    return list(dict.fromkeys(case for make in sets for case in make()))


def default_cases(op: str) -> list[Case]:
    return cases_of(op, DEFAULT_SET)


def quick_cases(op: str) -> list[Case]:
    if op == "attention":
        return [case for case in default_cases(op) if case.seqlen_q == 4096]
    return default_cases(op)[::2]


def select_cases(
    op: str,
    patterns: list[str] | None,
    *,
    quick: bool = False,
    set_name: str = DEFAULT_SET,
) -> list[Case]:
    """The cases whose names a pattern is found in; a full name adds its own case."""
    cases = quick_cases(op) if quick else cases_of(op, set_name)
    if not patterns:
        return cases
    selected = []
    for pattern in patterns:
        named = CASE_TYPES[op].parse(pattern)
        found = [case for case in cases if re.search(pattern, str(case))]
        if named is None and not found:
            raise ValueError(f"no case of {op} matches {pattern!r}")
        selected += [named] if named else found
    return list(dict.fromkeys(selected))
