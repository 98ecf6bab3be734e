"""The models that are compared: loaded alike, with one encoder in memory where it is the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError, select_precision

import torch

from finetuning.basics.files import content_sha256
from finetuning.checkpoints import setting
from finetuning.device_check import trusted_device
from finetuning.evaluation import Model
from finetuning.feature_cache import FeatureCache, hash_encoder
from finetuning.feature_source import FeatureSource
from finetuning.models import find_original, is_published, load_predictor


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
