"""Settings cross to C++ field by field: names, order and types agree on both sides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tk_jax import _ffi, kernel
from tk_jax.ops import _state_step
from tk_jax.ops.attention import config as attention
from tk_jax.ops.attention import tiling as attention_tiling
from tk_jax.ops.attention import vjp as attention_vjp
from tk_jax.ops.based_attention import config as based_attention
from tk_jax.ops.based_attention import vjp as based_attention_vjp
from tk_jax.ops.hedgehog_attention import config as hedgehog_attention
from tk_jax.ops.linear_attention import config as linear_attention
from tk_jax.ops.linear_attention import scan
from tk_jax.ops.matmul import config as matmul
from tk_jax.ops.matmul import vjp as matmul_vjp

# By the name of the C++ struct.
SETTINGS = {
    "AttentionOptions": attention.KernelOptions,
    "AttentionForwardConfig": attention_tiling.AttentionForwardConfig,
    "AttentionBackwardConfig": attention_tiling.AttentionBackwardConfig,
    "ChunkSumsOptions": linear_attention.ChunkSumsOptions,
    "StepOptions": linear_attention.StepOptions,
    "StatesOptions": linear_attention.StatesOptions,
    "OutputsOptions": linear_attention.OutputsOptions,
    "SpreadOptions": linear_attention.SpreadOptions,
    "GradientsOptions": linear_attention.GradientsOptions,
    "GradientsConfig": linear_attention.GradientsConfig,
    "WalkConfig": linear_attention.WalkConfig,
    "HedgehogSumsOptions": hedgehog_attention.HedgehogSumsOptions,
    "HedgehogOutputsOptions": hedgehog_attention.HedgehogOutputsOptions,
    "HedgehogGradientsOptions": hedgehog_attention.HedgehogGradientsOptions,
    "HedgehogStepOptions": hedgehog_attention.HedgehogStepOptions,
    "HedgehogDocumentStatesOptions": hedgehog_attention.HedgehogDocumentStatesOptions,
    "MatmulOptions": matmul.MatmulOptions,
    "MatmulConfig": matmul.MatmulConfig,
    "BasedStatesOptions": based_attention.BasedStatesOptions,
    "BasedOutputsOptions": based_attention.BasedOutputsOptions,
    "BasedConfig": based_attention.BasedConfig,
    "StateStepOptions": _state_step.StateStepOptions,
    "StateStepConfig": _state_step.StateStepConfig,
    "KernelSettings": kernel.KernelSettings,
}

# What a target says on a CPU once every argument, result and attribute is decoded: only
# its first operand, the stage with its stream, is missing.
_ONLY_THE_STREAM = (
    r"bad operands at: 0\).*\n.*\n?Failed to get platform stream: "
    "XLA FFI GPU context is not available"
)


@pytest.mark.parametrize("name", SETTINGS)
def test_dataclass_and_struct_have_the_same_fields(name):
    fields = _ffi.extension().struct_fields()[name]
    assert [field.name for field in dataclasses.fields(SETTINGS[name])] == fields


def test_no_struct_is_without_a_dataclass():
    assert set(_ffi.extension().struct_fields()) == set(SETTINGS)


def test_attributes_have_exact_types():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        flag: bool = True
        number: int = 3
        scale: float = 0.5
        name: str = "x"

    attributes = _ffi.to_attribute(Settings())
    assert attributes == {"flag": True, "number": 3, "scale": 0.5, "name": "x"}
    assert type(attributes["flag"]) is bool
    assert type(attributes["number"]) is np.int64
    assert type(attributes["scale"]) is np.float32


def test_setting_without_an_attribute_type_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        items: tuple = (1, 2)

    with pytest.raises(TypeError, match=r"a setting is \(1, 2\)"):
        _ffi.to_attribute(Settings())


@functools.cache
def _register_on_cpu():
    # The targets' own names are the interpreter's on a CPU.
    for name, stages in _ffi.extension().registrations().items():
        jax.ffi.register_ffi_target(
            f"{name}_probe", stages, platform="cpu", api_version=1
        )


@pytest.fixture
def targets_on_cpu(monkeypatch):
    """CPUs decode what they are called with, then miss the stream of a GPU."""
    _register_on_cpu()
    call = jax.ffi.ffi_call
    monkeypatch.setattr(
        jax.ffi,
        "ffi_call",
        lambda name, *args, **kwargs: call(f"{name}_probe", *args, **kwargs),
    )


def attention_arrays():
    q = jnp.zeros((2, 100, 4, 64), jnp.bfloat16)
    k = jnp.zeros((2, 70, 2, 64), jnp.bfloat16)
    return q, k, k


def call_attention_forward():
    options = attention.AttentionOptions(0.125, True, False, True)
    return attention_vjp.kernel_forward(options, *attention_arrays())


def call_attention_backward():
    options = attention.AttentionOptions(0.125, True, False, True)
    q, k, v = attention_arrays()
    lse = jnp.zeros(q.shape[:3], jnp.float32)
    nothing = jnp.zeros((0,), jnp.float32)
    return attention_vjp.kernel_backward(options, q, k, v, q, lse, q, nothing)


def call_matmul():
    a = jnp.zeros((64, 64), jnp.bfloat16)
    return matmul_vjp.kernel_matmul(a, a, matmul.MatmulOptions())


def scan_arguments(has_steps):
    q = jnp.zeros((2, 100, 2, 64), jnp.bfloat16)
    v = jnp.zeros((2, 100, 4, 64), jnp.bfloat16)
    dt, rates = jnp.zeros((2, 100, 4), jnp.float32), jnp.zeros(4)
    if not has_steps:
        settings = scan.Settings("linear_attention", 0.125, False)
        return settings, scan.Arrays(q, q, v, log_decay=dt)
    steps = linear_attention.StepOptions(
        softplus=True, least=0.0, most=float("inf"), least_log_decay=-128.0
    )
    settings = scan.Settings("ssd", 0.125, False, steps)
    return settings, scan.Arrays(q, q, v, raw_steps=dt, rates=rates)


def call_linear_attention(has_steps=False):
    return scan.scan(*scan_arguments(has_steps))


def call_ssd():
    return call_linear_attention(has_steps=True)


def call_gradients_of_linear_attention(has_steps=False):
    settings, arrays = scan_arguments(has_steps)

    def gradients(arrays):
        (out, _), pull_back = jax.vjp(functools.partial(scan.scan, settings), arrays)
        return pull_back((out, None))

    return gradients(arrays)


def call_gradients_of_ssd():
    return call_gradients_of_linear_attention(has_steps=True)


def call_based_attention(dim=16, normalize=True):
    q = jnp.zeros((2, 100, 2, dim), jnp.bfloat16)
    v = jnp.zeros((2, 100, 4, 64), jnp.bfloat16)
    options = linear_attention.LinearAttentionOptions(0.25, normalize)
    return based_attention_vjp.kernel_based_attention(
        options, True, q, q, v, None, None, None
    )


def call_based_attention_of_more_features():
    return call_based_attention(32)


def call_gradients_of_based_attention():
    def gradients(q, v):
        options = linear_attention.LinearAttentionOptions(0.25, False)
        run = functools.partial(
            based_attention_vjp.kernel_based_attention, options, False
        )
        out, pull_back = jax.vjp(lambda q, v: run(q, q, v, None, None, None)[0], q, v)
        return pull_back(out)

    v = jnp.zeros((2, 100, 4, 64), jnp.bfloat16)
    return gradients(jnp.zeros((2, 100, 2, 16), jnp.bfloat16), v)


def call_state_step():
    q = jnp.zeros((2, 2, 64), jnp.bfloat16)
    v = jnp.zeros((2, 4, 80), jnp.bfloat16)
    return _state_step.state_step(
        _state_step.StateStepOptions(0.25, True, True),
        _state_step.Arrays(
            q, q, v, jnp.zeros((2, 4, 64, 80)), normalizer=jnp.zeros((2, 4, 64))
        ),
    )


def call_kernel():
    x = jnp.zeros((64, 64), jnp.bfloat16)
    return kernel.call_kernel(
        "copy", [x], x, threads=128, source="void copy(...);", tiles={0: (64, 64)}
    )


def call_kernel_without_maps_and_scalars():
    x = jnp.zeros((1,), jnp.float32)
    return kernel.call_kernel("f", [x], threads=128, source="void f(...);")


@pytest.mark.usefixtures("targets_on_cpu")
@pytest.mark.parametrize(
    "call",
    [
        call_attention_forward,
        call_attention_backward,
        call_matmul,
        call_linear_attention,
        call_gradients_of_linear_attention,
        call_ssd,
        call_gradients_of_ssd,
        call_based_attention,
        call_based_attention_of_more_features,
        call_gradients_of_based_attention,
        call_state_step,
        call_kernel,
        call_kernel_without_maps_and_scalars,
    ],
)
def test_every_attribute_is_decoded(call):
    with pytest.raises(jax.errors.JaxRuntimeError, match=_ONLY_THE_STREAM):
        jax.block_until_ready(jax.jit(call)())


@pytest.mark.usefixtures("targets_on_cpu")
def test_wrong_attribute_would_be_noticed(monkeypatch):
    """The test above can fail: a float64 scale is one more bad operand."""
    monkeypatch.setattr(
        _ffi, "_scalar", lambda x: np.float64(x) if isinstance(x, float) else x
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jax.jit(lambda: call_attention_forward())())
    assert "bad operands at: 0)" not in str(error.value)
