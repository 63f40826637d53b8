"""The attention layers of flax and Equinox with ours inside, against their own."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tk_jax.nn.flax import attention_fn

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

BATCH, T, S, FEATURES, HEADS = 2, 6, 9, 32, 4


@pytest.fixture
def inputs(rng):
    return tuple(
        jnp.asarray(rng.standard_normal((BATCH, length, FEATURES), np.float32))
        for length in (T, S)
    )


@pytest.fixture
def mask(rng):
    """Bool [BATCH, 1, T, S], in which every query sees a key."""
    mask = rng.random((BATCH, 1, T, S)) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def _assert_close(got, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4),
        got,
        expected,
    )


@pytest.mark.parametrize("mask_dtype", [None, bool, jnp.float32], ids=str)
def test_linen_layer(inputs, mask, mask_dtype):
    linen = pytest.importorskip("flax.linen")
    mask = None if mask_dtype is None else mask.astype(mask_dtype)

    def layer(**settings):
        return linen.MultiHeadDotProductAttention(num_heads=HEADS, **settings)

    variables = layer().init(jax.random.key(0), *inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(layer, variables):
        def loss(variables):
            return jnp.sum(jnp.sin(layer.apply(variables, *inputs, mask=mask)))

        return jax.value_and_grad(loss)(variables)

    _assert_close(
        loss_and_gradient(layer(attention_fn=attention_fn), variables),
        loss_and_gradient(layer(), variables),
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_nnx_layer(inputs, mask, has_mask, is_causal):
    nnx = pytest.importorskip("flax.nnx")
    mask = mask if has_mask else None

    def run(**settings):
        layer = nnx.MultiHeadAttention(
            HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **settings
        )
        return layer(*inputs, mask=mask, is_causal=is_causal)

    _assert_close(run(attention_fn=attention_fn), run())


def test_settings_of_attention_are_set_beforehand(inputs):
    linen = pytest.importorskip("flax.linen")
    x, _ = inputs
    query, key = np.ogrid[:T, :T]
    window = (query - 2 <= key) & (key <= query)

    def layer(**settings):
        return linen.MultiHeadDotProductAttention(num_heads=HEADS, **settings)

    variables = layer().init(jax.random.key(0), x)
    ours = functools.partial(attention_fn, local_window_size=(2, 0), is_causal=True)
    _assert_close(
        layer(attention_fn=ours).apply(variables, x),
        layer().apply(variables, x, mask=jnp.asarray(window)[None, None]),
    )


def test_layers_that_ask_for_weights_are_refused(inputs):
    linen = pytest.importorskip("flax.linen")

    def apply(rate, **settings):
        layer = linen.MultiHeadDotProductAttention(
            num_heads=HEADS, dropout_rate=rate, attention_fn=attention_fn
        )
        variables = layer.init(jax.random.key(0), *inputs, deterministic=True)
        rngs = {"dropout": jax.random.key(1)}
        return layer.apply(variables, *inputs, rngs=rngs, **settings)

    apply(0.5, deterministic=True)
    with pytest.raises(NotImplementedError, match=r"dropout_rate is 0\.5"):
        apply(0.5, deterministic=False)
    with pytest.raises(NotImplementedError, match="module is of type"):
        apply(0.0, sow_weights=True, mutable=["intermediates"])


@pytest.mark.parametrize(
    "name",
    [
        "precision",
        "einsum_dot_general",
        "qk_attn_weights_einsum",
        "attn_weights_value_einsum",
    ],
)
def test_what_has_no_counterpart_is_refused(name):
    x = jnp.ones((3, 2, 8))
    with pytest.raises(NotImplementedError, match=f"{name} is of type str"):
        attention_fn(x, x, x, **{name: "highest"})


def test_dtypes_are_promoted():
    x, y = jnp.ones((3, 2, 8), jnp.bfloat16), jnp.ones((3, 2, 8))
    assert attention_fn(x, y, y).dtype == jnp.float32
    assert attention_fn(x, y, y, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_promotion_may_be_another(inputs):
    nnx = pytest.importorskip("flax.nnx")
    seen = []

    def promote(arrays, *, dtype):
        seen.append(dtype)
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    x = jnp.ones((3, 2, 8))
    out = attention_fn(x, x, x, dtype=jnp.float32, promote_dtype=promote)
    assert out.dtype == jnp.bfloat16 and seen == [jnp.float32]
    layer = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        decode=False,
        rngs=nnx.Rngs(0),
        attention_fn=functools.partial(attention_fn, promote_dtype=promote),
    )
    assert layer(*inputs).dtype == jnp.float32 and len(seen) == 2


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16], ids=lambda x: x.__name__)
def test_bias_of_any_dtype(dtype, rng):
    linen = pytest.importorskip("flax.linen")
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 5, HEADS, 8), np.float32))
    bias = jnp.asarray(rng.integers(-2, 3, (HEADS, 5, 5)), dtype)
    _assert_close(
        attention_fn(q, k, v, bias), linen.dot_product_attention(q, k, v, bias)
    )


def _equinox_layers(**settings):
    equinox = pytest.importorskip("equinox")
    from tk_jax.nn.equinox import MultiheadAttention

    return tuple(
        cls(HEADS, FEATURES, use_query_bias=True, key=jax.random.key(0), **settings)
        for cls in (MultiheadAttention, equinox.nn.MultiheadAttention)
    )


@pytest.mark.parametrize("mask_rank", [None, 2, 3])
def test_equinox_layer(inputs, mask, mask_rank):
    equinox = pytest.importorskip("equinox")
    layers = _equinox_layers(vo_size=5)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(layers[0])) == jax.tree.map(
        jnp.shape, jax.tree.leaves(layers[1])
    )
    if mask_rank is not None:
        mask = jnp.broadcast_to(mask, (BATCH, HEADS, T, S))
        mask = mask if mask_rank == 3 else mask[:, 0]

    def rotate(q, k, v):
        return jnp.roll(q, 1, -1), k, v

    def loss(layer):
        def one(x, y, mask):
            return layer(x, y, y, mask, process_heads=rotate)

        if mask_rank is None:
            out = jax.vmap(functools.partial(one, mask=None))(*inputs)
        else:
            out = jax.vmap(one)(*inputs, mask)
        return jnp.sum(jnp.sin(out))

    run = equinox.filter_jit(equinox.filter_value_and_grad(loss))
    _assert_close(*(jax.tree.leaves(run(layer)) for layer in layers))


def test_equinox_layer_takes_settings_and_refuses_dropout(inputs):
    ours, theirs = _equinox_layers(dropout_p=0.25)
    x = inputs[0][0]
    causal = jnp.tri(T, dtype=bool)
    _assert_close(
        ours(x, x, x, is_causal=True, inference=True),
        theirs(x, x, x, causal, inference=True),
    )
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.25"):
        ours(x, x, x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="process_heads returns the shapes"):
        ours(x, x, x, inference=True, process_heads=lambda q, k, v: (q[:1], k, v))


def test_equinox_layer_returns_lse(inputs):
    layer, _ = _equinox_layers()
    x = inputs[0][0]
    out, lse = layer(x, x, x, return_lse=True)
    np.testing.assert_array_equal(out, layer(x, x, x))
    q, k = (
        jax.vmap(project)(x).reshape(T, HEADS, -1)
        for project in (layer.query_proj, layer.key_proj)
    )
    scores = jnp.einsum("thd,shd->ths", q, k) * q.shape[-1] ** -0.5
    _assert_close(lse, jax.nn.logsumexp(scores, -1))


@pytest.mark.parametrize("inference", [None, False])
def test_equinox_layer_has_the_older_name_of_inference(inputs, inference):
    layers = _equinox_layers(dropout_p=0.25)
    x = inputs[0][0]
    outs = []
    for layer in layers:
        with pytest.warns(UserWarning, match="deprecated"):
            outs.append(layer(x, x, x, inference=inference, deterministic=True))
    _assert_close(*outs)
    with (
        pytest.warns(UserWarning, match="deprecated"),
        pytest.raises(NotImplementedError, match=r"dropout_p is 0\.25"),
    ):
        layers[0](x, x, x, inference=True, deterministic=False)


def test_example_of_the_equinox_layer_runs():
    pytest.importorskip("equinox")
    import tk_jax.nn.equinox

    results = doctest.testmod(tk_jax.nn.equinox)
    assert results.attempted > 0 and results.failed == 0
