"""``tk_jax.ssd`` and its step: checks, defaults, choice of implementation."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tk_jax import _check, _dispatch
from tk_jax.ops import _chunks, _state_step
from tk_jax.ops import _sequence_checks as checks
from tk_jax.ops.linear_attention.config import unsupported
from tk_jax.ops.linear_attention.vjp import differentiable
from tk_jax.ops.ssd import config, step, vjp, xla


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    options: config.SsdOptions
    choice: _dispatch.Choice
    return_final_state: bool


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Mamba-2's state-space dual (SSD), in time linear in the length.

    For each head, with a state h of P x N numbers and that head's group of B and C::

        dt[t] = clip(softplus(dt[t] + dt_bias), *dt_limit)
        h[t]  = exp(dt[t] * A) * h[t - 1] + dt[t] * x[t] B[t]^T
        y[t]  = (h[t] C[t] + D * x[t]) * silu(z[t])

    where ``dt_bias``, ``D`` and ``z`` are there if they are given, and ``softplus``
    with ``dt_softplus``. Arguments mean what they mean in mamba-ssm's
    ``mamba_chunk_scan_combined``. The clipping is always there, so that without
    ``dt_limit`` a negative dt is 0; at a limit its gradient passes, beyond it is zero.

    Runs TK kernels on Hopper GPUs for bfloat16 and float16 with N up to 256 (the gate z
    is XLA's there too), and XLA operations elsewhere, both in chunks.
    Steps, decays, states and sums are float32 (float64 for float64 inputs). Memory is
    linear in T, and between the passes nothing is kept but the arguments: the backward
    pass computes the states at the starts of chunks again, and with z the output.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``shard_map``, ``jax.checkpoint``
    (the results are named ``tk_ssd_out`` and ``tk_ssd_state``, see
    :mod:`tk_jax.checkpoint_policies`) and ``jax.export``. On a mesh with explicit axes
    results are split as ``x`` is, the final state with N whole. Where the kernels
    support a call, forward mode and derivatives of higher order need
    ``implementation="xla"``. All arrays but ``segment_ids`` have gradients, and the
    final state is differentiable.

    Args:
      x: ``[..., T, H, P]``, with any number of leading batch dimensions; in bfloat16,
        float16, float32 or float64.
      dt: Step sizes ``[..., T, H]``, in any floating dtype.
      A: ``[H]``, at most 0, in any floating dtype.
      B: ``[..., T, G, N]`` in the dtype of ``x``, where G divides H: head h reads group
        ``h // (H // G)``.
      C: ``[..., T, G, N]`` in the dtype of ``x``.
      D: ``[H]`` or ``[H, P]``, in any floating dtype.
      z: ``[..., T, H, P]`` in the dtype of ``x``.
      dt_bias: ``[H]``, in any floating dtype.
      dt_softplus: As above.
      dt_limit: The least and the largest step; static numbers. ``-inf`` and ``inf``
        limit nothing.
      initial_state: h before the first token, ``[..., H, P, N]`` in float32 (float64
        for float64 inputs); zeros by default.
      return_final_state: Returns ``(y, final_state)``, the state after the last token,
        which continues the sequence as an ``initial_state``.
      segment_ids: int32, broadcast to ``[..., T]``: the state is zeroed at each token
        whose id differs from the one before it. The initial state belongs to the first
        segment, the final one is that of the last.
      implementation: ``None`` chooses: kernels where they support the call, else XLA.
        ``"tk"`` and ``"xla"`` demand one of both, ``"interpret"`` runs the kernels'
        source on the CPU, checked.

    Returns:
      ``y [..., T, H, P]`` in the dtype of ``x``; with ``return_final_state`` also the
      state.

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, T, H, P, G or N is zero (a
        batch may be), or a setting has an unknown value.
      NotImplementedError: ``implementation="tk"`` or ``"interpret"`` and the kernels
        lack something, such as float32 or N beyond 256.

    Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
    Through Structured State Space Duality" (2024), section 6 and listing 1.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> x = jax.random.normal(jax.random.key(0), (2, 100, 8, 64), jnp.bfloat16)
    >>> dt = jax.random.normal(jax.random.key(1), (2, 100, 8))
    >>> B, C = jax.random.normal(jax.random.key(2), (2, 2, 100, 1, 16), jnp.bfloat16)
    >>> y, state = tk_jax.ssd(
    ...     x, dt, -jnp.ones(8), B, C, dt_softplus=True, return_final_state=True
    ... )
    >>> y.shape, y.dtype.name, state.shape, state.dtype.name
    ((2, 100, 8, 64), 'bfloat16', (2, 8, 64, 16), 'float32')
    """
    arrays = checks.as_arrays(
        "ssd",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        initial_state=initial_state,
        D=D,
        z=z,
        dt_bias=dt_bias,
        segment_ids=segment_ids,
    )
    inputs = xla.Inputs(*arrays)
    call = _plan(
        *inputs[:5],
        D=inputs.D,
        z=inputs.z,
        dt_bias=inputs.dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=inputs.state,
        return_final_state=return_final_state,
        segment_ids=inputs.segment_ids,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    y, state = _ssd(call, inputs)
    return (y, state) if return_final_state else y


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=0)
def _ssd(call, inputs):
    with jax.named_scope("tk_jax.ssd"):
        # [..., T, H, P] of y and [..., H, P, N] of the state.
        *batch, time, heads, rows = _dispatch.explicit_spec(inputs.x)
        final = P(*batch, heads, rows, None) if call.return_final_state else None
        specs = (P(*batch, time, heads, rows), final)
        run = functools.partial(_run, call)
        return _dispatch.run_without_explicit_axes(run, specs, inputs)


def _run(call, inputs):
    inputs = _dispatch.vary_together_in(inputs)
    if call.choice.cuda == "xla":
        y, state = _xla(call, inputs)
    else:
        y, state = differentiable(
            call.choice,
            tk=functools.partial(_kernels, call),
            xla=functools.partial(_xla, call),
        )(inputs)
    y = checkpoint_name(y, "tk_ssd_out")
    if not call.return_final_state:
        return y, None
    return y, checkpoint_name(state, "tk_ssd_state")


def _kernels(call, inputs):
    return vjp.kernel_ssd(call.options, call.return_final_state, inputs)


def _xla(call, inputs):
    if inputs.state is None:
        *batch, _, num_heads, head_dim = inputs.x.shape
        shape = (*batch, num_heads, head_dim, inputs.B.shape[-1])
        state = _chunks.zero_state(shape, inputs.x.dtype)
        # The zeros vary too.
        inputs = _dispatch.vary_together_in(inputs._replace(state=state))
    y, state = xla.ssd(call.options, inputs)
    return y, state if call.return_final_state else None


def ssd_step(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`tk_jax.ssd`, for decoding.

    The arguments are those of that function without the axis T, and its ``final_state``
    is the first ``state``; zeros start a sequence. The state that is returned has the
    shape and dtype of the one taken: where that is donated (or carried by a scan), it
    is updated in place, and copied first otherwise. On a mesh with explicit axes it is
    split as that is, and ``y`` as ``x``. What mamba-ssm calls
    ``selective_state_update``, for one dt to a head.

    A TK kernel runs it on Hopper GPUs for bfloat16, float16 and float32 with states of
    any size, which it reads and writes once, XLA operations elsewhere; step sizes and
    the gate z are XLA's. Derivatives are XLA's everywhere, in both modes and of any
    order.

    Args:
      x: ``[..., H, P]``.
      dt: ``[..., H]``.
      A: ``[H]``.
      B: ``[..., G, N]``.
      C: ``[..., G, N]``.
      state: ``[..., H, P, N]`` in float32 (float64 for float64 inputs).
      D: ``[H]`` or ``[H, P]``.
      z: ``[..., H, P]``.
      dt_bias: ``[H]``.
      dt_softplus: As there.
      dt_limit: As there.
      implementation: As there.

    Returns:
      ``y [..., H, P]`` in the dtype of ``x``, and the next state.

    Raises:
      TypeError, ValueError, NotImplementedError: as :func:`tk_jax.ssd`.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> step = jax.jit(tk_jax.ssd_step, donate_argnums=5)
    >>> x, dt, A = jnp.ones((2, 8, 64)), jnp.ones((2, 8)), -jnp.ones(8)
    >>> B = C = jnp.ones((2, 1, 16))
    >>> y, state = step(x, dt, A, B, C, jnp.zeros((2, 8, 64, 16)))
    >>> float(y[0, 0, 0]), state.shape
    (16.0, (2, 8, 64, 16))
    """
    arrays = checks.as_arrays(
        "ssd_step", x=x, dt=dt, A=A, B=B, C=C, state=state, D=D, z=z, dt_bias=dt_bias
    )
    inputs = xla.Inputs(*arrays, segment_ids=None)
    call = _plan_step(
        *inputs[:6],
        D=inputs.D,
        z=inputs.z,
        dt_bias=inputs.dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    return _ssd_step(call, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _ssd_step(call, inputs):
    with jax.named_scope("tk_jax.ssd_step"):
        # The state's as it comes, so that it can be donated or a scan's carry.
        specs = _dispatch.explicit_specs((inputs.x, inputs.state))
        run = functools.partial(_run_step, call)
        return _dispatch.run_without_explicit_axes(run, specs, inputs)


def _run_step(call, inputs):
    inputs = _dispatch.vary_together_in(inputs)
    y, state = _state_step.run_chosen(
        call.choice,
        functools.partial(step.kernel_step, call.options),
        functools.partial(step.xla_step, call.options),
        inputs,
    )
    y = checkpoint_name(y, "tk_ssd_out")
    return y, checkpoint_name(state, "tk_ssd_state")


def _plan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    initial_state=None,
    return_final_state=False,
    segment_ids=None,
    implementation=None,
) -> Call:
    """Checks everything but that arrays are arrays, for which shapes can stand."""
    op = "ssd"
    checks.check_first(op, "x", x, "T, H, P")
    _check_arrays(op, x, dt, A, B, C, D, z, dt_bias)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, x, B, 3)
    checks.check_segment_ids(op, segment_ids, x.shape[:-2])
    final = _check.check_flag(op, "return_final_state", return_final_state)
    return _make_call(
        op, x, dt_softplus, dt_limit, implementation, final, unsupported(C, x)
    )


def _plan_step(
    x,
    dt,
    A,
    B,
    C,
    state,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    implementation=None,
) -> Call:
    op = "ssd_step"
    checks.check_first(op, "x", x, "H, P")
    _check_arrays(op, x, dt, A, B, C, D, z, dt_bias)
    _check_state(op, "state", state, x, B, 2)
    lacking = _state_step.unsupported(x.shape, B.shape[-1], x.dtype)
    return _make_call(op, x, dt_softplus, dt_limit, implementation, True, lacking)


def _make_call(op, x, dt_softplus, dt_limit, implementation, final, lacking) -> Call:
    low, high = _check_limit(op, dt_limit, x.dtype)
    options = config.SsdOptions(
        dt_softplus=_check.check_flag(op, "dt_softplus", dt_softplus),
        dt_min=low,
        dt_max=high,
    )
    choice = _dispatch.choose(op, implementation, lacking, empty=0 in x.shape)
    return Call(options=options, choice=choice, return_final_state=final)


def _check_arrays(op, x, dt, A, B, C, D, z, dt_bias) -> None:
    *leading, num_heads, head_dim = x.shape
    x_text = checks.text("x", x)
    checks.check_gate(op, "dt", dt, [(*leading, num_heads)], x_text)
    checks.check_gate(op, "A", A, [(num_heads,)], x_text)
    _check.check_shape(op, "B", B.shape, (*leading, "G", "N"), x_text)
    checks.check_not_empty(op, "B", B, "G, N")
    checks.check_divides(
        op, "B", B.shape[-2], "groups (G)", "heads (H) of x", num_heads
    )
    _check.check_shape(op, "C", C.shape, B.shape, checks.text("B", B))
    if z is not None:
        _check.check_shape(op, "z", z.shape, x.shape, x_text)
        _check.check_same_dtype(op, "z", z.dtype, "x", x.dtype)
    _check.check_same_dtype(op, "B", B.dtype, "x", x.dtype)
    _check.check_same_dtype(op, "C", C.dtype, "x", x.dtype)
    if D is not None:
        shapes = [(num_heads,), (num_heads, head_dim)]
        checks.check_gate(op, "D", D, shapes, x_text)
    if dt_bias is not None:
        checks.check_gate(op, "dt_bias", dt_bias, [(num_heads,)], x_text)


def _check_state(op, name, state, x, B, num_axes) -> None:
    checks.check_is_array(op, name, state)
    batch = x.shape[: x.ndim - num_axes]
    shape = (*batch, *x.shape[-2:], B.shape[-1])
    to_match = f"{checks.text('x', x)} and {checks.text('B', B)}"
    checks.check_state(op, name, state, shape, x.dtype, to_match)


def _check_limit(op, dt_limit, dtype) -> tuple[float, float]:
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise TypeError(
            f"{op}: dt_limit is {dt_limit!r}; expected a pair of numbers, (least, "
            "largest)"
        )
    low, high = (
        _check.check_number_in_sums(op, f"dt_limit[{i}]", x, dtype, or_infinity=none)
        for i, (x, none) in enumerate(zip(dt_limit, (-math.inf, math.inf), strict=True))
    )
    if low > high:
        raise ValueError(
            f"{op}: dt_limit is {dt_limit!r}; expected the least number first"
        )
    return low, high


checks.explain_by_plan(ssd, _plan)
checks.explain_by_plan(ssd_step, _plan_step)
