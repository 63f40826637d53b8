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

from benchmarks import packages
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
    "torch",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "triton",
    "mamba-ssm",
    "fla-core",
)
# The direction of rows that hold the cost of a call over its kernel.
DISPATCH = "dispatch"
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
    direction: str  # "fwd", "bwd" or "dispatch"
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
    # "graph": of a captured CUDA graph, replayed. "kernels": their times alone. Where
    # there is none, the wall clock of calls as they are.
    clock: str | None = None
    # What a call takes beyond its kernel; of direction "dispatch".
    overhead_us: float | None = None
    # Where they are not those of the document: of a run that others were merged into.
    commit: str | None = None
    date: str | None = None


class MergeError(Exception):
    """Results that do not belong in one file."""


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
    overhead: float | None = None,
    clock: str = "wall",
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
        clock=None if clock == "wall" else clock,
        overhead_us=None if overhead is None else round(overhead * 1e6, 2),
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
    path: pathlib.Path,
    rows: list[Row],
    *,
    gpu: str,
    commit: str | None = None,
    before: dict | None = None,
) -> None:
    """Writes ``rows``, with those of ``before`` (a document) that they do not replace.

    All rows of a case and direction come from one run, so that they may be compared.
    """
    document = {
        "commit": commit or find_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": gpu,
        "versions": find_versions(),
    }
    if before:
        rows = _kept(before, document, rows) + rows
        document["versions"] = before["versions"] | document["versions"]
    document["rows"] = [_row_dict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _kept(before: dict, document: dict, rows: list[Row]) -> list[Row]:
    measured = {(row.case, row.direction) for row in rows}
    kept = []
    for row in before["rows"]:
        if (row.case, row.direction) in measured:
            continue
        origin = {
            name: getattr(row, name) or before[name] for name in ("commit", "date")
        }
        if origin == {name: document[name] for name in origin}:
            origin = dict.fromkeys(origin)
        kept.append(dataclasses.replace(row, **origin))
    return kept


def read_for_merging(path: pathlib.Path, gpu: str) -> dict | None:
    """The document to add to, or :class:`MergeError`; None where there is none."""
    if not path.exists():
        return None
    document = read(path)
    if document["gpu"] != gpu:
        raise MergeError(f"{path} is of a {document['gpu']}, and this is a {gpu}")
    for package, version in find_versions().items():
        was = document["versions"].get(package, version)
        if was != version and package not in ("python", "tk_jax"):
            raise MergeError(
                f"{path} was measured with {package} {was}, and {version} is here"
            )
    return document


def _row_dict(row: Row) -> dict:
    optional = ("difference_us", "clock", "overhead_us", "commit", "date")
    found = dataclasses.asdict(row)
    return {
        name: value
        for name, value in found.items()
        if value is not None or name not in optional
    }


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
    return versions | packages.versions()
