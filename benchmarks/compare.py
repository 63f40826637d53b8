"""``python -m benchmarks.compare OP BEFORE AFTER``: two result files, in Markdown.

Clocks differ between runs by a few per cent, so what is compared is how many times as
fast as a rival ours was, each in its own run: the rival is the clock. ``--rival NAME``
says which, where a file has several. Cases that only one of the files has are left out
and counted.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

from benchmarks import implementations, results, table
from benchmarks.cases import CASE_TYPES


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__
    )
    parser.add_argument("op", choices=list(implementations.IMPLEMENTATIONS))
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    parser.add_argument("--rival", metavar="NAME")
    args = parser.parse_args(argv)
    documents = [results.read(path) for path in (args.before, args.after)]
    try:
        print(render(*documents, args.op, args.rival), end="")
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    return 0


def ratios(document: dict, rival: str) -> dict[tuple[str, str], float]:
    """How many times as fast as ``rival`` ours is, by case and direction."""
    times = {
        (row.case, row.direction, row.implementation): row.median_us
        for row in document["rows"]
        if row.direction != results.DISPATCH
    }
    return {
        (case, direction): times[case, direction, rival] / ours
        for (case, direction, name), ours in times.items()
        if name == "tk" and (case, direction, rival) in times
    }


def render(before: dict, after: dict, op: str, rival: str | None = None) -> str:
    """A row a case; below them the geometric mean of after over before."""
    rival = rival or _common_rival(before, after)
    found = [ratios(document, rival) for document in (before, after)]
    both = [key for key in found[0] if key in found[1]]
    if not both:
        raise ValueError(f"no case has ours and {rival} in both files")
    sizes = "head dim, heads, T, mask" if op == "attention" else "sizes"
    titles = [
        sizes,
        "direction",
        *(f"commit {d['commit'][:10]}" for d in (before, after)),
    ]
    lines = [
        f"{after['gpu']}, times as fast as {rival} in the same process.",
        "",
        table.line(titles),
        table.line(["---"] * len(titles)),
    ]
    parse = CASE_TYPES[op].parse
    order = sorted(both, key=lambda key: table.order(parse(key[0])))
    for case, direction in order:
        cells = [f"{each[case, direction]:.2f}" for each in found]
        lines.append(
            table.line([table.label(parse(case)), table.DIRECTIONS[direction], *cells])
        )
    logs = [math.log(found[1][key] / found[0][key]) for key in both]
    mean = math.exp(sum(logs) / len(logs))
    left_out = len(set(found[0]) ^ set(found[1]))
    lines += ["", f"Geometric mean of after over before: {mean:.3f}."]
    lines += [f"In one of the files alone: {left_out} cases."] if left_out else []
    return "\n".join(lines) + "\n"


def _common_rival(before: dict, after: dict) -> str:
    names = [
        {row.implementation for row in document["rows"]} for document in (before, after)
    ]
    rivals = sorted(x for x in names[0] & names[1] if not implementations.is_ours(x))
    if len(rivals) != 1:
        found = ", ".join(rivals) or "none"
        raise ValueError(f"expected one rival in both files, or --rival; found {found}")
    return rivals[0]


if __name__ == "__main__":
    sys.exit(main())
