"""Rivals of the recurrent ops that are PyTorch packages.

Each gets the case's arrays and returns its result: what its user would have to do
besides, such as making decays of parameters, is in its time.
"""

from __future__ import annotations

import functools

from benchmarks import packages
from benchmarks.recurrent import (
    BasedAttentionCase,
    HedgehogAttentionCase,
    LinearAttentionCase,
    RecurrentCase,
    SsdCase,
    UnsupportedCaseError,
)
from benchmarks.torch_programs import TorchRival

# As its Mamba2 layer has it.
_MAMBA_CHUNK = 256


def mamba_ssm(case: SsdCase) -> TorchRival:
    """mamba-ssm's Triton kernels; packed documents are indices of sequences."""
    import torch

    scan = packages.mamba_ssm().mamba_chunk_scan_combined
    documents = {}
    if case.documents > 1:
        ids = torch.arange(case.seqlen, dtype=torch.int32, device="cuda")
        ids = ids // (case.seqlen // case.documents)
        documents["seq_idx"] = ids.expand(case.batch, case.seqlen).contiguous()

    def ssd(x, dt, A_log, B, C, D, dt_bias):
        return scan(
            x,
            dt,
            -torch.exp(A_log),
            B,
            C,
            _MAMBA_CHUNK,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            **documents,
        )

    return TorchRival(ssd)


def fla_simple_gla(case: LinearAttentionCase) -> TorchRival:
    """flash-linear-attention's chunked kernels with a decay for each head."""
    import torch

    _refuse_documents(case)
    attention = packages.fla("simple_gla").chunk_simple_gla

    def linear_attention(q, k, v, decay):
        decay = torch.nn.functional.logsigmoid(decay)
        return attention(q, k, v, g=decay, scale=1.0)[0]

    return TorchRival(linear_attention)


def fla_based(name: str, case: BasedAttentionCase) -> TorchRival:
    """flash-linear-attention's ``parallel_based``, quadratic, or another form."""
    _refuse_documents(case)
    if name == "fused_chunk_based" and case.feature_dim > 16:
        raise UnsupportedCaseError("it has feature dims up to 16 only")
    attention = getattr(packages.fla("based"), name)
    return TorchRival(functools.partial(attention, use_norm=False))


def thunderkittens_based(
    case: BasedAttentionCase, heads_first: bool = False
) -> TorchRival:
    """ThunderKittens' kernel, forward alone.

    It takes heads before tokens: in its time are the copies to that order and back,
    unless the arrays are given to it as ``heads_first``.
    """
    _refuse_documents(case)
    if (case.feature_dim, case.head_dim) != (16, 64):
        raise UnsupportedCaseError("it has feature dim 16 and head dim 64 only")
    _check_thunderkittens(case)
    kernel = packages.thunderkittens("based").based

    def based_attention(q, k, v):
        return kernel(q, k, v)[0]

    return _of_heads_first(based_attention, ("q", "k", "v"), case, heads_first)


def thunderkittens_hedgehog(
    case: HedgehogAttentionCase, heads_first: bool = False
) -> TorchRival:
    """The same of Hedgehog attention."""
    import torch

    _refuse_documents(case)
    if case.head_dim != 128:
        raise UnsupportedCaseError("it has head dim 128 only")
    _check_thunderkittens(case)
    kernel = packages.thunderkittens("hedgehog").hedgehog

    def hedgehog_attention(q, k, v, q_map, k_map, alpha, beta):
        weights = torch.sigmoid(alpha), torch.sigmoid(beta)
        return kernel(q, k, v, q_map, k_map, *weights)[0]

    return _of_heads_first(hedgehog_attention, ("q", "k", "v"), case, heads_first)


def _of_heads_first(function, names, case, heads_first: bool) -> TorchRival:
    """``function`` takes [B, H, T, D] for ``names`` of the case's arrays."""
    turned = [name in names for name in case.arrays]

    def turn(x):
        return x.transpose(1, 2).contiguous()

    def prepare(*tensors):
        pairs = zip(turned, tensors, strict=True)
        return [turn(x) if has_tokens else x for has_tokens, x in pairs]

    # They launch on the stream that waits for all others, which no graph can have.
    options = {"clock": "kernels", "has_backward": False}
    if heads_first:
        return TorchRival(function, prepare=prepare, restore=turn, **options)
    return TorchRival(lambda *tensors: turn(function(*prepare(*tensors))), **options)


def _check_thunderkittens(case: RecurrentCase) -> None:
    if case.dtype != "bf16":
        raise UnsupportedCaseError("it has bf16 only")
    if case.seqlen % 64:
        raise UnsupportedCaseError("it has multiples of 64 tokens only")


def _refuse_documents(case: RecurrentCase) -> None:
    if case.documents > 1:
        raise UnsupportedCaseError("measured here without documents")


_BASED = packages.thunderkittens_of("based")
_HEDGEHOG = packages.thunderkittens_of("hedgehog")
# By op and name: what it takes, and how it is built for a case.
RIVALS = {
    "ssd": {"mamba-ssm": (packages.MAMBA_SSM, mamba_ssm)},
    "linear_attention": {"fla": (packages.FLA, fla_simple_gla)},
    "based_attention": {
        "fla-parallel": (
            packages.FLA,
            functools.partial(fla_based, "parallel_based"),
        ),
        "fla-fused-chunk": (
            packages.FLA,
            functools.partial(fla_based, "fused_chunk_based"),
        ),
        "thunderkittens": (_BASED, thunderkittens_based),
        "thunderkittens[bhtd]": (
            _BASED,
            functools.partial(thunderkittens_based, heads_first=True),
        ),
    },
    "hedgehog_attention": {
        "thunderkittens": (_HEDGEHOG, thunderkittens_hedgehog),
        "thunderkittens[bhtd]": (
            _HEDGEHOG,
            functools.partial(thunderkittens_hedgehog, heads_first=True),
        ),
    },
}
