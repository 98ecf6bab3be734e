"""The true masks of training, on the grid of the loss."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

from finetuning.dataset.objects import Objects

# Cells per side: the loss is computed and prompts are placed at the resolution of full-size
# models' masks
LOSS_GRID = 256
HALF = 128  # a cell belongs to the object from half coverage on; 255 is full coverage
# Special object indices: all objects together; background. Real ones are smaller.
ALL_OBJECTS, BACKGROUND = 1 << 16, (1 << 16) + 1
# Images with up to this many objects have all masks prepared before training. Of hundreds of
# objects, a short run shows only some, which are prepared when they are shown.
MAX_PREPARED = 8


class ImageMasks(NamedTuple):
    """The masks of an image that are prepared so far."""

    size: tuple[int, int]  # (H,W) of the mask file
    count: int  # of objects
    packed: dict[int, bytes]  # by object, ALL_OBJECTS or BACKGROUND; about a kB each

    def grid(self, k: int) -> np.ndarray:
        """Return the coverage of each cell, LOSS_GRIDxLOSS_GRID uint8, 255 for all of it."""
        values = np.frombuffer(zlib.decompress(self.packed[k]), np.uint8)
        return values.reshape(LOSS_GRID, LOSS_GRID)


def pack_masks(objects: Objects, numbers: Iterable[int]) -> ImageMasks:
    """Compress the masks of the given objects, which may include ALL_OBJECTS and BACKGROUND."""
    packed: dict[int, bytes] = {}
    for k in numbers:
        # With one object, ALL_OBJECTS is the same mask
        same = 0 if k == ALL_OBJECTS and len(objects) == 1 else k
        if same not in packed:
            grid = mask_on_grid(object_mask(objects, same), LOSS_GRID)
            packed[same] = zlib.compress(grid, level=1)
        packed[k] = packed[same]
    return ImageMasks(objects.size, len(objects), packed)


def object_mask(objects: Objects, k: int) -> np.ndarray:
    """Return the HxW bool mask of an object, of ALL_OBJECTS or of the BACKGROUND."""
    if k == BACKGROUND:
        return ~objects.together()[0]
    return objects.together()[0] if k == ALL_OBJECTS else objects[k]


def mask_on_grid(mask: np.ndarray, size: int) -> np.ndarray:
    """Return how much of each of size x size cells an HxW bool mask covers, uint8, 255 for all.

    If a small mask covers half of no cell, all cells with a pixel of it count as covered.
    """
    # OpenCV averages over areas only if no side grows, so first shrink the sides that shrink
    shrunk = tuple(min(side, size) for side in mask.shape[::-1])
    covered = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
    covered = cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA)
    grid = np.rint(255 * covered).astype(np.uint8)
    if mask.any() and grid.max() < HALF:
        y, x = np.nonzero(mask)
        grid[y * size // mask.shape[0], x * size // mask.shape[1]] = 255
    return grid
