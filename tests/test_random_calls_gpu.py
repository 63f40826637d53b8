"""Calls drawn at random, of every op with kernels: what nobody thought of as a case.

A number is a call, the same one each time. Sizes are drawn evenly by their logarithm,
so that short sequences and long ones, and few and many heads, are as frequent.
"""

import attention_masks
import attention_score_cases
import based_kernel_cases
import hedgehog_kernel_cases
import jax
import jax.numpy as jnp
import matmul_cases
import numpy as np
import pytest
import recurrent_gpu_checks as checks
import recurrent_kernel_cases
from attention_cases import Case
from recurrent_cases import PLENTY

pytestmark = pytest.mark.gpu

_FEW, _MANY = 4, 32  # calls of each kind; all of them with --exhaustive
_ROWS = 256  # of attention: of all heads and batch elements together, at least


def numbers():
    rest = pytest.mark.exhaustive
    return [
        pytest.param(i, marks=[] if i < _FEW else [rest], id=str(i))
        for i in range(_MANY)
    ]


class Draw:
    """Choices of one call."""

    def __init__(self, kind: str, number: int):
        self._rng = np.random.default_rng([number, *kind.encode()])

    def size(self, least: int, most: int) -> int:
        low, high = np.log([least, most + 1])
        return min(most, int(np.exp(self._rng.uniform(low, high))))

    def of(self, *choices):
        return choices[self._rng.integers(len(choices))]

    def some(self, share: float) -> bool:
        return bool(self._rng.random() < share)


@pytest.fixture(autouse=True)
def poisoned_memory():
    checks.poison()


def _attention(draw: Draw) -> dict:
    """Sizes and mask of a Case."""
    same = draw.some(0.5)
    seqlen_q = draw.size(1, 1300)
    kv_heads = draw.size(1, 3)
    num_heads = kv_heads * draw.of(1, 1, 2, 4)
    head_dim = draw.of(64, 128, 256, 8 * draw.size(1, 32))
    head_dim_v = head_dim if draw.some(0.6) else draw.of(64, 128, 8 * draw.size(1, 32))
    mask = draw.of("full", "causal", "bottom_right")
    window = None
    if draw.some(0.3):
        window = draw.size(1, 400) - 1, draw.size(1, 400) - 1
    return {
        # Of few values of lse, the largest error and the RMS are a matter of luck.
        "batch": max(draw.size(1, 3), -(-_ROWS // (seqlen_q * num_heads))),
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_q if same else draw.size(1, 1300),
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "mask": mask,
        "dtype": draw.of("bf16", "bf16", "fp16"),
        "window": window,
        "bottom_right": mask == "full" and window is not None and draw.some(0.5),
    }


@pytest.mark.parametrize("number", numbers())
def test_attention_with_scores_changed(number):
    draw = Draw("scores", number)
    sizes = _attention(draw)
    bias = draw.of(None, None, None, "BHTS", "HTS", "TS", "BS", "HT")
    # The gradient of a sink is a number, and of few numbers the error is luck.
    batch, heads = sizes["batch"], sizes["num_heads"]
    sinks = [x for x, n in (("H", heads), ("BH", batch * heads)) if n >= 8]
    case = attention_score_cases.ScoreCase(
        Case(**sizes),
        soft_cap=draw.of(None, None, 2.0, 30.0),
        sinks=draw.of(None, *sinks),
        bias=bias,
        bias_dtype=None if bias is None else draw.of(None, "float32"),
    )
    inputs = case.inputs()
    got = attention_score_cases.run(
        case,
        jax.device_put(inputs),
        implementation="tk",
        deterministic=draw.some(0.7),
    )
    attention_score_cases.assert_all_close(case, inputs, got)


@pytest.mark.parametrize("number", numbers())
def test_attention_with_masks_of_arrays(number):
    draw = Draw("masks", number)
    sizes = _attention(draw)
    batch, heads = sizes["batch"], sizes["num_heads"]

    def lengths(most):
        if draw.some(0.6):
            return None
        return tuple(draw.size(1, most + 1) - 1 for _ in range(batch))

    mask_shape = None
    if draw.some(0.4):
        whole = batch, heads, sizes["seqlen_q"], sizes["seqlen_kv"]
        mask_shape = tuple(draw.of(1, n, n) for n in whole)
    case = attention_masks.MaskedCase(
        **sizes,
        q_lengths=lengths(sizes["seqlen_q"]),
        kv_lengths=lengths(sizes["seqlen_kv"]),
        documents=draw.of(0, draw.size(1, 20)),
        shuffled=draw.some(0.2),
        mask_shape=mask_shape,
        share=draw.of(0.1, 0.5, 0.95),
    )
    attention_masks.check(case, implementation="tk", deterministic=draw.some(0.7))


@pytest.mark.parametrize("number", numbers())
def test_linear_attention(number):
    draw = Draw("linear_attention", number)
    groups = draw.size(1, 6)
    # Of one token or two, a quotient leaves little to compare. In float16 kernels have
    # none, since sums may exceed the range.
    normalize = draw.some(0.25)
    case = recurrent_kernel_cases.LINEAR(
        draw.size(8 if normalize else 1, 1500),
        draw.of(64, 128, 256, draw.size(1, 256)),
        draw.of(64, 128, 256, draw.size(1, 256)),
        (groups, groups * draw.of(1, 1, 2, 3)),
        "bfloat16" if normalize else draw.of("bfloat16", "bfloat16", "float16"),
        batch=draw.size(1, 4),
        decay=draw.of("token", "mild", "head", "none"),
        state=draw.some(0.5),
        packed=draw.some(0.4),
        normalize=normalize,
    )
    _check_recurrent(case)


@pytest.mark.parametrize("number", numbers())
def test_ssd(number):
    draw = Draw("ssd", number)
    groups = draw.size(1, 3)
    case = recurrent_kernel_cases.SSD(
        draw.size(1, 1500),
        draw.of(64, 128, 256, draw.size(1, 256)),
        draw.of(64, 128, draw.size(1, 128)),
        (groups, groups * draw.size(1, 16)),
        draw.of("bfloat16", "bfloat16", "float16"),
        batch=draw.size(1, 4),
        state=draw.some(0.5),
        packed=draw.some(0.4),
        skip=draw.of("", "H", "P"),
        gate=draw.some(0.5),
        limit=draw.of((0.0, np.inf), (0.1, 2.0)),
    )
    _check_recurrent(case)


def _check_recurrent(case):
    # Tensor cores cut off what a sum gains, 16 tokens at a time: where no decay is
    # rounded, that is all the error that a state has, and adding up chunks has less.
    state = case.seqlen / 16 * 2.0**-23 * 4 * case.seqlen**0.5
    recurrent_kernel_cases.check(
        recurrent_kernel_cases.public(case, "tk"),
        case,
        floors=[("[0][1]", state)],
        seeds=recurrent_kernel_cases.seeds_of(case, enough=PLENTY),
        enough=PLENTY,
    )


@pytest.mark.parametrize("number", numbers())
def test_based_attention(number):
    draw = Draw("based_attention", number)
    groups = draw.size(1, 2)
    normalize = draw.some(0.5)
    dim = draw.of(8, 16, 16, 24, 32)
    case = based_kernel_cases.Case(
        # The recurrence in float64 keeps the state of every token.
        draw.size(8 if normalize else 1, 1500 * 8 // dim),
        dim,
        draw.of(64, 128, draw.size(1, 200)),
        (groups, groups * draw.of(1, 1, 2, 3)),
        "bfloat16" if normalize else draw.of("bfloat16", "bfloat16", "float16"),
        batch=draw.size(1, 2),
        state=draw.some(0.5),
        packed=draw.some(0.4),
        normalize=normalize,
        scale=draw.of(None, None, 0.3),
    )
    based_kernel_cases.check(based_kernel_cases.public(case, "tk"), case)


@pytest.mark.parametrize("number", numbers())
def test_hedgehog_attention(number):
    draw = Draw("hedgehog_attention", number)
    kv_heads = draw.size(1, 3)
    documents = ()
    if draw.some(0.4):
        documents = tuple(draw.size(1, 300) for _ in range(draw.size(1, 8)))
    case = hedgehog_kernel_cases.Case(
        draw.size(1, 1500),
        draw.of(64, 128, draw.size(1, 128)),
        draw.of(64, 128, draw.size(1, 128)),
        (kv_heads * draw.of(1, 1, 2, 3), kv_heads),
        draw.of("bfloat16", "bfloat16", "float16"),
        batch=draw.size(1, 4),
        size=draw.of(1.0, 1.0, 30.0),
        documents=documents,
    )
    hedgehog_kernel_cases.check(
        hedgehog_kernel_cases.public(case, "tk"),
        case,
        seeds=hedgehog_kernel_cases.seeds_of(case),
    )


@pytest.mark.parametrize("number", numbers())
def test_matmul(number):
    draw = Draw("matmul", number)
    transposes = draw.some(0.5), draw.some(0.5)
    a, b = matmul_cases.operands(
        np.random.default_rng(number),
        transposes,
        draw.of(*matmul_cases.BATCHES),
        [draw.size(1, 3000) for _ in range(3)],
        draw.of(jnp.bfloat16, jnp.float16),
    )
    result = matmul_cases.product(transposes, "tk")(a, b)
    matmul_cases.check(result, a, b, transposes)
