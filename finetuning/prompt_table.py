"""Prompts of many images, in one table that a person or a program writes."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import normal, plain_number, quoted
from finetuning.basics.csv_files import read_table
from finetuning.model.prompts import Prompt, make_prompt

POINT, BOX = ("x", "y"), ("x1", "y1", "x2", "y2")
LARGEST = 1e9  # of a coordinate; no image is as large
# Of an object: its prompt, as make_prompt takes it
Parts = dict[str, Any]


def read_prompts(file: Path, images: Iterable[str]) -> dict[str, dict[str, Prompt]]:
    """Read a table of prompts; return those of each image of it, by the names of its objects.

    Columns: image (a file's name), x and y with label (1 object, the default, or 0 background), or
    x1, y1, x2 and y2 (a box), all in pixels from the top left, and object. Rows of an image with
    the same object are its prompt. Where there is no object, the points of an image are one
    object, and each box is one of its own; these are numbered.
    images: the names that there are. Raises UserError, with the row, for what does not fit.
    """
    known = {normal(name): name for name in images}
    found: dict[str, dict[tuple[str, int], Parts]] = {}
    for where, cells in _rows_of(file):
        image = known.get(normal(cells.get("image", "")))
        if image is None:
            name = quoted(cells.get("image", ""))
            raise UserError(f'{where}: there is no image "{name}" in the folder; mend its name')
        point, box = (_numbers(cells, columns, where) for columns in (POINT, BOX))
        if not point and not box:
            raise UserError(
                f"{where}: neither a point nor a box; fill in the columns x,y or x1,y1,x2,y2"
            )
        objects = found.setdefault(image, {})
        name = normal(cells.get("object", ""))
        parts = objects.setdefault((name, 0 if name or not box else len(objects) + 1), {})
        if point:
            kind = "foreground" if _label(cells, where) else "background"
            parts.setdefault(kind, []).append(point)
        if box and "box" in parts:
            raise UserError(f"{where}: a second box of object {quoted(name)}; give it another name")
        if box and not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{where}: the box is empty or turned round: x1<x2 and y1<y2")
        parts.update({"box": box} if box else {})
    if not found:
        raise UserError(f"{quoted(file)} has no rows below its header; add some")
    return {image: _named(objects) for image, objects in found.items()}


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row that is not blank, after where it is."""
    for number, cells in enumerate(read_table(file, ("image",)), 2):
        if any(cells.values()):
            yield f"{quoted(file)}, row {number}", cells


def _numbers(cells: dict[str, str], columns: tuple[str, ...], where: str) -> tuple[float, ...]:
    """Return the coordinates in these columns, or nothing where all are empty."""
    texts = [cells.get(column, "") for column in columns]
    if not any(texts):
        return ()
    try:
        numbers = tuple(map(plain_number, texts))
    except ValueError:
        numbers = (math.nan,)
    if not all(abs(number) < LARGEST for number in numbers):
        named = ", ".join(f'{column} "{quoted(cells.get(column, ""))}"' for column in columns)
        raise UserError(f"{where}: {named}: give a number of pixels for each")
    return numbers


def _label(cells: dict[str, str], where: str) -> bool:
    text = cells.get("label", "") or "1"
    if text not in ("0", "1", "0.0", "1.0"):
        raise UserError(f'{where}: label "{quoted(text)}": write 1 (object) or 0 (background)')
    return text.startswith("1")


def _named(objects: dict[tuple[str, int], Parts]) -> dict[str, Prompt]:
    """Return each object's prompt; those without a name get the first numbers that are free."""
    given = {name for name, _ in objects}
    free = (str(number) for number in itertools.count(1) if str(number) not in given)
    return {name or next(free): make_prompt(**parts) for (name, _), parts in objects.items()}


def check_inside(prompt: Prompt, width: int, height: int) -> None:
    """Raise UserError for a point outside the image; a box may end at its very edge."""
    for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
        is_beyond = operator.gt if label in (2, 3) else operator.ge
        if min(x, y) < 0 or is_beyond(x, width) or is_beyond(y, height):
            raise UserError(
                f"{x:g},{y:g} lies outside the image, which is {width} pixels wide and {height} "
                f"high; x goes from 0 to {width - 1}, y from 0 to {height - 1}"
            )
