"""Breaks kernels one way at a time and asks whether the interpreter notices.

``python -m tests.mutate`` prints the table; ``--write`` puts it into
docs/interpreter.md; ``--only`` takes a part of a mutation's description. The exit
status is 1 where fewer than 95% are caught, or where an unbroken kernel is reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile

from tests.mutation import Mutation
from tests.mutations import MUTATIONS

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = (
    "matmul",
    "attention_forward",
    "attention_backward",
    "attention_backward_wide",
)
SCHEDULES = 50
CLEAN_SCHEDULES = 200
DEMANDED = 0.95
_BEGIN, _END = "<!-- mutations -->\n", "<!-- end of mutations -->\n"
_COMMON = ("tests/interpreter/harness.h", "tk/tk.cuh")
_LEVEL = "-O1"  # compiling takes longer than running ...
CLEAN_LEVEL = "-O3"  # ... except of what runs in many schedules
_FLAGS = ("-std=c++20", "-DTK_INTERPRETER", "-Wno-unknown-pragmas", "-pthread")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a mutation was caught: the fault, and after how many schedules."""

    mutation: Mutation
    caught_by: str | None
    schedules: int
    text: str


@dataclasses.dataclass(frozen=True)
class Engine:
    """What programs have in common."""

    objects: list[pathlib.Path]
    header: pathlib.Path  # of which the compiler has a version that it need not parse
    compiler: str


def build_engine(folder: pathlib.Path, jobs: int, compiler: str = "g++") -> Engine:
    """The interpreter's own objects, and the headers before a kernel's."""
    sources = sorted((ROOT / "cuda" / "interpreter").glob("*.cc"))
    header = folder / "common.h"
    header.write_text("".join(f'#include "{name}"\n' for name in _COMMON))

    def compile_(*arguments) -> None:
        subprocess.run([compiler, *_FLAGS, *_includes(), *arguments], check=True)

    def build(source: pathlib.Path) -> pathlib.Path:
        target = folder / f"{source.stem}.o"
        compile_("-O2", "-c", source, "-o", target)
        return target

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        precompiled = (_LEVEL, "-x", "c++-header", header, "-o", f"{header}.gch")
        done = pool.submit(compile_, *precompiled)
        objects = list(pool.map(build, sources))
        done.result()
    return Engine(objects, header, compiler)


def build_program(
    name: str,
    engine: Engine,
    folder: pathlib.Path,
    overlay: pathlib.Path | None = None,
    level: str = _LEVEL,
) -> pathlib.Path:
    """A program of tests/interpreter; files in ``overlay`` hide those in cuda/."""
    target = folder / name
    source = ROOT / "tests" / "interpreter" / f"{name}.cc"
    # The common headers are those of cuda/: none of them may be hidden. They were
    # compiled at one level.
    hidden = overlay and (overlay / "include").exists()
    common = [] if hidden or level != _LEVEL else [engine.header]
    subprocess.run(
        [
            engine.compiler,
            *_FLAGS,
            level,
            *_includes(overlay),
            *(word for header in common for word in ("-include", header)),
            source,
            *engine.objects,
            "-o",
            target,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return target


def _includes(overlay: pathlib.Path | None = None) -> list[str]:
    hiding = [overlay, overlay / "include"] if overlay else []
    folders = [*hiding, ROOT, ROOT / "cuda", ROOT / "cuda" / "include"]
    return [f"-I{folder}" for folder in folders]


def run(program: pathlib.Path, schedules: int) -> tuple[int, str]:
    """How many schedules it took, and what was found, if anything."""
    done = subprocess.run(
        [program, "0", str(schedules)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode == 0 and done.stdout.startswith("ok"):
        return schedules, ""
    found = re.match(r"(\d+) (.*)", done.stdout, re.S)
    if not found:
        raise RuntimeError(f"{program} exited with {done.returncode}: {done.stderr}")
    return int(found.group(1)) + 1, found.group(2)


def name_of(report: str) -> str:
    """The fault's name: "shared-read-early", or that a result was wrong."""
    found = re.match(r"\S+:\d+: ([a-z-]+) in ", report)
    return found.group(1) if found else "wrong result"


def try_mutation(mutation: Mutation, engine: Engine) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        hidden = folder / mutation.file
        hidden.parent.mkdir(parents=True)
        text = (ROOT / "cuda" / mutation.file).read_text()
        hidden.write_text(mutation.apply(text))
        try:
            program = build_program(mutation.program, engine, folder, folder)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{mutation.what}: {error.stderr}") from None
        schedules, report = run(program, SCHEDULES)
        return Outcome(mutation, name_of(report) if report else None, schedules, report)


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "| file | mutation | caught by | schedules |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        caught = outcome.caught_by or "**not caught**"
        file = outcome.mutation.file.removeprefix("include/tk/").removeprefix(
            "kernels/"
        )
        lines.append(
            f"| {file} | {outcome.mutation.what} | {caught} | {outcome.schedules} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a description or file")
    parser.add_argument("--write", action="store_true", help="into the document")
    parser.add_argument("--text", action="store_true", help="print the reports")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wanted = [m for m in MUTATIONS if options.only in m.what or options.only in m.file]
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        folder = pathlib.Path(folder)
        engine = build_engine(folder, options.jobs)
        clean = {}
        if not options.only:
            programs = pool.map(
                lambda name: build_program(name, engine, folder, level=CLEAN_LEVEL),
                PROGRAMS,
            )
            runs = pool.map(lambda program: run(program, CLEAN_SCHEDULES), programs)
            clean = dict(zip(PROGRAMS, runs, strict=True))
        outcomes = []
        for outcome in pool.map(lambda m: try_mutation(m, engine), wanted):
            outcomes.append(outcome)
            caught = outcome.caught_by or "NOT CAUGHT"
            print(f"{outcome.mutation.what}: {caught}, {outcome.schedules}", flush=True)
            if options.text:
                print(f"    {outcome.text.strip()}", flush=True)
    number = sum(outcome.caught_by is not None for outcome in outcomes)
    summary = f"{number} of {len(outcomes)} mutations caught"
    for name, (schedules, report) in clean.items():
        summary += f"; {name}: {report.strip() or f'nothing in {schedules} schedules'}"
    print(summary)
    if options.write:
        page = ROOT / "docs" / "interpreter.md"
        text = page.read_text()
        before, rest = text.split(_BEGIN)
        after = rest.split(_END)[1]
        body = f"{summary}.\n\n{table(outcomes)}"
        page.write_text(before + _BEGIN + body + _END + after)
    broken = any(report for _, report in clean.values())
    return 1 if broken or number < DEMANDED * len(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
