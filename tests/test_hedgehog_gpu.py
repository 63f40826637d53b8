"""Hedgehog attention's kernels on a GPU: the interpreter's cases, and larger ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
import recurrent_gpu_checks as checks
from hedgehog_kernel_cases import (
    CASES,
    DOCUMENT_STATES,
    DOCUMENTS,
    EXACT,
    MORE,
    MORE_DOCUMENT_STATES,
    MORE_DOCUMENTS,
    MORE_STATES,
    STATES,
    Case,
    arrays_of,
    check,
    public,
    seeds_of,
    specs_of,
)
from recurrent_cases import rounded, split_at, values_and_gradients

import tk_jax

pytestmark = pytest.mark.gpu

LENGTHS = [Case(n, 128, 128, (2, 1)) for n in checks.LENGTHS]
LARGER = [
    # Enough heads to fill the GPU, and so few that sequences are cut.
    Case(1000, 128, 128, (16, 4), batch=2),
    Case(500, 128, 128, (16, 16), batch=9),
    Case(2000, 128, 128, (2, 2), "float16"),
    Case(4000, 64, 64, (1, 1)),
    Case(1000, 128, 128, (16, 4), batch=2, documents=(300, 41, 1, 7, 500)),
    Case(3000, 128, 128, (2, 2), "float16", documents=(2000, 3, 64, 1, 400)),
    Case(4000, 64, 64, (1, 1), documents=(20,)),
]
SPLIT = [
    (Case(300, 64, 64, (2, 1)), [1, 100]),
    (Case(500, 128, 128, (1, 1)), [192, 256]),
    (Case(3000, 128, 128, (2, 2), "float16"), [1501]),
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cases = [*CASES, *MORE, *STATES, *MORE_STATES, *LENGTHS, *LARGER]
    cases += [*DOCUMENTS, *MORE_DOCUMENTS, *DOCUMENT_STATES, *MORE_DOCUMENT_STATES]
    cases += [case for case, _ in SPLIT]
    checks.compile_kernels(itertools.chain.from_iterable(map(specs_of, cases)))


@pytest.fixture(autouse=True)
def poisoned_memory():
    checks.poison()


@pytest.mark.parametrize(
    "case", CASES + MORE + LENGTHS + DOCUMENTS + MORE_DOCUMENTS + LARGER, ids=str
)
def test_values_and_gradients(case):
    check(public(case, "tk"), case, seeds=seeds_of(case))


@pytest.mark.parametrize(
    "case",
    STATES + MORE_STATES + DOCUMENT_STATES + MORE_DOCUMENT_STATES,
    ids=str,
)
def test_states_and_their_gradients(case):
    check(public(case, "tk"), case, public(case, "xla"))


@pytest.mark.parametrize("case", LARGER + MORE_STATES, ids=str)
def test_the_same_bits_each_time(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    checks.assert_same_bits(public(case, "tk"), arrays)


@pytest.mark.parametrize(("case", "at"), SPLIT, ids=str)
def test_split_sequence_is_the_whole_one(case, at):
    """Through the state, in values and gradients."""

    def in_pieces(**arrays):
        outs, state = [], None
        for piece in split_at(arrays, dict.fromkeys("qkv", 1), at):
            out, state = tk_jax.hedgehog_attention(
                **piece,
                initial_state=state,
                return_final_state=True,
                implementation="tk",
            )
            outs.append(out)
        return (jnp.concatenate(outs, 1),)

    check(in_pieces, case)


def test_packed_documents_are_as_if_each_were_alone():
    case = Case(checks.DOCUMENT_ENDS[-1], 128, 128, (2, 1))

    def run(**arrays):
        out, state = tk_jax.hedgehog_attention(
            **arrays, return_final_state=True, implementation="tk"
        )
        return out, tuple(state[:4])

    checks.check_documents(
        run,
        arrays_of(case) | {"initial_state": None},
        dict.fromkeys("qkv", 1),
        case.dtype,
        EXACT,
        ("alpha", "beta"),
    )


def test_without_far_keys():
    """The window alone, though there are keys before it."""
    case = Case(300, 128, 128, (2, 2))
    arrays = arrays_of(case)
    check(public(case, "tk"), case, arrays=arrays | {"alpha": 0 * arrays["alpha"]})


def test_without_weights_there_is_nothing_to_divide():
    case = Case(300, 128, 128, (2, 2))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays["beta"] = jnp.zeros_like(arrays["beta"])
    (out,), gradients = values_and_gradients(public(case, "tk"), arrays)
    assert (out[:, :128] == 0).all() and (out[:, 128:] != 0).any()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize(
    ("seqlen", "copies", "gradients"),
    # Values of 2**31 elements, and with gradients of as many bytes.
    [(2**17, 64, False), (2**17, 32, True)],
)
def test_many_tokens(seqlen, copies, gradients):
    *keys, first, second = jax.random.split(jax.random.key(0), 5)
    arrays = {
        name: jax.random.normal(key, (1, seqlen, 2, 128), jnp.bfloat16)
        for name, key in zip("qkv", keys, strict=True)
    }
    arrays["q_map"] = jax.random.normal(first, (2, 128, 64), jnp.bfloat16) / 8
    arrays["k_map"] = jax.random.normal(second, (2, 128, 64), jnp.bfloat16) / 8
    run = functools.partial(tk_jax.hedgehog_attention, alpha=0.5, beta=0.8)
    checks.check_many_heads(
        functools.partial(run, implementation="tk"),
        functools.partial(run, implementation="xla"),
        arrays,
        {"q": 2, "k": 2, "v": 2, "q_map": 0, "k_map": 0},
        copies,
        gradients,
    )
