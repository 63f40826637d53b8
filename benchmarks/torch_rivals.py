"""Rivals that are PyTorch packages, on the same arrays, in the same process.

jax's arrays reach torch through DLPack, without a copy. A call is timed as jax's are,
by the wall clock of many dispatched back to back: what it returns waits for the GPU
when it is asked to. jax must leave torch some memory: ``XLA_PYTHON_CLIENT_PREALLOCATE``
has to be ``false`` before jax starts the GPU, which benchmarks.run sees to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.cases import AttentionCase
from benchmarks.timing import Call


class _OnGpu:
    """Work dispatched to torch's stream; jax.block_until_ready waits for it."""

    def __init__(self, torch):
        self._torch = torch

    def block_until_ready(self):
        self._torch.cuda.synchronize()
        return self


class TorchPrograms:
    """The interface of benchmarks.programs.Programs, for a function of tensors.

    ``function`` takes q, k and v as [B, T, H, D] tensors, and torch's autograd
    differentiates it. Backward is timed alone, on graphs made beforehand.
    """

    difference = False
    no_direct_reason = None

    def __init__(self, function: Callable, case: AttentionCase, directions):
        import torch

        self._torch = torch
        self._function = function
        self.directions: Sequence[str] = tuple(directions)
        self.direct = "bwd" in self.directions
        self.compile_s: dict[str, float] = {}

    def compile(self) -> None:
        """Packages of torch compile when they are first called."""

    def first_calls(self, arrays, dout):
        torch = self._torch
        start = time.perf_counter()
        q, k, v, dout = self._tensors(arrays, dout)
        with torch.no_grad():
            out = self._function(q, k, v)
        torch.cuda.synchronize()
        self.compile_s["fwd"] = time.perf_counter() - start
        gradients = None
        if self.direct:
            start = time.perf_counter()
            result = self._function(q, k, v)
            gradients = torch.autograd.grad(result, (q, k, v), dout)
            torch.cuda.synchronize()
            self.compile_s["bwd"] = time.perf_counter() - start
            gradients = [_to_jax(x) for x in gradients]
        return _to_jax(out), gradients

    def calls(self, inputs) -> dict[str, Call]:
        torch, function, count = self._torch, self._function, len(inputs)
        tensors = [self._tensors(arrays, dout) for arrays, dout in inputs]
        on_gpu = _OnGpu(torch)
        calls = {}

        def forward(index):
            q, k, v, _ = tensors[index % count]
            with torch.no_grad():
                function(q, k, v)
            return on_gpu

        if "fwd" in self.directions:
            calls["fwd"] = forward
        if self.direct:
            outs = [function(q, k, v) for q, k, v, _ in tensors]
            torch.cuda.synchronize()

            def backward(index):
                *operands, dout = tensors[index % count]
                torch.autograd.grad(
                    outs[index % count], operands, dout, retain_graph=True
                )
                return on_gpu

            calls["bwd"] = backward
        return calls

    def _tensors(self, arrays, dout):
        jax.block_until_ready([*arrays, dout])
        tensors = [self._torch.from_dlpack(x) for x in (*arrays, dout)]
        for x in tensors[:-1]:
            x.requires_grad_(self.direct)
        return tensors


def _to_jax(tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


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
