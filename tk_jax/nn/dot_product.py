"""``jax.nn.dot_product_attention``'s signature and semantics."""

from __future__ import annotations

import inspect
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import dot_product_attention as _jax_dot_product_attention
from jax.typing import ArrayLike

from tk_jax import _dispatch
from tk_jax.ops._chunks import sum_dtype
from tk_jax.ops.attention import attention


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn", "tk", "interpret"] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``jax.nn.dot_product_attention`` in memory linear in the sequence length.

    ``softmax(scale * query key^T + bias) value`` over the keys that a query sees, with
    the signature, shapes and meanings of ``jax.nn.dot_product_attention`` in jax 0.10
    to 0.12, so that changing one import changes a program. Shapes are in jax's letters:
    B batch, T queries, S keys, N heads, K key and value heads, H head dim.

    Where jax's documentation is silent, results differ from its XLA implementation:

    * A query that sees no key has the result 0 and the residual -inf. There, the result
      is the mean of all values. Queries beyond ``query_seq_lengths`` have the result 0
      in both, and here the residual -inf.
    * The softmax of float64 inputs is computed in float64, there in float32.

    ``local_window_size`` means what jax's documentation says, with and without
    ``is_causal``.

    Args:
      query: ``(B, T, N, H)`` or ``(T, N, H)``.
      key: ``(B, S, K, H)`` or ``(S, K, H)``, where K divides N.
      value: As ``key``; its head dim may be another.
      bias: Added to the logits; broadcast to ``(B, N, T, S)`` or ``(N, T, S)``.
      mask: Bool: True where a query may see a key; broadcast as ``bias`` is.
      scale: Multiplies the logits; ``1 / sqrt(H)`` by default. A Python or NumPy number
        is the kernels' setting. A jax array, such as a learned temperature, may be
        traced and has a gradient: query is multiplied by ``scale * sqrt(H)`` in float32
        and rounded to its dtype, once more than with a number.
      is_causal: Query i sees only the keys j <= i.
      query_seq_lengths: int32 ``(B,)``: queries from this one on have the result 0.
      key_value_seq_lengths: int32 ``(B,)``: keys from this one on are not seen.
      local_window_size: ``(left, right)``: query i sees only the keys from i - left to
        i + right; one number stands for both.
      implementation: As for :func:`tk_jax.attention`: ``None`` runs the TK kernel where
        it supports the call and XLA elsewhere, ``"tk"`` the kernel or raises, ``"xla"``
        our XLA implementation, ``"interpret"`` the interpreter. ``"cudnn"`` passes the
        call on to jax's cuDNN implementation, with what that supports.
      return_residual: Returns ``(out, lse)``, with the log-sum-exp of the logits of
        shape ``(B, T, N)`` or ``(T, N)``, in the dtype of ``key`` and without a
        gradient as jax has it. That of :func:`tk_jax.attention` is in float32 and
        differentiable.

    Returns:
      ``(B, T, N, H)`` or ``(T, N, H)``, as ``query``.

    Raises:
      TypeError, ValueError, NotImplementedError: as :func:`tk_jax.attention`, which
        calls query, key and value ``q``, ``k`` and ``v``.

    >>> import jax, jax.numpy as jnp
    >>> from tk_jax.nn import dot_product_attention
    >>> query = jax.random.normal(jax.random.key(0), (128, 8, 64))
    >>> key = value = jax.random.normal(jax.random.key(1), (128, 2, 64))
    >>> settings = {"is_causal": True, "local_window_size": (16, 0)}
    >>> ours, theirs = (
    ...     f(query, key, value, **settings)
    ...     for f in (dot_product_attention, jax.nn.dot_product_attention)
    ... )
    >>> bool(jnp.allclose(ours, theirs, atol=1e-5))
    True
    """
    is_causal, return_residual = _flag(is_causal), _flag(return_residual)
    local_window_size = _window(local_window_size)
    settings = {
        "scale": scale,
        "is_causal": is_causal,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "implementation": implementation,
        "return_residual": return_residual,
    }
    if implementation == "cudnn":
        if not is_causal and _hides_the_future(local_window_size):
            # The same keys, asked for in the way that cuDNN is told about them: without
            # the causal mask, jax's cuDNN path lets queries see later keys.
            settings["is_causal"] = True
        return _jax_dot_product_attention(query, key, value, bias, mask, **settings)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    result = attention(**_arguments(query, key, value, bias, mask, **settings))
    if query.ndim == 3:
        result = jax.tree.map(lambda x: x[0], result)
    if not return_residual:
        return result
    out, lse = result
    return out, jax.lax.stop_gradient(lse.astype(key.dtype))


def _arguments(
    query, key, value, bias, mask, *, scale, return_residual, **others
) -> dict:
    """The same call of :func:`tk_jax.attention`."""
    query, scale = _fold_scale(query, scale)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        others[name] = _array(others[name])
    return {
        "q": _with_batch(query),
        "k": _with_batch(key),
        "v": _with_batch(value),
        "scale": scale,
        "mask": _array(mask),
        "bias": floating(_array(bias)),
        "return_lse": return_residual,
        **others,
    }


@_dispatch.explains(dot_product_attention)
def _explain(*args, **kwargs) -> _dispatch.Choice:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["implementation"] == "cudnn":
        raise ValueError(
            "explain: implementation is 'cudnn', which is jax's; expected one of ours"
        )
    for name in ("is_causal", "return_residual"):
        given[name] = _flag(given[name])
    given["local_window_size"] = _window(given["local_window_size"])
    arrays = {
        name: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
        for name, x in given.items()
        if name in _ARRAYS and x is not None
    }
    if isinstance(given["scale"], jax.ShapeDtypeStruct | jax.Array):
        arrays["scale"] = given["scale"]

    # Under a trace, so that a shape can stand for an array.
    choices = []

    def trace(arrays):
        call = _arguments(**{**given, **arrays})
        choices.append(_dispatch.explain(attention, **call))

    jax.eval_shape(trace, arrays)
    return choices[0]


_SIGNATURE = inspect.signature(dot_product_attention)
_ARRAYS = (
    *("query", "key", "value", "bias", "mask"),
    *("query_seq_lengths", "key_value_seq_lengths"),
)


def _fold_scale(query, scale):
    """A scale that is a jax array becomes part of the query, which has a gradient.

    Beside the default scale, so that an array of that value changes no query of 16
    bits: one that is learned often starts there.
    """
    if isinstance(scale, jax.Array) or hasattr(scale, "__jax_array__"):
        scale = jnp.asarray(scale)
    is_number = isinstance(scale, jax.Array) and not scale.ndim
    real = is_number and any(
        jnp.issubdtype(scale.dtype, kind) for kind in (jnp.integer, jnp.floating)
    )
    if not real or not jnp.issubdtype(query.dtype, jnp.floating) or not query.ndim:
        return query, scale  # The checks of attention say what is wrong with it.
    dtype = sum_dtype(query.dtype)
    factor = scale.astype(dtype) * query.shape[-1] ** 0.5
    return (query.astype(dtype) * factor).astype(query.dtype), None


def _flag(value):
    """jax takes None, 0 and 1 for a flag, and arrays."""
    if value is None or isinstance(value, int):
        return bool(value)
    is_array = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return bool(value) if is_array and not value.ndim else value


def _window(window):
    """Numbers in place of the arrays that jax takes."""
    is_array = isinstance(window, np.ndarray | np.generic | jax.Array)
    if is_array and not isinstance(window, jax.core.Tracer):
        return window.tolist()
    return window


def _hides_the_future(window) -> bool:
    return window == 0 or (isinstance(window, tuple | list) and window[-1] == 0)


def _with_batch(x):
    return x[None] if x.ndim == 3 else x


def _array(x):
    return None if x is None else jnp.asarray(x)


def floating(bias):
    """jax and flax add a bias of any dtype."""
    if bias is None or jnp.issubdtype(bias.dtype, jnp.floating):
        return bias
    return bias.astype(jnp.float32)
