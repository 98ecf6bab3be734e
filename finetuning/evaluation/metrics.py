"""Metrics of a predicted and a true mask: their overlap, and the distance between their edges.

All functions take two bool arrays of one shape: the masks of an HxW image, or a box of it that
holds all their pixels, and then the (H,W) of the image. Outside is background.
"""

from __future__ import annotations

from collections.abc import Callable

from sam2_utils import calculate_dice, calculate_iou

import cv2
import numpy as np

from finetuning.segmentation.prompts import distance_to_zero

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))  # a pixel and its 4 neighbours
PAIRS_PER_PIXEL = 3  # two distance transforms take as long as this many pairs of pixels per pixel
MOST_PAIRS = 1 << 20  # compared at once: 8 MB

Size = tuple[int, int]


def calculate_precision(predicted: np.ndarray, true: np.ndarray, _: Size | None = None) -> float:
    """Return |predicted AND true| / (|predicted| + 1e-6): the correct share of the prediction."""
    return np.count_nonzero(predicted & true) / (np.count_nonzero(predicted) + 1e-6)


def calculate_recall(predicted: np.ndarray, true: np.ndarray, _: Size | None = None) -> float:
    """Return |predicted AND true| / (|true| + 1e-6): the share of the object that is found."""
    return np.count_nonzero(predicted & true) / (np.count_nonzero(true) + 1e-6)


def calculate_boundary_iou(
    predicted: np.ndarray, true: np.ndarray, image_size: Size | None = None
) -> float:
    """Return the IoU of the bands of d pixels inside the masks' edges.

    d is 2% of the image's diagonal, at least 1 pixel (Cheng et al., Boundary IoU, 2021, and the
    authors' code, which erodes a mask d times with a 3x3 square).
    """
    distance = max(1, round(0.02 * np.hypot(*(image_size or true.shape))))
    return float(calculate_iou(*(find_boundary(mask, distance) for mask in (predicted, true))))


def calculate_hd95(
    predicted: np.ndarray, true: np.ndarray, image_size: Size | None = None
) -> float:
    """Return the 95th percentile of the Hausdorff distance of the masks' surfaces, in pixels.

    This is the larger of the two directed distances between surface pixels, as in MONAI's
    compute_hausdorff_distance without spacing. If one mask is empty, it is the image's diagonal,
    the worst possible value, so that a model that finds nothing still counts in a mean; if both
    are empty, it is 0.
    """
    if not predicted.any() or not true.any():
        diagonal = float(np.hypot(*(image_size or true.shape)))
        return diagonal if predicted.any() or true.any() else 0.0
    directed = find_distances(find_surface(predicted), find_surface(true))
    return float(max(np.percentile(distances, 95) for distances in directed))


Metric = Callable[[np.ndarray, np.ndarray, Size], float]  # predicted, true, (H,W) of the image
# LOGGED: in the training log. METRICS: in the comparison, in table order.
LOGGED: dict[str, Metric] = {
    "IoU": lambda predicted, true, _=None: calculate_iou(predicted, true),
    "Dice": lambda predicted, true, _=None: calculate_dice(predicted, true),
}
METRICS: dict[str, Metric] = {
    **LOGGED,
    "Precision": calculate_precision,
    "Recall": calculate_recall,
    "Boundary IoU": calculate_boundary_iou,
    "HD95": calculate_hd95,
}
PIXEL_METRICS = frozenset({"HD95"})  # in pixels, lower is better; all others are 0 to 1


def find_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Return which pixels of an HxW bool mask have background at most `distance` pixels away.

    The distance is Chebyshev's. These are the pixels that `distance` erosions with a 3x3 square
    remove, but the time does not grow with the distance.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    background_distance = cv2.distanceTransform(padded, cv2.DIST_C, cv2.DIST_MASK_3)[1:-1, 1:-1]
    return mask & (background_distance <= distance)


def find_surface(mask: np.ndarray) -> np.ndarray:
    """Return which pixels of an HxW bool mask have background among their 4 neighbours."""
    inner = cv2.erode(mask.astype(np.uint8), CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inner == 0)


def find_distances(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Euclidean distance from each pixel of a surface to the other surface, both ways.

    first, second: HxW bool, not empty. Returns float64 arrays, a value per pixel of a surface.
    """
    pixels, others = (
        np.stack(np.divmod(np.flatnonzero(surface), surface.shape[1]), axis=1).astype(np.float64)
        for surface in (first, second)
    )
    if len(pixels) * len(others) > PAIRS_PER_PIXEL * first.size:
        zeros = [(~surface).view(np.uint8) for surface in (second, first)]
        return tuple(
            distance_to_zero(values, np.float64)[surface]
            for values, surface in zip(zeros, (first, second), strict=True)
        )
    # A small surface in a large image: comparing the pixels of both is faster than the transform
    rows = max(1, MOST_PAIRS // len(others))
    nearest, nearest_other = [], np.full(len(others), np.inf)
    for start in range(0, len(pixels), rows):
        some = pixels[start : start + rows]
        # |a - b|^2 = |a|^2 + |b|^2 - 2 ab, exactly, since coordinates are whole numbers
        squared = np.square(some).sum(1)[:, None] + np.square(others).sum(1) - 2 * some @ others.T
        nearest.append(squared.min(axis=1))
        nearest_other = np.minimum(nearest_other, squared.min(axis=0))
    return np.sqrt(np.concatenate(nearest)), np.sqrt(nearest_other)
