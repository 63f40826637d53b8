"""Rivals that are PyTorch packages, on the same arrays, in the same process.

jax's arrays reach torch through DLPack, without a copy. A call is timed as jax's are,
by the wall clock of many back to back: what it returns waits for the GPU when it is
asked to. What torch spends in Python on each of many small kernels is not the kernels'
fault, so that a rival whose calls can be captured is replayed as a CUDA graph, and of
one that waits for the GPU itself, or launches where nothing can be captured, the time
is that of its kernels alone, as torch's profiler has it.

jax must leave torch some memory: ``XLA_PYTHON_CLIENT_PREALLOCATE`` has to be ``false``
before jax starts the GPU, which benchmarks.run sees to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.timing import Call

# How a rival's time is taken: "wall" is of its calls as they are, "graph" of graphs
# that are replayed, "kernels" the sum of its kernels' times.
CLOCKS = ("wall", "graph", "kernels")


@dataclasses.dataclass(frozen=True)
class TorchRival:
    """What runs a case."""

    function: Callable  # of tensors in the order of the case's arrays; differentiable
    clock: str = "graph"
    has_backward: bool = True
    # What is not counted: from the case's arrays to the tensors of ``function``, and
    # from its result to the case's.
    prepare: Callable = lambda *tensors: tensors
    restore: Callable = lambda out: out


class _OnGpu:
    """Work dispatched to torch's stream; jax.block_until_ready waits for it."""

    def __init__(self, torch):
        self._torch = torch

    def block_until_ready(self):
        self._torch.cuda.synchronize()
        return self


class TorchPrograms:
    """The interface of benchmarks.programs.Programs, for a function of tensors.

    torch's autograd differentiates it. Backward is timed alone, on autograd's graphs
    made beforehand.
    """

    difference = False

    def __init__(self, rival: TorchRival, directions: Sequence[str]):
        import torch

        self._torch = torch
        self._rival, self._function = rival, rival.function
        self.clock = rival.clock
        self.directions = tuple(directions)
        self.direct = "bwd" in self.directions
        self.no_direct_reason: str | None = None
        self.compile_s: dict[str, float] = {}

    def compile(self) -> None:
        """Packages of torch compile when they are first called."""

    def leave_out_backward(self, reason: str | None = None) -> None:
        self.directions = tuple(x for x in self.directions if x != "bwd")
        self.direct, self.no_direct_reason = False, reason

    def first_calls(self, arrays, dout):
        torch = self._torch
        start = time.perf_counter()
        *operands, dout = self._tensors(arrays, dout)
        with torch.no_grad():
            out = self._rival.restore(self._function(*operands)).contiguous()
        torch.cuda.synchronize()
        self.compile_s["fwd"] = time.perf_counter() - start
        gradients = None
        if self.direct:
            start = time.perf_counter()
            try:
                result = self._function(*operands)
                gradients = torch.autograd.grad(result, operands, dout)
                gradients = [x.contiguous() for x in gradients]
                torch.cuda.synchronize()
            except Exception as error:  # Rivals may raise anything here.
                if "fwd" not in self.directions:
                    raise
                self.leave_out_backward(f"{type(error).__name__}: {error}"[:300])
            else:
                self.compile_s["bwd"] = time.perf_counter() - start
                gradients = [_to_jax(x) for x in gradients]
        if self.clock == "kernels" and not self._sees_kernels([operands]):
            self.clock = "wall"
        return _to_jax(out), gradients

    def calls(self, inputs) -> dict[str, Call]:
        tensors = [self._tensors(arrays, dout) for arrays, dout in inputs]
        if self.clock == "graph":
            try:
                return self._replayed(tensors)
            except Exception as error:  # Not all that they call can be captured.
                self._torch.cuda.synchronize()
                reason = f"{type(error).__name__}: {error}"[:300]
                print(f"  no CUDA graph, timed as it is: {reason}", flush=True)
                self.clock = "wall"
        calls = {}
        if "fwd" in self.directions:
            calls["fwd"] = self._forward([operands for *operands, _ in tensors])
        if self.direct:
            calls["bwd"] = self._backward(tensors)
        if self.clock == "kernels":
            calls = {name: _OfKernels(self, call) for name, call in calls.items()}
        return calls

    def _forward(self, operands) -> Call:
        torch, function, on_gpu = self._torch, self._function, _OnGpu(self._torch)

        def forward(index):
            with torch.no_grad():
                function(*operands[index % len(operands)])
            return on_gpu

        return forward

    def _backward(self, tensors) -> Call:
        torch, on_gpu = self._torch, _OnGpu(self._torch)
        outs = [self._function(*operands) for *operands, _ in tensors]
        torch.cuda.synchronize()

        def backward(index):
            *operands, dout = tensors[index % len(tensors)]
            torch.autograd.grad(
                outs[index % len(tensors)], operands, dout, retain_graph=True
            )
            return on_gpu

        return backward

    def _replayed(self, tensors) -> dict[str, Call]:
        """A graph for each direction and set of inputs."""
        torch, function = self._torch, self._function
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        # Results are dropped, and graphs replayed one after another: they may share
        # memory.
        graphs = {}

        def capture(direction, run):
            graph = torch.cuda.CUDAGraph()
            # Beside other threads, which may go on allocating and loading.
            captured = torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            )
            with _no_collection(), captured:
                run()
            graphs.setdefault(direction, []).append(graph)

        kept = []
        for *operands, dout in tensors:
            stream.wait_stream(torch.cuda.current_stream())
            if "fwd" in self.directions:

                def forward(operands=operands):
                    with torch.no_grad():
                        function(*operands)

                with torch.cuda.stream(stream):
                    forward()
                capture("fwd", forward)
            if self.direct:
                # autograd runs backward on the stream that forward ran on.
                with torch.cuda.stream(stream):
                    out = function(*operands)

                def backward(out=out, operands=operands, dout=dout):
                    torch.autograd.grad(out, operands, dout, retain_graph=True)

                with torch.cuda.stream(stream):
                    backward()
                capture("bwd", backward)
                kept.append(out)
        torch.cuda.synchronize()
        return {
            direction: self._replay(found, (tensors, kept))
            for direction, found in graphs.items()
        }

    def _replay(self, graphs, kept) -> Call:
        on_gpu = _OnGpu(self._torch)

        def replay(index):
            graphs[index % len(graphs)].replay()
            return on_gpu

        replay.kept = kept  # what the graphs read
        return replay

    def _sees_kernels(self, operands) -> bool:
        try:
            if _OfKernels(self, self._forward(operands)).sample(1) > 0:
                return True
            reason = "it saw none"
        except Exception as error:  # A machine need not permit it.
            reason = f"{type(error).__name__}: {error}"[:300]
        print(f"  no times of kernels from the profiler, timed as it is: {reason}")
        return False

    def _tensors(self, arrays, dout):
        jax.block_until_ready([*arrays, dout])
        *operands, dout = (self._torch.from_dlpack(x) for x in (*arrays, dout))
        operands = self._rival.prepare(*operands)
        for x in operands:
            x.requires_grad_(self.direct)
        return [*operands, dout]


class _OfKernels:
    """A call whose time is what its kernels, copies and fills take on the GPU."""

    def __init__(self, programs: TorchPrograms, call: Call):
        self._torch, self._call = programs._torch, call

    def __call__(self, index):
        return self._call(index)

    def sample(self, repeats: int) -> float:
        """As timing.measure takes it: seconds a call."""
        torch = self._torch
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for index in range(repeats):
                self._call(index)
            torch.cuda.synchronize()
        microseconds = sum(
            event.self_device_time_total
            for event in profile.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return microseconds / repeats / 1e6


@contextlib.contextmanager
def _no_collection():
    """While a graph is captured: destroying another one's memory would spoil it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _to_jax(tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach())
