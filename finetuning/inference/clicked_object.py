"""One object in the window: its clicks and boxes, and the masks that a model makes of them."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch

from finetuning.model.model import Segmenter
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.prompts import Prompt, make_prompt

MASK_LOGIT = 10.0  # SAM 2 itself turns binary masks into logits of -10 and 10


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
    """The clicks and boxes of one object, and the masks that they give.

    The mask depends only on the model, the last box and the clicks: segment replays the box and
    then all clicks, each with the previous mask's logits, so an undone step leaves no trace.
    A box discards the mask that the object started with.
    """

    def __init__(self, start: SegmentedObject | None = None, model: str = "") -> None:
        """Start without a mask, or with an object that the model of this name has found."""
        self.start, self.model = start, model
        self.steps: list[Click | Box] = []  # in the order in which the user made them
        self._logits: dict[tuple, torch.Tensor] = {}  # by model name and replayed steps
        # By model name: the steps of the last call, and its result
        self._last: dict[str, tuple[tuple, SegmentedObject | None]] = {}

    def segment(self, name: str, segmenter: Segmenter) -> SegmentedObject | None:
        """Segment the object with the model of this name; return None before the first step."""
        clicks = (step for step in self.steps if isinstance(step, Click))
        boxes = [step for step in self.steps if isinstance(step, Box)]
        steps = (*boxes[-1:], *clicks)
        if name in self._last and self._last[name][0] == steps:
            return self._last[name][1]
        start = None if boxes else self.start
        start_steps = _steps_from(start.prompt) if start else ()
        found, logits = self._begin(start, name, segmenter)
        for end in range(1, len(steps) + 1):
            key = name, steps[:end]
            # Earlier steps only supply logits, so cached ones suffice; the last also needs a mask
            if end < len(steps) and key in self._logits:
                logits = self._logits[key]
                continue
            prompt = _prompt_from((*start_steps, *steps[:end]))
            mask, score, logits = segmenter.segment(prompt, logits)
            self._logits[key], found = logits, SegmentedObject(prompt, mask, score)
        self._last[name] = steps, found
        return found

    def _begin(
        self, start: SegmentedObject | None, name: str, segmenter: Segmenter
    ) -> tuple[SegmentedObject | None, torch.Tensor | None]:
        """Return the object before the first step, and its logits."""
        if start is None:
            return None, None
        if name == self.model:
            return start, mask_to_logits(start.mask, segmenter)
        # The mask is the other model's: this model segments the same prompt itself
        mask, score, logits = segmenter.segment(start.prompt)
        return SegmentedObject(start.prompt, mask, score), logits


def mask_to_logits(mask: np.ndarray, segmenter: Segmenter) -> torch.Tensor:
    """Turn an HxW bool mask into a mask_input of Segmenter.segment, 1x1x(S/4)x(S/4)."""
    model = segmenter.predictor.model
    height, width = model.sam_prompt_encoder.mask_input_size
    coverage = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    logits = MASK_LOGIT * (2 * coverage - 1)  # a pixel that is half covered gets 0
    return torch.from_numpy(logits)[None, None].to(model.device)


def _steps_from(prompt: Prompt) -> tuple[Click | Box, ...]:
    points = list(zip(prompt.point_coords.tolist(), prompt.point_labels.tolist(), strict=True))
    corners = [value for point, label in points if label in (2, 3) for value in point]
    clicks = [Click(*point, label) for point, label in points if label in (0, 1)]
    return (*([Box(*corners)] if corners else []), *clicks)


def _prompt_from(steps: tuple[Click | Box, ...]) -> Prompt:
    foreground, background = (
        [(step.x, step.y) for step in steps if isinstance(step, Click) and step.label == label]
        for label in (1, 0)
    )
    box = next((step for step in steps if isinstance(step, Box)), None)
    return make_prompt(foreground, background, box)
