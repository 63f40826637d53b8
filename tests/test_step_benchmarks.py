"""The benchmark of steps: what it counts, checks and reports."""

import json

import jax
import pytest

from benchmarks import steps

SMALL = [
    steps.StepCase("ssd", 2, 3, 16, 8),
    steps.StepCase("linear_attention", 2, 2, 16, 8),
    steps.StepCase("based_attention", 1, 2, 8, 8),
    steps.StepCase("hedgehog_attention", 1, 2, 8, 8),
]


def test_bytes_are_the_state_twice_and_all_else_once():
    case = steps.StepCase("ssd", 64, 64, 128, 64)
    state = 64 * 64 * 64 * 128 * 4
    tokens = 2 * 64 * 64 * 64 * 2 + 2 * 64 * 128 * 2  # x and y, B and C
    gates = 64 * 64 * 4 + 3 * 64 * 4
    assert case.bytes == 2 * state + tokens + gates
    # 93 us at 2.9 TB/s.
    assert case.bytes / steps.BYTES_PER_SECOND == pytest.approx(93e-6, rel=0.01)
    assert case.layers == 4


@pytest.mark.parametrize("case", steps.CASES, ids=str)
def test_cases_are_calls(case):
    jax.eval_shape(lambda arrays: case.step("tk")(**arrays), case.arrays)


def test_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps, "CASES", SMALL)
    monkeypatch.setattr(steps, "_MAX_LAYERS", 2)
    path = tmp_path / "steps.json"
    options = ["--impls", "xla", "--rounds", "1", "--seconds", "0.001"]
    options += ["--cases", "linear", "--out", str(path)]
    assert steps.main(options, find_gpu=lambda: "a CPU") == 0, capsys.readouterr()
    rows = json.loads(path.read_text())
    assert [row["case"] for row in rows] == [str(SMALL[1])]
    assert all(row["median_us"] > 0 and row["fraction"] > 0 for row in rows)


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(steps, "CASES", SMALL[:1])
    monkeypatch.setattr(steps, "_BAR", 0.0)
    assert steps.main(["--impls", "xla"], find_gpu=lambda: "a CPU") == 1
    assert "WRONG, not timed: result 0 has" in capsys.readouterr().out


def test_a_gpu_is_needed(capsys):
    assert steps.main([], find_gpu=lambda: None) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
