"""Calls FFI handlers as XLA does, on a stand-in for the driver: no GPU, no XLA.

``Gpu().run(*calls)`` starts this file in a process of its own, hands it the calls and
returns, for each, the handler's error and what the driver was asked to do. Addresses of
buffers are made up: a handler may not look behind them.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import ffi_structs

STREAM = 0x57E
FIRST_ADDRESS = 1 << 20  # of buffer i: (i + 1) times this


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a target in one stage; arrays are (dtype, shape)."""

    target: str
    args: list
    rets: list
    attributes: dict
    stage: str = "execute"
    in_place: dict = dataclasses.field(default_factory=dict)  # {result: argument}


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int  # 0: success
    message: str
    driver: list[dict]  # what the driver was asked to do, in order

    def of(self, kind: str) -> list[dict]:
        return [entry for entry in self.driver if entry["call"] == kind]


class Gpu:
    """A machine with one GPU, as far as a handler can tell.

    Its compiler is a stand-in too, and nothing is cached, unless it ``compiles``: what
    handlers do with a kernel does not depend on what is in it.
    """

    def __init__(self, *, compiles: bool = False, **environment: str):
        self._environment = environment
        if not compiles:
            compiler = {
                "TK_JAX_NVRTC": stand_in("fake_nvrtc.c"),
                "TK_JAX_CACHE_DIR": "off",
            }
            self._environment = compiler | environment

    def run(self, *calls: Call) -> list[Answer]:
        import extension_process

        from tk_jax import _ffi

        request = {
            "source_root": str(_ffi.source_root()),
            "nvrtc_folders": _ffi.nvrtc_folders(),
            "calls": [dataclasses.asdict(call) for call in calls],
        }
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as log:
            environment = extension_process.clean_environment() | {
                "TK_JAX_LIBCUDA": stand_in("fake_driver.c"),
                "TK_JAX_CACHE_DIR": os.environ["TK_JAX_CACHE_DIR"],
                "FAKE_LOG": log.name,
            }
            done = subprocess.run(
                [sys.executable, __file__],
                env=environment | self._environment,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        return [Answer(**answer) for answer in json.loads(done.stdout)]


@functools.cache
def stand_in(name: str) -> str:
    """Builds a stand-in, which lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="tk_jax_stand_in_")
    atexit.register(folder.cleanup)
    library = f"{folder.name}/libfake.so"
    source = str(pathlib.Path(__file__).with_name(name))
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source]
    subprocess.run(command, check=True)
    return library


def both_stages(call: Call) -> tuple[Call, Call]:
    return dataclasses.replace(call, stage="initialize"), call


def launched(gpu: Gpu, *calls: Call) -> list[tuple[Answer, Answer]]:
    """The answers of both stages, which must succeed and do what is theirs."""
    stages = [stage for call in calls for stage in both_stages(call)]
    answers = gpu.run(*stages)
    for answer in answers:
        assert (answer.code, answer.message) == (0, "")
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    for loaded, ran in pairs:
        assert loaded.of("launch") == [], "initialize launches nothing"
        assert ran.of("attribute") == [], "execute loads nothing"
        for launch in ran.of("launch"):
            assert launch["context"], "the device's context is current"
            assert launch["stream"] == STREAM
    return pairs


# -- The process -----------------------------------------------------------------------


class _Runtime:
    """What XLA offers to a handler: errors, a stream, a device."""

    def __init__(self):
        self.errors = []
        self._memory = ffi_structs.Memory()
        callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._callbacks = {
            ffi_structs.ERROR_CREATE: callback(self._create_error),
            ffi_structs.STREAM_GET: callback(self._get_stream),
            ffi_structs.ORDINAL_GET: callback(self._get_ordinal),
        }
        functions = (ctypes.c_void_p * 18)()
        for index, function in self._callbacks.items():
            functions[index] = ctypes.cast(function, ctypes.c_void_p)
        self.api = self._memory.struct(ffi_structs.Api, 24, None, 0, 3, None, functions)

    def _create_error(self, address):
        error = ffi_structs.ErrorCreate.from_address(address)
        self.errors.append((error.code, error.message.decode()))
        return len(self.errors)

    def _get_stream(self, address):
        ffi_structs.StreamGet.from_address(address).stream = STREAM

    def _get_ordinal(self, address):
        ffi_structs.OrdinalGet.from_address(address).ordinal = 0

    def call(self, handler, call: dict) -> tuple[int, str]:
        memory = ffi_structs.Memory()
        frame = memory.struct(
            ffi_structs.Frame,
            ctypes.addressof(self.api),
            None,
            ffi_structs.STAGES[call["stage"]],
            memory.buffers(call["args"], _addresses(0, len(call["args"]))),
            memory.buffers(call["rets"], _addresses_of_results(call)),
            memory.attributes(call["attributes"]),
            None,
        )
        # XLA counts up to the attributes: the future came later.
        frame.struct_size = ffi_structs.Frame.future.offset
        error = handler(memory.keep(frame))
        return self.errors[error - 1] if error else (0, "")


def _addresses(first: int, count: int) -> list[int]:
    return [FIRST_ADDRESS * (1 + first + i) for i in range(count)]


def _addresses_of_results(call: dict) -> list[int]:
    addresses = _addresses(len(call["args"]), len(call["rets"]))
    for result, argument in call["in_place"].items():
        addresses[int(result)] = _addresses(argument, 1)[0]  # json: keys are text
    return addresses


def _pointer(capsule) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, None)


def main() -> None:
    from tk_jax import _extension

    request = json.load(sys.stdin)
    _extension.set_source_root(request["source_root"])
    _extension.set_nvrtc_paths(request["nvrtc_folders"])
    log = pathlib.Path(os.environ["FAKE_LOG"])
    registrations = _extension.registrations()
    runtime = _Runtime()
    answers = []
    for call in request["calls"]:
        log.write_text("")
        capsule = registrations[call["target"]][call["stage"]]
        handler = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(_pointer(capsule))
        code, message = runtime.call(handler, call)
        driver = [json.loads(line) for line in log.read_text().splitlines()]
        answers.append({"code": code, "message": message, "driver": driver})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
