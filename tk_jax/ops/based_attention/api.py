"""``tk_jax.based_attention`` and its step: checks, defaults, choice."""

from __future__ import annotations

import jax

from tk_jax import _dispatch
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops._chunks import NormalizedState
from tk_jax.ops.based_attention import config, vjp
from tk_jax.ops.based_attention.features import TAYLOR
from tk_jax.ops.linear_attention import family

OP = family.Op("based_attention", TAYLOR, vjp.kernel_based_attention)


def based_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: jax.Array | NormalizedState | None = None,
    return_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array | NormalizedState]:
    """Causal attention with a Taylor series for exp, in time linear in the length.

    For every query i and the keys j up to it::

        s[i, j] = scale * sum_d q[i, d] * k[j, d]
        f[i, j] = 1 + s[i, j] + s[i, j]^2 / 2
        out[i]  = sum_j f[i, j] * v[j] / sum_j f[i, j]

    without the divisor where ``normalize`` is false. The weights are products of
    features of q and k (at least 1/2, whatever s is), so that a sequence is summed up
    in a state of F = 1 + D + D (D + 1) / 2 rows, in this order: the sum of the values;
    for each a, of k[a] v; for each a and each b from a on, of k[a] k[b] v. (The matrix
    of all k[a] k[b] is symmetric: half of it is enough.)

    On a Hopper GPU kernels run it, forward and backward, for bfloat16 and, without
    ``normalize``, float16: features are formed on chip, of a chunk of 64 tokens at a
    time. Elsewhere, and for other dtypes, it runs in XLA operations, as
    :func:`tk_jax.linear_attention` does, whose words on memory and transforms hold here
    too; through kernels there are gradients, but neither forward mode nor gradients of
    gradients. The results are named ``tk_based_attention_out`` and
    ``tk_based_attention_state``.

    Args:
      q: Queries ``[..., T, G, D]``, with any number of leading batch dimensions, D one
        of 8, 16, 24, 32; in bfloat16, float16, float32 or float64.
      k: Keys ``[..., T, G, D]``.
      v: Values ``[..., T, H, V]``, where G divides H: head h of the values reads head
        ``h // (H // G)`` of queries and keys.
      scale: As above; ``1 / sqrt(D)`` by default. A static number.
      normalize: As above.
      initial_state: The state before the first token, in float32 (float64 for float64
        inputs); zeros by default. With ``normalize`` the pair of the sums of features
        times values ``[..., H, F, V]`` and of features ``[..., H, F]`` (a tuple, or
        :class:`tk_jax.NormalizedState`), without it the first alone.
      return_final_state: Returns ``(out, final_state)``, the state after the last
        token, which continues the sequence as an ``initial_state``.
      segment_ids: int32, broadcast to ``[..., T]``: the state is zeroed at each token
        whose id differs from the one before it. The initial state belongs to the first
        segment, the final one is that of the last.
      implementation: ``None`` takes the kernels on a GPU where they apply and XLA
        elsewhere, ``"xla"`` always XLA; ``"tk"`` insists on the kernels, and
        ``"interpret"`` runs them on the CPU, slowly and checked.

    Returns:
      ``out [..., T, H, V]`` in the dtype of the inputs; with ``return_final_state``
      also the state.

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, D is another number, T, G, H
        or V is zero (a batch may be), or a setting has an unknown value.
      NotImplementedError: ``implementation="tk"`` or ``"interpret"`` where the kernels
        do not apply.

    Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff" (2024), section 4.1, after Zhang et al., "The Hedgehog & the Porcupine"
    (2024), section 4.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 2, 100, 4, 16), jnp.bfloat16)
    >>> v = jax.random.normal(jax.random.key(1), (2, 100, 4, 64), jnp.bfloat16)
    >>> out, state = tk_jax.based_attention(q, k, v, return_final_state=True)
    >>> out.shape, state.sums.shape, state.normalizer.shape
    ((2, 100, 4, 64), (2, 4, 153, 64), (2, 4, 153))
    >>> float(state.normalizer[0, 0, 0])  # the first feature counts the tokens
    100.0
    """
    q, k, v, initial_state, segment_ids = checks.as_arrays(
        "based_attention",
        q=q,
        k=k,
        v=v,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    call = _plan(
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        initial_state=initial_state,
        return_final_state=return_final_state,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    out, state = family.run(call, q, k, v, None, initial_state, segment_ids)
    return (out, state) if return_final_state else out


def based_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | NormalizedState,
    *,
    scale: float | None = None,
    normalize: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | NormalizedState]:
    """One token of :func:`tk_jax.based_attention`, for decoding.

    The arguments are those of that function without the axis T, and its ``final_state``
    is the first ``state``; zeros start a sequence. The state that is returned has the
    shapes and dtype of the one taken: where that is donated (or carried by a scan), it
    is updated in place, and copied first otherwise. On a mesh with explicit axes it is
    split as that is, and ``out`` as ``v``.

    A TK kernel runs it on Hopper GPUs for bfloat16, float16 and float32, which makes
    the features and reads and writes the state once, XLA operations elsewhere.
    Derivatives are XLA's everywhere, in both modes and of any order.

    Args:
      q: Queries ``[..., G, D]``.
      k: Keys ``[..., G, D]``.
      v: Values ``[..., H, V]``.
      state: ``[..., H, F, V]``, with ``normalize`` the pair of it and ``[..., H, F]``.
      scale: As there.
      normalize: As there.
      implementation: As there.

    Returns:
      ``out [..., H, V]`` in the dtype of the inputs, and the next state.

    Raises:
      TypeError, ValueError, NotImplementedError: as :func:`tk_jax.based_attention`.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q = k = v = jnp.ones((2, 4, 16), jnp.bfloat16)
    >>> sums = jnp.zeros((2, 4, 153, 16))
    >>> state = tk_jax.NormalizedState(sums, jnp.zeros((2, 4, 153)))
    >>> step = jax.jit(tk_jax.based_attention_step, donate_argnums=3)
    >>> out, state = step(q, k, v, state)
    >>> float(out[0, 0, 0]), state.sums.shape
    (1.0, (2, 4, 153, 16))
    """
    q, k, v, state = checks.as_arrays(
        "based_attention_step", q=q, k=k, v=v, state=state
    )
    call = _plan_step(
        q,
        k,
        v,
        state,
        scale=scale,
        normalize=normalize,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    return family.run_step(call, q, k, v, None, state)


def _plan(
    q,
    k,
    v,
    *,
    scale=None,
    normalize=True,
    initial_state=None,
    return_final_state=False,
    segment_ids=None,
    implementation=None,
) -> family.Call:
    """Checks everything but that arrays are arrays, for which shapes can stand."""
    op = "based_attention"
    checks.check_first(op, "q", q, "T, G, D")
    _check_feature_dim(op, q)
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
    if initial_state is not None:
        family.check_state(call, op, "initial_state", initial_state, q, v, 3)
    checks.check_segment_ids(op, segment_ids, q.shape[:-2])
    return call


def _plan_step(q, k, v, state, **settings) -> family.Call:
    op = "based_attention_step"
    checks.check_first(op, "q", q, "G, D")
    _check_feature_dim(op, q)
    settings = {"scale": None, "normalize": True, "implementation": None} | settings
    call = family.plan_step(OP, op, q, k, v, **settings)
    family.check_state(call, op, "state", state, q, v, 2)
    return call


def _check_feature_dim(op, q) -> None:
    if q.shape[-1] not in config.FEATURE_DIMS:
        *dims, last = (str(dim) for dim in config.FEATURE_DIMS)
        raise ValueError(
            f"{op}: {checks.text_of_shape('q', q)}; "
            f"expected D to be {', '.join(dims)} or {last}"
        )


checks.explain_by_plan(based_attention, _plan)
checks.explain_by_plan(based_attention_step, _plan_step)
