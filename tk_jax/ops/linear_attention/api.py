"""``tk_jax.linear_attention`` and its step: checks, defaults, choice."""

from __future__ import annotations

import jax

from tk_jax import _dispatch
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops._chunks import NormalizedState
from tk_jax.ops.linear_attention import config, family
from tk_jax.ops.linear_attention.chunk import DOT

OP = family.Op("linear_attention", DOT)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: jax.Array | NormalizedState | None = None,
    return_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array | NormalizedState]:
    """Causal linear attention with a scalar decay, in time linear in the length.

    For each head, with a state S of K x V numbers::

        S[t]   = exp(log_decay[t]) * S[t - 1] + k[t] v[t]^T
        out[t] = scale * q[t]^T S[t]

    and with ``normalize``, for keys and queries whose products are not negative::

        z[t]   = exp(log_decay[t]) * z[t - 1] + k[t]
        out[t] = q[t]^T S[t] / (q[t]^T z[t])     (0 where the divisor is 0)

    Without a decay this is linear attention, with a fixed one for each head retention
    and Lightning attention, with one for each token the core of Mamba-2 and of gated
    linear attention with scalar gates.

    Runs TK kernels on Hopper GPUs for bfloat16 and float16 with K up to 256
    (``normalize`` for bfloat16), and XLA operations elsewhere, both in chunks. Decays,
    states and sums are float32 (float64 for float64 inputs). Memory is linear in T, and
    between the passes nothing is kept but the arguments: the backward pass computes the
    states at the starts of chunks again.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``shard_map``, ``jax.checkpoint``
    (the results are named ``tk_linear_attention_out`` and
    ``tk_linear_attention_state``, see :mod:`tk_jax.checkpoint_policies`) and
    ``jax.export``. On a mesh with explicit axes results are split as ``v`` is, the
    final state with K whole. Where the kernels support a call, forward mode and
    derivatives of higher order need ``implementation="xla"``. All arrays but
    ``segment_ids`` have gradients, and the final state is differentiable.

    Args:
      q: Queries ``[..., T, G, K]``, with any number of leading batch dimensions; in
        bfloat16, float16, float32 or float64.
      k: Keys ``[..., T, G, K]``.
      v: Values ``[..., T, H, V]``, where G divides H: head h of the values reads head
        ``h // (H // G)`` of queries and keys.
      log_decay: Floating, ``[..., T, H]`` or the same for all tokens ``[H]``: natural
        logarithms, at most 0; ``-inf`` forgets everything before the token. Above 0 the
        state grows, as the formula says, until it overflows.
      scale: Multiplies the queries; ``1 / sqrt(K)`` by default. A static number.
      normalize: Divides by the sum of the weights, in which ``scale`` cancels.
      initial_state: S before the first token, ``[..., H, K, V]`` in float32 (float64
        for float64 inputs); zeros by default. With ``normalize``, the pair of S and
        z ``[..., H, K]`` (a tuple, or :class:`tk_jax.NormalizedState`).
      return_final_state: Returns ``(out, final_state)``, the state after the last
        token, which continues the sequence as an ``initial_state``.
      segment_ids: int32, broadcast to ``[..., T]``: the state is zeroed at each token
        whose id differs from the one before it. The initial state belongs to the first
        segment, the final one is that of the last.
      implementation: ``None`` chooses: kernels where they support the call, else XLA.
        ``"tk"`` and ``"xla"`` demand one of both, ``"interpret"`` runs the kernels'
        source on the CPU, checked.

    Returns:
      ``out [..., T, H, V]`` in the dtype of the inputs; with ``return_final_state``
      also the state.

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, T, G, K, H or V is zero (a
        batch may be), or a setting has an unknown value.
      NotImplementedError: ``implementation="tk"`` or ``"interpret"`` and the kernels
        lack something, such as float32 or K beyond 256.

    Katharopoulos et al., "Transformers are RNNs" (2020), section 3; decays per head as
    in Sun et al., "Retentive Network" (2023), section 2, and Qin et al., "Lightning
    Attention-2" (2024); per token as in Dao and Gu, "Transformers are SSMs" (2024).

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 2, 100, 4, 16), jnp.bfloat16)
    >>> v = jax.random.normal(jax.random.key(1), (2, 100, 8, 32), jnp.bfloat16)
    >>> log_decay = jnp.log(1 - 2.0 ** (-5 - jnp.arange(8.0)))  # retention
    >>> out, state = tk_jax.linear_attention(
    ...     q, k, v, log_decay=log_decay, return_final_state=True
    ... )
    >>> out.shape, out.dtype.name, state.shape, state.dtype.name
    ((2, 100, 8, 32), 'bfloat16', (2, 8, 16, 32), 'float32')
    """
    op = "linear_attention"
    q, k, v, log_decay, initial_state, segment_ids = checks.as_arrays(
        op,
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    call = _plan(
        q,
        k,
        v,
        log_decay=log_decay,
        scale=scale,
        normalize=normalize,
        initial_state=initial_state,
        return_final_state=return_final_state,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    out, state = family.run(call, q, k, v, log_decay, initial_state, segment_ids)
    return (out, state) if return_final_state else out


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | NormalizedState,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | NormalizedState]:
    """One token of :func:`tk_jax.linear_attention`, for decoding.

    The arguments are those of that function without the axis T, and its ``final_state``
    is the first ``state``; zeros start a sequence. The state that is returned has the
    shape and dtype of the one taken: where that is donated (or carried by a scan), it
    is updated in place, and copied first otherwise. On a mesh with explicit axes it is
    split as that is, and ``out`` as ``v``.

    A TK kernel runs it on Hopper GPUs for bfloat16, float16 and float32 with states of
    any size, which it reads and writes once, XLA operations elsewhere. Derivatives are
    XLA's everywhere, in both modes and of any order.

    Args:
      q: Queries ``[..., G, K]``.
      k: Keys ``[..., G, K]``.
      v: Values ``[..., H, V]``.
      state: ``[..., H, K, V]`` in float32 (float64 for float64 inputs); with
        ``normalize`` the pair of it and ``[..., H, K]``.
      log_decay: ``[..., H]`` or ``[H]``.
      scale: As there.
      normalize: As there.
      implementation: As there.

    Returns:
      ``out [..., H, V]`` in the dtype of the inputs, and the next state.

    Raises:
      TypeError, ValueError, NotImplementedError: as :func:`tk_jax.linear_attention`.

    >>> import functools, jax, jax.numpy as jnp, tk_jax
    >>> q = k = v = jnp.ones((2, 4, 16), jnp.bfloat16)
    >>> step = jax.jit(tk_jax.linear_attention_step, donate_argnums=3)
    >>> out, state = step(q, k, v, jnp.zeros((2, 4, 16, 16)))
    >>> out, state = step(q, k, v, state)
    >>> float(out[0, 0, 0]), state.shape  # two tokens, 16 products of 1, over sqrt(16)
    (8.0, (2, 4, 16, 16))
    """
    q, k, v, state, log_decay = checks.as_arrays(
        "linear_attention_step", q=q, k=k, v=v, state=state, log_decay=log_decay
    )
    call = _plan_step(
        q,
        k,
        v,
        state,
        log_decay=log_decay,
        scale=scale,
        normalize=normalize,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    return family.run_step(call, q, k, v, log_decay, state)


def _plan(
    q,
    k,
    v,
    *,
    log_decay=None,
    scale=None,
    normalize=False,
    initial_state=None,
    return_final_state=False,
    segment_ids=None,
    implementation=None,
) -> family.Call:
    """Checks everything but that arrays are arrays, for which shapes can stand."""
    op = "linear_attention"
    checks.check_first(op, "q", q, "T, G, K")
    call = family.plan(
        OP,
        op,
        lambda normalize: config.unsupported(q, v, normalize=normalize),
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        implementation=implementation,
        return_final_state=return_final_state,
    )
    _check_log_decay(op, log_decay, v)
    if initial_state is not None:
        family.check_state(call, op, "initial_state", initial_state, q, v, 3)
    checks.check_segment_ids(op, segment_ids, q.shape[:-2])
    return call


def _plan_step(q, k, v, state, *, log_decay=None, **settings) -> family.Call:
    op = "linear_attention_step"
    checks.check_first(op, "q", q, "G, K")
    settings = {"scale": None, "normalize": False, "implementation": None} | settings
    call = family.plan_step(OP, op, q, k, v, **settings)
    _check_log_decay(op, log_decay, v)
    family.check_state(call, op, "state", state, q, v, 2)
    return call


def _check_log_decay(op, log_decay, v) -> None:
    if log_decay is not None:
        shapes = (v.shape[:-1], v.shape[-2:-1])
        checks.check_gate(op, "log_decay", log_decay, shapes, checks.text("v", v))


checks.explain_by_plan(linear_attention, _plan)
checks.explain_by_plan(linear_attention_step, _plan_step)
