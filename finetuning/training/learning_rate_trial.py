"""Which learning rate: over the steps (its schedule), and at its highest (--lr auto)."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from sam2_utils import NotFiniteError, UserError

import numpy as np

from finetuning.evaluation.measuring import Validation
from finetuning.model.model import Model
from finetuning.training.batches import EpochSampler, TrainingSet, make_loader
from finetuning.training.learner import make_learner
from finetuning.training.recipe import Recipe

WARMUP_SHARE = 0.05  # of the steps, where --schedule is cosine
# --lr auto: what is tried, each on this many images shown, and measured on others
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
TRIAL_IMAGES = 400
HELD_OUT_SHARE, MOST_HELD_OUT = 0.25, 100
ALIKE = 0.005  # of two rates whose mean IoU differs by less, the lower one is the safer
FEWEST_IMAGES = 8


def learning_rate_factor(step: int, steps: int, schedule: str) -> float:
    """Return what the learning rate of step 0, 1, ... of all `steps` is of its highest value.

    cosine: a linear warm-up, then along a cosine to zero (Loshchilov and Hutter, SGDR, 2017).
    """
    if schedule == "constant":
        return 1.0
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def split_for_trials(
    indices: list[int], seed: int, group_of: Mapping[int, str | None] | None = None
) -> tuple[list[int], list[int], int]:
    """Split training images: those that trials learn from, those they are measured on, epochs.

    Those of one group, if any, are on one side, unless all are. The epochs are how often a trial
    goes through its images to be shown TRIAL_IMAGES or so.
    """
    if len(indices) < FEWEST_IMAGES:
        raise UserError(
            f"--lr auto needs {FEWEST_IMAGES} training images with an object, there are "
            f"{len(indices)}; give a rate: --lr 1e-4"
        )
    order = np.random.default_rng(seed).permutation(indices).tolist()
    held_out = min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(order)))
    keys = {index: (group_of or {}).get(index) or index for index in order}
    turns = {key: turn for turn, key in enumerate(dict.fromkeys(keys[index] for index in order))}
    order.sort(key=lambda index: turns[keys[index]])  # members of a group after its first one
    whole = held_out
    while whole < len(order) and keys[order[whole]] == keys[order[whole - 1]]:
        whole += 1
    held_out = whole if whole < len(order) else held_out
    learn_from = order[held_out:][:TRIAL_IMAGES]
    return learn_from, order[:held_out], math.ceil(TRIAL_IMAGES / len(learn_from))


def try_learning_rates(
    model: Model,
    training_set: TrainingSet,
    objects: dict[int, int],
    recipe: Recipe,
    train_one_epoch: Callable[..., dict[str, float]],
) -> float:
    """Find a learning rate on a part of the training images; the model stays as it is.

    objects: how many each training image has, by its index. train_one_epoch: that of the training.
    """
    group_of = {index: training_set.pairs[index].group for index in objects}
    learn_from, held_out, epochs = split_for_trials(list(objects), recipe.seed, group_of)
    validation = Validation([training_set.pairs[index] for index in held_out])
    predictor, precision = model.predictor, model.source.precision
    sampler = EpochSampler(
        {index: objects[index] for index in learn_from},
        recipe.batch_size,
        recipe.seed,
        recipe.objects_per_image,
    )
    loader = make_loader(training_set, sampler, predictor.device)
    original = copy.deepcopy(predictor.model.state_dict())

    def try_rate(rate: float) -> float:
        trial = dataclasses.replace(recipe, lr=rate, epochs=epochs)
        learner = make_learner(predictor, trial, precision)
        try:
            for epoch in range(1, epochs + 1):
                train_one_epoch(predictor, loader, learner, trial, epoch)
            return validation.measure(model)["val_iou"]
        except NotFiniteError:
            return float("nan")
        finally:
            predictor.model.load_state_dict(original)

    return find_learning_rate(try_rate, validation.measure(model)["val_iou"])


def find_learning_rate(try_rate: Callable[[float], float], before: float) -> float:
    """Return the best of RATES, after printing what each reaches.

    Arguments:
      try_rate: trains for a short while at a rate, and returns the mean IoU on images held out;
        NaN where training broke down.
      before: their mean IoU before training.
    """
    start = time.perf_counter()
    print(f"trying learning rates on a part of the training images (before: IoU {before:.4f})")
    ious = {}
    for rate in RATES:
        ious[rate] = try_rate(rate)
        print(f"  --lr {rate:<6g}  IoU {ious[rate]:.4f}")
    best = choose_rate(ious)
    helps = np.nanmax([*ious.values(), 0.0]) > before + ALIKE
    doubt = "" if helps else "; in so short a time no rate was clearly better than no training"
    print(f"chose --lr {best:g} in {time.perf_counter() - start:.0f} s{doubt}")
    return best


def choose_rate(ious: dict[float, float]) -> float:
    """Return the lowest rate whose IoU is as good as the best, or differs by less than ALIKE."""
    highest = np.nanmax([*ious.values(), 0.0])
    return min((rate for rate, iou in ious.items() if iou >= highest - ALIKE), default=min(ious))
