"""Loss-curve figures; drawn off screen."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt


def smooth(losses: list[float], window: int) -> np.ndarray:
    """Mean over the last `window` losses, or over as many as there are."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finish(figure, axes, path: pathlib.Path) -> None:
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_training(history: dict, entropy: float, path: pathlib.Path) -> None:
    """Training and validation loss, and the entropy that the latter has to beat."""
    figure, axes = plt.subplots(figsize=(7, 4))
    losses = history["losses"]
    axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(smooth(losses, 20), color="tab:blue", label="training, mean of 20 steps")
    steps = [point["step"] for point in history["validation"]]
    values = [point["loss"] for point in history["validation"]]
    axes.plot(steps, values, "o-", color="tab:orange", label="validation")
    axes.axhline(entropy, color="gray", linestyle="--", label="unigram entropy")
    axes.set_ylabel("loss, nats per byte")
    _finish(figure, axes, path)


def plot_comparison(
    curves: dict[str, list[float]], baseline: str, path: pathlib.Path
) -> None:
    """Loss curves, and below them each one's difference from `baseline`."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2)
    )
    for name, losses in curves.items():
        top.plot(losses, linewidth=1, label=name)
        difference = np.subtract(losses, curves[baseline])
        bottom.plot(difference, linewidth=1, label=name)
    top.set_ylabel("training loss, nats per byte")
    top.grid(alpha=0.25)
    top.legend(frameon=False)
    top.spines[["top", "right"]].set_visible(False)
    bottom.set_ylabel(f"minus {baseline}")
    _finish(figure, bottom, path)
