"""The jitted train step, the loop around it, validation, and sampling."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gpt import data
from gpt.model import GPT, LanguageModel, mean_loss
from gpt.settings import OptimizerSettings


class TrainState(NamedTuple):
    """All that a step changes; plain nested dicts and tuples of arrays."""

    step: jax.Array
    params: Any
    opt_state: Any


def make_optimizer(train: OptimizerSettings) -> optax.GradientTransformation:
    """AdamW on a warm-up and cosine schedule, after clipping by the global norm."""
    warmup = min(train.warmup_steps, train.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=train.learning_rate / (warmup + 1),
        peak_value=train.learning_rate,
        warmup_steps=warmup,
        decay_steps=train.steps,
        end_value=0.1 * train.learning_rate,
    )

    def matrices(params):  # decay would pull norms and biases from where they belong
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.adamw(
            schedule, b1=0.9, b2=0.95, weight_decay=train.weight_decay, mask=matrices
        ),
    )


class Trainer:
    """Compiled functions of one model and one optimizer; no training state."""

    def __init__(
        self,
        settings,
        train: OptimizerSettings,
        make_model: Callable[..., LanguageModel] = GPT,
    ):
        self.settings, self.train, self.make_model = settings, train, make_model
        self.optimizer = make_optimizer(train)
        abstract = nnx.eval_shape(lambda: make_model(settings, train, rngs=nnx.Rngs(0)))
        self.graph = nnx.graphdef(abstract)
        self._initial_state = jax.jit(self._build_state)
        self.train_step = jax.jit(self._train_step, donate_argnums=0)
        self.eval_loss = jax.jit(lambda p, batch: mean_loss(self._model(p), batch))
        self._sample = jax.jit(self._sample_loop)
        self._compiled_step = None

    def _model(self, params: Any) -> LanguageModel:
        return nnx.merge(self.graph, params)

    def initial_state(self, seed: int | None = None) -> TrainState:
        seed = self.train.seed if seed is None else seed
        return self._initial_state(jax.random.key(seed))

    def _build_state(self, key: jax.Array) -> TrainState:
        model = self.make_model(self.settings, self.train, rngs=nnx.Rngs(params=key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, self.optimizer.init(params))

    def _train_step(self, state: TrainState, batch: jax.Array):
        def loss_of(params):
            return mean_loss(self._model(params), batch)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = self.optimizer.update(
            gradients, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    def batch_at(self, stream: np.ndarray, step: int) -> np.ndarray:
        return data.training_batch(
            stream,
            step,
            seed=self.train.data_seed,
            batch_size=self.train.batch_size,
            seqlen=self.settings.seqlen,
        )

    def compile_step(self, state: TrainState, stream: np.ndarray):
        """The train step as an executable, and the seconds that compiling it took."""
        if self._compiled_step is None:
            start = time.perf_counter()
            lowered = self.train_step.lower(state, self.batch_at(stream, 0))
            self._compiled_step = lowered.compile(), time.perf_counter() - start
        return self._compiled_step

    def validation_loss(self, params: Any, stream: np.ndarray, windows: int) -> float:
        batches = data.validation_batches(
            stream,
            num_windows=windows,
            batch_size=self.train.batch_size,
            seqlen=self.settings.seqlen,
        )
        return float(np.mean([self.eval_loss(params, batch) for batch in batches]))

    def sample(
        self, params: Any, prompt: bytes, length: int, *, temperature: float, seed: int
    ) -> bytes:
        """`prompt` and `length` more bytes, at `temperature` (0: the likeliest)."""
        end = len(prompt) + length
        if not prompt or end > self.settings.seqlen:
            raise ValueError(
                f"sample: prompt of {len(prompt)} and length {length} bytes; expected "
                f"1 or more, and {self.settings.seqlen} (seqlen) or fewer together"
            )
        tokens = np.zeros(self.settings.seqlen, np.int32)
        tokens[: len(prompt)] = np.frombuffer(prompt, np.uint8)
        key = jax.random.key(seed)
        filled = self._sample(params, tokens, len(prompt), end, temperature, key)
        return bytes(np.asarray(filled[:end], np.uint8))

    def _sample_loop(self, params, tokens, start, end, temperature, key):
        # The whole window is computed again for each byte. A cache of keys and values
        # would save that, but not show the training path at work.
        model = self._model(params)

        def append(position, tokens):
            logits = model(tokens[None])[0, position - 1, :256].astype(jnp.float32)
            drawn = jax.random.categorical(
                jax.random.fold_in(key, position),
                logits / jnp.maximum(temperature, 1e-6),
            )
            token = jnp.where(temperature > 0, drawn, logits.argmax())
            return tokens.at[position].set(token)

        return jax.lax.fori_loop(start, end, append, tokens)


def run_steps(
    step_function: Callable,
    state: TrainState,
    steps: Iterable[int],
    batch_at: Callable[[int], np.ndarray],
    after_step: Callable[[int, TrainState, float, float], bool] | None = None,
) -> TrainState:
    """Runs `steps`, calling after_step(step, state, loss, seconds); True from it stops.

    `loss` and `seconds` are those of the step named. The host builds the next batch
    while the device computes.
    """
    steps = list(steps)
    batch = batch_at(steps[0]) if steps else None
    for index, step in enumerate(steps):
        start = time.perf_counter()
        state, loss = step_function(state, batch)
        if index + 1 < len(steps):
            batch = batch_at(steps[index + 1])
        loss = float(loss)  # waits
        seconds = time.perf_counter() - start
        if after_step is not None and after_step(step, state, loss, seconds):
            break
    return state


def count_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
