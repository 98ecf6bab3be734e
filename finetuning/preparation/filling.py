"""Check every image and mask, then copy it into a data folder, converting masks if necessary."""

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

from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.basics.image_decoding import orientation
from finetuning.basics.image_files import (
    read_image,
    read_mask,
    read_values,
    require_equal_sizes,
    write_image,
)
from finetuning.dataset.objects import write_label_maps
from finetuning.dataset.pairs import files_by_stem
from finetuning.dataset.splitting import LEFT_OUT
from finetuning.preparation.copies import make_thumbnail
from finetuning.preparation.fingerprint import Row, Stamp, stamp_file, stamp_outlines
from finetuning.sources.mask_values import MaskReader, MaskRule
from finetuning.sources.pairing import SourceExample

UNSPLIT = "unsplit"  # the folder of images that are in no split yet
CHUNK_BYTES = 1 << 18
MAX_LABEL = 65535  # largest value of a 16-bit label map, so the most objects in an image


class Filled(NamedTuple):
    """An image that was copied into the data folder, with facts for the report and the split."""

    name: str
    split: str
    areas: list[float]  # of each object, as a fraction of the image
    parts: int  # connected components of a mask that counts as one object
    is_turned: bool  # whether its EXIF orientation turns it
    sha256: str  # of the user's image file
    thumbnail: np.ndarray  # from make_thumbnail
    stamps: tuple[Stamp, ...] = ()  # of the user's image, then of its masks or outlines

    @property
    def row(self) -> Row:
        """What the data folder's record says of it, once it is in its split."""
        return Row(f"{self.split}/{self.name}", self.stamps[0], self.stamps[1:])


class Filler:
    """Copies examples into the images/ and masks/ of a new data folder."""

    def __init__(
        self,
        folder: Path,
        rule: MaskRule,
        per_object: bool,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Prepare to fill a folder.

        Arguments:
          per_object: write label maps instead of binary masks.
          value_range: the values that become 0 and 255 in images of more than 8 bits; None: copy
            all image files as they are.
        """
        self.folder, self.per_object, self.value_range = folder, per_object, value_range
        self.reader = MaskReader(rule)
        self.unchanged = 0  # images of 8 bits, which have no value range
        self._stamps: list[Stamp] = []  # of the files copied for the current image

    def fill(self, examples: list[SourceExample]) -> list[Filled]:
        """Copy each example into its split, or into UNSPLIT if it has none.

        Raises UserError, which names the user's own file, for an example that cannot be trained on.
        """
        filled = []
        for example in tqdm(examples, desc="Checking and copying", unit="pair"):
            filled.append(self._fill_one(example, example.split or UNSPLIT))
        self.reader.check_edges()
        if self.unchanged:
            print(
                f"--value-range is for images of more than 8 bits: {self.unchanged} of "
                f"{len(filled)} images have 8 bits and stay as they are"
            )
        return filled

    def check_objects(self, filled: list[Filled]) -> None:
        """Raise UserError if no image of the whole data set has an object, or a chosen value."""
        self.reader.check_values()
        if not any(image.areas for image in filled):
            raise UserError(
                f"none of the {len(filled)} masks has an object: all are black (0), which is the "
                "background"
            )

    def _fill_one(self, example: SourceExample, split: str) -> Filled:
        self._stamps = []
        copy = self.folder / "images" / split / (example.name + PurePath(example.image.name).suffix)
        self._copy(example.image, copy)
        with errors_naming(example.image, copy):
            image = read_image(copy, self.value_range)
        content = copy.read_bytes()
        if self.value_range and read_values(copy)[0].dtype == np.uint8:
            self.unchanged += 1
        elif self.value_range:
            copy.unlink()
            write_image(copy.with_suffix(".png"), image, in_partial_folder=True)
        to = self.folder / "masks" / split / example.name
        size = image.shape[:2]
        if self.per_object:
            areas, parts = write_objects(to, self._read_objects(example, size), size), 1
        else:
            mask = self._copy_mask(example, to, size)
            areas = [float(mask.mean())] if mask.any() else []
            parts = cv2.connectedComponents(mask.astype(np.uint8))[0] - 1  # without background
        is_turned, thumbnail = orientation(content) != 1, make_thumbnail(image)
        stamps = tuple(self._stamps)
        return Filled(
            example.name, split, areas, parts, is_turned, stamps[0].sha256, thumbnail, stamps
        )

    def _copy(self, source: Path, copy: Path) -> None:
        """Copy a file of the user and keep its stamp, taken before, so that no change is missed."""
        stamp = stamp_file(source)
        self._stamps.append(stamp._replace(sha256=copy_file(source, copy)))

    def _copy_mask(self, example: SourceExample, to: Path, size: tuple[int, int]) -> np.ndarray:
        """Copy an example's only mask, rewritten in black and white if necessary; return it."""
        source = example.masks[0]
        copy = to.with_name(to.name + PurePath(source.name).suffix)
        self._copy(source, copy)
        with errors_naming(source, copy):
            mask = self.reader.read_binary(copy, source)
            require_equal_sizes(example.image, size, copy, mask.shape)
            if not is_read_as(copy, mask):
                copy.unlink()
                new = to.with_name(f"{to.name}.png")
                write_image(new, mask.astype(np.uint8) * 255, in_partial_folder=True)
        return mask

    def _read_objects(self, example: SourceExample, size: tuple[int, int]) -> Iterator[CroppedMask]:
        """Yield the masks of an example's objects, from outlines or mask files."""
        if example.annotated is not None:
            self._stamps.append(stamp_outlines(example.annotated))
            yield from map(crop_mask, example.annotated.masks(size))
            return
        for source in example.masks:
            copy = self.folder / f"mask{PurePath(source.name).suffix}"
            self._copy(source, copy)
            with errors_naming(source, copy):
                for mask in self.reader.read(copy, source):
                    require_equal_sizes(example.image, size, copy, mask.size)
                    yield mask
            copy.unlink()


def move_to_splits(folder: Path, split_of: dict[str, str]) -> None:
    """Move each image and mask in UNSPLIT to the folder of its split, or remove it (LEFT_OUT).

    split_of: the split of each name.
    """
    for kind in ("images", "masks"):
        unsplit = folder / kind / UNSPLIT
        for name, path in files_by_stem(unsplit, with_folders=kind == "masks").items():
            if split_of[name] == LEFT_OUT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            to = folder / kind / split_of[name]
            to.mkdir(exist_ok=True)
            path.rename(to / path.name)
        unsplit.rmdir()


@contextlib.contextmanager
def errors_naming(original: Path, copy: Path) -> Iterator[None]:
    """Make errors inside the block name the user's own file instead of its copy."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(copy), str(original))) from error


def copy_file(source: Path, copy: Path) -> str:
    """Copy a file, or a member of an archive up to its stated size; return the SHA-256."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as original, copy.open("wb") as file:
        while chunk := original.read(CHUNK_BYTES):  # in chunks; check_archive says why
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def is_read_as(file: Path, mask: np.ndarray) -> bool:
    """Return whether read_mask(file) already gives this HxW bool mask."""
    try:
        return np.array_equal(read_mask(file), mask)
    except UserError:
        return False


def write_objects(
    to: Path, masks: Iterable[np.ndarray | CroppedMask], size: tuple[int, int]
) -> list[float]:
    """Write the masks of an image's objects, cropped or HxW bool; return the area fraction of each.

    The result is a label map TO.png or, if objects overlap, TO.tif: several label maps, each object
    in the first one where it covers no other. Objects are numbered in order. Empty masks are left
    out.
    """
    maps, areas = [np.zeros(size, np.uint16)], []
    for mask in map(crop_mask, masks):
        if not mask.area:
            continue
        areas.append(mask.area / (size[0] * size[1]))
        if len(areas) > MAX_LABEL:
            raise UserError(f"{to.name} has more than {MAX_LABEL} objects; use smaller images")
        free = (page for page in maps if not page[mask.box][mask.crop].any())
        page = next(free, None)
        if page is None:
            page = np.zeros(size, np.uint16)
            maps.append(page)
        page[mask.box][mask.crop] = len(areas)
    depth = np.uint8 if len(areas) < 256 else np.uint16
    write_label_maps(to, [page.astype(depth) for page in maps])
    return areas
