"""The prompts of training: drawn at random on a grid, with clicks that correct the answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.model.prompts import (
    Prompt,
    corrective_click,
    make_prompt,
    mask_box,
    prompt_from_mask,
)
from finetuning.model.segmentation import Features, choose_masks, predict_masks, upscale_masks
from finetuning.training.training_masks import HALF

BOX_SHARE = 0.25  # of the steps; the others start with a point
CLICK_SHARE = 0.35  # of the steps have 1 to MAX_CLICKS corrective clicks
MAX_CLICKS = 3
MASK_SHARE = 0.5  # of the steps with clicks get the mask to be corrected as a prompt, too
BOX_JITTER = 0.1  # standard deviation of a box's edges, in its sides; at most twice of it


class PromptPlan(NamedTuple):
    """What a step starts with, and how it goes on."""

    kind: str = "random"  # as in prompt_from_mask
    clicks: int = 0  # corrective clicks before the masks that the loss is of
    gives_mask: bool = False  # whether the mask to be corrected is a prompt, too
    background: bool = False  # whether a point of each image is where no object is, too


class PromptMix(NamedTuple):
    """What the steps of a training show."""

    points: str = "random"  # or inner; or mixed: inner ones, boxes, and clicks
    none_share: float = 0.0  # of the steps have no prompt
    background_share: float = 0.0  # of the steps with a point have another on background


RANDOM_POINTS = PromptMix()


def plan_prompts(mix: PromptMix, rng: np.random.Generator) -> PromptPlan:
    """Draw what a step is prompted with."""
    plan = _plan_prompts(mix.points, rng)
    if rng.random() < mix.none_share:
        return PromptPlan("none")
    is_point = plan.kind != "box" and not plan.clicks
    return plan._replace(background=is_point and bool(rng.random() < mix.background_share))


def _plan_prompts(points: str, rng: np.random.Generator) -> PromptPlan:
    if points != "mixed":
        return PromptPlan(points)
    kind = "box" if rng.random() < BOX_SHARE else "inner"
    clicks = int(rng.integers(1, MAX_CLICKS + 1)) if rng.random() < CLICK_SHARE else 0
    return PromptPlan(kind, clicks, gives_mask=bool(rng.random() < MASK_SHARE))


def draw_prompt(grid: np.ndarray, kind: str, rng: np.random.Generator) -> Prompt:
    """Draw a prompt of a plan's kind from an SxS bool mask; the box is drawn roughly."""
    if kind != "box":
        return prompt_from_mask(grid, kind, rng)
    x1, y1, x2, y2 = mask_box(grid)
    sides = np.array([x2 - x1, y2 - y1] * 2)
    jitter = rng.normal(0, BOX_JITTER, 4).clip(-2 * BOX_JITTER, 2 * BOX_JITTER) * sides
    return make_prompt(box=(np.array([x1, y1, x2, y2]) + jitter).clip(0, len(grid) - 1))


def add_click(prompt: Prompt, predicted: np.ndarray, true_mask: np.ndarray, size: int) -> Prompt:
    """Add the click that corrects HxW masks to a prompt in pixels of an SxS input.

    Where there is nothing to correct, the click confirms the mask at its deepest point.
    """
    nowhere = np.zeros_like(true_mask)
    click = corrective_click(predicted, true_mask) or corrective_click(nowhere, true_mask)
    *point, label = click or (0, 0, -1)  # -1: no point, to SAM 2
    added = Prompt(np.array([point], np.float32), np.array([label], np.int32))
    added = scale_prompt(added, true_mask.shape, size)
    return Prompt(*(np.concatenate(both) for both in zip(prompt, added, strict=True)))


def scale_prompt(prompt: Prompt, grid: tuple[int, int], size: int) -> Prompt:
    """Move a prompt from cells of a grid of (H,W) to pixels of an SxS input.

    A point goes to the middle of its cell, a box's corners go to the outermost pixels of theirs.
    """
    scale = size / np.array(grid[::-1], np.float32)
    labels = prompt.point_labels[:, None]
    place = np.select([labels == 2, labels == 3], [np.float32(0), np.float32(1)], np.float32(0.5))
    return prompt._replace(point_coords=(prompt.point_coords + place) * scale - place)


@torch.no_grad()
def add_clicks(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompts: list[Prompt],
    true_masks: torch.Tensor,
    plan: PromptPlan,
    decoder: torch.nn.Module,
) -> tuple[list[Prompt], torch.Tensor | None]:
    """Return a batch's prompts with the clicks of its plan, and what else goes in with them.

    Each click corrects the mask that the model itself would choose. With plan.gives_mask
    the logits of the last one are returned too, Bx1x(S/4)x(S/4).
    """
    mask_inputs, covered = None, true_masks.numpy() >= HALF
    size = predictor.model.image_size
    for _ in range(plan.clicks):
        prediction = predict_masks(
            predictor, features, prompts, [(size, size)] * len(prompts), decoder, mask_inputs
        )
        chosen, _ = choose_masks(predictor, prediction)
        logits = upscale_masks(predictor, chosen, true_masks.shape[-2:])
        masks = (logits[:, 0] > 0).cpu().numpy()
        prompts = [
            add_click(prompt, mask, true_mask, size)
            for prompt, mask, true_mask in zip(prompts, masks, covered, strict=True)
        ]
        mask_inputs = chosen.clamp(-32, 32) if plan.gives_mask else None
    return prompts, mask_inputs
