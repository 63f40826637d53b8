"""What ``implementation="interpret"`` explores, and kernels compiled for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tk_jax import _ffi


@contextlib.contextmanager
def interpret_options(
    *, seed: int = 0, schedules: int = 1, threads: int = 0, multiprocessors: int = 4
) -> Iterator[None]:
    """Explores ``schedules`` interleavings, numbered from ``seed`` on.

    Every call of an op with ``implementation="interpret"`` that runs meanwhile runs
    once for each seed, and fails at the first one in which something is wrong; the
    error names it, so that ``interpret_options(seed=that)`` repeats it alone. Without
    this, seed 0 is run.

    Blocks run on ``threads`` threads, by default one for each processor that the
    process may use. Results and errors are the same for any number.

    ``multiprocessors`` is how many blocks (or whole clusters of them) run at once, and
    so the grid of kernels whose blocks stay. A few, so that small arrays make them walk
    over several tiles; as many as there are processors is faster for large ones.

    JAX may return from a call before it has run: wait for its result
    (``jax.block_until_ready``) before leaving the context. The setting is the
    process's.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> a = jnp.ones((64, 64), jnp.bfloat16)
    >>> with tk_jax.interpret_options(seed=3, schedules=2):
    ...     c = tk_jax.matmul(a, a, implementation="interpret")
    ...     float(jax.block_until_ready(c)[0, 0])
    64.0
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("schedules", schedules, 1),
        ("threads", threads, 0),
        ("multiprocessors", multiprocessors, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"interpret_options: {name} is {value!r}; expected an integer"
            )
        if value < least:
            raise ValueError(
                f"interpret_options: {name} is {value}; expected at least {least}"
            )
    interpreter = _ffi.interpreter()
    before = interpreter.schedules()
    interpreter.set_schedules(seed, schedules, threads, multiprocessors)
    try:
        yield
    finally:
        interpreter.set_schedules(*before)


def compile_for_interpreter(
    functions: Sequence[str],
    *,
    header: str = "",
    source: str = "",
    params_type: str = "tk::KernelParams",
) -> None:
    """Compiles kernels for the interpreter, all into one library, and loads it.

    ``call_kernel(..., implementation="interpret")`` does this by itself for the kernel
    that it calls. Compiling many of one header together takes little more time than
    compiling one. The library is kept in the kernel cache, by a digest of all sources,
    the text and the compiler.

    The compiler is what ``TK_JAX_CXX`` or ``CXX`` names, or the first of ``c++``,
    ``g++`` and ``clang++``; g++ 12 and clang 14 and later will do.

    Args:
      functions: Device functions, template arguments included:
        ``["mine::scale<64>"]``.
      header: A header of the tile library or its kernels that defines them.
      source: Device code that defines them; placed after ``header``.
      params_type: What they take a const reference to.

    Raises:
      ValueError: neither ``header`` nor ``source``.
      RuntimeError: there is no compiler, or it fails; the error has its log.
      ImportError: the interpreter is not built.
    """
    if not header and not source:
        raise ValueError("compile_for_interpreter: pass header, source, or both")
    shared = {"header": header, "source": source, "params_type": params_type}
    specs = [
        {"symbol": "tk_kernel", "function": function, "threads": 128, **shared}
        for function in functions
    ]
    _ffi.interpreter().compile(specs)
