"""Reading the formats of annotation tools: labelme and YOLO segmentation; COCO in coco_format.

Label Studio, CVAT and Roboflow export these formats.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sam2_utils import UserError

import cv2
import numpy as np
import yaml

from finetuning.annotations.outlines import Hole, Outline, Part, cut_out, parse_polygon
from finetuning.basics.command_line import brief, brief_path, nfc, plain_number
from finetuning.basics.files import read_file
from finetuning.basics.image_files import IMAGE_SUFFIXES

# Reasons why an object has no outline
BOXES, CROWDS = "boxes without an outline", "crowd regions"
MARKS, OTHER_SHAPES = "points and lines", "shapes of other types"
TOO_FEW_POINTS = "outlines of fewer than three points"
SLIVERS = "have parts of fewer than three points, which are left out"
CUT_OUT = "have holes, which are cut out"
HOLE_LABELS = {"_background_", "__ignore__"}  # labelme's own words for what is no object
MOST_ERRORS = 10  # that are named at once
NAMES_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels", "labels.txt")
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


def read_labelme(path: Path, document: dict[str, Any], errors: Errors) -> Entry:
    """Return the entry of a labelme file; shapes with the same label and group are one object.

    Shapes called _background_ or __ignore__ are cut out of the objects drawn before them, and
    those that X-AnyLabeling marks as difficult, out of the objects of their group.
    """
    file = brief_path(path)
    objects: list[tuple[str, list[Part | Hole] | str]] = []
    groups: dict[tuple[str, int | str], list[Part | Hole]] = {}
    difficult: list[tuple[str, int | str, list[Part | Hole]]] = []
    for index, shape in enumerate(get_field(document, "shapes", list, file)):
        with errors.gathered():
            where = f"{file}: shape {index + 1}"
            label = get_field(shape, "label", str, where)
            group_id = get_field(shape, "group_id", (int, str), where, optional=True)
            parts = _labelme_parts(shape, where)
            if label in HOLE_LABELS:
                cut_out(parts, [drawn for _, drawn in objects])
            elif isinstance(parts, str) or group_id is None:
                objects.append((label, parts))
            elif shape.get("difficult") is True:
                difficult.append((label, group_id, parts))
            else:
                _add_to_group(label, group_id, parts, groups, objects)
    in_groups = list(groups.items())
    for label, group_id, parts in difficult:
        if around := [drawn for (_, other), drawn in in_groups if other == group_id]:
            cut_out(parts, around)
        else:
            _add_to_group(label, group_id, parts, groups, objects)
    size = stated_size(document, "imageHeight", "imageWidth", file)
    name = get_field(document, "imagePath", str, file, optional=True)
    return Entry(name, size, path, [(label, _to_outline(parts)) for label, parts in objects])


def _add_to_group(
    label: str,
    group_id: int | str,
    parts: list[Part | Hole],
    groups: dict[tuple[str, int | str], list[Part | Hole]],
    objects: list[tuple[str, list[Part | Hole] | str]],
) -> None:
    """Add parts to the object of a label and group, or add a new object."""
    if (label, group_id) in groups:
        groups[label, group_id] += parts
    else:
        groups[label, group_id] = parts
        objects.append((label, parts))


def _to_outline(parts: list[Part | Hole] | str) -> Outline | str:
    if isinstance(parts, str):
        return parts
    return Outline(parts, (CUT_OUT,) if any(isinstance(part, Hole) for part in parts) else ())


def _labelme_parts(shape: dict[str, Any], where: str) -> list[Part | Hole] | str:
    """Return what a shape draws, or the reason why it draws nothing."""
    kind = get_field(shape, "shape_type", str, where, optional=True) or "polygon"
    if kind in ("point", "points", "line", "linestrip"):
        return MARKS
    if kind not in ("polygon", "rectangle", "rotation", "circle", "mask"):
        return OTHER_SHAPES
    points = get_field(shape, "points", list, where)
    is_valid = all(isinstance(point, list) and len(point) == 2 for point in points)
    if not is_valid or (kind != "polygon" and len(points) not in (2, 4)):
        raise UserError(f'{where}: its "points" are not those of a {kind}; draw it again')
    if kind == "polygon" and len(points) < 3:
        return TOO_FEW_POINTS
    if kind == "polygon" or len(points) == 4:
        return [parse_polygon([value for point in points for value in point], where)]
    # Two points: opposite corners, or the centre of a circle and a point on it
    numbers = [value for point in [*points, points[0]] for value in point]
    start, end = parse_polygon(numbers, where)[:2]
    if kind == "mask":
        mask = _labelme_mask(get_field(shape, "mask", str, where), where)
        return [(mask, *np.trunc(start).clip(-1e6, 1e6).astype(int).tolist())]
    if kind == "rectangle":
        return [np.array([start, (end[0], start[1]), end, (start[0], end[1])])]
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)  # deviates by 0.06% of the radius
    return [start + math.dist(start, end) * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _labelme_mask(text: str, where: str) -> np.ndarray:
    """Decode a base64 PNG to an HxW bool mask."""
    try:
        content = np.frombuffer(base64.b64decode(text), np.uint8)
        mask = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)
    except (ValueError, cv2.error):
        mask = None
    if mask is None:
        raise UserError(f'{where}: its "mask" is not a PNG in base64; draw it again')
    return mask > 0


def read_yolo(files: list[Path], errors: Errors) -> tuple[list[Entry], set[str], list[Path]]:
    """Return the entries and class names of YOLO segmentation files, and the files of plain text.

    Lists of images, such as train.txt, are neither.
    """
    names = _yolo_names(files[0].parent.absolute()) if files else {}
    entries, lists, others = [], {}, []
    for file in files:
        with errors.gathered():
            lines = [line.strip() for line in read_text(file).splitlines()]
            first = next(filter(None, lines), "0")
            if _is_image_name(first):
                paths = [line.replace("\\", "/") for line in lines]
                lists |= {PurePath(path).stem: file.stem for path in paths}
            elif not first[0].isdigit():
                others.append(file)
            else:
                entries.append(Entry(None, None, file, []))
                _read_yolo_lines(entries[-1], lines, names, errors)
    entries = [entry._replace(list_name=lists.get(entry.source.stem)) for entry in entries]
    return entries, set(names.values()), others


def _read_yolo_lines(entry: Entry, lines: list[str], names: dict[str, str], errors: Errors) -> None:
    """Add the objects in the lines of a file to its entry."""
    for index, line in enumerate(lines):
        with errors.gathered():
            if line:
                where = f"{brief_path(entry.source)}, line {index + 1}"
                entry.objects.append(_yolo_object(line, names, where))


def is_yolo(file: Path) -> bool:
    """Return whether the first line of a text file is one of YOLO's."""
    try:
        line = next(filter(str.strip, read_text(file).splitlines()), "")
        return len(line.split()) > 4 and bool(_yolo_object(line, {}, ""))
    except UserError:
        return False


def _is_image_name(line: str) -> bool:
    return PurePath(line.strip().replace("\\", "/")).suffix.lower() in IMAGE_SUFFIXES


def _yolo_object(line: str, names: dict[str, str], where: str) -> tuple[str, Outline | str]:
    """Parse a line: a class number, then x1 y1 x2 y2 ... in fractions of the image.

    Four numbers are a box: its centre and its size.
    """
    try:
        class_number, *numbers = map(plain_number, line.split())
        label = str(int(class_number))
        if class_number < 0 or class_number % 1:
            raise ValueError(line)
    except (ValueError, OverflowError) as error:
        message = f"{where} is not a class number and numbers; {SUPPORTED_FORMATS}"
        raise UserError(message) from error
    label = names.get(label, label)
    if len(numbers) == 4:
        return label, BOXES
    if len(numbers) in (0, 2):
        return label, TOO_FEW_POINTS
    polygon = parse_polygon(numbers, where)
    if polygon.min() < -1 or polygon.max() > 2:  # fractions may lie a little outside of 0 to 1
        raise UserError(
            f"{where} has coordinates in pixels; YOLO's are fractions of the image, from 0 to 1"
        )
    return label, Outline([polygon])


def _yolo_names(folder: Path) -> dict[str, str]:
    """Return class names by number, from a file like data.yaml in a folder or the two above."""
    for parent in (folder, *folder.parents[:2]):
        names: Any = None
        files = [parent / "data.yaml", *sorted(parent.glob("*.y*ml"))]
        files += [parent / name for name in NAMES_FILES]
        for file in filter(Path.is_file, files):
            is_yaml = file.name not in NAMES_FILES
            if names := _read_yaml(file) if is_yaml else read_text(file).splitlines():
                break
        if names:
            items = enumerate(names) if isinstance(names, list) else getattr(names, "items", list)()
            return {str(number): nfc(str(name).strip()) for number, name in items}
    return {}


def _read_yaml(file: Path) -> Any:
    """Return the names in a YAML file, or None."""
    try:
        content = yaml.load(read_text(file), yaml.BaseLoader)  # the only one that keeps texts
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{brief_path(file)} is not valid YAML; fix it") from error
    return content.get("names") if isinstance(content, dict) else None
