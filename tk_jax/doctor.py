"""``python -m tk_jax.doctor``: what this machine has, what it lacks, how each op runs.

Works without a GPU, without CUDA, and where the rest of the package cannot load. Exits
with 1 where something is broken; what is only absent comes with the command that
installs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Iterator

from tk_jax._version import __version__

# What the binaries of NVRTC 13 need of the driver.
_MIN_DRIVER = 13

_INSTALL_JAX = "pip install 'jax>=0.10,<0.13'"
_INSTALL_PLUGIN = "pip install 'jax[cuda13]>=0.10,<0.13'"
_INSTALL_NVRTC = "pip install 'nvidia-cuda-nvrtc>=13.0,<14'"
_INSTALL_DRIVER = "sudo apt-get install nvidia-driver-580 (or your system's way)"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One entry of the report."""

    subject: str
    status: str  # "ok"; "note": worth knowing; "missing"; "broken": exit code 1
    detail: str
    remedy: str | None = None  # the command that mends it

    def __str__(self) -> str:
        text = f"  {self.status:<8} {self.subject:<10} {self.detail}"
        if self.remedy:
            text += f"\nto fix: {self.remedy}"
        return text.replace("\n", "\n" + " " * 22)


def examine() -> Iterator[tuple[str, list[Finding]]]:
    """The report, section by section."""
    yield "Versions", _versions()
    extension, finding = _extension()
    yield "Extension", [finding]
    if extension is None:
        return
    driver = extension.driver_info()
    nvrtc = extension.nvrtc_info()
    yield "GPU", _gpu(driver)
    yield (
        "Kernels",
        [_compiler(nvrtc), *_shipped(), _cache(extension.cache_info())],
    )
    yield "Ops", _ops(nvrtc)


def _versions() -> list[Finding]:
    findings = [
        Finding("python", "ok", f"{platform.python_version()}, {sys.executable}"),
        Finding("tk_jax", "ok", f"{__version__}, {pathlib.Path(__file__).parent}"),
    ]
    for name in ("jax", "jaxlib"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "broken", "not installed", _INSTALL_JAX))
            continue
        if (0, 10) <= tuple(map(int, version.split(".")[:2])) < (0, 13):
            findings.append(Finding(name, "ok", version))
        else:
            detail = f"{version}, which tk_jax is not tested with"
            findings.append(Finding(name, "note", detail, _INSTALL_JAX))
    return findings


def _extension() -> tuple[object | None, Finding]:
    try:
        ffi = importlib.import_module("tk_jax._ffi")
        extension = ffi.extension()
    except ImportError as error:
        # The message says what to do: it is written for whoever imports the package.
        return None, Finding("extension", "broken", str(error))
    headers = ".".join(map(str, extension.ffi_api_version()))
    runtime = ".".join(map(str, ffi.runtime_api_version()))
    detail = f"built with XLA FFI API {headers}, loaded by a runtime of {runtime}"
    return extension, Finding("extension", "ok", detail)


def _gpu(driver: dict) -> list[Finding]:
    findings = []
    if driver["version"] is None:
        remedy = f"on a machine with an NVIDIA GPU, {_INSTALL_DRIVER}"
        return [Finding("driver", "missing", driver["error"], remedy)]
    if int(driver["version"].split(".")[0]) < _MIN_DRIVER:
        detail = f"CUDA {driver['version']}; the kernels need {_MIN_DRIVER}.0"
        findings.append(Finding("driver", "broken", detail, _INSTALL_DRIVER))
    else:
        findings.append(Finding("driver", "ok", f"CUDA {driver['version']}"))
    for device in driver["devices"]:
        capability = "{}.{}".format(*device["compute_capability"])
        detail = f"{device['name']}, compute capability {capability}"
        if device["problem"]:
            findings.append(Finding("gpu", "note", f"{detail}\n{device['problem']}"))
        else:
            findings.append(Finding("gpu", "ok", detail))
    if not driver["devices"]:
        detail = driver["error"] or "the driver lists none"
        return [*findings, Finding("gpu", "missing", detail)]
    return [*findings, _jax_devices()]


def _jax_devices() -> Finding:
    """Whether jax sees the GPU that the driver sees."""
    import jax

    try:
        backend = jax.default_backend()
        devices = jax.devices()
    except RuntimeError as error:
        return Finding("jax", "broken", f"no backend starts: {error}", _INSTALL_PLUGIN)
    if backend == "gpu":
        return Finding("jax", "ok", f"runs on {devices[0].device_kind}")
    detail = f"runs on {backend}, although there is a GPU"
    return Finding("jax", "missing", detail, _INSTALL_PLUGIN)


def _compiler(nvrtc: dict) -> Finding:
    if nvrtc["version"] is None:
        return Finding("nvrtc", "missing", nvrtc["error"], _INSTALL_NVRTC)
    version = "{}.{}".format(*nvrtc["version"])
    return Finding("nvrtc", "ok", f"{version}, {nvrtc['path']}")


def _shipped() -> Iterator[Finding]:
    """The folders of kernels compiled beforehand, and how far they go."""
    *named, package = importlib.import_module("tk_jax._ffi").shipped_folders()
    for folder in map(pathlib.Path, [*named, package]):
        files = {path.stem for path in folder.glob("*.tkcubin")}
        if folder.is_dir():
            detail = f"{len(files)} kernels in {folder}"
            yield Finding("shipped", "ok", detail + _shipped_by_op(files))
        elif str(folder) in named:
            detail = f"{folder}, which TK_JAX_CUBINS names, is not a folder"
            yield Finding("shipped", "note", detail)


def _shipped_by_op(files: set[str]) -> str:
    """How many of the kernels that ops choose by default are among ``files``."""
    extension = importlib.import_module("tk_jax._ffi").extension()
    counts: dict[str, list[bool]] = {}
    try:
        for item in importlib.import_module("tk_jax.compile").specialisations():
            key = extension.kernel_keys(item.spec)["shipped"]
            counts.setdefault(item.op, []).append(key in files)
    except RuntimeError:  # Keys are NVRTC's too, which another entry says is missing.
        return ""
    parts = [f"{sum(found)} of {len(found)} of {op}" for op, found in counts.items()]
    return f"\nof those that ops choose by default: {', '.join(parts)}"


def _cache(cache: dict) -> Finding:
    if cache["usable"]:
        return Finding("cache", "ok", f"{cache['path']}, trusted and writable")
    if not cache["path"]:
        return Finding("cache", "note", f"none: {cache['problem'] or 'turned off'}")
    detail = f"{cache['path']} is not used: {cache['problem']}"
    remedy = "export TK_JAX_CACHE_DIR=<a folder that only you can write to>"
    return Finding("cache", "note", detail, remedy)


def _ops(nvrtc: dict) -> list[Finding]:
    """How a typical bfloat16 call of every op runs here."""
    import jax
    import jax.numpy as jnp

    import tk_jax

    q = jax.ShapeDtypeStruct((1, 1024, 16, 64), jnp.bfloat16)
    a = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    backend = jax.default_backend()
    findings = []
    for op, arguments in ((tk_jax.attention, (q, q, q)), (tk_jax.matmul, (a, a))):
        choice = tk_jax.explain(op, *arguments)
        if backend != "gpu":
            detail = f"XLA: jax runs on {backend}"
            findings.append(Finding(op.__name__, "ok", detail))
        elif choice.cuda == "xla":
            findings.append(Finding(op.__name__, "note", f"XLA: {choice.reason}"))
        elif nvrtc["version"] is None:
            detail = "TK kernel, which cannot be compiled without NVRTC"
            findings.append(Finding(op.__name__, "broken", detail, _INSTALL_NVRTC))
        else:
            findings.append(Finding(op.__name__, "ok", "TK kernel"))
    return findings


def main() -> int:
    broken = 0
    for title, findings in examine():
        print(title)
        for finding in findings:
            print(finding)
            broken += finding.status == "broken"
    print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
