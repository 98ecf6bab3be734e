"""A model and the image that it has encoded: asked as often as one likes, at little cost."""

from __future__ import annotations

from sam2_utils import autocast

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.prompts import Prompt
from finetuning.segmentation import Features, encode_images, segment_with_logits


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
