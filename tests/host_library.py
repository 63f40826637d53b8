"""C++ that is no device's, compiled for the host and loaded."""

import ctypes
import pathlib
import shutil
import subprocess

import pytest

from tk_jax import _ffi


def compile_for_host(source: str, folder: pathlib.Path) -> ctypes.CDLL:
    """Skips the test where there is no compiler. Headers are found as kernels' are."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    file, library = folder / "library.cc", folder / "library.so"
    file.write_text(f"#define __device__\n#define __forceinline__ inline\n{source}")
    root = _ffi.source_root()
    flags = ["-std=c++20", "-shared", "-fPIC", "-O1", f"-I{root}", f"-I{root}/include"]
    subprocess.run([compiler, *flags, "-o", library, file], check=True)
    return ctypes.CDLL(library)
