"""The objects of an image, each with its own mask.

A data folder stores them as a black-and-white mask (one object), as a label map (pixel values
1, 2, ... are objects) or, where objects overlap, as a TIFF of several label maps. A folder with one
mask per object, as earlier versions wrote it, is read too.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import numpy as np
from PIL import Image, ImageSequence

from finetuning.basics.cropped_masks import CroppedMask, crop_mask, value_boxes
from finetuning.basics.files import read_file
from finetuning.basics.image_files import (
    read_image,
    read_mask,
    read_values,
    require_equal_sizes,
    write_image,
)
from finetuning.basics.threads import in_threads
from finetuning.basics.tiff import tiff_pages
from finetuning.dataset.pairs import Pair, files_by_stem

DEPTHS = (np.uint8, np.uint16)  # of label maps
COMMENT_TAG = 270  # TIFF's ImageDescription
# Decoders take damaged pages without an error, so a TIFF's comment holds what to check
COMMENT = re.compile(rb"label maps of overlapping objects: (\d+), CRC-32 ([0-9a-f]{8})")
DRAW_SEED = 42  # of objects that stand for all: the same in every run, whatever its --seed


class Objects(Sequence):
    """The objects of one image: a sequence of non-empty HxW bool masks, made on access.

    Masks are not kept, because an image can have thousands of objects.
    """

    def __init__(
        self, size: tuple[int, int], names: Sequence[Any], make: Callable[[Any], CroppedMask]
    ) -> None:
        """size: (H,W); make: returns the mask of one of `names`, cropped or HxW bool."""
        self.size, self._names, self._make = size, names, make

    def only(self, chosen: Sequence[int]) -> Objects:
        """Return the objects with these indices."""
        return Objects(self.size, [self._names[index] for index in chosen], self._make)

    def together(self) -> Objects:
        """Merge all objects into one."""
        if len(self) < 2:
            return self
        return Objects(self.size, [self], _union)

    def cropped(self, index: int) -> CroppedMask:
        """Return a mask as its bounding box, which is faster for small objects."""
        return crop_mask(self._make(self._names[index]))

    def all_cropped(self) -> Iterator[CroppedMask]:
        """Yield each mask as its bounding box."""
        return (self.cropped(index) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.cropped(index).full()


def _union(objects: Objects) -> np.ndarray:
    whole = np.zeros(objects.size, bool)
    for mask in objects.all_cropped():  # one at a time, to save memory
        whole[mask.box] |= mask.crop
    return whole


def read_objects(pair: Pair) -> Objects:
    """Read the objects of an image, as `pair.chosen` and `pair.as_one` say.

    A binary mask is one object, or none if it is empty. Raises UserError for a mask that is
    unreadable, or not of the kind that pair.per_object says.
    """
    if not pair.per_object:
        mask = read_mask(pair.mask)
        objects = Objects(mask.shape, [mask] if mask.any() else [], lambda found: found)
    elif pair.mask.is_dir():
        files = [path for _, path in sorted(files_by_stem(pair.mask).items())]
        if not files:
            raise UserError(f"no masks in {pair.mask}; fill the data folder again")
        objects = Objects(read_mask(files[0]).shape, files, _read_object)
    else:
        maps = read_label_maps(pair.mask)
        found = [
            (value, page, box)
            for page, labels in enumerate(maps)
            for value, box in value_boxes(labels)
        ]
        found.sort(key=lambda one: one[:2])

        def make(one: tuple[int, int, tuple[slice, slice]]) -> CroppedMask:
            value, page, (rows, columns) = one
            crop = maps[page][rows, columns] == value
            return CroppedMask(crop, columns.start, rows.start, maps[page].shape)

        objects = Objects(maps[0].shape, found, make)
    if pair.as_one:
        return objects.together()
    return objects if pair.chosen is None else objects.only(pair.chosen)


def _read_object(path: Path) -> np.ndarray:
    mask = read_mask(path)
    if not mask.any():
        raise UserError(f"{path} is empty, but should contain an object; remove it")
    return mask


def read_pair(pair: Pair) -> tuple[np.ndarray, Objects]:
    """Read an image (HxWx3 uint8 RGB) and its objects; raise UserError if the sizes differ."""
    image, objects = read_image(pair.image), read_objects(pair)
    require_equal_sizes(pair.image, image.shape[:2], pair.mask, objects.size)
    return image, objects


def count_objects(pairs: list[Pair]) -> dict[int, int]:
    """Map the index of each pair that has objects to their number.

    Raises UserError for an unreadable mask.
    """
    counts = in_threads(lambda pair: len(read_objects(pair)), pairs, "Reading masks", "mask")
    return {index: count for index, count in enumerate(counts) if count}


def limit_objects(pairs: list[Pair], most: int, seed: int = DRAW_SEED) -> list[Pair]:
    """Choose at most `most` of all objects at random; print a line if some are left out.

    If no image has more than one object, all are kept.
    """
    if not any(pair.per_object for pair in pairs):
        return pairs
    counts = count_objects(pairs)
    all_objects = [(index, k) for index, count in counts.items() for k in range(count)]
    if len(all_objects) <= max(most, len(counts)):
        return pairs
    total = len(all_objects)
    print(f"val IoU is measured on {most} of the {total} val objects, the same in every run")
    drawn = np.random.default_rng(seed).choice(total, most, replace=False)
    chosen: dict[int, list[int]] = {}
    for index, k in (all_objects[i] for i in sorted(drawn)):
        chosen.setdefault(index, []).append(k)
    return [pairs[index]._replace(chosen=tuple(numbers)) for index, numbers in chosen.items()]


def write_label_maps(to: Path, maps: Sequence[np.ndarray]) -> None:
    """Write one HxW uint8 or uint16 label map as TO.png, or several as the pages of TO.tif."""
    if len(maps) == 1:
        write_image(to.with_name(f"{to.name}.png"), maps[0], in_partial_folder=True)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    comment = f"label maps of overlapping objects: {len(maps)}, CRC-32 {_checksum(maps):08x}"
    first, *others = map(Image.fromarray, maps)
    first.save(
        to.with_name(f"{to.name}.tif"),
        save_all=True,
        append_images=others,
        compression="tiff_adobe_deflate",
        tiffinfo={COMMENT_TAG: comment},
    )


def read_label_maps(path: Path) -> list[np.ndarray]:
    """Read the label maps of an image, each HxW uint8 or uint16.

    0 is background, each other value an object. Raises UserError if the file is damaged, or holds
    other values.
    """
    content = read_file(path)
    comment, is_lossy = COMMENT.search(content), False
    if comment or len(tiff_pages(content)) > 1:
        maps = _read_pages(content)
        is_whole = len({page.shape for page in maps}) == 1
        if comment:
            found = len(maps), _checksum(maps)
            is_whole = is_whole and found == (int(comment[1]), int(comment[2], 16))
        if not is_whole:
            raise UserError(f"{path} is damaged; fill the data folder again")
    else:
        values, is_lossy = read_values(path)
        maps = [values]
    if is_lossy or any(page.ndim != 2 or page.dtype not in DEPTHS for page in maps):
        raise UserError(f"{path} is not an 8- or 16-bit label map; fill the data folder again")
    return maps


def _read_pages(content: bytes) -> list[np.ndarray]:
    """Return the pages of a TIFF; none if they cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=["TIFF"]) as image:
            return [np.array(page) for page in ImageSequence.Iterator(image)]
    except Exception:  # damaged files raise many kinds
        return []


def _checksum(maps: Sequence[np.ndarray]) -> int:
    checksum = 0
    for page in maps:
        checksum = zlib.crc32(np.ascontiguousarray(page).tobytes(), checksum)
    return checksum
