"""Simulated interactive segmentation: the IoU of a mask after each click.

The first click is at the point deepest inside the object. Each further click is at the point
deepest inside an error of the model's previous mask. This is the protocol of RITM (Sofiiuk et al.,
Reviving Iterative Training with Mask Guidance, 2021), with which SAM and SAM 2 are evaluated too.
"""

from __future__ import annotations

from sam2_utils import autocast, calculate_iou

import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.basics.cropped_masks import CroppedMask, crop_mask, crop_together
from finetuning.dataset.objects import read_objects
from finetuning.evaluation.measuring import Comparison, group_by_image
from finetuning.model.model import features_for
from finetuning.segmentation.averaging import ViewFeatures
from finetuning.segmentation.clean_masks import NO_CLEANING, Cleaning, clean
from finetuning.segmentation.features import Features
from finetuning.segmentation.predicting import segment_with_logits
from finetuning.segmentation.prompts import Prompt, corrective_click

MAX_MEASURED_CLICKS = 20  # as in RITM


def simulate_clicks(
    predictor: SAM2ImagePredictor,
    features: Features | ViewFeatures,
    true_mask: np.ndarray | CroppedMask,
    count: int,
    use_mask_prompt: bool,
    kind: str = "best",
    cleaning: Cleaning = NO_CLEANING,
) -> list[float]:
    """Return the IoU on one object after 1, 2, ... `count` clicks; each mask uses all so far.

    Arguments:
      features: of the image.
      true_mask: cropped, or HxW bool; not empty.
      use_mask_prompt: also give the model the logits of its previous mask.
      kind: which of the model's masks, as in choose_masks.
      cleaning: of each mask, but not of the logits that are given to the model.

    No pixel is clicked twice. Once a mask is perfect, or wrong only in clicked pixels, the clicks
    end, and its IoU counts for the remaining ones.
    """
    true_mask, logits = crop_mask(true_mask), None
    crops, left, top = crop_together(crop_mask(np.zeros(true_mask.size, bool)), true_mask)
    clicks, ious = [], []
    while len(ious) < count:
        # In the box of both masks: elsewhere, nothing is wrong
        click = corrective_click(*crops, [(x - left, y - top) for x, y, _ in clicks])
        if click is None:
            break
        x, y, label = click
        clicks.append((left + x, top + y, label))
        points = np.array(clicks)
        prompt = Prompt(points[:, :2].astype(np.float32), points[:, 2].astype(np.int32))
        previous = logits if use_mask_prompt else None
        mask, _, logits = segment_with_logits(
            predictor, features, prompt, true_mask.size, previous, kind
        )
        cleaned = clean(crop_mask(mask), prompt, cleaning)
        crops, left, top = crop_together(cleaned, true_mask)
        ious.append(float(calculate_iou(*crops)))
    return ious + ious[-1:] * (count - len(ious))


def measure_clicks(
    comparison: Comparison, count: int, use_mask_prompt: bool, mask_kind: str
) -> np.ndarray:
    """Return the IoU of K models on the M objects of their results after 1 to N clicks, KxMxN."""
    models, _, results = comparison
    ious, row = np.zeros((len(models), len(results), count)), 0
    for image_results in tqdm(group_by_image(results), desc="Clicking", unit="image"):
        pair = image_results[0].pair
        objects = read_objects(pair)
        # The features of an image serve all clicks on all its objects
        all_features = features_for(models, [(pair.image, objects.size)])
        for result in image_results:
            true_mask = objects.cropped(result.object)
            for model_ious, model, features in zip(ious, models, all_features, strict=True):
                with autocast(model.predictor.device, model.source.precision):
                    model_ious[row] = simulate_clicks(
                        model.predictor,
                        features,
                        true_mask,
                        count,
                        use_mask_prompt,
                        mask_kind,
                        model.cleaning,
                    )
            row += 1
    return ious
