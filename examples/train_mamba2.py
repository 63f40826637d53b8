"""Trains a byte-level Mamba-2 on Python's own source with tk_jax.ssd.

    python examples/train_mamba2.py                          # two CPU cores, a minute
    python examples/train_mamba2.py --resume                 # go on where a run stopped
    python examples/train_mamba2.py --preset=mamba2-130m     # one GPU, T = 2048

The text, the loop and the files are those of train_gpt.py. Writes the loss curve, the
numbers behind it and a checkpoint under --out_dir.
"""

import functools
from typing import Any

from absl import app

from gpt import mamba2_flags, run
from gpt.mamba2 import Mamba2
from gpt.mamba2_settings import Mamba2Settings, Mamba2TrainSettings
from gpt.settings import RunSettings
from gpt.training import Trainer


def train(
    settings: Mamba2Settings,
    train_settings: Mamba2TrainSettings,
    run_settings: RunSettings,
) -> dict[str, Any]:
    """Trains, writes everything under run_settings.out_dir, returns the metrics."""
    make_trainer = functools.partial(Trainer, make_model=Mamba2)
    return run.train(make_trainer, settings, train_settings, run_settings)


def main(settings_from_flags, argv):
    run.run_from_flags("train_mamba2", argv, settings_from_flags, train)


if __name__ == "__main__":
    app.run(functools.partial(main, mamba2_flags.define()))
