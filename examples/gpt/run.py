"""A run from the command line: training, validation, checkpoints, files, messages."""

import dataclasses
import json
import math
import pathlib
import signal
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging
from tqdm import tqdm

from gpt import checkpoint, data, plot
from gpt.settings import OptimizerSettings, RunSettings
from gpt.training import Trainer, TrainState, count_parameters, run_steps

_REQUIRE_MARGIN = flags.DEFINE_float(
    "require_margin",
    None,
    "fail unless the validation loss ends this far below the unigram entropy (nats)",
)


class StopOnInterrupt:
    """Turns the first Ctrl-C into a request to stop; the second acts as usual."""

    def __enter__(self):
        self.requested = False
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._previous)


def train(
    make_trainer: Callable[..., Trainer],
    settings,
    train_settings: OptimizerSettings,
    run: RunSettings,
) -> dict[str, Any]:
    """Trains, writes everything under run.out_dir, and returns the metrics."""
    corpus = data.load_corpus(run.data_dir)
    for stream in (corpus.train, corpus.validation):
        data.check_length(stream, settings.seqlen)
    if run.sample_bytes and len(run.prompt.encode()) + run.sample_bytes > (
        settings.seqlen
    ):
        raise ValueError(
            f"sample_bytes is {run.sample_bytes}; expected at most "
            f"{settings.seqlen - len(run.prompt.encode())}: prompt and sample share "
            f"the context of {settings.seqlen} bytes"
        )
    if run.sample_bytes and not run.prompt:
        raise ValueError("prompt is empty; expected at least one character")
    entropy = data.unigram_entropy(corpus.validation)
    trainer = make_trainer(settings, train_settings)
    state = trainer.initial_state()
    num_parameters = count_parameters(state.params)
    print(
        f"data: {corpus.num_files} files, {corpus.train.size:,} bytes to train on, "
        f"{corpus.validation.size:,} to validate with\n"
        f"model: {num_parameters:,} parameters, {settings}\n"
        f"{train_settings.what_runs} in {train_settings.compute_dtype} on "
        f"{jax.devices()[0].device_kind}"
    )

    history: dict[str, Any] = {"losses": [], "step_seconds": [], "validation": []}
    if not run.resume and (kept := checkpoint.set_aside(run.out_dir)):
        print(f"starting over; the earlier run's checkpoints are in {kept}")
    checkpoints = checkpoint.Checkpoints(run.out_dir, settings, train_settings)
    try:
        if run.resume:
            state, history, notes = checkpoints.restore(checkpoint.abstract(state))
            print(f"resuming after step {int(state.step)}")
            for note in notes:
                print(f"  {note}: the loss curve will not be the old one continued")
        state, compile_seconds = _train_loop(
            trainer, state, corpus, run, history, checkpoints
        )
    finally:
        checkpoints.close()

    tokens = train_settings.batch_size * settings.seqlen
    seconds = statistics.median(history["step_seconds"])
    metrics = {
        "model": dataclasses.asdict(settings),
        "train": dataclasses.asdict(train_settings),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_parameters": num_parameters,
        "compile_seconds": compile_seconds,
        "median_step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "unigram_entropy": entropy,
        "validation_loss": trainer.validation_loss(
            state.params, corpus.validation, 4 * run.eval_windows
        ),
        **history,
    }
    metrics_file = run.metrics_file or run.out_dir / "metrics.json"
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    metrics_file.write_text(json.dumps(metrics, indent=1))
    curve_file = run.out_dir / "loss.png"
    plot.plot_training(history, entropy, curve_file)
    if run.sample_bytes:
        metrics["sample"] = trainer.sample(
            state.params,
            run.prompt.encode(),
            run.sample_bytes,
            temperature=run.temperature,
            seed=train_settings.seed,
        ).decode(errors="replace")
    _report(metrics, int(state.step), [metrics_file, curve_file, checkpoints.folder])
    return metrics


def _train_loop(
    trainer: Trainer,
    state: TrainState,
    corpus: data.Corpus,
    run: RunSettings,
    history: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
) -> tuple[TrainState, float]:
    settings, train_settings = trainer.settings, trainer.train
    first = int(state.step)
    last = min(train_settings.steps, run.stop_step or train_settings.steps)
    step_function, compile_seconds = trainer.compile_step(state, corpus.train)
    tokens = train_settings.batch_size * settings.seqlen
    is_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=train_settings.steps,
        initial=first,
        unit="step",
        mininterval=0.2 if is_terminal else 10,
        dynamic_ncols=is_terminal,
    )
    with bar, StopOnInterrupt() as interrupt:

        def after_step(step, state, loss, seconds):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; "
                    "the last checkpoint is from before it"
                )
            history["losses"].append(loss)
            history["step_seconds"].append(seconds)
            done = step + 1
            stop = interrupt.requested or done == last
            if done % run.eval_every == 0 or stop:
                value = trainer.validation_loss(
                    state.params, corpus.validation, run.eval_windows
                )
                history["validation"].append({"step": done, "loss": value})
                checkpoints.save(state, history)
            validation = history["validation"]
            bar.set_postfix_str(
                f"loss {loss:.3f}, validation "
                f"{validation[-1]['loss'] if validation else math.nan:.3f}, "
                f"{tokens / seconds:,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            return stop

        state = run_steps(
            step_function,
            state,
            range(first, last),
            lambda step: trainer.batch_at(corpus.train, step),
            after_step,
        )
    return state, compile_seconds


def _report(metrics: dict[str, Any], step: int, files: list[pathlib.Path]) -> None:
    entropy, loss = metrics["unigram_entropy"], metrics["validation_loss"]
    print(
        f"compiled in {metrics['compile_seconds']:.1f} s; "
        f"{metrics['median_step_seconds'] * 1e3:.1f} ms a step, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
    )
    if "sample" in metrics:
        print(f"sample:\n{metrics['sample']}\n")
    print(
        f"unigram entropy {entropy:.3f} nats per byte ({entropy / math.log(2):.2f} "
        f"bits)\nvalidation loss {loss:.3f} nats per byte "
        f"({loss / math.log(2):.2f} bits) after {step} steps"
    )
    total = metrics["train"]["steps"]
    if step < total:
        print(f"stopped after {step} of {total} steps; --resume goes on from there")
    print("wrote " + ", ".join(map(str, files)))


def run_from_flags(
    program: str, argv: list[str], settings_from_flags: Callable, train: Callable
) -> None:
    """Calls train(*settings_from_flags()); what is wrong ends it with one line."""
    if len(argv) > 1:
        sys.exit(f"{program}: unexpected argument {argv[1]!r}; flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs a page per checkpoint
    try:
        metrics = train(*settings_from_flags())
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"{program}: {error}")
    margin = metrics["unigram_entropy"] - metrics["validation_loss"]
    if _REQUIRE_MARGIN.value is not None and margin < _REQUIRE_MARGIN.value:
        sys.exit(
            f"{program}: the validation loss is {margin:.3f} nats below the unigram "
            f"entropy; --require_margin asks for {_REQUIRE_MARGIN.value}"
        )
