"""A model together with the source of its image features.

Encoding an image is slow; segmenting it with a prompt is fast. So every caller encodes an image
once and then segments it with any number of prompts:

FeatureSource  returns an image's features, from the cache or from the encoder
Model          a predictor and its FeatureSource, as training, validation and comparison measure it
Segmenter      one image in memory and its features, as inference uses it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sam2_utils import autocast

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.basics.image_files import require_equal_sizes
from finetuning.model.feature_cache import CachedImage, FeatureCache
from finetuning.model.image_variants import ImageVariant, file_of, read_variant
from finetuning.segmentation.averaging import ViewFeatures, with_views
from finetuning.segmentation.clean_masks import NO_CLEANING, Cleaning, clean
from finetuning.segmentation.features import Features
from finetuning.segmentation.predicting import encode_images, segment_together, segment_with_logits
from finetuning.segmentation.prompts import Prompt
from finetuning.segmentation.views import UPRIGHT, View


class FeatureSource(NamedTuple):
    """Return image features from the cache if they are there, else compute them."""

    predictor: SAM2ImagePredictor
    precision: torch.dtype
    cache: FeatureCache | None = None

    def features(
        self,
        image: CachedImage,
        mask_size: tuple[int, int] | None = None,
        views: tuple[View, ...] = (UPRIGHT,),
    ) -> Features | ViewFeatures:
        """Return the float32 features of an image, or of views of it, on the predictor's device.

        mask_size: the (H,W) of its mask, if it has one. Raises UserError if the image has
        another size.
        """
        variants = [image if view == UPRIGHT else ImageVariant(image, view) for view in views]
        cached = [self.cache is not None and variant in self.cache for variant in variants]
        pixels = None if all(cached) else read_variant(image)  # read once for all views
        if pixels is None:
            size = views[0].of_size(self.cache.size(variants[0]))
        else:
            size = pixels.shape[:2]
        require_equal_sizes(file_of(image), size, "its mask", mask_size or size)
        of_views = [
            self.cache.read([variant]).to(self.predictor.device, torch.float32)
            if is_cached
            else self._encode(view.of_array(pixels))
            for view, variant, is_cached in zip(views, variants, cached, strict=True)
        ]
        return with_views(views, of_views)

    def _encode(self, image: np.ndarray) -> Features:
        device = self.predictor.device
        with autocast(device, self.precision):
            features = encode_images(self.predictor, [image])
        if self.cache is not None:  # round to float16 as the cache does, so both ways agree
            features = features.to(device, torch.float16)
        return features.to(device, torch.float32).channels_last()


class Model(NamedTuple):
    """A model, the source of its image features, and what is done with its masks.

    views: of each image. The masks of several views are averaged.
    """

    predictor: SAM2ImagePredictor
    source: FeatureSource  # shared by models with the same encoder
    views: tuple[View, ...] = (UPRIGHT,)
    cleaning: Cleaning = NO_CLEANING


def features_for(
    models: Sequence[Model], images: Sequence[tuple[CachedImage, tuple[int, int]]]
) -> list[Features | ViewFeatures]:
    """Return each model's features of B images; models with the same source and views share them.

    images: each image and the (H,W) of its mask. Raises UserError if the image has
    another size.
    """
    features = {}
    for source, views in {(model.source, model.views) for model in models}:
        parts = [source.features(*image, views) for image in images]
        features[source, views] = type(parts[0]).join(parts)
    return [features[model.source, model.views] for model in models]


def segment_with_all(
    models: Sequence[Model],
    features: Sequence[Features | ViewFeatures],
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    mask_kind: str = "best",
) -> list[list[CroppedMask]]:
    """Return each model's B masks for B images with one prompt each.

    Arguments:
      features: each model's features of the B images.
      prompts: one per image, all with the same number of points.
      image_sizes: (H,W) of each image.
      mask_kind: as in choose_masks.
    """
    masks = []
    for model, model_features in zip(models, features, strict=True):
        predictor = model.predictor
        with autocast(predictor.device, model.source.precision):
            found = segment_together(predictor, model_features, prompts, image_sizes, mask_kind)
        masks.append([clean(*one, model.cleaning) for one in zip(found, prompts, strict=True)])
    return masks


class Segmenter:
    """Encode an image once, then segment it with any number of prompts.

    views: of each image. The masks of several views are averaged.
    """

    def __init__(
        self,
        predictor: SAM2ImagePredictor,
        precision: torch.dtype,
        views: tuple[View, ...] = (UPRIGHT,),
        cleaning: Cleaning = NO_CLEANING,
    ) -> None:
        self.predictor, self.precision = predictor, precision
        self.views, self.cleaning = views, cleaning
        self.features: Features | ViewFeatures | None = None
        self.size = (0, 0)  # (H,W) of the image

    def encode(self, image: np.ndarray) -> None:
        """Encode an HxWx3 uint8 RGB image, the slow part, and keep its features."""
        with autocast(self.predictor.device, self.precision):
            of_views = [
                encode_images(self.predictor, [view.of_array(image)]) for view in self.views
            ]
        self.features = with_views(self.views, of_views)
        self.size = image.shape[:2]

    def segment(
        self, prompt: Prompt, mask_input: torch.Tensor | None = None
    ) -> tuple[np.ndarray, float, torch.Tensor]:
        """Segment the encoded image with a prompt.

        Returns the HxW bool mask, its score, and its logits, which can be the mask_input of the
        next call to correct this mask; they are not cleaned.
        """
        with autocast(self.predictor.device, self.precision):
            mask, score, logits = segment_with_logits(
                self.predictor, self.features, prompt, self.size, mask_input
            )
        return clean(crop_mask(mask), prompt, self.cleaning).full(), score, logits
