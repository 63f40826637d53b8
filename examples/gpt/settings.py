"""What a run is made of: frozen dataclasses, and the presets."""

import dataclasses
import pathlib

ATTENTIONS = ("auto", "tk", "cudnn", "xla")
COMPUTE_DTYPES = ("float32", "bfloat16")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_sizes(settings) -> None:
    """Of a model, all fields of which are sizes."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        check(value >= 1, f"{field.name} is {value}; expected at least 1")
    check(
        settings.vocab_size >= 256,
        f"vocab_size is {settings.vocab_size}; expected at least 256, one per byte",
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The shape of the model. A checkpoint fits a model of the same settings only."""

    num_layers: int
    num_heads: int
    head_dim: int
    seqlen: int
    vocab_size: int

    def __post_init__(self):
        check_sizes(self)
        check(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; expected an even number, as positions turn "
            "pairs",
        )

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """What decides a loss curve besides the model: data order, optimizer, schedule."""

    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    data_seed: int = 0
    compute_dtype: str = "float32"

    def __post_init__(self):
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            check(value >= 1, f"{name} is {value}; expected at least 1")
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}; expected more than 0")
        for name in ("warmup_steps", "weight_decay", "seed", "data_seed"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}; expected at least 0")
        check(
            self.compute_dtype in COMPUTE_DTYPES,
            f"compute_dtype is {self.compute_dtype!r}; "
            f"expected one of {COMPUTE_DTYPES}",
        )


@dataclasses.dataclass(frozen=True)
class TrainSettings(OptimizerSettings):
    """The same of a GPT, and what computes its attention."""

    attention: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        check(
            self.attention in ATTENTIONS,
            f"attention is {self.attention!r}; expected one of {ATTENTIONS}",
        )
        check(
            not (self.attention in ("tk", "cudnn") and self.compute_dtype == "float32"),
            f"attention={self.attention} computes in 16 bits; "
            "set compute_dtype=bfloat16, or attention=auto or xla",
        )

    @property
    def what_runs(self) -> str:
        return f"attention: {self.attention}"


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Where a run reads and writes, and when; nothing that changes its loss curve."""

    out_dir: pathlib.Path
    metrics_file: pathlib.Path | None = None
    data_dir: pathlib.Path | None = None
    resume: bool = False
    stop_step: int | None = None
    eval_every: int = 50
    eval_windows: int = 32
    prompt: str = "def "
    sample_bytes: int = 200
    temperature: float = 0.7


# The CPU preset is what two cores train to Python-like text in under two minutes. The
# other has GPT-2 small's shape [Radford et al. 2019, table 2] at twice its context and
# with rotary positions. Its vocabulary is far larger than the 256 bytes that occur, so
# that a step costs what a step of that model costs.
PRESETS = {
    "cpu": (
        ModelSettings(
            num_layers=4, num_heads=2, head_dim=64, seqlen=256, vocab_size=256
        ),
        TrainSettings(batch_size=4, steps=250, learning_rate=4e-3, warmup_steps=30),
    ),
    "gpt2-124m": (
        ModelSettings(
            num_layers=12, num_heads=12, head_dim=64, seqlen=2048, vocab_size=50304
        ),
        TrainSettings(
            batch_size=8,
            steps=300,
            learning_rate=6e-4,
            warmup_steps=60,
            compute_dtype="bfloat16",
        ),
    ),
}
