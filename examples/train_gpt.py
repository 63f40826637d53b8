"""Trains a byte-level GPT on Python's own source with tk_jax.attention.

    python examples/train_gpt.py                          # two CPU cores, two minutes
    python examples/train_gpt.py --resume                 # go on where a run stopped
    python examples/train_gpt.py --preset=gpt2-124m       # one GPU, T = 2048

Writes the loss curve, the numbers behind it and a checkpoint under --out_dir.
"""

from typing import Any

from absl import app

from gpt import run
from gpt.run_flags import settings_from_flags
from gpt.settings import ModelSettings, RunSettings, TrainSettings
from gpt.training import Trainer


def train(
    settings: ModelSettings, train_settings: TrainSettings, run_settings: RunSettings
) -> dict[str, Any]:
    """Trains, writes everything under run_settings.out_dir, returns the metrics."""
    return run.train(Trainer, settings, train_settings, run_settings)


def main(argv):
    run.run_from_flags("train_gpt", argv, settings_from_flags, train)


if __name__ == "__main__":
    app.run(main)
