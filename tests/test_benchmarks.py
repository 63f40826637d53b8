"""The benchmarks: command line, gate and result file, on the CPU with a fake clock."""

import functools
import json
import os
import pathlib
import sys

import fake_torch
import jax
import pytest

import tk_jax

ROOT = pathlib.Path(__file__).absolute().parent.parent
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    case_sets,
    cases,
    compare,
    dispatch,
    implementations,
    plot,
    recurrent,
    results,
    run,
    table,
)

ATTENTION = "B2-T32-S48-H4-K2-D64-causal-bf16"
MATMUL = "B1-M40-N24-K16-nt-bf16"
GPU = "NVIDIA H100 80GB HBM3"


def fake_measure(calls, *, rounds, seconds):
    """Runs every call on two sets of inputs; both take 5, 7, 9 ... us, others 1 us."""
    for call in calls.values():
        jax.block_until_ready([call(0), call(1)])
    return {
        key: [5e-6 + 2e-6 * i if key[1] == "both" else 1e-6 for i in range(rounds)]
        for key in calls
    }


def benchmark(*argv, measure=fake_measure) -> int:
    return run.main([*map(str, argv)], find_gpu=lambda: GPU, measure=measure)


@pytest.fixture
def on_cpu(monkeypatch):
    """Stand-ins that run on the CPU under the names of the real implementations."""

    def attention(case, **options):
        def run(q, k, v):
            return tk_jax.attention(
                q,
                k,
                v,
                is_causal=case.is_causal,
                local_window_size=case.local_window_size,
                **implementations.documents_of(case),
                **options,
            )

        return run

    def wrong_gradient(case):
        exact = attention(case)

        @jax.custom_vjp
        def run(q, k, v):
            return exact(q, k, v)

        def run_bwd(pull_back, dout):
            dq, dk, dv = pull_back(dout)
            return dq, dk, 2 * dv

        run.defvjp(lambda *arrays: jax.vjp(exact, *arrays), run_bwd)
        return run

    def broken(case):
        raise RuntimeError("does not load")

    def left_out(case):
        raise implementations.UnsupportedCaseError("odd head dims only")

    def matmul(case):
        return functools.partial(
            tk_jax.matmul,
            transpose_a=case.transposes[0] == "t",
            transpose_b=case.transposes[1] == "t",
        )

    def wrong_matmul(case):
        return lambda a, b: matmul(case)(a, b).at[..., -1].set(0)

    stand_ins = {
        "attention": {
            "tk": (None, attention),
            "xla": implementations.IMPLEMENTATIONS["attention"]["xla"],
            "tk[wrong]": (None, wrong_gradient),
            "tk[any-order]": (None, functools.partial(attention, deterministic=False)),
        },
        "matmul": {
            "tk": (None, matmul),
            "cublas": implementations.IMPLEMENTATIONS["matmul"]["cublas"],
            "tk[wrong]": (None, wrong_matmul),
            "wrong": (None, wrong_matmul),
            "broken": (None, broken),
            "left out": (None, left_out),
        },
    }
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", stand_ins)


def test_result_file(on_cpu, tmp_path, capsys):
    path = tmp_path / "attention.json"
    arguments = ("attention", "--cases", ATTENTION, "--impls", "tk", "xla", "--jobs", 2)
    assert benchmark(*arguments, "--out", path, "--commit", "abc") == 0
    document = json.loads(path.read_text())
    assert list(document) == ["commit", "date", "gpu", "versions", "rows"]
    assert (document["commit"], document["gpu"]) == ("abc", GPU)
    assert document["versions"]["jax"] == jax.__version__
    rows = document["rows"]
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        ("fwd", "tk"),
        ("fwd", "xla"),
        ("bwd", "tk"),
        ("bwd", "xla"),
    ]
    flops = 4 * 2 * 4 * 32 * 48 * 64 / 2
    for row in rows:
        backward = row["direction"] == "bwd"
        assert row["case"] == ATTENTION
        assert row["samples_us"] == [1.0] * 5
        assert row["median_us"] == 1.0
        assert row["method"] == "direct"
        expected = flops * (2.5 if backward else 1) / 1e-6 / 1e12
        assert row["tflops"] == pytest.approx(expected, abs=0.005)
        assert 0 < row["roofline_fraction"] < 1
        assert row["compile_s"] > 0
        # The median of both, 9 us, less forward.
        assert row.get("difference_us") == (8.0 if backward else None)
    assert "1.000x xla" in capsys.readouterr().out
    assert len(results.read(path)["rows"]) == 4


def test_backward_by_difference_only(on_cpu, tmp_path):
    path = tmp_path / "attention.json"
    code = benchmark(
        *("attention", "--cases", ATTENTION, "--impls", "tk", "--out", path),
        *("--directions", "bwd", "--backward", "difference"),
    )
    assert code == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["direction"] == "bwd"
    assert row["method"] == "difference"
    assert row["samples_us"] == [4.0, 6.0, 8.0, 10.0, 12.0]
    assert "difference_us" not in row


def test_rivals_of_torch(on_cpu, monkeypatch, tmp_path):
    torch = fake_torch.FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)

    def build(case):
        function = functools.partial(tk_jax.attention, is_causal=case.is_causal)

        return functools.partial(fake_torch.apply, function)

    known = implementations.IMPLEMENTATIONS["attention"]
    monkeypatch.setitem(known, "flash-attn-4", (None, build))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    path = tmp_path / "attention.json"
    arguments = ("attention", "--cases", ATTENTION, "--impls", "tk", "flash-attn-4")
    assert benchmark(*arguments, "--out", path) == 0
    assert os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE") == "false"
    rows = json.loads(path.read_text())["rows"]
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        ("fwd", "tk"),
        ("fwd", "flash-attn-4"),
        ("bwd", "tk"),
        ("bwd", "flash-attn-4"),
    ]
    assert [row.get("difference_us") for row in rows] == [None, None, 8.0, None]
    # Twice at first, once for the graphs; then whoever times waits for each call.
    assert torch.waits == 3 + 2 * 2


def test_any_order_is_timed_backward_alone(on_cpu, tmp_path):
    path = tmp_path / "attention.json"
    names = ("tk", "tk[any-order]")
    code = benchmark(
        *("attention", "--cases", ATTENTION, "--impls", *names, "--out", path)
    )
    assert code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        ("fwd", "tk"),
        ("bwd", "tk"),
        ("bwd", "tk[any-order]"),
    ]


@pytest.mark.parametrize(
    ("case", "directions"),
    [
        ("B1-T40-S40-H2-K1-D64-causal-bf16-w7", ["fwd"]),
        ("B2-T32-S32-H2-K2-D64-full-bf16-docs4", ["fwd"]),
        ("B1-T32-S32-H2-K2-D64-causal-bf16-DV32-w5-docs2", ["fwd", "bwd"]),
    ],
)
def test_gate_knows_masks_and_dims(
    on_cpu, monkeypatch, tmp_path, capsys, case, directions
):
    path = tmp_path / "attention.json"

    def unmasked(case):
        return tk_jax.attention

    known = implementations.IMPLEMENTATIONS["attention"]
    monkeypatch.setitem(known, "unmasked", (None, unmasked))
    arguments = ("attention", "--cases", case, "--impls", "tk", "unmasked")
    assert benchmark(*arguments, "--directions", *directions, "--out", path) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["implementation"] for row in rows} == {"tk"}
    assert "unmasked: WRONG, not timed: out largest error" in capsys.readouterr().out


def test_what_ours_does_not_compute_is_left_out(tmp_path, capsys):
    case = "B1-T64-S64-H1-K1-D80-full-bf16"
    assert benchmark("attention", "--cases", case, "--impls", "tk", "xla") == 0
    printed = capsys.readouterr().out
    assert f"{case}  tk: left out, attention: " in printed
    assert f"{case}  fwd  xla" in printed


def test_budget_ends_before_a_case(on_cpu, tmp_path, capsys):
    path = tmp_path / "matmul.json"
    more = "B1-M16-N16-K16-nn-bf16"
    arguments = ("matmul", "--cases", MATMUL, more, "--impls", "tk", "--out", path)

    assert benchmark(*arguments, "--budget", 60) == 0
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert benchmark(*arguments, "--budget", 0) == 1
    assert "2 cases not started" in capsys.readouterr().out


def test_merged_rows_say_where_they_are_from(on_cpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "matmul.json"
    other = "B1-M16-N16-K16-nn-bf16"

    def merge(case, *names, commit):
        return benchmark(
            *("matmul", "--cases", case, "--impls", *names, "--out", path),
            *("--merge", "--commit", commit),
        )

    assert merge(MATMUL, "tk", "cublas", commit="one") == 0
    assert merge(other, "tk", commit="one") == 0
    document = json.loads(path.read_text())
    assert [row["case"] for row in document["rows"]] == [MATMUL, MATMUL, other]
    assert not any("commit" in row for row in document["rows"])
    # Of a case measured again nothing is kept: its rows come from one run.
    assert merge(MATMUL, "tk", commit="two") == 0
    document = json.loads(path.read_text())
    assert document["commit"] == "two"
    found = [
        (r["case"], r["implementation"], r.get("commit")) for r in document["rows"]
    ]
    assert found == [(other, "tk", "one"), (MATMUL, "tk", None)]
    assert "date" in document["rows"][0] and "date" not in document["rows"][1]
    assert "commit one, two" in table.render(results.read(path), "matmul")
    before = path.read_text()
    monkeypatch.setattr(results, "find_versions", lambda: {"jax": "0.0.1"})
    assert merge(MATMUL, "tk", commit="three") == 2
    assert "and 0.0.1 is here" in capsys.readouterr().err
    assert path.read_text() == before


def test_dispatch_rows(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(
        dispatch, "CASE", cases.AttentionCase(1, 16, 16, 1, 1, 64, False)
    )
    path = tmp_path / "attention.json"

    def measure(calls, **settings):
        times = fake_measure(calls, **settings)
        return {
            key: [30e-6]
            if key[1] == "one"
            else [200e-6]
            if key[1] == "chain"
            else found
            for key, found in times.items()
        }

    arguments = ("attention", "--cases", ATTENTION, "--impls", "tk", "--dispatch")
    assert benchmark(*arguments, "--out", path, measure=measure) == 0
    rows = json.loads(path.read_text())["rows"][:2]
    assert [row["implementation"] for row in rows] == ["tk", dispatch.ADD]
    for row in rows:
        assert row["direction"] == "dispatch"
        assert (row["median_us"], row["overhead_us"]) == (30.0, 20.0)
    text = table.render(results.read(path), "attention")
    assert text.endswith(
        "beyond its kernel: tk 20.0 us of 30.0, q + k + v 20.0 us of 30.0.\n"
    )


def test_committed_results_are_the_readme_s(tmp_path):
    """README's tables are those of ``python -m benchmarks.table``."""
    page = (ROOT / "README.md").read_text()
    ops = ("attention", "matmul", *recurrent.CASE_TYPES)
    for op in ops:
        path = results.default_path(op, GPU)
        text = table.render(results.read(path), op)
        assert table.replaced(page, text, op) == page, (
            f"run python -m benchmarks.table {path.relative_to(ROOT)} --write README.md"
        )


def test_table_goes_where_the_page_says(tmp_path, capsys):
    path = results.default_path("matmul", GPU)
    assert table.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| 8192, 8192, 8192 | 721 | 692 cublas (1.04) |\n" in printed
    page = tmp_path / "page.md"
    page.write_text("before\n")
    assert table.main([str(path), "--write", str(page)]) == 2
    assert "expected one line '<!-- benchmarks.table matmul -->'" in (
        capsys.readouterr().err
    )
    begin, end = table.marks("matmul")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert table.main([str(path), "--write", str(page)]) == 0
    assert page.read_text() == f"before\n{begin}\n{printed}{end}\nafter\n"


def test_comparison_of_two_runs(tmp_path, capsys):
    """Ours over the same rival's, so that another clock changes nothing."""

    def write(name, ours, rival, *others):
        rows = [
            results.make_row(
                cases.MatmulCase.parse(MATMUL),
                "fwd",
                implementation,
                [seconds],
                gpu="H100 80GB HBM3",
                compile_s=0,
                method="direct",
            )
            for implementation, seconds in [("tk", ours), ("cublas", rival), *others]
        ]
        results.write(tmp_path / name, rows, gpu="H100 80GB HBM3", commit=name)
        return str(tmp_path / name)

    before, after = write("before", 2e-3, 3e-3), write("after", 2e-3, 4e-3)
    assert compare.main(["matmul", before, after]) == 0
    printed = capsys.readouterr().out
    assert "| direction | commit before | commit after |\n" in printed
    assert "| forward | 1.50 | 2.00 |\n" in printed
    assert "Geometric mean of after over before: 1.333.\n" in printed
    assert compare.main(["matmul", before, after, "--rival", "xla"]) == 2
    assert "no case has ours and xla in both files" in capsys.readouterr().err
    other = ("xla", 1e-3)
    after = write("more", 2e-3, 4e-3, other)
    assert compare.main(["matmul", after, after]) == 2
    assert "expected one rival in both files" in capsys.readouterr().err


def test_the_interpreter_s_page_has_the_committed_comparison():
    page = (ROOT / "docs" / "interpreter.md").read_text()
    folder = results.default_path("", GPU).parent / "interpreter"
    for op in ("attention", "matmul"):
        before, after = (
            results.read(folder / f"{op}-{x}.json") for x in ("before", "after")
        )
        assert compare.render(before, after, op) in page


@pytest.mark.parametrize(
    ("op", "case", "wrong", "code", "message"),
    [
        ("matmul", MATMUL, "wrong", 0, "wrong: WRONG, not timed: out largest"),
        ("attention", ATTENTION, "tk[wrong]", 1, "WRONG, not timed: dv largest"),
        ("matmul", MATMUL, "broken", 0, "broken: RuntimeError: does not load"),
        ("matmul", MATMUL, "left out", 0, "left out, odd head dims only"),
        ("matmul", MATMUL, "tk[wrong]", 1, "WRONG, not timed: out largest"),
    ],
)
def test_a_wrong_implementation_is_not_timed(
    on_cpu, tmp_path, capsys, op, case, wrong, code, message
):
    path = tmp_path / "out.json"
    found = benchmark(op, "--cases", case, "--impls", "tk", wrong, "--out", path)
    assert found == code
    assert message in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {row["implementation"] for row in rows} == {"tk"}


def test_partial_runs_leave_the_committed_results(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(
        case_sets, "cases_of", lambda *_: [cases.MatmulCase.parse(MATMUL)]
    )
    del implementations.IMPLEMENTATIONS["matmul"]["tk[wrong]"]
    assert benchmark("matmul", "--cases", MATMUL) == 0
    assert benchmark("matmul", "--quick") == 0
    assert not list(tmp_path.rglob("*.json"))
    assert benchmark("matmul", "--commit", "abc") == 0
    (path,) = tmp_path.rglob("*.json")
    assert path == tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "matmul.json"


def test_plot(on_cpu, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "matmul.json"
    benchmark("matmul", "--cases", MATMUL, "--impls", "tk", "cublas", "--out", path)
    assert plot.main([str(path)]) == 0
    image = tmp_path / "matmul-fwd.svg"
    assert "<svg" in image.read_text()
    assert plot.main([str(path), "--format", "png"]) == 0
    assert (tmp_path / "matmul-fwd.png").stat().st_size > 1000
