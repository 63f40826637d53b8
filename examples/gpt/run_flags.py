"""The flags of train_gpt.py alone. Those that name a setting override the preset's."""

from absl import flags

from gpt.common_flags import define_preset, settings_with_flags
from gpt.settings import (
    ATTENTIONS,
    PRESETS,
    ModelSettings,
    RunSettings,
    TrainSettings,
)

_PRESET = define_preset(PRESETS)
_OVERRIDES = {
    "num_heads": flags.DEFINE_integer("num_heads", None, "heads; width is heads x dim"),
    "attention": flags.DEFINE_enum(
        "attention",
        None,
        ATTENTIONS,
        "auto: tk_jax.attention as it chooses; tk: its kernels or an error; cudnn, "
        "xla: jax.nn.dot_product_attention",
    ),
}


def settings_from_flags() -> tuple[ModelSettings, TrainSettings, RunSettings]:
    return settings_with_flags(PRESETS[_PRESET.value], _OVERRIDES)
