"""Every combination of attention's arguments against its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_options import (
    ARGUMENTS,
    BATCH,
    DIFFERENTIABLE,
    INPUTS,
    OPTIONS,
    assert_close,
    ours,
    settings_of,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tk_jax
from tk_jax import _ffi, checkpoint_policies
from tk_jax.ops.attention import attention_reference, config, vjp, xla

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")


def _subsets(names):
    return itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(len(names) + 1)
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Two blocks of queries and three chunks of keys, of which some are left out."""
    monkeypatch.setattr(xla, "BLOCK_Q", 5)
    monkeypatch.setattr(xla, "CHUNK_KV", 3)
    jax.clear_caches()
    yield
    jax.clear_caches()


_FIRST = ("is_causal", "bottom_right", "window")
_OTHERS = [name for name in OPTIONS if name not in _FIRST]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("first", [*_subsets(_FIRST)])
def test_results_of_all_combinations(first, monkeypatch):
    """2048 calls in 8 tests."""
    _compare(first, _subsets(_OTHERS), monkeypatch)


@pytest.mark.slow
def test_results_of_combinations(monkeypatch):
    """Up to two options beside a window, or all but one."""
    few = [x for x in _subsets(_OTHERS) if len(x) <= 2 or len(x) >= len(_OTHERS) - 1]
    _compare(_FIRST, few, monkeypatch)


def _compare(first, combinations, monkeypatch):
    """Run by operation, since no two are the same program."""
    monkeypatch.setattr(xla, "BLOCK_Q", 5)
    monkeypatch.setattr(xla, "CHUNK_KV", 4)
    results = {}
    with jax.disable_jit():
        for rest in combinations:
            settings = settings_of((*first, *rest))
            got = ours(*INPUTS, **settings)
            expected = attention_reference(*INPUTS, **settings)
            assert_close(got, expected, (*first, *rest))
            results[rest] = np.asarray(got[0])
    # No option is without effect here, or this test would not see it ignored.
    for rest, result in results.items():
        for option in set(_OTHERS) - set(rest):
            more = tuple(x for x in _OTHERS if x in rest or x == option)
            if more in results:
                assert not np.array_equal(result, results[more]), (first, rest, option)


def _loss(attention, settings, inputs, differentiable):
    out, lse = attention(*inputs, **differentiable, **settings)
    weights = jnp.cos(jnp.arange(out.size).reshape(out.shape))
    # An infinite lse is that of a query without keys, whatever the inputs are.
    lse = jnp.where(jnp.isfinite(lse), lse, 0)
    return jnp.sum(out * weights) + jnp.sum(lse * weights[..., 0]), (out, lse)


def _value_and_gradients(attention, settings):
    differentiable = {x: settings[x] for x in DIFFERENTIABLE if x in settings}
    others = {x: y for x, y in settings.items() if x not in DIFFERENTIABLE}
    loss = functools.partial(_loss, attention, others)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        INPUTS, differentiable
    )


_SEVERAL = [
    *itertools.combinations(OPTIONS, 1),
    tuple(OPTIONS),
    *(
        pytest.param(options, marks=pytest.mark.exhaustive)
        for size in (2, len(OPTIONS) - 1)
        for options in itertools.combinations(OPTIONS, size)
    ),
]


@pytest.mark.parametrize("options", _SEVERAL, ids="-".join)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_several_options(options):
    """Of each alone and of all; and, at length, of each pair and of all but one."""
    settings = settings_of(options)
    assert_close(
        _value_and_gradients(ours, settings),
        _value_and_gradients(attention_reference, settings),
        options,
        1e-4,
    )


# -- The rules that the kernels are called from ----------------------------------------


@pytest.fixture
def kernel_rules(monkeypatch):
    """The kernels' custom_vjp and batching rules, with XLA in the kernels' place."""
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(config, "unsupported", lambda *_: None)
    monkeypatch.setattr(vjp, "kernel_forward", xla.forward)
    monkeypatch.setattr(vjp, "kernel_backward", xla.backward)
    jax.clear_caches()
    assert tk_jax.explain(tk_jax.attention, *INPUTS, **ARGUMENTS).cuda == "tk"
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("kernel_rules")
def test_gradients_by_the_kernels_rules():
    assert_close(
        _value_and_gradients(ours, ARGUMENTS),
        _value_and_gradients(attention_reference, ARGUMENTS),
        "all",
        1e-4,
    )


_ARRAYS = tuple(name for name, value in ARGUMENTS.items() if hasattr(value, "shape"))


def _roll(x):
    return jnp.roll(x, 1, -1)


@pytest.mark.usefixtures("kernel_rules")
@pytest.mark.parametrize(
    "mapped",
    [
        ("q", "k", "v"),
        ("v", "bias"),
        ("sinks",),
        ("mask", "query_seq_lengths"),
        _ARRAYS,
    ],
    ids="-".join,
)
def test_vmap_by_the_kernels_rules(mapped):
    """Of gradients, and gradients of it, over some of the arrays and not others."""
    static = {name: x for name, x in ARGUMENTS.items() if name not in _ARRAYS}
    arrays = dict(zip("qkv", INPUTS, strict=True)) | {x: ARGUMENTS[x] for x in _ARRAYS}
    axes = {name: 0 if name in mapped else None for name in arrays}
    arrays = {
        name: jnp.stack([x, _roll(x)]) if name in mapped else x
        for name, x in arrays.items()
    }
    floating = {x: arrays.pop(x) for x in ("q", "k", "v", *DIFFERENTIABLE)}
    axes = ({x: axes[x] for x in floating}, {x: axes[x] for x in arrays})

    def loss(attention, floating, arrays):
        inputs = [floating[x] for x in "qkv"]
        differentiable = {x: floating[x] for x in DIFFERENTIABLE}
        settings = arrays | static
        return _loss(attention, settings, inputs, differentiable)[0]

    def per_element(attention):
        gradient = jax.value_and_grad(functools.partial(loss, attention))
        return jax.jit(jax.vmap(gradient, axes))(floating, arrays)

    def of_the_sum(attention):
        mapped_loss = jax.vmap(functools.partial(loss, attention), axes)

        def total(floating, arrays):
            return jnp.sum(mapped_loss(floating, arrays) * jnp.array([1.0, 2.0]))

        return jax.jit(jax.grad(total))(floating, arrays)

    for run in (per_element, of_the_sum):
        assert_close(run(ours), run(attention_reference), mapped, 1e-4)


@pytest.mark.usefixtures("kernel_rules")
def test_what_all_elements_share_is_not_copied():
    """Under vmap, the forward pass is given one mask and one bias for all elements."""
    size = 7
    q, k = jnp.ones((size, 1, 30, 2, 4)), jnp.ones((size, 1, 50, 2, 4))
    mask, bias = jnp.ones((1, 1, 30, 50), bool), jnp.ones((2, 30, 50))

    def run(q, k):
        return tk_jax.attention(q, k, k, mask=mask, bias=bias)

    seen = set()
    monkey = xla.forward

    def spy(options, q, k, v, extras):
        seen.add((q.shape, extras.mask.shape, extras.bias.shape))
        return monkey(options, q, k, v, extras)

    vjp.kernel_forward = spy  # Restored by the fixture.
    jax.eval_shape(jax.vmap(run), q, k)
    assert ((size, 1, 30, 2, 4), (1, 1, 1, 30, 50), (1, 1, 2, 30, 50)) in seen


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_integer_arguments_have_no_gradient(implementation):
    names = ("query_seq_lengths", "q_segment_ids", "kv_segment_ids", "mask")

    def loss(arrays):
        return tk_jax.attention(*INPUTS, **arrays, implementation=implementation).sum()

    gradient = jax.grad(loss, allow_int=True)({x: ARGUMENTS[x] for x in names})
    assert {x.dtype for x in gradient.values()} == {jax.dtypes.float0}


def _shard_mapped(cpu_devices, settings):
    """Value and gradients on two devices, each with a part of the batch."""
    mesh = jax.make_mesh(
        (2,), ("batch",), (AxisType.Auto,), devices=cpu_devices[:BATCH]
    )
    shared = ("bias", "sinks")
    specs = {x: P() if x in shared else P("batch") for x in _ARRAYS}
    static = {x: y for x, y in settings.items() if x not in _ARRAYS}

    def local(inputs, arrays):
        return ours(*inputs, **arrays, **static)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("batch"), specs), out_specs=P("batch")
    )
    return lambda *inputs, **arrays: sharded(
        inputs, {x: y for x, y in arrays.items() if x in _ARRAYS}
    )


@pytest.mark.parametrize("rules", ["kernel", "xla"])
def test_shard_map_sums_the_gradients_of_what_devices_share(
    rules, cpu_devices, request
):
    if rules == "kernel":
        request.getfixturevalue("kernel_rules")
    assert_close(
        _value_and_gradients(_shard_mapped(cpu_devices, ARGUMENTS), ARGUMENTS),
        _value_and_gradients(attention_reference, ARGUMENTS),
        rules,
        1e-4,
    )


@pytest.mark.parametrize("rules", ["kernel", "xla"])
def test_scan_over_checkpointed_layers_and_export(rules, request):
    if rules == "kernel":
        request.getfixturevalue("kernel_rules")
    settings = {x: y for x, y in ARGUMENTS.items() if x not in DIFFERENTIABLE}
    q, k, _ = INPUTS
    layers = {x: jnp.stack([ARGUMENTS[x], 2 * ARGUMENTS[x]]) for x in DIFFERENTIABLE}

    def gradient(attention):
        policy = checkpoint_policies.save_attention

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, differentiable):
            out, _ = attention(x, k, k, **differentiable, **settings)
            return x + out, None

        def loss(x, layers):
            return jnp.sum(jnp.sin(jax.lax.scan(layer, x, layers)[0]))

        return jax.jit(jax.grad(loss, (0, 1)))

    expected = gradient(attention_reference)(q, layers)
    assert_close(gradient(ours)(q, layers), expected, "scan", 1e-4)
    exported = jax.export.export(gradient(ours))(q, layers)
    restored = jax.export.deserialize(exported.serialize())
    assert_close(restored.call(q, layers), expected, "export", 1e-4)
