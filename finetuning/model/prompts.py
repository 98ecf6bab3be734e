"""Prompts: points and boxes, made from a mask or given, and clicks that correct a mask."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import cv2
import numpy as np


class Prompt(NamedTuple):
    """What the user points at: N points, of which two may be the corners of a box.

    point_coords: Nx2 float32, (X,Y) in pixels of the image.
    point_labels: N int32; 1 foreground, 0 background, 2 and 3 a box's top left and bottom right.
    """

    point_coords: np.ndarray
    point_labels: np.ndarray


def make_prompt(
    foreground: list[tuple[float, float]] = (),
    background: list[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
) -> Prompt:
    """Make a prompt of (X,Y) points and an (X1,Y1,X2,Y2) box, all in pixels of the image.

    The box comes first, as SAM2ImagePredictor orders it.
    """
    corners = [box[:2], box[2:]] if box is not None else []
    coords = [*corners, *foreground, *background]
    labels = [2, 3][: len(corners)] + [1] * len(foreground) + [0] * len(background)
    return Prompt(np.array(coords, np.float32).reshape(-1, 2), np.array(labels, np.int32))


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as tables have it: "x,y:label" of each point."""
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
    # Squares are whole numbers. OpenCV's roots of equal ones differ in the last digit, by where in
    # memory they lie; then the deepest of several equally deep pixels would be a matter of luck.
    return np.sqrt(np.rint(np.square(distance, dtype=dtype)))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return the (X,Y) pixel farthest from the outline of an HxW bool mask that is not empty."""
    _, x, y = _deepest(mask)
    return x, y


def _deepest(mask: np.ndarray, clicked: Collection[tuple[int, int]] = ()) -> tuple[float, int, int]:
    """Return the depth in pixels, and the (X,Y), of the deepest pixel of a mask that is not empty.

    Of several, it is the first one, row by row. clicked: (X,Y) pixels that count as of depth 0.
    """
    x1, y1, x2, y2 = mask_box(mask)  # nothing is outside of it, and it is soon gone through
    depth = distance_inside(mask[y1 : y2 + 1, x1 : x2 + 1])
    for x, y in clicked:
        if x1 <= x <= x2 and y1 <= y <= y2:
            depth[y - y1, x - x1] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), x1 + int(x), y1 + int(y)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel drawn uniformly from an HxW bool mask that is not empty."""
    y, x = divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])
    return x, y


def random_inner_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel of an HxW bool mask that is not empty: the deeper, the likelier.

    A pixel's probability is proportional to its distance from the outline, much as people click.
    """
    x1, y1, x2, y2 = mask_box(mask)  # nothing is outside of it, and it is soon gone through
    depth = distance_inside(mask[y1 : y2 + 1, x1 : x2 + 1])
    up_to = np.cumsum(depth, dtype=np.float64)
    drawn = int(np.searchsorted(up_to, rng.random() * up_to[-1], side="right"))
    y, x = divmod(drawn, depth.shape[1])
    return x1 + x, y1 + y


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the (X1,Y1,X2,Y2) pixels that bound an HxW bool mask that is not empty."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(x[0]), int(y[0]), int(x[-1]), int(y[-1])


def corrective_click(
    predicted: np.ndarray, true_mask: np.ndarray, clicked: Collection[tuple[int, int]] = ()
) -> tuple[int, int, int] | None:
    """Return the (X,Y) pixel to click next, and its label; None where there is nothing to correct.

    Of all pixels that two HxW bool masks do not share, it is the one deepest inside a region that
    is missing (label 1) or too much (label 0), as interactive segmentation is commonly measured
    (Sofiiuk et al., Reviving Iterative Training with Mask Guidance, 2021). Where both are equally
    deep, it is what is missing.

    clicked: (X,Y) pixels that are not clicked again; regions are as deep as they would be without.
    """
    deepest = 0.0, None
    for label, wrong in ((1, true_mask & ~predicted), (0, predicted & ~true_mask)):
        if wrong.any():
            depth, x, y = _deepest(wrong, clicked)
            if depth > deepest[0]:
                deepest = depth, (x, y, label)
    return deepest[1]


def prompt_from_mask(mask: np.ndarray, kind: str, rng: np.random.Generator | None = None) -> Prompt:
    """Make a prompt from an HxW bool mask that is not empty.

    kind: center (the deepest point), random (a point drawn with `rng`), inner (likewise, the
    deeper the likelier), box, or none (no prompt at all).
    """
    if kind == "none":
        return make_prompt()
    if kind == "box":
        return make_prompt(box=mask_box(mask))
    if kind == "center":
        return make_prompt([deepest_point(mask)])
    return make_prompt([{"random": random_point, "inner": random_inner_point}[kind](mask, rng)])
