"""Rivals of torch: where they are, what they get, how they are timed; with fakes."""

import functools
import json
import re
import subprocess
import sys
import types

import fake_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import quick_jit, relative_rms

import tk_jax
from benchmarks import (
    cases,
    implementations,
    packages,
    recurrent,
    recurrent_rivals,
    results,
    run,
    table,
    timing,
    torch_programs,
)

GPU = "NVIDIA H100 80GB HBM3"
CASES = {
    "ssd": "B2-T20-H4-P16-N16-G2-bf16",
    "linear_attention": "B2-T20-H2-D16-bf16",
    "based_attention": "B1-T64-H2-F16-D64-bf16",
    "hedgehog_attention": "B1-T128-H2-D128-bf16",
}
# What the fakes compute with: the functions that packages have, and their signatures.
MAMBA = """
from mamba_ssm.utils import marker

def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, seq_idx=None,
    dt_softplus=False,
):
    from test_recurrent_rivals import fake_mamba
    assert chunk_size == 256 and z is None and marker
    return fake_mamba(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus)
"""


@jax.jit
def ssd(segment_ids, *arrays):
    x, dt, A, B, C, D, dt_bias = arrays
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True}
    return tk_jax.ssd(x, dt, A, B, C, segment_ids=segment_ids, **options)


def fake_mamba(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus):
    assert dt_softplus is True
    ids = None if seq_idx is None else seq_idx.array
    run = functools.partial(ssd, ids)
    return fake_torch.apply(run, x, dt, A, B, C, D, dt_bias)


@jax.jit
def linear_attention(q, k, v, g):
    return tk_jax.linear_attention(q, k, v, log_decay=g, scale=1.0)


def fake_simple_gla(q, k, v, g=None, scale=None):
    assert scale == 1.0
    return fake_torch.apply(linear_attention, q, k, v, g), None


@jax.jit
def based_attention(q, k, v):
    return tk_jax.based_attention(q, k, v, normalize=False)


def fake_based(q, k, v, scale=None, use_norm=True):
    assert scale is None and not use_norm
    return fake_torch.apply(based_attention, q, k, v)


@jax.jit
def hedgehog_attention(q, k, v, q_map, k_map, alpha, beta):
    return tk_jax.hedgehog_attention(q, k, v, q_map, k_map, alpha=alpha, beta=beta)


def heads_first(function, *tensors):
    """As ThunderKittens' kernels are called; they return states besides."""

    def turn(x):
        return jnp.swapaxes(x, 1, 2)

    def run(q, k, v, *others):
        return turn(function(*map(turn, (q, k, v)), *others))

    return fake_torch.apply(run, *tensors), "state"


@pytest.fixture
def torch(monkeypatch):
    """In place of the real one, and triton and einops beside it."""
    fake = fake_torch.FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    for name in ("triton", "einops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    yield fake
    packages.set_folders({})
    for name in [x for x in sys.modules if x.split(".")[0] in ("mamba_ssm", "fla")]:
        del sys.modules[name]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Source trees, by option; their modules are fakes."""

    def write(path, text=""):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    # Its __init__ wants what is not there, and must not run.
    write("mamba/mamba_ssm/__init__.py", '__version__ = "9.8.7"\nimport selective\n')
    write("mamba/mamba_ssm/ops/__init__.py")
    write("mamba/mamba_ssm/ops/triton/__init__.py")
    write("mamba/mamba_ssm/ops/triton/ssd_combined.py", MAMBA)
    write("mamba/mamba_ssm/utils/__init__.py", "marker = True\n")
    write("fla/fla/__init__.py", '__version__ = "0.6.0"\n')
    write("fla/fla/ops/__init__.py")
    fakes = "from test_recurrent_rivals import"
    write("fla/fla/ops/simple_gla.py", f"{fakes} fake_simple_gla as chunk_simple_gla\n")
    write(
        "fla/fla/ops/based.py",
        f"{fakes} fake_based as parallel_based, fake_based as fused_chunk_based\n",
    )
    for kernel in ("based", "hedgehog"):
        write(f"tk/kernels/{kernel}/_C.cpython-312.so")
    kernels = {
        "based": functools.partial(heads_first, based_attention),
        "hedgehog": functools.partial(heads_first, hedgehog_attention),
    }
    kernels = {
        name: types.SimpleNamespace(**{name: kernel})
        for name, kernel in kernels.items()
    }
    monkeypatch.setattr(packages, "thunderkittens", kernels.__getitem__)
    named = {"mamba-ssm": "mamba", "fla": "fla", "thunderkittens": "tk"}
    return {name: tmp_path / folder for name, folder in named.items()}


def benchmark(op, *names, folders, case=None, **options):
    options = {"rounds": 1, "seconds": 0.0, "jobs": 1} | options
    argv = [op, "--cases", case or CASES[op], "--impls", *names, "--quick"]
    for name in implementations.options(op):
        argv += [f"--{name}", str(folders[name])]
    argv += [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return run.main(argv, find_gpu=lambda: GPU, measure=timing.measure)


@pytest.fixture(autouse=True)
def inputs_of_numpy(monkeypatch):
    """XLA's random numbers take seconds to compile."""

    def normal(shapes_and_dtypes, seed):
        rng = np.random.default_rng(seed)
        kinds = shapes_and_dtypes
        return [jnp.asarray(rng.standard_normal(shape), kind) for shape, kind in kinds]

    monkeypatch.setattr(cases, "_normal", normal)


@pytest.mark.parametrize(
    "op",
    [
        "ssd",
        "based_attention",
        pytest.param("linear_attention", marks=pytest.mark.exhaustive),
        pytest.param("hedgehog_attention", marks=pytest.mark.exhaustive),
    ],
)
def test_they_compute_the_case(op, torch, folders):
    """Of its arrays, in their layouts and with their settings, and every gradient."""
    packages.set_folders(folders)
    case = cases.CASE_TYPES[op].parse(CASES[op])
    arrays, dout = cases.make_inputs(case, seed=0)

    @quick_jit
    def expect(dout, *arrays):
        out, pull_back = jax.vjp(recurrent.tk_or_xla(case, "xla"), *arrays)
        return out, *pull_back(dout)

    expected = expect(dout, *arrays)
    for name in recurrent_rivals.RIVALS[op]:
        programs = implementations.programs(op, name, case, ("fwd", "bwd"), "direct")
        out, gradients = programs.first_calls(arrays, dout)
        assert (gradients is None) == name.startswith("thunderkittens")
        for x, y in zip([out, *(gradients or ())], expected, strict=False):
            assert x.dtype == y.dtype and relative_rms(x, y) < 1e-2


def test_run(torch, folders, monkeypatch, tmp_path, capsys):
    """And what is wrong with gradients leaves the forward pass."""

    def of_wrong_gradients(case):
        def function(*tensors):
            out = recurrent_rivals.mamba_ssm(case).function(*tensors)
            return fake_torch.apply(lambda x: 2 * x - jax.lax.stop_gradient(x), out)

        return torch_programs.TorchRival(function)

    known = implementations.IMPLEMENTATIONS["ssd"]
    wrong = (packages.MAMBA_SSM, of_wrong_gradients)
    monkeypatch.setitem(known, "thunderkittens", wrong)  # a name of torch's
    monkeypatch.setattr(run, "_ROTATED_BYTES", 1)  # two sets of inputs
    path = tmp_path / "out.json"
    names = ("mamba-ssm", "thunderkittens")
    assert benchmark("ssd", *names, folders=folders, out=path) == 0
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert [(x["direction"], x["implementation"], x["clock"]) for x in rows] == [
        ("fwd", "mamba-ssm", "graph"),
        ("fwd", "thunderkittens", "graph"),
        ("bwd", "mamba-ssm", "graph"),
    ]
    assert document["versions"]["mamba-ssm"] == "9.8.7"
    assert len(torch.captured) == 6 and torch.replays > 0
    printed = capsys.readouterr().out
    assert "by graph" in printed
    assert "thunderkittens: bwd WRONG, not timed: x has relative RMS" in printed


def test_time_of_kernels_alone(torch):
    programs = programs_of(jnp.sin, torch, clock="kernels", has_backward=False)
    programs.leave_out_backward()
    inputs = ([jnp.ones(4)], jnp.ones(4))
    programs.first_calls(*inputs)
    calls = programs.calls([inputs])
    # Of two kernels of 2 us, in three calls.
    assert timing.measure(calls, rounds=2, seconds=0) == {
        "fwd": [pytest.approx(4e-6 / 3)] * 2
    }


def test_documents_are_indices_of_sequences(torch, folders):
    packages.set_folders(folders)
    case = cases.CASE_TYPES["ssd"].parse("B2-T12-H2-P16-N16-G1-bf16-docs4")
    seen = []

    def scan(*arrays, seq_idx, **options):
        seen.append(seq_idx.array.tolist())
        return arrays[0]

    packages.mamba_ssm().mamba_chunk_scan_combined = scan
    arrays, dout = cases.make_inputs(case, seed=0)
    programs = implementations.programs("ssd", "mamba-ssm", case, ("fwd",), "direct")
    programs.first_calls(arrays, dout)
    assert seen == [2 * [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]]


@pytest.mark.parametrize(
    ("op", "name", "case", "reason"),
    [
        ("based_attention", "thunderkittens", "B1-T64-H2-F16-D128-bf16", "head dim 64"),
        ("based_attention", "thunderkittens", "B1-T65-H2-F16-D64-bf16", "of 64 tokens"),
        ("based_attention", "thunderkittens", "B1-T64-H2-F16-D64-fp16", "bf16 only"),
        ("based_attention", "fla-fused-chunk", "B1-T64-H2-F24-D64-bf16", "up to 16"),
        ("based_attention", "fla-parallel", "B1-T64-H2-F8-D64-bf16-docs2", "documents"),
        ("linear_attention", "fla", "B1-T64-H2-D16-bf16-docs2", "documents"),
        ("hedgehog_attention", "thunderkittens", "B1-T64-H2-D64-bf16", "head dim 128"),
    ],
)
def test_what_they_do_not_compute(op, name, case, reason, torch, folders):
    packages.set_folders(folders)
    case = cases.CASE_TYPES[op].parse(case)
    with pytest.raises(implementations.UnsupportedCaseError, match=reason):
        implementations.programs(op, name, case, ("fwd",), "direct")


def test_forward_alone_has_no_backward(torch, folders):
    packages.set_folders(folders)
    op, name = "based_attention", "thunderkittens"
    case = cases.CASE_TYPES[op].parse(CASES[op])
    programs = implementations.programs(op, name, case, ("fwd", "bwd"), "direct")
    assert programs.directions == ("fwd",) and not programs.direct
    with pytest.raises(implementations.UnsupportedCaseError, match="no backward pass"):
        implementations.programs(op, name, case, ("bwd",), "direct")


def test_absent_ones_are_named(capsys):
    for op in CASES:
        assert run.main([op, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for name in recurrent_rivals.RIVALS[op]:
            assert f"absent: {name}, " in printed
    assert "absent: jla, the package jla is not installed" in printed


def test_absent_files_are_named(torch, folders, tmp_path, capsys):
    assert run.main(["ssd", "--dry-run", "--mamba-ssm", str(tmp_path)]) == 0
    expected = f"--mamba-ssm: {tmp_path} has no mamba_ssm/ops/triton/ssd_combined.py"
    assert expected in capsys.readouterr().out
    # One of the two kernels is not built.
    next(folders["thunderkittens"].glob("kernels/based/*")).unlink()
    option = ("--thunderkittens", str(folders["thunderkittens"]))
    assert run.main(["based_attention", "--dry-run", *option]) == 0
    assert "has no kernels/based/_C*.so" in capsys.readouterr().out
    assert run.main(["hedgehog_attention", "--dry-run", *option]) == 0
    printed = capsys.readouterr().out
    assert "implementations: tk thunderkittens thunderkittens[bhtd]\n" in printed
    # Asked for by name, it is left out with the reason.
    case = cases.CASE_TYPES["based_attention"].parse(CASES["based_attention"])
    packages.set_folders(folders)
    with pytest.raises(implementations.UnsupportedCaseError, match="has no kernels/b"):
        implementations.programs(
            "based_attention", "thunderkittens", case, ("fwd",), "direct"
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ssd", "--fla", "."], "--fla: no rival of ssd takes it"),
        (["attention", "--mamba-ssm", "."], "--mamba-ssm: no rival of attention"),
        (["ssd", "--mamba-ssm", "/nowhere"], "--mamba-ssm: /nowhere is no folder"),
    ],
)
def test_bad_folders(argv, message, capsys):
    with pytest.raises(SystemExit):
        run.main(argv)
    assert message in capsys.readouterr().err


def test_without_a_graph_it_is_timed_as_it_is(torch, capsys):
    torch.can_capture = False
    programs = programs_of(jnp.sin, torch)
    inputs = ([jnp.ones(4)], jnp.ones(4))
    programs.first_calls(*inputs)
    calls = programs.calls([inputs])
    assert list(calls) == ["fwd", "bwd"] and programs.clock == "wall"
    jax.block_until_ready([call(0) for call in calls.values()])
    assert torch.replays == 0
    printed = capsys.readouterr().out
    assert "no CUDA graph, timed as it is: RuntimeError: operation not" in printed


def programs_of(function, torch, **options):
    rival = torch_programs.TorchRival(
        functools.partial(fake_torch.apply, function), **options
    )
    return torch_programs.TorchPrograms(rival, ("fwd", "bwd"))


@pytest.mark.parametrize("kernel_us", [0.0, "not permitted"])
def test_a_profiler_that_sees_nothing_leaves_the_wall_clock(torch, kernel_us, capsys):
    torch.kernel_us = kernel_us
    programs = programs_of(jnp.sin, torch, clock="kernels")
    programs.leave_out_backward()
    programs.first_calls([jnp.ones(4)], jnp.ones(4))
    assert programs.clock == "wall"
    calls = programs.calls([([jnp.ones(4)], jnp.ones(4))])
    assert list(calls) == ["fwd"] and not hasattr(calls["fwd"], "sample")
    assert "from the profiler, timed as it is: " in capsys.readouterr().out


def test_a_backward_pass_that_raises_leaves_the_forward_one(torch):
    def function(x):
        if isinstance(x, jax.core.Tracer):
            raise RuntimeError("known to be wrong with this compiler")
        return 2 * x

    programs = programs_of(function, torch)
    out, gradients = programs.first_calls([jnp.ones(4)], jnp.ones(4))
    assert out.tolist() == [2.0] * 4 and gradients is None
    assert programs.directions == ("fwd",)
    assert "known to be wrong with this" in programs.no_direct_reason
    assert list(programs.calls([([jnp.ones(4)], jnp.ones(4))])) == ["fwd"]


def test_merging_compares_versions_of_folders(folders, tmp_path):
    path = tmp_path / "out.json"
    packages.set_folders(folders)
    results.write(path, [], gpu=GPU, commit="none")
    assert results.read_for_merging(path, GPU)["versions"]["mamba-ssm"] == "9.8.7"
    init = folders["mamba-ssm"] / "mamba_ssm" / "__init__.py"
    init.write_text('__version__ = "9.9"\n')
    with pytest.raises(results.MergeError, match=r"mamba-ssm 9\.8\.7, and 9\.9 is"):
        results.read_for_merging(path, GPU)
    packages.set_folders({})


def test_a_folder_s_commit_is_its_own(tmp_path):
    """Of a copy of files within another repository, nothing is known."""
    (tmp_path / "outer" / "copy").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path / "outer"), "-c", "user.name=a", "-c"]
    git += ["user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    packages.set_folders({"thunderkittens": tmp_path / "outer" / "copy"})
    assert packages.THUNDERKITTENS.version() == "of unknown version"
    packages.set_folders({"thunderkittens": tmp_path / "outer"})
    assert re.fullmatch("[0-9a-f]{40}", packages.THUNDERKITTENS.version())
    packages.set_folders({})


def test_table_has_everyone_s_microseconds(tmp_path):
    case = cases.CASE_TYPES["ssd"].parse("B1-T65536-H24-P64-N128-G1-bf16-docs16")
    make = functools.partial(
        results.make_row, case, gpu=GPU, compile_s=0.0, method="direct"
    )
    rows = [
        make("fwd", "tk", [100e-6]),
        make("fwd", "mamba-ssm", [250e-6], clock="graph"),
        make("bwd", "tk", [300e-6]),
    ]
    path = tmp_path / "ssd.json"
    results.write(path, rows, gpu=GPU, commit="0123456789" * 4)
    text = table.render(results.read(path), "ssd")
    assert "mamba-ssm of unknown version; commit 0123456789.\n" in text
    *_, titles, _, line = text.splitlines()
    assert titles == "| sizes | forward tk | forward mamba-ssm | backward tk |"
    name = "B1 T65536 H24 P64 N128 G1 bf16 docs16"
    assert line == f"| {name} | 100 | 250 (2.50) | 300 |"
