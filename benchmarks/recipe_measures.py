"""What recipes.py measures of a model: its IoU with each prompt, after clicks, on background."""

from __future__ import annotations

from sam2_utils import autocast

import numpy as np
import torch

from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.measuring import Comparison, mean_metrics, measure
from finetuning.evaluation.simulated_clicks import measure_clicks
from finetuning.model.model import Model, features_for
from finetuning.segmentation.predicting import predict_masks
from finetuning.segmentation.prompts import prompt_from_mask
from finetuning.segmentation.views import UPRIGHT

# The measures: each prompt's kind and which mask counts, and each number of clicks
PROMPTED = {
    "one point": ("center", "best"),
    "random point": ("random", "best"),
    "box": ("box", "best"),
    "no prompt": ("none", "best"),
    "single: one point": ("center", "single"),
    "single: box": ("box", "single"),
}
CLICKED = {"3 clicks": 3, "5 clicks": 5}
BACKGROUND = "no object on background"
BACKGROUND_POINTS = 5  # per image
MEASURES = (*PROMPTED, *CLICKED, BACKGROUND)


def measure_all(model: Model, pairs: list[Pair]) -> dict[str, float]:
    """Return the MEASURES: mean IoUs over objects, and the result of measure_background."""
    results = {name: measure([model], pairs, *how) for name, how in PROMPTED.items()}
    ious = {name: mean_metrics(of_prompt)["IoU"] for name, of_prompt in results.items()}
    clicked = Comparison([model], pairs, results["one point"])
    by_click = measure_clicks(clicked, max(CLICKED.values()), True, "best")
    means = by_click[0].mean(axis=0)
    after_clicks = {name: float(means[count - 1]) for name, count in CLICKED.items()}
    return {**ious, **after_clicks, BACKGROUND: measure_background(model, pairs)}


def measure_point(model: Model, pairs: list[Pair]) -> dict[str, float]:
    """Return the first of the MEASURES alone, which is quick."""
    return {"one point": mean_metrics(measure([model], pairs, *PROMPTED["one point"]))["IoU"]}


@torch.no_grad()
def measure_background(model: Model, pairs: list[Pair]) -> float:
    """Return the share of points outside all objects for which the model answers "no object".

    The points are drawn uniformly and are the same for all models. Returns NaN if no image has any
    background.
    """
    no_object, predictor = [], model.predictor
    model = model._replace(views=(UPRIGHT,))  # the answer of one view
    for index, pair in enumerate(pairs):
        objects = read_objects(pair._replace(as_one=True))
        background = ~objects[0] if objects else np.ones(objects.size, bool)
        if not background.any():
            continue
        rng, count = np.random.default_rng([0, index]), BACKGROUND_POINTS
        points = [prompt_from_mask(background, "random", rng) for _ in range(count)]
        (of_image,) = features_for([model], [(pair.image, objects.size)])
        features = of_image.of([0] * count)
        with autocast(predictor.device, model.source.precision):
            prediction = predict_masks(predictor, features, points, [objects.size] * count)
        no_object += (prediction.object_logits <= 0).flatten().tolist()
    return float(np.mean(no_object)) if no_object else float("nan")
