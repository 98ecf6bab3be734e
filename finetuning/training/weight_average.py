"""The mean of several runs' weights: one model from --runs, which may be better than each of them.

Runs that start from the same model and end near each other can be averaged weight by weight
(Wortsman et al., Model soups, 2022). The mean costs nothing at use; validation decides on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.run_outputs import BEST_FILE, MEAN_FILE
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.measuring import MOST_OBJECTS, Validation
from finetuning.model.cache_places import open_cache
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.loading import cleaning_of
from finetuning.model.model import FeatureSource, Model


def average_weights(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of state_dicts with the same names; equal weights stay equal to the bit."""
    totals: dict[str, torch.Tensor] = {}
    count = 0
    for state in states:
        totals = {name: totals.get(name, 0) + weight.double() for name, weight in state.items()}
        dtypes = {name: weight.dtype for name, weight in state.items()}
        count += 1
    return {name: (total / count).to(dtypes[name]) for name, total in totals.items()}


def average_runs(
    predictor: SAM2ImagePredictor,
    precision: torch.dtype,
    cache: Path | None,
    val: list[Pair],
    output: Path,
    runs: Sequence[Path],
) -> None:
    """Average the runs' best models; print what the mean reaches on the val pairs.

    cache: the folder of the feature cache; None: no cache. output, runs: as in keep_mean.
    """
    images = {"val": [pair.image for pair in val]}
    features = open_cache(predictor, cache, precision, images) if cache else None
    model = Model(predictor, FeatureSource(predictor, precision, features))
    if distributed.rank() == 0:
        print(keep_mean(model, Validation(val, most=MOST_OBJECTS), output, runs))


def keep_mean(model: Model, validation: Validation, output: Path, runs: Sequence[Path]) -> str:
    """Average the best models of the runs; save the mean if it is better on val than each of them.

    model: gets the mean weights. output: where the mean is saved. runs: the runs' folders.
    Returns a line that says what the mean reached.
    """
    best: list[dict[str, Any]] = []

    def load_weights() -> Iterator[dict[str, torch.Tensor]]:
        for folder in runs:  # one at a time, to save memory
            facts = load_checkpoint(folder / BEST_FILE)
            weights = facts.pop("model")
            best.append(facts)
            yield weights

    model.predictor.model.load_state_dict(average_weights(load_weights()))
    model = model._replace(cleaning=cleaning_of(best[0]))  # the same for all runs
    reached = validation.measure(model)["val_iou"]
    top = max(best, key=lambda each: each["val_iou"])
    compared = f"mean weights of the {len(runs)} runs: val IoU {reached:.4f}"
    path, highest = output / MEAN_FILE, f"the best run's {top['val_iou']:.4f}"
    if reached <= top["val_iou"]:
        path.unlink(missing_ok=True)
        return f"{compared}, not above {highest}; not kept"
    facts = {name: top[name] for name in ("model_name", "epoch", "settings")}
    seeds = [each["settings"]["seed"] for each in best]
    save_checkpoint(path, model.predictor.model, **facts, val_iou=reached, averaged_seeds=seeds)
    return f"{compared}, above {highest}; wrote {MEAN_FILE} to {output}"
