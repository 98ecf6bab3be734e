"""Outlines of objects: polygons, run lengths and masks, checked and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief, brief_path

# A polygon (Nx2 float in (X,Y), in pixels or fractions of the image), COCO's RLE dict, a text of
# run lengths (parse_run_lengths), or (mask, x, y): an HxW bool mask and its upper left corner.
Part = np.ndarray | dict[str, Any] | str | tuple[np.ndarray, int, int]

# In pixels: pycocotools' C code takes 50 bytes for each, and checks no limits
LONGEST_OUTLINE = 2_000_000
SKEW = 0.02  # of a rectangle's diagonals: by how much rounded corners may miss a rectangle


@dataclass(frozen=True)
class Hole:
    """What is cut out of the parts that come before it."""

    part: Part


class Outline(NamedTuple):
    """An object: the union of its parts, in their order, without the holes.

    remarks: what the user is told about the object, such as "have holes, which are cut out".
    """

    parts: list[Part | Hole]
    remarks: tuple[str, ...] = ()


class AnnotatedImage(NamedTuple):
    """An image file and the outlines of its objects.

    size: (H,W) stated in the annotation file, or None.
    source: the annotation file.
    has_fractions: polygons are in fractions of the image, not in pixels.
    split: "train", "val" or "test" if the folders or files name it.
    """

    image: Path
    outlines: list[Outline]
    size: tuple[int, int] | None
    source: Path
    has_fractions: bool = False
    split: str | None = None

    def masks(self, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the HxW bool mask of each object, for an image of `size` (H,W).

        Parts outside the image are cut off, so a mask may be empty. Raises UserError if the
        annotations are for an image of another size.
        """
        if self.size not in (None, size):
            refuse_size(self.image, self.source, self.size, size)
        source = brief_path(self.source)
        for number, outline in enumerate(self.outlines, start=1):
            for part in outline.parts:
                if isinstance(part, dict) and tuple(part["size"]) != size:
                    refuse_size(self.image, self.source, tuple(part["size"]), size)
            where = f"{source}: object {number} of {brief(self.image.name)}"
            yield draw_outline(outline, size, self.has_fractions, where)


def parse_polygon(numbers: Any, where: str) -> np.ndarray:
    """Convert a list x1, y1, x2, y2, ... of at least three points to an Nx2 float polygon."""
    try:
        if not all(type(value) in (int, float) for value in numbers):  # bool is not a number here
            raise TypeError
        coords = np.array(numbers, np.float64)
    except (TypeError, ValueError, OverflowError):
        coords = np.array([np.nan])
    if not (np.abs(coords) < 1e9).all():
        raise UserError(
            f"{where}: an outline has coordinates that are not numbers, or huge; draw it again"
        )
    if coords.size % 2 or coords.size < 6:
        raise UserError(
            f"{where}: an outline has {coords.size} coordinates, not two for each of three or "
            "more points; draw it again"
        )
    return coords.reshape(-1, 2)


def parse_rle(rle: dict[str, Any], where: str) -> dict[str, Any]:
    """Check that a COCO RLE's runs fill its size: pycocotools' C code does not check."""
    size, counts = rle.get("size"), rle.get("counts")
    try:
        runs = _decode_runs(counts) if isinstance(counts, str) else counts
        is_valid = all(type(n) is int and n >= 0 for n in [*size, *runs]) and len(size) == 2
        is_valid = is_valid and 0 < size[0] * size[1] == sum(runs)
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(f'{where}: the "counts" of its RLE do not fill its "size"; export it again')
    return {"size": list(size), "counts": counts}


def _decode_runs(text: str) -> list[int]:
    """Return the run lengths in a compressed RLE, as pycocotools' rleFrString reads them.

    Raises ValueError where that function would read past the end of the text.
    """
    # Each character holds 5 bits of a number, lowest first, and a bit if more follow. From the
    # fourth on, a number is the difference from the run two before.
    runs: list[int] = []
    value = shift = 0
    for char in text:
        bits = ord(char) - 48
        if not 0 <= bits < 64 or shift > 25:
            raise ValueError(text)
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(text)
    return runs


def parse_run_lengths(text: str, where: str) -> list[int]:
    """Return the lengths of background and object by turns, from a text "start length ...".

    Pixels count from 1, column by column, as in Kaggle's tables. COCO's runs are these and a last
    one, which fills the image.
    """
    numbers = text.split()
    if len(numbers) % 2 or not all(part.isascii() and part.isdigit() for part in numbers):
        raise UserError(f'{where}: expected pairs of whole numbers, "start length start length"')
    if any(len(part) > 12 for part in numbers):
        raise UserError(f"{where}: the run lengths have a number of more than 12 digits")
    starts, lengths = np.array(numbers, np.int64).reshape(-1, 2).T
    gaps = np.diff(starts, prepend=1) - np.concatenate([[0], lengths[:-1]])
    if (starts < 1).any():
        raise UserError(f"{where}: a run starts at pixel 0; count the pixels from 1")
    if (gaps < 0).any() or not lengths.all():
        raise UserError(
            f"{where}: the runs overlap, are out of order or empty; "
            'expected "start length" pairs that count from the first pixel of the image'
        )
    return np.stack([gaps, lengths], axis=1).ravel().tolist()


def cut_out(holes: list[Part] | str, objects: list[list[Part | Hole] | str]) -> None:
    """Cut holes out of the objects that they may overlap."""
    if isinstance(holes, str):
        return
    for hole in holes:
        start, end = _bounds(hole)
        for parts in objects:
            if isinstance(parts, str):
                continue
            corners = [_bounds(part) for part in parts if not isinstance(part, Hole)]
            if any((low < end).all() and (start < high).all() for low, high in corners):
                parts.append(Hole(hole))


def _bounds(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper left and lower right corners (X,Y) of a polygon or a placed mask."""
    if isinstance(part, tuple):
        mask, x, y = part
        return np.array([x, y]), np.array([x + mask.shape[1], y + mask.shape[0]])
    return part.min(axis=0), part.max(axis=0)


def is_rectangle(outline: Outline) -> bool:
    """Return whether an outline is one polygon of four corners with parallel opposite sides."""
    if len(outline.parts) != 1 or not isinstance(polygon := outline.parts[0], np.ndarray):
        return False
    corners = polygon[:-1] if np.array_equal(polygon[0], polygon[-1]) else polygon
    if len(corners) != 4:
        return False
    diagonals = corners[2:] - corners[:2]
    skew = corners[0] + corners[2] - corners[1] - corners[3]
    return bool(np.abs(skew).max() <= SKEW * np.abs(diagonals).sum())


def draw_outline(
    outline: Outline, size: tuple[int, int], has_fractions: bool, where: str
) -> np.ndarray:
    """Draw an outline as an HxW bool mask, for an image of `size` (H,W).

    has_fractions: polygons are in fractions of the image. RLEs must have that size. Raises
    UserError, which begins with `where`, if a part cannot be drawn.
    """
    from pycocotools import mask as coco_mask

    mask = None
    try:
        for is_hole, parts in itertools.groupby(outline.parts, lambda part: isinstance(part, Hole)):
            rles = [
                rle
                for part in parts
                for rle in _to_rles(part.part if is_hole else part, size, has_fractions, where)
            ]
            drawn = coco_mask.decode(coco_mask.merge(rles)).astype(bool, order="C")
            if mask is None:
                mask = drawn & (not is_hole)
            else:
                mask = mask & ~drawn if is_hole else mask | drawn
        return mask
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pycocotools raises nothing more precise
        message = f"{where} cannot be drawn ({brief(str(error))}); draw it again"
        raise UserError(message) from error


def _to_rles(
    part: Part, size: tuple[int, int], has_fractions: bool, where: str
) -> list[dict[str, Any]]:
    """Return a part as compressed RLEs of pycocotools, for an image of `size` (H,W)."""
    from pycocotools import mask as coco_mask

    if isinstance(part, np.ndarray):
        polygon = part * size[::-1] if has_fractions else part
        _check_polygon(polygon, size, where)
        return coco_mask.frPyObjects([polygon.ravel().tolist()], *size)
    if isinstance(part, tuple):
        return [coco_mask.encode(_place(*part, size))]
    if isinstance(part, str):
        runs, pixels = parse_run_lengths(part, where), size[0] * size[1]
        if sum(runs) > pixels:
            raise UserError(
                f"{where}: its runs end at pixel {sum(runs)}, but the image, {size[1]}x{size[0]}, "
                f"has {pixels}; check that this is the image that was annotated"
            )
        part = {"size": list(size), "counts": [*runs, pixels - sum(runs)]}
    return [part if isinstance(part["counts"], str) else coco_mask.frPyObjects(part, *size)]


def _check_polygon(polygon: np.ndarray, size: tuple[int, int], where: str) -> None:
    """Raise UserError for polygons that would fill the memory: in other units, or too long."""
    sides = np.array(size[::-1])
    if (polygon < -sides).any() or (polygon > 2 * sides).any():
        raise UserError(
            f"{where} lies far outside of the image, {sides[0]}x{sides[1]}; check that this is "
            "the image that was annotated"
        )
    steps = np.abs(polygon - np.roll(polygon, 1, axis=0)).max(axis=1)
    if steps.sum() > LONGEST_OUTLINE:
        raise UserError(f"{where} has an outline of {steps.sum():.0f} pixels; draw it simpler")


def _place(mask: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """Return an HxW uint8 canvas with a mask at (x,y), cut off at its borders."""
    canvas = np.zeros(size, np.uint8, order="F")  # column by column, as pycocotools needs it
    inside = mask[max(-y, 0) : max(size[0] - y, 0), max(-x, 0) : max(size[1] - x, 0)]
    top, left = max(y, 0), max(x, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def refuse_size(
    image: Path, source: Path, stated: tuple[int, int], size: tuple[int, int]
) -> NoReturn:
    """Raise UserError: an image has `size` (H,W), but its annotations state another."""
    is_transposed = stated == size[::-1]
    raise UserError(
        f"{brief_path(image)} is {size[1]}x{size[0]} but {brief_path(source)} "
        f"states {stated[1]}x{stated[0]}; "
        + ("the EXIF orientation of the photo may be the cause: " if is_transposed else "")
        + "annotate the image as it is now"
    )
