"""What linear attention shares with attentions that put features before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tk_jax import _check, _dispatch
from tk_jax.ops import _chunks, _state_step
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops._chunks import NormalizedState
from tk_jax.ops.linear_attention import chunk, vjp, xla
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
            scale=_check.check_number_in_sums(name, "scale", scale, q.dtype),
            normalize=normalize,
        ),
        choice=_dispatch.choose(name, implementation, unsupported, empty=0 in q.shape),
        return_final_state=_check.check_flag(
            name, "return_final_state", return_final_state
        ),
    )


def plan_step(op: Op, name: str, q, k, v, **settings) -> Call:
    """The same for a step of one token."""

    def unsupported(_):
        dim = op.num_features(q.shape[-1])
        return _state_step.unsupported(v.shape, dim, v.dtype)

    return plan(op, name, unsupported, q, k, v, **settings)


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
    with jax.named_scope(f"tk_jax.{call.op.name}"):
        arrays = (q, k, v, log_decay, state, segment_ids)
        # [..., T, H, V] of out and [..., H, K, V] of the state.
        *batch, time, heads, columns = _dispatch.explicit_spec(v)
        final = None
        if call.return_final_state:
            final = P(*batch, heads, None, columns)
            if call.options.normalize:
                final = NormalizedState(final, P(*batch, heads, None))
        specs = (P(*batch, time, heads, columns), final)
        sequence = functools.partial(_run, call)
        return _dispatch.run_without_explicit_axes(sequence, specs, *arrays)


def _run(call, *arrays):
    op = call.op
    arrays = _dispatch.vary_together_in(arrays)
    if call.choice.cuda == "xla":
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


@functools.partial(jax.jit, static_argnums=0)
def run_step(call: Call, q, k, v, log_decay, state):
    """One token, whose arrays have no axis T: out and the next state."""
    with jax.named_scope(f"tk_jax.{call.op.name}_step"):
        arrays = (q, k, v, log_decay, state)
        # The state's as it comes, so that it can be donated or a scan's carry.
        spec, following = _dispatch.explicit_specs((v, state))
        if call.options.normalize:
            following = NormalizedState(*following)
        step = functools.partial(_run_step, call)
        return _dispatch.run_without_explicit_axes(step, (spec, following), *arrays)


def _run_step(call, *arrays):
    op = call.op
    arrays = _dispatch.vary_together_in(arrays)
    out, state = _state_step.run_chosen(
        call.choice,
        functools.partial(_kernel_step, call),
        functools.partial(_xla_step, call),
        arrays,
    )
    out = checkpoint_name(out, f"tk_{op.name}_out")
    state = checkpoint_name(state, f"tk_{op.name}_state")
    return out, NormalizedState(*state) if call.options.normalize else state


def _xla_step(call, arrays):
    """A sequence of one token."""
    q, k, v, log_decay, state = arrays
    q, k, v = (x[..., None, :, :] for x in (q, k, v))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[..., None, :]
    out, state = xla.linear_attention(
        call.options, q, k, v, log_decay, state, None, features=call.op.features
    )
    return out[..., 0, :, :], state


def _kernel_step(call, arrays):
    q, k, v, log_decay, state = arrays
    batch = v.shape[:-2]
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    unfold = functools.partial(_chunks.unfold, batch=batch)
    scale, features, normalize = (
        call.options.scale,
        call.op.features,
        call.options.normalize,
    )
    # The kernel makes the only others that there are.
    taylor = features is not chunk.DOT
    decays = None
    if log_decay is not None:
        decays = jnp.exp(log_decay.astype(jnp.float32))
        decays = decays[None] if decays.ndim == 1 else fold(decays)
    sums, normalizer = state if normalize else (state, None)
    found = _state_step.state_step(
        _state_step.StateStepOptions(
            scale=scale,
            values_last=True,
            normalize=normalize,
            taylor=taylor,
        ),
        _state_step.Arrays(
            q=fold(q),
            k=fold(k),
            v=fold(v),
            state=fold(sums),
            normalizer=None if normalizer is None else fold(normalizer),
            decays=decays,
        ),
    )
    state = unfold(found.state)
    if normalize:
        state = state, unfold(found.normalizer)
    return unfold(found.out), state
