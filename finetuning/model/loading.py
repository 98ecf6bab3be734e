"""Loading models for a script: the fine-tuned one, the original beside it, a device that works."""

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
from finetuning.model.prompts import make_prompt
from finetuning.model.segmentation import encode_images, predict_masks

TOLERANCE = 0.02  # relative; float32 differs by less than 0.001 between devices that are right


class Files(NamedTuple):
    """The files of the models that are compared."""

    model_name: str
    original: Path
    finetuned: list[Path]  # several: of folds
    facts: list[dict[str, Any]]  # what each of these holds beside its weights
    image_size: int  # what both resize images to, in pixels a side
    is_published: bool | None = None  # the original, by its SHA-256; None: no such model is
    is_start: bool | None = None  # whether training started from the original; None: not known

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
    """Load the original and the fine-tuned models, which must be of the same size.

    All resize images as the (first) fine-tuned file says. Where the files are not given, the
    original is what training started from, the precision (auto) and the folder of the features are
    those of the training. Where MPS computes wrongly, unless insisted on, all are on the CPU.
    Raises UserError where training started from another file than is there.
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
        predictor, of_file = first, facts
        if file != finetuned_files[0]:
            predictor, of_file = load_predictor(name, file, device, size)
        all_facts.append(of_file)
        source = FeatureSource(predictor, precision)
        if hash_encoder(predictor.model) == frozen:
            predictor.model.image_encoder = original.model.image_encoder  # in memory once
            source = cached
        models.append(Model(predictor, source))
    is_shared = any(model.source is cached for model in models)
    models.insert(0, Model(original, cached if is_shared else own))
    starts = {setting(of_file, "checkpoint_sha256") for of_file in all_facts}
    return models, Files(
        *(name, checkpoint, finetuned_files, all_facts, size, is_published(checkpoint, name)),
        is_start=None if None in starts else starts == {content_sha256(checkpoint)},
    )


def choose_precision(name: str, trained_in: str | None, device: torch.device) -> torch.dtype:
    """Return the precision asked for, else that of the training, else the device's own."""
    if name == "auto":
        with contextlib.suppress(UserError):  # trained on a device with other abilities
            return select_precision(trained_in or "auto", device)
    return select_precision(name, device)


def value_range_of(facts: dict[str, Any]) -> tuple[float, float] | None:
    """Return the range of values that a model was trained on, if its file says one."""
    limits = setting(facts, "value_range", list) or []
    are_numbers = all(isinstance(limit, int | float) for limit in limits)
    return tuple(limits) if len(limits) == 2 and are_numbers and limits[0] < limits[1] else None


def load_segmenters(
    checkpoint: Path,
    model_name: str | None,
    device: torch.device,
    insists_on_mps: bool,
    precision_name: str,
    with_original: bool,
) -> tuple[dict[str, Segmenter], dict[str, Any]]:
    """Load a model and, if asked for and at hand, the original; return them by name.

    Returns as well what the checkpoint says. Where MPS computes wrongly, unless insisted on, the
    models are on the CPU.
    """
    predictor, facts = load_predictor(model_name, checkpoint, device)
    device = trusted_device(predictor, device, insists_on_mps)
    precision, original = select_precision(precision_name, device), locate_original(facts)
    is_original = original is not None and original.samefile(checkpoint)
    segmenters = {"original" if is_original else "fine-tuned": Segmenter(predictor, precision)}
    if with_original and original and not is_original:
        with contextlib.suppress(UserError):  # it may be another model by now
            predictor, _ = load_predictor(
                facts["model_name"], original, device, predictor.model.image_size
            )
            segmenters["original"] = Segmenter(predictor, precision)
    return segmenters, facts


def trusted_device(
    predictor: SAM2ImagePredictor, device: torch.device, insists: bool
) -> torch.device:
    """Return the predictor's device; or, where MPS computes wrongly, move it to the CPU.

    It says so, and how to mend it. Who insists on MPS keeps it, with a warning.
    """
    if device.type != "mps":
        return device
    wrong = [
        f"{name} by {difference:.0%}"
        for name, difference in differences_from_cpu(predictor).items()
        if not difference <= TOLERANCE  # nor NaN
    ]
    if not wrong:
        return device
    print(
        f"warning: MPS computes SAM 2 wrongly on this system ({', '.join(wrong)} off what the CPU "
        "gives); a newer macOS or PyTorch may be right"
    )
    if insists:
        print("warning: going on with MPS all the same, as --device mps asks")
        return device
    print("going on with the CPU, only slower")
    predictor.model.to("cpu")
    return torch.device("cpu")


def differences_from_cpu(predictor: SAM2ImagePredictor) -> dict[str, float]:
    """Return |here - CPU| / |CPU| of an image's features, its mask logits, and their gradients.

    The model stays as it is.
    """
    on_cpu = make_predictor(copy.deepcopy(predictor.model).to("cpu"))
    here, expected = _compute(predictor), _compute(on_cpu)
    return {
        name: float((here[name] - values).norm() / values.norm())
        for name, values in expected.items()
    }


def _compute(predictor: SAM2ImagePredictor) -> dict[str, torch.Tensor]:
    """Return the features, mask logits and gradients of a drawn disk, each a vector on the CPU."""
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
