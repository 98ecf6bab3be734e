"""The true masks of training, on the grid that the loss is measured on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

from finetuning.dataset.objects import Objects

LOSS_GRID = 256  # cells a side, of what the loss is measured and prompts are placed on: the
# resolution of full-size models' masks
HALF = 128  # of a cell, where 255 is all of it
# For an object's number, which is less: all of an image's objects together, and what is none
ALL, BACKGROUND = 1 << 16, (1 << 16) + 1
# Objects of an image, whose masks are all prepared before training. Of hundreds, a short run shows
# a small part: these are prepared when they are shown.
FEW = 8


class ImageMasks(NamedTuple):
    """The masks of an image, as far as they are prepared."""

    size: tuple[int, int]  # (H,W) of the files
    count: int  # of objects
    packed: dict[int, bytes]  # by object, ALL or BACKGROUND: a kB or so each

    def grid(self, k: int) -> np.ndarray:
        """Return LOSS_GRIDxLOSS_GRID uint8: how much of each cell the mask covers."""
        values = np.frombuffer(zlib.decompress(self.packed[k]), np.uint8)
        return values.reshape(LOSS_GRID, LOSS_GRID)


def pack_masks(objects: Objects, numbers: Iterable[int]) -> ImageMasks:
    """Prepare the masks of some objects, of ALL, or of the BACKGROUND."""
    packed: dict[int, bytes] = {}
    for k in numbers:
        same = 0 if k == ALL and len(objects) == 1 else k
        if same not in packed:
            grid = mask_on_grid(mask_of(objects, same), LOSS_GRID)
            packed[same] = zlib.compress(grid, level=1)
        packed[k] = packed[same]
    return ImageMasks(objects.size, len(objects), packed)


def mask_of(objects: Objects, k: int) -> np.ndarray:
    """Return the HxW bool mask of an object, of ALL of them, or of the BACKGROUND."""
    if k == BACKGROUND:
        return ~objects.together()[0]
    return objects.together()[0] if k == ALL else objects[k]


def mask_on_grid(mask: np.ndarray, size: int) -> np.ndarray:
    """Return how much an HxW bool mask covers of size x size cells, uint8, 255 for all of one.

    Where it covers half of none, the cells of its pixels count as covered.
    """
    # Sides that shrink first: OpenCV takes the mean over areas only where none grows.
    shrunk = tuple(min(side, size) for side in mask.shape[::-1])
    covered = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
    covered = cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA)
    grid = np.rint(255 * covered).astype(np.uint8)
    if mask.any() and grid.max() < HALF:
        y, x = np.nonzero(mask)
        grid[y * size // mask.shape[0], x * size // mask.shape[1]] = 255
    return grid
