"""Prompts as they are typed: points and boxes, in order, of one object after the other."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import ArgumentParser, number, parse_numbers
from finetuning.model.prompts import Prompt, make_prompt


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
