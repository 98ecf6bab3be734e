"""Draw masks and prompts on an image."""

from __future__ import annotations

import cv2
import numpy as np

from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.basics.pictures import COLORS, GREEN, RED, WHITE, YELLOW
from finetuning.segmentation.prompts import Prompt


def draw_object(
    canvas: np.ndarray,
    mask: np.ndarray | CroppedMask | None = None,
    prompt: Prompt | None = None,
    true_mask: np.ndarray | CroppedMask | None = None,
    number: int = 0,
) -> None:
    """Draw an object on an HxWx3 uint8 RGB canvas, in place.

    The mask (cropped, or HxW bool) is tinted in the color COLORS[number] with a white outline; the
    true mask has a yellow outline. Foreground points and boxes are green, background points red.
    """
    line = max(1, round(max(canvas.shape[:2]) / 300))
    if mask is not None:
        # A lookup table of all 256 values is 50 times as fast as arithmetic on each pixel
        values, color = np.arange(256)[:, None], np.array(COLORS[number % len(COLORS)])
        mask = crop_mask(mask)
        inside = canvas[mask.box]
        tinted = cv2.LUT(inside, ((values + color) // 2).astype(np.uint8)[None])
        cv2.copyTo(tinted, mask.crop.astype(np.uint8), inside)
        draw_outline(canvas, mask, WHITE, line)
    if true_mask is not None:
        draw_outline(canvas, crop_mask(true_mask), YELLOW, line)
    if prompt is not None:
        _draw_prompt(canvas, prompt, line)


def draw_outline(canvas: np.ndarray, mask: CroppedMask, color: tuple, line: int) -> None:
    """Draw the outline of a mask on an HxWx3 uint8 canvas, in place."""
    contours, _ = cv2.findContours(
        mask.crop.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(mask.x, mask.y)
    )
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
