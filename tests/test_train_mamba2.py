"""The Mamba-2 example: that it is the paper's block, that it learns, and its errors."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gpt_cases import EXAMPLES, write_source

import tk_jax
import train_mamba2
from gpt import comparison
from gpt.mamba2 import Mamba2, Mamba2Block
from gpt.mamba2_settings import PRESETS, Mamba2Settings, Mamba2TrainSettings
from gpt.settings import RunSettings
from gpt.training import Trainer, count_parameters

MODEL = Mamba2Settings(
    num_layers=2,
    model_dim=16,
    head_dim=8,
    state_dim=4,
    num_groups=2,
    conv_width=4,
    expand=2,
    seqlen=32,
    vocab_size=256,
)
TRAIN = Mamba2TrainSettings(batch_size=4, steps=12, learning_rate=1e-2, warmup_steps=2)


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * scale


def segment_sums(a):
    """[..., L] -> [..., L, L]: sums of a over j + 1 .. i, -inf above the diagonal."""
    length = a.shape[-1]
    sums = np.full((*a.shape, length), -np.inf)
    for i in range(length):
        for j in range(i + 1):
            sums[..., i, j] = a[..., j + 1 : i + 1].sum(-1)
    return sums


def block_decomposition(X, A, B, C, block):
    """Listing 1's four steps: X [T, H, P], A [T, H], B and C [T, H, N]."""
    seqlen, heads, _ = X.shape
    X, B, C = (a.reshape(seqlen // block, block, heads, -1) for a in (X, B, C))
    A = A.reshape(seqlen // block, block, heads).transpose(2, 0, 1)  # [H, c, l]
    sums = A.cumsum(-1)
    # 1. Within the blocks: L is the matrix of decays, and L * (C B^T) the attention.
    L = np.exp(segment_sums(A))
    within = np.einsum("clhn,cshn,hcls,cshp->clhp", C, B, L, X)
    # 2. The state that each block makes from nothing.
    left = np.exp(sums[..., -1:] - sums)
    states = np.einsum("clhn,hcl,clhp->chpn", B, left, X)
    # 3. The states at the blocks' starts, after one of zeros.
    states = np.concatenate([np.zeros_like(states[:1]), states])
    between = np.pad(sums[..., -1], ((0, 0), (1, 0)))
    carried = np.einsum("hzc,chpn->zhpn", np.exp(segment_sums(between)), states)[:-1]
    # 4. What they add to the outputs.
    from_states = np.einsum("clhn,chpn,hcl->clhp", C, carried, np.exp(sums))
    return (within + from_states).reshape(seqlen, heads, -1)


def expected_block(params, u):
    """The block in float64, for one sequence u [T, model_dim]."""
    seqlen = u.shape[0]
    inner, heads, groups = MODEL.inner_dim, MODEL.num_heads, MODEL.num_groups
    x = rms_norm(u, params["norm"]["scale"], 1e-6) @ params["project_in"]["kernel"]
    z, xBC, dt = np.split(x, [inner, inner + MODEL.conv_dim], -1)
    conv = np.zeros_like(xBC) + params["taps_bias"]
    for t in range(seqlen):
        for i in range(MODEL.conv_width):
            source = t - (MODEL.conv_width - 1) + i
            if source >= 0:
                conv[t] += params["taps"][i] * xBC[source]
    x, B, C = np.split(silu(conv), [inner, inner + groups * MODEL.state_dim], -1)
    x = x.reshape(seqlen, heads, -1)
    B, C = (
        a.reshape(seqlen, groups, -1).repeat(heads // groups, axis=1) for a in (B, C)
    )
    dt = np.log1p(np.exp(dt + params["dt_bias"]))
    A = -np.exp(params["log_A"]) * dt
    y = block_decomposition(x * dt[..., None], A, B, C, block=4)
    y = (y + params["D"][:, None] * x).reshape(seqlen, -1)
    y = rms_norm(y * silu(z), params["gate_scale"], 1e-5)
    return u + y @ params["project_out"]["kernel"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)]
)
def test_block_is_the_papers(dtype, tolerance):
    """Against a float64 implementation of the listing, from the same parameters."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        block = Mamba2Block(MODEL, tk_jax.ssd, dtype, rngs=nnx.Rngs(0))
        graph, state = nnx.split(block)
        # All parameters away from where they start, as zeros and ones hide mistakes.
        state = jax.tree.map(
            lambda x: (
                x.astype(dtype) + 0.3 * rng.standard_normal(x.shape).astype(dtype)
            ),
            state,
        )
        params = nnx.to_pure_dict(state)
        u = rng.standard_normal((2, 16, MODEL.model_dim))
        apply = functools.partial(lambda graph, s, u: nnx.merge(graph, s)(u), graph)
        got = np.asarray(jax.jit(apply)(state, jnp.asarray(u, dtype)), np.float64)
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected = np.stack([expected_block(exact, row) for row in u])
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    assert np.abs(expected - u).max() > 0.1


def test_learns_and_samples(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    run = RunSettings(
        out_dir=tmp_path / "run",
        data_dir=write_source(source),
        eval_every=12,
        eval_windows=4,
        sample_bytes=4,
    )
    metrics = train_mamba2.train(MODEL, TRAIN, run)
    assert metrics["losses"][-1] < metrics["losses"][0] - 1
    assert metrics["sample"].startswith("def ")
    assert metrics["model"]["state_dim"] == 4
    assert (run.out_dir / "loss.png").exists()
    assert (run.out_dir / "checkpoints" / "12").is_dir()


def test_a_byte_sees_no_later_byte():
    trainer = Trainer(MODEL, TRAIN, Mamba2)
    params = trainer.initial_state().params
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    changed = tokens.copy()
    changed[:, 20] = 255
    logits, other = (trainer._model(params)(t) for t in (tokens, changed))
    np.testing.assert_allclose(logits[:, :20], other[:, :20], atol=1e-6)
    assert (abs(logits[:, 20:] - other[:, 20:]).max(-1) > 1e-6).all()


def test_preset_has_the_parameters_of_the_papers_130m():
    settings, train = PRESETS["mamba2-130m"]
    trainer = Trainer(settings, train, Mamba2)
    shapes = jax.eval_shape(trainer.initial_state)
    # The published checkpoint has 50288 rows of the embedding.
    rows = settings.vocab_size - 50288
    expected = 128_989_632 + rows * settings.model_dim
    assert count_parameters(shapes.params) == expected


def run_script(name, *options):
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_flags_override_the_preset_and_bad_ones_are_one_line(tmp_path):
    sizes = ["--model_dim=32", "--head_dim=7"]
    done = run_script(
        "train_mamba2.py", "--implementation=tk", *sizes, f"--out_dir={tmp_path}"
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "train_mamba2: head_dim is 7; expected a divisor of expand * model_dim, "
        "which is 64"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive  # of compare() the GPT's test says the same
def test_comparison_is_against_a_second_seed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    result = comparison.compare(
        dataclasses.replace(MODEL, num_layers=1),
        dataclasses.replace(TRAIN, steps=4),
        setting="implementation",
        names=["xla"],
        baseline="xla",
        out_dir=tmp_path,
        data_dir=write_source(source),
        make_trainer=functools.partial(Trainer, make_model=Mamba2),
    )
    assert list(result["runs"]) == ["xla, seed 0", "xla, seed 1"]
    first, second = result["runs"].values()
    assert first["implementation"] == "xla" and first["distance"]["max_abs"] == 0
    assert second["relative_to_spread"]["mean_abs"] == 1
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["model"]["state_dim"] == 4 and len(first["losses"]) == 4


def test_comparison_of_what_does_not_exist_is_one_line(tmp_path):
    options = ["--implementations=xla,cuda", "--steps=2", f"--out_dir={tmp_path}"]
    done = run_script("compare_ssd.py", *options)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "compare_ssd: implementation is 'cuda'; expected one of ('auto', 'tk', 'xla')"
    )
    assert not list(tmp_path.iterdir())


def test_kernels_that_are_missing_are_an_error(tmp_path):
    train = dataclasses.replace(TRAIN, implementation="tk")
    with pytest.raises(NotImplementedError, match="ssd: implementation='tk'"):
        train_mamba2.train(MODEL, train, RunSettings(out_dir=tmp_path, sample_bytes=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim is 7; expected a divisor of expand"),
        ({"num_groups": 3}, "num_groups is 3; expected a divisor of the 4 heads"),
        ({"state_dim": 0}, "state_dim is 0; expected at least 1"),
        ({"vocab_size": 9}, "vocab_size is 9; expected at least 256"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **changes)


def test_bad_implementation():
    with pytest.raises(ValueError, match="implementation is 'cuda'; expected one of"):
        dataclasses.replace(TRAIN, implementation="cuda")
