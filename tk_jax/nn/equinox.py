"""An attention layer for Equinox, which this module needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import equinox as eqx
import jax

from tk_jax.ops.attention import attention


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """``equinox.nn.MultiheadAttention`` by :func:`tk_jax.attention`.

    Takes the same arguments and has the same parameters, so that a saved layer loads.
    It adds to the call the settings of :func:`tk_jax.attention`. A query that sees no
    key has the result 0 before the output projection.

    >>> import jax
    >>> from tk_jax.nn.equinox import MultiheadAttention
    >>> layer = MultiheadAttention(num_heads=4, query_size=32, key=jax.random.key(0))
    >>> x = jax.random.normal(jax.random.key(1), (16, 32))
    >>> layer(x, x, x, is_causal=True, local_window_size=(4, 0)).shape
    (16, 32)
    """

    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable | None = None,
        **settings,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Attention of one sequence; ``jax.vmap`` maps it over a batch.

        Args:
          query: ``[T, query_size]``.
          key_: ``[S, key_size]``.
          value: ``[S, value_size]``.
          mask: Bool ``[T, S]`` or ``[num_heads, T, S]``: True where a query may see a
            key.
          key: Taken, as there is no dropout.
          inference: Whether dropout is off, if not as the layer's ``dropout`` says.
          deterministic: Equinox's older name of ``inference``.
          process_heads: Maps the heads of query, key and value to others of the same
            shapes, such as rotated ones.
          **settings: Other arguments of :func:`tk_jax.attention`.

        Returns:
          ``[T, output_size]``; with ``return_lse`` also ``lse [T, num_heads]``.

        Raises:
          NotImplementedError: dropout is on: there are no weights to drop out.
          TypeError, ValueError: as :func:`tk_jax.attention`.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "MultiheadAttention: deterministic is deprecated, as in Equinox; use "
                "inference",
                stacklevel=2,
            )
        if inference is None:
            inference = self.dropout.inference
        if self.dropout.p > 0 and not inference:
            raise NotImplementedError(
                f"MultiheadAttention: dropout_p is {self.dropout.p!r}; expected 0, or "
                "inference: there are no weights to drop out"
            )
        heads = [
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in (
                (self.query_proj, query),
                (self.key_proj, key_),
                (self.value_proj, value),
            )
        ]
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = list(process_heads(*heads))
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"MultiheadAttention: process_heads returns the shapes "
                    f"{[x.shape for x in heads]}; expected {shapes}"
                )
        result = attention(*heads, mask=mask, **settings)
        out, *lse = result if isinstance(result, tuple) else (result,)
        out = jax.vmap(self.output_proj)(out.reshape(out.shape[0], -1))
        return (out, *lse) if lse else out
