"""What explain says of the recurrent ops: what runs and why, or the call's error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_ops import OPS, SETTINGS, call, inputs

import tk_jax
from tk_jax import _dispatch, _ffi


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _half(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("q", "v", "settings", "lacking"),
    [
        (
            _half(1, 8, 1, 257),
            _half(1, 8, 1, 64),
            {},
            "keys of 257 dimensions (it takes up to 256)",
        ),
        (
            _half(1, 8, 1, 64, dtype=jnp.float16),
            _half(1, 8, 1, 64, dtype=jnp.float16),
            {"normalize": True},
            "normalize in float16 (of which the sums may exceed the range)",
        ),
        (
            _half(70000, 8, 1, 64),
            _half(70000, 8, 1, 64),
            {},
            "a batch of 70000 (it takes up to 65535)",
        ),
        (
            _half(1, 2**25, 1, 64),
            _half(1, 2**25, 64, 64),
            {},
            "a B * H * T times slices of 64 values of 2147483648 (it takes up to "
            "2147483647)",
        ),
    ],
    ids=str,
)
def test_what_kernels_of_linear_attention_lack(q, v, settings, lacking, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    choice = tk_jax.explain(tk_jax.linear_attention, q, q, v, **settings)
    assert choice.reason == f"the TK kernel does not support {lacking}"
    heads = _half(v.shape[2], dtype=jnp.float32)
    dt = _half(*v.shape[:3], dtype=jnp.float32)
    if not settings:
        choice = tk_jax.explain(tk_jax.ssd, v, dt, heads, q, q)
        assert choice.reason == f"the TK kernel does not support {lacking}"


@pytest.mark.parametrize(
    ("q", "v", "settings", "lacking"),
    [
        (
            _half(1, 8, 1, 16, dtype=jnp.float16),
            _half(1, 8, 1, 64, dtype=jnp.float16),
            {},
            "normalize in float16 (of which the sums may exceed the range)",
        ),
        (
            _half(70000, 8, 1, 16),
            _half(70000, 8, 1, 64),
            {},
            "a batch of 70000 (it takes up to 65535)",
        ),
        (
            _half(1, 8, 70000, 16),
            _half(1, 8, 70000, 64),
            {},
            "a number of groups of 70000 (it takes up to 65535)",
        ),
        (
            _half(1, 2**25, 1, 16),
            _half(1, 2**25, 64, 64),
            {"normalize": False},
            "a B * H * T times slices of 64 values of 2147483648 (it takes up to "
            "2147483647)",
        ),
    ],
    ids=str,
)
def test_what_kernels_of_based_attention_lack(q, v, settings, lacking, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    choice = tk_jax.explain(tk_jax.based_attention, q, q, v, **settings)
    assert choice.reason == f"the TK kernel does not support {lacking}"


def test_explain_checks_and_takes_positions():
    x = _shape(2, 4, 8)
    state = _shape(2, 4, 8, 8)
    choice = tk_jax.explain(
        tk_jax.linear_attention_step, x, x, x, state, implementation="xla"
    )
    assert choice.reason == "implementation='xla' asks for it"
    with pytest.raises(ValueError, match=r"state has shape \(2, 4, 8\)"):
        tk_jax.explain(tk_jax.linear_attention_step, x, x, x, x)


@pytest.mark.parametrize(
    ("op", "arguments", "wrong"),
    [
        ("linear_attention", {"q": None}, "q is of type NoneType"),
        ("linear_attention", {"log_decay": [0.0]}, "log_decay is of type list"),
        ("based_attention", {"v": [[1.0]]}, "v is of type list"),
        ("linear_attention_step", {"k": 1.0}, "k is of type float"),
    ],
    ids=str,
)
def test_explain_refuses_what_is_no_array(op, arguments, wrong):
    x = _shape(2, 4, 16)
    arguments = {"q": x, "k": x, "v": x} | arguments
    if op == "linear_attention_step":
        arguments["state"] = _shape(2, 4, 16, 16)
    with pytest.raises(TypeError, match=f"^{op}: {wrong}; expected a jax or"):
        tk_jax.explain(getattr(tk_jax, op), **arguments)


def _state(op, batch=2):
    """Of the call in recurrent_ops, or of its step."""
    arrays = inputs(op, batch=(batch,))
    run = lambda: call(op, **arrays, return_final_state=True)[1]  # noqa: E731
    return jax.eval_shape(run)


@pytest.mark.parametrize("op", OPS)
def test_states_of_numpy_are_converted_as_the_call_does(op):
    """Float64 becomes float32."""
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float64 if x.dtype == jnp.float32 else x.dtype),
        _state(op),
    )
    arrays = inputs(op) | {"initial_state": state}
    function = getattr(tk_jax, op)
    assert tk_jax.explain(function, **arrays, **SETTINGS[op]).op == op
    assert call(op, **arrays).dtype == jnp.float32


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("hedgehog_attention", {"alpha": [0.1] * 4}),
        ("hedgehog_attention", {"alpha": None}),
        ("hedgehog_attention", {"beta": "a"}),
        ("hedgehog_attention", {"beta": True}),
        ("hedgehog_attention", {"initial_state": (1.0,) * 5}),
        ("based_attention", {"initial_state": ([1.0], [2.0])}),
        ("based_attention", {"initial_state": [1.0]}),
        ("linear_attention", {"initial_state": 1.0}),
        ("linear_attention", {"initial_state": np.zeros(3)}),
        ("linear_attention", {"segment_ids": [0] * 5}),
        ("ssd", {"initial_state": "zeros"}),
        ("ssd", {"D": 1.0}),
        ("ssd", {"z": (1.0, 2.0)}),
    ],
    ids=str,
)
def test_errors_are_those_of_the_call(op, wrong):
    arrays = inputs(op) | wrong
    with pytest.raises((TypeError, ValueError), match=f"^{op}: ") as raised:
        call(op, **arrays)
    message = str(raised.value).split("\n")[0]
    with pytest.raises(raised.type, match=rf"^{re.escape(message)}(\n|$)"):
        tk_jax.explain(getattr(tk_jax, op), **arrays, **SETTINGS[op])


@pytest.mark.parametrize("weight", [1, 0.5, np.float32(0.5), np.ones(4), _shape(4)])
def test_weights_may_be_numbers(weight):
    arrays = inputs("hedgehog_attention") | {"alpha": weight}
    tk_jax.explain(tk_jax.hedgehog_attention, **arrays, window=5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", [None, "tk", "interpret"])
def test_an_empty_batch_runs_xla(op, implementation, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(_ffi, "interpreter", lambda: None)
    arrays = inputs(op, batch=(0,), dtype=jnp.bfloat16)
    settings = SETTINGS[op] | {"implementation": implementation}
    if op == "hedgehog_attention":
        settings["window"] = 64
        arrays |= {"q_map": jnp.ones((4, 8, 64)), "k_map": jnp.ones((2, 8, 64))}

    def explained(op, arrays):
        choice = tk_jax.explain(getattr(tk_jax, op), **arrays, **settings)
        assert choice.reason == "the TK kernel has nothing to do in a batch of 0"
        return choice.cuda, choice.elsewhere

    assert explained(op, arrays) == ("xla", "xla")
    out, state = getattr(tk_jax, op)(**arrays, **settings, return_final_state=True)
    assert out.size == 0
    step = {
        name: x[:, 0] if x.ndim > 2 and x.shape[0] == 0 else x
        for name, x in arrays.items()
        if name != "initial_state"
    }
    assert explained(f"{op}_step", step | {"state": state}) == ("xla", "xla")
    out, _ = getattr(tk_jax, f"{op}_step")(**step, **settings, state=state)
    assert out.size == 0


def test_an_empty_batch_on_a_gpu_is_no_fallback(monkeypatch, recwarn):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(_dispatch, "_unsupported_gpu", lambda: None)
    monkeypatch.setattr(_dispatch, "_warned", set())
    x = _shape(0, 5, 2, 8, dtype=jnp.bfloat16)
    jax.eval_shape(tk_jax.linear_attention, x, x, x)
    assert not recwarn.list
