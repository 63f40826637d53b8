"""PTX: what NVRTC makes of a kernel, as lists that :mod:`ptx.machine` executes.

Terms are those of NVIDIA's "Parallel Thread Execution ISA": an instruction has an
opcode with modifiers, operands, and maybe a predicate that guards it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re

from tk_jax import _ffi

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|local|global|const)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*(.*))?"
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+(\w+)(?:\[(\d+)\])?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # "mbarrier.init.shared::cta.b64"
    operands: tuple  # strings; a list in braces is a tuple, an address ("[", ...)
    guard: str = ""
    negated: bool = False
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Variable:
    space: str
    align: int
    count: int
    width: int  # bytes of an element
    values: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.count * self.width


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]  # name: type
    variables: dict[str, Variable]
    parameter: str
    parameter_bytes: int


def ptx_of(spec: dict) -> str:
    """The PTX of one specialisation, by the NVRTC that compiles kernels."""
    nvrtc = _nvrtc(_ffi.extension().nvrtc_info()["path"])
    root = str(_ffi.source_root()).encode()
    source = _ffi.extension().translation_unit(spec).encode()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"", 0, None, None))
    options = [
        b"--gpu-architecture=compute_90a",
        b"--std=c++20",
        b"-default-device",
        b"-I" + root,
        b"-I" + root + b"/include",
    ]
    array = (ctypes.c_char_p * len(options))(*options)
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    if status:
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise RuntimeError(f"NVRTC: {log}")
    return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


@functools.cache
def _nvrtc(path: str):
    folder = os.path.dirname(os.path.realpath(path))
    return ctypes.CDLL(os.path.join(folder, os.path.basename(path)))


def _text(size_of, get, program) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.value.decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: status {status}")


def parse(ptx: str) -> Program:
    """The one kernel of a module, with the module's variables."""
    ptx = _COMMENT.sub(" ", ptx)
    header, _, rest = ptx.partition(".entry")
    name = re.match(r"\s*([\w$]+)", rest).group(1)
    if ".func" in header:
        raise NotImplementedError("a function that was not inlined")
    variables: dict[str, Variable] = {}
    for statement in header.split(";"):
        _declare(statement.strip(), variables)
    open_at = rest.index("{")
    parameter = _PARAMETER.search(rest[:open_at])
    body = rest[open_at:]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    scopes: list[dict[str, str]] = []  # names of inline assembly, made unique
    for statement in _statements(body):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
            if not scopes:
                break
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            kind, names = _REGISTERS.match(statement).groups()
            for item in names.split(","):
                _add_register(item.strip(), kind, scopes, registers)
        elif statement.startswith("."):
            _declare(statement, variables)
        else:
            instructions.append(_instruction(statement, scopes))
    return Program(
        name=name,
        instructions=tuple(instructions),
        labels=labels,
        registers=registers,
        variables=variables,
        parameter=parameter.group(1),
        parameter_bytes=int(parameter.group(2) or 8),
    )


def _statements(body: str):
    """Braces alone, labels with their colon, everything else without its semicolon."""
    depth_of_list = 0
    start = 0
    position = 0
    while position < len(body):
        char = body[position]
        if char == "{":
            # Operands in braces follow something; a scope does not.
            if body[start:position].strip():
                depth_of_list += 1
            else:
                yield "{"
                start = position + 1
        elif char == "}":
            if depth_of_list:
                depth_of_list -= 1
            else:
                yield "}"
                start = position + 1
        elif char == ";":
            statement = body[start:position].strip()
            if statement:
                yield statement
            start = position + 1
        elif char == ":" and re.fullmatch(r"[\w$]+", body[start:position].strip()):
            yield body[start:position].strip() + ":"
            start = position + 1
        position += 1


def _declare(statement: str, variables: dict[str, Variable]) -> None:
    match = _VARIABLE.search(statement)
    if match is None:
        return
    space, align, kind, name, size, values = match.groups()
    width = int(re.sub(r"\D", "", kind)) // 8
    numbers = tuple(map(_number, re.findall(r"-?\w+", values or "")))
    count = int(size) if size else 0 if size == "" else 1
    variables[name] = Variable(space, int(align or width), count, width, numbers)


def _number(text: str) -> int:
    """Of a float, its bits."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text, 0)


def _add_register(item, kind, scopes, registers) -> None:
    ranged = re.fullmatch(r"(%?\w+)<(\d+)>", item)
    if ranged:
        prefix, count = ranged.groups()
        for index in range(int(count)):
            registers[f"{prefix}{index}"] = kind
    elif len(scopes) > 1:
        unique = f"{item}@{len(registers)}"
        scopes[-1][item] = unique
        registers[unique] = kind
    else:
        registers[item] = kind


def _instruction(text: str, scopes) -> Instruction:
    guard, negated = "", False
    rest = text
    match = _GUARD.match(rest)
    if match:
        negated, guard = match.group(1) == "!", _resolve(match.group(2), scopes)
        rest = rest[match.end() :]
    opcode, _, operands = rest.partition(" ") if " " in rest else (rest, "", "")
    opcode, _, more = opcode.partition("\t")
    operands = f"{more} {operands}"
    return Instruction(opcode, _operands(operands, scopes), guard, negated, text)


def _operands(text: str, scopes) -> tuple:
    """Splits at commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        if char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    parts.append(current)
    return tuple(_operand(part.strip(), scopes) for part in parts if part.strip())


def _operand(text: str, scopes):
    if text[0] == "{":
        return _operands(text[1:-1], scopes)
    if text[0] == "[":
        inner = _operands(text[1:-1], scopes)
        base, _, offset = inner[0].partition("+")
        return ("[", _resolve(base.strip(), scopes), int(offset or "0"), *inner[1:])
    if "|" in text:
        return tuple(_resolve(part.strip(), scopes) for part in text.split("|"))
    return _resolve(text, scopes)


def _resolve(name: str, scopes) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name
