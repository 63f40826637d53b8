"""The benchmarks' cases, clock, arguments and variants."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).absolute().parent.parent
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    case_sets,
    cases,
    results,
    run,
    timing,
    tuning,
)

ATTENTION = "B2-T32-S48-H4-K2-D64-causal-bf16"
MATMUL = "B1-M40-N24-K16-nt-bf16"
GPU = "NVIDIA H100 80GB HBM3"


def test_default_cases():
    grid = case_sets.default_cases("attention")
    names = [str(case) for case in grid]
    assert len(names) == len(set(names)) == 48
    assert "B4-T4096-S4096-H16-K16-D128-causal-bf16" in names
    assert {case.seqlen_q for case in grid} == {2**n for n in range(9, 15)}
    for case in grid:
        assert case.batch * case.seqlen_q == 16384
        assert case.num_heads * case.head_dim in (2048, 4096)
    # Whoever stops early has samples of every family.
    assert len({(c.head_dim, c.num_kv_heads, c.is_causal) for c in grid[:8]}) == 8


@pytest.mark.parametrize("op", cases.CASE_TYPES)
def test_names_of_cases_parse(op):
    everything = case_sets.cases_of(op, "all")
    assert len({str(case) for case in everything}) == len(everything)
    for case in everything:
        assert cases.CASE_TYPES[op].parse(str(case)) == case


def test_sets():
    masks = [str(case) for case in case_sets.cases_of("attention", "masks")]
    assert "B1-T16384-S16384-H16-K16-D128-causal-bf16-w1024" in masks
    assert "B1-T16384-S16384-H16-K16-D128-full-bf16-docs16" in masks
    assert "B1-T16384-S16384-H16-K16-D128-full-bf16" in masks
    values = [str(case) for case in case_sets.cases_of("attention", "values")]
    assert "B4-T4096-S4096-H16-K16-D192-causal-bf16-DV128" in values
    with pytest.raises(ValueError, match="matmul has no set 'masks'"):
        case_sets.cases_of("matmul", "masks")


@pytest.mark.parametrize(
    ("more", "visible"),
    [
        ("", 64.0),
        ("-w3", 8 * 7 - 2 * (1 + 2 + 3)),
        ("-docs2", 32.0),
        ("-w1-docs2", 2 * (4 * 3 - 2)),
    ],
)
def test_flops_count_what_is_visible(more, visible):
    case = cases.AttentionCase.parse(f"B2-T8-S8-H6-K3-D64-full-bf16-DV32{more}")
    assert str(case).endswith(more) and case.visible == visible
    assert case.flops("fwd") == 2 * 12 * visible * (64 + 32)
    assert case.flops("bwd") == 2 * 12 * visible * (3 * 64 + 2 * 32)
    assert case.shapes == ((2, 8, 6, 64), (2, 8, 3, 64), (2, 8, 3, 32))
    assert case.out_shape == (2, 8, 6, 32)


def test_select_cases():
    assert len(case_sets.select_cases("attention", ["D128-causal"])) == 12
    assert len(case_sets.select_cases("attention", ["D128", "causal"])) == 36
    (case,) = case_sets.select_cases("matmul", [MATMUL], quick=True)
    assert (case.m, case.n, case.k, case.transposes) == (40, 24, 16, "nt")
    assert case.shapes == ((40, 16), (24, 16))
    with pytest.raises(ValueError, match="no case of matmul matches 'D128'"):
        case_sets.select_cases("matmul", ["D128"])


def test_roofline_is_by_flops_or_by_bytes():
    large = cases.MatmulCase(1, 8192, 8192, 8192)
    seconds = 2 * 8192**3 / 989e12
    assert results.roofline_fraction(large, "fwd", 2 * seconds, GPU) == 0.5
    narrow = cases.MatmulCase(1, 8192, 8, 8192)
    seconds = 2 * (8192 * 8192 + 2 * 8192 * 8) / 3.35e12
    assert results.roofline_fraction(narrow, "fwd", seconds, GPU) == 1
    assert results.roofline_fraction(large, "fwd", seconds, "another GPU") is None


def test_measure_alternates_in_changing_order():
    order = []

    def call(name):
        def record(index):
            order.append((name, index))
            return jnp.zeros(())

        return record

    rounds = 8
    samples = timing.measure({"a": call("a"), "b": call("b")}, rounds=rounds, seconds=0)
    assert {name: len(found) for name, found in samples.items()} == {
        "a": rounds,
        "b": rounds,
    }
    assert all(sample > 0 for found in samples.values() for sample in found)
    # Three calls a sample and three untimed ones before it; the first seven are each
    # program's estimate.
    runs = order[14:]
    assert len(runs) == 12 * rounds
    assert [index for _, index in runs] == 4 * rounds * [0, 1, 2]
    names = [name for name, _ in runs]
    turns = [names[at : at + 6] for at in range(0, len(names), 6)]
    assert all(len(set(turn)) == 1 for turn in turns)
    pairs = {(a[0], b[0]) for a, b in zip(turns[::2], turns[1::2], strict=True)}
    assert pairs == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attention", "--impls", "magic"], "unknown implementation 'magic'"),
        (["matmul", "--tk-bwd-configs", "1x2"], "matmul's gradients are matmuls"),
        (["softmax"], "invalid choice: 'softmax'"),
        (["matmul", "--cases", "nothing"], "no case of matmul matches 'nothing'"),
        (["matmul", "--tk-configs", "128,256"], "'128,256' is not a config"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    try:
        code = run.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_lists_on_request():
    command = [sys.executable, "-m", "benchmarks.run", "matmul"]
    run_here = functools.partial(
        subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    listed = run_here([*command, "--dry-run", "--tk-configs", "128x128x64x6"])
    assert listed.returncode == 0, listed.stderr
    assert "B1-M4096-N14336-K4096-nn-bf16\n" in listed.stdout
    assert "implementations: tk cublas tk[128x128x64x6]" in listed.stdout
    if results.find_gpu() is None:
        refused = run_here(command)
        assert refused.returncode == 2
        assert "needs an NVIDIA GPU" in refused.stderr


@pytest.mark.parametrize(
    ("op", "case", "option", "text", "expected"),
    [
        ("attention", ATTENTION, "fwd", "128x64x3",
         "block_kv = 64 : i64, block_q = 128 : i64, stages = 3"),
        ("attention", ATTENTION, "bwd", "64x64x1",
         "block_kv = 64 : i64, block_q = 64 : i64, dq_block_kv = 0 : i64, "
         "dq_stages = 0 : i64, stages = 1"),
        ("matmul", MATMUL, "fwd", "128x64x64x5x1",
         "block_m = 128 : i64, block_n = 64 : i64, cluster_m = 1 : i64, group_m = 8"),
    ],
)  # fmt: skip
def test_variants_reach_the_kernel(op, case, option, text, expected):
    case = cases.CASE_TYPES[op].parse(case)
    variant = tuning.Variant.parse(option, text)
    assert str(variant) == f"tk[{text}]"
    function = variant.build(case)
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes]
    out = jax.eval_shape(function, *structs)
    assert out.shape == case.out_shape

    def both(dout, *arrays):
        return jax.vjp(function, *arrays)[1](dout)

    lowered = (
        jax.jit(function).trace(*structs)
        if op == "matmul"
        else jax.jit(both).trace(out, *structs)
    )
    assert expected in lowered.lower(lowering_platforms=("cuda",)).as_text()
