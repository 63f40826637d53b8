"""``tk_jax.attention``: checks, defaults, choice of implementation."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from tk_jax import _check, _dispatch
from tk_jax.ops.attention import config, vjp, xla

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_align: str = "top_left",
    return_lse: bool = False,
    deterministic: bool = True,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention with memory linear in the sequence length.

    For every query i and the keys j that it sees::

        s[i, j] = scale * sum_d q[i, d] * k[j, d]
        lse[i]  = log(sum_j exp(s[i, j]))
        out[i]  = sum_j exp(s[i, j] - lse[i]) * v[j]

    The softmax is computed in float32; probabilities are rounded to the dtype of the
    inputs before they multiply ``v``. A query that sees no key has ``out = 0``,
    ``lse = -inf`` and zero gradients.

    The TK kernel runs on NVIDIA Hopper GPUs for bfloat16 and float16 with a head dim of
    64 or 128. Everything else, and every other platform, runs an XLA implementation of
    the same maths, also in linear memory. Where a GPU runs that although nobody asked
    for it, a :class:`tk_jax.FallbackWarning` says why, once per reason;
    :func:`tk_jax.explain` tells beforehand.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``shard_map``, ``jax.checkpoint``
    (residuals are named ``tk_attention_out`` and ``tk_attention_lse``, see
    :mod:`tk_jax.checkpoint_policies`) and ``jax.export``. Forward mode and derivatives
    of higher order need ``implementation="xla"``.

    Args:
      q: Queries ``[..., T, H, D]``, with any number of leading batch dimensions; in
        bfloat16, float16, float32 or float64.
      k: Keys ``[..., S, K, D]``, where K divides H: query head h reads key head
        ``h // (H // K)`` (grouped-query attention; multi-query with K = 1).
      v: Values ``[..., S, K, D]``.
      scale: Multiplies the scores; ``1 / sqrt(D)`` by default. A static number.
      is_causal: Query i sees only the keys j <= i + offset.
      causal_align: ``"top_left"`` for offset 0, as ``jax.nn.dot_product_attention`` has
        it; ``"bottom_right"`` for offset S - T, where the last query sees all keys.
      return_lse: Returns ``(out, lse)``. Both are differentiable.
      deterministic: The gradient of ``q`` is summed in a fixed order, so that equal
        inputs give equal bits. Without it, the backward pass may be quicker. Everything
        else is always deterministic.
      implementation: ``None`` chooses as described; ``"tk"`` runs the kernel or raises;
        ``"xla"`` runs the XLA implementation everywhere;
        ``"interpret"`` runs and checks the kernel's own source on the CPU, slowly (see
        :func:`tk_jax.interpret_options`).

    Returns:
      ``out [..., T, H, D]`` in the dtype of the inputs; with ``return_lse`` also
      ``lse [..., T, H]``, a natural logarithm in float32 (float64 for float64 inputs).

    Raises:
      TypeError: an input is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, T, S, H, K or D is zero (a
        batch may be), T or S is 2**31 or more, or a setting has an unknown value.
      NotImplementedError: ``implementation="tk"`` and the kernel lacks something, such
        as a GPU, the dtype, the head dim, or room for the sizes: B and H up to 65535,
        and B * H * T and B * K * S (with T rounded up to 128) below 2**31.

    The kernels follow Dao, "FlashAttention-2" (2023), section 3, and Shah et al.,
    "FlashAttention-3" (2024), sections 3.1 and 3.2.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q = jax.random.normal(jax.random.key(0), (2, 128, 8, 64), jnp.bfloat16)
    >>> k = v = jax.random.normal(jax.random.key(1), (2, 128, 2, 64), jnp.bfloat16)
    >>> out, lse = tk_jax.attention(q, k, v, is_causal=True, return_lse=True)
    >>> out.shape, lse.shape, lse.dtype.name
    ((2, 128, 8, 64), (2, 128, 8), 'float32')
    >>> bool((out[:, 0] == jnp.repeat(v[:, 0], 4, axis=1)).all())  # sees one key
    True
    """
    q = _check.check_array("attention", "q", q)
    k = _check.check_array("attention", "k", k)
    v = _check.check_array("attention", "v", v)
    call = _plan(
        q,
        k,
        v,
        scale,
        is_causal,
        causal_align,
        return_lse,
        deterministic,
        implementation,
    )
    _dispatch.warn_of_fallback(call.choice)
    *batch, _, _, _ = q.shape
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
    results = _attention(call, *_dispatch.vary_together(q, k, v))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=0)
def _attention(call, q, k, v):
    with jax.named_scope("tk_jax.attention"):
        if call.choice.cuda == "xla" or q.size == 0:
            out, lse = xla.attention(call.options, q, k, v)
            return (out, lse) if call.return_lse else out
        if call.options.scale <= 0:
            call, q = _with_positive_scale(call, q)
        return vjp.attention(call, q, k, v)


def _with_positive_scale(call: vjp.Call, q):
    """The same scores: the kernels find the largest score before they scale it."""
    scale = call.options.scale
    options = dataclasses.replace(call.options, scale=-scale if scale else 1.0)
    return dataclasses.replace(call, options=options), -q if scale else 0 * q


@_dispatch.explains(attention)
def _explain(
    q,
    k,
    v,
    *,
    scale=None,
    is_causal=False,
    causal_align="top_left",
    return_lse=False,
    deterministic=True,
    implementation=None,
) -> _dispatch.Choice:
    return _plan(
        q,
        k,
        v,
        scale,
        is_causal,
        causal_align,
        return_lse,
        deterministic,
        implementation,
    ).choice


def _plan(
    q, k, v, scale, is_causal, causal_align, return_lse, deterministic, implementation
) -> vjp.Call:
    """Checks everything but that q, k and v are arrays, for which shapes can stand."""
    _check_inputs(q, k, v)
    _check.check_choice(
        "attention", "causal_align", causal_align, ("top_left", "bottom_right")
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    options = config.AttentionOptions(
        scale=_check.check_finite_number("attention", "scale", scale),
        is_causal=_check.check_flag("attention", "is_causal", is_causal),
        bottom_right=causal_align == "bottom_right",
        deterministic=_check.check_flag("attention", "deterministic", deterministic),
    )
    unsupported = config.unsupported(q.shape, k.shape, q.dtype)
    return vjp.Call(
        options=options,
        choice=_dispatch.choose("attention", implementation, unsupported),
        return_lse=_check.check_flag("attention", "return_lse", return_lse),
    )


def _check_inputs(q, k, v) -> None:
    _check.check_min_rank("attention", "q", q.shape, "T, H, D")
    *batch, _, num_heads, head_dim = q.shape
    q_text = f"q {_check.shape_text(q.shape)}"
    for name, x in (("k", k), ("v", v)):
        expected = (*batch, "S", "K", head_dim)
        _check.check_shape("attention", name, x.shape, expected, q_text)
    k_text = f"k {_check.shape_text(k.shape)}"
    _check.check_shape("attention", "v", v.shape, k.shape, k_text)

    for name, x, axes in (("q", q, "THD"), ("k", k, "SKD")):
        for axis, size in zip(axes, x.shape[-3:], strict=True):
            if size == 0:
                raise ValueError(
                    f"attention: {name} has shape {_check.shape_text(x.shape)}; "
                    f"expected {axis} to be at least 1"
                )
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
