"""Find all objects of an image without a prompt, with SAM 2's own automatic mask generator.

It prompts the model with each point of a grid, and a Rule says which of the masks are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sam2_utils import autocast

import numpy as np
import torch
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.sam2_image_predictor import SAM2ImagePredictor
from sam2.utils.amg import rle_to_mask

from finetuning.segmentation.prompts import Prompt, make_prompt

RULE = "auto_objects"  # the key of a checkpoint's rule
POINTS_PER_SIDE = 32  # of the grid; SAM 2's default
MOST_POINTS = 64  # prompts per batch; SAM 2's default
MOST_PIXELS = 1 << 27  # in all float32 masks of a batch: 0.5 GB


class Rule(NamedTuple):
    """Which masks are kept; the defaults are those of SAM 2's automatic mask generator."""

    min_score: float = 0.8  # predicted IoU
    min_stability: float = 0.95  # 0 keeps all masks
    min_area: float = 0.0  # fraction of the image, 0 to 1
    multimask: bool = True  # three masks per point instead of one


# Keeps nearly every mask; thresholds are chosen among these. One mask per point is enough, as a
# fine-tuned model has learned what an object is.
ANY = Rule(min_score=0.2, min_stability=0.0, multimask=False)


def rule_of(facts: dict[str, Any]) -> Rule | None:
    """Return the rule stored in a model's checkpoint, or None.

    facts: the checkpoint's metadata, as load_predictor returns it.
    """
    values = facts.get(RULE)
    # A checkpoint from anywhere may hold anything under this key
    if not isinstance(values, dict) or values.keys() != set(Rule._fields):
        return None
    *shares, multimask = Rule(**values)
    are_shares = all(isinstance(value, float) and 0 <= value <= 1 for value in shares)
    return Rule(**values) if are_shares and isinstance(multimask, bool) else None


class SegmentedObject(NamedTuple):
    """One object of an image: the prompt, the HxW bool mask, and the model's score for it.

    score: the model's own estimate of the mask's IoU.
    name: as in the table of prompts, or the object's number in the image; empty if it has none.
    """

    prompt: Prompt
    mask: np.ndarray
    score: float
    name: str = ""


def find_objects(
    predictor: SAM2ImagePredictor, precision: torch.dtype, image: np.ndarray, rule: Rule
) -> list[SegmentedObject]:
    """Find the objects of an HxWx3 uint8 RGB image, sorted by score, highest first.

    The objects have no names. Empty masks are left out.
    """
    height, width = image.shape[:2]
    generator = SAM2AutomaticMaskGenerator(
        predictor.model,
        points_per_side=POINTS_PER_SIDE,
        # Each point yields three masks of the image's size
        points_per_batch=int(np.clip(MOST_PIXELS // (3 * height * width), 1, MOST_POINTS)),
        pred_iou_thresh=rule.min_score,
        stability_score_thresh=rule.min_stability,
        multimask_output=rule.multimask,
        output_mode="uncompressed_rle",
    )
    generator.predictor = predictor  # SAM 2's own supports only images of 1024 pixels
    with autocast(predictor.device, precision):
        records = generator.generate(image)
    min_pixels = max(1, rule.min_area * height * width)
    large = [record for record in records if record["area"] >= min_pixels]
    large.sort(key=lambda record: -record["predicted_iou"])
    return [_to_object(record) for record in large]


def _to_object(record: dict[str, Any]) -> SegmentedObject:
    prompt = make_prompt([tuple(record["point_coords"][0])])
    return SegmentedObject(prompt, rle_to_mask(record["segmentation"]), record["predicted_iou"])
