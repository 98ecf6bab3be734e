"""Masks stored as their bounding box: an image can have thousands of small objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class CroppedMask(NamedTuple):
    """A mask of an image, stored as a box that holds all its pixels.

    crop: hxw bool, at least 1x1, the mask inside the box.
    x, y: the box's upper left pixel.
    size: (H,W) of the image.
    """

    crop: np.ndarray
    x: int
    y: int
    size: tuple[int, int]

    @property
    def box(self) -> tuple[slice, slice]:
        """The box, as an index of an HxW array."""
        height, width = self.crop.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)

    @property
    def area(self) -> int:
        """The number of the mask's pixels."""
        return np.count_nonzero(self.crop)

    def overlap(self, other: CroppedMask) -> int:
        """Return the number of pixels that both masks of an image have."""
        left, top = max(self.x, other.x), max(self.y, other.y)
        parts = [mask.crop[top - mask.y :, left - mask.x :] for mask in (self, other)]
        height, width = (min(part.shape[axis] for part in parts) for axis in (0, 1))
        first, second = (part[:height, :width] for part in parts)
        return np.count_nonzero(first & second)

    def full(self) -> np.ndarray:
        """Return the mask as an HxW bool array."""
        mask = np.zeros(self.size, bool)
        mask[self.box] = self.crop
        return mask


def crop_mask(mask: np.ndarray | CroppedMask) -> CroppedMask:
    """Crop a mask to the bounding box of its pixels; to one pixel if it is empty."""
    if not isinstance(mask, CroppedMask):
        mask = CroppedMask(mask, 0, 0, mask.shape)
    # Not cv2.boundingRect, which misses pixels of narrow masks in OpenCV 4.9
    rows = np.flatnonzero(mask.crop.any(axis=1))
    top, bottom = (int(rows[0]), int(rows[-1]) + 1) if rows.size else (0, 1)
    columns = np.flatnonzero(mask.crop[top:bottom].any(axis=0))
    left, right = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, 1)
    crop = mask.crop[top:bottom, left:right]
    return CroppedMask(crop, mask.x + left, mask.y + top, mask.size)


def crop_together(*masks: CroppedMask) -> tuple[list[np.ndarray], int, int]:
    """Return masks of one image in the bounding box of their union, and its upper left (X,Y)."""
    masks = [crop_mask(mask) for mask in masks]
    boxes = [mask.box for mask in masks if mask.crop.any()] or [masks[0].box]
    y, x = (min(box[axis].start for box in boxes) for axis in (0, 1))
    shape = tuple(max(box[axis].stop for box in boxes) - first for axis, first in ((0, y), (1, x)))
    crops = [np.zeros(shape, bool) for _ in masks]
    for crop, mask in zip(crops, masks, strict=True):
        height, width = mask.crop.shape
        if mask.crop.any():
            crop[mask.y - y :, mask.x - x :][:height, :width] = mask.crop
    return crops, x, y


def value_boxes(values: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Yield each value but 0 of an HxW integer array, in ascending order, and its bounding box.

    The box is an index of the array. The time depends on the number of pixels, not of values.
    """
    width, flat = values.shape[1], values.ravel()
    # Runs of equal values in a row: there are far fewer of them than pixels
    begins = np.ones(flat.size, bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[::width] = True
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], flat.size) - 1
    are_objects = flat[firsts] != 0
    firsts, lasts = firsts[are_objects], lasts[are_objects]
    if not firsts.size:
        return
    order = np.argsort(flat[firsts], kind="stable")  # so the runs of a value go from top to bottom
    firsts, lasts = firsts[order], lasts[order]
    found = flat[firsts]
    starts = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
    ends = np.append(starts[1:], found.size) - 1
    top, bottom = firsts[starts] // width, firsts[ends] // width
    left = np.minimum.reduceat(firsts % width, starts)
    right = np.maximum.reduceat(lasts % width, starts)
    for value, y1, y2, x1, x2 in zip(
        *(edge.tolist() for edge in (found[starts], top, bottom, left, right)), strict=True
    ):
        yield value, (slice(y1, y2 + 1), slice(x1, x2 + 1))


def value_masks(values: np.ndarray) -> Iterator[tuple[int, CroppedMask]]:
    """Yield each value but 0 of an HxW integer array, in ascending order, and its mask."""
    for value, (rows, columns) in value_boxes(values):
        crop = values[rows, columns] == value
        yield value, CroppedMask(crop, columns.start, rows.start, values.shape)
