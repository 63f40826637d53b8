"""``tk_jax.matmul``: checks, choice of implementation, folding of batches."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tk_jax import _check, _dispatch
from tk_jax.ops.matmul import layout, vjp
from tk_jax.ops.matmul.config import MatmulOptions

_KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)


def matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies matrices: ``c = op(a) @ op(b)``, ``op`` a transposition or nothing.

    The sums are kept in float32 and rounded once to the dtype of the inputs. The kernel
    takes bfloat16 and float16; other dtypes run through XLA. Equal inputs give equal
    bits.

    Leading dimensions are a batch and broadcast as in ``jnp.matmul``. An operand
    without batch dimensions, or with ones only, is shared by the whole batch without a
    copy, and its gradient is summed in float32. An operand that has some of the batch
    dimensions and lacks others is expanded in memory, except ``b`` where the dimensions
    it lacks are the last ones and ``a`` is not transposed.

    Rows are read in units of 16 bytes. Where the last dimension of ``a``, ``b`` or
    ``c`` is not a multiple of 8, XLA pads the operands concerned with zeros and slices
    the result: right, but a copy each. Transposed operands are read as they are stored.

    Reverse-mode differentiation, ``vmap`` and ``shard_map`` work with every
    implementation; forward mode and higher orders need ``implementation="xla"``. On a
    mesh with explicit axes M is split as in ``a``, N as in ``b`` and leading dimensions
    as in either; K may be split too.

    Args:
      a: ``[..., M, K]``, or ``[..., K, M]`` with ``transpose_a``.
      b: ``[..., K, N]``, or ``[..., N, K]`` with ``transpose_b``; the dtype of ``a``.
      transpose_a: ``a`` is stored transposed.
      transpose_b: ``b`` is stored transposed.
      implementation: ``None`` for the TK kernel on an NVIDIA Hopper GPU where it
        supports the call and XLA otherwise; ``"tk"`` for the kernel or an error;
        ``"xla"`` for XLA; ``"interpret"`` to run and check the kernel's own source on
        the CPU, slowly (see :func:`tk_jax.interpret_options`).

    Returns:
      ``c``, ``[..., M, N]``, in the dtype of the inputs.

    Raises:
      TypeError: an operand is not an array, or a setting is not static.
      ValueError: shapes or dtypes do not fit each other, a dimension is empty, or
        an explicit mesh axis would split two dimensions of the result.
      NotImplementedError: ``implementation="tk"`` and the kernel lacks something.

    >>> import jax.numpy as jnp, tk_jax
    >>> x = jnp.ones((2, 16, 64), jnp.bfloat16)
    >>> w = jnp.full((32, 64), 0.5, jnp.bfloat16)
    >>> y = tk_jax.matmul(x, w, transpose_b=True)
    >>> y.shape, float(y[0, 0, 0])
    ((2, 16, 32), 32.0)
    """
    a = _check.check_array("matmul", "a", a)
    b = _check.check_array("matmul", "b", b)
    options, choice = _plan(a, b, transpose_a, transpose_b, implementation)
    _dispatch.warn_of_fallback(choice)
    return _matmul(options, choice, *_dispatch.vary_together(a, b))


# One jit for eager callers too: they compile once, and for the device of their arrays.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _matmul(options, choice, a, b):
    with jax.named_scope("tk_jax.matmul"):
        run = functools.partial(_run, options, choice)
        spec = _result_spec(a, b, options)
        return _dispatch.run_without_explicit_axes(run, spec, a, b)


def _run(options, choice, a, b):
    if choice.cuda == "xla":
        return vjp.xla_matmul(a, b, options)
    a, b, shape = layout.fold_batch(a, b, options)
    return vjp.folded_matmul(a, b, options, choice).reshape(shape)


def _result_spec(a, b, options: MatmulOptions) -> P:
    """How c is split along explicit mesh axes: as M of a, N of b, the batch of both."""
    *a_batch, a_first, a_last = _dispatch.explicit_spec(a)
    *b_batch, b_first, b_last = _dispatch.explicit_spec(b)
    rows = a_last if options.transpose_a else a_first
    columns = b_first if options.transpose_b else b_last
    rank = max(len(a_batch), len(b_batch))
    batch = []
    for x, y in zip(
        [None] * (rank - len(a_batch)) + a_batch,
        [None] * (rank - len(b_batch)) + b_batch,
        strict=True,
    ):
        batch.append(x if y is None else y)
        if None not in (x, y) and x != y:
            raise ValueError(
                f"matmul: b is split along mesh axes {b_batch} of its leading "
                f"dimensions; expected those of a, {a_batch}, or none"
            )
    spec = (*batch, rows, columns)
    names = [
        name
        for names in spec
        if names is not None
        for name in (names if isinstance(names, tuple) else (names,))
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"matmul: mesh axis {name!r} would split two dimensions of the result, "
                f"{P(*spec)}; expected rows of a, columns of b and leading dimensions "
                "to be split along different axes (see jax.sharding.reshard)"
            )
    return P(*spec)


@_dispatch.explains(matmul)
def _explain(a, b, *, transpose_a=False, transpose_b=False, implementation=None):
    return _plan(a, b, transpose_a, transpose_b, implementation)[1]


def _plan(
    a, b, transpose_a, transpose_b, implementation
) -> tuple[MatmulOptions, _dispatch.Choice]:
    """Checks everything but that a and b are arrays, which shapes can stand for."""
    options = MatmulOptions(
        _check.check_flag("matmul", "transpose_a", transpose_a),
        _check.check_flag("matmul", "transpose_b", transpose_b),
    )
    _check_operands(a, b, options)
    choice = _dispatch.choose("matmul", implementation, _unsupported(a, b, options))
    return options, choice


def _check_operands(a, b, options: MatmulOptions) -> None:
    a_axes = "K, M" if options.transpose_a else "M, K"
    b_axes = "N, K" if options.transpose_b else "K, N"
    _check.check_min_rank("matmul", "a", a.shape, a_axes)
    _check.check_min_rank("matmul", "b", b.shape, b_axes)
    for name, operand in (("a", a), ("b", b)):
        if 0 in operand.shape:
            raise ValueError(
                f"matmul: {name} has shape {_check.shape_text(operand.shape)}; "
                "expected every dimension to be at least 1"
            )
    _, _, k = layout.sizes(a.shape, b.shape, options)
    matrix = ("N", k) if options.transpose_b else (k, "N")
    stored = ", stored transposed" if options.transpose_a else ""
    a_text = f"a {_check.shape_text(a.shape)}{stored}"
    _check.check_shape("matmul", "b", b.shape, (*b.shape[:-2], *matrix), a_text)
    try:
        layout.broadcast_batch(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"matmul: b has shape {_check.shape_text(b.shape)}; expected leading "
            f"dimensions that broadcast with those of {a_text}"
        ) from None
    _check.check_same_dtype("matmul", "b", b.dtype, "a", a.dtype)


def _unsupported(a, b, options: MatmulOptions) -> str | None:
    """What the kernel lacks for these operands."""
    if a.dtype not in _KERNEL_DTYPES:
        return f"dtype {a.dtype.name} (it takes bfloat16 and float16)"
    batch = math.prod(layout.broadcast_batch(a.shape, b.shape))
    m, n, k = layout.sizes(a.shape, b.shape, options)
    for name, size in (("M", m), ("N", n), ("K", k), ("a batch", batch)):
        if size > layout.MAX_SIZE:
            return f"{name} of {size} (it takes up to {layout.MAX_SIZE})"
    return None
