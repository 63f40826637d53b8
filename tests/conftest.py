"""What every test shares: fake CPU devices, seeds, and the rule for GPU tests."""

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

# Before anything imports jax, which reads this once: meshes need several devices.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

# As early, for NumPy: products of small matrices, as expected values are, take
# many times as long where threads of several worker processes wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import compile_gate
import jax
import numpy as np
import pytest

from tk_jax import _ffi

_SEED = 20250722


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail where no Hopper GPU is found, instead of skipping the gpu tests",
    )
    parser.addoption(
        "--emulate-ptx",
        action="store_true",
        help="implementation='interpret' executes what NVRTC makes of kernels",
    )
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run the tests marked exhaustive too, as before a release: a quarter of "
        "an hour more on two cores",
    )


def pytest_configure(config):
    # Caches of this run's own, shared by its worker processes: no test sees a kernel
    # of an earlier run, and the user's cache stays as it is. Set them to keep what they
    # hold, which for XLA's programs is what took more than 0.1 s to compile.
    for variable in ("TK_JAX_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        if variable not in os.environ:
            cache = tempfile.mkdtemp(prefix="tk_jax_test_cache_")
            os.environ[variable] = cache
            config.add_cleanup(functools.partial(shutil.rmtree, cache, True))
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Variables are for the processes that this one starts: jax is imported here.
    jax.config.update(
        "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))

    if getattr(config.option, "numprocesses", None):
        _precompile_tiles(config)


# As cuda/interpreter/ffi/compile.cc has them: otherwise the compiler passes it over.
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DTK_INTERPRETER", "-w")


def _precompile_tiles(config) -> None:
    """Has worker processes' compilers begin with the tile library already parsed.

    A third of the time that the interpreter's kernels take to compile is parsing it.
    What is compiled stays the same; a compiler of the user's choice is left alone.
    """
    compiler = shutil.which("c++")
    if not compiler or {"TK_JAX_CXX", "CXX"} & set(os.environ):
        return
    folder = tempfile.mkdtemp(prefix="tk_jax_test_header_")
    config.add_cleanup(functools.partial(shutil.rmtree, folder, True))
    header = pathlib.Path(folder) / "tiles.h"
    header.write_text('#include "tk/interpreter/entry.h"\n#include "tk/tk.cuh"\n')
    root = _ffi.source_root()
    subprocess.run(
        [
            compiler,
            *_FLAGS,
            *(f"-I{folder}" for folder in (root, root / "include")),
            *("-x", "c++-header", header, "-o", f"{header}.gch"),
        ],
        check=True,
    )
    os.environ["TK_JAX_CXX"] = f"{compiler} -include {header}"


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive") or _is_like_another(item):
                item.add_marker(pytest.mark.skip(reason="runs with --exhaustive"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    required = config.getoption("--require-gpu")
    if not gpu_items and not required:
        return
    missing = _missing_gpu()
    if missing and required:
        raise pytest.UsageError(f"--require-gpu: {missing}")
    if missing:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"gpu: {missing}"))


def _is_like_another(item) -> bool:
    """Whether PTX of a tile operation is emulated for bf16 too."""
    chosen = getattr(item, "callspec", None)
    emulated = chosen and chosen.params.get("tile_implementation") == "ptx"
    return bool(emulated) and "fp16" in chosen.id and "bf16" not in chosen.id


def pytest_terminal_summary(terminalreporter):
    """Prints the compile gate's table, also from other processes."""
    reports = (r for group in terminalreporter.stats.values() for r in group)
    rows = sorted(
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "compile_gate"
    )
    if rows:
        terminalreporter.section("compile gate")
        for row in [compile_gate.HEADER, *rows]:
            terminalreporter.write_line(row)


def _missing_gpu() -> str | None:
    """Why the gpu tests cannot run here, or None if they can."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "jax finds no CUDA GPU"
    capability = getattr(devices[0], "compute_capability", "unknown")
    if str(capability) == "9.0":
        return None
    return f"{devices[0].device_kind} has compute capability {capability}, not 9.0"


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same on every run and for every order of tests."""
    return np.random.default_rng(_SEED)


@pytest.fixture
def ptx(monkeypatch):
    """``implementation="interpret"`` executes what NVRTC makes of kernels."""
    import tiles
    from ptx import emulator

    monkeypatch.setattr(tiles, "emulated", True)
    with emulator.emulated():
        yield


@pytest.fixture(autouse=True)
def _emulation(request):
    if request.config.getoption("--emulate-ptx"):
        request.getfixturevalue("ptx")


@pytest.fixture(params=[pytest.param("tk", marks=pytest.mark.gpu), "interpret", "ptx"])
def tile_implementation(request, monkeypatch):
    """Runs kernels of the tile library's tests: on the GPU, interpreted, as PTX."""
    if request.param != "tk" and jax.default_backend() != "cpu":
        pytest.skip("runs on the CPU alone")
    import tiles

    if request.param == "ptx":
        request.getfixturevalue("ptx")
    runs_on_gpu = request.param == "tk"
    monkeypatch.setattr(tiles, "implementation", "tk" if runs_on_gpu else "interpret")
    return request.param


@pytest.fixture
def key() -> jax.Array:
    """A jax key that is the same on every run."""
    return jax.random.key(_SEED)


@pytest.fixture(scope="session")
def cpu_devices() -> list[jax.Device]:
    """Eight CPU devices, for meshes."""
    devices = jax.devices("cpu")
    assert len(devices) == 8, f"{len(devices)} CPU devices: is XLA_FLAGS overridden?"
    return devices
