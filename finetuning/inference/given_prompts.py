"""Read prompts from command-line options, or from a table for a folder of images."""

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
from finetuning.segmentation.prompts import Prompt, make_prompt

POINT, BOX = ("x", "y"), ("x1", "y1", "x2", "y2")
MAX_COORDINATE = 1e9  # larger than any image
PromptParts = dict[str, Any]  # an object's arguments for make_prompt


class AddToPrompt(argparse.Action):
    """Collects prompt options in the order given: [(option, value), (option, value), ...]."""

    def __call__(self, parser: Any, namespace: Namespace, value: Any, option: str) -> None:
        namespace.given = [*namespace.given, (option, value)]


def make_prompts(given: list[tuple[str, Any]]) -> list[Prompt]:
    """Return one prompt per object from (option, value) pairs in the order given.

    A second --box, or --next-object, starts another object.
    """
    objects: list[PromptParts] = [{}]
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
    return [make_prompt(**parts) for parts in objects]


def parse_point(text: str) -> tuple[float, ...]:
    """Parse "x,y"."""
    return parse_numbers(text, 2, "320,200")


def parse_box(text: str) -> tuple[float, ...]:
    """Parse "x1,y1,x2,y2", top left before bottom right."""
    x1, y1, x2, y2 = box = parse_numbers(text, 4, "40,30,600,460")
    if x1 >= x2 or y1 >= y2:
        raise argparse.ArgumentTypeError(
            f'"{text}" is empty or has swapped corners; give x1<x2 and y1<y2'
        )
    return box


def add_prompt_options(parser: ArgumentParser) -> None:
    """Add the options that say what to segment."""
    prompt = parser.add_argument_group("the prompt (without one, a window opens to click in)")
    negative = "a point that is not on the object; may be repeated"
    for option, parse, metavar, what in (
        ("--point", parse_point, '"x,y"', "a point on the object; may be repeated"),
        ("--negative-point", parse_point, '"x,y"', negative),
        ("--box", parse_box, '"x1,y1,x2,y2"', "its bounding box; a second box starts a new object"),
    ):
        prompt.add_argument(
            option, action=AddToPrompt, type=parse, metavar=metavar, help=what, dest="given"
        )
    prompt.add_argument(
        "--next-object", action=AddToPrompt, nargs=0, dest="given", help="start a new object"
    )
    prompt.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.csv",
        help="prompts for a folder: image,x,y or image,x1,y1,x2,y2",
    )
    prompt.add_argument(
        "--auto",
        choices=("whole", "objects"),
        help="no prompt: one mask per image, or all objects that SAM 2's generator finds (slow)",
    )
    fraction = number(float, at_least=0, below=1)
    for option, limit in (
        ("--min-score", "lowest score of the model"),
        ("--min-area", "smallest area as a fraction of the image"),
    ):
        prompt.add_argument(
            option,
            type=fraction,
            metavar="S",
            help=f"for --auto objects: {limit} to keep a mask, 0 to 1 (default: chosen in "
            "training, else SAM 2's own)",
        )


def read_prompts(file: Path, images: Iterable[str]) -> dict[str, dict[str, Prompt]]:
    """Read a table of prompts; return each image's prompts by object name.

    Columns: image (a file name), object, and either x and y with label (1 object, the default, or
    0 background) or x1, y1, x2 and y2 (a box), all in pixels from the top left. An image's rows
    with the same object form one prompt. Without an object name, an image's points form one
    object, and each box is an object of its own; these objects are numbered.

    images: the names of the images in the folder. Raises UserError, with the row, for a mistake.
    """
    known = {nfc(name): name for name in images}
    found: dict[str, dict[tuple[str, int], PromptParts]] = {}
    for where, cells in _rows_of(file):
        image = known.get(nfc(cells.get("image", "")))
        if image is None:
            name = brief(cells.get("image", ""))
            raise UserError(f'{where}: there is no image "{name}" in the folder; correct its name')
        point, box = (_numbers(cells, columns, where) for columns in (POINT, BOX))
        if not point and not box:
            raise UserError(
                f"{where}: neither a point nor a box; fill in the columns x,y or x1,y1,x2,y2"
            )
        objects = found.setdefault(image, {})
        name = nfc(cells.get("object", ""))
        # Unnamed boxes get a number each, so that none joins another row's object
        parts = objects.setdefault((name, 0 if name or not box else len(objects) + 1), {})
        if point:
            kind = "foreground" if _label(cells, where) else "background"
            parts.setdefault(kind, []).append(point)
        if box and "box" in parts:
            raise UserError(f"{where}: a second box of object {brief(name)}; give it another name")
        if box and not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(
                f"{where}: the box is empty or has swapped corners; give x1<x2 and y1<y2"
            )
        parts.update({"box": box} if box else {})
    if not found:
        raise UserError(f"{brief(file)} has no rows below its header; add some")
    return {image: _named(objects) for image, objects in found.items()}


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where each row is, and its cells; blank rows are skipped."""
    for row, cells in enumerate(read_table(file, ("image",)), 2):
        if any(cells.values()):
            yield f"{brief(file)}, row {row}", cells


def _numbers(cells: dict[str, str], columns: tuple[str, ...], where: str) -> tuple[float, ...]:
    """Return the coordinates in these columns, or () if all are empty."""
    texts = [cells.get(column, "") for column in columns]
    if not any(texts):
        return ()
    try:
        numbers = tuple(map(plain_number, texts))
    except ValueError:
        numbers = (math.nan,)
    if not all(abs(number) < MAX_COORDINATE for number in numbers):
        named = ", ".join(f'{column} "{brief(cells.get(column, ""))}"' for column in columns)
        raise UserError(f"{where}: {named}: give a number of pixels for each")
    return numbers


def _label(cells: dict[str, str], where: str) -> bool:
    text = cells.get("label", "") or "1"
    if text not in ("0", "1", "0.0", "1.0"):
        raise UserError(f'{where}: label "{brief(text)}": write 1 (object) or 0 (background)')
    return text.startswith("1")


def _named(objects: dict[tuple[str, int], PromptParts]) -> dict[str, Prompt]:
    """Return each object's prompt; unnamed objects get the first numbers that are no names."""
    taken = {name for name, _ in objects}
    free = (str(number) for number in itertools.count(1) if str(number) not in taken)
    return {name or next(free): make_prompt(**parts) for (name, _), parts in objects.items()}


def check_inside(prompt: Prompt, width: int, height: int) -> None:
    """Raise UserError for a point outside the image; a box may end exactly at its edge."""
    for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
        is_beyond = operator.gt if label in (2, 3) else operator.ge
        if min(x, y) < 0 or is_beyond(x, width) or is_beyond(y, height):
            raise UserError(
                f"{x:g},{y:g} lies outside the image, which is {width} pixels wide and {height} "
                f"high; x goes from 0 to {width - 1}, y from 0 to {height - 1}"
            )
