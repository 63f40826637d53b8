"""The training example: that it learns, resumes, compares, and its errors.

Runs on the CPU through the XLA implementation of attention; what it proves is the
example, not the kernels.
"""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from gpt_cases import EXAMPLES, MODEL, TRAIN, shared_trainer, write_source

import train_gpt
from gpt import checkpoint, comparison, run_flags
from gpt import run as run_module
from gpt.settings import PRESETS, RunSettings
from gpt.training import Trainer


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    for module in (train_gpt, comparison):
        monkeypatch.setattr(module, "Trainer", shared_trainer)


@pytest.fixture
def run_settings(source_folder, tmp_path) -> RunSettings:
    return RunSettings(
        out_dir=tmp_path / "run",
        data_dir=source_folder,
        eval_every=4,
        eval_windows=4,
        prompt="def ",
        sample_bytes=8,
    )


@pytest.fixture
def saved_flags():
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield flags.FLAGS


class TestTraining:
    def test_learns_and_writes_what_it_says(self, run_settings):
        metrics = train_gpt.train(MODEL, TRAIN, run_settings)
        assert metrics["losses"][-1] < metrics["losses"][0] - 1
        assert len(metrics["losses"]) == len(metrics["step_seconds"]) == 12
        assert [point["step"] for point in metrics["validation"]] == [4, 8, 12]
        assert metrics["validation_loss"] < np.log(256) - 1
        written = json.loads((run_settings.out_dir / "metrics.json").read_text())
        assert written["losses"] == metrics["losses"]
        assert written["unigram_entropy"] == metrics["unigram_entropy"]
        png = (run_settings.out_dir / "loss.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert metrics["sample"].startswith("def ")

    def test_resumed_run_has_the_very_same_curve(self, run_settings, monkeypatch):
        whole = train_gpt.train(MODEL, TRAIN, run_settings)
        halves = dataclasses.replace(
            run_settings, out_dir=run_settings.out_dir / "halves", stop_step=7
        )
        first = train_gpt.train(MODEL, TRAIN, halves)
        assert first["losses"] == whole["losses"][:7]
        monkeypatch.setattr(train_gpt, "Trainer", Trainer)  # as a process of its own
        second = train_gpt.train(
            MODEL, TRAIN, dataclasses.replace(halves, resume=True, stop_step=None)
        )
        assert second["losses"] == whole["losses"]
        assert second["validation_loss"] == whole["validation_loss"]
        assert second["sample"] == whole["sample"]

    def test_resuming_a_finished_run_trains_no_further(self, run_settings, capsys):
        whole = train_gpt.train(MODEL, TRAIN, run_settings)
        again = train_gpt.train(
            MODEL, TRAIN, dataclasses.replace(run_settings, resume=True)
        )
        assert again["losses"] == whole["losses"]
        assert again["validation_loss"] == whole["validation_loss"]
        assert "resuming after step 12" in capsys.readouterr().out

    def test_starting_over_keeps_the_earlier_checkpoints(self, run_settings):
        short = dataclasses.replace(run_settings, stop_step=2, sample_bytes=0)
        train_gpt.train(MODEL, TRAIN, short)
        train_gpt.train(MODEL, TRAIN, dataclasses.replace(short, stop_step=3))
        kept = run_settings.out_dir / "checkpoints.previous" / "2"
        assert kept.is_dir()
        assert (run_settings.out_dir / "checkpoints" / "3").is_dir()

    def test_resuming_another_model_names_what_differs(self, run_settings):
        short = dataclasses.replace(run_settings, stop_step=1, sample_bytes=0)
        train_gpt.train(MODEL, TRAIN, short)
        wider = dataclasses.replace(MODEL, head_dim=32, num_layers=1)
        message = (
            r"holds another model: num_layers is 2 in the checkpoint, 1 in the flags; "
            r"head_dim is 16 in the checkpoint, 32 in the flags"
        )
        with pytest.raises(ValueError, match=message):
            train_gpt.train(wider, TRAIN, dataclasses.replace(short, resume=True))

    def test_resuming_other_training_settings_says_so(
        self, run_settings, capsys, monkeypatch
    ):
        short = dataclasses.replace(run_settings, stop_step=1, sample_bytes=0)
        train_gpt.train(MODEL, TRAIN, short)
        monkeypatch.setattr(
            train_gpt, "Trainer", lambda *_: shared_trainer(MODEL, TRAIN)
        )
        train_gpt.train(
            MODEL,
            dataclasses.replace(TRAIN, learning_rate=0.5),
            dataclasses.replace(short, resume=True, stop_step=2),
        )
        assert "learning_rate is 0.01 in the checkpoint, 0.5" in capsys.readouterr().out

    def test_resuming_nothing(self, run_settings):
        with pytest.raises(
            ValueError, match=r"no checkpoint in .*start without --resume"
        ):
            train_gpt.train(
                MODEL, TRAIN, dataclasses.replace(run_settings, resume=True)
            )

    def test_diverging_run_stops_and_saves_no_checkpoint(
        self, run_settings, monkeypatch
    ):
        def diverging(*_):
            return (lambda state, batch: (state, np.float32("nan"))), 0.0

        monkeypatch.setattr(Trainer, "compile_step", diverging)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
            train_gpt.train(MODEL, TRAIN, run_settings)
        checkpoints = checkpoint.Checkpoints(run_settings.out_dir, MODEL, TRAIN)
        assert checkpoints.latest_step() is None
        checkpoints.close()

    def test_interrupt_ends_after_the_step_with_a_checkpoint(
        self, run_settings, monkeypatch, capsys
    ):
        batch_at = Trainer.batch_at

        def interrupted_batch_at(trainer, stream, step):
            if step == 3:  # asked for while step 2 runs
                signal.raise_signal(signal.SIGINT)
            return batch_at(trainer, stream, step)

        monkeypatch.setattr(Trainer, "batch_at", interrupted_batch_at)
        metrics = train_gpt.train(MODEL, TRAIN, run_settings)
        assert len(metrics["losses"]) == 3
        assert (run_settings.out_dir / "checkpoints" / "3").is_dir()
        assert "--resume goes on from there" in capsys.readouterr().out

    def test_second_interrupt_acts_as_usual(self):
        # A shell starts background jobs with SIGINT ignored, which is then the usual.
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with run_module.StopOnInterrupt() as interrupt:
                signal.raise_signal(signal.SIGINT)
                assert interrupt.requested
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, usual)


class TestSettings:
    def test_flags_override_the_preset(self, saved_flags):
        saved_flags.preset = "gpt2-124m"
        saved_flags.steps = 7
        saved_flags.num_layers = 3
        settings, train, run = run_flags.settings_from_flags()
        preset = PRESETS["gpt2-124m"]
        assert settings == dataclasses.replace(preset[0], num_layers=3)
        assert train == dataclasses.replace(preset[1], steps=7)
        assert run == RunSettings(out_dir=pathlib.Path("runs/gpt"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps is 0; expected at least 1"),
            ({"batch_size": -1}, "batch_size is -1; expected at least 1"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0; expected more than 0"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"warmup_steps": -3}, "warmup_steps is -3; expected at least 0"),
            ({"head_dim": 15}, "head_dim is 15; expected an even number"),
            ({"head_dim": 0}, "head_dim is 0; expected at least 1"),
            ({"vocab_size": 100}, "vocab_size is 100; expected at least 256"),
            (
                {"attention": "tk"},
                "attention=tk computes in 16 bits; set compute_dtype",
            ),
        ],
    )
    def test_bad_values(self, changes, message, saved_flags):
        for name, value in changes.items():
            setattr(saved_flags, name, value)
        with pytest.raises(ValueError, match=message):
            run_flags.settings_from_flags()

    @pytest.mark.parametrize("attention", ["tk", "cudnn"])
    def test_gpu_attention_without_gpu(self, attention):
        train = dataclasses.replace(
            TRAIN, attention=attention, compute_dtype="bfloat16"
        )
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU")
        with pytest.raises(ValueError, match=f"attention={attention} needs an NVIDIA"):
            Trainer(MODEL, train)

    def test_sample_longer_than_context(self, run_settings):
        run = dataclasses.replace(run_settings, sample_bytes=100)
        with pytest.raises(
            ValueError, match="sample_bytes is 100; expected at most 28"
        ):
            train_gpt.train(MODEL, TRAIN, run)

    def test_context_longer_than_the_data(self, run_settings):
        long = dataclasses.replace(MODEL, seqlen=10**6)
        with pytest.raises(ValueError, match="expected more bytes than seqlen"):
            train_gpt.train(long, TRAIN, run_settings)


class TestCommandLine:
    def _run(self, script, *arguments):
        return subprocess.run(
            [sys.executable, str(EXAMPLES / script), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )

    def test_trains_and_fails_on_a_margin_it_cannot_reach(
        self, source_folder, tmp_path
    ):
        done = self._run(
            "train_gpt.py",
            "--num_layers=1",
            "--num_heads=1",
            "--head_dim=16",
            "--seqlen=32",
            "--batch_size=2",
            "--steps=2",
            "--sample_bytes=4",
            "--require_margin=100",
            f"--data_dir={source_folder}",
            f"--out_dir={tmp_path}",
        )
        assert "unigram entropy" in done.stdout and "validation loss" in done.stdout
        assert "2/2" in done.stderr
        assert done.returncode == 1
        assert "--require_margin asks for 100.0" in done.stderr
        assert "Traceback" not in done.stderr

    def test_bad_value_is_one_line(self, tmp_path):
        done = self._run("train_gpt.py", "--batch_size=0", f"--out_dir={tmp_path}")
        assert done.returncode == 1
        expected = "train_gpt: batch_size is 0; expected at least 1"
        assert done.stderr.strip().splitlines()[-1] == expected
        assert not list(tmp_path.iterdir())


class TestComparison:
    def test_measures_against_the_spread_of_two_seeds(self, source_folder, tmp_path):
        result = comparison.compare(
            MODEL,
            TRAIN,
            names=["auto", "xla"],
            baseline="xla",
            out_dir=tmp_path,
            data_dir=source_folder,
        )
        runs = result["runs"]
        assert list(runs) == ["auto, seed 0", "xla, seed 0", "xla, seed 1"]
        assert runs["xla, seed 0"]["distance"]["max_abs"] == 0
        assert runs["xla, seed 1"]["relative_to_spread"]["mean_abs"] == 1
        assert runs["auto, seed 0"]["relative_to_spread"]["mean_abs"] < 0.1
        assert runs["auto, seed 0"]["losses"] != runs["xla, seed 1"]["losses"]
        written = json.loads((tmp_path / "comparison.json").read_text())
        assert written["spread"] == result["spread"]
        assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
        assert "| xla, seed 1 |" in comparison.table(result)

    def test_baseline_must_be_compared(self, tmp_path):
        with pytest.raises(ValueError, match="baseline 'xla' among them"):
            comparison.compare(
                MODEL, TRAIN, names=["auto"], baseline="xla", out_dir=tmp_path
            )
