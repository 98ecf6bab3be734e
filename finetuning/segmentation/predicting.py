"""From an image and a prompt to masks and scores: the one path that all scripts share.

    features = encode_images(predictor, [image])                         # slow, once per image
    prediction = predict_masks(predictor, features, [prompt], [(H, W)])  # fast, for each prompt
    logits, score = choose_masks(predictor, prediction)                  # the best of three masks
    mask = upscale_masks(predictor, logits, (H, W))[0, 0] > 0            # HxW bool

Training calls predict_masks, which lets gradients flow. Validation, comparison and inference call
segment_together or segment_with_logits, which do all steps after the first without gradients. So
all scripts agree on every number.

In the shapes below, B is the number of images, S the model's input size (1024 by default, 256 for
mini), C the number of channels, and (H,W) the size of an image.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

from sam2_utils import NotFiniteError

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.segmentation.averaging import ViewFeatures, average_views
from finetuning.segmentation.features import Features
from finetuning.segmentation.prompts import Prompt

# Below this image side, masks are upscaled whole: for an output whose width and height add up to
# 128 or less, torch computes in another order, which changes last digits
SMALL_SIDE = 129


class Prediction(NamedTuple):
    """The mask decoder's output for B prompts.

    mask_logits: Bx4x(S/4)x(S/4) float32, above 0 inside. Mask 0 is SAM 2's single mask; masks 1 to
      3 are alternatives for ambiguous prompts (a part, or the whole).
    iou_scores: Bx4 float32, the IoU that the model predicts for each mask.
    object_logits: Bx1 float32, above 0 if the model sees an object.
    """

    mask_logits: torch.Tensor
    iou_scores: torch.Tensor
    object_logits: torch.Tensor


def feature_shapes(model: SAM2Base) -> list[tuple[int, int, int]]:
    """Return (H,W,C) of each map of an image in Features: image_embed, then high_res_feats."""
    size, channels = model.image_size, model.sam_prompt_embed_dim
    levels = ((16, channels), (4, channels // 8), (8, channels // 4))
    return [(size // stride, size // stride, depth) for stride, depth in levels]


class PromptedDecoder(torch.nn.Module):
    """The parts of SAM 2 that are fine-tuned: the prompt encoder and the mask decoder.

    One module for both, so that torch.compile and DistributedDataParallel can wrap it.
    """

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.prompt_encoder = model.sam_prompt_encoder
        self.mask_decoder = model.sam_mask_decoder

    def forward(
        self,
        features: Features,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the fields of a Prediction.

        Arguments:
          features: of B images.
          point_coords: BxNx2 float (X,Y) in pixels of the model's square input.
          point_labels: BxN int, as in Prompt.
          mask_inputs: as in predict_masks.
        """
        prompt_embeddings = self.embed_prompts(point_coords, point_labels, mask_inputs)
        return self.decode_masks(features, *prompt_embeddings)

    def embed_prompts(
        self,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sparse embeddings, BxTxC for T tokens, and the dense ones, BxCxhxw.

        N = 0 means no prompt; then T is 0, as in SAM2ImagePredictor.predict().
        """
        if not point_coords.shape[1]:  # given empty points, SAM 2 would add a padding point
            sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=mask_inputs)
            count = len(point_coords)
            return sparse.expand(count, -1, -1), dense.expand(count, -1, -1, -1)
        return self.prompt_encoder(
            points=(point_coords, point_labels), boxes=None, masks=mask_inputs
        )

    def decode_masks(
        self, features: Features, sparse_embeddings: torch.Tensor, dense_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the fields of a Prediction for embedded prompts."""
        # On a CPU, plain attention is faster than the flash kernel here: the tokens are few.
        on_cpu = features.image_embed.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
            # Not the decoder's forward, which returns either the single mask or the three
            mask_logits, iou_scores, _, object_logits = self.mask_decoder.predict_masks(
                image_embeddings=features.image_embed,
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse_embeddings,
                dense_prompt_embeddings=dense_embeddings,
                repeat_image=False,
                high_res_features=features.high_res_feats,
            )
        return mask_logits.float(), iou_scores.float(), object_logits.float()


def encode_images(predictor: SAM2ImagePredictor, images: list[np.ndarray]) -> Features:
    """Run the image encoder without gradients on HxWx3 uint8 RGB images of any sizes."""
    predictor.set_image_batch(images)
    return Features(**predictor._features)


def predict_masks(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    decoder: torch.nn.Module | None = None,
    mask_inputs: torch.Tensor | None = None,
) -> Prediction:
    """Predict masks and scores from features and prompts, with gradients.

    Arguments:
      features: of B images.
      prompts: one per image, in pixels of that image; all with the same number N of points.
      image_sizes: (H,W) of each image.
      decoder: the predictor's PromptedDecoder if it is compiled or distributed; None: make one.
      mask_inputs: Bx1x(S/4)x(S/4) logits of earlier masks for the prompts to correct, or None.
    """
    model, transforms = predictor.model, predictor._transforms

    # Convert the points from pixels of each image to pixels of the model's square input
    coords = [
        transforms.transform_coords(torch.from_numpy(prompt.point_coords), True, size)
        for prompt, size in zip(prompts, image_sizes, strict=True)
    ]
    labels = [torch.from_numpy(prompt.point_labels) for prompt in prompts]
    points = torch.stack(coords).to(model.device), torch.stack(labels).to(model.device)

    # Prompt encoder and mask decoder
    return Prediction(*(decoder or PromptedDecoder(model))(features, *points, mask_inputs))


def choose_masks(
    predictor: SAM2ImagePredictor, prediction: Prediction, kind: str = "best"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one mask per image; return its Bx1x(S/4)x(S/4) logits and Bx1 scores.

    kind: "best" takes the one of masks 1 to 3 with the highest predicted score. "single" does what
    other tools do: it takes mask 0, or the best of the three if SAM 2 finds mask 0 unstable.
    """
    if kind == "single":
        return predictor.model.sam_mask_decoder._dynamic_multimask_via_stability(
            prediction.mask_logits, prediction.iou_scores
        )
    mask_logits, iou_scores = prediction.mask_logits[:, 1:], prediction.iou_scores[:, 1:]
    best = iou_scores.argmax(-1, keepdim=True)
    return mask_logits.take_along_dim(best[..., None, None], 1), iou_scores.gather(-1, best)


def upscale_masks(
    predictor: SAM2ImagePredictor, mask_logits: torch.Tensor, image_size: tuple[int, int]
) -> torch.Tensor:
    """Upscale BxCxhxw mask logits to BxCxHxW, where (H,W) is the size of the original image."""
    return predictor._transforms.postprocess_masks(mask_logits, image_size)


def upscale_to_mask(
    predictor: SAM2ImagePredictor, mask_logits: torch.Tensor, image_size: tuple[int, int]
) -> CroppedMask:
    """Return where 1x1xhxw mask logits are above 0, upscaled to the (H,W) of the original image.

    The values are those of upscale_masks, to the last digit, but only computed where they can be
    above 0: in a large image, upscaling a small object would take most of the time.
    """
    (height, width), cells = image_size, (mask_logits[0, 0] > 0).cpu().numpy()
    if not cells.any():
        return CroppedMask(np.zeros((1, 1), bool), 0, 0, image_size)
    rows, columns = slice(None), slice(None)
    if min(image_size) >= SMALL_SIDE:
        rows, columns = _reach(cells.any(axis=1), height), _reach(cells.any(axis=0), width)
        # First the columns, then the rows: bilinear upscaling treats them one after the other
        mask_logits = upscale_masks(predictor, mask_logits, (len(cells), width))[..., columns]
        width = mask_logits.shape[-1]
    values = upscale_masks(predictor, mask_logits, (height, width))[0, 0, rows]
    mask = (values > 0).cpu().numpy()
    return crop_mask(CroppedMask(mask, columns.start or 0, rows.start or 0, image_size))


def _reach(cells: np.ndarray, side: int) -> slice:
    """Return which of the pixels along a side depend on cells that are True.

    cells: N bool, along the same side. A pixel depends on the two cells around its center.
    """
    found, scale = np.flatnonzero(cells), side / len(cells)
    first, last = (found[0] - 1) * scale, (found[-1] + 2) * scale
    return slice(max(0, int(first)), min(side, int(last) + 1))


def require_finite(prediction: Prediction) -> None:
    """Raise NotFiniteError if scores are not finite."""
    if not torch.isfinite(prediction.iou_scores).all():
        raise NotFiniteError("the model's scores are not finite (NaN); lower --lr, or use float32")


def predict_best(
    predictor: SAM2ImagePredictor,
    features: Features | ViewFeatures,
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    mask_inputs: torch.Tensor | None = None,
    kind: str = "best",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict and choose one mask per image; return its Bx1x(S/4)x(S/4) logits and Bx1 scores.

    The arguments are those of predict_masks and choose_masks. For features of several views, each
    view chooses its own mask, and the result is the average. Raises NotFiniteError if scores are
    not finite.
    """
    if isinstance(features, ViewFeatures):
        predict = functools.partial(predict_best, predictor, kind=kind)
        return average_views(predict, features, prompts, image_sizes, mask_inputs)
    prediction = predict_masks(predictor, features, prompts, image_sizes, mask_inputs=mask_inputs)
    require_finite(prediction)
    return choose_masks(predictor, prediction, kind)


@torch.no_grad()
def segment_together(
    predictor: SAM2ImagePredictor,
    features: Features | ViewFeatures,
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    kind: str = "best",
) -> list[CroppedMask]:
    """Segment B images in one batch; return their masks.

    The prompts all have the same number of points. kind: as in choose_masks. Raises NotFiniteError
    if scores are not finite.
    """
    mask_logits, _ = predict_best(predictor, features, prompts, image_sizes, kind=kind)
    return [
        upscale_to_mask(predictor, logits[None], size)
        for logits, size in zip(mask_logits, image_sizes, strict=True)
    ]


@torch.no_grad()
def segment_with_logits(
    predictor: SAM2ImagePredictor,
    features: Features | ViewFeatures,
    prompt: Prompt,
    image_size: tuple[int, int],
    mask_input: torch.Tensor | None = None,
    kind: str = "best",
) -> tuple[np.ndarray, float, torch.Tensor]:
    """Segment one image; also return the logits, for a next prompt to correct the mask.

    mask_input: the logits that an earlier call returned, or None. Returns the HxW bool mask, its
    score, and its 1x1x(S/4)x(S/4) logits, clamped as SAM2ImagePredictor clamps them.
    kind: as in choose_masks. Raises NotFiniteError if the scores are not finite.
    """
    mask_logits, scores = predict_best(
        predictor, features, [prompt], [image_size], mask_input, kind
    )
    mask = upscale_to_mask(predictor, mask_logits, image_size).full()
    return mask, float(scores), mask_logits.clamp(-32, 32)
