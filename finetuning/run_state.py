"""A run's files: its settings, its log, its models, and what it needs to go on."""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.command_line import ArgumentParser, number, tell
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, content_sha256, write_csv
from finetuning.basics.run_outputs import BEST_FILE, LOG_FILES, STATE_FILE
from finetuning.dataset.data_folder import draw_demo, is_filled
from finetuning.dataset.pairs import Pair, read_facts, split_pairs
from finetuning.drawing import draw_learning_curve
from finetuning.evaluation.seen_images import SEEN, Contents, hash_files, record_seen
from finetuning.learner import Learner
from finetuning.learning_rate import learning_rate_factor
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.models import MODELS as MODEL_SIZES
from finetuning.model.models import ensure_checkpoint, parse_image_size
from finetuning.model.trainable_encoder import merged_state_dict
from finetuning.recipe import Recipe
from finetuning.resuming import Log, restore

CURVE_EVERY = 30  # seconds: drawing takes half of one, which may be as long as an epoch


def add_file_options(parser: ArgumentParser) -> argparse._ActionsContainer:
    """Add what a run reads and writes, and the model that it starts from; return the former."""
    files = parser.add_argument_group("what is read and written")
    files.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    files.add_argument(
        "--demo", action="store_true", help="train mini on drawn images, into output/demo"
    )
    files.add_argument("--limit", type=number(int, at_least=1), help="use the first N images only")
    files.add_argument("--output", type=Path, default=Path("output"), help="where results go")
    files.add_argument("--resume", action="store_true", help="go on with the run in --output")
    cache = files.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, help="where the images' features are kept (default: OUTPUT/cache)"
    )
    cache.add_argument(
        "--no-cache", action="store_true", help="encode each image anew in each epoch (slow)"
    )

    model = parser.add_argument_group("the model to start from")
    model.add_argument("--model", choices=MODEL_SIZES, default="small", help="its size")
    model.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    model.add_argument(
        "--image-size",
        type=parse_image_size,
        metavar="S",
        help="pixels a side that images are resized to; 512 is several times faster than the "
        "default, 1024, and sees less (mini: 256)",
    )
    return files


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


def best_of(log: Log) -> dict[str, float]:
    """Return the row of the epoch with the highest val IoU; the earliest of several."""
    return max(log, key=lambda row: row["val_iou"])


def conclude(log: Log) -> str:
    """Return the last word on a run: how good it became, or that it did not help."""
    before, best = log[0]["val_iou"], best_of(log)
    if best["epoch"]:
        return (
            f"val IoU {before:.4f} before training, {best['val_iou']:.4f} at best "
            f"(epoch {best['epoch']})"
        )
    return (
        f"fine-tuning did not help: no epoch was better than the original (val IoU {before:.4f}), "
        "so sam2_best.pt is the original; try --lr auto or a smaller --lr, or more images"
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


def write_log(output: Path, log: Log, draw_every: float = 0) -> None:
    """Write train_log.csv and learning_curve.png, a row and a point an epoch.

    Each is written whole, so that one that is open elsewhere only has to wait. draw_every: leave
    the curve as it is where it is younger than so many seconds.
    """
    columns = list(log[-1])
    table, curve = (output / name for name in LOG_FILES)
    try:
        write_csv(table, columns, [[row.get(column, "") for column in columns] for row in log])
        if not curve.exists() or time.time() - curve.stat().st_mtime >= draw_every:
            draw_learning_curve(curve, log)
    except PermissionError as error:
        tell(f"warning: {error.filename} cannot be written; is it open in another program?")
