"""As much of torch as the benchmarks use, on jax's arrays: differentiable, no GPU."""

import contextlib
import types

import jax
import jax.numpy as jnp


class Tensor:
    """An array, and how it is made of other tensors: what autograd has to know."""

    def __init__(self, array, function=None, operands=()):
        self.array, self._function, self._operands = array, function, operands
        self.requires_grad = False

    def value(self, given: dict):
        """Of other values of the tensors that are named by their identity."""
        if id(self) in given:
            return given[id(self)]
        if self._function is None:
            return self.array
        return self._function(*(x.value(given) for x in self._operands))

    def requires_grad_(self, value):
        self.requires_grad = value
        return self

    def detach(self):
        return self

    def contiguous(self):
        return self

    def transpose(self, first, second):
        return apply(lambda x: jnp.swapaxes(x, first, second), self)

    def expand(self, *shape):
        return apply(lambda x: jnp.broadcast_to(x, shape), self)

    def __floordiv__(self, other):
        return apply(lambda x: x // other, self)

    def __neg__(self):
        return apply(jnp.negative, self)

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def apply(function, *operands):
    """``function`` of tensors' arrays, as a tensor."""
    return Tensor(function(*(x.array for x in operands)), function, operands)


class FakeTorch(types.ModuleType):
    """The module. Counts waits, captures and replays."""

    Tensor = Tensor
    int32 = jnp.int32

    def __init__(self):
        super().__init__("torch")
        self.recording = True
        self.waits = self.replays = 0
        self.captured = []  # directions of graphs: whether autograd was recording
        self.can_capture = True
        self.kernel_us = 2.0
        self.nn = types.SimpleNamespace(
            functional=types.SimpleNamespace(
                logsigmoid=lambda x: apply(jax.nn.log_sigmoid, x)
            )
        )
        self.autograd = types.SimpleNamespace(
            grad=self._grad, DeviceType=types.SimpleNamespace(CUDA="CUDA")
        )
        self.cuda = types.SimpleNamespace(
            synchronize=self._synchronize,
            Stream=self._Stream,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda: None,
            graph_pool_handle=lambda: "pool",
            CUDAGraph=lambda: types.SimpleNamespace(replay=self._replay),
            graph=self._graph,
        )
        self.profiler = types.SimpleNamespace(
            ProfilerActivity=types.SimpleNamespace(CUDA="CUDA"), profile=self._profile
        )

    class _Stream:
        def wait_stream(self, other):
            pass

    def from_dlpack(self, array):
        assert array.is_ready()
        return Tensor(array)

    def arange(self, size, *, dtype, device):
        assert device == "cuda"
        return Tensor(jnp.arange(size, dtype=dtype))

    def exp(self, x):
        return apply(jnp.exp, x)

    def sigmoid(self, x):
        return apply(jax.nn.sigmoid, x)

    @contextlib.contextmanager
    def no_grad(self):
        before, self.recording = self.recording, False
        yield
        self.recording = before

    def _synchronize(self):
        self.waits += 1

    def _grad(self, out, operands, dout, retain_graph=False):
        assert self.recording and all(x.requires_grad for x in operands)

        def function(*values):
            given = {id(x): value for x, value in zip(operands, values, strict=True)}
            return out.value(given)

        _, pull_back = jax.vjp(function, *(x.array for x in operands))
        return [Tensor(x) for x in pull_back(dout.array)]

    def _replay(self):
        self.replays += 1

    @contextlib.contextmanager
    def _graph(self, graph, *, pool, stream, capture_error_mode):
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert pool == "pool" and isinstance(stream, self._Stream)
        assert capture_error_mode == "thread_local"
        yield
        self.captured.append(graph)

    @contextlib.contextmanager
    def _profile(self, *, activities):
        assert activities == ["CUDA"]
        before = self.waits

        def event(device_type, microseconds):
            return types.SimpleNamespace(
                device_type=device_type, self_device_time_total=microseconds
            )

        events = [event("CPU", 1000.0)]
        yield types.SimpleNamespace(key_averages=lambda: events)
        assert self.waits == before + 1, "it has to wait for the last kernel"
        events += [event("CUDA", self.kernel_us), event("CUDA", self.kernel_us)]
