"""What linear attention shares with attentions that put features before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from tk_jax import _check, _dispatch
from tk_jax.ops import _chunks
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops._chunks import NormalizedState
from tk_jax.ops.linear_attention import vjp, xla
from tk_jax.ops.linear_attention.config import LinearAttentionOptions


@dataclasses.dataclass(frozen=True)
class Op:
    """One of the family."""

    name: str
    features: object  # what linear_attention.chunk.Dot is an example of
    kernels: Callable = vjp.kernel_linear_attention  # where its ``plan`` lets them run

    def num_features(self, dim: int) -> int:
        """Rows of the state."""
        return self.features.num_features(dim)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    op: Op
    options: LinearAttentionOptions
    choice: _dispatch.Choice
    return_final_state: bool


def plan(
    op: Op,
    name: str,
    unsupported: str | Callable[[bool], str | None],
    q,
    k,
    v,
    *,
    scale,
    normalize,
    implementation,
    return_final_state=True,
) -> Call:
    """Checks what all have; ``name`` is that of the op or of its step.

    ``unsupported`` says what the kernels lack, or does so given ``normalize``.
    """
    checks.check_keys_and_values(name, q, k, v)
    normalize = _check.check_flag(name, "normalize", normalize)
    if callable(unsupported):
        unsupported = unsupported(normalize)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return Call(
        op=op,
        options=LinearAttentionOptions(
            scale=_check.check_finite_number(name, "scale", scale),
            normalize=normalize,
        ),
        choice=_dispatch.choose(name, implementation, unsupported),
        return_final_state=_check.check_flag(
            name, "return_final_state", return_final_state
        ),
    )


def check_state(call: Call, name: str, argument: str, state, q, v, num_axes) -> None:
    """``num_axes`` are those of v that are no batch dimensions."""
    batch = v.shape[: v.ndim - num_axes]
    shape = (*batch, v.shape[-2], call.op.num_features(q.shape[-1]), v.shape[-1])
    to_match = checks.text("v", v)
    normalize = call.options.normalize
    checks.check_sums(name, argument, state, shape, normalize, q.dtype, to_match)


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=0)
def run(call: Call, q, k, v, log_decay, state, segment_ids):
    """Returns out and the final state, None unless ``call.return_final_state``."""
    op = call.op
    with jax.named_scope(f"tk_jax.{op.name}"):
        arrays = (q, k, v, log_decay, state, segment_ids)
        arrays = _dispatch.vary_together_in(arrays)
        if call.choice.cuda == "xla" or q.size == 0:
            out, state = _xla(call, arrays)
        else:
            out, state = vjp.differentiable(
                call.choice,
                tk=functools.partial(_kernels, call),
                xla=functools.partial(_xla, call),
            )(arrays)
        out = checkpoint_name(out, f"tk_{op.name}_out")
        if not call.return_final_state:
            return out, None
        state = checkpoint_name(state, f"tk_{op.name}_state")
        return out, NormalizedState(*state) if call.options.normalize else state


def _kernels(call, arrays):
    return call.op.kernels(call.options, call.return_final_state, *arrays)


def _xla(call, arrays):
    q, k, v, log_decay, state, segment_ids = arrays
    op, normalize = call.op, call.options.normalize
    if state is None:
        *batch, _, num_heads, dim_v = v.shape
        shape = (*batch, num_heads, op.num_features(q.shape[-1]), dim_v)
        sums = _chunks.zero_state(shape, q.dtype)
        state = (sums, sums[..., 0]) if normalize else sums
    # Again: the zeros vary too.
    arrays = _dispatch.vary_together_in((q, k, v, log_decay, state, segment_ids))
    out, state = xla.linear_attention(call.options, *arrays, features=op.features)
    return out, state if call.return_final_state else None


def run_step(call: Call, q, k, v, log_decay, state):
    """A sequence of one token, whose arrays have no axis T."""
    q, k, v = (x[..., None, :, :] for x in (q, k, v))
    out, state = run(call, q, k, v, log_decay, state, None)
    return out[..., 0, :, :], state
