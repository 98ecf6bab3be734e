"""A run's files: what it saves after each epoch, and how an interrupted run is resumed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.command_line import tell
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, content_sha256
from finetuning.basics.run_outputs import BEST_FILE, STATE_FILE
from finetuning.dataset.data_folder import draw_demo, is_filled
from finetuning.dataset.pairs import Pair, read_facts, split_pairs
from finetuning.evaluation.seen_images import SEEN, Contents, hash_files, record_seen
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.models import ensure_checkpoint, own_image_size
from finetuning.model.trainable_encoder import merged_state_dict
from finetuning.training.learner import Learner
from finetuning.training.learning_rate_trial import learning_rate_factor
from finetuning.training.log import CURVE_EVERY, Log, best_of, write_log
from finetuning.training.recipe import GUIDE, Recipe

# What a resumed run may have otherwise than the run that it goes on with.
FREE_SETTINGS = (
    "epochs", "checkpoint", "checkpoint_sha256", "data", "data_hash", "cache", "value_range",
    "seen",
)  # fmt: skip

LARGEST = 1e300  # of a number in a log; whole ones may be beyond all floats


def prepare(data: Path, model_name: str, checkpoint: Path | None, is_demo: bool) -> Path:
    """Have the data and the checkpoint in place, for all processes; return the latter's path."""
    if distributed.rank() == 0:
        if is_demo and not is_filled(data):
            draw_demo(data)
        split_pairs(data, "train")  # without data, no download is needed
        if checkpoint is None:
            ensure_checkpoint(model_name)
    distributed.wait_for_all()
    return checkpoint or ensure_checkpoint(model_name)


class Start(NamedTuple):
    """What all trainings of one command begin with."""

    model: str
    checkpoint: Path
    data: Path
    limit: int | None
    cache: Path | None
    precision: torch.dtype
    image_size: int
    seen_before: Contents | None  # what the model to start from was trained on


def run_settings(recipe: Recipe, start: Start, pairs: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return what fixes the outcome of a run, as plain values; it is saved with the model."""
    all_pairs = [pair for of_split in pairs.values() for pair in of_split]
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
        "value_range": read_facts(start.data).get("value_range"),  # for images to come
        "data_hash": hashlib.sha256(repr(contents).encode()).hexdigest(),
        SEEN: record_seen(pairs, hashes, start.seen_before),
    }


def save_state(output: Path, learner: Learner, log: Log, settings: dict[str, Any]) -> None:
    """Save what load_state needs to go on after this epoch."""
    save_checkpoint(
        output / STATE_FILE,
        learner.weights,
        optimizer=learner.optimizer.state_dict(),
        scaler=learner.scaler.state_dict(),
        log=log,
        settings=settings,
    )


def start(
    output: Path,
    predictor: SAM2ImagePredictor,
    learner: Learner,
    recipe: Recipe,
    state: dict[str, Any] | None,
    log: Log,
    settings: dict[str, Any],
) -> None:
    """Put the learner to where an interrupted run was, or save it as it is, so that one can be."""
    done = log[-1]["epoch"]
    if distributed.rank() == 0:
        if not state:
            save_state(output, learner, log, settings)
        if best_of(log)["epoch"] == 0:  # and the model is still the original
            save_model(output / BEST_FILE, predictor, log[0], settings)
    if state:
        restore(learner, state, output / STATE_FILE)
        print(f"going on after epoch {done}")
        tell_jump(recipe, state["settings"].get("epochs"), done)
    if done >= recipe.epochs:
        print(f"all {done} epochs are done; for more, raise --epochs")
    if len(learner.weights.encoder):
        count = sum(weight.numel() for weight in learner.weights.encoder)
        print(
            f"the image encoder learns too ({recipe.train_encoder}, {count / 1e6:.2f} M weights): "
            "its features change, so no cache; each image is encoded in each epoch (slow)"
        )


def tell_jump(recipe: Recipe, epochs_before: Any, done: int) -> None:
    """Say so where the learning rate jumps after `done` epochs, as the schedule has other ones now.

    epochs_before: that it had, by the run's file, which may hold anything.
    """
    is_known = isinstance(epochs_before, int) and done <= epochs_before < 10**9
    if not is_known or epochs_before == recipe.epochs or not 0 < done < recipe.epochs:
        return
    steps = 1000  # an epoch: the share of the highest rate hardly depends on it
    last = learning_rate_factor(done * steps - 1, epochs_before * steps, recipe.schedule)
    following = learning_rate_factor(done * steps, recipe.epochs * steps, recipe.schedule)
    if f"{last:.0%}" != f"{following:.0%}":
        print(
            f"the learning rate jumps from {last:.0%} to {following:.0%} of its highest: its "
            f"schedule now spans {recipe.epochs} epochs, not {epochs_before}"
        )


def next_command(output: Path, data: Path, folds: int | None = None) -> str:
    """Return the command that compares what a run has trained."""
    if (output, data) == (DEMO_OUTPUT, DEMO_DATA) and not folds:
        return "python compare_models.py --demo"
    model = f"--folds {output}" if folds else f"--finetuned {output / BEST_FILE}"
    command = f"python compare_models.py {model}"
    return command + (f" --data {data}" if data != Path("data") else "")


def save_epoch(
    output: Path,
    predictor: SAM2ImagePredictor,
    learner: Learner,
    log: Log,
    settings: dict[str, Any],
) -> None:
    """Save the model if it is the best so far, the state and the log; print the log's last row."""
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


def save_model(
    path: Path, predictor: SAM2ImagePredictor, row: dict[str, float], settings: dict[str, Any]
) -> None:
    """Save the whole model, with its row of the log and where it comes from beside its weights."""
    save_checkpoint(
        path,
        merged_state_dict(predictor.model),
        model_name=settings["model"],
        epoch=row["epoch"],
        val_iou=row["val_iou"],
        settings=settings,
    )


def load_state(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read what save_state saved; its settings must be these, but an lr that is auto may be any.

    Raises UserError if there is no such run, or its settings, its data or its model differ.
    """
    path = output / STATE_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {output}; run without --resume")
    state = load_checkpoint(path)
    log = read_log(state)
    if log is None or not are_settings(state.get("settings", {})):
        raise UserError(_not_a_state(path))
    # Files from before there were recipes, --train-encoder or --image-size do not say these.
    before = {**asdict(GUIDE), "image_size": own_image_size(settings["model"])}
    before |= state.get("settings", {})
    if before["prompts"] == "point":  # as it was called
        before["prompts"] = "random"
    for name in [name for name in settings if name not in FREE_SETTINGS]:
        is_found = name == "lr" and settings["lr"] == "auto"
        if before.get(name) != settings[name] and not is_found:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"the run in {output} had {option} {before.get(name)}, not {settings[name]}; "
                "resume with the same, or use another --output"
            )
    if "data_hash" not in before:
        tell(f"warning: whether {settings['data']} is still as it was, an earlier version's run "
              "does not say")  # fmt: skip
        before["data_hash"] = settings["data_hash"]
    for name, what in (
        ("checkpoint_sha256", f"started from another --checkpoint than {settings['checkpoint']}"),
        ("data_hash", f"had other images or masks than {settings['data']} has now"),
    ):
        if before.get(name) != settings[name]:
            raise UserError(f"the run in {output} {what}; resume with the same, or start anew")
    require_best(output, log)
    return {**state, "log": log, "settings": before}


def read_log(state: dict[str, Any]) -> Log | None:
    """Return the log of a state, a row an epoch from 0 on; None where it holds something else."""
    rows = state.get("log")
    if "original_iou" in state and isinstance(rows, list):  # from before epoch 0 had a row
        rows = [{"epoch": 0, "val_iou": state["original_iou"]}, *rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    numbers = [value for row in rows for value in row.values()]
    are_numbers = all(_is_number(value) for value in numbers)
    are_complete = all(row.keys() >= {"epoch", "val_iou"} for row in rows)
    if not (rows and are_numbers and are_complete):
        return None
    return rows if [row["epoch"] for row in rows] == list(range(len(rows))) else None


def are_settings(values: Any) -> bool:
    """Say whether a value is settings: plain values by name, with a learning rate that is one."""
    plain = str | int | float | list | dict | None
    are_plain = isinstance(values, dict) and all(isinstance(v, plain) for v in values.values())
    return are_plain and _is_number(values.get("lr", 0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # nor NaN


def _not_a_state(path: Path) -> str:
    return (
        f"{path} is damaged, or not the state of a training; put the right one back, or start anew "
        "without --resume"
    )


def require_best(output: Path, log: Log) -> None:
    """Raise UserError where the best model of a run, as its log has it, is missing or damaged."""
    best = output / BEST_FILE
    if any("loss" in row for row in log) and not best.is_file():
        raise UserError(
            f"{best} is missing, the best model of the run so far; put it back, or start anew "
            "without --resume"
        )
    if best.is_file():
        load_checkpoint(best)


def restore(learner: Learner, state: dict[str, Any], path: Path) -> None:
    """Put the learner back to where an interrupted run was; path: of the file that says it."""
    rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    try:
        learner.weights.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.scaler.load_state_dict(state["scaler"])
        steps = [of_weight["exp_avg"].shape for of_weight in learner.optimizer.state.values()]
        weights = [weight.shape for weight in learner.optimizer.state]
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(_not_a_state(path)) from error
    if steps != weights:  # which torch does not look at before the next step
        raise UserError(_not_a_state(path))
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        group["initial_lr"] = rate  # files of earlier versions do not have it
