"""Prompts: points and boxes, given or made from a mask, and clicks that correct a mask."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import cv2
import numpy as np


class Prompt(NamedTuple):
    """A prompt: N points, two of which may be the corners of a box.

    point_coords: Nx2 float32, (X,Y) in pixels of the image.
    point_labels: N int32; 1 foreground, 0 background, 2 and 3 a box's top left and bottom right.
    """

    point_coords: np.ndarray
    point_labels: np.ndarray

    def moved(self, x: float, y: float) -> Prompt:
        """Return the prompt with all points moved by (X,Y) pixels."""
        return self._replace(point_coords=self.point_coords + np.array([x, y], np.float32))


def make_prompt(
    foreground: list[tuple[float, float]] = (),
    background: list[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
) -> Prompt:
    """Make a prompt from (X,Y) points and an (X1,Y1,X2,Y2) box, all in pixels of the image."""
    # The box comes first, as in SAM2ImagePredictor
    corners = [box[:2], box[2:]] if box is not None else []
    coords = [*corners, *foreground, *background]
    labels = [2, 3][: len(corners)] + [1] * len(foreground) + [0] * len(background)
    return Prompt(np.array(coords, np.float32).reshape(-1, 2), np.array(labels, np.int32))


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text for tables: "x,y:label" for each point."""
    points = zip(prompt.point_coords, prompt.point_labels, strict=True)
    return " ".join(f"{x:g},{y:g}:{label}" for (x, y), label in points)


def distance_inside(mask: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the outline of an HxW bool mask, HxW float32.

    It is the Euclidean distance transform; the image's border counts as an outline.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    return distance_to_zero(padded, np.float32)[1:-1, 1:-1]


def distance_to_zero(values: np.ndarray, dtype: type) -> np.ndarray:
    """Return each pixel's Euclidean distance to the nearest 0 of HxW uint8 values, as a dtype."""
    distance = cv2.distanceTransform(values, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers. OpenCV's square roots of equal ones differ in the last
    # digit, depending on memory alignment, so a tie for the deepest pixel would be broken by luck.
    return np.sqrt(np.rint(np.square(distance, dtype=dtype)))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return the (X,Y) pixel farthest from the outline of a non-empty HxW bool mask."""
    _, x, y = _deepest(mask)
    return x, y


def _deepest(mask: np.ndarray, clicked: Collection[tuple[int, int]] = ()) -> tuple[float, int, int]:
    """Return the depth in pixels and the (X,Y) of the deepest pixel of a non-empty mask.

    Of equally deep pixels, it is the first one, row by row. clicked: (X,Y) pixels whose depth
    counts as 0.
    """
    x1, y1, x2, y2 = mask_box(mask)  # the transform of a crop is faster
    depth = distance_inside(mask[y1 : y2 + 1, x1 : x2 + 1])
    for x, y in clicked:
        if x1 <= x <= x2 and y1 <= y <= y2:
            depth[y - y1, x - x1] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), x1 + int(x), y1 + int(y)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel drawn uniformly from a non-empty HxW bool mask."""
    y, x = divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])
    return x, y


def random_inner_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel drawn from a non-empty HxW bool mask, more likely if it is deeper.

    Its probability is proportional to its distance from the outline, similar to people's clicks.
    """
    x1, y1, x2, y2 = mask_box(mask)  # the transform of a crop is faster
    depth = distance_inside(mask[y1 : y2 + 1, x1 : x2 + 1])
    cumulative = np.cumsum(depth, dtype=np.float64)
    drawn = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    y, x = divmod(drawn, depth.shape[1])
    return x1 + x, y1 + y


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box of a non-empty HxW bool mask: (X1,Y1,X2,Y2), all inclusive."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(x[0]), int(y[0]), int(x[-1]), int(y[-1])


def corrective_click(
    predicted: np.ndarray, true_mask: np.ndarray, clicked: Collection[tuple[int, int]] = ()
) -> tuple[int, int, int] | None:
    """Return the next click, (X,Y) and its label; None if there is nothing to correct.

    It is the pixel deepest inside a false-negative region (label 1) or a false-positive region
    (label 0) of two HxW bool masks, the usual protocol for interactive segmentation (Sofiiuk et
    al., Reviving Iterative Training with Mask Guidance, 2021). A false negative wins a tie.

    clicked: (X,Y) pixels not to click again; they do not change the depth of other pixels.
    """
    deepest = 0.0, None
    for label, wrong in ((1, true_mask & ~predicted), (0, predicted & ~true_mask)):
        if wrong.any():
            depth, x, y = _deepest(wrong, clicked)
            if depth > deepest[0]:
                deepest = depth, (x, y, label)
    return deepest[1]


def prompt_from_mask(mask: np.ndarray, kind: str, rng: np.random.Generator | None = None) -> Prompt:
    """Make a prompt from a non-empty HxW bool mask.

    kind: center (the deepest point), random (a random point), inner (a random point, more likely
    deep inside), box, or none (an empty prompt). random and inner need `rng`.
    """
    if kind == "none":
        return make_prompt()
    if kind == "box":
        return make_prompt(box=mask_box(mask))
    if kind == "center":
        return make_prompt([deepest_point(mask)])
    return make_prompt([{"random": random_point, "inner": random_inner_point}[kind](mask, rng)])
