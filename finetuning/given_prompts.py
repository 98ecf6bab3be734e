"""Prompts as they are typed: points and boxes, in order, of one object after the other."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import Any

from sam2_utils import UserError

from finetuning.prompts import Prompt, make_prompt


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
