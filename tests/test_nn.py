"""``tk_jax.nn``: jax.nn's attention, in every combination of its arguments."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax.nn import dot_product, dot_product_attention

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8
_BROADCAST = [(1, 1), (B, 1), (1, N), (B, N)]
_LENGTHS = ("neither", "query", "key_value", "both")
_WINDOWS = (None, 2, (3, 1), (1, 0))
# Presence of each argument; the rest of a case is drawn.
_COMBINATIONS = list(
    itertools.product(
        (False, True), _WINDOWS, _LENGTHS, (False, True), (False, True), (False, True)
    )
)


def _case(index):
    """Arrays and settings of a call of jax.nn's function."""
    is_causal, window, lengths, has_mask, has_bias, residual = _COMBINATIONS[
        index % len(_COMBINATIONS)
    ]
    rng = np.random.default_rng(index)
    batched = rng.random() < 0.75
    dtype = jnp.bfloat16 if rng.random() < 0.25 else jnp.float32
    batch = B if batched else 1

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    num_kv_heads = (1, K, N)[rng.integers(3)]
    arrays = [normal(batch, T, N, H), *(normal(batch, S, num_kv_heads, H),) * 2]
    arrays[2] = arrays[2][:, ::-1]
    settings = {
        "is_causal": is_causal,
        "local_window_size": window,
        "return_residual": residual,
        "scale": (None, 0.5)[rng.integers(2)],
    }
    broadcast = [(b if batched else 1, h) for b, h in _BROADCAST]
    rows = (1, T)[rng.integers(2)]
    if has_bias:
        shape = (*broadcast[rng.integers(4)], rows, (1, S)[rng.integers(2)])
        settings["bias"] = normal(*shape, dtype=jnp.float32)
    if has_mask:
        shape = (*broadcast[rng.integers(4)], T, S)
        settings["mask"] = jnp.asarray(rng.random(shape) < 0.8)
    for name, size in (("query", T), ("key_value", S)):
        if lengths in (name, "both"):
            drawn = rng.integers(1, size + 1, batch)
            settings[f"{name}_seq_lengths"] = jnp.asarray(drawn, jnp.int32)
    if not batched:
        arrays = [x[0] for x in arrays]
    return arrays, settings


def _sees_a_key(settings, batch):
    """[batch, T, N]: by the words of jax.nn's documentation."""
    query, key = np.ogrid[:T, :S]
    seen = np.ones((batch, N, T, S), bool)
    if settings["is_causal"]:
        seen &= key <= query
    if settings["local_window_size"] is not None:
        left, right = np.broadcast_to(settings["local_window_size"], 2)
        seen &= (query - left <= key) & (key <= query + right)
    if "mask" in settings:
        seen &= np.asarray(settings["mask"])
    for name, index in (("query", query), ("key_value", key)):
        if f"{name}_seq_lengths" in settings:
            lengths = np.asarray(settings[f"{name}_seq_lengths"])
            seen &= index < lengths[:, None, None, None]
    return seen.any(-1).swapaxes(1, 2)


def _check(index):
    arrays, settings = _case(index)
    got = dot_product_attention(*arrays, **settings)
    expected = jax.nn.dot_product_attention(*arrays, **settings, implementation="xla")
    batch = arrays[0].shape[0] if arrays[0].ndim == 4 else 1
    sees = _sees_a_key(settings, batch).reshape(arrays[0].shape[:-1])
    tolerance = 2e-2 if arrays[0].dtype == jnp.bfloat16 else 2e-5
    got, expected = (jax.tree.leaves(x) for x in (got, expected))
    for x, y, blind in zip(got, expected, (0, -np.inf), strict=False):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), settings
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(
            x[sees], y[sees], atol=tolerance, rtol=tolerance, err_msg=str(settings)
        )
        assert np.all(x[~sees] == blind), settings
    assert len(got) == len(expected) == 1 + settings["return_residual"]


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=[] if part < 10 else pytest.mark.exhaustive)
        for part in range(12)
    ],
)
def test_sweep_of_every_combination_of_arguments(part):
    """384 cases in 12 parts; run by operation, since no two are the same program.

    Eight parts have each combination once, the others half of them with other shapes;
    two of those run by default too: 320 cases.
    """
    count = len(_COMBINATIONS)
    assert 3 * count // 2 == 384
    indices = range(count)[part::8] if part < 8 else range(count, 384)[part - 8 :: 4]
    with jax.disable_jit():
        for index in indices:
            _check(index)


@pytest.mark.parametrize("index", [5, 100, 255])
def test_gradients_are_those_of_jax_nn(index):
    arrays, settings = _case(index)
    settings |= {"return_residual": False}
    bias = settings.pop("bias", jnp.zeros((1, N, T, S)))
    if "mask" in settings:  # Every query sees a key, for the two to agree.
        settings["mask"] |= jnp.eye(T, S, dtype=bool)
    settings.pop("key_value_seq_lengths", None)

    def gradient(attention):
        def loss(arrays, bias):
            out = attention(*arrays, bias, **settings)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, (0, 1)))(arrays, bias)

    got, expected = map(gradient, (dot_product_attention, jax.nn.dot_product_attention))
    tolerance = 5e-2 if arrays[0].dtype == jnp.bfloat16 else 1e-4
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float32(x), np.float32(y), atol=tolerance, rtol=tolerance
        ),
        got,
        expected,
    )


def test_signature_is_that_of_jax_nn():
    ours, theirs = (
        inspect.signature(f).parameters
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    documentation = inspect.getdoc(dot_product_attention)
    for name in ours:
        assert f"\n  {name}: " in documentation, name


def test_residual_has_no_gradient():
    x = jnp.ones((5, 2, 8))

    def loss(x):
        return dot_product_attention(x, x, x, return_residual=True)[1].sum()

    assert not np.any(jax.grad(loss)(x))


def test_takes_what_jax_takes():
    x = np.ones((5, 2, 8), np.float32)
    expected = jax.nn.dot_product_attention(x, x, x)
    np.testing.assert_allclose(dot_product_attention(x.tolist(), x, x), expected)
    bias = np.arange(5)[None, :]  # Integers, of a rank below four.
    np.testing.assert_allclose(
        dot_product_attention(x, x, x * x, bias),
        jax.nn.dot_product_attention(x, x, x * x, bias),
        rtol=1e-6,
    )


def _case_with_scale(dtype):
    rng = np.random.default_rng(3)
    arrays = [
        jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    ]
    return arrays[:3], arrays[3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
def test_scale_may_be_traced_and_has_a_gradient(dtype, mapped):
    arrays, weights = _case_with_scale(dtype)
    scale = jnp.array([0.9, 0.1, -3.0]) if mapped else jnp.float32(0.9)

    def run(attention):
        def loss(arrays, scale):
            out = attention(*arrays, scale=scale, is_causal=True)
            return jnp.sum((out * weights).astype(jnp.float32)), out

        run = jax.value_and_grad(loss, (0, 1), has_aux=True)
        run = jax.vmap(run, (None, 0)) if mapped else run
        return jax.jit(run)(arrays, scale)

    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == jnp.float32 else {"atol": 0.2}
    got, expected = run(dot_product_attention), run(jax.nn.dot_product_attention)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float32(x), np.float32(y), **{"rtol": 0.03} | tolerance
        ),
        got,
        expected,
    )
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, expected)


def test_scale_that_is_an_array_of_the_default_changes_nothing():
    arrays, _ = _case_with_scale(jnp.bfloat16)
    np.testing.assert_array_equal(
        jax.jit(lambda s: dot_product_attention(*arrays, scale=s))(H**-0.5),
        dot_product_attention(*arrays),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"is_causal": None},
        {"is_causal": 0},
        {"is_causal": 1},
        {"is_causal": jnp.array(True)},
        {"return_residual": None},
        {"return_residual": 0},
        {"return_residual": 1},
        {"local_window_size": np.array([3, 1])},
        {"local_window_size": jnp.array([3, 1])},
        {"local_window_size": [3, 1]},
        {"scale": np.float32(0.25)},
        {"scale": np.array(0.25)},
        {"scale": jnp.array(2)},
    ],
    ids=str,
)
def test_settings_that_jax_takes(settings):
    arrays, _ = _case_with_scale(jnp.float32)
    got = dot_product_attention(*arrays, **settings)
    expected = jax.nn.dot_product_attention(*arrays, **settings)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5),
        got,
        expected,
    )


@pytest.mark.parametrize("kind", [np.array, jnp.array], ids=["numpy", "jax"])
def test_scale_of_another_shape_is_refused(kind):
    x = jnp.ones((5, 2, 8))
    message = re.escape("attention: scale has shape (1,); expected a number")
    with pytest.raises(ValueError, match=message):
        dot_product_attention(x, x, x, scale=kind([0.3]))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda s: dot_product_attention(x, x, x, scale=s))(kind([0.3]))


@pytest.mark.parametrize(
    ("is_causal", "window", "passed_on"),
    [
        (False, None, False),
        (False, (3, 0), True),
        (False, 0, True),
        (False, (3, 1), False),
        (False, 3, False),
        (True, (3, 1), True),
        (None, np.array([3, 0]), True),
        (0, np.array([3, 1]), False),
    ],
)
def test_cudnn_is_told_that_a_window_without_a_future_is_causal(
    monkeypatch, is_causal, window, passed_on
):
    seen = {}
    monkeypatch.setattr(
        dot_product,
        "_jax_dot_product_attention",
        lambda *arrays, **settings: seen.update(settings) or "result",
    )
    settings = {"is_causal": is_causal, "local_window_size": window}
    x = jnp.ones((5, 2, 8), jnp.bfloat16)
    assert (
        dot_product_attention(x, x, x, **settings, implementation="cudnn") == "result"
    )
    assert seen.pop("implementation") == "cudnn"
    window = window.tolist() if isinstance(window, np.ndarray) else window
    assert (seen["is_causal"], seen["local_window_size"]) == (passed_on, window)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"implementation": "flash"}, ValueError, "implementation is 'flash'"),
        ({"local_window_size": (-1, 0)}, ValueError, "local_window_size is (-1, 0)"),
        (
            {"mask": np.ones((1, 1, 5, 5), np.int32)},
            ValueError,
            "mask has dtype int32; expected bool",
        ),
        (
            {"query_seq_lengths": np.ones(3, np.int32)},
            ValueError,
            "query_seq_lengths has shape (3,); expected one that broadcasts to (1,)",
        ),
    ],
)
def test_wrong_settings(settings, error, message):
    x = jnp.ones((5, 2, 8))
    with pytest.raises(error, match=re.escape(message)):
        dot_product_attention(x, x, x, **settings)


def test_implementation_is_passed_on():
    x = jnp.ones((5, 2, 8))
    with pytest.raises(NotImplementedError, match="implementation='tk'"):
        dot_product_attention(x, x, x, implementation="tk")
    np.testing.assert_array_equal(
        dot_product_attention(x, x, x, implementation="xla"), tk_jax.attention(x, x, x)
    )
