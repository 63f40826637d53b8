"""``python -m benchmarks.run attention|matmul``: ours beside every installed rival.

Checks each implementation on the inputs it is timed on and does not time a wrong one;
times all of a case alternately in one process; writes every sample. What the figures
mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import os
import pathlib
import statistics
import sys
import time

from benchmarks import gate, implementations, results, timing
from benchmarks.cases import Case, make_inputs, select_cases
from benchmarks.programs import Programs
from benchmarks.tuning import Variant

# Rotating inputs take this much together: several times the 50 MB of an H100's L2.
_ROTATED_BYTES = 256e6


def main(argv=None, *, find_gpu=results.find_gpu, measure=timing.measure) -> int:
    """Returns 0; 1 where one of ours was wrong or failed; 2 where nothing could run."""
    args = parse_args(argv)
    try:
        cases = select_cases(args.op, args.cases, quick=args.quick)
        names = args.impls or implementations.installed(args.op)
        variants = [Variant.parse("fwd", text) for text in args.tk_configs]
        variants += [Variant.parse("bwd", text) for text in args.tk_bwd_configs]
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print(*cases, sep="\n")
        print("implementations:", *names, *variants)
        return 0
    gpu = find_gpu()
    if gpu is None:
        print("benchmarks: needs an NVIDIA GPU, and jax finds none", file=sys.stderr)
        return 2
    return Benchmark(args, cases, names, variants, gpu, measure).run()


def parse_args(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__
    )
    add = parser.add_argument
    add("op", choices=list(implementations.IMPLEMENTATIONS))
    add("--cases", nargs="+", metavar="PATTERN", help="full names, or parts of names")
    add("--impls", nargs="+", metavar="NAME", help="default: all installed but xla")
    add("--quick", action="store_true", help="fewer cases, fewer rounds")
    add("--directions", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    add("--tk-configs", nargs="+", default=[], metavar="AxBxC", help="forward tiles")
    add("--tk-bwd-configs", nargs="+", default=[], metavar="AxBxC")
    add(
        "--backward",
        choices=("direct", "difference", "both"),
        help="how backward is timed; default: both, with --quick direct",
    )
    add("--rounds", type=int, help="samples of each program; default 5, with --quick 3")
    add("--seconds", type=float, default=0.03, help="length of a sample")
    add("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    add("--out", type=pathlib.Path, help="result file; needed unless all is default")
    add("--commit", help="the commit to record, where the source is no git checkout")
    add("--dry-run", action="store_true", help="list what would run")
    args = parser.parse_args(argv)
    args.backward = args.backward or ("direct" if args.quick else "both")
    args.rounds = args.rounds or (3 if args.quick else 5)
    known = implementations.IMPLEMENTATIONS[args.op]
    for name in args.impls or []:
        if name not in known:
            parser.error(f"unknown implementation {name!r}; known: {', '.join(known)}")
    if args.op == "matmul" and args.tk_bwd_configs:
        parser.error("--tk-bwd-configs: matmul's gradients are matmuls")
    return args


class Benchmark:
    """One run of the command line."""

    def __init__(self, args, cases, names, variants, gpu, measure):
        self.args, self.cases, self.gpu, self.measure = args, cases, gpu, measure
        self.entries = [*names, *variants]
        self.rows: list[results.Row] = []
        self.ours_failed = False

    def run(self) -> int:
        path = self._path()
        for case in self.cases:
            prepared, expected = self._prepare(case)
            checked = {
                str(entry): program
                for entry in self.entries
                if (program := self._check(case, entry, prepared, expected))
            }
            new_rows = self._time(case, checked)
            self.rows += new_rows
            self._print(new_rows)
            if path and self.rows:  # After each case: a run cut short keeps the others.
                results.write(path, self.rows, gpu=self.gpu, commit=self.args.commit)
        print(f"written to {path}" if path else "not written: give --out to keep it")
        return 1 if self.ours_failed or not self.rows else 0

    def _path(self) -> pathlib.Path | None:
        """A partial run must not replace the committed results of a full one."""
        args = self.args
        partial = args.cases or args.impls or args.quick or len(args.directions) < 2
        if args.out or partial or args.tk_configs or args.tk_bwd_configs:
            return args.out
        return results.default_path(args.op, self.gpu)

    def _prepare(self, case: Case):
        """Compiles a case's programs in parallel, and what their results should be."""
        start = time.perf_counter()
        alone = implementations.COMPILED_ALONE
        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            expected = pool.submit(gate.expected, case)
            prepared = {
                entry: pool.submit(self._prepare_one, case, entry)
                for entry in self.entries
                if entry not in alone
            }
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            prepared |= {
                entry: pool.submit(self._prepare_one, case, entry)
                for entry in self.entries
                if entry in alone
            }
        seconds = time.perf_counter() - start
        print(f"{case}: compiled in {seconds:.0f} s", flush=True)
        return prepared, expected.result()

    def _prepare_one(self, case: Case, entry):
        args = self.args
        directions = [name for name in case.directions if name in args.directions]
        if isinstance(entry, Variant):
            directions = [name for name in directions if name == entry.direction]
            function = entry.build(case)
        else:
            function = implementations.build(args.op, entry, case)
        programs = Programs(function, directions, args.backward)
        return programs, programs.first_calls(case)

    def _check(self, case: Case, entry, prepared, expected) -> Programs | None:
        """The programs, if they ran and computed the right thing."""
        try:
            programs, samples = prepared[entry].result()
        except implementations.UnsupportedCaseError as reason:
            print(f"{case}  {entry}: left out, {reason}")
            return None
        except Exception as error:  # Rivals may raise anything; ours count as failed.
            self._fail(case, entry, f"{type(error).__name__}: {error}"[:500])
            return None
        wrong = gate.complaints(case, expected, samples)
        if wrong:
            self._fail(case, entry, "WRONG, not timed: " + "; ".join(wrong))
            return None
        if programs.no_direct_reason:
            print(f"{case}  {entry}: no direct bwd, {programs.no_direct_reason}")
        return programs

    def _fail(self, case, entry, reason: str) -> None:
        print(f"{case}  {entry}: {reason}", flush=True)
        self.ours_failed |= implementations.is_ours(str(entry))

    def _time(self, case: Case, checked: dict[str, Programs]) -> list[results.Row]:
        if not checked:
            return []
        input_bytes = 2 * sum(math.prod(shape) for shape in case.shapes)
        sets = max(2, min(16, math.ceil(_ROTATED_BYTES / input_bytes)))
        inputs = [make_inputs(case, seed) for seed in range(sets)]
        calls = {
            (name, program): call
            for name, programs in checked.items()
            for program, call in programs.calls(inputs).items()
        }
        # One direction after another, so that what is compared runs side by side.
        order = sorted(calls, key=lambda key: ("fwd", "bwd", "both").index(key[1]))
        seconds = self.measure(
            {key: calls[key] for key in order},
            rounds=self.args.rounds,
            seconds=self.args.seconds,
        )
        return [
            self._row(case, direction, name, programs, seconds)
            for direction in case.directions
            for name, programs in checked.items()
            if direction in programs.directions
        ]

    def _row(self, case, direction, name, programs: Programs, seconds) -> results.Row:
        samples = seconds.get((name, direction))
        difference = None
        if direction == "bwd" and programs.difference:
            differences = [
                both - forward
                for both, forward in zip(
                    seconds[name, "both"], seconds[name, "fwd"], strict=True
                )
            ]
            difference = statistics.median(differences) if programs.direct else None
            samples = samples or differences
        direct = direction == "fwd" or programs.direct
        return results.make_row(
            case,
            direction,
            name,
            samples,
            gpu=self.gpu,
            compile_s=programs.compile_s[direction],
            method="direct" if direct else "difference",
            difference=difference,
        )

    def _print(self, rows: list[results.Row]) -> None:
        for row in rows:
            rival = results.best_rival(rows, row, implementations.is_ours)
            ratio = ""
            if rival and implementations.is_ours(row.implementation):
                speed = rival.median_us / row.median_us
                ratio = f"  {speed:.3f}x {rival.implementation}"
            print(
                f"{row.case}  {row.direction}  {row.implementation:<16}"
                f"{row.median_us:>10.1f} us {row.tflops:>7.1f} TFLOP/s"
                f"  compile {row.compile_s:.1f} s{ratio}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
