"""What the values or colours of a mask file mean: an object, one class of several, many objects.

A mask that train_sam2_proper.py can read as it is needs none of this; see image_files.read_mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.basics.command_line import ArgumentParser, number, parse_range
from finetuning.basics.image_files import read_mask, read_values

SHOWN, MOST_CLASSES = 6, 1000  # values in a message; and where it makes sense to speak of values
Value = tuple[int, ...]  # a gray value (V,), or a colour (R,G,B)
WHITE = (255,)  # or 1: of masks that are read as they are


class OtherValue(UserError):
    """A value of a data set's masks means an object in one file, another value in another."""


@dataclass(frozen=True)
class MaskRule:
    """How the masks of a data set are to be read."""

    value: Value | None = None  # what is the object; None: what is not black, if it is one value
    each_value: bool = False  # is an object
    parts: bool = False  # each connected part is an object
    smallest_part: int = 20  # pixels
    ignored: Value | None = None  # what counts as background, such as void

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the usual rule, by name."""
        return {k: v for k, v in asdict(self).items() if v != getattr(MaskRule, k)}

    @property
    def gives_objects(self) -> bool:
        """Whether an image may have several objects."""
        return self.each_value or self.parts


class MaskReader:
    """Reads the masks of one data set, in which one value means one thing."""

    def __init__(self, rule: MaskRule) -> None:
        self.rule = rule
        self.dropped_parts = 0
        self._object_value: tuple[Value, Path] | None = None  # found, and where first

    def read(self, path: Path, source: Path) -> Iterable[np.ndarray]:
        """Return or yield the HxW bool masks of a file's objects; `source`: what it is a copy of.

        Raises UserError where the file is unreadable, or the rule does not say what it means.
        """
        masks = self._each_value(path) if self.rule.each_value else [self.read_binary(path, source)]
        return self._parts(masks) if self.rule.parts else masks

    def read_binary(self, path: Path, source: Path) -> np.ndarray:
        """Return the HxW bool mask of what is one object in a file; `source` as in read."""
        if self.rule.value is None and self.rule.ignored is None:
            try:
                mask = read_mask(path)
                if mask.any():
                    self._require_one_value(WHITE, path, source)
                return mask
            except OtherValue:
                raise
            except UserError as error:
                problem = error
        else:
            problem = None
        codes, values = read_codes(path, problem)
        if self.rule.value is not None:
            return codes == encode(self.rule.value)
        found = [value for value in values if any(value) and value != self.rule.ignored]
        if len(found) > MOST_CLASSES and problem:  # a photo, say
            raise problem
        if len(found) > 1:
            raise several_values(path, found)
        if not found:
            return np.zeros(codes.shape, bool)
        self._require_one_value(found[0], path, source)
        return codes == encode(found[0])

    def _require_one_value(self, value: Value, path: Path, source: Path) -> None:
        """Raise UserError where an earlier file has another value for its object."""
        first, where = self._object_value = self._object_value or (value, source)
        if value != first:
            here, there = (
                "255 (or 1)" if each == WHITE else describe(each) for each in (value, first)
            )
            raise OtherValue(
                f"{path} has {here} beside black, but {where} has {there}; "
                "choose one with --mask-value, or take each as an object with --classes"
            )

    def _each_value(self, path: Path) -> Iterator[np.ndarray]:
        codes, values = read_codes(path, None)
        for value in values:
            if any(value) and value != self.rule.ignored:
                yield codes == encode(value)

    def _parts(self, masks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for mask in masks:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            for part in range(1, count):
                if stats[part, cv2.CC_STAT_AREA] >= self.rule.smallest_part:
                    yield labels == part
                else:
                    self.dropped_parts += 1


def add_mask_options(parser: ArgumentParser) -> None:
    """Add what the values of masks and images mean."""
    masks = parser.add_argument_group("what masks and images hold")
    masks.add_argument(
        "--mask-value", type=parse_value, help='one value is the object: 3, or "48,112,32" (RGB)'
    )
    masks.add_argument("--instances", action="store_true", help="each value of a mask is an object")
    masks.add_argument(
        "--classes", action="store_true", help="each class of a mask is an object of its image"
    )
    masks.add_argument(
        "--parts", action="store_true", help="each connected part of a mask is an object"
    )
    masks.add_argument(
        "--smallest-part",
        type=number(int, at_least=1),
        default=20,
        help="smaller ones are left out, in pixels",
    )
    masks.add_argument(
        "--ignore-value", type=parse_value, help="counts as background, like void (255)"
    )
    masks.add_argument(
        "--value-range",
        type=parse_range,
        metavar='"low,high"',
        help="what is black and white in images of more than 8 bits (default: of each image, its "
        "own 0.5%% and 99.5%% percentiles)",
    )


def parse_value(text: str) -> Value:
    """Parse "3", or "48,112,32", as an argparse type."""
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    highest = {1: 65535, 3: 255}.get(len(numbers), -1)
    if not all(0 <= value <= highest for value in numbers):
        raise argparse.ArgumentTypeError(f'"{text}" is not like 3 or "48,112,32"')
    return decode(encode(tuple(numbers)))


def encode(value: Value) -> int:
    """Return one number for a gray value or a colour; a gray of 8 bits is a colour, too."""
    if len(value) == 3:
        red, green, blue = value
        return red << 16 | green << 8 | blue
    return value[0] * 0x010101 if value[0] < 256 else value[0] << 24


def decode(code: int) -> Value:
    """Return the value that encode made a number of: a gray value where it is gray."""
    if code >> 24:
        return (code >> 24,)
    red, green, blue = code >> 16, code >> 8 & 255, code & 255
    return (red,) if red == green == blue else (red, green, blue)


def read_codes(path: Path, problem: UserError | None) -> tuple[np.ndarray, list[Value]]:
    """Return a mask file's HxW codes, as encode makes them, and the values that it has.

    problem: with reading it as a binary mask, which is raised where the file has no exact values.
    """
    pixels, is_lossy = read_values(path)
    if (
        is_lossy
        or pixels.dtype not in (np.uint8, np.uint16)
        or (pixels.ndim == 3 and pixels.dtype != np.uint8)
    ):
        raise problem or UserError(
            f"{path} does not hold exact values (a JPEG, or not 8 or 16 bits); save it as PNG"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        is_clear = pixels[..., 3] == 0
        if is_clear.any() and (is_clear != ~pixels[..., :3].any(axis=2)).any():
            raise problem or UserError(
                f"{path} has a transparent part that is not black; save it without"
            )
    if pixels.ndim == 3:
        red, green, blue = np.moveaxis(pixels[..., :3], 2, 0).astype(np.uint32)
        codes = red << 16 | green << 8 | blue
    else:
        codes = np.array([encode((value,)) for value in range(int(pixels.max()) + 1)])[pixels]
    return codes, [decode(int(code)) for code in np.unique(codes)]


def describe(value: Value) -> str:
    """Return a value as --mask-value takes it."""
    return ",".join(map(str, value))


def several_values(path: Path, values: list[Value]) -> UserError:
    """Return the error for a mask with several values beside black."""
    shown = "; ".join(map(describe, values[:SHOWN])) + ("; ..." if len(values) > SHOWN else "")
    return UserError(
        f"{path} has {len(values)} values or colours beside black (a label map, or classes?): "
        f"{shown}; take each as an object "
        f'with --instances (or --classes), or one of them with --mask-value "{describe(values[0])}"'
    )
