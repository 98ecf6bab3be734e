"""The objects of an image: each with a mask of its own, in the forms that a data folder has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import numpy as np

from finetuning.basics.image_files import read_image, read_mask, read_values, require_equal_sizes
from finetuning.basics.threads import in_threads
from finetuning.dataset.pairs import Pair, files_by_stem

DRAW_SEED = 42  # of limit_objects: the same objects in every run, whatever its seed


class Objects(Sequence):
    """The objects of one image: each an HxW bool mask that is not empty, made when asked for."""

    def __init__(
        self, size: tuple[int, int], names: Sequence[Any], make: Callable[[Any], np.ndarray]
    ) -> None:
        """make: returns the mask of one of `names`; size: (H,W)."""
        self.size, self._names, self._make = size, names, make

    def only(self, chosen: Sequence[int]) -> Objects:
        """Return some of the objects."""
        return Objects(self.size, [self._names[index] for index in chosen], self._make)

    def together(self) -> Objects:
        """Return them as one object, if there are any."""
        if len(self) < 2:
            return self
        return Objects(self.size, [self], _union)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._make(self._names[index])


def _union(objects: Objects) -> np.ndarray:
    whole = np.zeros(objects.size, bool)
    for mask in objects:  # not all in memory at once
        whole |= mask
    return whole


def read_objects(pair: Pair) -> Objects:
    """Read the objects of an image, or those of them that are chosen.

    A binary mask is one object, or none where it is empty. Raises UserError for a mask that is
    unreadable, or not what the data folder's split.json says.
    """
    if not pair.of_objects:
        mask = read_mask(pair.mask)
        objects = Objects(mask.shape, [mask] if mask.any() else [], lambda found: found)
    elif pair.mask.is_dir():
        files = [path for _, path in sorted(files_by_stem(pair.mask).items())]
        if not files:
            raise UserError(f"no masks in {pair.mask}; fill the data folder anew")
        objects = Objects(read_mask(files[0]).shape, files, _read_object)
    else:
        labels = read_labels(pair.mask)
        values = np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1
        objects = Objects(labels.shape, values, lambda value: labels == value)
    if pair.as_one:
        return objects.together()
    return objects if pair.chosen is None else objects.only(pair.chosen)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map: HxW uint8 or uint16, 0 for background, each other value an object."""
    labels, is_lossy = read_values(path)
    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16) or is_lossy:
        raise UserError(f"{path} is not a label map of 8 or 16 bits; fill the data folder anew")
    return labels


def _read_object(path: Path) -> np.ndarray:
    mask = read_mask(path)
    if not mask.any():
        raise UserError(f"{path} is empty, but is to be an object; remove it")
    return mask


def read_pair(pair: Pair) -> tuple[np.ndarray, Objects]:
    """Read an image (HxWx3 uint8 RGB) and its objects, whose masks must have the same size."""
    image, objects = read_image(pair.image), read_objects(pair)
    require_equal_sizes(pair.image, image.shape[:2], pair.mask, objects.size)
    return image, objects


def count_objects(pairs: list[Pair]) -> dict[int, int]:
    """Return how many objects each image has, by its index among the pairs, where it has any.

    Raises UserError for a mask that is unreadable.
    """
    counts = in_threads(lambda pair: len(read_objects(pair)), pairs, "Reading masks", "mask")
    return {index: count for index, count in enumerate(counts) if count}


def limit_objects(pairs: list[Pair], most: int, seed: int = DRAW_SEED) -> list[Pair]:
    """Choose at most so many of all objects, drawn by seed; say so where some are left out.

    Where every image has one object at most, all are kept.
    """
    if not any(pair.of_objects for pair in pairs):
        return pairs
    counts = count_objects(pairs)
    everyone = [(index, k) for index, count in counts.items() for k in range(count)]
    if len(everyone) <= max(most, len(counts)):
        return pairs
    print(f"val IoU is that of {most} of the {len(everyone)} val objects, the same in every run")
    drawn = np.random.default_rng(seed).choice(len(everyone), most, replace=False)
    chosen: dict[int, list[int]] = {}
    for index, k in (everyone[i] for i in sorted(drawn)):
        chosen.setdefault(index, []).append(k)
    return [pairs[index]._replace(chosen=tuple(of_image)) for index, of_image in chosen.items()]
