"""Pictures: masks and prompts on an image, curves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.files import atomic_write
from finetuning.basics.pictures import COLORS, GREEN, RED, WHITE, YELLOW
from finetuning.prompts import Prompt


def draw_overlay(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    prompt: Prompt | None = None,
    true_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Draw one object on a copy of an HxWx3 uint8 RGB image, as draw_object does; return it."""
    canvas = image.copy()
    draw_object(canvas, mask, prompt, true_mask)
    return canvas


def draw_object(
    canvas: np.ndarray,
    mask: np.ndarray | None = None,
    prompt: Prompt | None = None,
    true_mask: np.ndarray | None = None,
    number: int = 0,
) -> None:
    """Draw an object on an HxWx3 uint8 RGB canvas.

    The mask (HxW bool) is tinted in one of COLORS, by the object's number, with a white outline,
    the true mask outlined in yellow; foreground points are green, background points red, a box
    green.
    """
    line = max(1, round(max(canvas.shape[:2]) / 300))
    if mask is not None:
        # By a table of all 256 values, which is 50 times as fast as to compute with each pixel
        values, color = np.arange(256)[:, None], np.array(COLORS[number % len(COLORS)])
        tinted = cv2.LUT(canvas, ((values + color) // 2).astype(np.uint8)[None])
        cv2.copyTo(tinted, mask.astype(np.uint8), canvas)
        _draw_outline(canvas, mask, WHITE, line)
    if true_mask is not None:
        _draw_outline(canvas, true_mask, YELLOW, line)
    if prompt is not None:
        _draw_prompt(canvas, prompt, line)


def _draw_outline(canvas: np.ndarray, mask: np.ndarray, color: tuple, line: int) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)


def _draw_prompt(canvas: np.ndarray, prompt: Prompt, line: int) -> None:
    points = [tuple(round(float(value)) for value in point) for point in prompt.point_coords]
    corners = [
        point for point, label in zip(points, prompt.point_labels, strict=True) if label in (2, 3)
    ]
    if corners:
        cv2.rectangle(canvas, *corners, GREEN, line, cv2.LINE_AA)
    for point, label in zip(points, prompt.point_labels, strict=True):
        if label in (0, 1):
            cv2.circle(canvas, point, 4 * line, WHITE, -1, cv2.LINE_AA)
            cv2.circle(canvas, point, 3 * line, GREEN if label else RED, -1, cv2.LINE_AA)


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
