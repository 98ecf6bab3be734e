"""Interactive segmentation, simulated: how good a mask gets from one click to the next.

The first click goes to the point deepest inside the object, each following one to where the
model's own last mask is most wrong: the protocol of RITM (Sofiiuk et al., Reviving Iterative
Training with Mask Guidance, 2021), which SAM and SAM 2 are measured with as well.
"""

from __future__ import annotations

from sam2_utils import autocast, calculate_iou

import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.dataset.objects import read_objects
from finetuning.evaluation.measuring import Result, group_by_image
from finetuning.model.model import features_for
from finetuning.model.prompts import Prompt, corrective_click
from finetuning.model.segmentation import Features, segment_with_logits

MAX_CLICKS = 20  # as many as RITM allows


def simulate_clicks(
    predictor: SAM2ImagePredictor,
    features: Features,
    true_mask: np.ndarray,
    count: int,
    use_mask_prompt: bool,
    kind: str = "best",
) -> list[float]:
    """Return the IoU after 1, 2, ... `count` clicks on one object, each mask that of all so far.

    Arguments:
      features: of the image.
      true_mask: HxW bool, not empty.
      use_mask_prompt: give the logits of the previous mask to the model with the clicks.
      kind: which of the model's masks, as in choose_masks.

    No pixel is clicked twice. Once a mask is perfect, or only wrong in pixels that were clicked,
    nothing is left to click, and its IoU counts for the clicks to come.
    """
    mask, logits = np.zeros_like(true_mask), None
    clicks, ious = [], []
    while len(ious) < count:
        click = corrective_click(mask, true_mask, [(x, y) for x, y, _ in clicks])
        if click is None:
            break
        clicks.append(click)
        points = np.array(clicks)
        prompt = Prompt(points[:, :2].astype(np.float32), points[:, 2].astype(np.int32))
        previous = logits if use_mask_prompt else None
        mask, _, logits = segment_with_logits(
            predictor, features, prompt, true_mask.shape, previous, kind
        )
        ious.append(float(calculate_iou(mask, true_mask)))
    return ious + ious[-1:] * (count - len(ious))


def measure_clicks(
    results: list[Result], count: int, use_mask_prompt: bool, mask_kind: str
) -> np.ndarray:
    """Return the IoU of the results' K models on their M objects after 1 to N clicks, KxMxN."""
    ious, row = np.zeros((len(results[0].models), len(results), count)), 0
    for of_image in tqdm(group_by_image(results), desc="Clicking", unit="image"):
        pair, models = of_image[0].pair, of_image[0].models
        objects = read_objects(pair)
        all_features = features_for(models, [(pair.image, objects.size)])
        for result in of_image:
            true_mask = objects[result.object]
            for of_model, model, features in zip(ious, models, all_features, strict=True):
                with autocast(model.predictor.device, model.source.precision):
                    of_model[row] = simulate_clicks(
                        model.predictor, features, true_mask, count, use_mask_prompt, mask_kind
                    )
            row += 1
    return ious
