"""Prompts that are given: typed as options, or in a table for many images."""

from __future__ import annotations

import argparse
import itertools
import math
import operator
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import (
    ArgumentParser,
    brief,
    nfc,
    number,
    parse_numbers,
    plain_number,
)
from finetuning.basics.csv_files import read_table
from finetuning.model.prompts import Prompt, make_prompt

POINT, BOX = ("x", "y"), ("x1", "y1", "x2", "y2")
LARGEST = 1e9  # of a coordinate; no image is as large
# Of an object: its prompt, as make_prompt takes it
Parts = dict[str, Any]


class AddToPrompt(argparse.Action):
    """Keeps what is given of the prompt in its order: (option, value), (option, value), ..."""

    def __call__(self, parser: Any, namespace: Namespace, value: Any, option: str) -> None:
        namespace.given = [*namespace.given, (option, value)]


def make_prompts(given: list[tuple[str, Any]]) -> list[Prompt]:
    """Return a prompt an object, of (option, value) in the order that they were typed.

    A second --box, or --next-object, begins another object.
    """
    objects: list[dict[str, Any]] = [{}]
    for option, value in given:
        if option == "--next-object" or (option == "--box" and "box" in objects[-1]):
            objects.append({})
        if option == "--box":
            objects[-1]["box"] = value
        elif option != "--next-object":
            kind = "foreground" if option == "--point" else "background"
            objects[-1].setdefault(kind, []).append(value)
    if not all(objects):
        raise UserError("--next-object goes between the points or boxes of two objects")
    return [make_prompt(**of_object) for of_object in objects]


def parse_point(text: str) -> tuple[float, ...]:
    """Parse "x,y"."""
    return parse_numbers(text, 2, "320,200")


def parse_box(text: str) -> tuple[float, ...]:
    """Parse "x1,y1,x2,y2", top left before bottom right."""
    x1, y1, x2, y2 = box = parse_numbers(text, 4, "40,30,600,460")
    if x1 >= x2 or y1 >= y2:
        raise argparse.ArgumentTypeError(f'"{text}" is empty or turned round: x1<x2 and y1<y2')
    return box


def add_prompt_options(parser: ArgumentParser) -> None:
    """Add all ways to say what is to be segmented."""
    prompt = parser.add_argument_group("the prompt (without one, a window opens to click in)")
    another = "its bounding box; a second box is another object's"
    for option, parse, metavar, what in (
        ("--point", parse_point, '"x,y"', "a point on the object; may be repeated"),
        ("--negative-point", parse_point, '"x,y"', "one on what is not the object; likewise"),
        ("--box", parse_box, '"x1,y1,x2,y2"', another),
    ):
        prompt.add_argument(
            option, action=AddToPrompt, type=parse, metavar=metavar, help=what, dest="given"
        )
    prompt.add_argument(
        "--next-object", action=AddToPrompt, nargs=0, dest="given", help="points of another follow"
    )
    prompt.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.csv",
        help="of a folder: image,x,y or image,x1,y1,x2,y2",
    )
    prompt.add_argument(
        "--auto",
        choices=("whole", "objects"),
        help="no prompt: one mask an image, or all objects that SAM 2's generator finds (slow)",
    )
    share = number(float, at_least=0, below=1)
    for option, of_what in (("--min-score", "the model's score"), ("--min-area", "of the image")):
        prompt.add_argument(
            option,
            type=share,
            metavar="S",
            help=f"of --auto objects: masks below it are left out, {of_what}, 0 to 1 (default: "
            "what training chose, else what SAM 2 has)",
        )


def read_prompts(file: Path, images: Iterable[str]) -> dict[str, dict[str, Prompt]]:
    """Read a table of prompts; return those of each image of it, by the names of its objects.

    Columns: image (a file's name), x and y with label (1 object, the default, or 0 background), or
    x1, y1, x2 and y2 (a box), all in pixels from the top left, and object. Rows of an image with
    the same object are its prompt. Where there is no object, the points of an image are one
    object, and each box is one of its own; these are numbered.
    images: the names that there are. Raises UserError, with the row, for what does not fit.
    """
    known = {nfc(name): name for name in images}
    found: dict[str, dict[tuple[str, int], Parts]] = {}
    for where, cells in _rows_of(file):
        image = known.get(nfc(cells.get("image", "")))
        if image is None:
            name = brief(cells.get("image", ""))
            raise UserError(f'{where}: there is no image "{name}" in the folder; mend its name')
        point, box = (_numbers(cells, columns, where) for columns in (POINT, BOX))
        if not point and not box:
            raise UserError(
                f"{where}: neither a point nor a box; fill in the columns x,y or x1,y1,x2,y2"
            )
        objects = found.setdefault(image, {})
        name = nfc(cells.get("object", ""))
        parts = objects.setdefault((name, 0 if name or not box else len(objects) + 1), {})
        if point:
            kind = "foreground" if _label(cells, where) else "background"
            parts.setdefault(kind, []).append(point)
        if box and "box" in parts:
            raise UserError(f"{where}: a second box of object {brief(name)}; give it another name")
        if box and not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{where}: the box is empty or turned round: x1<x2 and y1<y2")
        parts.update({"box": box} if box else {})
    if not found:
        raise UserError(f"{brief(file)} has no rows below its header; add some")
    return {image: _named(objects) for image, objects in found.items()}


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row that is not blank, after where it is."""
    for row, cells in enumerate(read_table(file, ("image",)), 2):
        if any(cells.values()):
            yield f"{brief(file)}, row {row}", cells


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
        named = ", ".join(f'{column} "{brief(cells.get(column, ""))}"' for column in columns)
        raise UserError(f"{where}: {named}: give a number of pixels for each")
    return numbers


def _label(cells: dict[str, str], where: str) -> bool:
    text = cells.get("label", "") or "1"
    if text not in ("0", "1", "0.0", "1.0"):
        raise UserError(f'{where}: label "{brief(text)}": write 1 (object) or 0 (background)')
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
