"""The kernel's calling code, run on the CPU against a stand-in that keeps its contract.

What is tested is all that happens around the kernel: folding and sharing batches,
padding, batching rules, gradients. The kernel's own numbers are test_matmul_gpu.py's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import BATCHES, TRANSPOSES, definition, operands, transposes_id

from tk_jax.ops.matmul import vjp
from tk_jax.ops.matmul.config import MatmulOptions


@pytest.fixture
def kernel_calls(monkeypatch):
    """Puts the stand-in in the kernel's place; the list of its operands' shapes."""
    calls = []

    def stand_in(target, out_types, a, b, *, options, config):
        assert target == "tk_matmul_v1"
        (out_type,) = out_types
        assert a.ndim == b.ndim == out_type.ndim == 3
        for shape in (a.shape, b.shape, out_type.shape):
            assert shape[-1] % 8 == 0, f"rows of {shape} are not multiples of 16 bytes"
        batch = out_type.shape[0]
        assert {a.shape[0], b.shape[0]} <= {1, batch}
        calls.append((a.shape, b.shape))
        c = vjp.xla_matmul(a, b, options)
        assert c.shape == out_type.shape
        assert c.dtype == out_type.dtype
        return (c,)

    monkeypatch.setattr(vjp._ffi, "call", stand_in)
    monkeypatch.setattr(
        vjp._dispatch, "run_chosen", lambda choice, a, b, *, tk, xla: tk(a, b)
    )
    return calls


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_values(rng, kernel_calls, transposes, batches):
    a, b = operands(rng, transposes, batches)
    result = vjp.kernel_matmul(a, b, MatmulOptions(*transposes))
    expected = definition(a, b, transposes)
    assert len(kernel_calls) == 1
    assert result.shape == expected.shape
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", [(1, 1), (1, 3), (3, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(5, 9, 7), (2, 33, 40)], ids=str)
def test_gradients(rng, kernel_calls, transposes, batches, sizes):
    leading = [(batch,) for batch in batches]
    a, b = operands(rng, transposes, leading, sizes, jnp.float32)
    options = MatmulOptions(*transposes)
    result, pull_back = jax.vjp(
        lambda a, b: vjp.folded_matmul(a, b, options, None), a, b
    )
    dc = jnp.asarray(rng.standard_normal(result.shape), jnp.float32)
    expected = jax.vjp(functools.partial(vjp.xla_matmul, options=options), a, b)[1](dc)
    for ours, want in zip(pull_back(dc), expected, strict=True):
        assert ours.shape == want.shape
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)
    assert len(kernel_calls) == 3


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", [((), ()), ((4,), ()), ((), (4,)), ((4,), (4,))])
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap(rng, kernel_calls, transposes, batches, in_axes):
    axes = [() if axis is None else (3,) for axis in in_axes]
    a, b = operands(
        rng, transposes, [axis + lead for axis, lead in zip(axes, batches, strict=True)]
    )
    run = functools.partial(vjp.kernel_matmul, options=MatmulOptions(*transposes))
    result = jax.vmap(run, in_axes)(a, b)
    expected = [definition(a_i, b_i, transposes) for a_i, b_i in _mapped(a, b, in_axes)]
    assert kernel_calls
    np.testing.assert_allclose(
        np.float64(result), np.stack(expected), rtol=2**-8, atol=1e-5
    )


def _mapped(a, b, in_axes):
    for i in range(3):
        yield (a if in_axes[0] is None else a[i], b if in_axes[1] is None else b[i])


def test_nested_vmap_folds_all_mapped_axes(rng, kernel_calls):
    a, b = operands(rng, (False, False), ((2, 3), (2,)))
    run = functools.partial(vjp.kernel_matmul, options=MatmulOptions())
    result = jax.vmap(jax.vmap(run, (0, None)))(a, b)
    expected = definition(a, b[:, None], (False, False))
    # Earlier calls traced the function before its batching rule took over.
    assert kernel_calls[-1] == ((2, 15, 8), (2, 8, 16))
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-5)


def test_a_shared_operand_is_not_copied(rng, kernel_calls):
    options = MatmulOptions(transpose_a=True)
    a, b = operands(rng, (True, False), ((), (6,)), (8, 16, 8))
    vjp.kernel_matmul(a, b, options)
    vjp.kernel_matmul(b, a, options)
    assert kernel_calls == [((1, 8, 8), (6, 8, 16)), ((6, 8, 16), (1, 8, 8))]


def test_gradient_of_a_shared_operand_takes_the_cheaper_way(rng, kernel_calls):
    """Copies small operands into one product, or sums small gradients."""
    options = MatmulOptions()

    def da(m, n, k):
        a, b = operands(rng, (False, False), ((1,), (4,)), (m, n, k))
        dc = jnp.zeros((4, m, n), a.dtype)
        kernel_calls.clear()
        jax.vjp(lambda a: vjp.folded_matmul(a, b, options, None), a)[1](dc)
        return kernel_calls[1]

    assert da(64, 8, 64) == ((1, 64, 32), (1, 64, 32))
    assert da(8, 64, 8) == ((4, 8, 64), (4, 8, 64))
