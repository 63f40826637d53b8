"""``python -m benchmarks.table FILE``: a result file as a table in Markdown.

``--write README.md`` puts it between the lines of that file that name this module.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

from benchmarks import implementations, recurrent, results
from benchmarks.cases import CASE_TYPES, AttentionCase, Case
from benchmarks.results import Row

# Packages whose versions an implementation's figures depend on.
_PACKAGES = {
    "cudnn": "nvidia-cudnn-cu13",
    "cublas": "nvidia-cublas",
    "jla": "jax-linear-attention",
    "xla": "jaxlib",
    "fla": "fla-core",
    "fla-parallel": "fla-core",
    "fla-fused-chunk": "fla-core",
    "thunderkittens[bhtd]": "thunderkittens",
}
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__
    )
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--write", type=pathlib.Path, metavar="PAGE")
    args = parser.parse_args(argv)
    text = render(results.read(args.file), args.file.stem)
    if args.write is None:
        print(text, end="")
        return 0
    try:
        page = replaced(args.write.read_text(), text, args.file.stem)
    except ValueError as error:
        print(f"benchmarks.table: {args.write}: {error}", file=sys.stderr)
        return 2
    args.write.write_text(page)
    return 0


def replaced(page: str, text: str, op: str) -> str:
    """``page`` with ``text`` between its two comments for ``op``."""
    begin, end = marks(op)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one line {begin!r} and one line {end!r}")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}{end}{after}"


def marks(op: str) -> tuple[str, str]:
    return f"<!-- benchmarks.table {op} -->", f"<!-- end of {op} -->"


def render(document: dict, op: str) -> str:
    """What was measured with which versions, and a row a case."""
    rows = [row for row in document["rows"] if row.direction != results.DISPATCH]
    cases = [CASE_TYPES[op].parse(name) for name in dict.fromkeys(r.case for r in rows)]
    cases.sort(key=order)
    directions = CASE_TYPES[op].directions
    if op in recurrent.CASE_TYPES:
        return "\n".join(_times(document, rows, cases, directions)) + "\n"
    # Any order only where it was measured.
    any_order = any(row.implementation == implementations.ANY_ORDER for row in rows)
    titles = ["head dim, heads, T, mask" if op == "attention" else "M, N, K"]
    for direction in directions:
        titles.append(DIRECTIONS[direction])
        titles += ["any order"] if direction == "bwd" and any_order else []
        titles.append("best of the others")
    lines = [
        f"{document['gpu']}, {document['date']}, median TFLOP/s; in brackets how many "
        "times as fast ours is.",
        f"{_versions(document, rows)}.",
        "",
        line(titles),
        line(["---"] * len(titles)),
    ]
    for case in cases:
        cells = [label(case)]
        for direction in directions:
            cells += _cells(case, direction, rows, any_order)
        lines.append(line(cells))
    lines += _dispatch_lines(document["rows"])
    return "\n".join(lines) + "\n"


def _times(document: dict, rows: list[Row], cases, directions) -> list[str]:
    """Of everyone: what is memory-bound has no flops to speak of."""
    found = {(row.case, row.direction, row.implementation): row for row in rows}
    columns = [
        (direction, name)
        for direction in directions
        for name in dict.fromkeys(
            row.implementation for row in rows if row.direction == direction
        )
    ]
    titles = [f"{DIRECTIONS[direction]} {name}" for direction, name in columns]
    lines = [
        f"{document['gpu']}, {document['date']}, median microseconds; in brackets how "
        "many times as fast ours is.",
        f"{_versions(document, rows)}.",
        "",
        line(["sizes", *titles]),
        line(["---"] * (1 + len(titles))),
    ]
    for case in cases:
        cells = []
        for direction, name in columns:
            row, ours = (found.get((str(case), direction, x)) for x in (name, "tk"))
            if row is None:
                cells.append("-")
            elif ours is None or implementations.is_ours(name):
                cells.append(f"{row.median_us:.0f}")
            else:
                ratio = row.median_us / ours.median_us
                cells.append(f"{row.median_us:.0f} ({ratio:.2f})")
        lines.append(line([label(case), *cells]))
    return lines


def line(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def order(case: Case):
    """Attention's cases by family and length; others as they come."""
    if not isinstance(case, AttentionCase):
        return ()
    family = (case.head_dim, case.value_dim, case.num_heads, case.num_kv_heads)
    mask = (case.is_causal, case.window or 0, case.documents)
    return *family, case.seqlen_q, case.seqlen_kv, case.batch, mask


def label(case: Case) -> str:
    """A case's sizes, as rows of tables begin."""
    if isinstance(case, recurrent.RecurrentCase):
        return str(case).replace("-", " ")
    if not isinstance(case, AttentionCase):
        batch = "" if case.batch == 1 else f"{case.batch} x "
        stored = "" if case.transposes == "nn" else f", {case.transposes}"
        label = f"{batch}{case.m}, {case.n}, {case.k}{stored}"
    else:
        dims = str(case.head_dim)
        dims += "" if case.head_dim_v is None else f"/{case.head_dim_v}"
        heads = str(case.num_heads)
        heads += "" if case.num_kv_heads == case.num_heads else f"/{case.num_kv_heads}"
        length = str(case.seqlen_q)
        length += "" if case.seqlen_kv == case.seqlen_q else f"/{case.seqlen_kv}"
        # 16384 tokens go without saying.
        length += "" if case.batch * case.seqlen_q == 16384 else f" (B {case.batch})"
        masks = ["causal"] if case.is_causal else []
        masks += [] if case.window is None else [f"window {case.window}"]
        masks += [f"{case.documents} documents"] if case.documents > 1 else []
        label = f"{dims}, {heads}, {length}, {' '.join(masks) or 'none'}"
    return label if case.dtype == "bf16" else f"{label}, {case.dtype}"


def _cells(case, direction: str, rows: list[Row], any_order: bool) -> list[str]:
    found = {
        row.implementation: row
        for row in rows
        if (row.case, row.direction) == (str(case), direction)
    }
    ours = found.get("tk")
    cells = [_speed(ours)]
    if direction == "bwd" and any_order:
        cells.append(_speed(found.get(implementations.ANY_ORDER)))
    some_row = next(iter(found.values()), None)
    rival = some_row and results.best_rival(rows, some_row, implementations.is_ours)
    if rival is None:
        return [*cells, "-"]
    ratio = f" ({rival.median_us / ours.median_us:.2f})" if ours else ""
    return [*cells, f"{rival.tflops:.0f} {rival.implementation}{ratio}"]


def _speed(row: Row | None) -> str:
    return "-" if row is None else f"{row.tflops:.0f}"


def _versions(document: dict, rows: list[Row]) -> str:
    """jax's and every rival's, and the commits that were measured."""
    versions = document["versions"]
    names = dict.fromkeys(row.implementation for row in rows)
    parts = [f"jax {versions['jax']}"]
    for name in names:
        if not implementations.is_ours(name):
            version = versions.get(_PACKAGES.get(name, name), "of unknown version")
            parts.append(f"{name} {version}")
    commits = dict.fromkeys(
        row.commit or document["commit"] for row in document["rows"]
    )
    text = f"{', '.join(parts)}; commit {', '.join(commits)}"
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", text)


def _dispatch_lines(rows: list[Row]) -> list[str]:
    found = [row for row in rows if row.direction == results.DISPATCH]
    if not found:
        return []
    costs = ", ".join(
        f"{row.implementation} {row.overhead_us:.1f} us of {row.median_us:.1f}"
        for row in found
    )
    case = CASE_TYPES["attention"].parse(found[0].case)
    return [
        "",
        f"A forward call of B {case.batch}, T {case.seqlen_q}, H {case.num_heads}, "
        f"D {case.head_dim}, jitted by itself, beyond its kernel: {costs}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
