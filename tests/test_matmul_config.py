"""The tiles that matmul chooses, and the limits they are held to."""

import dataclasses
import itertools

import pytest
from matmul_cases import TRANSPOSES, transposes_id

from tk_jax import _ffi
from tk_jax.ops.matmul import config


@pytest.mark.parametrize(
    ("m", "n", "k", "batch"),
    [*itertools.product((1, 128, 129, 256, 4096), (1, 250, 8192), (4096,), (1, 64))],
)
def test_default_config_is_one_of_those_tested(m, n, k, batch):
    chosen = config.default_config(m, n, k, batch)
    assert chosen in config.CONFIGS
    # A cluster never takes a row of tiles that does not exist.
    assert -(-m // chosen.block_m) % chosen.cluster_m == 0


def test_default_config_of_large_products_is_the_widest():
    assert config.default_config(4096, 4096, 4096, 1) == config.MatmulConfig()
    assert config.default_config(512, 512, 4096, 1).block_n == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_n": 192}, "block_n is 192; expected a multiple of 128 in"),
        ({"block_n": 96, "cluster_m": 1}, "block_n is 96; expected a multiple of 64"),
        ({"block_n": 320, "cluster_m": 1}, "block_n is 320; expected at most 256"),
        ({"block_m": 256}, "block_n is 256; expected at most 128"),
        ({"block_m": 64}, "block_m is 64; expected 128 or 256"),
        ({"block_k": 128}, "block_k is 128; expected 64"),
        ({"cluster_m": 4}, "cluster_m is 4; expected 1 or 2"),
        ({"group_m": 3}, "group_m is 3; expected a multiple of 2"),
        ({"stages": 1}, "stages is 1; expected at least 2"),
        ({"stages": 5}, "shared_bytes is 280576; expected at most 232448"),
    ],
)
def test_config_refuses_what_the_kernel_cannot_be_built_with(settings, message):
    with pytest.raises(ValueError, match=message):
        config.MatmulConfig(**settings)


def test_settings_match_the_structs_that_decode_them():
    fields = _ffi.extension().struct_fields()
    for settings in (config.MatmulOptions, config.MatmulConfig):
        names = [field.name for field in dataclasses.fields(settings)]
        assert names == list(fields[settings.__name__])


@pytest.mark.parametrize("chosen", config.CONFIGS, ids=str)
@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
def test_the_runtime_accepts_every_config(chosen, transposes):
    (spec,) = _ffi.extension().matmul_specs(
        dtype="bfloat16",
        transpose_a=transposes[0],
        transpose_b=transposes[1],
        config=dataclasses.asdict(chosen),
    )
    assert spec["shared_bytes"] == chosen.shared_bytes
    assert spec["cluster_size"] == chosen.cluster_m
