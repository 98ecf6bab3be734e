"""Reading run lengths and polygons of objects: COCO, SA-1B, and Kaggle's tables.

COCO: cocodataset.org/#format-data. SA-1B, which SAM 2 itself was trained on, has a JSON per image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.annotations.formats import (
    BOXES,
    CROWDS,
    CUT_OUT,
    SLIVERS,
    TOO_FEW_POINTS,
    Entry,
    Errors,
    get_field,
    stated_size,
)
from finetuning.annotations.outlines import (
    Hole,
    Outline,
    parse_polygon,
    parse_rle,
    parse_run_lengths,
)
from finetuning.basics.command_line import brief, brief_path, nfc
from finetuning.basics.csv_files import read_table

CROWDS_USED = "are run lengths with iscrowd 1, as CVAT writes its masks, and are used"
FILLED = (
    "warning: {} have an outline inside an outline, which is filled: "
    'it is cut out as a hole only if "area" says so'
)
OTHER_AREA = (
    'warning: {} cover another area than their "area" states (holes? another image size?): '
    "check them in overview.png"
)
ONE_CLASS = "object"  # the class where a format names none
# By how much a drawn area may differ from the stated one: a share of it, and pixels of the border
AREA_SHARE, AREA_BORDER = 0.2, 0.5
IMAGE_COLUMNS = ("imageid", "image_id", "img", "image", "id", "filename")
CLASS_COLUMNS = ("imageid_classid", "image_label")  # the image and the class, as in a.jpg_1
RUNS_COLUMNS = ("encodedpixels", "rle_mask", "rle", "encoding", "encoded_pixels")
NO_RUNS = {"", "-1", "nan", "none"}


def read_coco(path: Path, document: dict[str, Any], errors: Errors) -> tuple[list[Entry], set[str]]:
    """Return the entries and the class names of a COCO file."""
    file = brief_path(path)
    names: dict[int | str, str] = {}
    for index, category in enumerate(get_field(document, "categories", list, file, True) or []):
        where = f"{file}: category {index + 1}"
        names[get_field(category, "id", (int, str), where)] = get_field(
            category, "name", str, where
        )
    entries: dict[int | str, Entry] = {}
    for index, record in enumerate(get_field(document, "images", list, file)):
        where = f"{file}: image {index + 1}"
        image_id = get_field(record, "id", (int, str), where)
        if image_id in entries:
            raise UserError(f"{where} has the id {brief(image_id)} of another; give each its own")
        size = stated_size(record, "height", "width", where)
        entries[image_id] = Entry(get_field(record, "file_name", str, where), size, path, [])
    use_crowds = _uses_crowds(document)
    for index, record in enumerate(get_field(document, "annotations", list, file)):
        with errors.gathered():
            known = record.get("id", index + 1) if isinstance(record, dict) else index + 1
            where = f"{file}: annotation {brief(known)}"
            image_id = get_field(record, "image_id", (int, str), where)
            category = get_field(record, "category_id", (int, str), where)
            if image_id not in entries:
                raise UserError(f'{where}: no image {brief(image_id)} in "images"; export again')
            if names and category not in names:
                raise UserError(f'{where}: no {brief(category)} in "categories"; export again')
            outline = _parse_object(record, where, use_crowds)
            entries[image_id].objects.append((names.get(category, str(category)), outline))
    return list(entries.values()), set(names.values())


def _uses_crowds(document: dict[str, Any]) -> bool:
    """Return whether run lengths with iscrowd 1 are objects, and not regions full of objects.

    CVAT writes every mask as a crowd. COCO's own crowds are the only run lengths in their files,
    too, but those files name their origin.
    """
    records = document["annotations"] if isinstance(document["annotations"], list) else []
    info = document.get("info")
    origin = f"{info.get('url')} {info.get('description')}" if isinstance(info, dict) else ""
    return "cocodataset" not in origin and all(
        record.get("iscrowd") == 1
        for record in records
        if isinstance(record, dict) and isinstance(record.get("segmentation"), dict)
    )


def _parse_object(record: dict[str, Any], where: str, use_crowds: bool) -> Outline | str:
    """Return the outline of a COCO or SA-1B annotation, or the reason why it has none."""
    segmentation = record.get("segmentation")
    is_rle, is_crowd = isinstance(segmentation, dict), record.get("iscrowd") == 1
    if is_crowd and not (is_rle and use_crowds):
        return CROWDS
    if segmentation in (None, [], [[]]):
        return BOXES
    if is_rle:
        return Outline([parse_rle(segmentation, where)], (CROWDS_USED,) if is_crowd else ())
    if not isinstance(segmentation, list):
        raise UserError(f'{where}: "segmentation" is neither polygons nor RLE; export it again')
    given = segmentation if isinstance(segmentation[0], list) else [segmentation]
    # Like detectron2, leave out parts that are no area
    parts = [part for part in given if not isinstance(part, list) or len(part) not in (0, 2, 4)]
    if not parts:
        return TOO_FEW_POINTS
    outline = _with_holes([parse_polygon(part, where) for part in parts], record)
    if len(parts) < len(given):
        outline = outline._replace(remarks=(*outline.remarks, SLIVERS))
    return outline


def _with_holes(polygons: list[np.ndarray], record: dict[str, Any]) -> Outline:
    """Return the outline of one object's polygons, compared with the area that its record states.

    A polygon inside another is a hole if that agrees with the stated area; otherwise it is
    filled, as COCO's own tools do.
    """
    stated = record.get("area")
    is_stated = type(stated) in (int, float) and 1 < stated < 1e12  # many tools write 0
    areas = list(map(_area, polygons))
    if len(polygons) == 1 and (not is_stated or abs(stated - areas[0]) < AREA_SHARE * areas[0]):
        return Outline(polygons)  # nearly all objects
    order = sorted(range(len(areas)), key=lambda i: -areas[i])
    polygons, areas = [polygons[i] for i in order], [areas[i] for i in order]
    # A polygon inside an odd number of others would be a hole
    depths = _depths(polygons)
    filled = sum(area for area, depth in zip(areas, depths, strict=True) if not depth)
    cut = sum(-area if depth % 2 else area for area, depth in zip(areas, depths, strict=True))
    border = sum(map(_length, polygons))
    much = AREA_BORDER * border + AREA_SHARE * max(stated, filled) if is_stated else 0
    if any(depths):
        if is_stated and abs(stated - cut) < min(abs(stated - filled), much):
            pairs = zip(polygons, depths, strict=True)
            return Outline([Hole(part) if depth % 2 else part for part, depth in pairs], (CUT_OUT,))
        is_filled = is_stated and abs(stated - filled) <= much
        return Outline(polygons, () if is_filled else (FILLED,))
    # Parts may overlap: their union covers between the largest and the sum of all
    is_other = is_stated and not areas[0] - much <= stated <= filled + much
    is_other = is_other and not _is_box_area(stated, polygons)
    return Outline(polygons, (OTHER_AREA,) if is_other else ())


def _area(polygon: np.ndarray) -> float:
    """Return the area inside a polygon (the shoelace formula)."""
    x, y = (polygon - polygon[0]).T  # the terms of the first corner are 0
    return float(abs(np.dot(x[1:], y[:-1]) - np.dot(y[1:], x[:-1])) / 2)


def _length(polygon: np.ndarray) -> float:
    return float(np.linalg.norm(polygon - np.roll(polygon, 1, axis=0), axis=1).sum())


def _depths(polygons: list[np.ndarray]) -> list[int]:
    """Return how many of the polygons before it, which are larger, each polygon lies in."""
    starts = np.array([polygon.min(axis=0) for polygon in polygons])
    ends = np.array([polygon.max(axis=0) for polygon in polygons])
    depths = []
    for i, polygon in enumerate(polygons):
        around = (starts[:i] <= starts[i]).all(axis=1) & (ends[:i] >= ends[i]).all(axis=1)
        depths.append(sum(_contains(polygons[j], polygon) for j in np.flatnonzero(around)))
    return depths


def _contains(outer: np.ndarray, inner: np.ndarray) -> bool:
    """Return whether nearly all corners of a polygon lie in another one, or on its border."""
    contour = outer.astype(np.float32)
    inside = [cv2.pointPolygonTest(contour, corner, False) >= 0 for corner in inner.tolist()]
    return np.mean(inside) > 0.9


def _is_box_area(area: float, polygons: list[np.ndarray]) -> bool:
    """Return whether an area is that of the box around the polygons: some tools write that."""
    points = np.concatenate(polygons)
    width, height = points.max(axis=0) - points.min(axis=0)
    return any(abs(area - (width + more) * (height + more)) <= 0.02 * area + 1 for more in (0, 1))


def read_sa1b(path: Path, document: Any, errors: Errors) -> Entry:
    """Return the entry of an SA-1B file, or of the list that SAM's generator of masks writes."""
    if isinstance(document, list):
        document = {"annotations": document}
    file, image = brief_path(path), document.get("image", {})
    objects = []
    for index, record in enumerate(get_field(document, "annotations", list, file)):
        with errors.gathered():
            where = f"{file}: annotation {index + 1}"
            if not isinstance(record, dict):
                raise UserError(f"{where} is not an object in braces; export it again")
            objects.append((ONE_CLASS, _parse_object(record, where, use_crowds=True)))
    name = get_field(image, "file_name", str, f"{file}: image", optional=True)
    return Entry(name, stated_size(image, "height", "width", f"{file}: image"), path, objects)


def table_columns(path: Path) -> tuple[str, str] | None:
    """Return the columns of the image and of the run lengths in a table, or None."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return None
    columns = next(read_table(path, ()), {})
    images = [name for name in (*CLASS_COLUMNS, *IMAGE_COLUMNS) if name in columns]
    runs = [name for name in RUNS_COLUMNS if name in columns]
    return (images[0], runs[0]) if images and runs else None


def read_run_lengths(path: Path, errors: Errors) -> list[Entry]:
    """Return the entries of a table of run lengths as in Kaggle's competitions, a row an object.

    The runs count from pixel 1, column by column. A row without runs is an image without objects.
    """
    columns = table_columns(path)
    if columns is None:
        raise UserError(
            f"{brief_path(path)} has no columns ImageId,EncodedPixels; "
            "a table of images and mask files is given by --pairs"
        )
    entries: dict[str, Entry] = {}
    for number, row in enumerate(read_table(path, columns), 2):
        with errors.gathered():
            name, label = nfc(row.get(columns[0], "")), row.get("classid") or ONE_CLASS
            if columns[0] in CLASS_COLUMNS:
                name, _, label = name.rpartition("_")
            if not name:
                if any(row.values()):
                    raise UserError(f"{brief_path(path)}, row {number}: no image; fill it in")
                continue
            entry = entries.setdefault(name, Entry(name, None, path, []))
            runs = row.get(columns[1], "")
            if runs.casefold() not in NO_RUNS:
                parse_run_lengths(runs, f"{brief_path(path)}, row {number}")
                entry.objects.append((label, Outline([runs])))
    return list(entries.values())
