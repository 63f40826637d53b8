"""Trains one model with three attentions and says whether the loss curves agree.

    python examples/compare_attention.py                  # 124M, T = 2048, one GPU

Every run sees the same batches in the same order, and runs of the same seed start from
the same parameters. How far two curves may differ is measured, not assumed: the
baseline is trained a second time from another seed, and the distance between its two
curves is the spread. Writes comparison.json and comparison.png under --out_dir.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from gpt.comparison import compare, table
from gpt.settings import ATTENTIONS, PRESETS

_PRESET = flags.DEFINE_enum("preset", "gpt2-124m", tuple(PRESETS), "model and training")
_ATTENTIONS = flags.DEFINE_list("attentions", "tk,cudnn,xla", "attentions to compare")
_BASELINE = flags.DEFINE_enum(
    "baseline", "xla", ATTENTIONS, "the attention that runs from a second seed too"
)
_STEPS = flags.DEFINE_integer("steps", 300, "steps of each run", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "sequences a step", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the parameters", lower_bound=0)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder of *.py files; default: the standard library"
)
_OUT_DIR = flags.DEFINE_string("out_dir", "runs/comparison", "where results go")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"compare_attention: unexpected argument {argv[1]!r}")
    settings, train = PRESETS[_PRESET.value]
    try:
        result = compare(
            settings,
            dataclasses.replace(
                train,
                steps=_STEPS.value,
                batch_size=_BATCH_SIZE.value,
                seed=_SEED.value,
            ),
            attentions=_ATTENTIONS.value,
            baseline=_BASELINE.value,
            out_dir=pathlib.Path(_OUT_DIR.value),
            data_dir=_DATA_DIR.value and pathlib.Path(_DATA_DIR.value),
        )
    except ValueError as error:
        sys.exit(f"compare_attention: {error}")
    print(
        f"{result['num_parameters']:,} parameters on {result['device']}, "
        f"{result['total_seconds']:.0f} s in all\n{table(result)}"
    )
    too_far = [
        label
        for label, run in result["runs"].items()
        if run["seed"] == train.seed and run["relative_to_spread"]["mean_abs"] > 1
    ]
    if too_far:
        sys.exit(
            "compare_attention: further from the baseline than a second seed of it: "
            + "; ".join(too_far)
        )


if __name__ == "__main__":
    app.run(main)
