"""A wheel with kernels: what scripts/ship_kernels.py adds, and that it is found."""

import base64
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import zipfile

import handler_process
import pytest

import tk_jax
from tk_jax import _ffi, compile

ROOT = pathlib.Path(__file__).absolute().parent.parent
# The two that compile in least time.
NAME = "attention_bwd_finish_d64"


@pytest.fixture
def wheel(tmp_path):
    """A wheel of this package, laid out as the build lays it out."""
    package = pathlib.Path(tk_jax.__file__).parent
    files = {
        f"tk_jax/{path.relative_to(package)}": path
        for path in package.rglob("*.py")
        if "cuda" not in path.relative_to(package).parts
    }
    files[f"tk_jax/{pathlib.Path(_ffi._extension.__file__).name}"] = pathlib.Path(
        _ffi._extension.__file__
    )
    sources = _ffi.source_root()
    files |= {
        f"tk_jax/cuda/{path.relative_to(sources)}": path
        for folder in ("include", "kernels")
        for path in (sources / folder).rglob("*")
        if path.suffix in (".h", ".cuh") and "tile_test" not in path.parts
    }
    path = tmp_path / "tk_jax-0-cp312-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in files.items():
            archive.write(file, name)
        archive.writestr("tk_jax-0.dist-info/METADATA", "Name: tk_jax\nVersion: 0\n")
        archive.writestr(
            "tk_jax-0.dist-info/RECORD",
            "".join(f"{name},,\n" for name in archive.namelist())
            + "tk_jax-0.dist-info/RECORD,,\n",
        )
    return path


def ship(wheel, *arguments, timeout=500, **variables):
    script = ROOT / "scripts" / "ship_kernels.py"
    return subprocess.run(
        [sys.executable, str(script), str(wheel), *arguments],
        cwd=wheel.parent,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def pack(*flags, folder):
    script = ROOT / "scripts" / "pack_wheel.py"
    return subprocess.run(
        [sys.executable, *flags, str(script), str(folder)],
        cwd=folder.parent,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def installed_compile(site, *arguments, **variables):
    """python -m tk_jax.compile of the package in ``site``, and its cache."""
    code = (
        "import runpy, sys\n"
        "sys.meta_path[:] = [x for x in sys.meta_path"
        " if not type(x).__module__.startswith('_')]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "runpy.run_module('tk_jax.compile', run_name='__main__', alter_sys=True)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | variables,
        cwd=site,
        capture_output=True,
        text=True,
        timeout=500,
    )


def check_installed(wheel, site, names, count):
    """Every kernel named is there, with an empty cache and without NVRTC."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        record = archive.read("tk_jax-0.dist-info/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in record} >= set(archive.namelist())
        archive.extractall(site)
    for line in record:
        name, digest, size = line.split(",")
        if name.endswith(".tkcubin"):
            data = (site / name).read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            assert (digest, int(size)) == (f"sha256={found.rstrip('=')}", len(data))
    assert sum(line.startswith("tk_jax/cubins/") for line in record) == count
    done = installed_compile(
        site,
        *(f"--only={name}" for name in names),
        TK_JAX_CACHE_DIR=str(site / "empty"),
        TK_JAX_NVRTC=str(site / "none.so"),
    )
    assert done.returncode == 0, done.stderr
    origins = [line.split()[2] for line in done.stdout.splitlines()[:-1]]
    assert origins == ["shipped"] * count
    assert not list((site / "empty").glob("*"))


def test_shipped_kernels_are_found_without_nvrtc(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        before = {name: archive.read(name) for name in archive.namelist()}
    done = ship(wheel, f"--only={NAME}")
    assert done.returncode == 0, done.stderr
    assert f"{wheel}: 2 kernels, " in done.stdout
    check_installed(wheel, tmp_path / "site", [NAME], 2)
    # What was there is there as it was.
    with zipfile.ZipFile(wheel) as archive:
        for name, data in before.items():
            assert archive.read(name).startswith(data)
    # A checkout has the headers of tests too, and so other digests.
    shipped = {path.stem for path in (tmp_path / "site/tk_jax/cubins").iterdir()}
    here = {
        _ffi.extension().kernel_keys(item.spec)["shipped"]
        for item in compile.specialisations(NAME)
    }
    has_tests = (_ffi.source_root() / "kernels" / "tile_test").exists()
    assert shipped.isdisjoint(here) if has_tests else shipped == here
    # Kernels that are not shipped cannot be had without NVRTC: the proof can fail.
    missing = installed_compile(
        tmp_path / "site",
        "--only=attention_bwd_prepare_d64",
        TK_JAX_CACHE_DIR="off",
        TK_JAX_NVRTC=str(tmp_path / "none.so"),
    )
    assert missing.returncode == 1
    assert "NVRTC" in missing.stderr
    again = ship(wheel, f"--only={NAME}")
    assert again.returncode == 1
    assert "has kernels already" in again.stderr


def test_names_that_match_nothing_are_an_error(wheel):
    done = ship(wheel, "--only=no_such_kernel")
    assert done.returncode == 1
    assert "no kernel's name contains any of ['no_such_kernel']" in done.stderr


def test_everything_that_ops_choose_is_shipped(wheel, tmp_path):
    """With the compiler's stand-in: the compile gate compiles every one of them."""
    done = ship(wheel, TK_JAX_NVRTC=handler_process.stand_in("fake_nvrtc.c"))
    assert done.returncode == 0, done.stderr
    count = len(list(compile.specialisations()))
    check_installed(wheel, tmp_path / "site", [], count)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_with_everything_is_small_enough(wheel, tmp_path):
    size = wheel.stat().st_size
    done = ship(wheel, timeout=1000)
    assert done.returncode == 0, done.stderr
    count = len(list(compile.specialisations()))
    check_installed(wheel, tmp_path / "site", [], count)
    # A wheel on the package index may have 100 MB.
    assert wheel.stat().st_size - size < 20e6


def test_an_editable_install_is_packed_whole(tmp_path):
    try:
        install = importlib.metadata.distribution("tk_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tk_jax is not installed")
    if '"editable": true' not in (install.read_text("direct_url.json") or ""):
        pytest.skip("tk_jax is not installed in editable mode")
    done = pack(folder=tmp_path / "wheel")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "wheel").iterdir()
    assert done.stdout == f"{path}\n"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        info = f"tk_jax-{tk_jax.__version__}.dist-info"
        record = archive.read(f"{info}/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in record} == names
        archive.extractall(tmp_path / "site")
    sources = {str(x.relative_to(ROOT)) for x in (ROOT / "tk_jax").rglob("*.py")}
    assert names >= sources | {f"{info}/METADATA", f"{info}/WHEEL"}
    assert "tk_jax/cuda/include/tk/tk.cuh" in names
    assert not any("direct_url" in name or "_editable" in name for name in names)
    done = installed_compile(tmp_path / "site", f"--only={NAME}", "--help")
    assert done.returncode == 0, done.stderr


def test_packing_without_an_install_says_what_to_do(tmp_path):
    done = pack("-S", folder=tmp_path / "wheel")
    assert done.returncode == 1
    assert "pip install --editable . first" in done.stderr
    assert not (tmp_path / "wheel").exists()
