"""The same training several times: with other seeds, or on other parts of the images."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

from finetuning.basics.csv_files import write_with_digest
from finetuning.basics.files import content_sha256
from finetuning.basics.run_outputs import (
    FOLDS_FILE,
    MODEL_FILES,
    RUN_COLUMNS,
    RUNS_FILE,
    STATE_FILE,
)
from finetuning.dataset.pairs import Pair
from finetuning.dataset.splitting import FOLD_COLUMNS, fold_folder, keyed, make_folds
from finetuning.training.log import Log, best_of
from finetuning.training.recipe import Recipe


class Training(NamedTuple):
    """One of them."""

    title: str  # what is printed before it, if anything
    recipe: Recipe
    pairs: dict[str, list[Pair]]  # train and val
    output: Path


def plan_trainings(
    recipe: Recipe, pairs: dict[str, list[Pair]], output: Path, runs: int, folds: int | None
) -> list[Training]:
    """Return what is to be trained: once, in `output`; in several runs; or once a fold.

    A further run has a further seed, and the folder run_N in `output`. A fold is what its training
    has for val, the other folds for train; it has the folder fold_N.
    """
    if not folds:
        of_runs = [dataclasses.replace(recipe, seed=recipe.seed + index) for index in range(runs)]
        return [
            Training(
                f"run {number} of {runs}, seed {of_run.seed}" if runs > 1 else "",
                of_run,
                pairs,
                output / f"run_{number}" if number > 1 else output,
            )
            for number, of_run in enumerate(of_runs, 1)
        ]
    by_key = keyed(pairs)
    group_of = {key: pair.group for key, pair in by_key.items()}
    of_folds = [set(fold) for fold in make_folds(by_key, folds, recipe.seed, group_of)]
    return [
        Training(
            f"fold {number} of {folds}",
            recipe,
            {
                "train": [pair for key, pair in by_key.items() if key not in fold],
                "val": [by_key[key] for key in sorted(fold)],
            },
            fold_folder(output, number),
        )
        for number, fold in enumerate(of_folds, 1)
    ]


def check_outputs(trainings: Sequence[Training], checkpoint: Path) -> None:
    """Raise UserError where the model to start from would be overwritten."""
    models = [training.output / name for training in trainings for name in MODEL_FILES]
    if checkpoint.resolve() in [model.resolve() for model in models]:
        raise UserError(f"{checkpoint} would be overwritten; use another --output")


def which_resume(trainings: Sequence[Training], resume: bool) -> list[bool]:
    """Say of each training whether it goes on with an earlier one; the first must, if any does."""
    begun = [(training.output / STATE_FILE).is_file() for training in trainings]
    return [resume and (is_begun or not any(begun)) for is_begun in begun]


def forget_conclusion(output: Path, folds: int | None) -> None:
    """Remove what the repeats in this folder have concluded: going on makes it untrue."""
    (output / (FOLDS_FILE if folds else RUNS_FILE)).unlink(missing_ok=True)


def describe_training(training: Training, data: Path) -> str:
    train_count, val_count = map(len, training.pairs.values())
    title = f"{training.title}: " if training.title else ""
    return f"{title}{train_count} training and {val_count} validation images from {data}"


def conclude_repeats(
    output: Path, trainings: Sequence[Training], logs: Sequence[Log], folds: int | None
) -> str:
    """Write RUNS_FILE, a row a run, or FOLDS_FILE, a row an image; return what is to be said."""
    best, last = (
        spread([row["val_iou"] for row in rows])
        for rows in (map(best_of, logs), [log[-1] for log in logs])
    )
    if folds:
        rows = [
            (number, f"{pair.image.parent.name}/{pair.name}", content_sha256(pair.image))
            for number, training in enumerate(trainings, 1)
            for pair in training.pairs["val"]
        ]
        write_with_digest(output / FOLDS_FILE, FOLD_COLUMNS, rows)
        before = spread([log[0]["val_iou"] for log in logs])
        return f"{folds} folds: val IoU {before} before training, {last} after the last epoch"
    rows = [
        (number, training.recipe.seed, best_of(log)["val_iou"], log[-1]["val_iou"])
        for number, (training, log) in enumerate(zip(trainings, logs, strict=True), 1)
    ]
    write_with_digest(output / RUNS_FILE, RUN_COLUMNS, rows)
    return f"{len(logs)} runs: val IoU {best} at best, {last} after the last epoch"


def spread(values: Sequence[float]) -> str:
    """Return the mean of some values and their sample standard deviation, as text."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
