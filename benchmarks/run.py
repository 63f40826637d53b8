"""``python -m benchmarks.run OP``: ours beside every installed rival.

Checks each implementation on the inputs it is timed on and does not time a wrong one;
times all of a case alternately in one process; writes every sample. What the figures
mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time

from benchmarks import (
    case_sets,
    dispatch,
    gate,
    implementations,
    packages,
    recurrent,
    results,
    timing,
)
from benchmarks.cases import Case, make_inputs
from benchmarks.programs import Programs
from benchmarks.tuning import Variant

# Rotating inputs take this much together: several times the 50 MB of an H100's L2.
_ROTATED_BYTES = 256e6


def main(argv=None, *, find_gpu=results.find_gpu, measure=timing.measure) -> int:
    """Returns 0; 1 where one of ours was wrong or failed; 2 where nothing could run."""
    args = parse_args(argv)
    packages.set_folders(args.folders)
    try:
        cases = case_sets.select_cases(
            args.op, args.cases, quick=args.quick, set_name=args.set
        )
        names = args.impls or implementations.installed(args.op)
        variants = [Variant.parse("fwd", text) for text in args.tk_configs]
        variants += [Variant.parse("bwd", text) for text in args.tk_bwd_configs]
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print(*cases, sep="\n")
        print("implementations:", *names, *variants)
        _print_absent(args)
        return 0
    if implementations.uses_torch(names):
        # Before jax starts: torch needs memory beside it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = find_gpu()
    if gpu is None:
        print("benchmarks: needs an NVIDIA GPU, and jax finds none", file=sys.stderr)
        return 2
    _print_absent(args)
    try:
        return Benchmark(args, cases, names, variants, gpu, measure).run()
    except results.MergeError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _print_absent(args) -> None:
    """The rivals that a run without --impls would have, were they here."""
    if args.impls:
        return
    for name, reason in implementations.absent(args.op).items():
        print(f"absent: {name}, {reason}")


def parse_args(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__
    )
    add = parser.add_argument
    add("op", choices=list(implementations.IMPLEMENTATIONS))
    add("--cases", nargs="+", metavar="PATTERN", help="full names, or parts of names")
    add(
        "--set",
        choices=case_sets.SET_NAMES,
        default=case_sets.DEFAULT_SET,
        help=f"which cases; default: {case_sets.DEFAULT_SET}",
    )
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
    add(
        "--merge",
        action="store_true",
        help="add to the result file, in place of its rows of the same case and "
        "direction",
    )
    add("--budget", type=float, metavar="SECONDS", help="no case starts after this")
    add(
        "--dispatch",
        action="store_true",
        help="first, what a small call costs over its kernel",
    )
    add("--commit", help="the commit to record, where the source is no git checkout")
    add("--dry-run", action="store_true", help="list what would run")
    for package in packages.ALL:
        add(
            f"--{package.option}",
            type=pathlib.Path,
            metavar="FOLDER",
            dest=package.option,
            help=package.help,
        )
    args = parser.parse_args(argv)
    args.backward = args.backward or ("direct" if args.quick else "both")
    args.rounds = args.rounds or (3 if args.quick else 5)
    known = implementations.IMPLEMENTATIONS[args.op]
    for name in args.impls or []:
        if name not in known:
            parser.error(f"unknown implementation {name!r}; known: {', '.join(known)}")
    if args.op == "matmul" and args.tk_bwd_configs:
        parser.error("--tk-bwd-configs: matmul's gradients are matmuls")
    if args.op in recurrent.CASE_TYPES and (args.tk_configs or args.tk_bwd_configs):
        parser.error(f"--tk-configs: {args.op} has no tiles to choose")
    args.folders = {
        package.option: getattr(args, package.option) for package in packages.ALL
    }
    for option, folder in args.folders.items():
        if folder is not None and option not in implementations.options(args.op):
            parser.error(f"--{option}: no rival of {args.op} takes it")
        if folder is not None and not folder.is_dir():
            parser.error(f"--{option}: {folder} is no folder")
    if args.op != "attention" and args.dispatch:
        parser.error("--dispatch: is measured with attention")
    return args


@dataclasses.dataclass
class _Prepared:
    """A case whose programs are being compiled."""

    case: Case
    gate: gate.Gate
    programs: dict[object, Programs | Exception]  # by entry; why there is none
    futures: dict[object, concurrent.futures.Future]


class Benchmark:
    """One run of the command line."""

    def __init__(self, args, cases, names, variants, gpu, measure):
        self.args, self.cases, self.gpu, self.measure = args, cases, gpu, measure
        self.entries = [*names, *variants]
        self.rows: list[results.Row] = []
        self.ours_failed = False
        self._start = time.monotonic()
        self._path = self._find_path()
        self._before = None
        if args.merge:
            if self._path is None:
                raise results.MergeError("--merge needs --out FILE here")
            self._before = results.read_for_merging(self._path, gpu)

    def run(self) -> int:
        # Threads that compile need Python now and then, and whoever dispatches what is
        # being timed must not wait long for it.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(2e-4)
        try:
            with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
                self._run(pool)
        finally:
            sys.setswitchinterval(interval)
        path = self._path
        print(f"written to {path}" if path else "not written: give --out to keep it")
        return 1 if self.ours_failed or not self.rows else 0

    def _run(self, pool) -> None:
        if self.args.dispatch:
            self._keep(self._time_dispatch())
        following = self._prepare(self.cases[0], pool)
        for index, case in enumerate(self.cases):
            prepared = following
            spent = time.monotonic() - self._start
            if self.args.budget is not None and spent > self.args.budget:
                left = len(self.cases) - index
                print(f"{left} cases not started: {spent:.0f} s are over the budget")
                for future in prepared.futures.values():
                    future.cancel()
                return
            start = time.monotonic()
            concurrent.futures.wait(prepared.futures.values())
            waited = time.monotonic() - start
            inputs = self._inputs(case)
            passed = self._check_all(prepared, inputs[0], alone=True)
            # The next case compiles while this one is timed.
            if index + 1 < len(self.cases):
                following = self._prepare(self.cases[index + 1], pool)
            passed |= self._check_all(prepared, inputs[0], alone=False)
            checked = {
                str(entry): passed[entry] for entry in self.entries if entry in passed
            }
            first_calls = time.monotonic() - start - waited
            self._keep(self._time(case, checked, inputs))
            print(
                f"{case}: {time.monotonic() - start:.1f} s, of which {waited:.1f} "
                f"waiting for the compiler and {first_calls:.1f} checking",
                flush=True,
            )

    def _find_path(self) -> pathlib.Path | None:
        """A partial run must not replace the committed results of a full one."""
        args = self.args
        partial = args.cases or args.impls or args.quick or len(args.directions) < 2
        partial = (
            partial or args.set != case_sets.DEFAULT_SET or args.budget is not None
        )
        tuning = args.tk_configs or args.tk_bwd_configs
        if args.out or tuning or (partial and not args.merge):
            return args.out
        return results.default_path(args.op, self.gpu)

    def _keep(self, rows: list[results.Row]) -> None:
        self.rows += rows
        self._print(rows)
        if self._path and self.rows:  # Each time: a run cut short keeps the others.
            results.write(
                self._path,
                self.rows,
                gpu=self.gpu,
                commit=self.args.commit,
                before=self._before,
            )

    def _prepare(self, case: Case, pool) -> _Prepared:
        """Traces a case's programs, and has them compiled in the background."""
        judge = gate.make(case)
        prepared = _Prepared(case, judge, {}, {None: pool.submit(judge.compile)})
        for entry in self.entries:
            try:
                programs = self._programs(case, entry)
            except Exception as error:  # Rivals may raise anything.
                prepared.programs[entry] = error
                continue
            prepared.programs[entry] = programs
            if entry not in implementations.COMPILED_ALONE:
                prepared.futures[entry] = pool.submit(programs.compile)
        return prepared

    def _programs(self, case: Case, entry):
        args = self.args
        directions = [name for name in case.directions if name in args.directions]
        if isinstance(entry, Variant):
            directions = [name for name in directions if name == entry.direction]
            return Programs(entry.build(case), case, directions, args.backward)
        return implementations.programs(args.op, entry, case, directions, args.backward)

    def _check_all(self, prepared: _Prepared, inputs, *, alone: bool) -> dict:
        """The programs that passed, by entry, of those that first run alone or not."""
        return {
            entry: programs
            for entry in self.entries
            if (entry in implementations.COMPILED_ALONE) == alone
            and (programs := self._check(prepared, entry, inputs))
        }

    def _check(self, prepared: _Prepared, entry, inputs) -> Programs | None:
        """The programs, if they ran and computed the right thing."""
        case, programs = prepared.case, prepared.programs[entry]
        try:
            if isinstance(programs, Exception):
                raise programs
            if entry in prepared.futures:
                prepared.futures[entry].result()
            else:
                programs.compile()
            out, gradients = programs.first_calls(*inputs)
            wrong = prepared.gate.complaints(out, gradients)
            rival = not implementations.is_ours(str(entry))
            if wrong and rival and "fwd" in programs.directions:
                # What is wrong with gradients does not concern the forward pass.
                complaints, wrong = wrong, prepared.gate.complaints(out)
                if not wrong:
                    programs.leave_out_backward()
                    reason = "; ".join(complaints)
                    print(f"{case}  {entry}: bwd WRONG, not timed: {reason}")
        except implementations.UnsupportedCaseError as reason:
            print(f"{case}  {entry}: left out, {reason}")
            return None
        except Exception as error:  # Rivals may raise anything; ours count as failed.
            self._fail(case, entry, f"{type(error).__name__}: {error}"[:500])
            return None
        if wrong:
            self._fail(case, entry, "WRONG, not timed: " + "; ".join(wrong))
            return None
        if programs.no_direct_reason:
            print(f"{case}  {entry}: no direct bwd, {programs.no_direct_reason}")
        return programs

    def _fail(self, case, entry, reason: str) -> None:
        print(f"{case}  {entry}: {reason}", flush=True)
        self.ours_failed |= implementations.is_ours(str(entry))

    def _inputs(self, case: Case):
        input_bytes = 2 * sum(math.prod(shape) for shape in case.shapes)
        sets = max(2, min(16, math.ceil(_ROTATED_BYTES / input_bytes)))
        return [make_inputs(case, seed) for seed in range(sets)]

    def _time_dispatch(self) -> list[results.Row]:
        names = [name for name in self.entries if isinstance(name, str)]
        return dispatch.rows(
            implementations.functions(self.args.op, names),
            gpu=self.gpu,
            measure=self.measure,
            rounds=self.args.rounds,
            seconds=self.args.seconds,
        )

    def _time(self, case: Case, checked, inputs) -> list[results.Row]:
        if not checked:
            return []
        calls = {
            (name, program): call
            for name, programs in checked.items()
            for program, call in programs.calls(inputs).items()
        }
        # One direction after another, so that what is compared runs side by side.
        seconds = {}
        for direction in ("fwd", "bwd", "both"):
            compared = {key: calls[key] for key in calls if key[1] == direction}
            if compared:
                seconds |= self.measure(
                    compared, rounds=self.args.rounds, seconds=self.args.seconds
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
            clock=programs.clock,
        )

    def _print(self, rows: list[results.Row]) -> None:
        for row in rows:
            if row.overhead_us is not None:
                print(
                    f"{row.case}  {row.implementation:<16}{row.median_us:>10.1f} us a "
                    f"call, {row.overhead_us:.1f} us over its kernel",
                    flush=True,
                )
                continue
            rival = results.best_rival(rows, row, implementations.is_ours)
            ratio, clock = "", f"  by {row.clock}" if row.clock else ""
            if rival and implementations.is_ours(row.implementation):
                speed = rival.median_us / row.median_us
                ratio = f"  {speed:.3f}x {rival.implementation}"
            print(
                f"{row.case}  {row.direction}  {row.implementation:<16}"
                f"{row.median_us:>10.1f} us {row.tflops:>7.1f} TFLOP/s"
                f"  compile {row.compile_s:.1f} s{clock}{ratio}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
