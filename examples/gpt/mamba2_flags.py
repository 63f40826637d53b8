"""The flags of train_mamba2.py alone. Those that name a setting override the preset."""

import functools
from collections.abc import Callable

from absl import flags

from gpt.common_flags import define_preset, settings_with_flags
from gpt.mamba2_settings import (
    IMPLEMENTATIONS,
    PRESETS,
    Mamba2Settings,
    Mamba2TrainSettings,
)
from gpt.settings import RunSettings


def define() -> Callable[[], tuple[Mamba2Settings, Mamba2TrainSettings, RunSettings]]:
    """Defines them, and returns what makes settings of all flags once they are parsed.

    Not when this is imported: some have the names of train_gpt.py's.
    """
    preset = define_preset(PRESETS)
    integer = functools.partial(flags.DEFINE_integer, default=None)
    overrides = {
        "model_dim": integer("model_dim", help="width of the residual stream"),
        "state_dim": integer("state_dim", help="size of a channel's state"),
        "num_groups": integer("num_groups", help="groups of B and C"),
        "conv_width": integer("conv_width", help="taps of the convolution"),
        "expand": integer("expand", help="inner width over model_dim"),
        "implementation": flags.DEFINE_enum(
            "implementation",
            None,
            IMPLEMENTATIONS,
            "auto: tk_jax.ssd as it chooses; tk: its kernels or an error; xla: XLA",
        ),
    }
    flags.FLAGS.set_default("out_dir", "runs/mamba2")
    return lambda: settings_with_flags(PRESETS[preset.value], overrides)
