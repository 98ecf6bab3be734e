"""Load models for a script: the fine-tuned ones, the original, and a device that works.

load_models      the original and one or several fine-tuned models, to compare them
load_segmenters  one model, and the original if it is at hand, to segment new images
trusted_device   check that Apple's MPS computes SAM 2 correctly; fall back to the CPU if not
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError, select_precision

import numpy as np
import torch
import torch.nn.functional as F
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics.files import content_sha256
from finetuning.model.checkpoints import setting
from finetuning.model.feature_cache import FeatureCache, hash_encoder
from finetuning.model.model import FeatureSource, Model, Segmenter
from finetuning.model.models import (
    find_original,
    is_published,
    load_predictor,
    locate_original,
    make_predictor,
)
from finetuning.segmentation.clean_masks import CLEANING, Cleaning, cleaning_from
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt

# Largest relative difference from the CPU; in float32, correct devices differ by less than 0.001
MPS_TOLERANCE = 0.02


class Files(NamedTuple):
    """The files of the models that are compared."""

    model_name: str
    original: Path
    finetuned: list[Path]  # several for the folds of a cross-validation
    facts: list[dict[str, Any]]  # the values beside the weights in each fine-tuned file
    image_size: int  # input size of all models, in pixels per side
    is_published: bool | None = None  # original is Meta's file (by SHA-256); None: none published
    is_start: bool | None = None  # whether training started from the original; None: unknown

    @property
    def finetuned_name(self) -> str:
        first, last = self.finetuned[0], self.finetuned[-1]
        return str(first) if first == last else f"{first} ... {last.parent.name}"


def load_models(
    finetuned_files: list[Path],
    original_file: Path | None,
    model_name: str | None,
    device: torch.device,
    insists_on_mps: bool,
    precision_name: str,
    cache_folder: Path | None,
) -> tuple[list[Model], Files]:
    """Load the original and the fine-tuned models, which must have the same size.

    The first fine-tuned file decides the input size of all. It also supplies what is not given: the
    original (the file that training started from), the precision ("auto") and the cache folder.
    All models are on one device: the CPU if MPS computes wrongly, unless insists_on_mps.

    Returns the original followed by the fine-tuned models, and their files. Masks of the original
    are cleaned as those of the first fine-tuned model. Raises UserError if the
    original is missing or has changed since training.
    """
    first, facts = load_predictor(model_name, finetuned_files[0], device)
    device = trusted_device(first, device, insists_on_mps)
    name = facts["model_name"]
    checkpoint = original_file or find_original(facts)
    size = first.model.image_size
    original, _ = load_predictor(name, checkpoint, device, size)
    precision = choose_precision(precision_name, setting(facts, "precision"), device)
    folder, own = cache_folder or setting(facts, "cache"), FeatureSource(original, precision)
    cached = own._replace(cache=FeatureCache(Path(folder), original, precision)) if folder else own
    frozen, models, all_facts = hash_encoder(original.model), [], []
    for file in finetuned_files:
        predictor, file_facts = first, facts
        if file != finetuned_files[0]:
            predictor, file_facts = load_predictor(name, file, device, size)
        all_facts.append(file_facts)
        source = FeatureSource(predictor, precision)
        # An encoder that was not trained is the original's: keep one in memory, encode images once
        if hash_encoder(predictor.model) == frozen:
            predictor.model.image_encoder = original.model.image_encoder
            source = cached
        models.append(Model(predictor, source, cleaning=cleaning_of(file_facts)))
    # Treat all models alike: if no fine-tuned one uses the cache, the original does not either
    is_shared = any(model.source is cached for model in models)
    source = cached if is_shared else own
    models.insert(0, Model(original, source, cleaning=models[0].cleaning))
    starts = {setting(file_facts, "checkpoint_sha256") for file_facts in all_facts}
    return models, Files(
        *(name, checkpoint, finetuned_files, all_facts, size, is_published(checkpoint, name)),
        is_start=None if None in starts else starts == {content_sha256(checkpoint)},
    )


def choose_precision(name: str, trained_in: str | None, device: torch.device) -> torch.dtype:
    """Return the requested precision; for "auto", that of training, else the device's default."""
    if name == "auto":
        with contextlib.suppress(UserError):  # this device lacks the precision of training
            return select_precision(trained_in or "auto", device)
    return select_precision(name, device)


def value_range_of(facts: dict[str, Any]) -> tuple[float, float] | None:
    """Return the --value-range that a model was trained with, or None."""
    limits = setting(facts, "value_range", list) or []
    are_numbers = all(isinstance(limit, int | float) for limit in limits)
    return tuple(limits) if len(limits) == 2 and are_numbers and limits[0] < limits[1] else None


def bands_of(facts: dict[str, Any]) -> str:
    """Return the --bands that a model was trained with, as typed, or ""."""
    return ",".join(map(str, setting(facts, "bands", list) or []))


def cleaning_of(facts: dict[str, Any]) -> Cleaning:
    """Return how the masks of a model are cleaned; files of other programs say nothing of it."""
    return cleaning_from(setting(facts, CLEANING, dict))


def load_segmenters(
    checkpoint: Path,
    model_name: str | None,
    device: torch.device,
    insists_on_mps: bool,
    precision_name: str,
    with_original: bool,
) -> tuple[dict[str, Segmenter], dict[str, Any]]:
    """Load a model and, with_original, the file that its training started from, if it is at hand.

    Returns the segmenters by name ("original", "fine-tuned") and the values beside the weights in
    the checkpoint. All are on the CPU if MPS computes wrongly, unless insists_on_mps.
    """
    predictor, facts = load_predictor(model_name, checkpoint, device)
    device = trusted_device(predictor, device, insists_on_mps)
    precision, original = select_precision(precision_name, device), locate_original(facts)
    is_original = original is not None and original.samefile(checkpoint)
    name, cleaning = "original" if is_original else "fine-tuned", cleaning_of(facts)
    segmenters = {name: Segmenter(predictor, precision, cleaning=cleaning)}
    if with_original and original and not is_original:
        with contextlib.suppress(UserError):  # that path may hold another model by now
            predictor, _ = load_predictor(
                facts["model_name"], original, device, predictor.model.image_size
            )
            segmenters["original"] = Segmenter(predictor, precision, cleaning=cleaning)
    return segmenters, facts


def trusted_device(
    predictor: SAM2ImagePredictor, device: torch.device, insists: bool
) -> torch.device:
    """Return the predictor's device; if MPS computes wrongly, move the predictor to the CPU.

    Prints a warning; with insists, the device stays MPS.
    """
    if device.type != "mps":
        return device
    wrong = [
        f"{name} {difference:.0%}"
        for name, difference in differences_from_cpu(predictor).items()
        if not difference <= MPS_TOLERANCE  # also true for NaN
    ]
    if not wrong:
        return device
    print(
        f"warning: MPS computes SAM 2 wrongly on this system (differences from the CPU: "
        f"{', '.join(wrong)}); a newer macOS or PyTorch may fix it"
    )
    if insists:
        print("warning: using MPS anyway, because of --device mps")
        return device
    print("using the CPU instead, which is slower")
    predictor.model.to("cpu")
    return torch.device("cpu")


def differences_from_cpu(predictor: SAM2ImagePredictor) -> dict[str, float]:
    """Return |device - CPU| / |CPU| for the features, mask logits and gradients of one image.

    The model is not changed.
    """
    on_cpu = make_predictor(copy.deepcopy(predictor.model).to("cpu"))
    here, expected = _compute(predictor), _compute(on_cpu)
    return {
        name: float((here[name] - values).norm() / values.norm())
        for name, values in expected.items()
    }


def _compute(predictor: SAM2ImagePredictor) -> dict[str, torch.Tensor]:
    """Return the features, mask logits and gradients for a drawn disk, as vectors on the CPU."""
    size = 256
    y, x = np.mgrid[:size, :size]
    disk = (x - 140) ** 2 + (y - 110) ** 2 < 50**2
    noise = np.random.default_rng(0).integers(0, 60, (size, size, 3), dtype=np.uint8)
    image = noise + (150 * disk[..., None]).astype(np.uint8)

    features = encode_images(predictor, [image])
    prediction = predict_masks(predictor, features, [make_prompt([(140, 110)])], [(size, size)])
    target = torch.from_numpy(disk.astype(np.float32)).to(predictor.device)[None, None]
    target = F.interpolate(target, prediction.mask_logits.shape[-2:]).expand_as(
        prediction.mask_logits
    )
    loss = F.binary_cross_entropy_with_logits(prediction.mask_logits, target)
    loss = loss + prediction.iou_scores.mean()
    weights = list(predictor.model.sam_mask_decoder.parameters())
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        "features": _vector([features.image_embed, *features.high_res_feats]),
        "mask logits": _vector([prediction.mask_logits]),
        "gradients": _vector([gradient for gradient in gradients if gradient is not None]),
    }


def _vector(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().cpu().float().flatten() for tensor in tensors])
