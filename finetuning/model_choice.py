"""Which models new images are segmented with: the fine-tuned one and, beside it, the original."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sam2_utils import UserError, select_precision

import torch

from finetuning.checkpoints import setting
from finetuning.device_check import trusted_device
from finetuning.models import load_predictor, locate_original
from finetuning.segmenter import Segmenter


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
