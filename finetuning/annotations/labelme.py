"""Reading labelme files: shapes, groups and holes, also as X-AnyLabeling writes them."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.annotations.formats import (
    CUT_OUT,
    MARKS,
    OTHER_SHAPES,
    TOO_FEW_POINTS,
    Entry,
    Errors,
    get_field,
    stated_size,
)
from finetuning.annotations.outlines import Hole, Outline, Part, cut_out, parse_polygon
from finetuning.basics.command_line import brief_path

HOLE_LABELS = {"_background_", "__ignore__"}  # labelme's own words for what is no object


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
