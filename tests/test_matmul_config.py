"""The tiles that matmul chooses, and the limits they are held to."""

import dataclasses
import itertools

import pytest
from matmul_cases import SIZES, TRANSPOSES, transposes_id

from tk_jax import _ffi
from tk_jax.ops.matmul import config


def test_every_config_is_chosen_and_tested_on_the_gpu():
    assert {config.default_config(m, n, 1) for m, n, _ in SIZES} == set(config.CONFIGS)


@pytest.mark.parametrize(
    ("m", "n", "batch"),
    [*itertools.product((1, 128, 129, 256, 4096), (1, 250, 8192), (1, 64))],
)
def test_a_cluster_never_takes_a_row_of_tiles_that_does_not_exist(m, n, batch):
    chosen = config.default_config(m, n, batch)
    assert -(-m // chosen.block_m) % chosen.cluster_m == 0


@pytest.mark.parametrize(
    ("sizes", "block_n"),
    [
        ((4096, 4096, 1), 256),
        # One round of 128 wide tiles beats two of 256 narrow ones ...
        ((2048, 2048, 1), 256),
        # ... three of 288 narrow ones beat two of 144 wide ones ...
        ((2048, 2304, 1), 128),
        # ... and what leaves the GPU half empty, or half of a tile, takes narrow ones.
        ((512, 512, 1), 128),
        ((65536, 128, 1), 128),
        ((512, 512, 64), 256),
    ],
)
def test_default_config_weighs_rounds_and_traffic(sizes, block_n):
    assert config.default_config(*sizes).block_n == block_n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"block_n": 192, "cluster_m": 2},
            "block_n is 192; expected a multiple of 128 in",
        ),
        ({"block_n": 96, "cluster_m": 1}, "block_n is 96; expected a multiple of 64"),
        ({"block_n": 320, "cluster_m": 1}, "block_n is 320; expected at most 256"),
        ({"block_m": 256}, "block_n is 256; expected at most 128"),
        ({"block_m": 64}, "block_m is 64; expected 128 or 256"),
        ({"block_k": 128}, "block_k is 128; expected 64"),
        ({"cluster_m": 4}, "cluster_m is 4; expected 1 or 2"),
        ({"group_m": 3, "cluster_m": 2}, "group_m is 3; expected a multiple of 2"),
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
