"""``python -m benchmarks.plot FILE...``: draws result files, one image a direction."""

from __future__ import annotations

import argparse
import pathlib
import sys

from benchmarks import implementations, results

_OURS = ("#c8102e", "#e8788a", "#f2b3bd", "#8a0b20")
_RIVALS = ("#34495e", "#7f8c8d", "#a9b7c0", "#5d8aa8", "#c2b280")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print(
            "benchmarks.plot: needs matplotlib: pip install 'tk_jax[bench]'",
            file=sys.stderr,
        )
        return 2
    matplotlib.use("Agg")
    # Without dates and random names, so that an image changes only with its figures.
    matplotlib.rcParams["svg.hashsalt"] = "tk_jax"
    for path in args.files:
        document = results.read(path)
        directions = dict.fromkeys(row.direction for row in document["rows"])
        for direction in (x for x in directions if x != results.DISPATCH):
            target = path.with_name(f"{path.stem}-{direction}.{args.format}")
            figure = draw(document, path.stem, direction)
            metadata = {"Date": None} if args.format == "svg" else None
            figure.savefig(target, dpi=150, metadata=metadata)
            print(target)
    return 0


def draw(document: dict, op: str, direction: str):
    """A figure of horizontal bars: TFLOP/s of every implementation, case by case."""
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row.direction == direction]
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    height = 0.8 / len(names)
    figure = Figure(
        figsize=(9, 1.2 + 0.14 * len(cases) * (len(names) + 1)), layout="constrained"
    )
    axes = figure.subplots()
    for index, name in enumerate(names):
        found = {row.case: row.tflops for row in rows if row.implementation == name}
        places = [place for place, case in enumerate(cases) if case in found]
        bars = axes.barh(
            [place + (index - (len(names) - 1) / 2) * height for place in places],
            [found[cases[place]] for place in places],
            height,
            label=name,
            color=_color(name, names),
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s (median)")
    axes.set_title(
        f"{op} {direction}, {document['gpu']}, {document['date']}", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.01)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return figure


def _color(name: str, names: list[str]) -> str:
    ours = implementations.is_ours(name)
    alike = [other for other in names if implementations.is_ours(other) == ours]
    palette = _OURS if ours else _RIVALS
    return palette[alike.index(name) % len(palette)]


if __name__ == "__main__":
    sys.exit(main())
