"""The objects of an image without a prompt: SAM 2's own automatic mask generator, and its rule.

It asks the model at each point of a grid, and keeps the masks that the model scores high enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sam2_utils import autocast

import numpy as np
import torch
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.sam2_image_predictor import SAM2ImagePredictor
from sam2.utils.amg import rle_to_mask

from finetuning.model.prompts import Prompt, make_prompt

RULE = "auto_objects"  # what a checkpoint calls its rule
POINTS_PER_SIDE = 32  # of the grid, as SAM 2 has it
MOST_POINTS = 64  # at a time, likewise
MOST_PIXELS = 1 << 27  # of all masks at a time, float32


class Rule(NamedTuple):
    """Which masks are kept; by default, as SAM 2's automatic mask generator does it."""

    min_score: float = 0.8
    min_stability: float = 0.95  # 0: any
    min_area: float = 0.0  # of the image, 0 to 1
    multimask: bool = True  # three masks a point, else the single one


# From which to choose a rule. A model that was trained has learnt what an object is: one mask.
ANY = Rule(min_score=0.2, min_stability=0.0, multimask=False)


def rule_of(facts: dict[str, Any]) -> Rule | None:
    """Return the rule that was chosen for a model, if its file says one.

    facts: what load_predictor returns beside the predictor. A file may hold anything.
    """
    values = facts.get(RULE)
    if not isinstance(values, dict) or values.keys() != set(Rule._fields):
        return None
    *shares, multimask = Rule(**values)
    are_shares = all(isinstance(value, float) and 0 <= value <= 1 for value in shares)
    return Rule(**values) if are_shares and isinstance(multimask, bool) else None


class Found(NamedTuple):
    """A mask, HxW bool, with the prompt that led to it and the model's score."""

    prompt: Prompt
    mask: np.ndarray
    score: float


def find_objects(
    predictor: SAM2ImagePredictor, precision: torch.dtype, image: np.ndarray, rule: Rule
) -> list[Found]:
    """Find the objects of an HxWx3 uint8 RGB image, the highest score first; none is empty."""
    height, width = image.shape[:2]
    generator = SAM2AutomaticMaskGenerator(
        predictor.model,
        points_per_side=POINTS_PER_SIDE,
        points_per_batch=int(np.clip(MOST_PIXELS // (3 * height * width), 1, MOST_POINTS)),
        pred_iou_thresh=rule.min_score,
        stability_score_thresh=rule.min_stability,
        multimask_output=rule.multimask,
        output_mode="uncompressed_rle",
    )
    generator.predictor = predictor  # which knows the model's size, whatever it is
    with autocast(predictor.device, precision):
        records = generator.generate(image)
    smallest = max(1, rule.min_area * height * width)
    large = [record for record in records if record["area"] >= smallest]
    large.sort(key=lambda record: -record["predicted_iou"])
    return [_found(record) for record in large]


def _found(record: dict[str, Any]) -> Found:
    prompt = make_prompt([tuple(record["point_coords"][0])])
    return Found(prompt, rle_to_mask(record["segmentation"]), record["predicted_iou"])
