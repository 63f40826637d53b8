"""Wrong input to attention: refused before anything runs, by a message that helps."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax import _dispatch, _ffi


def _shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(q, k, v=None, **settings):
    """Checks alone: nothing is allocated for the shapes."""
    v = k if v is None else v
    return jax.eval_shape(lambda *x: tk_jax.attention(*x, **settings), q, k, v)


def _exactly(message):
    """The whole message; jax may add a paragraph of its own."""
    return rf"^{re.escape(message)}(\n-----|$)"


Q, K = _shape(2, 128, 8, 64), _shape(2, 96, 2, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            Q,
            _shape(2, 128, 2, 32),
            None,
            "attention: k has shape (2, 128, 2, 32); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            _shape(3, 96, 2, 64),
            None,
            "attention: k has shape (3, 96, 2, 64); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            _shape(96, 2, 64),
            None,
            "attention: k has shape (96, 2, 64); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            K,
            _shape(2, 97, 2, 64),
            "attention: v has shape (2, 97, 2, 64); "
            "expected (2, 96, 2, 64) to match k (2, 96, 2, 64)",
        ),
        (
            Q,
            K,
            _shape(2, 96, 2, 128),
            "attention: v has shape (2, 96, 2, 128); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            _shape(128, 64),
            K,
            None,
            "attention: q has shape (128, 64); "
            "expected [..., T, H, D], at least 3 dimensions",
        ),
        (
            Q,
            _shape(2, 96, 3, 64),
            None,
            "attention: k has 3 heads (K); expected a divisor of the 8 heads (H) of q",
        ),
        (
            _shape(2, 0, 8, 64),
            K,
            None,
            "attention: q has shape (2, 0, 8, 64); expected T to be at least 1",
        ),
        (
            Q,
            _shape(2, 0, 2, 64),
            None,
            "attention: k has shape (2, 0, 2, 64); expected S to be at least 1",
        ),
        (
            _shape(2, 128, 0, 64),
            _shape(2, 96, 0, 64),
            None,
            "attention: q has shape (2, 128, 0, 64); expected H to be at least 1",
        ),
        (
            Q,
            _shape(2, 96, 0, 64),
            None,
            "attention: k has shape (2, 96, 0, 64); expected K to be at least 1",
        ),
        (
            _shape(2, 128, 8, 0),
            _shape(2, 96, 2, 0),
            None,
            "attention: q has shape (2, 128, 8, 0); expected D to be at least 1",
        ),
        (
            _shape(2**31, 1, 64),
            _shape(1, 1, 64),
            None,
            "attention: q has shape (2147483648, 1, 64); "
            "expected fewer than 2**31 rows",
        ),
        (
            _shape(1, 1, 64),
            _shape(2**31, 1, 64),
            None,
            "attention: k has shape (2147483648, 1, 64); "
            "expected fewer than 2**31 rows",
        ),
        (
            Q,
            _shape(2, 96, 2, 64, dtype=jnp.float32),
            None,
            "attention: k has dtype float32; expected bfloat16 to match q",
        ),
        (
            Q,
            K,
            _shape(2, 96, 2, 64, dtype=jnp.float16),
            "attention: v has dtype float16; expected bfloat16 to match q",
        ),
        (
            _shape(2, 128, 8, 64, dtype=jnp.int32),
            K,
            None,
            "attention: q has dtype int32; "
            "expected one of bfloat16, float16, float32, float64",
        ),
        (
            _shape(2, 128, 8, 64, dtype=jnp.float8_e4m3fn),
            K,
            None,
            "attention: q has dtype float8_e4m3fn; "
            "expected one of bfloat16, float16, float32, float64",
        ),
    ],
)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_shapes_and_dtypes_that_do_not_fit(q, k, v, message, implementation):
    with pytest.raises(ValueError, match=_exactly(message)):
        _call(q, k, v, implementation=implementation)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"implementation": "interpret"},
            ValueError,
            "attention: implementation is 'interpret'; "
            "expected one of None, 'tk', 'xla'",
        ),
        (
            {"causal_align": "bottom"},
            ValueError,
            "attention: causal_align is 'bottom'; "
            "expected one of 'top_left', 'bottom_right'",
        ),
        (
            {"scale": float("nan")},
            ValueError,
            "attention: scale is nan; expected a finite number",
        ),
        (
            {"scale": np.ones(2)},
            ValueError,
            "attention: scale is array([1., 1.]); expected a finite number",
        ),
        (
            {"scale": "big"},
            TypeError,
            "attention: scale is of type str; expected a Python number",
        ),
        (
            {"is_causal": 1},
            TypeError,
            "attention: is_causal is of type int; expected a Python bool",
        ),
        (
            {"return_lse": "yes"},
            TypeError,
            "attention: return_lse is of type str; expected a Python bool",
        ),
        (
            {"deterministic": None},
            TypeError,
            "attention: deterministic is of type NoneType; expected a Python bool",
        ),
    ],
)
def test_settings_that_are_wrong(settings, error, message):
    with pytest.raises(error, match=_exactly(message)):
        _call(Q, K, **settings)


def test_a_traced_scale():
    q = jnp.ones((1, 4, 2, 64))
    with pytest.raises(TypeError, match="a traced value: multiply the input by it"):
        jax.jit(lambda s: tk_jax.attention(q, q, q, scale=s))(0.5)


def test_scale_may_be_any_static_number():
    q = jnp.ones((1, 4, 2, 64))
    expected = tk_jax.attention(q, q, q, scale=2.0)
    for scale in (2, np.float32(2), np.array(2.0), jnp.asarray(2.0)):
        np.testing.assert_array_equal(
            tk_jax.attention(q, q, q, scale=scale), expected, str(type(scale))
        )


@pytest.mark.parametrize("value", [[[[1.0]]], 1.0, None, "q"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs_that_are_no_arrays(name, value):
    inputs = {x: np.ones((3, 2, 4), np.float32) for x in "qkv"}
    message = (
        f"attention: {name} is of type {type(value).__name__}; "
        "expected a jax or numpy array"
    )
    with pytest.raises(TypeError, match=_exactly(message)):
        tk_jax.attention(**{**inputs, name: value})


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (
            _shape(2, 8, 2, 64, dtype=jnp.float32),
            _shape(2, 8, 2, 64, dtype=jnp.float32),
            "dtype float32 (it takes bfloat16 and float16)",
        ),
        (
            _shape(2, 8, 2, 96),
            _shape(2, 8, 2, 96),
            "head dim 96 (it takes 64 and 128)",
        ),
        (
            _shape(70_000, 8, 1, 64),
            _shape(70_000, 8, 1, 64),
            "a batch of 70000 (it takes up to 65535)",
        ),
        (
            _shape(8, 70_000, 64),
            _shape(8, 70_000, 64),
            "a number of heads of 70000 (it takes up to 65535)",
        ),
        (
            _shape(1024, 2**21, 1, 64),
            _shape(1024, 8, 1, 64),
            "a B * H * T of 2147483648 (it takes up to 2147483647)",
        ),
        (
            _shape(1024, 8, 2, 64),
            _shape(1024, 2**20, 2, 64),
            "a B * K * S of 2147483648 (it takes up to 2147483647)",
        ),
    ],
)
def test_what_the_kernel_lacks(q, k, message, monkeypatch):
    monkeypatch.setattr(_ffi, "extension", lambda: None)
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    expected = (
        f"attention: implementation='tk' does not support {message}; "
        "use implementation=None or implementation='xla'"
    )
    with pytest.raises(NotImplementedError, match=_exactly(expected)):
        _call(q, k, implementation="tk")
    choice = tk_jax.explain(tk_jax.attention, q, k, k)
    assert (choice.cuda, choice.elsewhere) == ("xla", "xla")
    assert choice.reason == f"the TK kernel does not support {message}"


def test_vmap_that_makes_the_batch_too_large(monkeypatch):
    monkeypatch.setattr(_ffi, "extension", lambda: None)
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q = _shape(300, 300, 1, 1, 64)
    with pytest.raises(
        NotImplementedError, match=r"a batch of 90000 .* map over fewer"
    ):
        jax.eval_shape(jax.vmap(lambda x: tk_jax.attention(x, x, x)), q)


def test_the_kernel_without_a_gpu():
    if jax.default_backend() == "gpu" or _ffi.unavailable():
        pytest.skip("needs the extension and no GPU")
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    for call in (
        tk_jax.attention,
        jax.jit(tk_jax.attention, static_argnames="implementation"),
    ):
        with pytest.raises(
            NotImplementedError, match="implementation='tk' needs an NVIDIA Hopper GPU"
        ):
            call(q, q, q, implementation="tk")


def test_an_installation_without_the_extension(monkeypatch):
    monkeypatch.setattr(_ffi, "_extension", None)
    monkeypatch.setattr(_ffi, "_import_error", "no such file", raising=False)
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"no such file.*pip install"):
        tk_jax.attention(q, q, q, implementation="tk")
    np.testing.assert_array_equal(tk_jax.attention(q, q, q), q)
    assert "no such file" in tk_jax.explain(tk_jax.attention, q, q, q).reason


class _Gpu:
    device_kind = "NVIDIA A100"
    compute_capability = "8.0"


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Python believes in a GPU; what is compiled is still for the CPU."""
    monkeypatch.setattr(_ffi, "extension", lambda: None)
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [_Gpu()])
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_a_gpu_that_is_not_hopper(pretend_gpu):
    reason = r"the GPU NVIDIA A100 of compute capability 8\.0 \(it needs Hopper, 9\.0\)"
    with pytest.raises(NotImplementedError, match=reason):
        _call(Q, K, implementation="tk")
    with pytest.warns(tk_jax.FallbackWarning, match=reason):
        _call(Q, K)


def test_a_fallback_on_a_gpu_warns_once_per_reason(pretend_gpu, monkeypatch):
    monkeypatch.setattr(_Gpu, "compute_capability", "9.0")
    float32 = _shape(1, 8, 2, 64, dtype=jnp.float32)
    odd = _shape(1, 8, 2, 48)
    with pytest.warns(tk_jax.FallbackWarning) as caught:
        for _ in range(3):
            _call(float32, float32)
            _call(odd, odd)
    assert [str(w.message).split(".")[0] for w in caught] == [
        "attention runs its XLA implementation: the TK kernel does not support "
        "dtype float32 (it takes bfloat16 and float16)",
        "attention runs its XLA implementation: the TK kernel does not support "
        "head dim 48 (it takes 64 and 128)",
    ]
    # It points at the line that called attention, here in _call.
    assert all(w.filename == __file__ for w in caught)


def test_no_warning_where_xla_was_asked_for_or_no_gpu_is(pretend_gpu, monkeypatch):
    float32 = _shape(1, 8, 2, 64, dtype=jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call(float32, float32, implementation="xla")
        monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
        _call(float32, float32)


def test_explain_says_it_in_words():
    q = jnp.ones((1, 4, 2, 64), jnp.float32)
    text = str(tk_jax.explain(tk_jax.attention, q, q, q))
    assert "on an NVIDIA GPU  xla" in text and "dtype float32" in text
    assert repr(tk_jax.explain(tk_jax.attention, q, q, q, implementation="xla")) == (
        "attention with implementation='xla' runs\n"
        "  on an NVIDIA GPU  xla: the XLA implementation\n"
        "  elsewhere         xla: the XLA implementation\n"
        f"  {'here (' + jax.default_backend() + ')':<16}  xla: the XLA implementation\n"
        "because implementation='xla' asks for it"
    )
    with pytest.raises(
        ValueError, match=r"explain: op is .*; expected one of attention"
    ):
        tk_jax.explain(jnp.dot, q, q)
    with pytest.raises(ValueError, match="attention: k has shape"):
        tk_jax.explain(tk_jax.attention, q, q[0], q)
