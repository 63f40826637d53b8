"""Trains one Mamba-2 with tk_jax.ssd's kernels and with XLA: step times, loss curves.

    python examples/compare_ssd.py                        # 130M, T = 2048, one GPU

As compare_attention.py does it: every run sees the same batches, runs of the same seed
start from the same parameters, and how far two curves may differ is the distance
between two seeds of the baseline. Writes comparison.json and comparison.png under
--out_dir.
"""

import functools

from absl import app, flags

from gpt import comparison_flags
from gpt.mamba2 import Mamba2
from gpt.mamba2_settings import IMPLEMENTATIONS, PRESETS
from gpt.training import Trainer


def main(run, argv):
    make_trainer = functools.partial(Trainer, make_model=Mamba2)
    run("compare_ssd", argv, make_trainer=make_trainer)


if __name__ == "__main__":
    run = comparison_flags.define(
        PRESETS, "mamba2-130m", "implementation", IMPLEMENTATIONS, "tk,xla"
    )
    flags.FLAGS.set_default("out_dir", "runs/ssd_comparison")
    app.run(functools.partial(main, run))
