"""How good models are: the same prompts for all of them, and metrics of their masks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sam2_utils import autocast

import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.feature_source import FeatureSource
from finetuning.metrics import METRICS, Metric
from finetuning.objects import read_objects
from finetuning.pairs import Pair
from finetuning.prompts import Prompt, prompt_from_mask
from finetuning.segmentation import Features, segment

RESAMPLES = 10_000  # of the bootstrap


class Model(NamedTuple):
    """A model to measure, and where it has the features of images from."""

    predictor: SAM2ImagePredictor
    source: FeatureSource  # models with one encoder share it


class Result(NamedTuple):
    """What one or more models made of one object."""

    index: int  # of its image among the pairs
    object: int  # its number in its image, from 0
    pair: Pair
    prompt: Prompt
    area_fraction: float  # of the image that the true mask covers, 0 to 1
    metrics: list[dict[str, float]]  # of each model, by their names
    models: Sequence[Model] = ()  # which made them

    @property
    def name(self) -> tuple[str, int]:
        """Its image's file name, and its number in it, from 1."""
        return self.pair.image.name, self.object + 1

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
    metrics: Mapping[str, Metric] = METRICS,
    first_index: int = 0,
) -> list[Result]:
    """Measure models on every object, with the same prompts; an image without any is left out.

    Without a prompt (none), all objects of an image are one.

    Arguments:
      prompt_kind: as in prompt_from_mask.
      mask_kind: best or single, as in choose_masks.
      seed: of random points.
      description: of the progress bar.
      metrics: by name.
      first_index: of the first pair.
    """
    results = []
    progress = tqdm(pairs, desc=description, unit="image", leave=False)
    for index, pair in enumerate(progress, first_index):
        pair = pair._replace(as_one=prompt_kind == "none")
        objects = read_objects(pair)
        if not objects:
            continue
        features = features_for(models, pair, objects.size)
        for k, true_mask in enumerate(objects):
            prompt = prompt_from_mask(
                true_mask, prompt_kind, np.random.default_rng([seed, index, k])
            )
            masks = segment_with_all(models, features, prompt, objects.size, mask_kind)
            of_models = [
                {name: float(metric(mask, true_mask)) for name, metric in metrics.items()}
                for mask in masks
            ]
            area = float(true_mask.mean())
            results.append(Result(index, k, pair, prompt, area, of_models, models))
    return results


def features_for(models: Sequence[Model], pair: Pair, mask_size: tuple[int, int]) -> list[Features]:
    """Return an image's features for each model; models with one source have the same.

    mask_size: (H,W) of the pair's mask. Raises UserError where the image has another.
    """
    sources = {model.source for model in models}
    of_source = {source: source.features(pair.image, mask_size) for source in sources}
    return [of_source[model.source] for model in models]


def segment_with_all(
    models: Sequence[Model],
    features: Sequence[Features],
    prompt: Prompt,
    image_size: tuple[int, int],
    mask_kind: str = "best",
) -> list[np.ndarray]:
    """Return each model's HxW bool mask for one prompt, of features_for it of an image of (H,W)."""
    masks = []
    for model, of_model in zip(models, features, strict=True):
        with autocast(model.predictor.device, model.source.precision):
            masks.append(segment(model.predictor, of_model, prompt, image_size, mask_kind)[0])
    return masks


def group_by_image(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of each image's objects together."""
    return [list(group) for _, group in itertools.groupby(results, key=lambda result: result.index)]


def mean_metrics(results: list[Result], model: int = 0) -> dict[str, float]:
    """Return the mean of each metric of one of the models."""
    return {
        name: float(np.mean([result.metrics[model][name] for result in results]))
        for name in results[0].metrics[model]
    }


def mean_gain(results: list[Result]) -> float:
    """Return the mean of how much the IoU is above that of the first model."""
    return float(np.mean([result.gain for result in results]))


def unit_of(results: Sequence[Result]) -> str:
    """Say what is counted: "image", where each has one object, else "object"."""
    return "image" if len({result.index for result in results}) == len(results) else "object"


def bootstrap_interval(
    gains: np.ndarray, seed: int, images: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean of M gains in IoU, one an object.

    It is the percentile interval of the bootstrap (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) over images, since objects of one image are not independent; the
    two IoUs of an object stay paired. images: of M ints, which are equal for objects of one image;
    by default, each is in an image of its own.
    """
    images = np.arange(len(gains)) if images is None else images
    rng = np.random.default_rng(seed)
    _, of_image = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(of_image, gains), np.bincount(of_image)
    parts = []
    for _ in range(100):  # not all at once, which would fill the memory with many images
        drawn = rng.integers(len(sums), size=(RESAMPLES // 100, len(sums)))
        parts.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(low), float(high)
