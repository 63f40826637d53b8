"""Wrong input to the recurrent ops, and what runs: messages that help."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_ops import OPS, SETTINGS, inputs

import tk_jax
from tk_jax import _dispatch, _ffi


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _exactly(message):
    """The whole message; jax may add a paragraph of its own."""
    return rf"^{re.escape(message)}(\n-----|$)"


def _call(op, changes, settings=None):
    """Checks alone: nothing is computed."""
    arrays = inputs(op) | changes
    given = {name: x for name, x in arrays.items() if x is not None}
    settings = SETTINGS[op] | (settings or {})
    return jax.eval_shape(lambda x: getattr(tk_jax, op)(**x, **settings), given)


SHAPES = [
    (
        "linear_attention",
        {"k": _shape(2, 5, 2, 9)},
        "k has shape (2, 5, 2, 9); expected (2, 5, 2, 8) to match q (2, 5, 2, 8)",
    ),
    (
        "linear_attention",
        {"q": _shape(2, 8)},
        "q has shape (2, 8); expected [..., T, G, K], at least 3 dimensions",
    ),
    (
        "linear_attention",
        {"q": _shape(2, 0, 2, 8)},
        "q has shape (2, 0, 2, 8); expected T to be at least 1",
    ),
    (
        "linear_attention",
        {"v": _shape(2, 4, 4, 6)},
        "v has shape (2, 4, 4, 6); expected (2, 5, H, V) to match q (2, 5, 2, 8)",
    ),
    (
        "linear_attention",
        {"v": _shape(2, 5, 3, 6)},
        "q has 2 heads (G); expected a divisor of the 3 heads (H) of v",
    ),
    (
        "linear_attention",
        {"v": _shape(2, 5, 4, 6, dtype=jnp.bfloat16)},
        "v has dtype bfloat16; expected float32 to match q",
    ),
    (
        "linear_attention",
        {"q": _shape(2, 5, 2, 8, dtype=jnp.int32)},
        "q has dtype int32; expected one of bfloat16, float16, float32, float64",
    ),
    (
        "linear_attention",
        {"log_decay": _shape(2, 5, 3)},
        "log_decay has shape (2, 5, 3); expected (2, 5, 4) or (4,) "
        "to match v (2, 5, 4, 6)",
    ),
    (
        "linear_attention",
        {"log_decay": _shape(4, dtype=jnp.int32)},
        "log_decay has dtype int32; expected a floating-point dtype",
    ),
    (
        "linear_attention",
        {"initial_state": _shape(2, 4, 6, 8)},
        "initial_state has shape (2, 4, 6, 8); expected (2, 4, 8, 6) "
        "to match v (2, 5, 4, 6)",
    ),
    (
        "linear_attention",
        {"initial_state": _shape(2, 4, 8, 6, dtype=jnp.bfloat16)},
        "initial_state has dtype bfloat16; expected float32",
    ),
    (
        "linear_attention",
        {"segment_ids": _shape(2, 5)},
        "segment_ids has dtype float32; expected int32",
    ),
    (
        "linear_attention",
        {"segment_ids": _shape(2, 1, dtype=jnp.int32)},
        "segment_ids has shape (2, 1); expected one that broadcasts to (2, 5), "
        "with 5 last",
    ),
    (
        "ssd",
        {"dt": _shape(2, 5, 1)},
        "dt has shape (2, 5, 1); expected (2, 5, 4) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"A": _shape(4, 8)},
        "A has shape (4, 8); expected (4,) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"B": _shape(2, 5, 8)},
        "B has shape (2, 5, 8); expected (2, 5, G, N) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"B": _shape(2, 5, 3, 8), "C": _shape(2, 5, 3, 8)},
        "B has 3 groups (G); expected a divisor of the 4 heads (H) of x",
    ),
    (
        "ssd",
        {"B": _shape(2, 5, 2, 0), "C": _shape(2, 5, 2, 0)},
        "B has shape (2, 5, 2, 0); expected N to be at least 1",
    ),
    (
        "ssd",
        {"C": _shape(2, 5, 2, 7)},
        "C has shape (2, 5, 2, 7); expected (2, 5, 2, 8) to match B (2, 5, 2, 8)",
    ),
    (
        "ssd",
        {"C": _shape(2, 5, 2, 8, dtype=jnp.float16)},
        "C has dtype float16; expected float32 to match x",
    ),
    (
        "ssd",
        {"D": _shape(6)},
        "D has shape (6,); expected (4,) or (4, 6) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"z": _shape(2, 5, 4, 1)},
        "z has shape (2, 5, 4, 1); expected (2, 5, 4, 6) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"z": _shape(2, 5, 4, 6, dtype=jnp.bfloat16)},
        "z has dtype bfloat16; expected float32 to match x",
    ),
    (
        "ssd",
        {"dt_bias": _shape(1)},
        "dt_bias has shape (1,); expected (4,) to match x (2, 5, 4, 6)",
    ),
    (
        "ssd",
        {"initial_state": _shape(2, 4, 8, 6)},
        "initial_state has shape (2, 4, 8, 6); expected (2, 4, 6, 8) "
        "to match x (2, 5, 4, 6) and B (2, 5, 2, 8)",
    ),
    (
        "based_attention",
        {"q": _shape(2, 5, 2, 12), "k": _shape(2, 5, 2, 12)},
        "q has shape (2, 5, 2, 12); expected D to be 8, 16, 24 or 32",
    ),
    (
        "based_attention",
        {"initial_state": (_shape(2, 4, 45, 6), _shape(2, 4, 44))},
        "initial_state.normalizer has shape (2, 4, 44); expected (2, 4, 45) "
        "to match v (2, 5, 4, 6)",
    ),
    (
        "based_attention",
        {"initial_state": (_shape(2, 4, 45, 6),)},
        "initial_state has 1 arrays; expected sums, normalizer",
    ),
    (
        "hedgehog_attention",
        {"k": _shape(2, 5, 3, 8), "v": _shape(2, 5, 3, 6)},
        "k has 3 heads (K); expected a divisor of the 4 heads (H) of q",
    ),
    (
        "hedgehog_attention",
        {"v": _shape(2, 5, 4, 6)},
        "v has shape (2, 5, 4, 6); expected (2, 5, 2, V) to match k (2, 5, 2, 8)",
    ),
    (
        "hedgehog_attention",
        {"q_map": _shape(2, 8, 3)},
        "q_map has shape (2, 8, 3); expected (4, 8, F) to match q (2, 5, 4, 8)",
    ),
    (
        "hedgehog_attention",
        {"k_map": _shape(2, 8, 4)},
        "k_map has shape (2, 8, 4); expected (2, 8, 3) "
        "to match k (2, 5, 2, 8) and q_map (4, 8, 3)",
    ),
    (
        "hedgehog_attention",
        {"alpha": _shape(2)},
        "alpha has shape (2,); expected (4,) or () to match q (2, 5, 4, 8)",
    ),
    (
        "hedgehog_attention",
        {"beta": _shape(4, dtype=jnp.int32)},
        "beta has dtype int32; expected a floating-point dtype",
    ),
    (
        "hedgehog_attention",
        {
            "initial_state": tk_jax.HedgehogState(
                _shape(2, 2, 6, 6),
                _shape(2, 2, 6),
                _shape(2, 9, 2, 8),
                _shape(2, 10, 2, 6),
                _shape(2, dtype=jnp.int32),
            )
        },
        "initial_state.keys has shape (2, 9, 2, 8); expected (2, 10, 2, 8) "
        "to match k (2, 5, 2, 8), v (2, 5, 2, 6) and window 5",
    ),
]


@pytest.mark.parametrize(("op", "changes", "message"), SHAPES)
def test_shapes_and_dtypes(op, changes, message):
    with pytest.raises(ValueError, match=_exactly(f"{op}: {message}")):
        _call(op, changes)


TYPES = [
    ("linear_attention", "normalize", 1, "of type int; expected a Python bool"),
    ("linear_attention", "scale", "1", "of type str; expected a Python number"),
    ("linear_attention", "q", [1.0], "of type list; expected a jax or numpy array"),
    ("linear_attention", "v", None, "of type NoneType; expected a jax or numpy array"),
    ("ssd", "dt", None, "of type NoneType; expected a jax or numpy array"),
    ("ssd", "z", (1.0, 2.0), "of type tuple; expected a jax or numpy array"),
    (
        "hedgehog_attention",
        "beta",
        None,
        "of type NoneType; expected a jax or numpy array",
    ),
    ("ssd", "dt_softplus", None, "of type NoneType; expected a Python bool"),
    ("ssd", "D", 1.0, "of type float; expected a jax or numpy array"),
    ("ssd", "return_final_state", 0, "of type int; expected a Python bool"),
    ("hedgehog_attention", "window", 2.0, "of type float; expected a Python int"),
    ("hedgehog_attention", "alpha", "1", "of type str; expected a jax or numpy array"),
]


@pytest.mark.parametrize(("op", "name", "value", "message"), TYPES)
def test_types(op, name, value, message):
    arrays = SETTINGS[op] | inputs(op) | {name: value}
    with pytest.raises(TypeError, match=_exactly(f"{op}: {name} is {message}")):
        getattr(tk_jax, op)(**arrays)


VALUES = [
    (
        "linear_attention",
        {"scale": float("nan")},
        "scale is nan; expected a finite number",
    ),
    (
        "ssd",
        {"dt_limit": (1.0, 0.5)},
        "dt_limit is (1.0, 0.5); expected the least number first",
    ),
    (
        "ssd",
        {"dt_limit": (0.0, float("nan"))},
        "dt_limit[1] is nan; expected a finite number",
    ),
    (
        "ssd",
        {"dt_limit": (1e300, float("inf"))},
        "dt_limit[0] is 1e+300; expected a finite number of float32",
    ),
    (
        "ssd",
        {"dt_limit": (0, 1e39)},
        "dt_limit[1] is 1e+39; expected a finite number of float32",
    ),
    (
        "ssd",
        {"dt_limit": (float("inf"), float("inf"))},
        "dt_limit[0] is inf; expected a finite number",
    ),
    *(
        (op, {"scale": -1e39}, "scale is -1e+39; expected a finite number of float32")
        for op in ("linear_attention", "based_attention", "hedgehog_attention")
    ),
    ("hedgehog_attention", {"window": 0}, "window is 0; expected at least 1"),
    (
        "based_attention",
        {"implementation": "cuda"},
        "implementation is 'cuda'; expected one of None, 'tk', 'xla', 'interpret'",
    ),
]


@pytest.mark.parametrize(("op", "settings", "message"), VALUES)
def test_values_of_settings(op, settings, message):
    with pytest.raises(ValueError, match=_exactly(f"{op}: {message}")):
        _call(op, {}, settings)


@pytest.mark.parametrize("of", [float, np.float32, jnp.float32, np.array])
def test_limits_that_limit_nothing(of):
    arrays = inputs("ssd") | {"dt": -inputs("ssd")["dt"]}
    settings = {"implementation": "xla"}
    whole = tk_jax.ssd(**arrays, **settings, dt_limit=(-1e30, 1e30))
    for limit in ((of(-np.inf), of(np.inf)), (of(-1e30), of(np.inf))):
        got = tk_jax.ssd(**arrays, **settings, dt_limit=limit)
        np.testing.assert_array_equal(got, whole)
    half = tk_jax.ssd(**arrays, **settings, dt_limit=(0, of(np.inf)))
    np.testing.assert_array_equal(half, tk_jax.ssd(**arrays, **settings))
    assert not np.array_equal(half, whole)


def test_numbers_of_float64():
    """Beside inputs of float64, what float32 cannot hold is a number too."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), inputs("ssd"))
        tk_jax.explain(tk_jax.ssd, **arrays, dt_limit=(0, 1e39))
        q = _shape(5, 1, 8, dtype=jnp.float64)
        tk_jax.explain(tk_jax.linear_attention, q, q, q, scale=1e39)


def test_a_limit_that_is_no_pair():
    with pytest.raises(TypeError, match=r"ssd: dt_limit is 1.0; expected a pair"):
        _call("ssd", {}, {"dt_limit": 1.0})


@pytest.mark.parametrize(
    ("op", "state", "message"),
    [
        (
            "linear_attention",
            (_shape(2, 4, 8, 6), _shape(2, 4, 8)),
            "initial_state is of type tuple; expected one array",
        ),
        (
            "based_attention",
            _shape(2, 4, 45, 6),
            "expected a tuple of sums, normalizer",
        ),
        (
            "hedgehog_attention",
            _shape(2, 2, 6, 6),
            "expected a tuple of sums, normalizer, keys, values, length",
        ),
    ],
)
def test_states_of_another_kind(op, state, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        _call(op, {"initial_state": state})


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("linear_attention", "one array"),
        ("based_attention", "a tuple of sums, normalizer"),
    ],
)
def test_a_list_is_no_state(op, expected):
    message = f"{op}: initial_state is of type list; expected {expected}"
    with pytest.raises(TypeError, match=_exactly(message)):
        getattr(tk_jax, op)(**inputs(op) | {"initial_state": [jnp.zeros(3)]})


@pytest.mark.parametrize(
    ("op", "names", "message"),
    [
        (
            "linear_attention_step",
            ("q", "k", "v"),
            "state has shape (3,); expected (2, 4, 8, 6) to match v (2, 4, 6)",
        ),
        (
            "ssd_step",
            ("x", "dt", "A", "B", "C"),
            "state has shape (3,); expected (2, 4, 6, 8) "
            "to match x (2, 4, 6) and B (2, 2, 8)",
        ),
    ],
)
def test_states_of_steps(op, names, message):
    arrays = inputs(op.removesuffix("_step"))
    given = [x[:, 0] if x.ndim > 2 else x for x in (arrays[name] for name in names)]
    with pytest.raises(ValueError, match=_exactly(f"{op}: {message}")):
        getattr(tk_jax, op)(*given, jnp.zeros(3))


NO_FLOAT32 = "dtype float32 (it takes bfloat16 and float16)"
LACKING = {
    "linear_attention": NO_FLOAT32,
    "ssd": NO_FLOAT32,
    "based_attention": NO_FLOAT32,
    "hedgehog_attention": NO_FLOAT32,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["tk", "interpret"])
def test_what_kernels_lack(op, implementation, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    lacking = LACKING[op]
    advice = {"tk": "; use implementation=None or implementation='xla'"}
    message = (
        f"{op}: implementation='{implementation}' does not support {lacking}"
        + advice.get(implementation, "")
    )
    with pytest.raises(NotImplementedError, match=_exactly(message)):
        _call(op, {}, {"implementation": implementation})
    shapes = jax.eval_shape(lambda: inputs(op))
    choice = tk_jax.explain(getattr(tk_jax, op), **shapes, **SETTINGS[op])
    assert (choice.op, choice.cuda, choice.elsewhere) == (op, "xla", "xla")
    assert choice.reason == f"the TK kernel does not support {lacking}"
    assert f"{op} with implementation=None runs" in str(choice)


def test_a_gpu_is_told_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(_dispatch, "_unsupported_gpu", lambda: None)
    monkeypatch.setattr(_dispatch, "_warned", set())
    with pytest.warns(tk_jax.FallbackWarning, match="ssd runs its XLA implementation"):
        _call("ssd", {})
    _call("ssd", {})
