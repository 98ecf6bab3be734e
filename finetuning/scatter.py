"""A chart of the comparison: each object's IoU before and after fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetuning.basics.files import atomic_write

# Paul Tol's high-contrast scheme, which colour-blind people can tell apart, and in gray as well
SIZE_COLORS = {"small": "#DDAA33", "medium": "#BB5566", "large": "#004488"}


def draw_scatter(path: Path, ious: np.ndarray, sizes: list[str], unit: str) -> None:
    """Draw plot_scatter's chart as a PNG file."""
    figure = Figure(figsize=(7, 7.3), layout="constrained")
    plot_scatter(figure.subplots(), ious, sizes, unit)
    # Below the chart: in any of its corners the legend could hide an object.
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", markerscale=0.8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")


def plot_scatter(axes: Axes, ious: np.ndarray, sizes: list[str], unit: str) -> None:
    """Plot the fine-tuned model's IoU over the original one's, a dot an object, and their mean.

    Above the diagonal the fine-tuned model is better.

    Arguments:
      ious: Mx2, 0 to 1, of the original and the fine-tuned model on M objects.
      sizes: of each object: small, medium or large.
      unit: what one of the M is called, like "object".
    """
    count = len(ious)
    axes.plot((0, 1), (0, 1), "--", color="gray", linewidth=1, zorder=1)

    # All sizes in one call, in a random order: a class drawn last would hide the others.
    order = np.random.default_rng(0).permutation(count)
    area, alpha = np.clip(8000 / count, 7, 70), np.clip(150 / count, 0.5, 0.8)
    colors = [SIZE_COLORS[sizes[k]] for k in order]
    axes.scatter(*ious[order].T, area, colors, alpha=alpha, linewidths=0, zorder=2)
    for size, color in SIZE_COLORS.items():
        if size in sizes:
            axes.scatter([], [], 40, color, label=f"{size} ({sizes.count(size)})")

    mean = ious.mean(axis=0)
    label = f"mean ({mean[0]:.4f}, {mean[1]:.4f})"
    axes.plot(*mean, "+", color="black", markersize=20, markeredgewidth=2, label=label)

    gains = ious[:, 1] - ious[:, 0]
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    axes.set_title(
        f"{count} {unit}{'s' if count > 1 else ''}: {better} above the diagonal (better), "
        f"{count - better - worse} on it, {worse} below (worse)",
        fontsize="medium",
    )
    axes.set(xlabel="IoU, original", ylabel="IoU, fine-tuned", aspect="equal")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))  # dots at 0 and 1 are whole
    axes.grid(alpha=0.3)
