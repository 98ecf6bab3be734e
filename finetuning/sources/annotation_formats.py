"""Reading the formats of annotation tools: COCO, YOLO segmentation and labelme.

Label Studio, CVAT and Roboflow export these formats.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import cv2
import numpy as np
import yaml

from finetuning.basics.command_line import brief, brief_path, nfc, plain_number
from finetuning.basics.files import read_file
from finetuning.sources.outlines import Outline, parse_polygon, parse_rle

# Reasons why an object has no outline
BOXES, CROWDS = "boxes without an outline", "crowd regions"
MARKS, OTHER_SHAPES = "points and lines", "shapes of other types"
SUPPORTED_FORMATS = (
    'COCO (.json), YOLO segmentation (a folder "labels" of .txt) and labelme (a folder of .json) '
    'are read; export others, such as Pascal VOC XML or "CVAT for images" XML, as COCO'
)
JSON_TYPES = {
    dict: "an object in braces", list: "a list", str: "a text", int: "a whole number",
    (int, str): "a whole number or text",
}  # fmt: skip


class Entry(NamedTuple):
    """The annotations of one image.

    file_name: the image's name in the annotation file; None if it only follows from `source`.
    size: (H,W) stated in the annotation file, or None.
    source: the annotation file.
    objects: each object's class, and its outline or the reason why it has none.
    """

    file_name: str | None
    size: tuple[int, int] | None
    source: Path
    objects: list[tuple[str, Outline | str]]


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


def _field(record: Any, key: str, kind: Any, where: str, optional: bool = False) -> Any:
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


def _stated_size(record: Any, height: str, width: str, where: str) -> tuple[int, int] | None:
    """Return the (H,W) stated in a JSON object, or None; some tools write 0 for unknown."""
    size = tuple(_field(record, key, int, where, optional=True) for key in (height, width))
    if not all(0 <= (side or 0) < 1e9 for side in size):
        raise UserError(f"{where} has a negative or huge size; export the annotations again")
    return size if all(size) else None


def read_coco(path: Path, document: dict[str, Any]) -> tuple[list[Entry], set[str]]:
    """Return the entries and the class names of a COCO file (cocodataset.org/#format-data)."""
    file = brief_path(path)
    names: dict[int | str, str] = {}
    for index, category in enumerate(_field(document, "categories", list, file, True) or []):
        where = f"{file}: category {index + 1}"
        names[_field(category, "id", (int, str), where)] = _field(category, "name", str, where)
    entries: dict[int | str, Entry] = {}
    for index, record in enumerate(_field(document, "images", list, file)):
        where = f"{file}: image {index + 1}"
        image_id = _field(record, "id", (int, str), where)
        if image_id in entries:
            raise UserError(f"{where} has the id {brief(image_id)} of another; give each its own")
        size = _stated_size(record, "height", "width", where)
        entries[image_id] = Entry(_field(record, "file_name", str, where), size, path, [])
    for index, record in enumerate(_field(document, "annotations", list, file)):
        known = record.get("id", index + 1) if isinstance(record, dict) else index + 1
        where = f"{file}: annotation {brief(known)}"
        image_id = _field(record, "image_id", (int, str), where)
        category = _field(record, "category_id", (int, str), where)
        if image_id not in entries:
            raise UserError(f'{where}: no image {brief(image_id)} in "images"; export again')
        if names and category not in names:
            raise UserError(f'{where}: no {brief(category)} in "categories"; export again')
        outline = CROWDS if record.get("iscrowd") == 1 else _coco_outline(record, where)
        entries[image_id].objects.append((names.get(category, str(category)), outline))
    return list(entries.values()), set(names.values())


def _coco_outline(record: dict[str, Any], where: str) -> Outline | str:
    segmentation = record.get("segmentation")
    if segmentation in (None, [], [[]]):
        return BOXES
    if isinstance(segmentation, dict):
        return [parse_rle(segmentation, where)]
    if not isinstance(segmentation, list):
        raise UserError(f'{where}: "segmentation" is neither polygons nor RLE; export it again')
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    return [parse_polygon(numbers, where) for numbers in polygons]


def read_labelme(path: Path, document: dict[str, Any]) -> Entry:
    """Return the entry of a labelme file; shapes with the same label and group are one object."""
    file = brief_path(path)
    objects: list[tuple[str, Outline | str]] = []
    groups: dict[tuple[str, int | str], Outline] = {}
    for index, shape in enumerate(_field(document, "shapes", list, file)):
        where = f"{file}: shape {index + 1}"
        label = _field(shape, "label", str, where)
        group_id = _field(shape, "group_id", (int, str), where, optional=True)
        outline = _labelme_outline(shape, where)
        if group_id is not None and isinstance(outline, list):
            if (label, group_id) in groups:
                groups[label, group_id] += outline
                continue
            groups[label, group_id] = outline
        objects.append((label, outline))
    size = _stated_size(document, "imageHeight", "imageWidth", file)
    return Entry(_field(document, "imagePath", str, file, optional=True), size, path, objects)


def _labelme_outline(shape: dict[str, Any], where: str) -> Outline | str:
    kind = _field(shape, "shape_type", str, where, optional=True) or "polygon"
    if kind in ("point", "points", "line", "linestrip"):
        return MARKS
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        return OTHER_SHAPES
    points = _field(shape, "points", list, where)
    is_valid = all(isinstance(point, list) and len(point) == 2 for point in points)
    if not is_valid or (kind != "polygon" and len(points) not in (2, 4)):
        raise UserError(f'{where}: its "points" are not those of a {kind}; draw it again')
    if kind == "polygon" or len(points) == 4:
        return [parse_polygon([value for point in points for value in point], where)]
    # Two points: opposite corners, or the centre of a circle and a point on it
    numbers = [value for point in [*points, points[0]] for value in point]
    start, end = parse_polygon(numbers, where)[:2]
    if kind == "mask":
        mask = _labelme_mask(_field(shape, "mask", str, where), where)
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


def read_yolo(files: list[Path]) -> tuple[list[Entry], set[str]]:
    """Return the entries and the class names of YOLO segmentation files."""
    names = _yolo_names(files[0].parent.absolute())
    entries = []
    for file in files:
        objects = [
            _yolo_object(line, names, f"{brief_path(file)}, line {index + 1}")
            for index, line in enumerate(read_text(file).splitlines())
            if line.strip()
        ]
        entries.append(Entry(None, None, file, objects))
    return entries, set(names.values())


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
    polygon = parse_polygon(numbers, where)
    if polygon.min() < -1 or polygon.max() > 2:  # fractions may lie a little outside of 0 to 1
        raise UserError(
            f"{where} has coordinates in pixels; YOLO's are fractions of the image, from 0 to 1"
        )
    return label, [polygon]


def _yolo_names(folder: Path) -> dict[str, str]:
    """Return class names by number, from data.yaml or classes.txt in a folder or the two above."""
    for parent in (folder, *folder.parents[:2]):
        if (file := parent / "data.yaml").is_file():
            try:
                # The only loader that keeps every value a text
                content = yaml.load(read_text(file), yaml.BaseLoader)
            except (yaml.YAMLError, RecursionError) as error:
                raise UserError(f"{brief_path(file)} is not valid YAML; fix it") from error
            names = content.get("names") if isinstance(content, dict) else None
        elif (file := parent / "classes.txt").is_file():
            names = read_text(file).splitlines()
        else:
            continue
        items = enumerate(names) if isinstance(names, list) else getattr(names, "items", list)()
        return {str(number): nfc(str(name).strip()) for number, name in items}
    return {}
