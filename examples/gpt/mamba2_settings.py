"""What a run of the Mamba-2 example is made of, and its presets."""

import dataclasses

from gpt.settings import OptimizerSettings, check, check_sizes

IMPLEMENTATIONS = ("auto", "tk", "xla")


@dataclasses.dataclass(frozen=True)
class Mamba2Settings:
    """The shape of the model. A checkpoint fits a model of the same settings only."""

    num_layers: int
    model_dim: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_width: int
    expand: int
    seqlen: int
    vocab_size: int

    def __post_init__(self):
        check_sizes(self)
        check(
            self.inner_dim % self.head_dim == 0,
            f"head_dim is {self.head_dim}; expected a divisor of expand * model_dim, "
            f"which is {self.inner_dim}",
        )
        check(
            self.num_heads % self.num_groups == 0,
            f"num_groups is {self.num_groups}; expected a divisor of the "
            f"{self.num_heads} heads",
        )

    @property
    def inner_dim(self) -> int:
        return self.expand * self.model_dim

    @property
    def num_heads(self) -> int:
        return self.inner_dim // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that the convolution sees: those of x, B and C."""
        return self.inner_dim + 2 * self.num_groups * self.state_dim


@dataclasses.dataclass(frozen=True)
class Mamba2TrainSettings(OptimizerSettings):
    """What decides a loss curve besides the model, and what computes its SSD."""

    implementation: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        check(
            self.implementation in IMPLEMENTATIONS,
            f"implementation is {self.implementation!r}; "
            f"expected one of {IMPLEMENTATIONS}",
        )

    @property
    def what_runs(self) -> str:
        return f"ssd: {self.implementation}"


# The CPU preset is what two cores train to Python-like text in about a minute. The
# other has the shape of the paper's 130M model [Dao & Gu 2024, section 9.2] at its
# context, and the vocabulary of gpt2-124m.
PRESETS = {
    "cpu": (
        Mamba2Settings(
            num_layers=3,
            model_dim=128,
            head_dim=64,
            state_dim=32,
            num_groups=1,
            conv_width=4,
            expand=2,
            seqlen=256,
            vocab_size=256,
        ),
        Mamba2TrainSettings(
            batch_size=4, steps=200, learning_rate=4e-3, warmup_steps=20
        ),
    ),
    "mamba2-130m": (
        Mamba2Settings(
            num_layers=24,
            model_dim=768,
            head_dim=64,
            state_dim=128,
            num_groups=1,
            conv_width=4,
            expand=2,
            seqlen=2048,
            vocab_size=50304,
        ),
        Mamba2TrainSettings(
            batch_size=8,
            steps=300,
            learning_rate=6e-4,
            warmup_steps=60,
            compute_dtype="bfloat16",
        ),
    ),
}
