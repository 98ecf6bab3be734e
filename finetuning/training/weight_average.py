"""The mean of several runs' weights: one model from --runs, which may be better than each of them.

Runs that start from the same model and end near each other can be averaged weight by weight
(Wortsman et al., Model soups, 2022). The mean costs nothing at use; validation decides on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetuning.basics.run_outputs import BEST_FILE, MEAN_FILE
from finetuning.evaluation.measuring import Validation
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.loading import cleaning_of
from finetuning.model.model import Model


def average_weights(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of state_dicts with the same names; equal weights stay equal to the bit."""
    means = {}
    for name, weight in states[0].items():
        total = sum(state[name].double() for state in states)
        means[name] = (total / len(states)).to(weight.dtype)
    return means


def keep_mean(model: Model, validation: Validation, output: Path, runs: Sequence[Path]) -> str:
    """Average the best models of the runs; save the mean if it is better on val than each of them.

    model: gets the mean weights. output: where the mean is saved. runs: the runs' folders.
    Returns a line that says what the mean reached.
    """
    best = [load_checkpoint(folder / BEST_FILE) for folder in runs]
    model.predictor.model.load_state_dict(average_weights([each["model"] for each in best]))
    model = model._replace(cleaning=cleaning_of(best[0]))  # the same for all runs
    reached = validation.measure(model)["val_iou"]
    top = max(best, key=lambda each: each["val_iou"])
    compared = f"mean weights of the {len(runs)} runs: val IoU {reached:.4f}"
    path, highest = output / MEAN_FILE, f"the best run's {top['val_iou']:.4f}"
    if reached <= top["val_iou"]:
        path.unlink(missing_ok=True)
        return f"{compared}, not above {highest}; not kept"
    facts = {name: top[name] for name in ("model_name", "epoch", "settings")}
    save_checkpoint(path, model.predictor.model, **facts, val_iou=reached)
    return f"{compared}, above {highest}; wrote {MEAN_FILE} to {output}"
