"""Filling a data folder: every image and mask is checked, then copied or redrawn, and counted."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from sam2_utils import UserError

import cv2
import numpy as np
from tqdm import tqdm

from finetuning.basics.image_decoding import orientation
from finetuning.basics.image_files import read_image, read_mask, require_equal_sizes, write_image
from finetuning.dataset.copies import make_thumbnail
from finetuning.dataset.pairs import files_by_stem
from finetuning.sources.mask_values import MaskReader, MaskRule
from finetuning.sources.pairing import SourceExample

UNSPLIT = "unsplit"  # the folder of what is in no split yet
MOST_OBJECTS = 65535  # of an image: the values of a label map


class Filled(NamedTuple):
    """What became of one example."""

    name: str
    split: str
    areas: list[float]  # of each object, as a fraction of the image
    parts: int  # connected parts of a mask that counts as one object
    is_turned: bool  # by the image's EXIF orientation
    content: str  # a hash of the image file
    thumbnail: np.ndarray  # as of make_thumbnail


class Filler:
    """Copies examples into the images/ and masks/ of a new data folder."""

    def __init__(
        self,
        folder: Path,
        rule: MaskRule,
        of_objects: bool,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """of_objects: whether masks are written as label maps, or folders where objects overlap.

        value_range: what becomes 0 and 255 of the images' values; None: images are only copied.
        """
        self.folder, self.of_objects, self.value_range = folder, of_objects, value_range
        self.reader = MaskReader(rule)

    def fill(self, examples: list[SourceExample]) -> list[Filled]:
        """Copy the examples, each into its split or into UNSPLIT; return what became of them.

        Raises UserError, in terms of the user's own files, for one that cannot be trained on.
        """
        filled = []
        for example in tqdm(examples, desc="Checking and copying", unit="pair"):
            filled.append(self._fill_one(example, example.split or UNSPLIT))
        return filled

    def _fill_one(self, example: SourceExample, split: str) -> Filled:
        copy = self.folder / "images" / split / (example.name + PurePath(example.image.name).suffix)
        copy_file(example.image, copy)
        with in_terms_of(example.image, copy):
            image = read_image(copy, self.value_range)
        content = copy.read_bytes()
        if self.value_range:
            copy.unlink()
            write_image(copy.with_suffix(".png"), image)
        to = self.folder / "masks" / split / example.name
        size = image.shape[:2]
        if self.of_objects:
            areas, parts = write_objects(to, self._objects_of(example, size), size), 1
        else:
            mask = self._copy_mask(example, to, size)
            areas = [float(mask.mean())] if mask.any() else []
            parts = cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
        is_turned = orientation(content) != 1
        digest = hashlib.sha256(content).hexdigest()
        thumbnail = make_thumbnail(image)
        return Filled(example.name, split, areas, parts, is_turned, digest, thumbnail)

    def _copy_mask(self, example: SourceExample, to: Path, size: tuple[int, int]) -> np.ndarray:
        """Copy the only mask of an example, or redraw it in black and white; return it."""
        source = example.masks[0]
        copy = to.with_name(to.name + PurePath(source.name).suffix)
        copy_file(source, copy)
        with in_terms_of(source, copy):
            mask = self.reader.read_binary(copy, source)
            require_equal_sizes(example.image, size, copy, mask.shape)
            if not is_read_as(copy, mask):
                copy.unlink()
                write_image(to.with_name(f"{to.name}.png"), mask.astype(np.uint8) * 255)
        return mask

    def _objects_of(self, example: SourceExample, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the masks of an example's objects, whatever form they are in."""
        if example.annotated is not None:
            yield from example.annotated.masks(size)
            return
        for source in example.masks:
            copy = self.folder / f"mask{PurePath(source.name).suffix}"
            copy_file(source, copy)
            with in_terms_of(source, copy):
                for mask in self.reader.read(copy, source):
                    require_equal_sizes(example.image, size, copy, mask.shape)
                    yield mask
            copy.unlink()


def move_to_splits(folder: Path, split_of: dict[str, str]) -> None:
    """Move what lies in UNSPLIT of a data folder's images/ and masks/ to its split, by name."""
    for kind in ("images", "masks"):
        unsplit = folder / kind / UNSPLIT
        for name, path in files_by_stem(unsplit, with_folders=kind == "masks").items():
            to = folder / kind / split_of[name]
            to.mkdir(exist_ok=True)
            path.rename(to / path.name)
        unsplit.rmdir()


@contextlib.contextmanager
def in_terms_of(original: Path, copy: Path) -> Iterator[None]:
    """Let errors name the user's own file rather than a copy of it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(copy), str(original))) from error


def copy_file(source: Path, copy: Path) -> None:
    """Copy a file, or a member of an archive, whose stated size is all that is unpacked of it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as original, copy.open("wb") as file:
        shutil.copyfileobj(original, file)  # by parts: see check_archive


def is_read_as(file: Path, mask: np.ndarray) -> bool:
    """Say whether a mask file, as it is, is read as this HxW bool mask."""
    try:
        return np.array_equal(read_mask(file), mask)
    except UserError:
        return False


def write_objects(to: Path, masks: Iterable[np.ndarray], size: tuple[int, int]) -> list[float]:
    """Write the HxW bool masks of an image's objects; return the fraction of it that each covers.

    They become a label map, TO.png; or, where two of them overlap, a folder TO with a file each.
    Empty masks are left out.
    """
    labels, areas, is_folder = np.zeros(size, np.uint16), [], False
    for mask in masks:
        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        if not width:
            continue
        part, occupied = (all_of[y : y + height, x : x + width] for all_of in (mask, labels))
        areas.append(np.count_nonzero(part) / mask.size)
        count = len(areas)
        if count > MOST_OBJECTS:
            raise UserError(f"{to.name} has more than {MOST_OBJECTS} objects; use smaller images")
        if not is_folder and occupied[part].any():
            is_folder = True
            for earlier in range(1, count):
                _write_object(to, earlier, labels == earlier)
        if is_folder:
            _write_object(to, count, mask)
        else:
            occupied[part] = count
    if not is_folder:
        depth = np.uint8 if len(areas) < 256 else np.uint16
        write_image(to.with_name(f"{to.name}.png"), labels.astype(depth))
    return areas


def _write_object(to: Path, number: int, mask: np.ndarray) -> None:
    write_image(to / f"{number:05}.png", mask.astype(np.uint8) * 255)
