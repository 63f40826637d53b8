"""Trains one model with three attentions and says whether the loss curves agree.

    python examples/compare_attention.py                  # 124M, T = 2048, one GPU

Every run sees the same batches in the same order, and runs of the same seed start from
the same parameters. How far two curves may differ is measured, not assumed: the
baseline is trained a second time from another seed, and the distance between its two
curves is the spread. Writes comparison.json and comparison.png under --out_dir.
"""

import functools

from absl import app

from gpt import comparison_flags
from gpt.settings import ATTENTIONS, PRESETS


def main(run, argv):
    run("compare_attention", argv)


if __name__ == "__main__":
    run = comparison_flags.define(
        PRESETS, "gpt2-124m", "attention", ATTENTIONS, "tk,cudnn,xla"
    )
    app.run(functools.partial(main, run))
