"""How good models are: the same prompts for all of them, and metrics of their masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sam2_utils import autocast, calculate_dice, calculate_iou

import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.feature_cache import FeatureSource
from finetuning.image_files import read_mask
from finetuning.pairs import Pair
from finetuning.prompts import Prompt, prompt_from_mask
from finetuning.segmentation import Features, segment

# What is measured of a predicted and a true HxW bool mask. One more line here is in the log, the
# tables and results.csv.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "IoU": calculate_iou,
    "Dice": calculate_dice,
}
RESAMPLES = 10_000  # of the bootstrap


class Model(NamedTuple):
    """A model to measure, and where it has the features of images from."""

    predictor: SAM2ImagePredictor
    source: FeatureSource  # models with one encoder share it


class Result(NamedTuple):
    """What one or more models made of one image."""

    index: int  # among the pairs
    pair: Pair
    prompt: Prompt
    area_fraction: float  # of the image that the true mask covers, 0 to 1
    metrics: list[dict[str, float]]  # of each model, by the names of METRICS

    @property
    def gain(self) -> float:
        """How much the IoU of the last model is above that of the first."""
        return self.metrics[-1]["IoU"] - self.metrics[0]["IoU"]


def measure(
    models: Sequence[Model],
    pairs: list[Pair],
    prompt_kind: str = "center",
    mask_kind: str = "best",
    seed: int = 0,
    description: str = "Measuring",
) -> list[Result]:
    """Measure models on the same prompts; pairs with an empty mask are left out.

    Arguments:
      prompt_kind: as in prompt_from_mask.
      mask_kind: best or single, as in choose_masks.
      seed: of random points.
      description: of the progress bar.
    """
    results = []
    for index, pair in enumerate(tqdm(pairs, desc=description, unit="image", leave=False)):
        true_mask = read_mask(pair.mask)
        if not true_mask.any():
            continue
        prompt = prompt_from_mask(true_mask, prompt_kind, np.random.default_rng([seed, index]))
        masks = segment_with_all(models, pair, prompt, true_mask.shape, mask_kind)
        metrics = [
            {name: float(metric(mask, true_mask)) for name, metric in METRICS.items()}
            for mask in masks
        ]
        results.append(Result(index, pair, prompt, float(true_mask.mean()), metrics))
    return results


def segment_with_all(
    models: Sequence[Model],
    pair: Pair,
    prompt: Prompt,
    image_size: tuple[int, int],
    mask_kind: str = "best",
) -> list[np.ndarray]:
    """Return each model's HxW bool mask of an image of (H,W) pixels, for one prompt."""
    masks = []
    for model, features in zip(models, features_for(models, pair, image_size), strict=True):
        with autocast(model.predictor.device, model.source.precision):
            masks.append(segment(model.predictor, features, prompt, image_size, mask_kind)[0])
    return masks


def features_for(models: Sequence[Model], pair: Pair, mask_size: tuple[int, int]) -> list[Features]:
    """Return an image's features for each model; models with one source have the same.

    mask_size: (H,W) of the pair's mask. Raises UserError where the image has another.
    """
    sources = {model.source for model in models}
    of_source = {source: source.features(pair.image, mask_size) for source in sources}
    return [of_source[model.source] for model in models]


def mean_metrics(results: list[Result], model: int = 0) -> dict[str, float]:
    """Return the mean of each metric of one of the models."""
    return {
        name: float(np.mean([result.metrics[model][name] for result in results]))
        for name in METRICS
    }


def bootstrap_interval(gains: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean of M gains in IoU, one an image.

    It is the percentile interval of the bootstrap (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) over images, whose two IoUs stay paired.
    """
    rng = np.random.default_rng(seed)
    parts = [  # not all at once, which would fill the memory with many images
        gains[rng.integers(len(gains), size=(RESAMPLES // 100, len(gains)))].mean(axis=1)
        for _ in range(100)
    ]
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(low), float(high)
