"""An object that is clicked on: its mask follows from the model, the box and the clicks alone."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch

from finetuning.model.model import Segmenter
from finetuning.model.prompts import Prompt, make_prompt

SURE = 10.0  # the logits of a mask that is given; SAM 2 turns masks into logits of -10 and 10


class WindowObject(NamedTuple):
    """One object of an image, as it was left: its prompt, its HxW bool mask, and its score."""

    prompt: Prompt
    mask: np.ndarray
    score: float


class Click(NamedTuple):
    """A click on a pixel of the image; label: 1 foreground, 0 background."""

    x: float
    y: float
    label: int


class Box(NamedTuple):
    """A box around the object, in pixels of the image."""

    x1: float
    y1: float
    x2: float
    y2: float


class ClickedObject:
    """The clicks and boxes of one object, and the masks that they lead to.

    The last box and then all clicks are replayed, each with the logits of the mask before it. So
    undone is as if never done. A box begins anew: the mask that the object came with is forgotten.
    """

    def __init__(self, start: WindowObject | None = None, model: str = "") -> None:
        """Begin with nothing, or with what the model of this name has found."""
        self.start, self.model = start, model
        self.steps: list[Click | Box] = []  # in the order that they were made
        self._logits: dict[tuple, torch.Tensor] = {}  # of a model after so many steps
        self._found: dict[str, tuple[tuple, WindowObject | None]] = {}  # a model's last answer

    def segment(self, name: str, segmenter: Segmenter) -> WindowObject | None:
        """Return the object as the model of this name sees it; None where nothing was clicked."""
        clicks = (step for step in self.steps if isinstance(step, Click))
        boxes = [step for step in self.steps if isinstance(step, Box)]
        steps = (*boxes[-1:], *clicks)
        if name in self._found and self._found[name][0] == steps:
            return self._found[name][1]
        start = None if boxes else self.start
        given = _steps_of(start.prompt) if start else ()
        found, logits = self._begin(start, name, segmenter)
        for end in range(1, len(steps) + 1):
            key = name, steps[:end]
            if end < len(steps) and key in self._logits:  # only of the last is the mask wanted
                logits = self._logits[key]
                continue
            prompt = _prompt_of((*given, *steps[:end]))
            mask, score, logits = segmenter.segment(prompt, logits)
            self._logits[key], found = logits, WindowObject(prompt, mask, score)
        self._found[name] = steps, found
        return found

    def _begin(
        self, start: WindowObject | None, name: str, segmenter: Segmenter
    ) -> tuple[WindowObject | None, torch.Tensor | None]:
        """Return the object before any step, and its logits; each model has its own idea of it."""
        if start is None:
            return None, None
        if name == self.model:
            return start, mask_to_logits(start.mask, segmenter)
        mask, score, logits = segmenter.segment(start.prompt)
        return WindowObject(start.prompt, mask, score), logits


def mask_to_logits(mask: np.ndarray, segmenter: Segmenter) -> torch.Tensor:
    """Turn an HxW bool mask into a mask_input of Segmenter.segment, 1x1x(S/4)x(S/4)."""
    model = segmenter.predictor.model
    height, width = model.sam_prompt_encoder.mask_input_size
    share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(SURE * (2 * share - 1))[None, None].to(model.device)


def _steps_of(prompt: Prompt) -> tuple[Click | Box, ...]:
    points = list(zip(prompt.point_coords.tolist(), prompt.point_labels.tolist(), strict=True))
    corners = [value for point, label in points if label in (2, 3) for value in point]
    clicks = [Click(*point, label) for point, label in points if label in (0, 1)]
    return (*([Box(*corners)] if corners else []), *clicks)


def _prompt_of(steps: tuple[Click | Box, ...]) -> Prompt:
    foreground, background = (
        [(step.x, step.y) for step in steps if isinstance(step, Click) and step.label == label]
        for label in (1, 0)
    )
    box = next((step for step in steps if isinstance(step, Box)), None)
    return make_prompt(foreground, background, box)
