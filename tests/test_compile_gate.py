"""Every kernel that the package may choose compiles to what it should."""

import collections
import dataclasses
import itertools
import re

import compile_gate
import pytest

from tk_jax import _ffi
from tk_jax.compile import specialisations
from tk_jax.ops.attention import config as attention_config
from tk_jax.ops.attention import tiling as attention_tiling
from tk_jax.ops.linear_attention import config as linear_config

# Of the tile library, without wgmma: compiled in milliseconds.
_SOURCE = """
#include "tk/kernel_params.h"
void gate(const tk::KernelParams& p) {
  float* out = static_cast<float*>(p.buffers[0].data);
  %s
}
"""
_NOTHING = compile_gate.Requirements(
    product=False, bulk_load=False, register_split=False
)


def spec(body, threads=128):
    return {
        "symbol": "tk_gate",
        "source": _SOURCE % body,
        "function": "gate",
        "threads": threads,
    }


def _with_marks(items):
    """What make test compiles: of attention and matmul all of bfloat16's kernels and
    every eighth of float16's; of other ops every fourth of bfloat16's, of those of
    Hedgehog whose keys and values have the same dimension.
    """
    seen = collections.Counter()
    for item in items:
        is_half = "fp16" in item.symbol
        if item.op.startswith(("attention", "matmul")):
            seen[item.op] += is_half
            often = not is_half or seen[item.op] % 8 == 1
        else:
            often = not is_half
            often = often and not re.search("_d64_v128_|_d128_v64_", item.symbol)
            seen[item.op] += often
            often = often and seen[item.op] % 4 == 1
        marks = [] if often else pytest.mark.exhaustive
        yield pytest.param(item, marks=marks, id=item.name)


@pytest.mark.slow
@pytest.mark.parametrize("item", [*_with_marks(specialisations())])
def test_kernel_is_fit_to_ship(item, record_property):
    verdict = compile_gate.judge(
        item.spec, compile_gate.requirements(item), name=item.name
    )
    record_property("compile_gate", verdict.row())  # conftest.py prints the table
    assert not verdict.problems, "\n".join(verdict.problems)


_MASKS = attention_config.KERNEL_MASKS


def _with_features(names, head_dim, mask, head_dim_v=None):
    """Of attention's kernels with these features, in the tiles that are chosen."""
    head_dim_v = head_dim_v or head_dim
    extension = _ffi.extension()
    features = frozenset(names)
    # The forward pass has kernels for each way to read a bias.
    ways = [["tiledbias"], ["pairedbias"], []] if "bias" in features else [[]]
    for dtype in ("bfloat16", "float16"):
        settings = {
            "dtype": dtype,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
            "mask": mask,
            "features": list(names),
        }
        for keys, more in itertools.product((1, attention_config.MAX_ROWS), ways):
            config = attention_tiling.forward_config(
                head_dim, head_dim_v, keys, mask, features.union(more)
            )
            yield from extension.attention_forward_specs(
                **settings | {"features": [*names, *more]},
                config=dataclasses.asdict(config),
            )
        config = attention_tiling.backward_config(head_dim, head_dim_v, features)
        for deterministic in (True, False):
            yield from extension.attention_backward_specs(
                **settings,
                deterministic=deterministic,
                config=dataclasses.asdict(config),
            )


_SETS = (
    (["softcap"], (64, 128, 192, 256), _MASKS),
    (["lengths"], (64, 128, 192, 256), _MASKS),
    (["bias"], (64, 128), _MASKS),
    (["bias", "floatbias"], (64, 128), _MASKS),
    (["segments"], (64, 128), _MASKS),
    (["mask"], (64, 128), ["causal"]),
    (["lengths", "segments", "mask"], (64, 128), ["band"]),
    (["segments", "softcap"], (64, 128), ["causal"]),
    (["bias", "segments"], (64, 128), ["causal"]),
    (["bias", "softcap"], (64, 128), ["causal"]),
)


def _in_turn(index, head_dim, mask, masks):
    turn = index + head_dim // 64
    return turn % 2 == 0 and mask == masks[turn // 2 % len(masks)]


_FEATURES = {
    spec["function"]: (spec, _in_turn(index, head_dim, mask, masks))
    for index, (names, head_dims, masks) in enumerate(_SETS)
    for head_dim, mask in itertools.product(head_dims, masks)
    for spec in _with_features(names, head_dim, mask)
    if "Traits<" in spec["function"]
}


# Of wide heads with what they once lacked; make test compiles the first at D = 256.
_WIDE_SETS = (
    (["segments"], ["causal"]),
    (["bias"], ["causal"]),
    (["segments"], ["none", "band"]),
    (["mask"], _MASKS),
    (["lengths", "segments", "mask", "softcap"], ["causal", "band"]),
    (["segments", "softcap"], ["band"]),
    (["bias"], ["none", "band"]),
    (["bias", "floatbias"], ["causal"]),
    (["bias", "softcap"], _MASKS),
    (["lengths", "bias", "softcap", "floatbias"], ["band"]),
    (["segments", "bias"], ["causal", "band"]),
    (["mask", "bias"], ["causal", "band"]),
    (["lengths", "segments", "mask", "bias", "softcap", "floatbias"], ["band"]),
)
for _index, (_names, _masks) in enumerate(_WIDE_SETS):
    for _dims in ((192, 128), (256, 256)):
        for _mask in _masks:
            for _spec in _with_features(_names, _dims[0], _mask, _dims[1]):
                if "Traits<" in _spec["function"]:
                    often = _index < 1 and _dims == (256, 256)
                    _FEATURES.setdefault(_spec["function"], (_spec, often))


# make test compiles those of one type and of a fixed order of dq, with one mask for
# each set of features and head dim, for which the masks take turns, and of a set every
# second head dim.
def _with_mark(spec, in_turn):
    often = in_turn and spec["symbol"].endswith("bf16")
    often = often and ", false, " not in spec["function"]
    return pytest.param(
        spec, marks=[] if often else pytest.mark.exhaustive, id=spec["function"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", [_with_mark(*item) for item in _FEATURES.values()])
def test_kernel_with_features_is_fit_to_ship(spec, record_property):
    verdict = compile_gate.judge(spec, compile_gate.Requirements())
    record_property("compile_gate", verdict.row())
    assert not verdict.problems, "\n".join(verdict.problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "features"),
    [
        ("none", ["bias"]),
        ("causal", ["bias", "softcap"]),
        ("band", ["lengths", "bias", "softcap", "floatbias"]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "head_dim", [64, 128, pytest.param(256, marks=pytest.mark.exhaustive)]
)
def test_gradient_of_a_bias(head_dim, mask, features):
    (spec,) = _ffi.extension().attention_bias_specs(
        dtype="bfloat16",
        head_dim=head_dim,
        head_dim_v=head_dim,
        mask=mask,
        features=features,
    )
    verdict = compile_gate.judge(spec, compile_gate.Requirements())
    assert not verdict.problems, "\n".join(verdict.problems)


# Documents that are packed need registers where gates are. make test compiles those
# of ssd at K = 128.
def _with_documents():
    seen = set()
    for dtype, (key_dim, block), features in itertools.product(
        ("bfloat16", "float16"),
        ((128, "pair"), (64, "pair"), (256, "alone")),
        (("weights", "counts", "skip"), ("counts",)),
    ):
        chosen = linear_config.scan_config(
            *linear_config.SIZES_OF_BLOCKS[block], key_dim, 64
        )
        for kernel, taken, config in linear_config.kernels(chosen, features):
            if "counts" not in taken:
                continue
            for spec in _ffi.extension().linear_attention_specs(
                kernel=kernel,
                dtype=dtype,
                key_dim=key_dim,
                features=taken,
                config=dataclasses.asdict(config),
            ):
                if spec["function"] in seen:
                    continue
                seen.add(spec["function"])
                often = dtype == "bfloat16" and key_dim == 128 and len(features) > 1
                marks = [] if often else pytest.mark.exhaustive
                yield pytest.param(spec, marks=marks, id=f"{spec['symbol']}-{kernel}")


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*_with_documents()])
def test_kernel_of_packed_documents_is_fit_to_ship(spec, record_property):
    verdict = compile_gate.judge(spec, compile_gate.Requirements())
    record_property("compile_gate", verdict.row())
    assert not verdict.problems, "\n".join(verdict.problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values_last", "normalize", "whole", "queries", "columns"),
    [
        (False, False, False, 1, 64),
        (True, True, False, 1, 64),
        (True, True, False, 8, 16),
    ],
    ids=str,
)
def test_steps_of_any_size(values_last, normalize, whole, queries, columns):
    """States whose rows are not whole runs of sixteen bytes, and several queries."""
    (spec,) = _ffi.extension().state_step_specs(
        key_dtype="float32",
        value_dtype="float32",
        values_last=values_last,
        whole=whole,
        normalize=normalize,
        queries=queries,
        taylor=False,
        config={"columns": columns},
    )
    verdict = compile_gate.judge(spec, _NOTHING)
    assert not verdict.problems, "\n".join(verdict.problems)


def test_every_op_is_gated():
    items = list(specialisations())
    symbols = {item.symbol for item in items}
    for expected in (
        "tk_attention_fwd_d64_bf16",
        "tk_attention_fwd_d128_causal_fp16",
        "tk_attention_bwd_d128_causal_bf16",
        "tk_attention_bwd_prepare_d64_fp16",
        "tk_attention_bwd_finish_d128_bf16",
        "tk_based_attention_chunk_outputs_d32_bf16",
        "tk_based_attention_gradients_d24_documents_fp16",
        "tk_based_attention_outputs_d16_bf16",
        "tk_based_attention_outputs_d8_documents_normalized_bf16",
        "tk_based_attention_states_d16_bf16",
        "tk_based_attention_walked_gradients_d16_bf16",
        "tk_based_attention_walked_gradients_d16_documents_normalized_reverse_bf16",
        "tk_based_attention_walked_gradients_d8_documents_reverse_fp16",
        "tk_hedgehog_attention_document_states_d128_v128_bf16",
        "tk_hedgehog_attention_document_states_reverse_d128_v64_fp16",
        "tk_hedgehog_attention_keys_d128_v128_bf16",
        "tk_hedgehog_attention_keys_d128_v128_documents_bf16",
        "tk_hedgehog_attention_outputs_d128_v128_documents_bf16",
        "tk_hedgehog_attention_outputs_d64_v64_fp16",
        "tk_hedgehog_attention_paired_outputs_d128_v128_bf16",
        "tk_hedgehog_attention_queries_d128_v128_fp16",
        "tk_hedgehog_attention_step_d128_v128_bf16",
        "tk_hedgehog_attention_sums_d64_v64_bf16",
        "tk_linear_attention_chunk_sums",
        "tk_linear_attention_gate_gradients",
        "tk_linear_attention_gradients_d128_weights_skip_bf16",
        "tk_linear_attention_head_sums",
        "tk_linear_attention_outputs_d128_weights_skip_bf16",
        "tk_linear_attention_outputs_d64_fp16",
        "tk_linear_attention_helped_outputs_d128_weights_skip_bf16",
        "tk_linear_attention_segment_starts",
        "tk_linear_attention_segment_sums_reverse_d64_fp16",
        "tk_linear_attention_spread_out_bf16",
        "tk_linear_attention_spread_states_fp16",
        "tk_linear_attention_states_d128_weights_bf16",
        "tk_linear_attention_states_reverse_d256_fp16",
        "tk_linear_attention_step_gates_fp32",
        "tk_linear_attention_step_gradients_bf16",
        "tk_matmul_nn_bf16",
        "tk_matmul_tt_fp16",
        "tk_state_step_columns_c32_normalized_q4_fp32_bf16",
        "tk_state_step_columns_c64_bf16",
        "tk_state_step_columns_c64_taylor_normalized_fp16",
        "tk_state_step_rows_c16_fp16",
        "tk_state_step_rows_c64_bf16",
    ):
        assert expected in symbols
    names = [item.name for item in items]
    assert len(names) == len(set(names))


def test_simple_kernel_passes():
    verdict = compile_gate.judge(spec("out[0] = 1.0f;"), _NOTHING)
    assert verdict.problems == ()
    assert 0 < verdict.registers < 32
    assert verdict.opcodes["EXIT"] >= 1
    assert verdict.opcodes["STG"] == 1


def test_local_memory_is_refused():
    # Indices that only the run knows: registers have no addresses.
    body = """float a[512];
      for (int i = 0; i < 512; ++i) a[static_cast<int>(out[i]) & 511] = out[i];
      out[0] = a[static_cast<int>(out[1]) & 511];"""
    verdict = compile_gate.judge(spec(body), _NOTHING)
    assert verdict.stack_bytes >= 2048
    assert any("STL: local memory" in problem for problem in verdict.problems)
    assert any("bytes of stack are used" in problem for problem in verdict.problems)


def test_spills_are_refused():
    body = """float a[200];
      #pragma unroll
      for (int i = 0; i < 200; ++i) a[i] = out[i * 7];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 200; ++i) out[i] = a[199 - i] * a[(i * 3) % 200];"""
    # 1024 threads have 64 registers each.
    verdict = compile_gate.judge(spec(body, threads=1024), _NOTHING)
    assert verdict.spill_bytes > 0
    assert any("are spilled" in problem for problem in verdict.problems)


@pytest.mark.parametrize(
    ("missing", "opcode"),
    [
        ("product", "HGMMA"),
        ("bulk_load", "UTMALDG"),
        ("register_split", "USETMAXREG"),
    ],
)
def test_missing_instruction_is_refused(missing, opcode):
    required = dataclasses.replace(_NOTHING, **{missing: True})
    verdict = compile_gate.judge(spec("out[0] = 1.0f;"), required)
    assert verdict.problems == (f"no {opcode} instruction",)


def test_slow_compilation_is_refused(monkeypatch):
    monkeypatch.setattr(compile_gate, "MAX_SECONDS", 0.0)
    verdict = compile_gate.judge(spec("out[0] = 1.0f;"), _NOTHING)
    assert "s to compile, over 0.0 s" in verdict.problems[0]


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async "
            "instructions are serialized due to ...",
            True,
        ),
        ("ptxas info    : (C7508) setmaxnreg ignored; unable to determine ...", True),
        ("ptxas warning : Registers are spilled to local memory in function", True),
        ("ptxas info    : Used 168 registers, used 16 barriers", False),
        ("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", False),
    ],
)
def test_complaints_of_the_compiler(line, refused):
    assert bool(compile_gate.complaints(line)) == refused


def test_a_kernel_that_does_not_compile_is_no_silent_pass():
    with pytest.raises(
        RuntimeError, match=r"identifier .*no_such_thing.* is undefined"
    ):
        compile_gate.judge(spec("no_such_thing();"), _NOTHING)


def test_command_line(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["compile_gate", *arguments])
        status = compile_gate.main()
        return status, capsys.readouterr().out

    status, out = run("--only", "attention_bwd_finish_d64_bf16")
    assert status == 0, out
    assert "1 kernels fit to ship, 0 refused" in out
    monkeypatch.setattr(compile_gate, "MAX_SECONDS", 0.0)
    status, out = run("--only", "attention_bwd_finish_d64_bf16")
    assert (status, "REFUSED" in out) == (1, True)
    with pytest.raises(SystemExit):
        run("--only", "no-such-kernel")
