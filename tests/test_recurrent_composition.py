"""What is made of linear attention's kernels, under jax's transformations.

The kernels themselves are their model here (recurrent_kernel_model.py).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrent_cases import QUICK, rounded
from recurrent_kernel_cases import (
    EXACT,
    LINEAR,
    PER_TOKEN,
    SSD,
    arrays_of,
    check,
    kernels,
    modelled,
)

import tk_jax
from tk_jax import _dispatch
from tk_jax.ops.linear_attention import config, scan, vjp

jit = functools.partial(jax.jit, compiler_options=QUICK)

PACKED = SSD(70, 16, 24, (1, 2), batch=2, skip="P", packed=True, gate=True)
CASES = [
    LINEAR(70, 6, 10, (2, 4), decay="mild", packed=True),
    LINEAR(70, 6, 10, (1, 2), "float16", decay="head", state=False),
    LINEAR(70, 6, 10, (1, 2), decay="head", normalize=True),
    PACKED,
]


def often(*indices):
    """All cases, of which those of other ``indices`` are marked exhaustive."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(x, marks=[] if i in indices else pytest.mark.exhaustive)
            for i, x in enumerate(CASES)
        ],
        ids=str,
    )


@pytest.fixture(autouse=True)
def model():
    with modelled():
        yield


def given(case) -> dict:
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    return {name: x for name, x in arrays.items() if x is not None}


def loss(case, arrays):
    """Depends on all results, unevenly."""
    results = kernels(case)(**arrays)
    return sum(
        jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(jnp.arange(x.shape[-1])))
        for x in jax.tree.leaves(results)
    )


def value_and_gradient(case):
    def run(arrays):
        ids = arrays.get("segment_ids")
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        others = {} if ids is None else {"segment_ids": ids}
        return jax.value_and_grad(lambda x: loss(case, {**x, **others}))(floats)

    return run


def scaled(arrays, scale):
    """Other arrays of the same dtypes, and other documents."""
    return jax.tree.map(
        lambda x: (
            (scale * x).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.roll(x, int(20 * scale), axis=-1)
        ),
        arrays,
    )


def assert_same(got, expected, tolerance=2e-2):
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        x, y = (np.float32(a) for a in (x, y))
        size = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, atol=tolerance * size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    check(kernels(case), case)


@pytest.mark.parametrize(
    ("chunks", "normalize"),
    [
        pytest.param(
            chunks,
            normalize,
            marks=[] if chunks == 1 + normalize else pytest.mark.exhaustive,
        )
        for chunks in (1, 2, 5)
        for normalize in (False, True)
    ],
)
def test_segments_of_any_length(chunks, normalize):
    case = LINEAR(300, 8, 8, (1, 1), decay="mild", packed=True, normalize=normalize)
    tiles = dataclasses.replace(
        config.scan_config(1, 300, 1, 1, 8, 8), chunks_of_segment=chunks
    )
    check(kernels(case, tiles), case)


def test_many_chunks_are_segments_by_default():
    case = LINEAR(64 * 20, 8, 8, (1, 1), decay="mild", packed=True)
    assert config.scan_config(1, case.seqlen, 1, 1, 8, 8).chunks_of_segment == 4
    check(kernels(case), case)


@often(3)
def test_vmap_over_all_arguments(case):
    arrays = given(case)
    both = [arrays, scaled(arrays, 0.5)]
    mapped = jax.tree.map(lambda *x: jnp.stack(x, 1 if x[0].ndim > 1 else 0), *both)
    axes = jax.tree.map(lambda x: 1 if x.ndim > 1 else 0, arrays)
    got = jit(jax.vmap(value_and_gradient(case), in_axes=(axes,)))(mapped)
    run = jit(value_and_gradient(case))
    for i, each in enumerate(both):
        assert_same(jax.tree.map(lambda x, i=i: x[i], got), run(each))


@often(0)
def test_vmap_over_each_argument(case):
    """Gradients of what is mapped and of what is not, which all elements share."""
    arrays = given(case)
    run = jit(value_and_gradient(case))
    for name, x in arrays.items():
        both = [x, scaled(x, 0.5)]
        mapped = jax.tree.map(lambda *x: jnp.stack(x), *both)
        axes = {other: 0 if other == name else None for other in arrays}
        got = jit(jax.vmap(value_and_gradient(case), in_axes=(axes,)))(
            arrays | {name: mapped}
        )
        for i, value in enumerate(both):
            expected = run(arrays | {name: value})
            assert_same(jax.tree.map(lambda x, i=i: x[i], got), expected)


def test_vmap_is_one_call_of_a_larger_batch(monkeypatch):
    seen = []
    outputs = scan.calls.outputs
    monkeypatch.setattr(
        scan.calls, "outputs", lambda *a, **k: seen.append(a[:5]) or outputs(*a, **k)
    )
    arrays = given(PACKED)
    without = {name: x for name, x in arrays.items() if name != "D"}
    mapped = {name: jnp.stack([x, x, x]) for name, x in without.items()}
    run = functools.partial(kernels(PACKED), D=arrays["D"])
    jax.eval_shape(jax.vmap(lambda arrays: run(**arrays)), mapped)
    (q, _, v, _, _) = seen[-1]
    assert (q.shape[0], v.shape[0]) == (6, 6)
    # Skips of their own: more heads.
    mapped = {name: jnp.stack([x, x, x]) for name, x in arrays.items()}
    ids = mapped.pop("segment_ids")[0]
    run = functools.partial(kernels(PACKED), segment_ids=ids)
    jax.eval_shape(jax.vmap(lambda arrays: run(**arrays)), mapped)
    (q, _, v, _, skip) = seen[-1]
    assert (q.shape[0], q.shape[2], v.shape[2]) == (2, 3, 6)
    assert skip.shape == (6, 64)  # whole slices


def test_vmap_beyond_the_kernels_batch_says_so():
    q = jnp.zeros((40000, 1, 1, 8), jnp.bfloat16)
    mapped = jax.ShapeDtypeStruct((2, *q.shape), q.dtype)
    run = functools.partial(tk_jax.linear_attention, implementation="interpret")
    with pytest.raises(NotImplementedError, match=r"a batch of 80000 .* map over few"):
        jax.eval_shape(jax.vmap(lambda q: run(q, q, q)), mapped)


def test_shard_map_over_batch_and_heads(cpu_devices):
    case = SSD(70, 16, 24, (2, 4), batch=2, skip="P", gate=True)
    arrays = given(case)
    mesh = jax.make_mesh(
        (2, 2), ("batch", "heads"), (AxisType.Auto,) * 2, devices=cpu_devices[:4]
    )

    def spec(name):
        if name in PER_TOKEN:
            return P("batch", None, "heads")
        return P("batch", "heads") if name == "initial_state" else P("heads")

    def run(arrays):
        return kernels(case)(**_dispatch.vary_together_in(arrays))[0]

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=({name: spec(name) for name in arrays},),
        out_specs=P("batch", None, "heads"),
    )

    def total(fn, arrays):
        return jnp.sum(jnp.sin(fn(arrays).astype(jnp.float32)))

    got, expected = (
        jit(jax.value_and_grad(functools.partial(total, fn)))(arrays)
        for fn in (sharded, run)
    )
    assert_same(got, expected)


def test_only_arguments_are_kept_between_the_passes():
    case = LINEAR(70, 6, 10, (1, 2), decay="head", normalize=True)
    arrays = given(case)
    choice = _dispatch.choose("linear_attention", "interpret", None)
    run = vjp.differentiable(
        choice,
        tk=lambda arrays: kernels(case)(**arrays),
        xla=lambda arrays: kernels(case)(**arrays),
    )
    kept = jax.eval_shape(lambda x: jax.vjp(run, x)[1], arrays)
    shapes = sorted(x.shape for x in jax.tree.leaves(kept))
    assert shapes == sorted(x.shape for x in jax.tree.leaves(arrays))


def test_layers_in_a_scan_with_remat():
    arrays = given(SSD(70, 16, 24, (1, 2), skip="P"))
    x = arrays.pop("x")

    def model(policy, x):
        def layer(x, scale):
            y, _ = kernels(SSD(70, 16, 24, (1, 2), skip="P"))(x=x * scale, **arrays)
            return x + y, None

        if policy != "no remat":
            layer = jax.checkpoint(layer, policy=policy)
        scales = jnp.array([1.0, 0.5], x.dtype)
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, scales)[0].astype(jnp.float32)))

    kept, computed = (
        jit(jax.value_and_grad(functools.partial(model, policy)))(x)
        for policy in ("no remat", None)
    )
    assert_same(computed, kept)
