"""What attention lowers to for CUDA: kernels, how often, and nothing beside them."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import tk_jax
from tk_jax import _ffi, checkpoint_policies
from tk_jax.ops.attention import tiling

FORWARD, BACKWARD = "tk_attention_fwd_v1", "tk_attention_bwd_v1"
# Sizes that no other dimension has, so that a tensor of scores would show.
T, S = 160, 224
Q = jax.ShapeDtypeStruct((2, T, 8, 64), jnp.bfloat16)
K = jax.ShapeDtypeStruct((2, S, 2, 64), jnp.bfloat16)


@pytest.fixture(autouse=True)
def _needs_extension():
    if _ffi.unavailable():
        pytest.skip(_ffi.unavailable())


def _lowered(fn, *args, platforms=("cuda",)):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text()


def _count(text, target):
    """How often a program calls ``target``, through all its functions."""
    bodies = dict(
        re.findall(r"func\.func \w+ @([\w.]+)\(.*?\n(.*?)\n  }", text, re.DOTALL)
    )
    calls = {
        name: collections.Counter(re.findall(r"call @([\w.]+)", body))
        for name, body in bodies.items()
    }

    @functools.cache
    def count(name):
        if name not in bodies:  # A custom call.
            return int(name == target)
        return sum(n * count(callee) for callee, n in calls[name].items())

    return count("main")


def _loss(q, k, v, **settings):
    result = tk_jax.attention(q, k, v, **settings)
    return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(result))


def _gradient(**settings):
    return jax.grad(functools.partial(_loss, **settings), (0, 1, 2))


@pytest.mark.parametrize("implementation", [None, "tk"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_one_call_each_and_nothing_beside(implementation, return_lse):
    settings = {"implementation": implementation, "return_lse": return_lse}
    forward = _lowered(functools.partial(tk_jax.attention, **settings), Q, K, K)
    backward = _lowered(_gradient(**settings), Q, K, K)
    assert (_count(forward, FORWARD), _count(forward, BACKWARD)) == (1, 0)
    assert (_count(backward, FORWARD), _count(backward, BACKWARD)) == (1, 1)
    for text in (forward, backward):
        assert "stablehlo.transpose" not in text
        assert "stablehlo.dot_general" not in text
        assert "stablehlo.while" not in text
        assert not re.search(rf"{T}x{S}|{S}x{T}", text)


def test_the_search_for_scores_would_find_them():
    text = _lowered(jax.nn.dot_product_attention, Q, K, K)
    assert re.search(rf"{T}x{S}|{S}x{T}", text)


def test_other_platforms_have_no_call():
    for text in (
        _lowered(_gradient(), Q, K, K, platforms=("cpu",)),
        _lowered(_gradient(implementation="xla"), Q, K, K),
    ):
        assert "tk_attention" not in text and "stablehlo.while" in text


def test_one_program_for_two_platforms():
    text = _lowered(_gradient(), Q, K, K, platforms=("cpu", "cuda"))
    assert FORWARD in text and BACKWARD in text and "stablehlo.while" in text


def test_settings_reach_the_call():
    text = _lowered(_gradient(scale=0.25, deterministic=False), Q, K, K)
    forward, backward = (
        re.search(rf"@{target}\(.*", text)[0] for target in (FORWARD, BACKWARD)
    )
    for call, tiles in (
        (forward, tiling.forward_config(64, 64, 97)),
        (backward, tiling.backward_config(64, 64)),
    ):
        assert "scale = 2.500000e-01 : f32" in call
        assert "is_causal = false" in call and "bottom_right = false" in call
        assert "deterministic = false" in call
        for name in ("block_q", "block_kv", "stages"):
            assert f"{name} = {getattr(tiles, name)} : i64" in call
    text = _lowered(
        functools.partial(
            tk_jax.attention, is_causal=True, causal_align="bottom_right"
        ),
        Q,
        K,
        K,
    )
    assert "is_causal = true" in text and "bottom_right = true" in text
    assert "deterministic = true" in text


@pytest.mark.parametrize(
    ("return_lse", "dlse"), [(False, "0xf32"), (True, "2x160x8xf32")]
)
def test_operands_and_results(return_lse, dlse):
    text = _lowered(_gradient(return_lse=return_lse), Q, K, K)
    q, k = "2x160x8x64xbf16", "2x224x2x64xbf16"
    assert _types(text, FORWARD) == [[q, k, k], [q, "2x160x8xf32", "2x0x8xf32"]]
    operands, results = _types(text, BACKWARD)
    assert operands == [q, k, k, q, "2x160x8xf32", q, dlse]
    rows = "2x8x256"  # T rounded up to 128.
    workspaces = [f"{rows}xf32", f"{rows}xf32", f"{rows}x64xf32", "2x8x4xi32"]
    assert results == [q, k, k, *workspaces]


def test_beside_a_bias_what_rounding_took_off_lse_is_a_result():
    def run(q, k, bias):
        return tk_jax.attention(q, k, k, bias=bias)

    bias = jax.ShapeDtypeStruct((8, T, K.shape[1]), jnp.bfloat16)
    _, (_, lse, lse_rest) = _types(_lowered(run, Q, K, bias), FORWARD)
    assert lse == lse_rest == "2x160x8xf32"


def _types(text, target):
    call = re.search(rf"@{target}\(.*? : \((.*?)\) -> (.*)", text)
    return [re.findall(r"tensor<(.*?)>", side) for side in call.groups()]


def test_batch_dimensions_are_folded_without_copies():
    q = jax.ShapeDtypeStruct((3, 2, T, 8, 64), jnp.float16)
    text = _lowered(_gradient(), q, q, q)
    assert _types(text, FORWARD)[0] == ["6x160x8x64xf16"] * 3
    single = jax.ShapeDtypeStruct((T, 8, 64), jnp.float16)
    assert (
        _types(_lowered(_gradient(), single, single, single), BACKWARD)[1][:3]
        == ["1x160x8x64xf16"] * 3
    )


@pytest.mark.parametrize(
    "in_axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)], ids=str
)
def test_vmap_makes_one_larger_batch(in_axes):
    def mapped(x, axis):
        return x if axis is None else jax.ShapeDtypeStruct((5, *x.shape), x.dtype)

    inputs = [mapped(x, axis) for x, axis in zip((Q, K, K), in_axes, strict=True)]
    text = _lowered(jax.vmap(_gradient(), in_axes), *inputs)
    assert (_count(text, FORWARD), _count(text, BACKWARD)) == (1, 1)
    q, k = "10x160x8x64xbf16", "10x224x2x64xbf16"
    assert _types(text, FORWARD)[0] == [q, k, k]
    assert _types(text, BACKWARD)[0][-1] == "0xf32"


def test_nested_vmap_and_vmap_of_unmapped_dlse():
    q = jax.ShapeDtypeStruct((3, 5, *Q.shape), Q.dtype)
    k = jax.ShapeDtypeStruct((3, 5, *K.shape), K.dtype)
    text = _lowered(jax.vmap(jax.vmap(_gradient(return_lse=True))), q, k, k)
    assert (_count(text, FORWARD), _count(text, BACKWARD)) == (1, 1)
    assert _types(text, BACKWARD)[0][-1] == "30x160x8xf32"


def _layers(x, policy):
    """Two layers in a scan; ``policy`` False for none, else of ``jax.checkpoint``."""

    def layer(x, _):
        return x + tk_jax.attention(x, x, x, is_causal=True), None

    if policy is not False:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.lax.scan(layer, x, None, length=2)[0].astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [
        (False, 1),
        (None, 2),
        (checkpoint_policies.save_attention, 1),
        (checkpoint_policies.save_attention_and_dots, 1),
        (jax.checkpoint_policies.dots_saveable, 2),
    ],
)
def test_remat_in_a_scan_runs_the_forward_pass_as_often_as_its_policy_says(
    policy, forwards
):
    text = _lowered(jax.grad(functools.partial(_layers, policy=policy)), Q)
    assert (_count(text, FORWARD), _count(text, BACKWARD)) == (forwards, 1)
    # Neither the scores nor the chunks of the XLA form are kept for the backward loop.
    assert not re.search(rf"{T}x{T}x", text)


def test_residuals_are_the_kernels_alone():
    def residuals(x):
        return jax.vjp(lambda x: tk_jax.attention(x, x, x), x)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, Q))
    shapes = sorted((x.shape, x.dtype.name) for x in kept)
    assert set(shapes) == {(Q.shape, "bfloat16"), (Q.shape[:-1], "float32")}


def test_the_kernel_is_refused_for_other_platforms():
    with pytest.raises(NotImplementedError, match="this call is for cpu"):
        _lowered(_gradient(implementation="tk"), Q, K, K, platforms=("cpu",))
