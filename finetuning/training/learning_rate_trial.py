"""--lr auto: short trials on part of the training images choose the learning rate."""

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
from finetuning.training.learner import make_learner
from finetuning.training.recipe import Recipe
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
TRIAL_IMAGES = 400  # shown in each trial
HELD_OUT_SHARE, MOST_HELD_OUT = 0.25, 100  # training images that the trials are measured on
TIE = 0.005  # if mean IoUs differ by less, the lower rate wins: it is the safer one
FEWEST_IMAGES = 8


def split_for_trials(
    indices: list[int], seed: int, groups: Mapping[int, str | None] | None = None
) -> tuple[list[int], list[int], int]:
    """Return the images that trials learn from, the held-out ones, and the epochs of a trial.

    Images of one group stay on one side, unless there is only one group. The epochs make a trial
    show about TRIAL_IMAGES images. Raises UserError if there are fewer than FEWEST_IMAGES.
    """
    if len(indices) < FEWEST_IMAGES:
        raise UserError(
            f"--lr auto needs {FEWEST_IMAGES} training images with an object, there are "
            f"{len(indices)}; give a rate: --lr 1e-4"
        )
    order = np.random.default_rng(seed).permutation(indices).tolist()
    held_out = min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(order)))
    keys = {index: (groups or {}).get(index) or index for index in order}
    turns = {key: turn for turn, key in enumerate(dict.fromkeys(keys[index] for index in order))}
    order.sort(key=lambda index: turns[keys[index]])  # bring each group together
    # Hold out whole groups: move the border to the end of the group that it cuts
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
    """Return the learning rate that is best on part of the training images; restore the model.

    objects: the number of objects of each training image, by its index. train_one_epoch: the
    training script's function, which this room cannot import.
    """
    groups = {index: training_set.pairs[index].group for index in objects}
    learn_from, held_out, epochs = split_for_trials(list(objects), recipe.seed, groups)
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
        trial = dataclasses.replace(recipe, lr=rate, epochs=epochs)  # the whole schedule, shortened
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
    """Try each of RATES, print its mean IoU on the held-out images, and return the best.

    try_rate: trains briefly at a rate and returns the mean IoU; NaN if the training diverged.
    before: the mean IoU before training.
    """
    start = time.perf_counter()
    print(f"trying learning rates on part of the training images (before: IoU {before:.4f})")
    ious = {}
    for rate in RATES:
        ious[rate] = try_rate(rate)
        print(f"  --lr {rate:<6g}  IoU {ious[rate]:.4f}")
    best = choose_rate(ious)
    helps = np.nanmax([*ious.values(), 0.0]) > before + TIE
    doubt = "" if helps else "; in these short trials no rate was clearly better than no training"
    print(f"chose --lr {best:g} in {time.perf_counter() - start:.0f} s{doubt}")
    return best


def choose_rate(ious: dict[float, float]) -> float:
    """Return the lowest rate whose IoU is within TIE of the best."""
    highest = np.nanmax([*ious.values(), 0.0])  # 0: all may be NaN
    return min((rate for rate, iou in ious.items() if iou >= highest - TIE), default=min(ious))
