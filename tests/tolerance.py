"""The one measure of accuracy: error against float64, compared with plain XLA's."""

import jax.numpy as jnp
import numpy as np


def assert_close(got, exact_f64, low_precision, *, what="result", floor=0.0) -> None:
    """Demands that ``got`` is nearly as exact as plain XLA in low precision.

    With errors taken against ``exact_f64``, both the largest error and the root mean
    square of the error of ``got`` may be twice that of ``low_precision``, plus what one
    rounding to the dtype of ``got`` costs. NaN and infinities must be in the same
    places.

    Args:
      got: What is tested, in its own dtype.
      exact_f64: The result in float64.
      low_precision: The result of the same maths by plain XLA, from the same inputs and
        in their dtype.
      what: Names the array in the message.
      floor: An absolute error to allow where the exact result cancels to nothing, as
        the gradient of a softmax over one key does.
    """
    dtype = jnp.asarray(got).dtype
    got, exact, low = (
        np.asarray(x).astype(np.float64) for x in (got, exact_f64, low_precision)
    )
    if not got.shape == exact.shape == low.shape:
        raise AssertionError(
            f"{what}: shape {got.shape}; exact {exact.shape}, low {low.shape}"
        )
    _assert_same_places(what, "NaN", np.isnan(got), np.isnan(exact))
    _assert_same_places(what, "+inf", np.isposinf(got), np.isposinf(exact))
    _assert_same_places(what, "-inf", np.isneginf(got), np.isneginf(exact))

    finite = np.isfinite(exact)
    if not finite.any():
        return
    error, low_error, exact = (
        np.where(finite, x, 0)
        for x in (_difference(got, exact), _difference(low, exact), exact)
    )
    eps = float(jnp.finfo(dtype).eps)
    largest, allowed = (
        np.abs(error).max(),
        2 * np.abs(low_error).max() + eps * np.abs(exact).max() + floor,
    )
    if not largest <= allowed:
        place = np.unravel_index(np.abs(error).argmax(), error.shape)
        place = tuple(int(index) for index in place)
        raise AssertionError(
            f"{what}: largest error {largest:.3e} exceeds {allowed:.3e} at {place}: "
            f"got {got[place]:.6g}, exact {exact[place]:.6g}, "
            f"plain XLA {low[place]:.6g}; "
            f"{(np.abs(error) > allowed).sum()} of {error.size} values exceed it"
        )
    # Rounding to a grid of one eps makes an error of eps / sqrt(12) on average.
    rms, allowed = (
        _rms(error),
        2 * _rms(low_error) + eps / np.sqrt(12) * _rms(exact) + floor,
    )
    if not rms <= allowed:
        worst = _worst_slice(error)
        raise AssertionError(
            f"{what}: RMS error {rms:.3e} exceeds {allowed:.3e} "
            f"(RMS of the exact result {_rms(exact):.3e}); largest along {worst}"
        )


def _assert_same_places(what, kind, got, expected):
    wrong = got != expected
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(got.sum())} values are {kind}, expected "
            f"{int(expected.sum())}; first difference at {place}"
        )


def _difference(x, exact):
    with np.errstate(invalid="ignore"):
        return x - exact


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def _worst_slice(error):
    """Where along each axis the error is largest: a wrong tile shows here."""
    found = []
    for axis in range(error.ndim):
        others = tuple(i for i in range(error.ndim) if i != axis)
        found.append(
            f"axis {axis} at {int(np.square(error).sum(axis=others).argmax())}"
        )
    return ", ".join(found)
