"""Recurrent ops on meshes with explicit axes, which are those that jax.make_mesh makes.

There, types say how arrays are split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrent_cases import QUICK
from recurrent_ops import OPS, PER_TOKEN, SETTINGS, inputs

import tk_jax

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

IMPLEMENTATIONS = [None, "xla"]
TOKENS = (P(), P("batch"), P("batch", None, "heads"))

jit = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture
def mesh(cpu_devices):
    return jax.make_mesh(
        (2, 2), ("batch", "heads"), (AxisType.Explicit,) * 2, devices=cpu_devices[:4]
    )


def _inputs(op):
    """In bfloat16, of sizes that the kernels take; and settings."""
    arrays = inputs(op, dtype=jnp.bfloat16)
    settings = dict(SETTINGS[op])
    if op == "hedgehog_attention":
        rng = np.random.default_rng(5)
        for name, heads in (("q_map", 4), ("k_map", 2)):
            arrays[name] = jnp.asarray(rng.standard_normal((heads, 8, 64)), jnp.float32)
        settings["window"] = 64
    return arrays, settings


def _specs(op, arrays, tokens):
    """How ``tokens``, of arrays with tokens, splits all."""
    batch, _, heads = (*tokens, None, None, None)[:3]

    def spec(name):
        if name in PER_TOKEN[op]:
            return tokens
        return P(batch, heads) if name == "initial_state" else P(heads)

    return {name: spec(name) for name in arrays}


def _state_specs(op, tokens):
    """How the final state is split then, in its type's terms."""
    batch, _, heads = (*tokens, None, None, None)[:3]
    sums, normalizer = P(batch, heads, None, None), P(batch, heads, None)
    if op == "based_attention":
        return tk_jax.NormalizedState(sums, normalizer)
    if op == "hedgehog_attention":
        latest = P(batch, None, heads, None)
        return tk_jax.HedgehogState(sums, normalizer, latest, latest, P(batch))
    return sums


def _split(mesh, arrays, specs):
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)),
        specs,
        arrays,
        is_leaf=lambda x: isinstance(x, P),
    )


def _spec(x):
    return jax.typeof(x).sharding.spec


def _derived(op, settings):
    """A number that depends on all results of a call, those results, gradients."""

    def loss(arrays):
        results = op(**arrays, **settings)
        floating = [
            x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        total = sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in floating)
        return total, results

    # allow_int: the length of a state.
    return jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


def _assert_close(got, expected):
    def compare(x, y):
        if x.dtype != jax.dtypes.float0:
            x, y = (np.asarray(array, np.float32) for array in (x, y))
            np.testing.assert_allclose(x, y, atol=0.03, rtol=0.02)

    jax.tree.map(compare, got, expected)


def _assert_split_alike(got, given):
    jax.tree.map(lambda x, y: _assert_spec(x, _spec(y)), got, given)


def _assert_spec(x, spec):
    assert _spec(x) == P(*spec, *[None] * (x.ndim - len(spec)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sequences(op, tokens, implementation, mesh):
    arrays, settings = _inputs(op)
    run = _derived(
        getattr(tk_jax, op),
        settings | {"return_final_state": True, "implementation": implementation},
    )
    given = _split(mesh, arrays, _specs(op, arrays, tokens))
    got, expected = run(given), run(arrays)
    (_, (out, state)), gradients = got
    _assert_spec(out, tokens)
    jax.tree.map(_assert_spec, state, _state_specs(op, tokens))
    _assert_split_alike(gradients, given)
    _assert_close(got, expected)


def _step_inputs(op):
    arrays, settings = _inputs(op)
    initial = {"return_final_state": True}
    _, state = getattr(tk_jax, op)(**arrays, **settings, **initial)
    arrays.pop("initial_state", None)
    arrays |= {name: arrays[name][:, 0] for name in PER_TOKEN[op]}
    return arrays | {"state": state}, settings


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_steps(op, tokens, implementation, mesh):
    arrays, settings = _step_inputs(op)
    run = _derived(
        getattr(tk_jax, f"{op}_step"), settings | {"implementation": implementation}
    )
    batch, _, heads = (*tokens, None, None, None)[:3]
    specs = _specs(op, arrays, tokens) | {"state": _state_specs(op, tokens)}
    specs |= {name: P(batch, heads) for name in PER_TOKEN[op]}
    given = _split(mesh, arrays, specs)
    got, expected = run(given), run(arrays)
    (_, (out, state)), gradients = got
    _assert_spec(out, P(batch, heads))
    _assert_split_alike(state, given["state"])
    for name, x in gradients.items():
        if name != "state":
            _assert_split_alike(x, given[name])
    _assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_state_that_is_whole_is_a_carry_of_steps(op, mesh):
    """It stays as it is, however the tokens are split."""
    arrays, settings = _step_inputs(op)
    step = getattr(tk_jax, f"{op}_step")

    def run(arrays):
        def body(state, _):
            out, state = step(**arrays | {"state": state}, **settings)
            return state, out

        return jax.lax.scan(body, arrays["state"], length=3)

    specs = {n: P("batch") if n in PER_TOKEN[op] else P() for n in arrays}
    specs["state"] = jax.tree.map(lambda _: P(), arrays["state"])
    state, out = got = jit(run)(_split(mesh, arrays, specs))
    jax.tree.map(lambda x: _assert_spec(x, ()), state)
    _assert_spec(out, P(None, "batch"))
    _assert_close(got, jit(run)(arrays))


@pytest.mark.parametrize("op", OPS)
def test_set_mesh(op, mesh):
    """Of arrays that are split, and of others that nobody has put on the mesh."""
    arrays, settings = _inputs(op)
    run = _derived(getattr(tk_jax, op), settings)
    expected = run(arrays)
    tokens = P("batch", None, "heads")
    with jax.set_mesh(mesh):
        for given, spec in (
            (arrays, P()),
            (_split(mesh, arrays, _specs(op, arrays, tokens)), tokens),
        ):
            got = run(given)
            _assert_spec(got[0][1], spec)
            _assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_an_explicit_axis(op, mesh):
    arrays, settings = _inputs(op)
    arrays = {name: jnp.stack([x, 0.5 * x]) for name, x in arrays.items()}
    mapped = jit(jax.vmap(lambda x: getattr(tk_jax, op)(**x, **settings)))
    out = mapped(jax.device_put(arrays, NamedSharding(mesh, P("batch"))))
    _assert_spec(out, P("batch"))
    _assert_close(out, mapped(arrays))
