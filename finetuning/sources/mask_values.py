"""What the values or colours of a mask file mean: one object, one of several classes, or instances.

Black and white masks need none of this; see read_mask in basics/image_files.
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

LISTED_VALUES = 6  # in a message
MAX_CLASSES = 1000  # a file with more values is probably a photo, not a label map
Value = tuple[int, ...]  # a gray value (V,), or a colour (R,G,B)
WHITE_VALUE = (255,)  # stands for 1 as well: the object in black and white masks


class InconsistentValues(UserError):
    """Two mask files of a data set have different values for the object."""


@dataclass(frozen=True)
class MaskRule:
    """How to read the masks of a data set."""

    value: Value | None = None  # of the object; None: the one value besides black
    each_value: bool = False  # whether each value is an object
    parts: bool = False  # whether each connected part is an object
    smallest_part: int = 20  # pixels; smaller parts are left out
    ignored: Value | None = None  # a value that counts as background, such as void

    @property
    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        return {k: v for k, v in asdict(self).items() if v != getattr(MaskRule, k)}

    @property
    def gives_objects(self) -> bool:
        """Whether an image may have several objects."""
        return self.each_value or self.parts


class MaskReader:
    """Reads the masks of one data set, in which the object's value must not change."""

    def __init__(self, rule: MaskRule) -> None:
        self.rule = rule
        self.dropped_parts = 0
        self._object_value: tuple[Value, Path] | None = None  # and the first file that has it

    def read(self, path: Path, source: Path) -> Iterable[np.ndarray]:
        """Return the HxW bool masks of a file's objects; `path` is a copy of the user's `source`.

        Raises UserError if the file is unreadable, or the rule does not say what its values mean.
        """
        masks = self._each_value(path) if self.rule.each_value else [self.read_binary(path, source)]
        return self._parts(masks) if self.rule.parts else masks

    def read_binary(self, path: Path, source: Path) -> np.ndarray:
        """Return the HxW bool mask of a file as one object; `source` as in read."""
        if self.rule.value is None and self.rule.ignored is None:
            try:
                mask = read_mask(path)
                if mask.any():
                    self._require_one_value(WHITE_VALUE, path, source)
                return mask
            except InconsistentValues:
                raise
            except UserError as error:
                problem = error  # perhaps a mask in another colour or gray value
        else:
            problem = None
        codes, values = read_codes(path, problem)
        if self.rule.value is not None:
            return codes == to_code(self.rule.value)
        found = [value for value in values if any(value) and value != self.rule.ignored]
        if len(found) > MAX_CLASSES and problem:
            raise problem
        if len(found) > 1:
            raise several_values(path, found)
        if not found:
            return np.zeros(codes.shape, bool)
        self._require_one_value(found[0], path, source)
        return codes == to_code(found[0])

    def _require_one_value(self, value: Value, path: Path, source: Path) -> None:
        """Raise InconsistentValues if an earlier file has another value for its object."""
        first, where = self._object_value = self._object_value or (value, source)
        if value != first:
            here, there = (
                "255 (or 1)" if each == WHITE_VALUE else value_text(each) for each in (value, first)
            )
            raise InconsistentValues(
                f"{path} has {here} besides black, but {where} has {there}; "
                "choose one with --mask-value, or take each as an object with --classes"
            )

    def _each_value(self, path: Path) -> Iterator[np.ndarray]:
        codes, values = read_codes(path, None)
        for value in values:
            if any(value) and value != self.rule.ignored:  # black is background
                yield codes == to_code(value)

    def _parts(self, masks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for mask in masks:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            for part in range(1, count):
                if stats[part, cv2.CC_STAT_AREA] >= self.rule.smallest_part:
                    yield labels == part
                else:
                    self.dropped_parts += 1


def add_mask_options(parser: ArgumentParser) -> None:
    """Add the options that say what the values of masks and images mean."""
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
        help="what is black and white in images of more than 8 bits, in their units, such as HU "
        "(default: the 0.5%% and 99.5%% percentiles of each image, or of all volumes)",
    )


def parse_value(text: str) -> Value:
    """Parse "3", or "48,112,32", as an argparse type."""
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    highest = {1: 65535, 3: 255}.get(len(numbers), -1)
    if not all(0 <= value <= highest for value in numbers):
        raise argparse.ArgumentTypeError(f'"{text}" is not like 3 or "48,112,32"')
    return from_code(to_code(tuple(numbers)))  # 3,3,3 becomes 3


def to_code(value: Value) -> int:
    """Return one integer for a gray value or a colour; an 8-bit gray has its colour's code."""
    if len(value) == 3:
        red, green, blue = value
        return red << 16 | green << 8 | blue
    return value[0] * 0x010101 if value[0] < 256 else value[0] << 24


def from_code(code: int) -> Value:
    """Return the gray value or colour that has this code; a gray colour becomes a gray value."""
    if code >> 24:
        return (code >> 24,)
    red, green, blue = code >> 16, code >> 8 & 255, code & 255
    return (red,) if red == green == blue else (red, green, blue)


def read_codes(path: Path, problem: UserError | None) -> tuple[np.ndarray, list[Value]]:
    """Return the HxW codes of a mask file (see to_code), and the values that occur in it.

    problem: why it is not a binary mask; raised if the file has no exact values either.
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
    # A transparent part is background if it is exactly what is black; otherwise it is ambiguous
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        is_clear = pixels[..., 3] == 0
        if is_clear.any() and (is_clear != ~pixels[..., :3].any(axis=2)).any():
            raise problem or UserError(
                f"{path} has a transparent part that is not black; save it without transparency"
            )
    if pixels.ndim == 3:
        red, green, blue = np.moveaxis(pixels[..., :3], 2, 0).astype(np.uint32)
        codes = red << 16 | green << 8 | blue
    else:
        codes = np.array([to_code((value,)) for value in range(int(pixels.max()) + 1)])[pixels]
    return codes, [from_code(int(code)) for code in np.unique(codes)]


def value_text(value: Value) -> str:
    """Return a value as typed for --mask-value."""
    return ",".join(map(str, value))


def several_values(path: Path, values: list[Value]) -> UserError:
    """Return the error for a mask with several values besides black."""
    texts = list(map(value_text, values))
    shown = "; ".join(texts[:LISTED_VALUES]) + ("; ..." if len(texts) > LISTED_VALUES else "")
    return UserError(
        f"{path} has {len(values)} values or colours besides black (a label map, or classes?): "
        f"{shown}; take each as an object "
        f'with --instances (or --classes), or one of them with --mask-value "{texts[0]}"'
    )
