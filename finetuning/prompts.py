"""Prompts: given, drawn at random for training, and clicks that correct a mask."""

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


BOX_SHARE = 0.25  # of the steps; the others start with a point
CLICK_SHARE = 0.35  # of the steps have 1 to MAX_CLICKS corrective clicks
MAX_CLICKS = 3
MASK_SHARE = 0.5  # of the steps with clicks get the mask to be corrected as a prompt, too
BOX_JITTER = 0.1  # standard deviation of a box's edges, in its sides; at most twice of it


class PromptPlan(NamedTuple):
    """What a step starts with, and how it goes on."""

    kind: str = "random"  # as in prompt_from_mask
    clicks: int = 0  # corrective clicks before the masks that the loss is of
    gives_mask: bool = False  # whether the mask to be corrected is a prompt, too
    background: bool = False  # whether a point of each image is where no object is, too


class PromptMix(NamedTuple):
    """What the steps of a training show."""

    points: str = "random"  # or inner; or mixed: inner ones, boxes, and clicks
    none_share: float = 0.0  # of the steps have no prompt
    background_share: float = 0.0  # of the steps with a point have another on background


RANDOM_POINTS = PromptMix()


def plan_prompts(mix: PromptMix, rng: np.random.Generator) -> PromptPlan:
    """Draw what a step is prompted with."""
    plan = _plan_prompts(mix.points, rng)
    if rng.random() < mix.none_share:
        return PromptPlan("none")
    is_point = plan.kind != "box" and not plan.clicks
    return plan._replace(background=is_point and bool(rng.random() < mix.background_share))


def _plan_prompts(points: str, rng: np.random.Generator) -> PromptPlan:
    if points != "mixed":
        return PromptPlan(points)
    kind = "box" if rng.random() < BOX_SHARE else "inner"
    clicks = int(rng.integers(1, MAX_CLICKS + 1)) if rng.random() < CLICK_SHARE else 0
    return PromptPlan(kind, clicks, gives_mask=bool(rng.random() < MASK_SHARE))


def draw_prompt(grid: np.ndarray, kind: str, rng: np.random.Generator) -> Prompt:
    """Draw a prompt of a plan's kind from an SxS bool mask; the box is drawn roughly."""
    if kind != "box":
        return prompt_from_mask(grid, kind, rng)
    x1, y1, x2, y2 = mask_box(grid)
    sides = np.array([x2 - x1, y2 - y1] * 2)
    jitter = rng.normal(0, BOX_JITTER, 4).clip(-2 * BOX_JITTER, 2 * BOX_JITTER) * sides
    return make_prompt(box=(np.array([x1, y1, x2, y2]) + jitter).clip(0, len(grid) - 1))


def add_click(prompt: Prompt, predicted: np.ndarray, true_mask: np.ndarray, size: int) -> Prompt:
    """Add the click that corrects HxW masks to a prompt in pixels of an SxS input.

    Where there is nothing to correct, the click confirms the mask at its deepest point.
    """
    nowhere = np.zeros_like(true_mask)
    click = corrective_click(predicted, true_mask) or corrective_click(nowhere, true_mask)
    *point, label = click or (0, 0, -1)  # -1: no point, to SAM 2
    added = Prompt(np.array([point], np.float32), np.array([label], np.int32))
    added = scale_prompt(added, true_mask.shape, size)
    return Prompt(*(np.concatenate(both) for both in zip(prompt, added, strict=True)))


def scale_prompt(prompt: Prompt, grid: tuple[int, int], size: int) -> Prompt:
    """Move a prompt from cells of a grid of (H,W) to pixels of an SxS input.

    A point goes to the middle of its cell, a box's corners go to the outermost pixels of theirs.
    """
    scale = size / np.array(grid[::-1], np.float32)
    labels = prompt.point_labels[:, None]
    place = np.select([labels == 2, labels == 3], [np.float32(0), np.float32(1)], np.float32(0.5))
    return prompt._replace(point_coords=(prompt.point_coords + place) * scale - place)
