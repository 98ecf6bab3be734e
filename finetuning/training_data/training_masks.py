"""The true masks of training, on the grid of the loss."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import cv2
import numpy as np

from finetuning.dataset.objects import Objects

# Cells per side: the loss is computed and prompts are placed on this grid. The first is the
# resolution of full-size models' masks; thin objects need a finer one.
LOSS_GRIDS = (256, 512, 1024)
LOSS_GRID = LOSS_GRIDS[0]
IMAGE = "image"  # instead of a grid: the pixels of each image
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
    shape: tuple[int, int]  # of the grid

    def grid(self, k: int) -> np.ndarray:
        """Return the coverage of each cell of the grid, uint8, 255 for all of it."""
        return np.frombuffer(zlib.decompress(self.packed[k]), np.uint8).reshape(self.shape)


def pack_masks(
    objects: Objects,
    numbers: Iterable[int],
    loss_grid: int | str = LOSS_GRID,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> ImageMasks:
    """Compress the masks of the given objects, which may include ALL_OBJECTS and BACKGROUND.

    loss_grid: cells per side, or IMAGE. change: returns the HxW bool mask of a variant of the
    image, which may have another size; None: the image is shown as it is.
    """
    packed: dict[int, bytes] = {}
    shape = objects.size if loss_grid == IMAGE else (loss_grid, loss_grid)
    for k in numbers:
        # With one object, ALL_OBJECTS is the same mask
        same = 0 if k == ALL_OBJECTS and len(objects) == 1 else k
        if same not in packed:
            mask = object_mask(objects, same)
            mask = change(mask) if change else mask
            grid = mask * np.uint8(255) if loss_grid == IMAGE else mask_on_grid(mask, loss_grid)
            shape = grid.shape
            packed[same] = zlib.compress(grid, level=1)
        packed[k] = packed[same]
    return ImageMasks(objects.size, len(objects), packed, shape)


def object_mask(objects: Objects, k: int) -> np.ndarray:
    """Return the HxW bool mask of an object, of ALL_OBJECTS or of the BACKGROUND."""
    if k == BACKGROUND:
        return ~objects.together()[0]
    return objects.together()[0] if k == ALL_OBJECTS else objects[k]


def mask_on_grid(mask: np.ndarray, size: int) -> np.ndarray:
    """Return how much of each of size x size cells an HxW bool mask covers, uint8, 255 for all.

    If a small mask covers half of no cell, all cells with a pixel of it count as covered.
    """
    grid = cell_coverage(mask, size)
    if mask.any() and grid.max() < HALF:
        y, x = np.nonzero(mask)
        grid[y * size // mask.shape[0], x * size // mask.shape[1]] = 255
    return grid


def cell_coverage(mask: np.ndarray, size: int) -> np.ndarray:
    """Return how much of each of size x size cells an HxW bool mask covers, uint8, 255 for all."""
    # OpenCV averages over areas only if no side grows, so first shrink the sides that shrink
    shrunk = tuple(min(side, size) for side in mask.shape[::-1])
    covered = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
    covered = cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA)
    return np.rint(255 * covered).astype(np.uint8)
