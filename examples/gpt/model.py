"""A byte-level GPT in flax nnx. Shape letters: [B]atch, [T]ime, [H]eads, head [D]im."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import tk_jax
from gpt.settings import ModelSettings, OptimizerSettings, TrainSettings

AttentionFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention_function(name: str) -> AttentionFunction:
    """Causal self-attention on [B, T, H, D]; `name` is one of settings.ATTENTIONS."""
    if name in ("tk", "cudnn") and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention={name} needs an NVIDIA GPU, but jax runs on "
            f"{jax.default_backend()} here; use attention=auto or xla"
        )
    if name in ("auto", "tk"):
        implementation = None if name == "auto" else name
        return functools.partial(
            tk_jax.attention, is_causal=True, implementation=implementation
        )
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=name
    )


def initial_scale(model_dim: int) -> float:
    """0.02 at GPT-2 small's width, and the same variance of a product at another."""
    return 0.02 * (768 / model_dim) ** 0.5


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding [Su et al. 2021, section 3.2.2] of x [B, T, H, D].

    Pairs (d, d + D/2) turn by t * 10000^(-2d/D); the angles are float32, since bfloat16
    cannot tell position 2047 from 2048.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        settings: ModelSettings,
        attention: AttentionFunction,
        dtype: jnp.dtype,
        *,
        rngs: nnx.Rngs,
    ):
        dim = settings.model_dim
        # Smaller where a layer adds to the residual stream, so that its variance does
        # not grow with depth [Radford et al. 2019, section 2.3].
        normal = nnx.initializers.normal(initial_scale(dim))
        into_stream = nnx.initializers.normal(
            initial_scale(dim) / (2 * settings.num_layers) ** 0.5
        )
        self.num_heads = settings.num_heads
        self.attention = attention
        self.norm_attention = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(
            dim, dim, kernel_init=into_stream, dtype=dtype, rngs=rngs
        )
        self.norm_mlp = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(
            dim, 4 * dim, kernel_init=normal, dtype=dtype, rngs=rngs
        )
        self.mlp_out = nnx.Linear(
            4 * dim, dim, kernel_init=into_stream, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, C]
        batch, seqlen, _ = x.shape
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = (
            part.reshape(batch, seqlen, self.num_heads, -1)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        x = x + self.proj(self.attention(rotate(q), rotate(k), v).reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm_mlp(x))))


class LanguageModel(nnx.Module):
    """Tokens to logits through a stack of equal blocks.

    float32 parameters; the arithmetic is in `compute_dtype`.
    """

    def __init__(
        self,
        settings,
        train: OptimizerSettings,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        make_norm: Callable[..., nnx.Module],
        *,
        rngs: nnx.Rngs,
    ):
        dim = settings.model_dim
        normal = nnx.initializers.normal(initial_scale(dim))

        @nnx.split_rngs(splits=settings.num_layers)
        @nnx.vmap
        def stacked_blocks(rngs: nnx.Rngs) -> nnx.Module:
            return make_block(rngs)

        self.dtype = jnp.dtype(train.compute_dtype)
        self.embedding = nnx.Param(normal(rngs.params(), (settings.vocab_size, dim)))
        self.blocks = stacked_blocks(rngs)  # every parameter has a leading layer axis
        self.norm = make_norm(dim, dtype=self.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, V]
        embedding = self.embedding[...].astype(self.dtype)
        # Only bytes occur, so the look-up is a small product with the first 256 rows.
        # Its gradient is a product too, whereas a gather's is a scatter-add: atomic,
        # hence in a different order on each run of a GPU.
        x = jax.nn.one_hot(tokens, 256, dtype=self.dtype) @ embedding[:256]
        # One traced layer, run num_layers times: compile time does not grow with depth.
        graph, layers = nnx.split(self.blocks)
        x, _ = jax.lax.scan(
            lambda x, layer: (nnx.merge(graph, layer)(x), None), x, layers
        )
        return self.norm(x) @ embedding.T


class GPT(LanguageModel):
    """Blocks of attention and an MLP."""

    def __init__(
        self, settings: ModelSettings, train: TrainSettings, *, rngs: nnx.Rngs
    ):
        attention = attention_function(train.attention)
        dtype = jnp.dtype(train.compute_dtype)

        def block(rngs: nnx.Rngs) -> Block:
            return Block(settings, attention, dtype, rngs=rngs)

        super().__init__(settings, train, block, nnx.LayerNorm, rngs=rngs)


def mean_loss(model: LanguageModel, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per byte; batch [B, T + 1]."""
    logits = model(batch[:, :-1]).astype(jnp.float32)
    labels = jax.nn.one_hot(batch[:, 1:], 256, dtype=jnp.float32)
    label_logits = (logits[..., :256] * labels).sum(-1)
    return (jax.nn.logsumexp(logits, axis=-1) - label_logits).mean()
