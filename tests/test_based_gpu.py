"""Based attention's kernels on a GPU: the interpreter's cases, and larger ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent_gpu_checks as checks
from based_kernel_cases import (
    CASES,
    EXACT,
    MORE,
    TIME_AXES,
    Case,
    arrays_of,
    check,
    public,
    specs_of,
)
from recurrent_cases import BARS, relative_rms, rounded

import tk_jax
from tk_jax.ops.based_attention import config

pytestmark = pytest.mark.gpu


def _every_length():
    """Each with each feature dim; the other settings in turns.

    At every length but one each value dim occurs with and without normalization.
    """
    dims = enumerate(config.FEATURE_DIMS)
    for (i, dim), (j, seqlen) in itertools.product(dims, enumerate(checks.LENGTHS)):
        yield Case(
            seqlen,
            dim,
            (64, 128)[(i + j) % 2],
            # The recurrence in float64 keeps the state of every token.
            ((1, 1), (1, 2), (2, 4))[(i + j) % 3] if seqlen < 1000 else (1, 1),
            # Of one token alone, and its quotient, little is left to compare.
            state=(i + j) % 4 < 2 and seqlen > 1,
            packed=(i + j // 2) % 2 == 1,
            normalize=(i // 2 + j) % 2 == 1 and seqlen > 1,
        )


LENGTHS = list(_every_length())
LARGER = [
    # Enough heads to fill the GPU, and so few that sequences are cut.
    Case(200, 16, 64, (16, 16), batch=9, packed=True),
    Case(200, 16, 128, (4, 16), batch=5, normalize=True),
    Case(1000, 16, 128, (4, 16), normalize=True),
    Case(1000, 8, 64, (2, 4), "float16", batch=2, packed=True),
    Case(1000, 32, 64, (2, 4), normalize=True, packed=True),
    Case(4000, 16, 64, (1, 1), normalize=True, packed=True),
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cases = [*CASES, *MORE, *LENGTHS, *LARGER, *OF_DOCUMENTS]
    checks.compile_kernels(itertools.chain.from_iterable(map(specs_of, cases)))


@pytest.fixture(autouse=True)
def poisoned_memory():
    checks.poison()


@pytest.mark.parametrize("case", CASES + MORE + LENGTHS + LARGER, ids=str)
def test_values_and_gradients(case):
    check(public(case, "tk"), case)


@pytest.mark.parametrize("dim", config.FEATURE_DIMS)
def test_one_token_is_its_value(dim):
    arrays = arrays_of(Case(1, dim, 64, (2, 4), batch=3))
    q, k, v = (jnp.asarray(arrays[name], jnp.bfloat16) for name in "qkv")
    run = functools.partial(tk_jax.based_attention, implementation="tk")
    out, pull_back = jax.vjp(run, q, k, v)
    dq, dk, dv = pull_back(v)
    value_bar, gradient_bar, _ = BARS["bfloat16"]
    assert relative_rms(out, v) <= value_bar
    assert relative_rms(dv, v) <= gradient_bar
    for x in (dq, dk):  # sums of 64 products, of which each is some 30, that cancel
        assert np.abs(np.float32(x)).max() < 1


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_same_bits_each_time(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    checks.assert_same_bits(public(case, "tk"), arrays)


@pytest.mark.parametrize(
    ("case", "at"),
    [
        (Case(300, 8, 64, (1, 1), "float16"), [1, 64]),
        (Case(300, 16, 64, (1, 2), normalize=True, packed=True), [40, 129]),
        (Case(300, 24, 128, (1, 1), normalize=True), [100]),
        (Case(300, 32, 64, (1, 1), packed=True), [200]),
        (Case(3000, 16, 64, (1, 1)), [1500]),
    ],
    ids=str,
)
def test_split_sequence_is_the_whole_one(case, at):
    arrays = arrays_of(case)
    if case.packed:  # ids that change where the sequence is split would have to be told
        arrays["segment_ids"][:, at] = arrays["segment_ids"][:, np.array(at) - 1]
    check(checks.in_pieces(public(case, "tk"), TIME_AXES, at), case, arrays)


OF_DOCUMENTS = [
    Case(checks.DOCUMENT_ENDS[-1], dim, value_dim, (1, 2), normalize=normalize)
    for dim, value_dim, normalize in (
        (8, 128, True),
        (16, 64, False),
        (24, 64, True),
        (32, 128, False),
    )
]


@pytest.mark.parametrize("case", OF_DOCUMENTS, ids=str)
def test_packed_documents_are_separate_ones(case):
    checks.check_documents(
        public(case, "tk"), arrays_of(case), TIME_AXES, case.dtype, EXACT
    )


@pytest.mark.parametrize(
    ("seqlen", "copies", "gradients"),
    # Values of 2**31 elements, and with gradients of as many bytes.
    [(2**17, 128, False), (2**17, 64, True)],
)
def test_many_tokens(seqlen, copies, gradients):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = {
        name: jax.random.normal(key, (1, seqlen, 2, dim), jnp.bfloat16)
        for name, key, dim in zip("qkv", keys, (16, 16, 64), strict=True)
    }
    run = functools.partial(tk_jax.based_attention, normalize=True)
    checks.check_many_heads(
        functools.partial(run, implementation="tk"),
        functools.partial(run, implementation="xla"),
        arrays,
        dict.fromkeys("qkv", 2),
        copies,
        gradients,
    )


def test_kernels_run_without_being_asked_for():
    q = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    text = jax.jit(tk_jax.based_attention).lower(q, q, v).compile().as_text()
    assert "tk_based_attention_outputs_v1" in text
