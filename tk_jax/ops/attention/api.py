"""``tk_jax.attention``: checks, defaults, choice of implementation."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tk_jax import _check, _dispatch
from tk_jax.ops.attention import config, vjp, xla

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_FLOAT32 = jnp.finfo(jnp.float32)
# Scores are divided by it, in float32.
_SOFT_CAPS = (1e-30, 1e30)
# Of windows of symbolic sequence lengths: a position plus this fits into 32 bits.
_WIDEST = 2**30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_align: str = "top_left",
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention with memory linear in the sequence length.

    For every query i and the keys j that it sees::

        s[i, j] = cap(scale * sum_d q[i, d] * k[j, d]) + bias[i, j]
        lse[i]  = log(exp(sink) + sum_j exp(s[i, j]))
        out[i]  = sum_j exp(s[i, j] - lse[i]) * v[j]

    where ``cap(x) = c * tanh(x / c)`` with ``c = logits_soft_cap``, and the cap, the
    bias and the sink are there if they are given. Query i sees key j where all of these
    hold that are asked for, with ``p = i``, or under ``causal_align="bottom_right"``
    ``p = i + S - T``::

        is_causal              j <= p
        local_window_size      p - left <= j <= p + right
        query_seq_lengths      i < query_seq_length
        key_value_seq_lengths  j < key_value_seq_length
        segment ids            q_segment_ids[i] == kv_segment_ids[j]
        mask                   mask[i, j]

    The softmax is computed in float32; probabilities are rounded to the dtype of the
    inputs before they multiply ``v``. A query that sees no key has ``out = 0``, zero
    gradients of q, k and v, and ``lse = -inf`` or, with a sink, ``lse = sink``.

    The TK kernel runs on NVIDIA Hopper GPUs for bfloat16 and float16 with head dims D
    and Dv that are multiples of 8 up to 256, and takes all of these; blocks that are
    masked as a whole are skipped. Everything else, and every other platform, runs an
    XLA implementation of the same maths, also in linear memory. Where a GPU runs that
    although nobody asked for it, a :class:`tk_jax.FallbackWarning` says why, once per
    reason; :func:`tk_jax.explain` tells beforehand.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``shard_map``, ``jax.checkpoint``
    (residuals are named ``tk_attention_out`` and ``tk_attention_lse``, see
    :mod:`tk_jax.checkpoint_policies`) and ``jax.export``. There, every size but D may
    be symbolic; such a call runs the XLA implementation, as the kernels' limits cannot
    be checked. On a mesh with explicit axes results are split as ``q`` is, with ``Dv``
    whole. Forward mode and derivatives of higher order need ``implementation="xla"``.
    ``q``, ``k``, ``v``, ``bias`` and ``sinks`` have gradients, summed over the axes
    that they are broadcast along.

    Args:
      q: Queries ``[..., T, H, D]``, with any number of leading batch dimensions; in
        bfloat16, float16, float32 or float64.
      k: Keys ``[..., S, K, D]``, where K divides H: query head h reads key head
        ``h // (H // K)`` (grouped-query attention; multi-query with K = 1).
      v: Values ``[..., S, K, Dv]``.
      scale: Multiplies the scores; ``1 / sqrt(D)`` by default. A static number.
      is_causal: Query i sees only the keys up to its own position p.
      causal_align: Where positions start, for the causal mask and for the window:
        ``"top_left"`` for ``p = i``, as ``jax.nn.dot_product_attention`` has it;
        ``"bottom_right"`` for ``p = i + S - T``, where the last query is at the last
        key. In that, lengths take the place of S and T where they are given: the last
        query within its length is at the last key within its.
      local_window_size: Query i sees only the keys that are at most ``left`` before and
        ``right`` after its position: ``(left, right)``, or one number for both. With
        ``is_causal``, none after it.
      query_seq_lengths: int32, broadcast to ``[...]``: queries from this one on are
        padding, and see no key.
      key_value_seq_lengths: int32, broadcast to ``[...]``: keys from this one on are
        padding, and are not seen. Lengths beyond T or S mean T or S.
      q_segment_ids: int32, broadcast to ``[..., T]``: the document that each query of a
        packed row belongs to. Any numbers, in any order.
      kv_segment_ids: int32, broadcast to ``[..., S]``: the same for keys. May be left
        out where T = S, and is then ``q_segment_ids``.
      mask: Bool, broadcast to ``[..., H, T, S]``: True where a query may see a key.
      bias: Floating, broadcast to ``[..., H, T, S]``: added to the capped scores.
      logits_soft_cap: Bounds the scores, before the bias is added. A static number from
        1e-30 to 1e30.
      sinks: Floating, broadcast to ``[..., H]``: the score of one more key, whose value
        is zero, that every query of the head sees. Neither scaled nor capped.
      return_lse: Returns ``(out, lse)``. Both are differentiable.
      deterministic: The gradient of ``q`` is summed in a fixed order, so that equal
        inputs give equal bits. Without it, the backward pass may be quicker. Everything
        else is always deterministic.
      implementation: ``None`` chooses as described; ``"tk"`` runs the kernel or raises;
        ``"xla"`` runs the XLA implementation everywhere;
        ``"interpret"`` runs and checks the kernel's own source on the CPU, slowly (see
        :func:`tk_jax.interpret_options`).

    Arrays are broadcast as NumPy does, axes missing on the left; T and S of segment ids
    and H of sinks are not. What is broadcast is not copied.

    Returns:
      ``out [..., T, H, Dv]`` in the dtype of the inputs; with ``return_lse`` also
      ``lse [..., T, H]``, a natural logarithm in float32 (float64 for float64 inputs).

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, T, S, H, K, D or Dv is zero (a
        batch may be), T or S is 2**31 or more, D is symbolic, or a setting has an
        unknown value.
      NotImplementedError: ``implementation="tk"`` and the kernel lacks something, such
        as a GPU, the dtype, the head dim, an argument, or room for the sizes: B and H
        up to 65535, and B * H * T and B * K * S (with T rounded up to 128) below 2**31.

    The kernels follow Dao, "FlashAttention-2" (2023), section 3, and Shah et al.,
    "FlashAttention-3" (2024), sections 3.1 and 3.2. Capped scores are those of Gemma 2
    (Gemma Team, 2024, section 2), with the cap before the bias as in FlashAttention;
    sinks are those of gpt-oss (OpenAI, 2025), after Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks" (2023), section 3.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q = jax.random.normal(jax.random.key(0), (2, 128, 8, 64), jnp.bfloat16)
    >>> k = v = jax.random.normal(jax.random.key(1), (2, 128, 2, 64), jnp.bfloat16)
    >>> out, lse = tk_jax.attention(q, k, v, is_causal=True, return_lse=True)
    >>> out.shape, lse.shape, lse.dtype.name
    ((2, 128, 8, 64), (2, 128, 8), 'float32')
    >>> bool((out[:, 0] == jnp.repeat(v[:, 0], 4, axis=1)).all())  # sees one key
    True

    Two documents of 100 and 28 tokens in a row; the first token of the second sees
    itself alone:

    >>> documents = jnp.repeat(jnp.arange(2), jnp.array([100, 28]))
    >>> out = tk_jax.attention(
    ...     q, k, v, is_causal=True, q_segment_ids=documents, implementation="xla"
    ... )
    >>> bool((out[:, 100] == jnp.repeat(v[:, 100], 4, axis=1)).all())
    True
    """
    q = _check.check_array("attention", "q", q)
    k = _check.check_array("attention", "k", k)
    v = _check.check_array("attention", "v", v)
    extras = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "mask": mask,
        "bias": bias,
        "sinks": sinks,
    }
    for name, x in extras.items():
        if x is not None:
            extras[name] = _check.check_array("attention", name, x)
    call = _plan(
        q,
        k,
        v,
        **extras,
        scale=scale,
        is_causal=is_causal,
        causal_align=causal_align,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
        deterministic=deterministic,
        implementation=implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    extras = _normalise(config.Extras(**extras), q.shape, k.shape)
    return _attention(call, q, k, v, extras)


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=0)
def _attention(call, q, k, v, extras):
    with jax.named_scope("tk_jax.attention"):
        # [..., T, H] of out and lse, with the head dim whole.
        rows = _dispatch.explicit_spec(q)[:-1]
        specs = (P(*rows, None), P(*rows)) if call.return_lse else P(*rows, None)
        run = functools.partial(_run, call)
        return _dispatch.run_without_explicit_axes(run, specs, q, k, v, extras)


def _run(call, q, k, v, extras):
    q, k, v, extras = _dispatch.vary_together_in((q, k, v, extras))
    if call.choice.cuda == "xla":
        out, lse, _ = xla.attention(call.options, q, k, v, extras)
        return (out, lse) if call.return_lse else out
    if call.options.scale < _FLOAT32.tiny:
        call, q = _with_positive_scale(call, q)
    return vjp.attention(call, q, k, v, extras)


def _with_positive_scale(call: vjp.Call, q):
    """The same scores: the kernels find the largest score before they scale it."""
    scale, q = -call.options.scale, -q
    if scale < _FLOAT32.tiny:  # what is smaller may count as zero
        scale, q = 1.0, 0 * q
    options = dataclasses.replace(call.options, scale=scale)
    return dataclasses.replace(call, options=options), q


def _normalise(extras: config.Extras, q_shape, k_shape) -> config.Extras:
    """The ranks, dtypes and ranges that implementations rely on."""
    batch_rank = len(q_shape) - 3
    ranks = config.Extras(0, 0, 1, 1, 3, 3, 1)
    extras = config.Extras(
        *(
            x if x is None else x.reshape((1,) * (batch_rank + rank - x.ndim) + x.shape)
            for x, rank in zip(extras, ranks, strict=True)
        )
    )
    for name, size in (
        ("query_seq_lengths", q_shape[-3]),
        ("key_value_seq_lengths", k_shape[-3]),
    ):
        lengths = getattr(extras, name)
        if lengths is not None:
            extras = extras._replace(**{name: jnp.clip(lengths, 0, size)})
    if extras.kv_segment_ids is None:
        extras = extras._replace(kv_segment_ids=extras.q_segment_ids)
    return extras


@_dispatch.explains(attention)
def _explain(*args, **kwargs) -> _dispatch.Choice:
    arguments = _SIGNATURE.bind(*args, **kwargs)
    arguments.apply_defaults()
    given = arguments.arguments
    for name, value in given.items():
        required = name in ("q", "k", "v")
        if required or (name in config.Extras._fields and value is not None):
            given[name] = _check.check_shaped("attention", name, value)
    return _plan(**given).choice


_SIGNATURE = inspect.signature(attention)


def _plan(
    q,
    k,
    v,
    *,
    scale,
    is_causal,
    causal_align,
    local_window_size,
    logits_soft_cap,
    return_lse,
    deterministic,
    implementation,
    **extras,
) -> vjp.Call:
    """Checks everything but that arrays are arrays, for which shapes can stand."""
    _check_inputs(q, k, v)
    extras = config.Extras(**extras)
    _check_extras(extras, q.shape, k.shape)
    _check.check_choice(
        "attention", "causal_align", causal_align, ("top_left", "bottom_right")
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    left, right = _check_window(local_window_size, q.shape[-3] + k.shape[-3])
    options = config.AttentionOptions(
        scale=_check.check_number_in_sums("attention", "scale", scale, q.dtype),
        is_causal=_check.check_flag("attention", "is_causal", is_causal),
        bottom_right=causal_align == "bottom_right",
        deterministic=_check.check_flag("attention", "deterministic", deterministic),
        window_left=left,
        window_right=right,
        soft_cap=_check_soft_cap(logits_soft_cap),
    )
    unsupported = config.unsupported(options, q, k, v, extras)
    choice = _dispatch.choose(
        "attention", implementation, unsupported, empty=0 in q.shape[:-3]
    )
    return vjp.Call(
        options=options,
        choice=choice,
        return_lse=_check.check_flag("attention", "return_lse", return_lse),
    )


def _check_inputs(q, k, v) -> None:
    _check.check_min_rank("attention", "q", q.shape, "T, H, D")
    *batch, _, num_heads, head_dim = q.shape
    q_text = f"q {_check.shape_text(q.shape)}"
    expected = (*batch, "S", "K", head_dim)
    _check.check_shape("attention", "k", k.shape, expected, q_text)
    k_text = f"k {_check.shape_text(k.shape)}"
    _check.check_shape("attention", "v", v.shape, (*k.shape[:-1], "Dv"), k_text)

    for name, x, axes in (
        ("q", q, ("T", "H", "D")),
        ("k", k, ("S", "K", "D")),
        ("v", v, ("S", "K", "Dv")),
    ):
        for axis, size in zip(axes, x.shape[-3:], strict=True):
            if size == 0:
                raise ValueError(
                    f"attention: {name} has shape {_check.shape_text(x.shape)}; "
                    f"expected {axis} to be at least 1"
                )
        if config.symbolic_size(x.shape[-1]) and axes[-1] == "D":
            raise ValueError(
                f"attention: {name} has shape {_check.shape_text(x.shape)}; "
                "expected a number for D"
            )
        if config.symbolic_size(x.shape[-3]):
            continue
        if x.shape[-3] > _check.INT32_MAX:
            raise ValueError(
                f"attention: {name} has shape {_check.shape_text(x.shape)}; "
                "expected fewer than 2**31 rows"
            )
    num_kv_heads = k.shape[-2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"attention: k has {num_kv_heads} heads (K); "
            f"expected a divisor of the {num_heads} heads (H) of q"
        )
    if jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(
            f"attention: q has dtype {jnp.dtype(q.dtype).name}; "
            f"expected one of {', '.join(_DTYPES)}"
        )
    _check.check_same_dtype("attention", "k", k.dtype, "q", q.dtype)
    _check.check_same_dtype("attention", "v", v.dtype, "q", q.dtype)


def _check_extras(extras: config.Extras, q_shape, k_shape) -> None:
    *batch, seqlen_q, num_heads, _ = q_shape
    seqlen_kv = k_shape[-3]
    scores = (*batch, num_heads, seqlen_q, seqlen_kv)
    # The shape to broadcast to, how many of its last axes are not broadcast, the dtype.
    expected = config.Extras(
        query_seq_lengths=((*batch,), 0, jnp.int32),
        key_value_seq_lengths=((*batch,), 0, jnp.int32),
        q_segment_ids=((*batch, seqlen_q), 1, jnp.int32),
        kv_segment_ids=((*batch, seqlen_kv), 1, jnp.int32),
        mask=(scores, 0, jnp.bool_),
        bias=(scores, 0, jnp.floating),
        sinks=((*batch, num_heads), 1, jnp.floating),
    )
    for name, x in extras._asdict().items():
        if x is None:
            continue
        shape, num_exact, dtype = getattr(expected, name)
        _check.check_broadcasts("attention", name, x.shape, shape, num_exact)
        if dtype == jnp.floating:
            _check.check_floating("attention", name, x.dtype)
        else:
            _check.check_dtype("attention", name, x.dtype, dtype)
    if extras.kv_segment_ids is not None and extras.q_segment_ids is None:
        raise ValueError(
            "attention: kv_segment_ids is given and q_segment_ids is not; expected both"
        )
    only_q = extras.q_segment_ids is not None and extras.kv_segment_ids is None
    if only_q and seqlen_q != seqlen_kv:
        raise ValueError(
            "attention: q_segment_ids is given and kv_segment_ids is not; "
            f"expected both, as T is {seqlen_q} and S is {seqlen_kv}"
        )


def _check_window(window, largest: int) -> tuple[int, int]:
    """(left, right), no wider than what already hides nothing."""
    if window is None:
        return config.NO_WINDOW, config.NO_WINDOW
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2 or not all(_is_integer(side) for side in sides):
        raise TypeError(
            f"attention: local_window_size is {window!r}; "
            "expected an int or a tuple of two, (left, right)"
        )
    if min(sides) < 0:
        raise ValueError(
            f"attention: local_window_size is {window!r}; expected no negative number"
        )
    if config.symbolic_size(largest):
        largest = _WIDEST
    left, right = (min(int(side), largest) for side in sides)
    return left, right


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_soft_cap(soft_cap) -> float:
    if soft_cap is None:
        return config.NO_SOFT_CAP
    soft_cap = _check.check_finite_number("attention", "logits_soft_cap", soft_cap)
    if soft_cap <= 0:
        raise ValueError(
            f"attention: logits_soft_cap is {soft_cap!r}; expected a positive number"
        )
    low, high = _SOFT_CAPS
    if not low <= soft_cap <= high:
        raise ValueError(
            f"attention: logits_soft_cap is {soft_cap!r}; "
            f"expected a number from {low} to {high}"
        )
    return soft_cap
