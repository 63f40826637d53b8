"""The public face of attention: its signature, documentation and settings."""

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import pytest

import tk_jax


@pytest.mark.parametrize(
    "module",
    [
        "tk_jax._dispatch",
        "tk_jax.checkpoint_policies",
        "tk_jax.nn",
        "tk_jax.nn.dot_product",
        "tk_jax.nn.flax",
        "tk_jax.ops.attention.api",
    ],
)
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def test_signature():
    parameters = inspect.signature(tk_jax.attention).parameters
    assert {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    } == {
        "scale": None,
        "is_causal": False,
        "causal_align": "top_left",
        "local_window_size": None,
        "query_seq_lengths": None,
        "key_value_seq_lengths": None,
        "q_segment_ids": None,
        "kv_segment_ids": None,
        "mask": None,
        "bias": None,
        "logits_soft_cap": None,
        "sinks": None,
        "return_lse": False,
        "deterministic": True,
        "implementation": None,
    }
    assert list(parameters)[:3] == ["q", "k", "v"]


def test_every_argument_is_documented():
    documentation = inspect.getdoc(tk_jax.attention)
    for name in inspect.signature(tk_jax.attention).parameters:
        assert f"\n  {name}: " in documentation, name
    for section in ("Args:", "Returns:", "Raises:", ">>> "):
        assert section in documentation


def test_explain_takes_every_setting_of_the_call():

    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    for name, parameter in inspect.signature(tk_jax.attention).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            setting = {name: parameter.default}
            assert tk_jax.explain(tk_jax.attention, q, q, q, **setting).elsewhere
