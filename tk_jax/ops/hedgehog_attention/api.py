"""``tk_jax.hedgehog_attention`` and its step: checks, defaults, choice."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tk_jax import _check, _dispatch
from tk_jax.ops import _chunks, _state_step
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops.hedgehog_attention import config, step, vjp, xla
from tk_jax.ops.hedgehog_attention.config import HedgehogState
from tk_jax.ops.linear_attention.vjp import differentiable


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    options: config.HedgehogOptions
    choice: _dispatch.Choice
    return_final_state: bool


def hedgehog_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_map: jax.Array,
    k_map: jax.Array,
    *,
    alpha: jax.Array | float,
    beta: jax.Array | float,
    window: int = 64,
    scale: float | None = None,
    initial_state: HedgehogState | None = None,
    return_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, HedgehogState]:
    """Hedgehog's learned linear attention with a softmax over a terraced window.

    Tokens of a segment are in blocks of ``window`` from its start. A query sees the
    keys up to its own in its block and in the one before through a softmax (near), and
    all keys before them through learned features (far)::

        phi(x, W) = [softmax(x W), softmax(-x W)]
        s[i, j]   = scale * q[i] k[j]
        m[i]      = max over near j of s[i, j]
        p[i, j]   = beta * exp(s[i, j] - m[i])                         for near j
        p[i, j]   = alpha * phi(q[i], q_map) phi(k[j], k_map)          for far j
        out[i]    = sum_j p[i, j] * v[j] / sum_j p[i, j]   (0 where the divisor is 0)

    The far weights are not rescaled by ``exp(m)``: the largest score is part of the
    function, and gradients flow through it, as in LoLCATs.

    Runs TK kernels on Hopper GPUs for bfloat16 and float16, a window of 64, F = 64, D
    and V up to 128, forward and backward, and XLA operations elsewhere, in chunks. The
    kernels round the maps to the dtype of the
    tokens; sums are float32 (float64 for float64 inputs). Memory is linear in T, and
    between the passes nothing is kept but the arguments.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``shard_map``, ``jax.checkpoint``
    (the results are named ``tk_hedgehog_attention_out`` and
    ``tk_hedgehog_attention_state``) and ``jax.export``. On a mesh with explicit axes
    ``out`` is split as ``q`` is, with V whole, and the final state by batch and heads
    of ``k``. Where the kernels support a call, forward mode and derivatives of higher
    order need ``implementation="xla"``.

    Args:
      q: Queries ``[..., T, H, D]``, with any number of leading batch dimensions; in
        bfloat16, float16, float32 or float64.
      k: Keys ``[..., T, K, D]``, where K divides H: query head h reads key head
        ``h // (H // K)``.
      v: Values ``[..., T, K, V]``.
      q_map: ``[H, D, F]``, in any floating dtype.
      k_map: ``[K, D, F]``, in any floating dtype.
      alpha: Weight of the far keys, ``[H]`` or one number; at least 0.
      beta: Weight of the near keys, ``[H]`` or one number; at least 0.
      window: Tokens of a block. A static number.
      scale: Multiplies the scores of near keys; ``1 / sqrt(D)`` by default. A static
        number.
      initial_state: What an earlier call returned for the tokens before these, a
        :class:`tk_jax.HedgehogState`, or a tuple of its arrays: of float32 (float64 for
        float64 inputs) the sums ``[..., K, 2 F, V]`` and ``[..., K, 2 F]`` of what is
        older than two windows, of the inputs' dtype the latest keys
        ``[..., 2 window, K, D]`` and values ``[..., 2 window, K, V]``, and the length
        so far, int32 ``[...]``. By default all are zeros.
      return_final_state: Returns ``(out, final_state)``, which continues the sequence
        as an ``initial_state``, wherever its blocks are.
      segment_ids: int32, broadcast to ``[..., T]``: at each token whose id differs from
        the one before it, a new sequence begins. The initial state belongs to the first
        segment, the final one is that of the last.
      implementation: ``None`` chooses: kernels where they support the call, else XLA.
        ``"tk"`` and ``"xla"`` demand one of both, ``"interpret"`` runs the kernels'
        source on the CPU, checked.

    Returns:
      ``out [..., T, H, V]`` in the dtype of the inputs; with ``return_final_state``
      also the state. All arrays but ``segment_ids`` and the length have gradients.

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, T, H, K, D, V or F is zero (a
        batch may be), or a setting has an unknown value.
      NotImplementedError: ``implementation="tk"`` or ``"interpret"`` and the kernels
        lack something, such as float32.

    Zhang et al., "The Hedgehog & the Porcupine" (2024), section 4; Zhang et al.,
    "LoLCATs" (2024), section 3.2, with the window that ThunderKittens has (Spector et
    al., 2024).

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q = jax.random.normal(jax.random.key(0), (2, 300, 8, 32), jnp.bfloat16)
    >>> k = v = jax.random.normal(jax.random.key(1), (2, 300, 2, 32), jnp.bfloat16)
    >>> q_map = jax.random.normal(jax.random.key(2), (8, 32, 16))
    >>> k_map = jax.random.normal(jax.random.key(3), (2, 32, 16))
    >>> out, state = tk_jax.hedgehog_attention(
    ...     q, k, v, q_map, k_map, alpha=0.5, beta=0.5, return_final_state=True
    ... )
    >>> out.shape, state.sums.shape, state.keys.shape, state.length
    ((2, 300, 8, 32), (2, 2, 32, 32), (2, 128, 2, 32), Array([300, 300], dtype=int32))
    """
    op = "hedgehog_attention"
    arrays = checks.as_arrays(
        op,
        q=q,
        k=k,
        v=v,
        q_map=q_map,
        k_map=k_map,
        alpha=alpha,
        beta=beta,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    inputs = xla.Inputs(*arrays)
    call = _plan(
        *inputs[:5],
        alpha=inputs.alpha,
        beta=inputs.beta,
        window=window,
        scale=scale,
        initial_state=inputs.state,
        return_final_state=return_final_state,
        segment_ids=inputs.segment_ids,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    out, state = _hedgehog_attention(call, inputs)
    return (out, state) if return_final_state else out


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=0)
def _hedgehog_attention(call, inputs):
    with jax.named_scope("tk_jax.hedgehog_attention"):
        if inputs.state is not None:
            inputs = inputs._replace(state=HedgehogState(*inputs.state))
        final = None
        if call.return_final_state:
            *batch, _, heads, _ = _dispatch.explicit_spec(inputs.k)
            tokens = P(*batch, None, heads, None)
            sums = P(*batch, heads, None, None)
            normalizer = P(*batch, heads, None)
            final = HedgehogState(sums, normalizer, tokens, tokens, P(*batch))
        specs = (P(*_dispatch.explicit_spec(inputs.q)[:-1], None), final)
        run = functools.partial(_run, call)
        return _dispatch.run_without_explicit_axes(run, specs, inputs)


def _run(call, inputs):
    final = call.return_final_state
    given = inputs
    inputs = _dispatch.vary_together_in(inputs)
    run_xla = functools.partial(vjp.xla_hedgehog_attention, call.options, final)
    if call.choice.cuda == call.choice.elsewhere:
        out, state = run_xla(inputs)  # differentiable to any order
    else:
        run_tk = functools.partial(vjp.kernel_hedgehog_attention, call.options, final)
        out, state = differentiable(call.choice, run_tk, run_xla)(inputs)
    if final:
        state = state._replace(length=_final_length(given))
    out = checkpoint_name(out, "tk_hedgehog_attention_out")
    return out, checkpoint_name(state, "tk_hedgehog_attention_state")


def _final_length(inputs):
    """As the implementations find it, but from what it depends on alone.

    What they return varies, inside ``shard_map``, over all mesh axes that any array
    does: over heads too, which it has none of.
    """
    *batch, seqlen = inputs.q.shape[:-2]
    state, ids = inputs.state, inputs.segment_ids
    length = jnp.zeros(batch, jnp.int32) if state is None else state.length
    if ids is None:
        return length + seqlen
    length, ids = _dispatch.vary_together(length, ids)
    starts = _chunks.segment_starts(ids, (*batch, seqlen)).reshape(-1, seqlen)
    positions = xla.token_positions(length.reshape(-1), starts, starts.shape)
    return positions[:, -1].reshape(batch) + 1


def hedgehog_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_map: jax.Array,
    k_map: jax.Array,
    state: HedgehogState,
    *,
    alpha: jax.Array | float,
    beta: jax.Array | float,
    window: int = 64,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, HedgehogState]:
    """One token of :func:`tk_jax.hedgehog_attention`, for decoding.

    The arguments are those of that function without the axis T, and its ``final_state``
    is the first ``state``; zeros start a sequence. The state that is returned has the
    shapes and dtypes of the one taken, so that its buffers can be donated; on a mesh
    with explicit axes it is split as that is, and ``out`` as ``q``, with V whole.

    On Hopper GPUs a TK kernel updates the sums in place for bfloat16, float16 and
    float32, any window and maps, and up to 8 heads of queries to one of keys; another
    one the latest two windows, for the dtypes, window, maps and dims of
    :func:`tk_jax.hedgehog_attention`'s kernels where D and V are multiples of 8. Other
    windows are XLA's, as is everything elsewhere. Derivatives are XLA's, in both modes
    and of any order.

    Args:
      q: Queries ``[..., H, D]``.
      k: Keys ``[..., K, D]``.
      v: Values ``[..., K, V]``.
      q_map: ``[H, D, F]``.
      k_map: ``[K, D, F]``.
      state: A :class:`tk_jax.HedgehogState`, or a tuple of its arrays.
      alpha: As there.
      beta: As there.
      window: As there.
      scale: As there.
      implementation: As there.

    Returns:
      ``out [..., H, V]`` in the dtype of the inputs, and the next state.

    Raises:
      TypeError, ValueError, NotImplementedError: as
        :func:`tk_jax.hedgehog_attention`.

    >>> import functools, jax, jax.numpy as jnp, tk_jax
    >>> q = k = v = jnp.ones((2, 9, 4, 8))
    >>> maps = jnp.ones((4, 8, 8))
    >>> settings = {"alpha": 0.5, "beta": 0.5, "window": 4}
    >>> _, state = tk_jax.hedgehog_attention(
    ...     q, k, v, maps, maps, return_final_state=True, **settings
    ... )
    >>> step = functools.partial(tk_jax.hedgehog_attention_step, **settings)
    >>> out, state = step(q[:, 0], k[:, 0], v[:, 0], maps, maps, state)
    >>> out.shape, state.length
    ((2, 4, 8), Array([10, 10], dtype=int32))
    """
    op = "hedgehog_attention_step"
    arrays = checks.as_arrays(
        op,
        q=q,
        k=k,
        v=v,
        q_map=q_map,
        k_map=k_map,
        alpha=alpha,
        beta=beta,
        state=state,
    )
    inputs = xla.Inputs(*arrays, segment_ids=None)
    call = _plan_step(
        *inputs[:5],
        inputs.state,
        alpha=inputs.alpha,
        beta=inputs.beta,
        window=window,
        scale=scale,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    return _hedgehog_attention_step(call, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _hedgehog_attention_step(call, inputs):
    with jax.named_scope("tk_jax.hedgehog_attention_step"):
        inputs = inputs._replace(state=HedgehogState(*inputs.state))
        rows = _dispatch.explicit_spec(inputs.q)[:-1]
        # The state's as it comes, so that it can be donated or a scan's carry.
        specs = (P(*rows, None), _dispatch.explicit_specs(inputs.state))
        run = functools.partial(_run_step, call)
        return _dispatch.run_without_explicit_axes(run, specs, inputs)


def _run_step(call, inputs):
    length = inputs.state.length + 1  # varies as that of before
    inputs = _dispatch.vary_together_in(inputs)
    out, state = _state_step.run_chosen(
        call.choice,
        functools.partial(step.kernel_step, call.options),
        functools.partial(step.xla_step, call.options),
        inputs,
    )
    state = state._replace(length=length)
    out = checkpoint_name(out, "tk_hedgehog_attention_out")
    return out, checkpoint_name(state, "tk_hedgehog_attention_state")


def _plan(
    q,
    k,
    v,
    q_map,
    k_map,
    *,
    alpha,
    beta,
    window=64,
    scale=None,
    initial_state=None,
    return_final_state=False,
    segment_ids=None,
    implementation=None,
) -> Call:
    """Checks everything but that arrays are arrays, for which shapes can stand."""
    op = "hedgehog_attention"
    checks.check_first(op, "q", q, "T, H, D")
    arrays = (q, k, v, q_map, k_map, alpha, beta)
    final = _check.check_flag(op, "return_final_state", return_final_state)
    options = _check_call(op, arrays, window, scale)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, k, v, q_map, window, 3)
    checks.check_segment_ids(op, segment_ids, q.shape[:-2])
    lacking = config.unsupported(options, q, k, v, q_map, initial_state is not None)
    choice = _dispatch.choose(op, implementation, lacking, empty=0 in q.shape)
    return Call(options, choice, final)


def _plan_step(
    q,
    k,
    v,
    q_map,
    k_map,
    state,
    *,
    alpha,
    beta,
    window=64,
    scale=None,
    implementation=None,
) -> Call:
    op = "hedgehog_attention_step"
    checks.check_first(op, "q", q, "H, D")
    arrays = (q, k, v, q_map, k_map, alpha, beta)
    options = _check_call(op, arrays, window, scale)
    _check_state(op, "state", state, k, v, q_map, window, 2)
    lacking = _state_step.unsupported(
        v.shape, 2 * q_map.shape[-1], v.dtype, queries=q.shape[-2] // k.shape[-2]
    )
    choice = _dispatch.choose(op, implementation, lacking, empty=0 in q.shape)
    return Call(options, choice, True)


def _check_call(op, arrays, window, scale) -> config.HedgehogOptions:
    q = arrays[0]
    _check_arrays(op, *arrays)
    if not isinstance(window, int | np.integer) or isinstance(window, bool):
        raise TypeError(
            f"{op}: window is of type {type(window).__name__}; expected a Python int"
        )
    if window < 1:
        raise ValueError(f"{op}: window is {window}; expected at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return config.HedgehogOptions(
        scale=_check.check_number_in_sums(op, "scale", scale, q.dtype),
        window=int(window),
    )


def _check_arrays(op, q, k, v, q_map, k_map, alpha, beta) -> None:
    *leading, num_heads, head_dim = q.shape
    q_text = checks.text("q", q)
    _check.check_shape(op, "k", k.shape, (*leading, "K", head_dim), q_text)
    checks.check_not_empty(op, "k", k, "K")
    k_text = checks.text("k", k)
    _check.check_shape(op, "v", v.shape, (*k.shape[:-1], "V"), k_text)
    checks.check_not_empty(op, "v", v, "V")
    checks.check_divides(op, "k", k.shape[-2], "heads (K)", "heads (H) of q", num_heads)
    _check.check_same_dtype(op, "k", k.dtype, "q", q.dtype)
    _check.check_same_dtype(op, "v", v.dtype, "q", q.dtype)
    _check.check_shape(op, "q_map", q_map.shape, (num_heads, head_dim, "F"), q_text)
    checks.check_not_empty(op, "q_map", q_map, "F")
    expected = (k.shape[-2], *q_map.shape[1:])
    to_match = f"{k_text} and {checks.text('q_map', q_map)}"
    _check.check_shape(op, "k_map", k_map.shape, expected, to_match)
    _check.check_floating(op, "q_map", q_map.dtype)
    _check.check_floating(op, "k_map", k_map.dtype)
    checks.check_gate(op, "alpha", alpha, [(num_heads,), ()], q_text)
    checks.check_gate(op, "beta", beta, [(num_heads,), ()], q_text)


def _check_state(op, name, state, k, v, q_map, window, num_axes) -> None:
    checks.check_state_tuple(op, name, state, HedgehogState)
    shapes = config.state_shapes(q_map.shape, k.shape, v.shape, window, num_axes)
    sums = _chunks.sum_dtype(k.dtype)
    dtypes = HedgehogState(sums, sums, k.dtype, k.dtype, jnp.dtype(jnp.int32))
    to_match = f"{checks.text('k', k)}, {checks.text('v', v)} and window {window}"
    for field, x, shape, dtype in zip(
        HedgehogState._fields, state, shapes, dtypes, strict=True
    ):
        _check.check_shape(op, f"{name}.{field}", x.shape, shape, to_match)
        _check.check_dtype(op, f"{name}.{field}", x.dtype, dtype)


checks.explain_by_plan(hedgehog_attention, _plan)
checks.explain_by_plan(hedgehog_attention_step, _plan_step)
