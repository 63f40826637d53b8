"""Which implementation of attention runs: refusals, fallbacks, warnings, explain."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax import _dispatch, _ffi
from tk_jax.nn import dot_product_attention


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
    ("q", "k", "message"),
    [
        (
            _shape(2, 8, 2, 64, dtype=jnp.float32),
            _shape(2, 8, 2, 64, dtype=jnp.float32),
            "dtype float32 (it takes bfloat16 and float16)",
        ),
        (
            _shape(2, 8, 2, 100),
            _shape(2, 8, 2, 100),
            "head dim 100 (it takes multiples of 8 up to 256)",
        ),
        (
            _shape(2, 8, 2, 264),
            _shape(2, 8, 2, 264),
            "head dim 264 (it takes multiples of 8 up to 256)",
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
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q = _shape(300, 300, 1, 1, 64)

    def mapped(implementation):
        return jax.vmap(
            lambda x: tk_jax.attention(x, x, x, implementation=implementation)
        )

    with pytest.raises(
        NotImplementedError, match=r"a batch of 90000 .* map over fewer"
    ):
        jax.eval_shape(mapped("tk"), q)
    assert jax.eval_shape(mapped(None), q).shape == q.shape
    traced = jax.jit(mapped(None)).trace(q)
    assert "tk_attention" not in traced.lower(lowering_platforms=("cuda",)).as_text()


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
    odd = _shape(1, 8, 2, 50)
    with pytest.warns(tk_jax.FallbackWarning) as caught:
        for _ in range(3):
            _call(float32, float32)
            _call(odd, odd)
    assert [str(w.message).split(".")[0] for w in caught] == [
        "attention runs its XLA implementation: the TK kernel does not support "
        "dtype float32 (it takes bfloat16 and float16)",
        "attention runs its XLA implementation: the TK kernel does not support "
        "head dim 50 (it takes multiples of 8 up to 256)",
    ]
    # It points at the line that called attention, here in _call.
    assert all(w.filename == __file__ for w in caught)


def test_a_warning_points_at_the_line_that_calls_the_drop_in(pretend_gpu, monkeypatch):
    monkeypatch.setattr(_Gpu, "compute_capability", "9.0")
    x = jnp.ones((8, 2, 64))
    expected = inspect.currentframe().f_lineno + 2
    with pytest.warns(tk_jax.FallbackWarning) as caught:
        jax.eval_shape(lambda x: dot_product_attention(x, x, x), x)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, expected)]
    # And in a batch that vmap makes too large, beyond jax's own frames.
    x = _shape(310, 310, 1, 1, 64)
    with pytest.warns(tk_jax.FallbackWarning, match="a batch of 96100") as caught:
        jax.eval_shape(jax.vmap(lambda x: tk_jax.attention(x, x, x)), x)
    assert [w.filename for w in caught] == [__file__]


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


def test_explain_of_the_drop_in(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q, k = _shape(128, 8, 64), _shape(96, 2, 64)
    settings = {
        "bias": _shape(128, 96),
        "is_causal": 1,
        "scale": _shape(dtype=jnp.float32),
        "query_seq_lengths": jnp.ones(1, jnp.int32),
        "local_window_size": np.array([3, 0]),
        "return_residual": None,
    }
    choice = tk_jax.explain(dot_product_attention, q, k, k, **settings)
    assert (choice.cuda, choice.elsewhere) == ("tk", "xla")
    choice = tk_jax.explain(
        dot_product_attention, *(np.ones((4, 2, 64), np.float32),) * 3
    )
    assert (choice.cuda, choice.elsewhere) == ("xla", "xla")
    assert "dtype float32" in choice.reason
    with pytest.raises(ValueError, match="attention: v has shape"):
        tk_jax.explain(dot_product_attention, q, q, k)
    with pytest.raises(ValueError, match="implementation is 'cudnn'"):
        tk_jax.explain(dot_product_attention, q, k, k, implementation="cudnn")


@pytest.mark.parametrize("implementation", [None, "tk", "xla"])
def test_explain_of_an_empty_batch(implementation, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q = _shape(0, 8, 2, 64)
    choice = tk_jax.explain(tk_jax.attention, q, q, q, implementation=implementation)
    assert (choice.cuda, choice.elsewhere) == ("xla", "xla")
    asked = implementation == "xla"
    assert choice.reason == (
        "implementation='xla' asks for it"
        if asked
        else "the TK kernel has nothing to do in a batch of 0"
    )
