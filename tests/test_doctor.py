"""``python -m tk_jax.doctor`` on this machine, and its findings on others."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tk_jax import doctor

pytestmark = pytest.mark.smoke


def run_doctor(cwd: pathlib.Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tk_jax.doctor"],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def entry(report: str, subject: str) -> str:
    """The part of the report about ``subject``."""
    found = re.search(rf"^  \w+ +{subject} .*\n(?: {{22}}.*\n)*", report, re.MULTILINE)
    assert found, report
    return found[0]


def test_reports_every_section_and_nothing_broken(tmp_path):
    code, report = run_doctor(tmp_path, TK_JAX_CACHE_DIR=str(tmp_path / "cache"))
    sections = re.findall(r"^\w+$", report, re.MULTILINE)
    assert sections == ["Versions", "Extension", "GPU", "Kernels", "Ops"]
    assert "broken  " not in report
    assert code == 0
    for subject in ("python", "tk_jax", "jax", "jaxlib", "extension", "cache"):
        assert entry(report, subject).startswith("  ok "), report
    for op in ("attention", "matmul"):
        assert re.search("TK kernel|XLA", entry(report, op))


def test_without_nvrtc_names_the_command_that_installs_it(tmp_path):
    code, report = run_doctor(
        tmp_path, TK_JAX_NVRTC=str(tmp_path / "no_such_file.so"), JAX_PLATFORMS="cpu"
    )
    assert code == 0
    assert entry(report, "nvrtc").startswith("  missing ")
    assert "to fix: pip install 'nvidia-cuda-nvrtc" in entry(report, "nvrtc")


def test_counts_shipped_kernels(tmp_path):
    folder = tmp_path / "cubins"
    folder.mkdir()
    (folder / "0.tkcubin").touch()
    missing = tmp_path / "missing"
    _, report = run_doctor(
        tmp_path, TK_JAX_CUBINS=f"{folder}:{missing}", JAX_PLATFORMS="cpu"
    )
    assert f"ok       shipped    1 kernels in {folder}" in report
    counted = re.search(r"0 of \d+ of attention_fwd, .*0 of \d+ of matmul", report)
    # A kernel's digests are computed with NVRTC's version, where there is NVRTC.
    assert bool(counted) == entry(report, "nvrtc").startswith("  ok ")
    assert f"note     shipped    {missing}, which TK_JAX_CUBINS names" in report


def test_without_driver_names_what_to_install(tmp_path):
    code, report = run_doctor(
        tmp_path, TK_JAX_LIBCUDA=str(tmp_path / "no_such_file.so"), JAX_PLATFORMS="cpu"
    )
    assert code == 0
    assert entry(report, "driver").startswith("  missing ")
    assert "nvidia-driver" in entry(report, "driver")
    assert "XLA: jax runs on cpu" in entry(report, "attention")


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    code, report = run_doctor(tmp_path, TK_JAX_CACHE_DIR=str(cache))
    assert code == 0
    assert entry(report, "cache").startswith("  note ")
    assert "is not used" in entry(report, "cache")
    assert "TK_JAX_CACHE_DIR=" in entry(report, "cache")


def test_works_where_the_extension_cannot_load(tmp_path):
    # None makes the import fail, as for an extension built for another Python.
    code = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['tk_jax._extension'] = None\n"
            "from tk_jax import doctor; sys.exit(doctor.main())",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert code.returncode == 1, code.stderr
    assert entry(code.stdout, "extension").startswith("  broken ")
    assert "1 broken" in code.stdout


HOPPER = {
    "name": "NVIDIA H100 80GB HBM3",
    "compute_capability": (9, 0),
    "multiprocessors": 132,
    "problem": None,
}
OLDER = {**HOPPER, "name": "NVIDIA A100", "compute_capability": (8, 0)}


@pytest.mark.parametrize(
    ("driver", "subject", "status", "text"),
    [
        (
            {"version": "12.8", "devices": [HOPPER], "error": None},
            "driver",
            "broken",
            "CUDA 12.8; the kernels need 13.0",
        ),
        (
            {"version": "13.0", "devices": [], "error": "no device"},
            "gpu",
            "missing",
            "no device",
        ),
        (
            {"version": "13.0", "devices": [HOPPER], "error": None},
            "gpu",
            "ok",
            "NVIDIA H100 80GB HBM3, compute capability 9.0",
        ),
        (
            {
                "version": "13.0",
                "devices": [{**OLDER, "problem": "needs Hopper"}],
                "error": None,
            },
            "gpu",
            "note",
            "NVIDIA A100, compute capability 8.0\nneeds Hopper",
        ),
    ],
    ids=["old-driver", "no-gpu", "hopper", "ampere"],
)
def test_findings_about_drivers_and_gpus(driver, subject, status, text):
    findings = {finding.subject: finding for finding in doctor._gpu(driver)}
    assert findings[subject].status == status
    assert findings[subject].detail == text


def test_a_gpu_that_jax_does_not_use_is_missing_its_plugin(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    finding = doctor._jax_devices()
    assert finding.status == "missing"
    assert "jax[cuda13]" in finding.remedy


def test_a_kernel_that_cannot_be_compiled_on_a_gpu_is_broken(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("tk_jax._dispatch._unsupported_gpu", lambda: None)
    for finding in doctor._ops({"version": None, "path": None, "error": "none found"}):
        assert finding.status == "broken"
        assert "nvidia-cuda-nvrtc" in finding.remedy
    for finding in doctor._ops({"version": (13, 0), "path": "x", "error": None}):
        assert (finding.status, finding.detail) == ("ok", "TK kernel")
