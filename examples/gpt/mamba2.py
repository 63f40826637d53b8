"""A byte-level Mamba-2 in flax nnx: tk_jax.ssd between jnp's convolution and norm.

Shape letters: [B]atch, [T]ime, [H]eads of [P] channels, [G]roups, [N] states.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tk_jax
from gpt.mamba2_settings import Mamba2Settings, Mamba2TrainSettings
from gpt.model import LanguageModel, initial_scale

# A model starts with step sizes between these [Gu & Dao 2023, section 3.6].
_FIRST_STEPS = (1e-3, 1e-1)


def _widened(x: jax.Array) -> jax.Array:
    """In float32, or float64 if it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def causal_conv(x: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """Each channel of x [B, T, C] with its own taps [width, C], the last on the token.

    Summed in float32.
    """
    width, seqlen = weights.shape[0], x.shape[1]
    padded = jnp.pad(_widened(x), ((0, 0), (width - 1, 0), (0, 0)))
    taps = [padded[:, i : i + seqlen] * weights[i] for i in range(width)]
    return (sum(taps) + bias).astype(x.dtype)


def gated_norm(y: jax.Array, z: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm of y * silu(z), in float32."""
    gated = _widened(y) * jax.nn.silu(_widened(z))
    mean_square = jnp.mean(gated * gated, axis=-1, keepdims=True)
    return (gated * jax.lax.rsqrt(mean_square + 1e-5) * scale).astype(y.dtype)


class Mamba2Block(nnx.Module):
    """x + mixer(norm(x)) [Dao & Gu 2024, section 7.1, figure 6, right]."""

    def __init__(
        self,
        settings: Mamba2Settings,
        ssd: functools.partial,
        dtype: jnp.dtype,
        *,
        rngs: nnx.Rngs,
    ):
        dim, inner = settings.model_dim, settings.inner_dim
        normal = nnx.initializers.normal(initial_scale(dim))
        # Smaller where a layer adds to the residual stream, as in a GPT.
        into_stream = nnx.initializers.normal(
            initial_scale(inner) / settings.num_layers**0.5
        )
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.settings, self.ssd = settings, ssd
        self.norm = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        projected = inner + settings.conv_dim + settings.num_heads  # z, (x, B, C), dt
        self.project_in = linear(dim, projected, kernel_init=normal)
        self.project_out = linear(inner, dim, kernel_init=into_stream)

        width, heads = settings.conv_width, settings.num_heads
        taps = (width, settings.conv_dim)
        self.taps = nnx.Param(
            jax.random.uniform(rngs.params(), taps, minval=-1, maxval=1) / width**0.5
        )
        self.taps_bias = nnx.Param(jnp.zeros(settings.conv_dim))
        low, high = np.log(_FIRST_STEPS)
        dt = jnp.exp(jax.random.uniform(rngs.params(), heads, minval=low, maxval=high))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus's inverse
        A = jax.random.uniform(rngs.params(), heads, minval=1, maxval=16)
        self.log_A = nnx.Param(jnp.log(A))
        self.D = nnx.Param(jnp.ones(heads))
        self.gate_scale = nnx.Param(jnp.ones(inner))

    def __call__(self, u: jax.Array) -> jax.Array:  # [B, T, model_dim]
        settings = self.settings
        batch, seqlen, _ = u.shape
        inner, heads = settings.inner_dim, settings.num_heads
        projected = self.project_in(self.norm(u))
        z, xBC, dt = jnp.split(projected, [inner, inner + settings.conv_dim], axis=-1)
        xBC = jax.nn.silu(causal_conv(xBC, self.taps[...], self.taps_bias[...]))
        groups = settings.num_groups * settings.state_dim
        x, B, C = jnp.split(xBC, [inner, inner + groups], axis=-1)
        B, C = (a.reshape(batch, seqlen, settings.num_groups, -1) for a in (B, C))
        y = self.ssd(
            x.reshape(batch, seqlen, heads, settings.head_dim),
            dt,
            -jnp.exp(self.log_A[...]),
            B,
            C,
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
        )
        y = gated_norm(y.reshape(z.shape), z, self.gate_scale[...])
        return u + self.project_out(y)


class Mamba2(LanguageModel):
    """Blocks of Mamba-2."""

    def __init__(
        self, settings: Mamba2Settings, train: Mamba2TrainSettings, *, rngs: nnx.Rngs
    ):
        chosen = train.implementation
        ssd = functools.partial(
            tk_jax.ssd, implementation=None if chosen == "auto" else chosen
        )
        dtype = jnp.dtype(train.compute_dtype)

        def block(rngs: nnx.Rngs) -> Mamba2Block:
            return Mamba2Block(settings, ssd, dtype, rngs=rngs)

        super().__init__(settings, train, block, nnx.RMSNorm, rngs=rngs)
