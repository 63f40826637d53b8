"""matmul on meshes with explicit axes, which are those that jax.make_mesh makes.

There, types say how arrays are split.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matmul_cases import TRANSPOSES, operands, product, transposes_id

SIZES = (16, 24, 8)
# How op(a) [.., M, K], op(b) [.., K, N] and c are split; with a third axis, in batches.
SPLITS = [
    (P(None, None), P(None, None), P(None, None)),
    (P("x", None), P(None, "y"), P("x", "y")),
    (P("x", "y"), P(None, None), P("x", None)),
    (P("x", "y"), P("y", None), P("x", None)),
    (P("x", None), P("x", "y"), P("x", "y")),
    (P("x", None, None), P(None, "y"), P("x", None, "y")),
    (P("x", "y", None), P(None, None, None), P("x", "y", None)),
    (P("x", None, None), P("x", None, "y"), P("x", None, "y")),
]


@pytest.fixture
def mesh(cpu_devices):
    return jax.make_mesh(
        (2, 2), ("x", "y"), (AxisType.Explicit,) * 2, devices=cpu_devices[:4]
    )


def _stored(spec, transpose):
    return P(*spec[:-2], spec[-1], spec[-2]) if transpose else spec


def _derived(run):
    """A number that depends on run's result, that result, gradients."""

    def loss(*operands):
        c = run(*operands)
        return jnp.sum(jnp.sin(c.astype(jnp.float32))), c

    def call(*operands):
        argnums = tuple(range(len(operands)))
        return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*operands)

    return call


def _split(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def _spec(x):
    return jax.typeof(x).sharding.spec


def _assert_close(got, expected):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("in_context", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_values_and_gradients(
    rng, splits, transposes, implementation, in_context, mesh
):
    batches = [(4,) * (len(spec) - 2) for spec in splits[:2]]
    arrays = operands(rng, transposes, batches, sizes=SIZES)
    specs = [_stored(spec, t) for spec, t in zip(splits[:2], transposes, strict=True)]
    run = _derived(product(transposes, implementation))
    expected = run(*arrays)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = run(*(_split(mesh, x, s) for x, s in zip(arrays, specs, strict=True)))
    (_, c), gradients = got
    assert _spec(c) == splits[2]
    assert [_spec(x) for x in gradients] == specs
    _assert_close(got, expected)


def test_operands_that_nobody_has_put_on_the_mesh(rng, mesh):
    a, b = operands(rng, (False, False), sizes=SIZES)
    run = _derived(product((False, False)))
    expected = run(a, b)
    with jax.set_mesh(mesh):
        _assert_close(run(a, b), expected)
    got = run(_split(mesh, a, P("x", None)), b)
    assert _spec(got[0][1]) == P("x", None)
    _assert_close(got, expected)


@pytest.mark.parametrize("spec", [P(None, None), P(None, "x")], ids=str)
def test_a_matrix_times_itself(rng, spec, mesh):
    a, _ = operands(rng, (False, True), sizes=SIZES)
    run = _derived(lambda a: product((False, True))(a, a))
    got = run(_split(mesh, a, spec))
    assert _spec(got[0][1]) == P(None, None)
    assert _spec(got[1][0]) == spec
    _assert_close(got, run(a))


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ((P(None, "x"), P(None, None, "x")), "mesh axis 'x' would split two"),
        ((P("x"), P(None, None, ("y", "x"))), "mesh axis 'x' would split two"),
        ((P("x"), P("y")), r"mesh axes \['y'\] .* of a, \['x'\]"),
    ],
    ids=str,
)
def test_splits_that_disagree(rng, splits, words, mesh):
    arrays = operands(rng, (False, False), ((4,), (4,)), sizes=SIZES)
    given = [_split(mesh, x, spec) for x, spec in zip(arrays, splits, strict=True)]
    with pytest.raises(ValueError, match=words):
        product((False, False))(*given)
