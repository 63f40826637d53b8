"""Compiles kernels for sm_90a without a GPU and judges what the compiler made of them.

``python -m tests.compile_gate --only attention_fwd`` prints the table for the kernels
whose op, symbol or tiles contain the word; the exit status is 1 if any is refused.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tk_jax import _ffi
from tk_jax.compile import Specialisation, specialisations

MAX_SECONDS = 15.0
_PRODUCT = "HGMMA"
_BULK_LOAD = "UTMALDG"
_REGISTER_SPLIT = "USETMAXREG"
_LOCAL_MEMORY = ("LDL", "STL")
_OPCODE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.M
)


@dataclasses.dataclass(frozen=True)
class Requirements:
    """Instructions that a kernel is not itself without."""

    product: bool = True
    bulk_load: bool = True
    register_split: bool = True


_NOTHING = Requirements(product=False, bulk_load=False, register_split=False)
# Helpers move rows: they have neither a product nor warp roles. finish only stores.
_HELPERS = {
    "tk_linear_attention_chunk_sums": _NOTHING,
    "tk_linear_attention_gate_gradients": _NOTHING,
    "tk_linear_attention_head_sums": _NOTHING,
    "tk_linear_attention_segment_starts": _NOTHING,
    "tk_linear_attention_spread_": _NOTHING,
    "tk_linear_attention_step_": _NOTHING,
    "tk_state_step_": _NOTHING,
    # Both warpgroups do the same.
    "tk_hedgehog_attention_step_": Requirements(register_split=False),
    "tk_attention_bwd_prepare_": Requirements(product=False, register_split=False),
    "tk_attention_bwd_finish_": Requirements(
        product=False, bulk_load=False, register_split=False
    ),
}


def requirements(item: Specialisation) -> Requirements:
    for prefix, required in _HELPERS.items():
        if item.symbol.startswith(prefix):
            return required
    return Requirements()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the compiler made of one kernel."""

    name: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    seconds: float
    opcodes: dict[str, int]
    log: str
    problems: tuple[str, ...]

    def row(self) -> str:
        counts = (_PRODUCT, _BULK_LOAD, _REGISTER_SPLIT)
        return (
            f"{self.name:<64} {self.registers:>4} {self.shared_bytes:>7} "
            f"{self.spill_bytes:>5} {self.stack_bytes:>5} {self.seconds:>6.1f} "
            + " ".join(f"{self.opcodes.get(name, 0):>6}" for name in counts)
            + ("  ok" if not self.problems else "  REFUSED")
        )


HEADER = (
    f"{'kernel':<64} {'regs':>4} {'shared':>7} {'spill':>5} {'stack':>5} {'sec':>6} "
    f"{_PRODUCT[:6]:>6} {_BULK_LOAD[:6]:>6} {_REGISTER_SPLIT[:6]:>6}"
)


def judge(
    spec: dict, required: Requirements, *, name: str | None = None, use_cache=False
) -> Verdict:
    """Compiles one spec; ``problems`` says why it may not ship."""
    # The time of this thread, which compiles: other processes do not make it longer.
    start = time.thread_time()
    result = _ffi.extension().compile(spec, use_cache=use_cache)
    seconds = time.thread_time() - start
    log = result["log"]
    opcodes = count_opcodes(result["cubin"])
    registers = re.search(r"Used (\d+) registers", log)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    stack = sum(map(int, re.findall(r"(\d+) bytes (?:cumulative )?stack", log)))
    problems = [
        *(f"the compiler says {line}" for line in complaints(log)),
        *([f"{spills} bytes of registers are spilled"] if spills else []),
        *([f"{stack} bytes of stack are used"] if stack else []),
        *(f"{opcodes[op]} {op}: local memory" for op in _LOCAL_MEMORY if opcodes[op]),
        *(
            f"no {opcode} instruction"
            for opcode, wanted in (
                (_PRODUCT, required.product),
                (_BULK_LOAD, required.bulk_load),
                (_REGISTER_SPLIT, required.register_split),
            )
            if wanted and not opcodes[opcode]
        ),
    ]
    if registers is None:
        problems.append("the log reports no registers")
    if result["origin"] == "compiled" and seconds > MAX_SECONDS:
        problems.append(f"{seconds:.1f} s to compile, over {MAX_SECONDS} s")
    return Verdict(
        name=name or spec["symbol"],
        registers=int(registers.group(1)) if registers else -1,
        shared_bytes=spec.get("shared_bytes", 0),
        spill_bytes=spills,
        stack_bytes=stack,
        seconds=seconds,
        opcodes=dict(opcodes),
        log=log,
        problems=tuple(problems),
    )


def complaints(log: str) -> list[str]:
    """Lines that say that a matrix instruction or a register hint was not honoured."""
    pattern = re.compile(r"\(C75\d\d\)|wgmma.*serializ|setmaxnreg.*ignored|spill", re.I)
    return [
        line.strip()
        for line in log.splitlines()
        if pattern.search(line)
        and not re.search(r"\b0 bytes spill stores", line)
        # The counts of spilled bytes are judged on their own.
        and "bytes spill stores" not in line
    ]


def count_opcodes(cubin: bytes) -> collections.Counter:
    """How often each instruction stands in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            # Where jumps go is of no interest here, and finding out takes time.
            [find_disassembler(), "--print-code", "--no-dataflow", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    opcodes = collections.Counter(_OPCODE.findall(text))
    if not opcodes["EXIT"]:
        raise AssertionError(f"the disassembly has no EXIT:\n{text[:2000]}")
    return opcodes


def find_disassembler() -> str:
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    for place in places:
        candidate = pathlib.Path(place, "cu13", "bin", "nvdisasm")
        if candidate.is_file():
            return str(candidate)
    found = shutil.which("nvdisasm")
    if found is None:
        raise FileNotFoundError(
            "nvdisasm is missing: pip install 'nvidia-cuda-nvdisasm>=13.0,<14'"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of an op's or kernel's name")
    parser.add_argument(
        "--log", action="store_true", help="print the compiler's output"
    )
    parser.add_argument("--sass", type=pathlib.Path, help="folder for machine code")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--tiles", default="", help="other tiles to try: block_q=128,block_kv=176"
    )
    options = parser.parse_args()
    pairs = (part.split("=") for part in options.tiles.split(",") if part)
    tiles = {name: int(value) for name, value in pairs}
    wanted = list(specialisations(options.only, tiles))
    if not wanted:
        parser.error(f"no kernel's name contains {options.only!r}")

    def run(item: Specialisation) -> Verdict | Exception:
        try:
            verdict = judge(item.spec, requirements(item), name=item.name)
        except RuntimeError as error:
            return error
        if options.sass:
            save_code(item, options.sass)
        return verdict

    print(HEADER)
    refused = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for item, result in zip(wanted, pool.map(run, wanted), strict=True):
            if isinstance(result, Exception):
                refused += 1
                print(f"{item.name}\n{result}")
                continue
            refused += bool(result.problems)
            print(result.row(), flush=True)
            for problem in result.problems:
                print(f"    {problem}")
            if options.log:
                print(result.log)
    print(f"{len(wanted) - refused} kernels fit to ship, {refused} refused")
    return 1 if refused else 0


def save_code(item: Specialisation, folder: pathlib.Path) -> None:
    """Writes <name>.cubin and <name>.sass for reading."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / item.name.replace(" ", "_")
    base.with_suffix(".cubin").write_bytes(_ffi.extension().compile(item.spec)["cubin"])
    with open(base.with_suffix(".sass"), "w") as out:
        subprocess.run(
            [find_disassembler(), "--print-code", str(base.with_suffix(".cubin"))],
            stdout=out,
            check=True,
        )


if __name__ == "__main__":
    sys.exit(main())
