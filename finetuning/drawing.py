"""Pictures: masks and prompts on an image, curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.files import atomic_write


def draw_learning_curve(path: Path, log: list[dict[str, float]]) -> None:
    """Draw the loss and the mean IoU over the epochs."""
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.96)
    loss_axes, iou_axes = figure.subplots(1, 2)
    for axes, column, label in (
        (loss_axes, "loss", "training loss"),
        (iou_axes, "train_iou", "train (its own prompts)"),
        (iou_axes, "val_iou", "val (center point)"),
        (iou_axes, "val_iou_no_prompt", "val (no prompt)"),
    ):
        rows = [row for row in log if column in row]
        if not rows:
            continue
        axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], "o-", label=label)
    iou_axes.axhline(log[0]["val_iou"], color="gray", linestyle="--", label="val before training")
    for axes, name in ((loss_axes, "loss"), (iou_axes, "mean IoU")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_panels(path: Path, panels: dict[str, np.ndarray]) -> None:
    """Draw HxWx3 uint8 RGB images beside each other, with their titles."""
    figure = Figure(figsize=(12, 12), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
