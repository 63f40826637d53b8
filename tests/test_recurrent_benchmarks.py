"""Benchmarks of the recurrent ops: cases, implementations and what judges them."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import case_sets, cases, gate, recurrent, run, timing

SMALL = {
    "ssd": "B2-T40-H4-P16-N16-G2-bf16",
    "linear_attention": "B2-T40-H2-D16-fp16-docs5",
    "based_attention": "B2-T40-H2-F8-D16-bf16",
    "hedgehog_attention": "B1-T70-H2-D16-bf16",
}


@pytest.mark.parametrize("op", SMALL)
def test_names_are_those_of_cases(op):
    for case in [
        recurrent.CASE_TYPES[op].parse(SMALL[op]),
        *case_sets.default_cases(op),
    ]:
        assert recurrent.CASE_TYPES[op].parse(str(case)) == case
        assert case.flops("bwd") > case.flops("fwd") > 0
        assert case.bytes("bwd") > case.bytes("fwd") > 0


def test_bytes_are_those_of_the_arrays():
    case = recurrent.SsdCase(8, 4096, 32, 64, 128, 1)
    arrays, dout = cases.input_structs(case)
    sizes = sum(x.size * x.dtype.itemsize for x in arrays)
    assert case.bytes("fwd") == sizes + dout.size * dout.dtype.itemsize
    # 86 us at 3.35 TB/s.
    assert case.bytes("fwd") / 3.35e12 == pytest.approx(86e-6, rel=0.02)


@pytest.mark.parametrize(
    "op",
    [
        "ssd",
        *(pytest.param(op, marks=pytest.mark.exhaustive) for op in list(SMALL)[1:]),
    ],
)
def test_run(op, tmp_path, capsys):
    path = tmp_path / "result.json"
    options = ["--cases", SMALL[op], "--impls", "xla", "--rounds", "1", "--quick"]
    code = run.main(
        [op, *options, "--seconds", "0.001", "--out", str(path), "--commit", "none"],
        find_gpu=lambda: "a CPU",
        measure=timing.measure,
    )
    assert code == 0, capsys.readouterr()
    document = json.loads(path.read_text())
    assert {row["direction"] for row in document["rows"]} == {"fwd", "bwd"}


@pytest.mark.parametrize("op", ["ssd"])
def test_gate_says_what_is_wrong(op):
    case = recurrent.CASE_TYPES[op].parse(SMALL[op])
    judge = gate.make(case)
    arrays, dout = cases.make_inputs(case, seed=0)
    function = recurrent.tk_or_xla(case, "xla")

    @jax.jit
    def run_all(dout, *arrays):
        out, pull_back = jax.vjp(function, *arrays)
        return out, pull_back(dout)

    out, gradients = run_all(dout, *arrays)
    assert judge.complaints(out, gradients) == []
    assert "out has relative RMS error" in judge.complaints(out * 1.02)[0]
    names = list(case.arrays)
    for index, name in enumerate(names):
        wrong = list(gradients)
        wrong[index] = wrong[index] * jnp.asarray(1.05, wrong[index].dtype)
        (complaint,) = judge.complaints(out, wrong)
        assert complaint.startswith(name)


def test_tiles_and_dispatch_are_refused(capsys):
    refused = functools.partial(pytest.raises, SystemExit)
    for option in (["--tk-configs", "64x64x2"], ["--dispatch"]):
        with refused():
            run.main(["ssd", *option])
        assert option[0] in capsys.readouterr().err
