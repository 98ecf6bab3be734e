"""The models that are compared: loaded alike, with one encoder in memory where it is the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError, select_precision

import torch

from finetuning.checkpoints import file_sha256, setting
from finetuning.device_check import trusted_device
from finetuning.evaluation import Model
from finetuning.feature_cache import FeatureCache, hash_encoder
from finetuning.feature_source import FeatureSource
from finetuning.models import MODELS, ensure_checkpoint, load_predictor


class Files(NamedTuple):
    """The files of the models that are compared."""

    model_name: str
    original: Path
    finetuned: list[Path]  # several: of folds
    facts: dict[str, Any]  # what the (first) fine-tuned file holds beside its weights
    image_size: int  # what both resize images to, in pixels a side
    is_published: bool | None = None  # the original, by its SHA-256; None: no such model is

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
    """
    first, facts = load_predictor(model_name, finetuned_files[0], device)
    device = trusted_device(first, device, insists_on_mps)
    name, started_from = facts["model_name"], Path(setting(facts, "checkpoint") or "")
    checkpoint = original_file or (
        started_from if started_from.is_file() else ensure_checkpoint(name)
    )
    size = first.model.image_size
    original, _ = load_predictor(name, checkpoint, device, size)
    precision = choose_precision(precision_name, setting(facts, "precision"), device)
    folder, own = cache_folder or setting(facts, "cache"), FeatureSource(original, precision)
    cached = own._replace(cache=FeatureCache(Path(folder), original, precision)) if folder else own
    frozen, models = hash_encoder(original.model), []
    for file in finetuned_files:
        predictor = (
            first if file == finetuned_files[0] else load_predictor(name, file, device, size)[0]
        )
        source = FeatureSource(predictor, precision)
        if hash_encoder(predictor.model) == frozen:
            predictor.model.image_encoder = original.model.image_encoder  # in memory once
            source = cached
        models.append(Model(predictor, source))
    is_shared = any(model.source is cached for model in models)
    models.insert(0, Model(original, cached if is_shared else own))
    return models, Files(
        name, checkpoint, finetuned_files, facts, size, is_published(checkpoint, name)
    )


def is_published(checkpoint: Path, model_name: str) -> bool | None:
    """Say whether a file is SAM 2.1's own of that size; None where there is none to download."""
    sha256 = MODELS[model_name].sha256
    return None if sha256 is None else file_sha256(checkpoint) == sha256


def choose_precision(name: str, trained_in: str | None, device: torch.device) -> torch.dtype:
    """Return the precision asked for, else that of the training, else the device's own."""
    if name == "auto":
        with contextlib.suppress(UserError):  # trained on a device with other abilities
            return select_precision(trained_in or "auto", device)
    return select_precision(name, device)
