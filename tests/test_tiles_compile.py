"""The tile library without a GPU: it compiles, stays small, all of it is tested."""

import concurrent.futures
import re
import subprocess

import compile_gate
import pytest
import test_tiles_copy
import test_tiles_map
import test_tiles_mask
import test_tiles_mma
import test_tiles_products
import test_tiles_reduce
import test_tiles_runs
import test_tiles_sync
import test_tiles_tma
import test_tiles_triangle
import tiles

from tk_jax import _ffi

INCLUDE = _ffi.source_root() / "include"
TESTS = _ffi.source_root() / "kernels" / "tile_test"
_ALL_HEADERS = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.*h"))
# The interpreter's backend is for the host's compiler, all else for the GPU's.
HOST_HEADERS = [name for name in _ALL_HEADERS if "/interpreter/" in name]
HEADERS = [name for name in _ALL_HEADERS if "/interpreter/" not in name]
MODULES = (
    test_tiles_copy,
    test_tiles_map,
    test_tiles_mask,
    test_tiles_mma,
    test_tiles_products,
    test_tiles_reduce,
    test_tiles_runs,
    test_tiles_sync,
    test_tiles_tma,
    test_tiles_triangle,
)
FAMILIES = [module.__name__.removeprefix("test_tiles_") for module in MODULES]
MAX_LINES = 5000


def compile_log(spec):
    return _ffi.extension().compile(spec, use_cache=False)["log"]


def _is_of_half(kernel) -> bool:
    function = kernel.spec["function"]
    return "fp16" in function and "bf16" not in function


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "half", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["", "half"]
)
def test_kernels_compile(half, family):
    """Every kernel that the GPU tests run, without local memory or a complaint; those
    that are float16's alone, as bfloat16's but for a type, with --exhaustive."""
    all_of_family = [item for item in tiles.ALL if item.family == family]
    kernels = [item for item in all_of_family if _is_of_half(item) == half]
    assert half or kernels
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        logs = pool.map(compile_log, [item.spec for item in kernels])
        for item, log in zip(kernels, logs, strict=True):
            assert compile_gate.complaints(log) == [], item.name
            assert re.search(r"\b0 bytes stack frame, 0 bytes spill", log), item.name


@pytest.mark.parametrize("header", HEADERS)
def test_header_stands_alone(header):
    source = f'#include "{header}"\nstruct Nothing {{}};\nvoid nothing(Nothing) {{}}\n'
    spec = {
        "symbol": "tk_test_header",
        "source": source,
        "function": "nothing",
        "params_type": "Nothing",
        "threads": 32,
    }
    assert "tk_test_header" in compile_log(spec)


@pytest.mark.parametrize("header", HOST_HEADERS)
def test_host_header_stands_alone(header, tmp_path):
    source = tmp_path / "header.cc"
    source.write_text(f'#include "{header}"\n')
    compiler = ["c++", "-std=c++20", "-fsyntax-only", "-DTK_INTERPRETER"]
    folders = [f"-I{INCLUDE}", f"-I{INCLUDE.parent}"]
    subprocess.run([*compiler, *folders, source], check=True)


def test_library_stays_small():
    lines = {name: len((INCLUDE / name).read_text().splitlines()) for name in HEADERS}
    assert sum(lines.values()) < MAX_LINES, lines
    assert {name: count for name, count in lines.items() if count > 500} == {}


_NOT_OPERATIONS = ("name", "address", "at", "view", "width")
# What block::run does for a kernel, which the rings' tests run, and helped_outputs'.
_NOT_OPERATIONS += ("become_producer", "become_consumer", "uniform_index", "elect")
_NOT_OPERATIONS += ("become_helper",)

# Where a scope opens, where it closes, and what is defined in it.
_TOKEN = re.compile(
    r"^namespace (?P<open>[\w:]+) \{|^\}  // namespace (?P<close>[\w:]+)$|"
    r"^(?:  )?(?:static )?__device__ __forceinline__ [\w:<>&*, ]+?[ &*](?P<name>\w+)\("
    r"|^TK_BINARY\((?P<binary>\w+),|^TK_REDUCTION\((?P<reduction>\w+),"
    r"|^TK_PRODUCT\((?P<product>\w+),",
    re.M,
)


def public_operations():
    """(header, name) of every function and method that kernels may call."""
    for header in HEADERS:
        if "/ptx/" in header:
            continue
        scopes = []
        for token in _TOKEN.finditer((INCLUDE / header).read_text()):
            if token["open"]:
                scopes.append(token["open"])
            elif token["close"]:
                assert scopes.pop() == token["close"], header
            elif not any("detail" in scope for scope in scopes):
                yield from ((header, name) for name in names_of(token))
        assert not scopes, header


def names_of(token):
    if token["binary"]:
        return [token["binary"] + end for end in ("", "_rows", "_cols")]
    if token["reduction"]:
        ends = ("row_", "col_", "fold_row_", "finish_row_", "fold_col_", "finish_col_")
        return [end + token["reduction"] for end in ends]
    if token["product"]:
        return [form + token["product"] for form in ("mm_", "mma_")]
    # The macros' own bodies, and methods that operations call.
    hidden = "##" in token.group() or token["name"] in _NOT_OPERATIONS
    return [] if hidden else [token["name"]]


def test_every_operation_is_tested():
    text = "".join(path.read_text() for path in sorted(TESTS.glob("*.cuh")))
    operations = set(public_operations())
    names = {name for _, name in operations}
    assert {"exp2", "add_rows", "row_sum", "mma_AtBt", "load", "acquire"} <= names
    assert {"cumsum_rows", "keep_band", "take_turn", "for_each", "start"} <= names
    untested = {
        (header, name)
        for header, name in operations
        if not re.search(rf"\b{name}\b(?:<[^;()]*>)?\(", text)
    }
    assert untested == set()


@pytest.mark.parametrize("name", sorted(path.name for path in TESTS.glob("*.cuh")))
def test_kernels_are_made_of_tile_operations(name):
    """No lane arithmetic and no PTX: what is missing belongs in the library."""
    text = (TESTS / name).read_text()
    assert not re.search(r"\b(asm|threadIdx|blockIdx|gridDim)\b|\bptx::", text)
