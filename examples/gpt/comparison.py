"""Loss curves and step times of one model, computed in several ways.

How far two of them may differ is the spread of two seeds.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gpt import data, plot
from gpt.settings import OptimizerSettings
from gpt.training import Trainer, count_parameters, run_steps

_WARMUP = 5  # steps left out of the step times


def train_once(
    trainer: Trainer, step_function: Callable, seed: int, stream: np.ndarray, label: str
) -> dict[str, Any]:
    """One run from scratch: its losses and step times."""
    steps = trainer.train.steps
    losses, seconds = [], []
    with tqdm(total=steps, desc=label, unit="step", mininterval=2) as bar:

        def after_step(step, state, loss, step_seconds):
            losses.append(loss)
            seconds.append(step_seconds)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            return False

        run_steps(
            step_function,
            trainer.initial_state(seed),
            range(steps),
            lambda step: trainer.batch_at(stream, step),
            after_step,
        )
    return {
        "seed": seed,
        "median_step_seconds": statistics.median(seconds[_WARMUP:] or seconds),
        "losses": losses,
        "step_seconds": seconds,
    }


def distance(losses: list[float], other: list[float]) -> dict[str, float]:
    difference = np.abs(np.subtract(losses, other))
    return {
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "last_tenth_mean_abs": float(difference[-max(1, len(losses) // 10) :].mean()),
    }


def compare(
    settings,
    train: OptimizerSettings,
    *,
    setting: str = "attention",
    names: list[str],
    baseline: str,
    out_dir: pathlib.Path,
    data_dir: pathlib.Path | None = None,
    make_trainer: Callable[..., Trainer] | None = None,
) -> dict[str, Any]:
    """Runs all, writes comparison.json and comparison.png, returns what was written.

    ``setting`` is the one of ``train`` that ``names`` are values of.
    """
    if baseline not in names or len(set(names)) != len(names):
        raise ValueError(
            f"{setting}s is {names}; expected no duplicate, and the baseline "
            f"{baseline!r} among them"
        )
    make_trainer = make_trainer or Trainer
    trainers = {  # built first, so that a wrong name costs no training
        name: make_trainer(settings, dataclasses.replace(train, **{setting: name}))
        for name in names
    }
    stream = data.load_corpus(data_dir).train
    data.check_length(stream, settings.seqlen)
    start = time.perf_counter()
    runs = {}
    for name, trainer in trainers.items():
        shapes = jax.eval_shape(trainer.initial_state)
        step_function, compile_seconds = trainer.compile_step(shapes, stream)
        for seed in (train.seed, train.seed + 1)[: 1 + (name == baseline)]:
            label = f"{name}, seed {seed}"
            runs[label] = {setting: name, "compile_seconds": compile_seconds}
            runs[label] |= train_once(trainer, step_function, seed, stream, label)
    reference = runs[f"{baseline}, seed {train.seed}"]
    other_seed = runs[f"{baseline}, seed {train.seed + 1}"]
    spread = distance(other_seed["losses"], reference["losses"])
    for run in runs.values():
        run["distance"] = distance(run["losses"], reference["losses"])
        run["relative_to_spread"] = {
            key: value / spread[key] for key, value in run["distance"].items()
        }
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": dataclasses.asdict(settings),
        "train": dataclasses.asdict(train),
        "num_parameters": count_parameters(shapes.params),
        "baseline": baseline,
        "spread": spread,
        "total_seconds": time.perf_counter() - start,
        "runs": runs,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "comparison.json").write_text(json.dumps(result, indent=1))
    curves = {label: run["losses"] for label, run in runs.items()}
    plot.plot_comparison(
        curves, f"{baseline}, seed {train.seed}", out_dir / "comparison.png"
    )
    return result


def report(program: str, result: dict[str, Any]) -> None:
    """Prints the table; a run that is too far from the baseline ends the program."""
    print(
        f"{result['num_parameters']:,} parameters on {result['device']}, "
        f"{result['total_seconds']:.0f} s in all\n{table(result)}"
    )
    too_far = [
        label
        for label, run in result["runs"].items()
        if run["seed"] == result["train"]["seed"]
        and run["relative_to_spread"]["mean_abs"] > 1
    ]
    if too_far:
        sys.exit(
            f"{program}: further from the baseline than a second seed of it: "
            + "; ".join(too_far)
        )


def table(result: dict[str, Any]) -> str:
    lines = [
        "| run | step, ms | tokens/s | compile, s | final loss | mean distance | "
        "of the spread | of the spread, last tenth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tokens = result["train"]["batch_size"] * result["model"]["seqlen"]
    for label, run in result["runs"].items():
        lines.append(
            f"| {label} | {run['median_step_seconds'] * 1e3:.2f} "
            f"| {tokens / run['median_step_seconds']:,.0f} "
            f"| {run['compile_seconds']:.1f} | {run['losses'][-1]:.4f} "
            f"| {run['distance']['mean_abs']:.4f} "
            f"| {run['relative_to_spread']['mean_abs']:.2f} "
            f"| {run['relative_to_spread']['last_tenth_mean_abs']:.2f} |"
        )
    return "\n".join(lines)
