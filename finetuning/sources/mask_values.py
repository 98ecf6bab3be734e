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
from finetuning.basics.cropped_masks import CroppedMask, value_masks
from finetuning.basics.image_files import read_mask
from finetuning.sources.label_maps import (
    MAX_VALUE,
    Pixels,
    Value,
    from_code,
    read_pixels,
    to_code,
)

LISTED_VALUES = 6  # in a message
MAX_CLASSES = 1000  # a file with more values is probably a photo, not a label map
SOFT_SHARE = 0.1  # of label maps whose edges look soft, above which they are refused
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
    def is_chosen(self) -> bool:
        """Whether the user said what the values of masks mean."""
        return bool(self.options.keys() - {"smallest_part"})

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
        self._label_maps = 0  # files whose values were looked at
        self._soft: list[Path] = []  # those whose edges are soft
        self._found: set[Value] = set()  # besides the background
        self._occurring: set[Value] = set()  # of the rule's own values

    def read(self, path: Path, source: Path) -> Iterable[CroppedMask]:
        """Return the masks of a file's objects; `path` is a copy of the user's `source`.

        Raises UserError if the file is unreadable, or the rule does not say what its values mean.
        Call check_edges after the last file.
        """
        if self.rule.each_value:
            masks = self._each_value(path, source)
        else:
            mask = self.read_binary(path, source)
            masks = [CroppedMask(mask, 0, 0, mask.shape)]
        return self._parts(masks) if self.rule.parts else masks

    def read_binary(self, path: Path, source: Path) -> np.ndarray:
        """Return the HxW bool mask of a file as one object; `source` as in read."""
        problem = None
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
        pixels = self._read_values(path, source, problem)
        if self.rule.value is not None:
            return pixels.where(self.rule.value)
        found = self._object_values(pixels)
        if len(found) > MAX_CLASSES and problem:
            raise problem
        if len(found) > 1:
            areas = pixels.area_values()
            is_soft = areas and pixels.soft_values()
            raise soft_edges([path], 1, areas) if is_soft else several_values(path, found)
        if not found:
            return np.zeros(pixels.codes.shape, bool)
        self._require_one_value(pixels.color(found[0]), path, source)
        return pixels.where(found[0])

    def check_values(self) -> None:
        """Raise UserError if none of the files that were read has a value that the user chose."""
        for name, value in (("mask", self.rule.value), ("ignore", self.rule.ignored)):
            if value and self._label_maps and value not in self._occurring:
                found = listed_values(sorted(self._found)) or "nothing"
                raise UserError(
                    f"none of the {self._label_maps} masks has the value of --{name}-value "
                    f"{value_text(value)}; besides the background, they have {found}"
                )

    def check_edges(self) -> None:
        """Raise UserError if several of the files that were read have soft edges; warn of few."""
        if len(self._soft) > SOFT_SHARE * self._label_maps:
            raise soft_edges(self._soft, self._label_maps, [])
        if self._soft:
            print(f"warning: {soft_edges(self._soft, self._label_maps, [])}")

    def _read_values(self, path: Path, source: Path, problem: UserError | None) -> Pixels:
        """Read the values of a file, and note what the checks need."""
        pixels, rule = read_pixels(path, problem), self.rule
        self._label_maps += 1
        if len(self._found) < MAX_CLASSES:
            self._found.update(pixels.values)
        self._occurring.update(v for v in (rule.value, rule.ignored) if v and pixels.where(v).any())
        if len(pixels.values) > 1:
            used = pixels.same(rule.value) if rule.value else self._object_values(pixels)
            if set(used) & set(pixels.soft_values()):
                self._soft.append(source)
        return pixels

    def _object_values(self, pixels: Pixels) -> list[Value]:
        """Return the values in a file, besides the background and what the user ignores."""
        ignored = pixels.same(self.rule.ignored) if self.rule.ignored else []
        return [value for value in pixels.values if value not in ignored]

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

    def _each_value(self, path: Path, source: Path) -> Iterator[CroppedMask]:
        pixels = self._read_values(path, source, None)
        if len(pixels.values) > MAX_CLASSES and len(pixels.values[-1]) == 3:
            raise UserError(
                f"{path} has {len(pixels.values)} colours, so it is a photo, or a mask that was "
                "once a JPEG; export the masks as PNG"
            )
        wanted = set(map(to_code, self._object_values(pixels)))
        for code, mask in value_masks(pixels.codes + 1):  # without 0, which may be an index here
            if code - 1 in wanted:
                yield mask

    def _parts(self, masks: Iterable[CroppedMask]) -> Iterator[CroppedMask]:
        for mask in masks:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.crop.astype(np.uint8))
            for part in range(1, count):
                x, y, width, height, area = stats[part].tolist()
                if area >= self.rule.smallest_part:
                    crop = labels[y : y + height, x : x + width] == part
                    yield CroppedMask(crop, mask.x + x, mask.y + y, mask.size)
                else:
                    self.dropped_parts += 1


def add_mask_options(parser: ArgumentParser) -> None:
    """Add the options that say what the values of masks and images mean."""
    masks = parser.add_argument_group("what masks and images hold")
    masks.add_argument(
        "--mask-value",
        type=parse_value,
        help='one value is the object: 3 (an index in files with a palette), or "48,112,32" (RGB)',
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
        "--ignore-value",
        type=parse_value,
        help="counts as background, like void (255); a number or colour as in --mask-value",
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
    highest = {1: MAX_VALUE, 3: 255}.get(len(numbers), -1)
    if not all(0 <= value <= highest for value in numbers):
        raise argparse.ArgumentTypeError(f'"{text}" is not like 3 or "48,112,32"')
    return from_code(to_code(tuple(numbers)))  # 3,3,3 becomes 3


def value_text(value: Value) -> str:
    """Return a value as typed for --mask-value."""
    return ",".join(map(str, value))


def several_values(path: Path, values: list[Value]) -> UserError:
    """Return the error for a mask with several values besides black."""
    void = ""
    if values[-1] == WHITE_VALUE:
        void = "; 255 is void in many data sets: then add --ignore-value 255"
    return UserError(
        f"{path} has {len(values)} values or colours besides black (a label map, or classes?): "
        f"{listed_values(values)}; take each as an object with --instances (or --classes), or one "
        f'of them with --mask-value "{value_text(values[0])}"{void}'
    )


def listed_values(values: list[Value]) -> str:
    texts = list(map(value_text, values))
    return "; ".join(texts[:LISTED_VALUES]) + ("; ..." if len(texts) > LISTED_VALUES else "")


def soft_edges(paths: list[Path], count: int, areas: list[Value]) -> UserError:
    """Return the error for label maps with soft edges, among `count` that were read.

    areas: the values of a single file that are not in the edges.
    """
    which = f"{len(paths)} of {count} masks have soft edges, such as {paths[0]}"
    if areas:
        which = f"{paths[0]} has areas of {listed_values(areas)} and soft edges"
    return UserError(
        f"{which}: rings of other values around the objects, from resizing with interpolation, "
        "anti-aliasing or a JPEG; export the masks again, and resize them with nearest neighbour"
    )
