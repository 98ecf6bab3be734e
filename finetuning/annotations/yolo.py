"""Reading YOLO segmentation files, and the names of their classes."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from sam2_utils import UserError

import yaml

from finetuning.annotations.formats import (
    BOXES,
    SUPPORTED_FORMATS,
    TOO_FEW_POINTS,
    Entry,
    Errors,
    read_text,
)
from finetuning.annotations.outlines import Outline, parse_polygon
from finetuning.basics.command_line import brief_path, nfc, plain_number
from finetuning.basics.image_files import IMAGE_SUFFIXES

NAMES_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels", "labels.txt")


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
