"""The result file: one JSON object an op and GPU, and what it records besides times."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import statistics
import subprocess

import jax

from benchmarks.cases import Case

ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGES = (
    "tk_jax",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "tokamax",
    "flash-attn3-jax",
    "jax-linear-attention",
)
# Datasheet figures: dense 16-bit flops and bytes a second. Under load the clock settles
# below the datasheet's, so that even a perfect kernel stays under a fraction of 1.
_ROOFLINES = {
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, direction and implementation."""

    case: str
    direction: str  # "fwd" or "bwd"
    implementation: str
    median_us: float
    samples_us: list[float]
    tflops: float
    roofline_fraction: float | None  # of the datasheet; null for an unknown GPU
    compile_s: float  # the first call: trace, compile, load, run
    # "direct": the program alone. "difference": forward with backward, less forward.
    method: str
    # Backward by difference, where the direct time is what median_us has.
    difference_us: float | None = None


def make_row(
    case: Case,
    direction: str,
    implementation: str,
    seconds: list[float],
    *,
    gpu: str,
    compile_s: float,
    method: str,
    difference: float | None = None,
) -> Row:
    median = statistics.median(seconds)
    return Row(
        case=str(case),
        direction=direction,
        implementation=implementation,
        median_us=round(median * 1e6, 2),
        samples_us=[round(sample * 1e6, 2) for sample in seconds],
        tflops=round(case.flops(direction) / median / 1e12, 2),
        roofline_fraction=roofline_fraction(case, direction, median, gpu),
        compile_s=round(compile_s, 2),
        method=method,
        difference_us=None if difference is None else round(difference * 1e6, 2),
    )


def roofline_fraction(
    case: Case, direction: str, seconds: float, gpu: str
) -> float | None:
    """The least time the datasheet permits, by flops or by bytes, over ``seconds``."""
    for name, (flops_rate, bytes_rate) in _ROOFLINES.items():
        if name in gpu:
            least = max(
                case.flops(direction) / flops_rate, case.bytes(direction) / bytes_rate
            )
            return round(least / seconds, 4)
    return None


def best_rival(rows: list[Row], row: Row, is_ours) -> Row | None:
    """The quickest rival in the case and direction of ``row``."""
    rivals = [
        other
        for other in rows
        if (other.case, other.direction) == (row.case, row.direction)
        and not is_ours(other.implementation)
    ]
    return min(rivals, key=lambda other: other.median_us, default=None)


def find_gpu() -> str | None:
    """The GPU's name, or None where jax has none."""
    try:
        return jax.devices("cuda")[0].device_kind
    except RuntimeError:
        return None


def default_path(op: str, gpu: str) -> pathlib.Path:
    folder = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return ROOT / "results" / folder / f"{op}.json"


def write(
    path: pathlib.Path, rows: list[Row], *, gpu: str, commit: str | None = None
) -> None:
    document = {
        "commit": commit or find_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": gpu,
        "versions": find_versions(),
        "rows": [_row_dict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _row_dict(row: Row) -> dict:
    found = dataclasses.asdict(row)
    if found["difference_us"] is None:
        del found["difference_us"]
    return found


def read(path: pathlib.Path) -> dict:
    """The document, its rows as :class:`Row`."""
    document = json.loads(path.read_text())
    document["rows"] = [Row(**row) for row in document["rows"]]
    return document


def find_commit() -> str:
    """The commit of the source tree, marked where files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
