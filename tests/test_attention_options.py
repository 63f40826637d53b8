"""Every combination of attention's arguments against its definition."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tk_jax
from tk_jax import _dispatch, _ffi, checkpoint_policies
from tk_jax.ops.attention import attention_reference, config, vjp, xla

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

BATCH, T, S, HEADS, KV_HEADS, D, DV = 2, 9, 8, 4, 2, 5, 3

# Each may be there or not. None hides all keys from all queries, but some from some.
OPTIONS = {
    "is_causal": ("is_causal",),
    "bottom_right": ("causal_align",),
    "window": ("local_window_size",),
    "query_seq_lengths": ("query_seq_lengths",),
    "key_value_seq_lengths": ("key_value_seq_lengths",),
    "segment_ids": ("q_segment_ids", "kv_segment_ids"),
    "mask": ("mask",),
    "bias": ("bias",),
    "soft_cap": ("logits_soft_cap",),
    "sinks": ("sinks",),
    "scale": ("scale",),
}
DIFFERENTIABLE = ("bias", "sinks")


def _arguments():
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def ids(length):
        return jnp.asarray(rng.integers(0, 2, (BATCH, length)), jnp.int32)

    inputs = (
        normal(BATCH, T, HEADS, D),
        normal(BATCH, S, KV_HEADS, D),
        normal(BATCH, S, KV_HEADS, DV),
    )
    return inputs, {
        "is_causal": True,
        "causal_align": "bottom_right",
        "local_window_size": (2, 1),
        "query_seq_lengths": jnp.array([T, 5], jnp.int32),
        "key_value_seq_lengths": jnp.array([6, S + 3], jnp.int32),
        "q_segment_ids": ids(T),
        "kv_segment_ids": ids(S),
        "mask": jnp.asarray(rng.random((BATCH, 1, T, S)) < 0.8),
        "bias": normal(1, HEADS, T, 1),
        "logits_soft_cap": 1.5,
        "sinks": normal(HEADS),
        "scale": 0.7,
    }


INPUTS, ARGUMENTS = _arguments()


def _settings(options):
    return {name: ARGUMENTS[name] for option in options for name in OPTIONS[option]}


def _subsets(names):
    return itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(len(names) + 1)
    )


def _ours(*inputs, **settings):
    return tk_jax.attention(*inputs, return_lse=True, **settings)


def _assert_close(got, expected, message, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, atol=tolerance, rtol=tolerance, err_msg=str(message)
        ),
        got,
        expected,
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(x, marks=[] if x in ((), _FIRST) else pytest.mark.exhaustive)
        for x in _subsets(_FIRST)
    ],
)
def test_results_of_all_combinations(first, monkeypatch):
    """2048 calls in 8 tests; run by operation, since no two are the same program."""
    monkeypatch.setattr(xla, "BLOCK_Q", 5)
    monkeypatch.setattr(xla, "CHUNK_KV", 4)
    others = [name for name in OPTIONS if name not in _FIRST]
    results = {}
    with jax.disable_jit():
        for rest in _subsets(others):
            settings = _settings((*first, *rest))
            got = _ours(*INPUTS, **settings)
            expected = attention_reference(*INPUTS, **settings)
            _assert_close(got, expected, (*first, *rest))
            results[rest] = np.asarray(got[0])
    # No option is without effect here, or this test would not see it ignored.
    for rest, result in results.items():
        for option in set(others) - set(rest):
            more = tuple(x for x in others if x in rest or x == option)
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
    *itertools.combinations(OPTIONS, len(OPTIONS) - 1),
    tuple(OPTIONS),
]


@pytest.mark.parametrize("options", _SEVERAL, ids="-".join)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_each_option_alone_and_of_all_but_one(options):
    settings = _settings(options)
    _assert_close(
        _value_and_gradients(_ours, settings),
        _value_and_gradients(attention_reference, settings),
        options,
        1e-4,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options", list(itertools.combinations(OPTIONS, 2)), ids="-".join
)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_each_pair_of_options(options):
    settings = _settings(options)
    _assert_close(
        _value_and_gradients(_ours, settings),
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
    _assert_close(
        _value_and_gradients(_ours, ARGUMENTS),
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
        _assert_close(run(_ours), run(attention_reference), mapped, 1e-4)


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
        return _ours(*inputs, **arrays, **static)

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
    _assert_close(
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
    _assert_close(gradient(_ours)(q, layers), expected, "scan", 1e-4)
    exported = jax.export.export(gradient(_ours))(q, layers)
    restored = jax.export.deserialize(exported.serialize())
    _assert_close(restored.call(q, layers), expected, "export", 1e-4)


# -- What the arguments mean, where the definition could be misread --------------------


def _seen(**settings):
    """Which keys each query sees, [T, S] or [BATCH, T, S]: values are one-hot."""
    seqlen_q, seqlen_kv = settings.pop("lengths", (T, S))
    batch = settings.pop("batch", ())
    q, k = jnp.zeros((*batch, seqlen_q, 1, 4)), jnp.zeros((*batch, seqlen_kv, 1, 4))
    v = jnp.broadcast_to(jnp.eye(seqlen_kv)[:, None], (*k.shape[:-1], seqlen_kv))
    return np.asarray(tk_jax.attention(q, k, v, **settings)[..., 0, :] > 0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [3, (2, 0), (0, 5), (50, 1)])
@pytest.mark.parametrize("lengths", [(9, 8), (4, 11), (7, 7)])
def test_window(lengths, window, align, is_causal):
    left, right = (window, window) if isinstance(window, int) else window
    seqlen_q, seqlen_kv = lengths
    query, key = np.ogrid[:seqlen_q, :seqlen_kv]
    position = query + (seqlen_kv - seqlen_q if align == "bottom_right" else 0)
    expected = (position - left <= key) & (key <= position + right)
    if is_causal:
        expected &= key <= position
    got = _seen(
        lengths=lengths,
        local_window_size=window,
        causal_align=align,
        is_causal=is_causal,
    )
    np.testing.assert_array_equal(got, expected)


def test_bottom_right_aligns_the_ends_of_the_lengths():
    # A cache of 8 of which 5 keys are filled, the last two of them by these queries.
    got = _seen(
        lengths=(3, 8),
        batch=(1,),
        is_causal=True,
        causal_align="bottom_right",
        query_seq_lengths=jnp.array([2], jnp.int32),
        key_value_seq_lengths=jnp.array([5], jnp.int32),
    )[0]
    key = np.arange(8)
    np.testing.assert_array_equal(got, [key <= 3, key <= 4, key < 0])


@pytest.mark.parametrize("length", [-3, 0, 8, 2**31 - 1])
def test_lengths_out_of_range_mean_none_or_all(length):
    got = _seen(key_value_seq_lengths=jnp.int32(length))
    assert np.all(got == (length > 0))


def test_segment_ids_of_keys_default_to_those_of_queries():
    ids = jnp.array([3, 3, -1, 0, 0, 0, 3], jnp.int32)  # In any order.
    got = _seen(lengths=(7, 7), q_segment_ids=ids)
    np.testing.assert_array_equal(got, ids[:, None] == ids[None, :])


def test_a_bias_of_minus_infinity_hides(rng):
    mask = rng.random((T, S)) < 0.5
    mask[2] = False  # A query without keys.
    bias = jnp.where(mask, 0, -jnp.inf)

    def gradient(**settings):
        def loss(inputs):
            out, lse = _ours(*inputs, logits_soft_cap=2.0, **settings)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

        return jax.value_and_grad(loss)(INPUTS)

    hidden, masked = gradient(bias=bias), gradient(mask=jnp.asarray(mask))
    _assert_close(hidden, masked, "bias")
    dbias = jax.grad(lambda b: tk_jax.attention(*INPUTS, bias=b).sum())(bias)
    assert np.all(np.isfinite(dbias)) and not np.any(np.asarray(dbias)[~mask])


def test_sinks_are_one_more_key_whose_value_is_zero():
    q, k, v = INPUTS
    sinks = ARGUMENTS["sinks"]
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    key = jnp.zeros((BATCH, 1, HEADS, D))
    bias = jnp.zeros((HEADS, 1, S + 1)).at[:, 0, S].set(sinks)
    more = (jnp.concatenate([x, y], 1) for x, y in ((k, key), (v, key[..., :DV])))
    _assert_close(_ours(q, k, v, sinks=sinks), _ours(q, *more, bias=bias), "sinks")


def test_queries_without_keys_and_with_a_sink():
    sinks = ARGUMENTS["sinks"]
    mask = jnp.zeros((1, S), bool)
    out, lse = _ours(*INPUTS, sinks=sinks, mask=mask)
    assert not np.any(out)
    np.testing.assert_allclose(lse, jnp.broadcast_to(sinks, lse.shape), rtol=1e-6)
    gradient = jax.grad(lambda x, s: _ours(*x, sinks=s, mask=mask)[1].sum(), (0, 1))(
        INPUTS, sinks
    )
    assert not any(np.any(x) for x in gradient[0])
    np.testing.assert_allclose(gradient[1], np.full(HEADS, BATCH * T), rtol=1e-6)


def test_chunks_out_of_the_window_are_left_out():
    """The work of a window grows with T, not with T * S."""

    def flops(seqlen, **settings):
        x = jax.ShapeDtypeStruct((1, seqlen, 1, 8), jnp.float32)
        call = functools.partial(tk_jax.attention, **settings)
        steps = re.findall(
            r"length=(\d+)", str(jax.make_jaxpr(lambda x: call(x, x, x))(x))
        )
        return sum(map(int, steps))

    assert flops(4096) == 64
    assert flops(4096, is_causal=True) == 36
    assert flops(4096, local_window_size=(512, 0)) == 15
    assert flops(4096, local_window_size=(0, 512), is_causal=True) == 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    inputs = tuple(x.astype(jnp.bfloat16) for x in INPUTS)
    extras = {x: ARGUMENTS[x].astype(dtype) for x in DIFFERENTIABLE}

    def loss(inputs, extras):
        return tk_jax.attention(*inputs, **extras).astype(jnp.float32).sum()

    got = jax.grad(loss, (0, 1))(inputs, extras)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, (inputs, extras))
    assert {x.dtype for x in jax.tree.leaves(got[1])} == {jnp.dtype(dtype)}


# -- Which implementation runs ---------------------------------------------------------


@pytest.mark.parametrize(
    "name", [x for x in ARGUMENTS if x not in ("is_causal", "scale")]
)
def test_what_has_no_kernel_says_so(name, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    x = jax.ShapeDtypeStruct((BATCH, T, HEADS, 64), jnp.bfloat16)
    settings = {name: ARGUMENTS[name]}
    if name == "kv_segment_ids":
        settings = _settings(["segment_ids"])
    if name == "mask":
        settings = {"mask": jax.ShapeDtypeStruct((T, T), jnp.bool_)}
    if name.endswith("segment_ids"):
        ids = jax.ShapeDtypeStruct((BATCH, T), jnp.int32)
        settings = {"q_segment_ids": ids, "kv_segment_ids": ids}
    choice = tk_jax.explain(tk_jax.attention, x, x, x, **settings)
    if name in ("causal_align", "local_window_size"):
        assert choice.cuda == "tk"
        return
    named = "q_segment_ids" if name == "kv_segment_ids" else name
    assert choice.cuda == "xla"
    assert choice.reason == f"the TK kernel does not support {named}"
    with pytest.raises(NotImplementedError, match=f"does not support {named}"):
        tk_jax.explain(tk_jax.attention, x, x, x, **settings, implementation="tk")


def test_a_value_head_dim_of_its_own_has_no_kernel(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q = jax.ShapeDtypeStruct((BATCH, T, HEADS, 128), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((BATCH, T, HEADS, 64), jnp.bfloat16)
    assert tk_jax.explain(tk_jax.attention, q, q, v).reason == (
        "the TK kernel does not support head dim 64 of v beside 128 of q and k"
    )


def test_a_fallback_on_a_gpu_warns_of_the_argument(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_dispatch, "_unsupported_gpu", lambda: None)
    monkeypatch.setattr(_dispatch, "_warned", set())
    x = jax.ShapeDtypeStruct((BATCH, T, HEADS, 64), jnp.bfloat16)
    with pytest.warns(tk_jax.FallbackWarning, match="does not support logits_soft_cap"):
        jax.eval_shape(lambda x: tk_jax.attention(x, x, x, logits_soft_cap=1.0), x)
