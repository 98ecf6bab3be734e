"""A run's files: what is saved after each epoch, and how an interrupted run is resumed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.files import content_sha256
from finetuning.basics.run_outputs import BEST_FILE, FINAL_FILE, STATE_FILE
from finetuning.dataset.pairs import Pair, is_filled, read_facts, split_pairs
from finetuning.evaluation.seen_images import SEEN, Contents, hash_files, record_seen, seen_before
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.models import ensure_checkpoint
from finetuning.model.trainable_encoder import merged_state_dict
from finetuning.preparation.data_folder import draw_demo
from finetuning.training.learner import Learner, learning_rate_factor
from finetuning.training.recipe import Recipe
from finetuning.training.recipe_options import MOST_VARIANTS
from finetuning.training.training_log import CURVE_EVERY, Log, best_of, conclude, write_log
from finetuning.training_data.training_masks import IMAGE, LOSS_GRIDS

# Settings that may differ between a run and its resumption. Of these, load_state compares
# checkpoint_sha256 and data_hash itself, with messages of their own.
FREE_SETTINGS = (
    "epochs", "checkpoint", "checkpoint_sha256", "data", "data_hash", "cache", "value_range",
    "bands", "seen",
)  # fmt: skip

MAX_LOGGED = 1e300  # larger values in a log are damage; integers may exceed every float


def prepare(
    data: Path, model_name: str, checkpoint: Path | None, limit: int | None, is_demo: bool
) -> tuple[Path, dict[str, list[Pair]]]:
    """Make sure that the data and the checkpoint exist; return the checkpoint and the pairs.

    The first process draws the demo's data and downloads the checkpoint; the others wait.
    """
    if distributed.rank() == 0:
        if is_demo and not is_filled(data):
            draw_demo(data)
        split_pairs(data, "train")  # if there is no data, fail before the download
        if checkpoint is None:
            ensure_checkpoint(model_name)
    distributed.wait_for_all()
    checkpoint = checkpoint or ensure_checkpoint(model_name)
    return checkpoint, {split: split_pairs(data, split, limit) for split in ("train", "val")}


class Start(NamedTuple):
    """What all trainings of one command start from."""

    model: str
    checkpoint: Path
    data: Path
    limit: int | None
    cache: Path | None
    precision: torch.dtype
    image_size: int
    seen_before: Contents | None  # what the checkpoint's model was trained on


def make_start(
    facts: dict[str, Any],
    model: str,
    checkpoint: Path,
    image_size: int,
    data: Path,
    limit: int | None,
    cache: Path | None,
    precision: torch.dtype,
) -> Start:
    """Return the Start of a command. facts: what load_predictor read from the checkpoint."""
    seen = seen_before(facts, checkpoint)
    return Start(model, checkpoint, data, limit, cache, precision, image_size, seen)


def run_settings(recipe: Recipe, start: Start, pairs: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return everything that determines a run's result, as plain values; saved with its models."""
    all_pairs = [pair for split in pairs.values() for pair in split]
    hashes = distributed.from_first(lambda: hash_files(all_pairs))
    contents = [(path.parent.name, path.name, sha256) for path, sha256 in hashes.items()]
    return {
        "model": start.model,
        "image_size": start.image_size,
        **asdict(recipe),
        "limit": start.limit,
        "precision": str(start.precision).removeprefix("torch."),
        "no_cache": start.cache is None,
        "cache": None if start.cache is None else str(start.cache),
        "checkpoint": str(start.checkpoint),
        "checkpoint_sha256": content_sha256(start.checkpoint),
        "data": str(start.data),
        "value_range": read_facts(start.data).get("value_range"),  # new images are scaled by it
        "bands": read_facts(start.data).get("options", {}).get("bands"),
        "data_hash": hashlib.sha256(repr(contents).encode()).hexdigest(),
        SEEN: record_seen(pairs, hashes, start.seen_before),
    }


def save_state(output: Path, learner: Learner, log: Log, settings: dict[str, Any]) -> None:
    """Save what load_state needs to continue after this epoch."""
    save_checkpoint(
        output / STATE_FILE,
        learner.weights,
        optimizer=learner.optimizer.state_dict(),
        scaler=learner.scaler.state_dict(),
        log=log,
        settings=settings,
    )


def start_or_resume(
    output: Path,
    predictor: SAM2ImagePredictor,
    learner: Learner,
    recipe: Recipe,
    state: dict[str, Any] | None,
    log: Log,
    settings: dict[str, Any],
) -> None:
    """Restore an interrupted run, or save the initial state so that it can be resumed."""
    done = log[-1]["epoch"]
    if distributed.rank() == 0:
        if not state:
            save_state(output, learner, log, settings)
        # Before restore(), the predictor still holds the original weights
        if best_of(log)["epoch"] == 0:
            save_model(output / BEST_FILE, predictor, log[0], settings)
    if state:
        restore(learner, state, output / STATE_FILE)
        print(f"continuing after epoch {done}")
        tell_jump(recipe, state["settings"].get("epochs"), done)
    if done >= recipe.epochs:
        print(f"all {done} epochs are done; for more, raise --epochs")
    if len(learner.weights.encoder):
        count = sum(weight.numel() for weight in learner.weights.encoder)
        print(
            f"the image encoder learns too ({recipe.train_encoder}, {count / 1e6:.2f} M weights): "
            "its features change, so there is no cache; each epoch encodes each image (slow)"
        )


def tell_jump(recipe: Recipe, epochs_before: Any, done: int) -> None:
    """Report a jump of the learning rate, if the number of epochs changed after `done` of them.

    epochs_before: the number in the state file, which may be any value.
    """
    is_known = isinstance(epochs_before, int) and done <= epochs_before < 10**9
    if not is_known or epochs_before == recipe.epochs or not 0 < done < recipe.epochs:
        return
    steps = 1000  # per epoch; the factor hardly depends on the number
    last = learning_rate_factor(done * steps - 1, epochs_before * steps, recipe.schedule)
    following = learning_rate_factor(done * steps, recipe.epochs * steps, recipe.schedule)
    if f"{last:.0%}" != f"{following:.0%}":
        print(
            f"the learning rate jumps from {last:.0%} to {following:.0%} of its highest: its "
            f"schedule now spans {recipe.epochs} epochs, not {epochs_before}"
        )


def save_epoch(
    output: Path,
    predictor: SAM2ImagePredictor,
    learner: Learner,
    log: Log,
    settings: dict[str, Any],
) -> None:
    """Save the state, the log and, if it is the best so far, the model; print the log's last row.

    The state comes after the model: a run killed in between repeats the epoch and saves both.
    """
    row = log[-1]
    is_best = best_of(log) is row
    if is_best:
        save_model(output / BEST_FILE, predictor, row, settings)
    save_state(output, learner, log, settings)
    write_log(output, log, CURVE_EVERY)
    end = f"{row['seconds']:.1f} s{'  best' if is_best else ''}"
    if "val_iou_no_prompt" in row:
        end = f"without prompt {row['val_iou_no_prompt']:.4f}  {end}"
    print(
        f"epoch {row['epoch']:3}  loss {row['loss']:.4f}  train IoU {row['train_iou']:.4f}  "
        f"val IoU {row['val_iou']:.4f}  {end}"
    )


def finish(output: Path, predictor: SAM2ImagePredictor, log: Log, settings: dict[str, Any]) -> None:
    """Save the final model and the whole log, and print the result."""
    write_log(output, log)  # again: a killed run may have saved its state but not its log
    save_model(output / FINAL_FILE, predictor, log[-1], settings)
    print(conclude(log))


def save_model(
    path: Path, predictor: SAM2ImagePredictor, row: dict[str, float], settings: dict[str, Any]
) -> None:
    """Save the whole model, with its epoch, its validation IoU and the run's settings."""
    save_checkpoint(
        path,
        merged_state_dict(predictor.model),
        model_name=settings["model"],
        epoch=row["epoch"],
        val_iou=row["val_iou"],
        settings=settings,
    )


def load_state(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Load what save_state saved, for a run with these settings.

    Where they say "auto", any value that auto may find will do. Raises UserError if there is no
    such run, or its settings, its data or its model differ.
    """
    path = output / STATE_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {output}; run without --resume")
    state = load_checkpoint(path)
    log, saved = read_log(state), state.get("settings")
    if log is None or not are_settings(saved):
        raise UserError(_not_a_state(path))
    if missing := settings.keys() - saved.keys():
        raise UserError(
            f"{path} does not say its {min(missing)}: another version of this project wrote it; "
            "resume it with that version, or use another --output"
        )
    for name in [name for name in settings if name not in FREE_SETTINGS]:
        is_found = settings[name] == "auto" and saved[name] not in ("off", IMAGE)
        if settings[name] != saved[name] and not is_found:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"the run in {output} had {option} {saved[name]}, not {settings[name]}; "
                "resume with the same, or use another --output"
            )
    for name, what in (
        ("checkpoint_sha256", f"started from another --checkpoint than {settings['checkpoint']}"),
        ("data_hash", f"had other images or masks than {settings['data']} has now"),
    ):
        if saved[name] != settings[name]:
            raise UserError(f"the run in {output} {what}; resume with the same, or start over")
    require_best(output, log)
    return state


def read_log(state: dict[str, Any]) -> Log | None:
    """Return the log of a state, a row per epoch from 0 on; None if it is damaged."""
    rows = state.get("log")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    numbers = [value for row in rows for value in row.values()]
    are_numbers = all(_is_number(value) for value in numbers)
    are_complete = all(row.keys() >= {"epoch", "val_iou"} for row in rows)
    if not (rows and are_numbers and are_complete):
        return None
    return rows if [row["epoch"] for row in rows] == list(range(len(rows))) else None


def are_settings(values: Any) -> bool:
    """Return whether a value is a dict of plain values, with those that resuming reads."""
    plain = str | int | float | list | dict | None
    are_plain = isinstance(values, dict) and all(isinstance(v, plain) for v in values.values())
    return (
        are_plain
        and _is_number(values.get("lr"))
        # An earlier version had neither
        and _is_augment(values.get("augment", "auto"))
        and values.get("loss_grid", IMAGE) in (IMAGE, *LOSS_GRIDS)
    )


def _is_augment(value: Any) -> bool:
    is_count = isinstance(value, int) and 0 < value < MOST_VARIANTS
    return value in ("auto", "off") or is_count


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_LOGGED  # False for NaN, too


def _not_a_state(path: Path) -> str:
    return (
        f"{path} is damaged, or not the state of a training; restore the right file, or start over "
        "without --resume"
    )


def require_best(output: Path, log: Log) -> None:
    """Raise UserError if the best model of a run is missing or damaged."""
    best = output / BEST_FILE
    if len(log) > 1 and not best.is_file():
        raise UserError(
            f"{best} is missing, the best model of the run so far; restore it, or start over "
            "without --resume"
        )
    if best.is_file():
        load_checkpoint(best)


def restore(learner: Learner, state: dict[str, Any], path: Path) -> None:
    """Set the learner to an interrupted run's state, which was loaded from `path`."""
    try:
        learner.weights.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.scaler.load_state_dict(state["scaler"])
        moments = [weight["exp_avg"].shape for weight in learner.optimizer.state.values()]
        weights = [weight.shape for weight in learner.optimizer.state]
        rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(_not_a_state(path)) from error
    # torch itself compares these shapes only in the next step
    if moments != weights or not all(map(_is_number, rates)):
        raise UserError(_not_a_state(path))
