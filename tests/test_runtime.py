"""The runtime by itself: digests, generated source, the compiler, what is missing."""

import hashlib
import json
import pathlib
import shutil

import extension_process
import pytest

from tk_jax import _ffi
from tk_jax import compile as tk_compile


@pytest.fixture
def extension():
    return _ffi.extension()


@pytest.mark.parametrize(
    "size", [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 1000, 99999]
)
def test_sha256(extension, size, rng):
    data = rng.bytes(size)
    assert extension.sha256(data) == hashlib.sha256(data).hexdigest()


def test_translation_unit(extension):
    spec = {
        "symbol": "tk_attention_fwd_d128_causal_bf16",
        "header": "kernels/attention/forward.cuh",
        "function": "tk::attention::forward<tk::attention::ForwardTraits<tk::bf16>>",
        "params_type": "tk::attention::ForwardParams",
        "threads": 384,
        "min_blocks": 2,
    }
    assert extension.translation_unit(spec) == (
        '#include "kernels/attention/forward.cuh"\n'
        'extern "C" __global__ void __launch_bounds__(384, 2)\n'
        "tk_attention_fwd_d128_causal_bf16("
        "const __grid_constant__ tk::attention::ForwardParams params) {\n"
        "  tk::attention::forward<tk::attention::ForwardTraits<tk::bf16>>(params);\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbol": "1st"}, "the symbol is not an identifier"),
        ({"symbol": ""}, "the symbol is not an identifier"),
        ({"function": "f(params); g"}, "the function is not a name expression"),
        ({"params_type": "int x"}, None),
        ({"params_type": "int{}"}, "the parameter type is not a name"),
        (
            {"header": 'a"\n#error'},
            "the header is not a path below the kernels' sources",
        ),
        (
            {"header": "/etc/passwd"},
            "the header is not a path below the kernels' sources",
        ),
        ({"header": "../x.h"}, "the header is not a path below the kernels' sources"),
        (
            {"source": 'int a;\n  # include "/home/me/mine.cuh"\n'},
            "the source includes a file of its own .*mine.cuh.*; pass that file's text",
        ),
        ({"source": "#include <../mine.cuh>"}, "the source includes a file of its own"),
        ({"source": ""}, "neither a header nor source text is given"),
        ({"threads": 31}, "threads is 31; expected a multiple of 32 from 32 to 1024"),
        ({"threads": 1056}, "threads is 1056"),
        ({"shared_bytes": 232449}, "needs 232449 bytes of shared memory; a block has"),
        ({"shared_bytes": -1}, "needs -1 bytes"),
        ({"cluster_size": 9}, "cluster_size is 9; expected 1 to 8"),
        ({"min_blocks": 0}, "min_blocks is 0"),
    ],
)
def test_spec_that_cannot_be_compiled(extension, change, message):
    spec = extension_process.SPEC | change
    if message is None:
        # A name by its letters, but no type: the compiler's turn to refuse.
        with pytest.raises(RuntimeError, match="NVRTC_ERROR_COMPILATION"):
            extension.compile(spec)
        return
    with pytest.raises(ValueError, match=message):
        extension.compile(spec)


def test_compiler_sees_the_sources_and_no_others(extension):
    for header in ("cuda_runtime.h", "vector"):
        spec = extension_process.SPEC | {"header": header}
        with pytest.raises(RuntimeError) as error:
            extension.compile(spec)
        assert "cannot compile tk_probe" in str(error.value)


def test_compiler_ignores_the_current_folder(tmp_path):
    (tmp_path / "tk").mkdir()
    (tmp_path / "tk" / "kernel_params.h").write_text("#error not this one")
    code = f"os.chdir({str(tmp_path)!r})\nprint(extension.compile(spec)['origin'])"
    done = extension_process.run(code, environment={"TK_JAX_CACHE_DIR": "off"})
    assert done.stdout.strip() == "compiled"


def test_code_is_for_hopper_alone(extension):
    result = extension.compile(extension_process.SPEC)
    assert result["cubin"].startswith(b"\x7fELF")
    assert b"tk_probe" in result["cubin"]
    assert "Compiling entry function 'tk_probe' for 'sm_90a'" in result["log"]
    assert "\0" not in result["log"]


def test_compiling_lets_other_threads_run():
    """Two compilations at once, through the pool of compile_kernels."""
    items = [
        tk_compile.Specialisation(
            "test", "", extension_process.SPEC | {"symbol": f"tk_parallel_{i}"}
        )
        for i in range(4)
    ]
    kernels = tk_compile.compile_kernels(items, use_cache=False)
    assert [kernel.name for kernel in kernels] == [item.symbol for item in items]
    assert {kernel.origin for kernel in kernels} == {"compiled"}
    again = tk_compile.compile_kernels(items)
    assert {kernel.origin for kernel in again} == {"cache"}


# -- Finding NVRTC ---------------------------------------------------------------------

_INFO = "print(json.dumps(extension.nvrtc_info()))"


def nvrtc_info(**kwargs):
    return json.loads(extension_process.run(_INFO, **kwargs).stdout)


def nvrtc_file() -> pathlib.Path:
    folders = map(pathlib.Path, _ffi.nvrtc_folders())
    return next(found for folder in folders for found in folder.glob("libnvrtc.so.1?"))


def test_nvrtc_of_a_wheel_is_found():
    info = nvrtc_info()
    assert info["error"] is None
    assert info["version"][0] in (12, 13)
    assert info["path"] == str(nvrtc_file())


@pytest.mark.parametrize("form", ["file", "folder"])
def test_nvrtc_named_by_the_environment(form):
    file = nvrtc_file()
    chosen = str(file if form == "file" else file.parent)
    info = nvrtc_info(nvrtc_folders=[], environment={"TK_JAX_NVRTC": chosen})
    assert info["path"] == str(file)


def test_nvrtc_through_a_link_finds_its_builtins(tmp_path):
    link = tmp_path / "libnvrtc.so"
    link.symlink_to(nvrtc_file())
    done = extension_process.run(
        "print(extension.compile(spec, use_cache=False)['origin'])",
        nvrtc_folders=[],
        environment={"TK_JAX_NVRTC": str(link)},
    )
    assert done.stdout.strip() == "compiled"


def test_named_nvrtc_that_is_missing_is_not_replaced():
    info = nvrtc_info(environment={"TK_JAX_NVRTC": "/nowhere/libnvrtc.so.13"})
    assert info["version"] is None
    assert "/nowhere/libnvrtc.so.13: no such file" in info["error"]
    assert "pip install 'tk_jax[cuda13]'" in info["error"]


def test_library_that_is_no_nvrtc(tmp_path):
    (tmp_path / "libnvrtc.so.13").write_text("not a library")
    info = nvrtc_info(environment={"TK_JAX_NVRTC": str(tmp_path)})
    assert "NVRTC, NVIDIA's run-time compiler, was not found" in info["error"]
    assert f"{tmp_path}/libnvrtc.so.13" in info["error"]


def test_missing_nvrtc_is_looked_for_again():
    """Installing it helps a process that is already running."""
    code = """
found = setup["nvrtc_folders"]
extension.set_nvrtc_paths([])
before = extension.nvrtc_info()
extension.set_nvrtc_paths(found)
after = extension.nvrtc_info()
print(json.dumps([before["version"], after["version"]]))
"""
    missing = {"LD_LIBRARY_PATH": "", "TK_JAX_NVRTC": ""}
    before, after = json.loads(extension_process.run(code, environment=missing).stdout)
    assert before is None
    assert after is not None


def test_missing_sources():
    done = extension_process.run(
        "extension.compile(spec)", source_root=pathlib.Path("/nowhere"), check=False
    )
    assert "the kernels' sources cannot be read at /nowhere/include" in done.stderr
    assert "Reinstall tk_jax" in done.stderr


# In place of the first, the second: as many bytes, but not at the same offsets.
_OTHER_ORDER = ("int m, n, k, batch;", "int batch, m, n, k;")
_COMPILE = {
    "_extension": "print(extension.compile(spec)['origin'])",
    "_interpreter": """
from tk_jax import _interpreter as interpreter
interpreter.set_source_root(setup["source_root"])
interpreter.compile([{"header": "", "params_type": "tk::KernelParams"} | spec])
print("compiled")
""",
}


def compile_from(sources, *, module="_extension", **environment):
    return extension_process.run(
        _COMPILE[module],
        source_root=sources,
        environment={"TK_JAX_CACHE_DIR": "off"} | environment,
        check=False,
    )


@pytest.fixture
def sources(tmp_path):
    """A copy of the device sources, to change."""
    copy = tmp_path / "cuda"
    for part in ("include", "kernels"):
        shutil.copytree(_ffi.source_root() / part, copy / part)
    return copy


@pytest.mark.parametrize("module", _COMPILE)
def test_header_that_handlers_were_not_built_with(sources, module):
    header = sources / "kernels" / "matmul" / "matmul.h"
    built_with = header.read_bytes()
    assert built_with.count(_OTHER_ORDER[0].encode()) == 1
    header.write_bytes(built_with.replace(*(x.encode() for x in _OTHER_ORDER)))
    # Whatever compiler there is.
    done = compile_from(sources, module=module, TK_JAX_NVRTC="/nowhere")
    assert f"{header} has changed since tk_jax was built" in done.stderr
    assert "Build tk_jax again (`pip install --editable" in done.stderr
    header.write_bytes(built_with)
    done = compile_from(sources, module=module)
    assert (done.stdout, done.stderr) == ("compiled\n", "")


@pytest.mark.parametrize("name", ["kernels/matmul/kernel.cuh", "include/tk/location.h"])
def test_header_of_kernels_alone_may_change(sources, name):
    with (sources / name).open("a") as file:
        file.write("// changed\n")
    assert compile_from(sources).stdout == "compiled\n"


# -- The driver ------------------------------------------------------------------------


def test_missing_driver_is_reported():
    done = extension_process.run(
        "print(json.dumps(extension.driver_info()))",
        environment={"TK_JAX_LIBCUDA": "/nowhere/libcuda.so.1"},
    )
    info = json.loads(done.stdout)
    assert (info["version"], info["devices"]) == (None, [])
    assert "the NVIDIA driver was not found" in info["error"]


def test_library_that_is_no_driver():
    done = extension_process.run(
        "print(extension.driver_info()['error'])",
        environment={"TK_JAX_LIBCUDA": str(nvrtc_file())},
    )
    assert "is older than CUDA 12.0" in done.stdout
    assert 'implementation="xla"' in done.stdout


# -- The command line ------------------------------------------------------------------


def test_command_line_fills_the_cache(tmp_path, capsys, extension):
    extension.set_cache_dir(str(tmp_path / "cache"))
    try:
        arguments = ["--only", "attention_bwd_finish_d64_bf16"]
        assert tk_compile.main(arguments) == 0
        assert "compiled  tk_attention_bwd_finish_d64_bf16" in capsys.readouterr().out
        assert tk_compile.main(arguments) == 0
        assert "cache     tk_attention_bwd_finish_d64_bf16" in capsys.readouterr().out
        assert tk_compile.main([*arguments, "--force"]) == 0
        assert "compiled  tk_attention_bwd_finish_d64_bf16" in capsys.readouterr().out
    finally:
        extension.set_cache_dir(None)


def test_command_line_says_when_nothing_is_kept(capsys, extension):
    extension.set_cache_dir("off")
    try:
        assert tk_compile.main(["--only", "attention_bwd_finish_d64_bf16"]) == 1
        assert "nothing was kept" in capsys.readouterr().err
    finally:
        extension.set_cache_dir(None)


def test_command_line_lists_names(capsys):
    assert tk_compile.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(list(tk_compile.specialisations()))
    with pytest.raises(SystemExit):
        tk_compile.main(["--only", "no-such-kernel"])


def test_tiles_that_a_kernel_does_not_take_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="left out") as warnings:
        items = list(tk_compile.specialisations("bwd", {"block_kv": 176}))
    assert items == []
    messages = [str(warning.message) for warning in warnings]
    assert "left out: config.block_kv is 176; expected a multiple of 64 up to 256" in (
        messages
    )
