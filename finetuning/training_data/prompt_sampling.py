"""Training prompts: random points and boxes, and clicks that correct the model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.segmentation.predicting import Features, choose_masks, predict_masks, upscale_masks
from finetuning.segmentation.prompts import (
    Prompt,
    corrective_click,
    make_prompt,
    mask_box,
    prompt_from_mask,
)
from finetuning.training_data.thin_objects import forgiven_cells, object_cells

BOX_SHARE = 0.25  # share of steps that start with a box; the others start with a point
CLICK_SHARE = 0.35  # share of steps with 1 to MAX_TRAINING_CLICKS corrective clicks
MAX_TRAINING_CLICKS = 3
MASK_SHARE = 0.5  # share of steps with clicks that also prompt with the mask to correct
BOX_JITTER = 0.1  # standard deviation of a box's edges / its side; cut off at twice that


class PromptPlan(NamedTuple):
    """The prompts of a step: a first one, then clicks."""

    kind: str = "random"  # as in prompt_from_mask
    clicks: int = 0  # corrective clicks; the loss is that of the masks after the last one
    gives_mask: bool = False  # whether the mask to correct is a prompt, too
    background: bool = False  # whether each image has another point, on background


class PromptMix(NamedTuple):
    """How often the steps of a training show which prompts."""

    points: str = "random"  # or inner, or mixed: inner points, boxes and clicks
    none_share: float = 0.0  # share of steps without a prompt
    background_share: float = 0.0  # share of point steps with another point on background


RANDOM_POINTS = PromptMix()


def plan_prompts(mix: PromptMix, rng: np.random.Generator) -> PromptPlan:
    """Draw the prompts of a step."""
    # Drawn first, so that none_share does not change the plans of the other steps
    plan = _plan_prompts(mix.points, rng)
    if rng.random() < mix.none_share:
        return PromptPlan("none")
    # On background there is no object to draw a box around, or for clicks to correct
    is_point = plan.kind != "box" and not plan.clicks
    return plan._replace(background=is_point and bool(rng.random() < mix.background_share))


def _plan_prompts(points: str, rng: np.random.Generator) -> PromptPlan:
    if points != "mixed":
        return PromptPlan(points)
    kind = "box" if rng.random() < BOX_SHARE else "inner"
    clicks = int(rng.integers(1, MAX_TRAINING_CLICKS + 1)) if rng.random() < CLICK_SHARE else 0
    return PromptPlan(kind, clicks, gives_mask=bool(rng.random() < MASK_SHARE))


def draw_prompt(grid: np.ndarray, kind: str, rng: np.random.Generator) -> Prompt:
    """Draw a prompt of a plan's kind from an HxW bool mask; jitter a box as people draw it."""
    if kind != "box":
        return prompt_from_mask(grid, kind, rng)
    x1, y1, x2, y2 = mask_box(grid)
    sides = np.array([x2 - x1, y2 - y1] * 2)
    jitter = rng.normal(0, BOX_JITTER, 4).clip(-2 * BOX_JITTER, 2 * BOX_JITTER) * sides
    last = np.array(grid.shape[::-1] * 2) - 1  # the last column and row, for both corners
    return make_prompt(box=(np.array([x1, y1, x2, y2]) + jitter).clip(0, last))


def add_click(
    prompt: Prompt, predicted: np.ndarray, true_mask: np.ndarray, size: tuple[int, int]
) -> Prompt:
    """Add the click that corrects a mask on a grid to a prompt in pixels of a size (H,W).

    If there is nothing to correct, the click confirms the true mask at its deepest point.
    """
    nowhere = np.zeros_like(true_mask)
    click = corrective_click(predicted, true_mask) or corrective_click(nowhere, true_mask)
    *point, label = click or (0, 0, -1)  # SAM 2 ignores points with label -1
    added = Prompt(np.array([point], np.float32), np.array([label], np.int32))
    added = scale_prompt(added, true_mask.shape, size)
    return Prompt(*(np.concatenate(both) for both in zip(prompt, added, strict=True)))


def scale_prompt(prompt: Prompt, grid: tuple[int, int], size: tuple[int, int]) -> Prompt:
    """Scale a prompt from cells of a grid of (H,W) to pixels of another size (H,W).

    A point moves to the center of its cell, a box's corners to the outermost pixels of their cells.
    """
    scale = np.array(size[::-1], np.float32) / np.array(grid[::-1], np.float32)
    labels = prompt.point_labels[:, None]
    # Labels 2 and 3 are a box's first and last corner
    place = np.select([labels == 2, labels == 3], [np.float32(0), np.float32(1)], np.float32(0.5))
    return prompt._replace(point_coords=(prompt.point_coords + place) * scale - place)


@torch.no_grad()
def add_clicks(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompts: list[Prompt],
    true_masks: Sequence[torch.Tensor],
    plan: PromptPlan,
    decoder: torch.nn.Module,
    sizes: list[tuple[int, int]],
) -> tuple[list[Prompt], torch.Tensor | None]:
    """Return a batch's prompts with the clicks of its plan, and its mask prompts, if any.

    Each click corrects the mask that the model would choose by score. With plan.gives_mask, the
    logits of the last such masks are returned too, Bx1x(S/4)x(S/4). sizes: the (H,W) in whose
    pixels each prompt is.
    """
    if not plan.clicks:
        return prompts, None
    mask_inputs, coverages = None, [mask.numpy() for mask in true_masks]
    cells, forgiven = (list(map(of, coverages)) for of in (object_cells, forgiven_cells))
    for _ in range(plan.clicks):
        prediction = predict_masks(predictor, features, prompts, sizes, decoder, mask_inputs)
        chosen, _ = choose_masks(predictor, prediction)
        masks = _masks_on(predictor, chosen, [true.shape for true in cells])
        prompts = [
            add_click(prompt, mask & ~ignored, true, size)
            for prompt, mask, ignored, true, size in zip(
                prompts, masks, forgiven, cells, sizes, strict=True
            )
        ]
        # SAM2ImagePredictor clamps the logits that users pass on as mask_input the same way
        mask_inputs = chosen.clamp(-32, 32) if plan.gives_mask else None
    return prompts, mask_inputs


def _masks_on(
    predictor: SAM2ImagePredictor, logits: torch.Tensor, sizes: list[tuple[int, int]]
) -> list[np.ndarray]:
    """Return where Bx1xhxw mask logits are above 0, each upscaled to its (H,W)."""
    if len(set(sizes)) == 1:  # a GPU is waited for only once
        return list((upscale_masks(predictor, logits, sizes[0])[:, 0] > 0).cpu().numpy())
    return [
        (upscale_masks(predictor, one[None], size)[0, 0] > 0).cpu().numpy()
        for one, size in zip(logits, sizes, strict=True)
    ]
