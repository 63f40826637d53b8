"""Which interleavings ``implementation="interpret"`` explores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tk_jax import _ffi


@contextlib.contextmanager
def interpret_options(*, seed: int = 0, schedules: int = 1) -> Iterator[None]:
    """Explores ``schedules`` interleavings, numbered from ``seed`` on.

    Every call of an op with ``implementation="interpret"`` that runs meanwhile runs
    once for each seed, and fails at the first one in which something is wrong; the
    error names it, so that ``interpret_options(seed=that)`` repeats it alone. Without
    this, seed 0 is run.

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
    for name, value, least in (("seed", seed, 0), ("schedules", schedules, 1)):
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
    interpreter.set_schedules(seed, schedules)
    try:
        yield
    finally:
        interpreter.set_schedules(*before)
