"""Runs code in a process of its own that has only the extension, not jax.

Settings of the runtime live as long as the process and come from its environment, so
what depends on them is tested in a fresh one.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import subprocess
import sys

from tk_jax import _ffi

_PREAMBLE = """
import json, os, sys
from tk_jax import _extension as extension
setup = json.loads(sys.argv[1])
extension.set_source_root(setup["source_root"])
extension.set_nvrtc_paths(setup["nvrtc_folders"])
spec = setup["spec"]
"""

# A kernel that compiles in milliseconds.
SPEC = {
    "symbol": "tk_probe",
    "source": '#include "tk/kernel_params.h"\n'
    "void probe(const tk::KernelParams& p) {\n"
    "  static_cast<float*>(p.buffers[0].data)[0] = p.scalars[0];\n"
    "}",
    "function": "probe",
    "threads": 128,
}

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE = 1


def run(
    code: str,
    *,
    environment: dict[str, str] | None = None,
    source_root: pathlib.Path | None = None,
    nvrtc_folders: list[str] | None = None,
    spec: dict = SPEC,
    preexec=None,
    check: bool = True,
) -> subprocess.CompletedProcess:
    """Runs ``code``, which has ``extension`` and ``spec``; captures what it prints."""
    return subprocess.run(
        command(code, source_root=source_root, nvrtc_folders=nvrtc_folders, spec=spec),
        env=clean_environment() | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=preexec,
        check=check,
    )


def command(code, *, source_root=None, nvrtc_folders=None, spec=SPEC) -> list[str]:
    setup = {
        "source_root": str(source_root or _ffi.source_root()),
        "nvrtc_folders": _ffi.nvrtc_folders()
        if nvrtc_folders is None
        else nvrtc_folders,
        "spec": spec,
    }
    return [sys.executable, "-c", _PREAMBLE + code, json.dumps(setup)]


def clean_environment() -> dict[str, str]:
    """The environment without what steers the runtime, and with this tk_jax."""
    package_parent = str(pathlib.Path(_ffi.__file__).parent.parent)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TK_JAX_") and name != "XDG_CACHE_HOME"
    }
    path = os.pathsep.join(filter(None, [package_parent, kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path}


def obey_permissions() -> None:
    """For ``preexec``: lets file permissions hold for root too."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
