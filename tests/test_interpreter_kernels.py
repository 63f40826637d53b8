"""Kernels of one's own in the interpreter: what it finds between blocks, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax import _ffi, interpret
from tk_jax.kernel import call_kernel

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)

# Buffers of each: x and y (64 x 64, fp32), a counter of turns.
SOURCE = """
#include "tk/kernel_params.h"
#include "tk/tk.cuh"
namespace mine {
using namespace tk;
using Params = KernelParams;
using Tile = SharedTile<float, 64, 32>;
struct Shared {
  Tile tile;
  Barrier full;
};

__device__ GlobalView<float> view(const Params& params, int buffer) {
  return {static_cast<float*>(params.buffers[buffer].data), 64, 64, 64};
}
__device__ int* counter(const Params& params) {
  return static_cast<int*>(params.buffers[2].data);
}
__device__ RegTile<float, 16, 64> x_rows(const Params& params, float times) {
  RegTile<float, 16, 64> x;
  warpgroup::load(x, view(params, 0), 0, 0);
  warp::mul(x, x, times);
  return x;
}

// Every block writes all of y.
__device__ void unordered(const Params& params) {
  warpgroup::store(view(params, 1), x_rows(params, 1.0f), 0, 0);
}

// Warps of a block write all of y, one after another only where kSync.
template <bool kSync>
__device__ void warps(const Params& params) {
  RegTile<float, 16, 64> x;
  warp::fill(x, 2.0f);
  if (warp::index() == 0) warp::store(view(params, 1), x, 0, 0);
  if (kSync) warpgroup::sync();
  if (warp::index() == 1) warp::store(view(params, 1), x, 0, 0);
}

// y = x by ordinary stores; the copy engine then reads it, and half of it is doubled.
template <bool kPublish, int kColumn = 0>
__device__ void round_trip(const Params& params) {
  Shared& shared = block::shared_memory<Shared>();
  if (warp::index() == 0 && warp::leader()) {
    shared.full.init(1);
    publish_barriers();
  }
  warpgroup::store(view(params, 1), x_rows(params, 1.0f), 0, 0);
  if (kPublish) publish_global();
  block::sync();
  if (warp::index() == 0 && warp::leader()) {
    shared.full.expect(Tile::kBytes);
    tma::load(shared.tile, params.maps[1], shared.full, tma::Keep::kNormal, kColumn, 0);
  }
  shared.full.wait(0);
  RegTile<float, 16, 32> half;
  warpgroup::load(half, shared.tile);
  warp::mul(half, half, 2.0f);
  warpgroup::store(view(params, 1), half, 0, 0);
}

// Blocks of a cluster take turns at y. Where !kWait, a turn is passed on while other
// warps' stores may be still to come.
template <bool kWait>
__device__ void in_turns(const Params& params) {
  const int rank = cluster::rank();
  if (rank == 0 && warpgroup::leader()) reset_turns(counter(params));
  cluster::sync();
  if (warpgroup::leader()) take_turn(counter(params), rank);
  warpgroup::sync();
  RegTile<float, 16, 64> y = x_rows(params, rank + 1.0f);
  if (rank > 0) {
    RegTile<float, 16, 64> before;
    warpgroup::load(before, view(params, 1), 0, 0);
    warp::add(y, y, before);
  }
  warpgroup::store(view(params, 1), y, 0, 0);
  if (kWait) warpgroup::sync();
  if (warpgroup::leader()) pass_turn(counter(params));
}

// Writes what it is given to read.
__device__ void operand(const Params& params) {
  RegTile<float, 16, 64> x;
  warp::fill(x, 0.0f);
  warpgroup::store(view(params, 0), x, 0, 0);
}

}  // namespace mine
"""
FUNCTIONS = (
    "unordered",
    "warps<true>",
    "warps<false>",
    "round_trip<true>",
    "round_trip<false>",
    "round_trip<true, 2>",
    "in_turns<true>",
    "in_turns<false>",
    "operand",
)
X = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 7


@pytest.fixture(scope="module", autouse=True)
def compiled():
    names = [f"mine::{name}" for name in FUNCTIONS]
    interpret.compile_for_interpreter(names, source=SOURCE)


def run(name, *, grid=1, **settings):
    """y and the counter, from a kernel of SOURCE."""
    results = call_kernel(
        f"mine::{name}",
        [
            jax.ShapeDtypeStruct((64, 64), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        X,
        source=SOURCE,
        threads=128,
        shared_bytes=32 * 1024,
        grid=grid,
        tiles={1: (64, 32)},
        implementation="interpret",
        **settings,
    )
    return jax.block_until_ready(results)


def found(name, **settings) -> str:
    with pytest.raises(Exception, match="tk_kernel_v1: ") as caught:
        run(name, **settings)
    return str(caught.value)


def test_what_is_ordered_is_not_reported():
    np.testing.assert_array_equal(run("warps<true>")[0][:16], 2)
    y, _ = run("round_trip<true>")
    np.testing.assert_array_equal(y[:, :32], 2 * X[:, :32])
    np.testing.assert_array_equal(y[:, 32:], X[:, 32:])
    for seed in range(8):
        with tk_jax.interpret_options(seed=seed):
            y, counter = run("in_turns<true>", grid=4, cluster_size=4)
        np.testing.assert_array_equal(y, X + 2 * X + 3 * X + 4 * X)
        assert counter == 4


def test_stores_of_blocks_that_nothing_orders():
    text = found("unordered", grid=2)
    line = 1 + SOURCE[: SOURCE.index("warpgroup::store(view(params, 1), x_rows")].count(
        "\n"
    )
    assert f"<source>:{line}: global-race in tk_kernel, block (" in text
    assert f"(writes it at <source>:{line}, block (" in text


def test_stores_of_warps_that_nothing_orders():
    assert "global-race" in found("warps<false>")


def test_turns_that_are_passed_on_too_early():
    assert "global-race" in found("in_turns<false>", grid=4, cluster_size=4)


def test_ordinary_stores_that_the_copy_engine_may_not_see():
    text = found("round_trip<false>")
    assert "missing-fence" in text
    assert "publish_global" in text


def test_boxes_that_the_copy_engine_refuses():
    text = found("round_trip<true, 2>")
    assert "tensor-map" in text
    assert "column 2, which is not on 16 bytes" in text


def test_operands_are_not_written():
    assert "writes buffer 0, an operand" in found("operand")


# -- Any number of threads -------------------------------------------------------------


def test_reports_do_not_depend_on_threads():
    for seed in range(4):
        texts = set()
        for threads in (1, 2, 5):
            with tk_jax.interpret_options(seed=seed, threads=threads):
                texts.add(found("unordered", grid=7))
        assert len(texts) == 1, texts


def test_sums_in_any_order_do_not_depend_on_threads():
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((1, 300, 2, 64)), jnp.bfloat16)
        for _ in range(4)
    )
    attention = functools.partial(
        tk_jax.attention,
        is_causal=True,
        deterministic=False,
        implementation="interpret",
    )
    # Any order of the same numbers is one order for one seed.
    bits = []
    for threads in (1, 2, 5):
        with tk_jax.interpret_options(seed=3, threads=threads):
            _, pull = jax.vjp(attention, q, k, v)
            bits.append(jax.block_until_ready(pull(dout)))
    for other in bits[1:]:
        for x, y in zip(bits[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# -- The compiler ----------------------------------------------------------------------


def test_errors_of_the_compiler_are_shown():
    with pytest.raises(Exception, match=r"C\+\+ compiler .* fails:(.|\n)*<source>:1:"):
        call_kernel(
            "f",
            [jax.ShapeDtypeStruct((1,), jnp.float32)],
            source="void f(const tk::KernelParams&) { return 1; }",
            threads=32,
            implementation="interpret",
        )


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("TK_JAX_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert _ffi.interpreter().host_compiler() == ""
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler is found"):
        interpret.compile_for_interpreter(["f"], source="void f(int);")


def test_the_compiler_can_be_chosen(monkeypatch):
    monkeypatch.delenv("TK_JAX_CXX", raising=False)
    monkeypatch.setenv("CXX", "one --flag")
    assert _ffi.interpreter().host_compiler() == "one --flag"
    monkeypatch.setenv("TK_JAX_CXX", "another")
    assert _ffi.interpreter().host_compiler() == "another"


def test_lowering_for_a_gpu_is_refused():
    kernel = functools.partial(
        call_kernel,
        "f",
        [jax.ShapeDtypeStruct((1,), jnp.float32)],
        source="void f(...);",
        threads=32,
        implementation="interpret",
    )
    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((1,), jnp.float32))
    with pytest.raises(NotImplementedError, match="'interpret' needs the CPU"):
        traced.lower(lowering_platforms=("cuda",))


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="implementation is 'cpu'; expected None"):
        call_kernel("f", [], source=";", threads=32, implementation="cpu")


def test_nothing_to_compile():
    with pytest.raises(ValueError, match="pass header, source, or both"):
        interpret.compile_for_interpreter(["f"])
