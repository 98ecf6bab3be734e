"""What is measured of a predicted and a true mask: how much they overlap, how near their edges are.

All take two HxW bool arrays. Beyond the image's border is background.
"""

from __future__ import annotations

from collections.abc import Callable

from sam2_utils import calculate_dice, calculate_iou

import cv2
import numpy as np

from finetuning.model.prompts import distance_to_zero

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))  # a pixel and its 4 neighbours


def calculate_precision(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return |predicted AND true| / (|predicted| + 1e-6): how much of the prediction is right."""
    return np.count_nonzero(predicted & true) / (np.count_nonzero(predicted) + 1e-6)


def calculate_recall(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return |predicted AND true| / (|true| + 1e-6): how much of the object is found."""
    return np.count_nonzero(predicted & true) / (np.count_nonzero(true) + 1e-6)


def calculate_boundary_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the IoU of what lies within d pixels inside the masks' edges.

    d is 2% of the image's diagonal, at least 1 pixel (Cheng et al., Boundary IoU, 2021, and the
    authors' code, which erodes a mask d times with a 3x3 square).
    """
    distance = max(1, round(0.02 * np.hypot(*true.shape)))
    masks = crop_to_union(predicted, true)
    return float(calculate_iou(*(find_boundary(mask, distance) for mask in masks)))


def calculate_hd95(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the 95th percentile of the Hausdorff distance of the masks' surfaces, in pixels.

    It is the larger one of the two directions, over surfaces of pixels, as in MONAI's
    compute_hausdorff_distance without spacing. If one of the masks is empty, it is the image's
    diagonal, the worst there is, so that a model which finds nothing does not drop out of a mean;
    if both are, it is 0.
    """
    if not predicted.any() or not true.any():
        return float(np.hypot(*true.shape)) if predicted.any() or true.any() else 0.0
    surfaces = [find_surface(mask) for mask in crop_to_union(predicted, true)]
    directed = [
        np.percentile(distance_to(target)[surface], 95)
        for surface, target in (surfaces, surfaces[::-1])
    ]
    return float(max(directed))


Metric = Callable[[np.ndarray, np.ndarray], float]
# What training logs after each epoch, and in the order of the comparison's tables and results.csv,
# what that has beside them.
LOGGED: dict[str, Metric] = {"IoU": calculate_iou, "Dice": calculate_dice}
METRICS: dict[str, Metric] = {
    **LOGGED,
    "Precision": calculate_precision,
    "Recall": calculate_recall,
    "Boundary IoU": calculate_boundary_iou,
    "HD95": calculate_hd95,
}
PIXEL_METRICS = frozenset({"HD95"})  # in pixels, the lower the better; all others are from 0 to 1


def crop_to_union(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop both masks to the bounding box of their union: all that edges depend on, and faster.

    Around it is background alone, as there is beyond the image. Two empty masks stay whole.
    """
    x, y, width, height = cv2.boundingRect((predicted | true).view(np.uint8))
    if not width:
        return predicted, true
    box = np.s_[y : y + height, x : x + width]
    return predicted[box], true[box]


def find_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Return which pixels of an HxW bool mask have background at most `distance` pixels away.

    Rows and columns are counted, whichever is more (Chebyshev's distance): what that many
    erosions with a 3x3 square take off, in a time that does not grow with the distance.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    to_background = cv2.distanceTransform(padded, cv2.DIST_C, cv2.DIST_MASK_3)[1:-1, 1:-1]
    return mask & (to_background <= distance)


def find_surface(mask: np.ndarray) -> np.ndarray:
    """Return which pixels of an HxW bool mask have background among their 4 neighbours."""
    inner = cv2.erode(mask.astype(np.uint8), CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inner == 0)


def distance_to(surface: np.ndarray) -> np.ndarray:
    """Return each pixel's Euclidean distance to the nearest pixel of a surface, HxW float64."""
    return distance_to_zero((~surface).view(np.uint8), np.float64)
