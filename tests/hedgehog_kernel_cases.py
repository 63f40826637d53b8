"""Calls of Hedgehog attention's kernels, and their accuracy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from recurrent_cases import BARS, pooled, relative_rms, rounded, samples, seeds_for
from tolerance import assert_close

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.hedgehog_attention import config, hedgehog_attention_reference
from tk_jax.ops.hedgehog_attention.vjp import kernel_hedgehog_attention
from tk_jax.ops.hedgehog_attention.xla import Inputs
from tk_jax.ops.linear_attention import config as linear_config

# In float32 whatever the tokens are in.
EXACT = ("alpha", "beta", "sums", "normalizer")
# What a gradient that is zero in exact arithmetic may be: without far keys, weights do
# not change the result.
ZERO = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call."""

    seqlen: int
    key_dim: int = 64
    value_dim: int = 64
    heads: tuple[int, int] = (1, 1)  # H, K
    dtype: str = "bfloat16"
    batch: int = 1
    size: float = 1.0  # of queries
    lengths: tuple[int, ...] = ()  # of what an initial state stands for
    # Lengths of packed documents, of which there are as many as there is room for; each
    # element of the batch begins with another one.
    documents: tuple[int, ...] = ()

    def __str__(self):
        fields = dataclasses.asdict(self).items()
        defaults = {field.name: field.default for field in dataclasses.fields(Case)}
        return " ".join(f"{k}={v}" for k, v in fields if v != defaults[k])


CASES = [
    Case(1),
    Case(63, 40, 24, (2, 1)),
    Case(64),
    Case(65, size=30.0),
    Case(129, batch=2),
    Case(200, 128, 128, (2, 1), "float16"),
]
MORE = [
    Case(260, heads=(2, 2)),
    Case(200, 72, 40, (4, 2), "float16", size=30.0),
    Case(330, 128, 128, (2, 2)),
    Case(193, 128, 64, (3, 1)),
    Case(193, 64, 128, (1, 1), "float16", batch=2),
    Case(1000, heads=(1, 1)),
]
STATES = [Case(70, heads=(2, 1), batch=3, lengths=(0, 37, 300))]
MORE_STATES = [Case(130, 128, 128, (2, 1), "float16", 2, lengths=(128, 129))]
# One token and none more, ends of windows and next to them, some longer than three.
DOCUMENTS = [
    Case(200, 128, 128, (2, 1), "float16", documents=(3, 150, 5)),
]
MORE_DOCUMENTS = [
    Case(1, documents=(1,)),
    Case(63, 40, 24, (2, 1), documents=(1, 30)),
    Case(64, dtype="float16", documents=(1,)),
    Case(65, documents=(1, 64), size=30.0),
    Case(200, documents=(200,)),
    Case(330, heads=(2, 1), batch=2, documents=(200, 1, 63, 70, 2)),
    Case(200, 72, 40, (4, 2), "float16", batch=2, documents=(64, 65, 1)),
    Case(700, 128, 128, (2, 2), documents=(5, 400, 128, 129)),
    Case(193, 128, 64, (3, 1), documents=(20,)),
    Case(400, 64, 128, (2, 1), "float16", batch=3, documents=(1, 1, 390, 7, 100)),
    Case(1000, documents=(1, 2, 3, 500, 64, 300)),
]
DOCUMENT_STATES = [
    Case(100, heads=(2, 1), batch=2, lengths=(37, 300), documents=(70, 30)),
]
MORE_DOCUMENT_STATES = [
    Case(210, heads=(2, 1), batch=3, lengths=(0, 37, 300), documents=(170, 1, 20, 140)),
    Case(130, 128, 128, (2, 1), "float16", 2, lengths=(128, 129), documents=(130,)),
    Case(
        300, 128, 64, (1, 1), batch=4, lengths=(64, 1, 191, 500), documents=(2, 260, 9)
    ),
]


def arrays_of(case: Case, seed: int = 0) -> dict:
    rng = np.random.default_rng([case.seqlen, seed] if seed else case.seqlen)
    num_heads, num_kv_heads = case.heads
    rows = (case.batch, case.seqlen)
    map_size = 2 * case.key_dim**-0.5

    def normal(*shape):
        return rng.standard_normal(shape)

    arrays = {
        "q": case.size * normal(*rows, num_heads, case.key_dim),
        "k": normal(*rows, num_kv_heads, case.key_dim),
        "v": normal(*rows, num_kv_heads, case.value_dim),
        "q_map": map_size * normal(num_heads, case.key_dim, config.MAP),
        "k_map": map_size * normal(num_kv_heads, case.key_dim, config.MAP),
        "alpha": 3 * rng.random(num_heads) + 0.1,
        "beta": rng.random(num_heads) + 0.1,
    }
    if case.documents:
        arrays["segment_ids"] = segment_ids(case)
    if case.lengths:
        latest = (case.batch, 2 * config.CHUNK, num_kv_heads)
        sums = (case.batch, num_kv_heads, 2 * config.MAP)
        arrays |= {
            "sums": normal(*sums, case.value_dim),
            "normalizer": 2 * rng.random(sums),
            "keys": normal(*latest, case.key_dim),
            "values": normal(*latest, case.value_dim),
        }
    return arrays


def segment_ids(case: Case) -> np.ndarray:
    """Some ids come again, and they are in no order."""
    count = len(case.documents)

    def row(first):
        lengths = [case.documents[(first + i) % count] for i in range(case.seqlen)]
        return np.repeat(5 * np.arange(case.seqlen) % 7, lengths)[: case.seqlen]

    return np.array([row(i) for i in range(case.batch)], np.int32)


def as_floats(arrays: dict, dtype) -> dict:
    return {
        name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in arrays.items()
    }


def seeds_of(case: Case) -> range:
    """Of which few values are enough to compare."""
    return seeds_for(arrays_of(case), scores_of(case) / 2**26)


def scores_of(case: Case) -> int:
    return case.batch * case.heads[0] * case.seqlen**2


def _state(case: Case, arrays: dict):
    """Takes it from the arrays."""
    names = ("sums", "normalizer", "keys", "values")
    parts = [arrays.pop(name) for name in names if name in arrays]
    if not case.lengths:
        return None
    return config.HedgehogState(*parts, jnp.asarray(case.lengths, jnp.int32))


def public(case: Case, implementation: str = "interpret", final: bool | None = None):
    """Returns (out,), and the final state without its length where there is one."""
    final = bool(case.lengths) if final is None else final

    def run(**arrays):
        state = _state(case, arrays)
        results = tk_jax.hedgehog_attention(
            **arrays,
            initial_state=state,
            return_final_state=final,
            implementation=implementation,
        )
        return (results[0], tuple(results[1][:4])) if final else (results,)

    return run


def in_segments(case: Case, chunks: int):
    def run(**arrays):
        options = config.HedgehogOptions(case.key_dim**-0.5, config.CHUNK)
        state = _state(case, arrays)
        inputs = Inputs(**{"state": state, "segment_ids": None} | arrays)
        out, _ = kernel_hedgehog_attention(
            options, False, inputs, chunks_of_segment=chunks
        )
        return (out,)

    return run


def definition(dtype):
    def run(**arrays):
        arrays = as_floats(arrays, dtype)
        return (hedgehog_attention_reference(**arrays, dtype=jnp.dtype(dtype))[0],)

    return run


def check(
    fn, case: Case, exact=None, arrays: dict | None = None, seeds: range = range(1)
) -> None:
    """Against float64, by the bars of recurrent ops and by plain low precision.

    ``exact`` is the definition unless something else is given that says as much.
    Results of few values are compared over all ``seeds``.
    """
    value_bar, gradient_bar, _ = BARS[case.dtype]
    many = [arrays] if arrays else [arrays_of(case, seed) for seed in seeds]
    with jax.enable_x64(True):
        many = [rounded(each, case.dtype, EXACT) for each in many]
        wide = [as_floats(each, jnp.float64) for each in many]
        results = pooled(samples(fn, many))
        exact = exact or definition("float64")
        if scores_of(case) > 2**22:
            # Matrices of all scores: a dozen processes share the GPU's memory.
            wide = jax.device_put(wide, jax.devices("cpu")[0])
        exact = pooled(samples(exact, wide))
        low = None
        if not case.lengths:
            # As XLA has it, not as written, which rounds sums too: more is asked so.
            low = pooled(samples(definition(case.dtype), many))
    for what, got, expected, plain in zip(
        [jax.tree_util.keystr(x) for x, _ in jax.tree.flatten_with_path(results)[0]],
        *map(jax.tree.leaves, (results, exact)),
        itertools.repeat(None) if low is None else jax.tree.leaves(low),
        strict=low is not None,
    ):
        if low is not None:
            assert_close(got, expected, plain, what=what, floor=ZERO)
        if np.abs(expected).max() < 1e-9:
            assert np.abs(np.float64(got)).max() <= ZERO, what
            continue
        bar = value_bar if what.startswith("[0]") else gradient_bar
        if case.seqlen < 200 and ("alpha" in what or "beta" in what):
            continue  # of a few terms that cancel, low precision leaves nothing
        # Features that are close to one-hot leave little to the gradient of their map.
        bar *= 10 if case.size > 1 and "q_map" in what else 1
        error = relative_rms(got, expected)
        assert error <= bar, f"{what}: {error:.1e}"


def specs_of(case: Case):
    """What a call and its gradient will ask for, as the names of kernels."""
    documents = bool(case.documents)
    own = config.DOCUMENT_KERNELS if documents else config.KERNELS
    # Chunks are tiles for the kernel of sums.
    for kernel in dict.fromkeys((*own, "document_states", "reverse_document_states")):
        yield from _ffi.extension().hedgehog_attention_specs(
            kernel=kernel,
            dtype=case.dtype,
            key_dim=case.key_dim,
            value_dim=case.value_dim,
            documents=documents or kernel.endswith("document_states"),
        )
    seqlen = case.seqlen + (3 * config.CHUNK if case.lengths else 0)
    for heads in case.heads:
        tiles = linear_config.scan_config(
            case.batch, seqlen, heads, heads, config.MAP, case.key_dim
        )
        yield from _ffi.extension().linear_attention_specs(
            kernel="states",
            dtype=case.dtype,
            key_dim=config.MAP,
            features=[],
            config=dataclasses.asdict(tiles.states),
        )
