"""Linear attention's kernels on a GPU: the interpreter's cases, and larger ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent_gpu_checks as checks
from recurrent_cases import (
    PLENTY,
    assert_within_bars,
    rounded,
    values_and_gradients,
)
from recurrent_kernel_cases import (
    CASES,
    EXACT,
    GATES,
    LINEAR,
    MORE,
    SSD,
    TIME_AXES,
    arrays_of,
    check,
    floats64,
    public,
    reference,
    seeds_of,
    specs_of,
)

import tk_jax

pytestmark = pytest.mark.gpu

# Those that the interpreter has not.
LENGTHS = [
    *(LINEAR(n, 128, 128, (1, 1), decay="mild") for n in (1, 63, 64, 65, 1000)),
    LINEAR(4097, 64, 64, (1, 2), packed=True),
    *(SSD(n, 128, 64, (1, 8), skip="H", gate=True) for n in (63, 64)),
    SSD(4097, 128, 64, (1, 2), skip="H", packed=True),
]
LARGER = [
    # Enough heads to fill the GPU, and so few that sequences are cut.
    SSD(1000, 128, 64, (1, 16), batch=2, skip="H", gate=True),
    SSD(1000, 128, 64, (8, 16), "float16", batch=2, skip="P", packed=True),
    SSD(200, 128, 64, (1, 32), batch=9, skip="H"),
    SSD(4000, 64, 64, (1, 1), gate=True),
    LINEAR(1000, 128, 128, (4, 8), decay="mild", packed=True),
    LINEAR(1000, 128, 128, (8, 8), "float16", decay="head"),
    LINEAR(200, 64, 64, (16, 32), batch=9),
    LINEAR(4000, 64, 64, (1, 2), decay="mild", packed=True),
    LINEAR(1000, 256, 128, (1, 2), decay="head"),
    LINEAR(500, 128, 128, (8, 8), decay="mild", normalize=True),
]
SPLIT = [
    (LINEAR(300, 128, 128, (2, 4), packed=True), [40, 128]),
    (LINEAR(300, 64, 64, (1, 2), decay="mild", normalize=True), [100]),
    (LINEAR(3000, 64, 64, (1, 1), decay="mild"), [1500]),
    (SSD(300, 128, 64, (1, 8), skip="H", gate=True), [1, 200]),
    (SSD(3000, 64, 64, (1, 8), "float16", packed=True), [1501]),
]
OF_DOCUMENTS = [
    LINEAR(checks.DOCUMENT_ENDS[-1], 128, 128, (2, 4)),
    LINEAR(checks.DOCUMENT_ENDS[-1], 64, 64, (1, 2), decay="mild", normalize=True),
    SSD(checks.DOCUMENT_ENDS[-1], 128, 64, (1, 8), skip="H", gate=True),
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cases = [*CASES, *MORE, *LENGTHS, *LARGER, *(case for case, _ in SPLIT)]
    cases += [dataclasses.replace(case, packed=True) for case in OF_DOCUMENTS]
    checks.compile_kernels(itertools.chain.from_iterable(map(specs_of, cases)))


@pytest.fixture(autouse=True)
def poisoned_memory():
    checks.poison()


@pytest.mark.parametrize("case", CASES + MORE + LENGTHS + LARGER, ids=str)
def test_values_and_gradients(case):
    seeds = seeds_of(case, enough=PLENTY)
    check(public(case, "tk"), case, seeds=seeds, enough=PLENTY)


@pytest.mark.parametrize("case", LARGER[:3] + LARGER[4:9], ids=str)
def test_the_same_bits_each_time(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    checks.assert_same_bits(public(case, "tk"), arrays)


@pytest.mark.parametrize("seqlen", [65, 300])
def test_decays_of_eighty_a_token(seqlen):
    """And of nothing at all, side by side."""
    case = SSD(seqlen, 128, 64, (1, 8), skip="H")
    arrays = arrays_of(case)
    arrays["A"] = -np.array([80.0, 40, 8, 4, 1, 0.1, 0.01, 0])
    arrays["dt"] = np.abs(arrays["dt"]) % 1
    arrays["dt"][:, ::7] = 1
    check(public(case, "tk"), case, arrays)


@pytest.mark.parametrize("names", [("dt",), ("z",), ("dt", "z")], ids="-".join)
def test_gates_of_zero(names):
    case = SSD(130, 128, 64, (1, 8), skip="H")
    arrays = arrays_of(case)
    arrays["z"] = np.random.default_rng(0).standard_normal(arrays["x"].shape)
    arrays |= {name: 0 * arrays[name] for name in names}
    check(public(case, "tk"), case, arrays)


@pytest.mark.parametrize(("case", "at"), SPLIT, ids=str)
def test_split_sequence_is_the_whole_one(case, at):
    arrays = arrays_of(case)
    if case.packed:  # ids that change where the sequence is split would have to be told
        arrays["segment_ids"][:, at] = arrays["segment_ids"][:, np.array(at) - 1]
    # Where chunks begin elsewhere, a decay's gradient, most of it one sum over the
    # final state, has an error of its own, that of one number.
    with jax.enable_x64(True):
        arrays = rounded(arrays, case.dtype, EXACT)
        in_pieces = checks.in_pieces(public(case, "tk"), TIME_AXES, at)
        got = values_and_gradients(in_pieces, arrays)
        exact = values_and_gradients(reference(case), jax.tree.map(floats64, arrays))
    assert_within_bars(got, exact, case.dtype, GATES)


@pytest.mark.parametrize("case", OF_DOCUMENTS, ids=str)
def test_packed_documents_are_separate_ones(case):
    checks.check_documents(
        public(case, "tk"), arrays_of(case), TIME_AXES, case.dtype, EXACT, GATES
    )


# Values of 2**31 elements, and with gradients of as many bytes.
MANY_TOKENS = pytest.mark.parametrize(
    ("seqlen", "copies", "gradients"), [(2**17, 128, False), (2**17, 64, True)]
)


@MANY_TOKENS
def test_many_tokens_of_linear_attention(seqlen, copies, gradients):
    *keys, last = jax.random.split(jax.random.key(0), 4)
    arrays = {
        name: jax.random.normal(key, (1, seqlen, 2, 64), jnp.bfloat16)
        for name, key in zip("qkv", keys, strict=True)
    }
    log_decay = -jnp.exp(jax.random.normal(last, (1, seqlen, 2)) - 3)
    arrays["log_decay"] = log_decay
    run = tk_jax.linear_attention
    checks.check_many_heads(
        functools.partial(run, implementation="tk"),
        functools.partial(run, implementation="xla"),
        arrays,
        dict.fromkeys(arrays, 2),
        copies,
        gradients,
    )


@MANY_TOKENS
def test_many_tokens_of_ssd(seqlen, copies, gradients):
    keys = jax.random.split(jax.random.key(0), 4)
    rows = (1, seqlen)
    arrays = {
        "x": jax.random.normal(keys[0], (*rows, 2, 64), jnp.bfloat16),
        "dt": jax.random.normal(keys[1], (*rows, 2)) - 3,
        "A": jnp.array([-1.0, -4.0]),
        "B": jax.random.normal(keys[2], (*rows, 1, 64), jnp.bfloat16),
        "C": jax.random.normal(keys[3], (*rows, 1, 64), jnp.bfloat16),
        "D": jnp.array([1.0, -0.5]),
    }
    run = functools.partial(tk_jax.ssd, dt_softplus=True)
    checks.check_many_heads(
        functools.partial(run, implementation="tk"),
        functools.partial(run, implementation="xla"),
        arrays,
        {"x": 2, "dt": 2, "A": 0, "D": 0},
        copies,
        gradients,
    )


def test_kernels_run_without_being_asked_for():
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    text = jax.jit(tk_jax.linear_attention).lower(x, x, x).compile().as_text()
    assert "tk_linear_attention_outputs_v1" in text
