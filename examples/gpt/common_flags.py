"""The flags that the training programs share; those that name a setting override it."""

import dataclasses
import pathlib

from absl import flags

from gpt.settings import COMPUTE_DTYPES, RunSettings

_OVERRIDES = {
    "num_layers": flags.DEFINE_integer("num_layers", None, "number of layers"),
    "head_dim": flags.DEFINE_integer("head_dim", None, "size of a head"),
    "seqlen": flags.DEFINE_integer("seqlen", None, "bytes of context"),
    "vocab_size": flags.DEFINE_integer("vocab_size", None, "rows of the embedding"),
    "batch_size": flags.DEFINE_integer("batch_size", None, "sequences per step"),
    "steps": flags.DEFINE_integer("steps", None, "steps of the whole schedule"),
    "learning_rate": flags.DEFINE_float("learning_rate", None, "highest rate"),
    "warmup_steps": flags.DEFINE_integer("warmup_steps", None, "steps of warm-up"),
    "weight_decay": flags.DEFINE_float("weight_decay", None, "AdamW's, on matrices"),
    "grad_clip": flags.DEFINE_float("grad_clip", None, "largest global gradient norm"),
    "seed": flags.DEFINE_integer("seed", None, "seed of the initial parameters"),
    "data_seed": flags.DEFINE_integer("data_seed", None, "seed of the data order"),
    "compute_dtype": flags.DEFINE_enum(
        "compute_dtype", None, COMPUTE_DTYPES, "dtype of the arithmetic"
    ),
}
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder of *.py files; default: the standard library"
)
_OUT_DIR = flags.DEFINE_string("out_dir", "runs/gpt", "where results go")
_METRICS_FILE = flags.DEFINE_string(
    "metrics_file", None, "JSON of losses and step times; default: OUT_DIR/metrics.json"
)
_RESUME = flags.DEFINE_bool("resume", False, "continue from the checkpoint in out_dir")
_STOP_STEP = flags.DEFINE_integer(
    "stop_step", None, "stop there, with a checkpoint, as if interrupted", lower_bound=1
)
_EVAL_EVERY = flags.DEFINE_integer(
    "eval_every", 50, "steps between validations and checkpoints", lower_bound=1
)
_EVAL_WINDOWS = flags.DEFINE_integer(
    "eval_windows", 32, "windows in a validation (the last: four times)", lower_bound=1
)
_PROMPT = flags.DEFINE_string("prompt", "def ", "start of the sample")
_SAMPLE_BYTES = flags.DEFINE_integer(
    "sample_bytes", 200, "bytes to generate at the end; 0 for none", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.7, "of sampling; 0 takes the likeliest byte", lower_bound=0.0
)


def define_preset(presets: dict) -> flags.FlagHolder:
    return flags.DEFINE_enum(
        "preset", "cpu", tuple(presets), "model and training settings; flags override"
    )


def settings_with_flags(preset: tuple, overrides: dict) -> tuple:
    """(model, train, run): a preset's settings, but for those that a flag gives."""
    flags_of = _OVERRIDES | overrides
    given = {n: f.value for n, f in flags_of.items() if f.value is not None}
    parts = []
    for part in preset:
        names = {field.name for field in dataclasses.fields(part)}
        changes = {n: value for n, value in given.items() if n in names}
        parts.append(dataclasses.replace(part, **changes))
    run = RunSettings(
        out_dir=pathlib.Path(_OUT_DIR.value),
        metrics_file=_METRICS_FILE.value and pathlib.Path(_METRICS_FILE.value),
        data_dir=_DATA_DIR.value and pathlib.Path(_DATA_DIR.value),
        resume=_RESUME.value,
        stop_step=_STOP_STEP.value,
        eval_every=_EVAL_EVERY.value,
        eval_windows=_EVAL_WINDOWS.value,
        prompt=_PROMPT.value,
        sample_bytes=_SAMPLE_BYTES.value,
        temperature=_TEMPERATURE.value,
    )
    return parts[0], parts[1], run
