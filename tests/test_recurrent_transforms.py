"""The recurrent ops under jax's transformations, on CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrent_cases import QUICK
from recurrent_ops import (
    OPS,
    PER_TOKEN,
    SCANNED,
    SCANNED_BY_MOST,
    SETTINGS,
    call,
    inputs,
    loss,
)

import tk_jax
from tk_jax import checkpoint_policies

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

jit = functools.partial(jax.jit, compiler_options=QUICK)


def _assert_close(got, expected, tolerance=2e-4):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance),
        got,
        expected,
    )


def _gradient(op):
    return jax.value_and_grad(lambda arrays: loss(op, **arrays))


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_values_and_gradients_over_all_arguments(op):
    arrays = inputs(op)
    scales = jnp.array([1.0, 0.9])
    mapped = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x], 1), arrays)
    got = jit(jax.vmap(_gradient(op), in_axes=1))(mapped)
    gradient = jit(_gradient(op))
    for i, scale in enumerate(scales):
        expected = gradient(jax.tree.map(lambda x, s=scale: s * x, arrays))
        _assert_close(jax.tree.map(lambda x, i=i: x[i], got), expected)


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_each_argument(op):
    arrays = inputs(op, batch=())

    @jit
    def both(arrays):
        results = []
        for name, x in arrays.items():
            others = {k: y for k, y in arrays.items() if k != name}

            def run(x, name=name, others=others):
                return call(op, **others, **{name: x})

            mapped = jax.vmap(run)(jnp.stack([x, 0.5 * x]))
            results.append((mapped[1], run(0.5 * x)))
        return results

    for got, expected in both(arrays):
        _assert_close(got, expected)


def _inputs_of_kernels(op, monkeypatch):
    """For a call that has the kernels' rule of its own for gradients."""
    arrays = inputs(op, dtype=jnp.bfloat16)
    if op == "hedgehog_attention":
        monkeypatch.setitem(SETTINGS, op, {})  # The window that the kernels take.
        rng = np.random.default_rng(0)
        for name in ("q_map", "k_map"):
            shape = (*arrays[name].shape[:2], 64)
            arrays[name] = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    explained = tk_jax.explain(getattr(tk_jax, op), **arrays, **SETTINGS[op])
    assert explained.cuda == "tk"
    return arrays


@pytest.mark.parametrize(
    ("op", "mapped"),
    [
        ("ssd", "z"),
        ("linear_attention", "q"),
        ("based_attention", "q"),
        ("hedgehog_attention", "q"),
    ],
)
def test_gradients_of_what_all_elements_share(op, mapped, monkeypatch):
    """The final state does not depend on ``mapped``, the output does."""
    arrays = _inputs_of_kernels(op, monkeypatch)
    x = arrays.pop(mapped)

    def total(arrays, x):
        return loss(op, **arrays, **{mapped: x})

    def together(arrays):
        return jnp.sum(jax.vmap(total, (None, 0))(arrays, jnp.stack([x, -x])))

    def one_by_one(arrays):
        return total(arrays, x) + total(arrays, -x)

    got, expected = (jit(jax.grad(fn))(arrays) for fn in (together, one_by_one))
    jax.tree.map(_assert_close_in_16_bits, got, expected)


def _assert_close_in_16_bits(got, expected):
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected) + 1e-5


@pytest.mark.parametrize("op", OPS)
def test_shard_map_over_batch_and_heads(op, cpu_devices):
    mesh = jax.make_mesh(
        (2, 2), ("batch", "heads"), (AxisType.Auto,) * 2, devices=cpu_devices[:4]
    )
    # So many tokens that there is a scan, whose carry must vary over the mesh.
    arrays = inputs(op, seqlen=SCANNED.get(op, SCANNED_BY_MOST))

    def spec(name):
        if name in PER_TOKEN[op]:
            return P("batch", None, "heads")
        return P("batch", "heads") if name == "initial_state" else P("heads")

    sharded = jax.shard_map(
        lambda arrays: call(op, **arrays),
        mesh=mesh,
        in_specs=({name: spec(name) for name in arrays},),
        out_specs=P("batch", None, "heads"),
    )

    def total(fn, arrays):
        return jnp.sum(jnp.sin(fn(arrays)))

    got, expected = (
        jit(jax.value_and_grad(functools.partial(total, fn)))(arrays)
        for fn in (
            sharded,
            lambda arrays: call(op, **arrays),
        )
    )
    _assert_close(got, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_shard_map_of_a_state_whose_length_all_heads_share(packed, cpu_devices):
    """It may leave as it came in, or be a scan's carry: heads have no part in it."""
    op = "hedgehog_attention"
    mesh = jax.make_mesh(
        (2, 2), ("batch", "heads"), (AxisType.Auto,) * 2, devices=cpu_devices[:4]
    )
    arrays = inputs(op)
    tokens, heads = P("batch", None, "heads"), P("heads")
    specs = {x: tokens if x in PER_TOKEN[op] else heads for x in arrays}
    if packed:
        arrays["segment_ids"] = jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
        specs["segment_ids"] = P("batch")
    sums = P("batch", "heads")
    state_specs = tk_jax.HedgehogState(sums, sums, tokens, tokens, P("batch"))

    def run(arrays):
        _, state = call(op, **arrays, return_final_state=True)
        arrays = {name: x for name, x in arrays.items() if name != "segment_ids"}
        shared = {n: x for n, x in arrays.items() if n not in PER_TOKEN[op]}

        def step(state, token):
            out, state = tk_jax.hedgehog_attention_step(
                *token, **shared, state=state, **SETTINGS[op]
            )
            return state, out

        given = tuple(jnp.moveaxis(arrays[name], 1, 0) for name in ("q", "k", "v"))
        state, out = jax.lax.scan(step, state, given)
        return jnp.moveaxis(out, 0, 1), state

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(specs,), out_specs=(tokens, state_specs)
    )
    got, expected = jit(sharded)(arrays), jit(run)(arrays)
    _assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_export_round_trip(op):
    """Of the gradient for one op; the others' derivatives are made in the same way."""
    arrays = inputs(op)
    fn = jit(_gradient(op) if op == "ssd" else lambda arrays: call(op, **arrays))
    exported = jax.export.export(fn)(arrays)
    restored = jax.export.deserialize(exported.serialize())
    _assert_close(jit(restored.call)(arrays), fn(arrays), 1e-5)


@pytest.mark.parametrize("op", ["based_attention", "hedgehog_attention"])
def test_export_of_steps_that_take_and_return_named_states(op):
    arrays = inputs(op)
    _, state = call(op, **arrays, return_final_state=True)
    arrays |= {name: arrays[name][:, 0] for name in ("q", "k", "v")} | {"state": state}
    step = getattr(tk_jax, f"{op}_step")
    run = jit(lambda arrays: step(**arrays, **SETTINGS[op]))
    restored = jax.export.deserialize(jax.export.export(run)(arrays).serialize())
    got, expected = jit(restored.call)(arrays), run(arrays)
    assert type(got[1]) is type(state)
    _assert_close(got, expected, 1e-5)


def test_layers_in_a_scan_with_remat():
    arrays = inputs("ssd")
    x = arrays.pop("x")

    def model(policy, x, arrays):
        def layer(x, weight):
            return x + call("ssd", x=x @ weight, **arrays), None

        if policy != "no remat":
            layer = jax.checkpoint(layer, policy=policy)
        weights = jnp.stack([jnp.eye(6), 0.5 * jnp.eye(6)[::-1]])
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, weights)[0]))

    results = [
        jit(jax.value_and_grad(functools.partial(model, policy)))(x, arrays)
        for policy in ("no remat", None, checkpoint_policies.save_recurrent)
    ]
    _assert_close(results[1], results[0])
    _assert_close(results[2], results[0])


@pytest.mark.parametrize("op", OPS)
def test_only_arguments_and_named_results_are_saved(op):
    arrays = inputs(op)

    def layer(arrays):
        arrays = jax.tree.map(jnp.sin, arrays)  # not saved by a policy for names
        return jnp.sin(call(op, **arrays))  # which needs what it is the sine of

    def saved_shapes(fn):
        pull_back = jax.eval_shape(lambda x: jax.vjp(fn, x)[1], arrays)
        return sorted(x.shape for x in jax.tree.leaves(pull_back))

    given = sorted(x.shape for x in arrays.values())
    assert saved_shapes(jax.checkpoint(layer)) == given
    # Without a checkpoint too, but for the initial state where it is not an argument.
    _, state = jax.eval_shape(lambda: call(op, **arrays, return_final_state=True))
    kept = sum(map(np.prod, saved_shapes(lambda arrays: call(op, **arrays))))
    allowed = sum(map(np.prod, given)) + sum(x.size for x in jax.tree.leaves(state))
    assert kept <= allowed + 64  # constants
    remat = jax.checkpoint(layer, policy=checkpoint_policies.save_recurrent)
    out = jax.eval_shape(layer, arrays).shape
    assert saved_shapes(remat) == sorted([*given, out])


def test_forward_mode_and_second_order():
    """Along a direction, as differences of values say."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.float64, inputs("linear_attention", seqlen=4))
        rng = np.random.default_rng(0)
        direction = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape)), arrays
        )

        def along(t):
            moved = jax.tree.map(lambda x, d: x + t * d, arrays, direction)
            return call("linear_attention", **moved).sum()

        step = 1e-4
        differences = [jit(along)(i * step) for i in (-1.0, 0.0, 1.0)]
        before, here, after = map(float, differences)
        first = jit(jax.jacfwd(along))(0.0)
        second = jit(jax.grad(jax.grad(along)))(0.0)
        np.testing.assert_allclose(first, (after - before) / (2 * step), rtol=1e-5)
        np.testing.assert_allclose(
            second, (after - 2 * here + before) / step**2, rtol=1e-3
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", [jax.hessian, lambda f: jax.grad(jax.grad(f))])
def test_derivatives_of_higher_order_say_what_has_them(op, transform, monkeypatch):
    arrays = _inputs_of_kernels(op, monkeypatch)

    def total(scale, **settings):
        scaled = jax.tree.map(lambda x: (scale * x).astype(x.dtype), arrays)
        return loss(op, **scaled, **settings)

    message = (
        f"{op}: the TK kernel has no derivatives of higher order; "
        "use implementation='xla'"
    )
    with pytest.raises(NotImplementedError, match=rf"^{message}(\n---|$)"):
        transform(total)(1.0)
    by_xla = transform(functools.partial(total, implementation="xla"))
    assert jax.eval_shape(by_xla, 1.0).shape == ()


def test_eager_calls_and_jitted_ones_are_the_same():
    arrays = inputs("ssd", dtype=jnp.bfloat16)
    y = tk_jax.ssd(**arrays)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jax.jit(tk_jax.ssd)(**arrays))
