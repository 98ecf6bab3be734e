"""A model with its image features: encode an image once, then segment it with any prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import autocast

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics.image_files import read_image, require_equal_sizes
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.prompts import Prompt
from finetuning.model.segmentation import (
    Features,
    encode_images,
    segment_together,
    segment_with_logits,
)


class FeatureSource(NamedTuple):
    """Where an image's features come from: a cache, as far as it has them, or the encoder."""

    predictor: SAM2ImagePredictor
    precision: torch.dtype
    cache: FeatureCache | None = None

    def features(self, image: Path, mask_size: tuple[int, int] | None = None) -> Features:
        """Return float32 features of one image on the predictor's device.

        mask_size: (H,W) of the image's mask, if it has one; raises UserError for another size.
        """
        device, is_cached = self.predictor.device, self.cache is not None and image in self.cache
        pixels = None if is_cached else read_image(image)
        size = self.cache.size(image) if is_cached else pixels.shape[:2]
        require_equal_sizes(image, size, "its mask", mask_size or size)
        if is_cached:
            return self.cache.read([image]).to(device, torch.float32)
        with autocast(device, self.precision):
            features = encode_images(self.predictor, [pixels])
        if self.cache is not None:  # round them as the cache does, so that the same numbers follow
            features = features.to(device, torch.float16)
        return features.to(device, torch.float32).channels_last()


class Model(NamedTuple):
    """A model to measure, and where it has the features of images from."""

    predictor: SAM2ImagePredictor
    source: FeatureSource  # models with one encoder share it


def features_for(
    models: Sequence[Model], images: Sequence[tuple[Path, tuple[int, int]]]
) -> list[Features]:
    """Return the features of B images for each model; models with one source share them.

    images: each one's file, and the (H,W) of its mask. Raises UserError where the image has
    another size.
    """
    sources = {model.source for model in models}
    of_source = {
        source: Features.join([source.features(*image) for image in images]) for source in sources
    }
    return [of_source[model.source] for model in models]


def segment_with_all(
    models: Sequence[Model],
    features: Sequence[Features],
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    mask_kind: str = "best",
) -> list[list[np.ndarray]]:
    """Return each model's HxW bool masks for B prompts of as many points each.

    features: of each model, for B images of these (H,W).
    """
    masks = []
    for model, of_model in zip(models, features, strict=True):
        with autocast(model.predictor.device, model.source.precision):
            predicted = segment_together(model.predictor, of_model, prompts, image_sizes, mask_kind)
        masks.append(predicted)
    return masks


class Segmenter:
    """Segments one image at a time, which is encoded once."""

    def __init__(self, predictor: SAM2ImagePredictor, precision: torch.dtype) -> None:
        self.predictor, self.precision = predictor, precision
        self.features: Features | None = None
        self.size = (0, 0)  # (H,W) of the image

    def encode(self, image: np.ndarray) -> None:
        """Encode an HxWx3 uint8 RGB image: the slow part."""
        with autocast(self.predictor.device, self.precision):
            self.features = encode_images(self.predictor, [image])
        self.size = image.shape[:2]

    def segment(
        self, prompt: Prompt, mask_input: torch.Tensor | None = None
    ) -> tuple[np.ndarray, float, torch.Tensor]:
        """Return the HxW bool mask, its score, and its logits: the mask_input of the next call."""
        with autocast(self.predictor.device, self.precision):
            return segment_with_logits(self.predictor, self.features, prompt, self.size, mask_input)
