"""What annotation files have in common: an image's entry, JSON fields, and errors told together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.annotations.outlines import Outline
from finetuning.basics.command_line import brief, brief_path, nfc
from finetuning.basics.files import read_file

# Reasons why an object has no outline
BOXES, CROWDS = "boxes without an outline", "crowd regions"
MARKS, OTHER_SHAPES = "points and lines", "shapes of other types"
TOO_FEW_POINTS = "outlines of fewer than three points"
SLIVERS = "have parts of fewer than three points, which are left out"
CUT_OUT = "have holes, which are cut out"
MOST_ERRORS = 10  # that are named at once
SUPPORTED_FORMATS = (
    "COCO (.json), SA-1B (a .json per image), YOLO segmentation (a folder of .txt), labelme (a "
    "folder of .json) and run lengths (.csv with ImageId,EncodedPixels) are read; export others, "
    'such as Pascal VOC XML or "CVAT for images" XML, as COCO'
)
JSON_TYPES = {
    dict: "an object in braces", list: "a list", str: "a text", int: "a whole number",
    (int, str): "a whole number or text",
}  # fmt: skip


class Errors:
    """The errors of annotation files, gathered so that the first ones are told at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather a UserError that ends the block."""
        try:
            yield
        except UserError as error:
            self.messages.append(str(error))

    def raise_all(self, folder: Path) -> None:
        """Raise UserError if there were errors; paths in it are below `folder`."""
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        places: dict[str, list[str]] = {}  # by what is wrong there, without the advice
        for message in self.messages[:MOST_ERRORS]:
            text = message.removeprefix(brief_path(folder)).lstrip("/\\:, ")
            place, _, problem = text.partition("; ")[0].rpartition(": ")
            places.setdefault(problem, []).append(place)
        if places:
            shown = "; ".join(
                f"{', '.join(filter(None, at))}: {what}" for what, at in places.items()
            )
            more = len(self.messages) - MOST_ERRORS
            raise UserError(
                f"{len(self.messages)} mistakes in {brief_path(folder)}: {shown.removeprefix(': ')}"
                + (f"; and {more} more" if more > 0 else "")
                + "; correct or delete these"
            )


class Entry(NamedTuple):
    """The annotations of one image.

    file_name: the image's name in the annotation file; None if it only follows from `source`.
    size: (H,W) stated in the annotation file, or None.
    source: the annotation file.
    objects: each object's class, and its outline or the reason why it has none.
    list_name: the name, such as train, of the list in which YOLO files name the image.
    """

    file_name: str | None
    size: tuple[int, int] | None
    source: Path
    objects: list[tuple[str, Outline | str]]
    list_name: str | None = None


def read_text(path: Path) -> str:
    """Return the text of a file; raise UserError unless it is UTF-8."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{brief_path(path)} is not text in UTF-8; save it as UTF-8"
        raise UserError(message) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise UserError if it is invalid."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = brief(str(error)) if isinstance(error, json.JSONDecodeError) else "too large"
        file = brief_path(path)
        message = f"{file} is not valid JSON ({reason}); export the annotations again"
        raise UserError(message) from error


def get_field(record: Any, key: str, kind: Any, where: str, optional: bool = False) -> Any:
    """Return a value, of one of JSON_TYPES, from a JSON object; None if optional and missing."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object in braces; export the annotations again")
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some tools write 640 as 640.0
    if not (isinstance(value, kind) or (optional and value is None)):
        what = "is missing" if value is None else f"is not {JSON_TYPES[kind]}"
        raise UserError(f'{where}: "{key}" {what}; export the annotations again')
    return nfc(value) if isinstance(value, str) else value


def stated_size(record: Any, height: str, width: str, where: str) -> tuple[int, int] | None:
    """Return the (H,W) stated in a JSON object, or None; some tools write 0 for unknown."""
    size = tuple(get_field(record, key, int, where, optional=True) for key in (height, width))
    if not all(0 <= (side or 0) < 1e9 for side in size):
        raise UserError(f"{where} has a negative or huge size; export the annotations again")
    return size if all(size) else None
