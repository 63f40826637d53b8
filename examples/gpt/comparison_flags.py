"""The flags of the programs that compare, and what they do."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

from absl import flags

from gpt.comparison import compare, report


def define(
    presets: dict, preset: str, setting: str, known: tuple[str, ...], default: str
) -> Callable[..., None]:
    """Defines them; returns what runs a program of that name once they are parsed.

    Not when this is imported: some have the names of the training programs'.
    ``setting`` is what is compared, of which ``known`` are the values.
    """
    chosen = flags.DEFINE_enum("preset", preset, tuple(presets), "model and training")
    names = flags.DEFINE_list(f"{setting}s", default, f"{setting}s to compare")
    baseline = flags.DEFINE_enum(
        "baseline", "xla", known, f"the {setting} that runs from a second seed too"
    )
    steps = flags.DEFINE_integer("steps", 300, "steps of each run", lower_bound=2)
    batch_size = flags.DEFINE_integer(
        "batch_size", 4, "sequences a step", lower_bound=1
    )
    seed = flags.DEFINE_integer("seed", 0, "seed of the parameters", lower_bound=0)
    data_dir = flags.DEFINE_string(
        "data_dir", None, "folder of *.py files; default: the standard library"
    )
    out_dir = flags.DEFINE_string("out_dir", "runs/comparison", "where results go")

    def run(program: str, argv: list[str], **options) -> None:
        if len(argv) > 1:
            sys.exit(f"{program}: unexpected argument {argv[1]!r}")
        settings, train = presets[chosen.value]
        try:
            result = compare(
                settings,
                dataclasses.replace(
                    train,
                    steps=steps.value,
                    batch_size=batch_size.value,
                    seed=seed.value,
                ),
                setting=setting,
                names=names.value,
                baseline=baseline.value,
                out_dir=pathlib.Path(out_dir.value),
                data_dir=data_dir.value and pathlib.Path(data_dir.value),
                **options,
            )
        except (ValueError, NotImplementedError) as error:
            sys.exit(f"{program}: {error}")
        report(program, result)

    return run
