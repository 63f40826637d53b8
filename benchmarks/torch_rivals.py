"""Rivals of attention that are PyTorch packages."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import AttentionCase


def flash_attn_4(case: AttentionCase) -> Callable:
    """FlashAttention's CuTe-DSL kernels, in its default (any) order of summation."""
    import torch
    from flash_attn.cute import interface

    window = case.local_window_size or (None, None)
    # Its causal mask and window are aligned to the bottom right: the same for T = S.
    options = {
        "causal": case.is_causal and case.window is None,
        "window_size": window,
        "softmax_scale": case.head_dim**-0.5,
    }

    def out_of(result):
        return result[0] if isinstance(result, tuple) else result

    if case.documents == 1:
        return lambda q, k, v: out_of(interface.flash_attn_func(q, k, v, **options))

    length = case.seqlen_q // case.documents
    ends = torch.arange(
        0,
        case.batch * case.seqlen_q + 1,
        length,
        dtype=torch.int32,
        device="cuda",
    )

    def documents(q, k, v):
        out = interface.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=length,
            max_seqlen_k=length,
            **options,
        )
        return out_of(out).unflatten(0, (case.batch, case.seqlen_q))

    return documents
