"""Repeated trainings: with several seeds (--runs), or in cross-validation (--folds)."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import torch

from finetuning.basics import distributed
from finetuning.basics.command_line import quote_command
from finetuning.basics.csv_files import write_with_digest
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, content_sha256, only_run_in
from finetuning.basics.run_outputs import (
    BEST_FILE,
    FOLDS_FILE,
    MEAN_FILE,
    MODEL_FILES,
    RESULT_FILES,
    RUN_COLUMNS,
    RUNS_FILE,
    STATE_FILE,
)
from finetuning.dataset.pairs import Pair
from finetuning.dataset.splitting import FOLD_COLUMNS, fold_folder, fold_groups, keyed, make_folds
from finetuning.evaluation import object_matching
from finetuning.model.models import own_image_size
from finetuning.training.earlier_runs import require_outside_run
from finetuning.training.recipe import Recipe
from finetuning.training.training_log import Log, best_of


class Training(NamedTuple):
    """One training of a command."""

    title: str  # printed before it; may be empty
    recipe: Recipe
    pairs: dict[str, list[Pair]]  # train and val
    output: Path


def plan_trainings(
    recipe: Recipe, pairs: dict[str, list[Pair]], output: Path, runs: int, folds: int | None
) -> list[Training]:
    """Return the trainings of a command: one in `output`, one per run, or one per fold.

    Run N > 1 has the seed of the recipe plus N-1, and the folder run_N in `output`. Training N of K
    folds validates on fold N, trains on the others, and has the folder fold_N.
    """
    if not folds:
        recipes = [dataclasses.replace(recipe, seed=recipe.seed + index) for index in range(runs)]
        return [
            Training(
                f"run {number} of {runs}, seed {run_recipe.seed}" if runs > 1 else "",
                run_recipe,
                pairs,
                output / f"run_{number}" if number > 1 else output,
            )
            for number, run_recipe in enumerate(recipes, 1)
        ]
    by_key = keyed(pairs)
    groups = fold_groups(by_key, folds)
    fold_keys = [set(fold) for fold in make_folds(by_key, folds, recipe.seed, groups)]
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
        for number, fold in enumerate(fold_keys, 1)
    ]


def check_outputs(output: Path, trainings: Sequence[Training], checkpoint: Path) -> None:
    """Raise UserError if the model to start from would be overwritten or moved aside."""
    models = [training.output / name for training in trainings for name in MODEL_FILES]
    if checkpoint.resolve() in [model.resolve() for model in models]:
        raise UserError(f"{checkpoint} would be overwritten; use another --output")
    require_outside_run(checkpoint, output)


def which_resume(trainings: Sequence[Training], resume: bool) -> list[bool]:
    """Return for each training whether it resumes an earlier one.

    If none was begun, all are to resume, so that the first one says what is missing.
    """
    begun = [(training.output / STATE_FILE).is_file() for training in trainings]
    return [resume and (is_begun or not any(begun)) for is_begun in begun]


def forget_conclusion(output: Path, runs: int, folds: int | None) -> None:
    """Remove the table of the repeats, and the mean model: resuming makes them outdated.

    A single run that is resumed would not make a mean again, so it stays.
    """
    outdated = [FOLDS_FILE] if folds else [RUNS_FILE, MEAN_FILE] if runs > 1 else [RUNS_FILE]
    for name in outdated:
        (output / name).unlink(missing_ok=True)


def describe_training(training: Training, data: Path) -> str:
    train_count, val_count = map(len, training.pairs.values())
    title = f"{training.title}: " if training.title else ""
    return f"{title}{train_count} training and {val_count} validation images from {data}"


def describe_model(
    model_name: str, image_size: int, device: torch.device, precision: torch.dtype
) -> str:
    is_own_size = image_size == own_image_size(model_name)
    size = "" if is_own_size else f" at {image_size}x{image_size} pixels"
    precision_name = str(precision).removeprefix("torch.")
    return f"SAM 2.1 {model_name}{size} on {device} in {precision_name}"


@contextlib.contextmanager
def only_run_of(output: Path, trainings: Sequence[Training], resume: bool) -> Iterator[None]:
    """Lock the output folder and, to resume, those of the trainings, against other runs.

    Raises UserError if another run is writing there.
    """
    folders = [output, *(training.output for training in trainings if resume)]
    with contextlib.ExitStack() as locks:
        if distributed.rank() == 0:
            for folder in dict.fromkeys(folders):
                locks.enter_context(only_run_in(folder))
        yield


def choose_thresholds(
    training: Training, name: str, device: torch.device, precision: torch.dtype
) -> None:
    """Choose the thresholds of --auto objects for a model, and save them in its file.

    name: the file's, in the training's output; nothing is done if there is none.
    """
    file, images = training.output / name, training.pairs["train"]
    if distributed.rank() == 0 and file.is_file():
        object_matching.keep_rule(file, device, precision, images, training.recipe.seed)


def describe_results(output: Path) -> str:
    written = [name for name in RESULT_FILES if (output / name).is_file()]
    return f"wrote {', '.join(written)} to {output}"


def next_command(output: Path, data: Path, folds: int | None = None) -> str:
    """Return the command that compares the best model, or those of all folds, with the original."""
    mean = output / MEAN_FILE
    is_kept = not folds and mean.is_file()
    if (output, data) == (DEMO_OUTPUT, DEMO_DATA) and not folds and not is_kept:
        return "python compare_models.py --demo"
    finetuned = mean if is_kept else output / BEST_FILE
    model = ["--folds", output] if folds else ["--finetuned", finetuned]
    other_data = ["--data", data] if data != Path("data") else []
    return quote_command(["python", "compare_models.py", *map(str, [*model, *other_data])])


def conclude_repeats(
    output: Path, trainings: Sequence[Training], logs: Sequence[Log], folds: int | None
) -> str:
    """Write RUNS_FILE, a row per run, or FOLDS_FILE, a row per image; return a summary line."""
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
    """Return values as text: their mean ± their sample standard deviation."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
