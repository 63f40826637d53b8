"""What the tests of the training example share: a tiny model and a folder of source."""

import functools
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).absolute().parent.parent / "examples"

_NEEDS = "the demo extra is not installed: pip install 'tk_jax[demo]'"
for _name in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(_name, reason=_NEEDS)

from gpt.settings import ModelSettings, TrainSettings  # noqa: E402  (needs the extra)
from gpt.training import Trainer  # noqa: E402

MODEL = ModelSettings(num_layers=2, num_heads=2, head_dim=16, seqlen=32, vocab_size=256)
TRAIN = TrainSettings(batch_size=4, steps=12, learning_rate=1e-2, warmup_steps=2)

# One of each settings: what it compiles is most of these tests' time. Holds no state.
shared_trainer = functools.cache(Trainer)


def write_source(folder: pathlib.Path) -> pathlib.Path:
    """40 small files, so that both streams get some."""
    for number in range(40):
        lines = [f"def f_{number}_{i}(x):\n    return x + {i}\n" for i in range(20)]
        (folder / f"part_{number}.py").write_text("\n".join(lines))
    return folder
