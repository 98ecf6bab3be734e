"""Fine-tune SAM 2.1 on your images: the mask decoder and the prompt encoder learn.

    python train_sam2_proper.py                            # SAM 2.1 small on data/, 20 epochs
    python train_sam2_proper.py --model tiny --epochs 5    # a smaller model, a shorter run
    python train_sam2_proper.py --limit 20 --epochs 1      # a quick look
    python train_sam2_proper.py --resume                   # go on after an interruption
    python train_sam2_proper.py --demo                     # see it work in a minute

The image encoder stays frozen. Each step shows SAM 2 one random point inside the mask and
corrects the mask and the scores that it answers with. What is written to output/:
sam2_best.pt (best on val), sam2_final.pt, train_log.csv, learning_curve.png.
"""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from command_line import ArgumentParser, UserError, number, run, seed
from download_dataset import draw_demo, is_filled
from image_files import DEMO_DATA, Pair, atomic_write, read_pair, split_pairs
from sam2_utils import (
    MODELS,
    add_device_option,
    add_precision_option,
    autocast,
    calculate_iou,
    encode_images,
    ensure_checkpoint,
    load_checkpoint,
    load_predictor,
    predict_masks,
    prompt_from_mask,
    save_checkpoint,
    segment,
    select_device,
    select_precision,
    upscale_masks,
)

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

STATE_FILE = "train_state.pt"
# What a resumed run must have in common with the run that it goes on with.
RESUME_SETTINGS = (
    "data", "model", "checkpoint", "batch_size", "lr", "weight_decay", "score_weight", "precision",
    "seed", "limit",
)  # fmt: skip


class Learner(NamedTuple):
    """What learns, and how; all of it is saved to go on after an interruption."""

    weights: torch.nn.ModuleDict  # the prompt encoder and the mask decoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16 gradients; else it does nothing


def make_learner(predictor: SAM2ImagePredictor, args: Namespace) -> Learner:
    """Freeze the whole model but its prompt encoder and its mask decoder; these learn."""
    model = predictor.model.eval().requires_grad_(False)
    weights = torch.nn.ModuleDict(
        {"prompt_encoder": model.sam_prompt_encoder, "mask_decoder": model.sam_mask_decoder}
    ).requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == torch.float16)
    return Learner(weights, optimizer, scaler)


def guide_loss(
    mask_logits: torch.Tensor,
    iou_scores: torch.Tensor,
    true_mask: torch.Tensor,
    score_weight: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the guide's loss for one image, and what to report of it.

    seg_loss: binary cross-entropy between sigmoid(logits) and the true mask, for the first of
    the three masks, mean over pixels. score_loss: mean |predicted score - actual IoU of the
    thresholded mask|, over all three, so that choosing by score stays honest.

    Arguments:
      mask_logits: 3xHxW, at the image's resolution.
      iou_scores: 3.
      true_mask: HxW bool.
    """
    seg_loss = F.binary_cross_entropy_with_logits(mask_logits[0], true_mask.float())
    actual_iou = calculate_iou(mask_logits > 0, true_mask)
    score_loss = (iou_scores - actual_iou).abs().mean()
    loss = seg_loss + score_weight * score_loss
    report = {
        "loss": loss.item(),
        "seg_loss": seg_loss.item(),
        "score_loss": score_loss.item(),
        "train_iou": actual_iou[iou_scores.argmax()].item(),
    }
    return loss, report


def train_one_epoch(
    predictor: SAM2ImagePredictor,
    pairs: list[Pair],
    learner: Learner,
    epoch: int,
    args: Namespace,
) -> dict[str, float]:
    """Go once through the training pairs in random order; return the means of what it reports.

    The order and the prompts follow from the seed and the epoch alone. Raises UserError when
    the loss is not finite, or every mask is empty.
    """
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(len(pairs))
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    reports: list[dict[str, float]] = []
    progress = tqdm(batches, desc=f"Epoch {epoch}/{args.epochs}", unit="step", leave=False)
    for batch in progress:
        examples = [read_pair(pairs[index]) for index in batch]
        examples = [(image, mask) for image, mask in examples if mask.any()]
        if not examples:  # no object, nothing to point at
            continue
        images, masks = zip(*examples, strict=True)
        sizes = [mask.shape for mask in masks]

        with autocast(args.device, args.precision):
            # Encode the images (frozen, without gradients)
            features = encode_images(predictor, list(images))

            # One foreground point an image, drawn anew each step
            prompts = [prompt_from_mask(mask, "random", rng) for mask in masks]

            # Prompt encoder and mask decoder, with gradients
            mask_logits, iou_scores = predict_masks(predictor, features, prompts, sizes)

        # The loss at each image's own resolution, mean over the batch
        losses = []
        for i, mask in enumerate(masks):
            logits = upscale_masks(predictor, mask_logits[i : i + 1], sizes[i])[0]
            true_mask = torch.from_numpy(mask).to(args.device)
            loss, report = guide_loss(logits, iou_scores[i], true_mask, args.score_weight)
            losses.append(loss)
            reports.append(report)
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} in epoch {epoch}; the files of the epochs before "
                f"it are kept in {args.output}; use a smaller --lr, or --precision float32"
            )

        # Step
        learner.optimizer.zero_grad()
        learner.scaler.scale(loss).backward()
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        recent = mean_of(reports[-50:])
        progress.set_postfix(loss=f"{recent['loss']:.4f}", IoU=f"{recent['train_iou']:.3f}")

    skipped = len(pairs) - len(reports)
    if not reports:
        raise UserError("every training mask is empty; check that objects are white (255)")
    if skipped and epoch == 1:
        print(f"skipped {skipped} of {len(pairs)} training images: their masks are empty")
    return mean_of(reports)


def mean_of(reports: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each value over the reports."""
    return {key: float(np.mean([report[key] for report in reports])) for key in reports[0]}


def evaluate(predictor: SAM2ImagePredictor, pairs: list[Pair], args: Namespace) -> float:
    """Return the mean IoU over pairs, each prompted with the point deepest inside its mask.

    compare_models.py measures in the same way. Pairs with an empty mask are left out.
    """
    ious = []
    for pair in tqdm(pairs, desc="Validating", unit="image", leave=False):
        image, true_mask = read_pair(pair)
        if not true_mask.any():
            continue
        prompt = prompt_from_mask(true_mask, "center")
        with autocast(args.device, args.precision):
            features = encode_images(predictor, [image])
            mask, _ = segment(predictor, features, prompt, true_mask.shape)
        ious.append(calculate_iou(mask, true_mask))
    if not ious:
        raise UserError("every validation mask is empty; check that objects are white (255)")
    return float(np.mean(ious))


def write_log(output: Path, log: list[dict[str, float]], original_iou: float) -> None:
    """Write train_log.csv and learning_curve.png, a row and a point an epoch.

    They are written whole after each epoch, so that one that is open elsewhere only has to wait.
    """
    try:
        write_csv(output / "train_log.csv", log)
        draw_learning_curve(output / "learning_curve.png", log, original_iou)
    except PermissionError as error:
        print(f"warning: {error.filename} cannot be written; is it open in another program?")


def write_csv(path: Path, log: list[dict[str, float]]) -> None:
    """Write the log as a table, a row an epoch."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def draw_learning_curve(path: Path, log: list[dict[str, float]], original_iou: float) -> None:
    """Draw the loss and the mean IoU over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in log]
    loss_axes, iou_axes = figure.subplots(1, 2)
    loss_axes.plot(epochs, [row["loss"] for row in log], "o-", label="training loss")
    iou_axes.plot(epochs, [row["train_iou"] for row in log], "o-", label="train (random point)")
    iou_axes.plot(epochs, [row["val_iou"] for row in log], "o-", label="val (center point)")
    iou_axes.axhline(original_iou, color="gray", linestyle="--", label="val before training")
    for axes, name in ((loss_axes, "loss"), (iou_axes, "mean IoU")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def resume_settings(args: Namespace) -> dict[str, Any]:
    """Return the settings that fix what a run computes, as plain values."""
    return {name: vars(args)[name] for name in RESUME_SETTINGS} | {
        "precision": str(args.precision).removeprefix("torch."),
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
    }


def save_state(
    learner: Learner, log: list[dict[str, float]], original_iou: float, args: Namespace
) -> None:
    """Save what load_state needs to go on after this epoch."""
    save_checkpoint(
        args.output / STATE_FILE,
        learner.weights,
        optimizer=learner.optimizer.state_dict(),
        scaler=learner.scaler.state_dict(),
        log=log,
        original_iou=original_iou,
        settings=resume_settings(args),
    )


def load_state(learner: Learner, args: Namespace) -> tuple[list[dict[str, float]], float]:
    """Put the learner back to where an interrupted run was; return its log and original_iou.

    Raises UserError if there is no such run, or its settings differ.
    """
    path = args.output / STATE_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {args.output}; run without --resume")
    state = load_checkpoint(path)
    for name, value in resume_settings(args).items():
        before = state["settings"].get(name)
        if before != value:
            raise UserError(
                f"the run in {args.output} had --{name.replace('_', '-')} {before}, not {value}; "
                f"resume with the same, or use another --output"
            )
    learner.weights.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    return state["log"], state["original_iou"]


def train(
    predictor: SAM2ImagePredictor, train_pairs: list[Pair], val_pairs: list[Pair], args: Namespace
) -> None:
    """Fine-tune for args.epochs epochs, or for those that are left, and write the results."""
    settings = resume_settings(args)
    print(f"{len(train_pairs)} training and {len(val_pairs)} validation images from {args.data}")
    print(f"SAM 2.1 {args.model} on {args.device} in {settings['precision']}")

    learner = make_learner(predictor, args)
    if args.resume:
        log, original_iou = load_state(learner, args)
        print(f"going on after epoch {len(log)}")
        if len(log) >= args.epochs:
            print(f"all {len(log)} epochs are done; for more, raise --epochs")
    else:
        log, original_iou = [], evaluate(predictor, val_pairs, args)
        print(f"before training: val IoU {original_iou:.4f}")
        save_state(learner, log, original_iou, args)

    for epoch in range(len(log) + 1, args.epochs + 1):
        start = time.perf_counter()
        report = train_one_epoch(predictor, train_pairs, learner, epoch, args)
        val_iou = evaluate(predictor, val_pairs, args)
        seconds = time.perf_counter() - start
        is_best = all(val_iou > row["val_iou"] for row in log)
        log.append(
            {"epoch": epoch, **report, "val_iou": val_iou, "lr": args.lr, "seconds": seconds}
        )
        if is_best:
            save_model(args.output / "sam2_best.pt", predictor, log, settings)
        save_state(learner, log, original_iou, args)
        write_log(args.output, log, original_iou)
        print(
            f"epoch {epoch:3}  loss {report['loss']:.4f}  train IoU {report['train_iou']:.4f}  "
            f"val IoU {val_iou:.4f}  {seconds:.1f} s{'  best' if is_best else ''}"
        )
    save_model(args.output / "sam2_final.pt", predictor, log, settings)
    best_iou = max(row["val_iou"] for row in log)
    print(f"val IoU {original_iou:.4f} before training, {best_iou:.4f} at best")


def save_model(
    path: Path, predictor: SAM2ImagePredictor, log: list[dict[str, float]], settings: dict[str, Any]
) -> None:
    """Save the whole model, with what it is and where it comes from beside its weights."""
    save_checkpoint(
        path,
        predictor.model,
        model_name=settings["model"],
        epoch=len(log),
        val_iou=log[-1]["val_iou"],
        settings=settings,
    )


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    files = parser.add_argument_group("what is read and written")
    files.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    files.add_argument(
        "--demo", action="store_true", help="train mini on drawn images, into output/demo"
    )
    files.add_argument("--limit", type=number(int, at_least=1), help="use the first N images only")
    files.add_argument("--output", type=Path, default=Path("output"), help="where results go")
    files.add_argument("--resume", action="store_true", help="go on with the run in --output")

    model = parser.add_argument_group("the model to start from")
    model.add_argument("--model", choices=MODELS, default="small", help="its size")
    model.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")

    recipe = parser.add_argument_group("the recipe")
    at_least_1 = number(int, at_least=1)
    recipe.add_argument("--epochs", type=at_least_1, default=20, help="passes over the data")
    recipe.add_argument("--batch-size", type=at_least_1, default=1, help="images a step")
    recipe.add_argument("--lr", type=number(float, above=0), default=1e-5, help="learning rate")
    recipe.add_argument(
        "--weight-decay", type=number(float, at_least=0), default=4e-5, help="of AdamW"
    )
    recipe.add_argument(
        "--score-weight",
        type=number(float, at_least=0),
        default=0.05,
        help="weight of the score loss beside the mask loss",
    )
    recipe.add_argument("--seed", type=seed, default=42, help="of the order and the prompts")

    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(machine, "auto: bfloat16 (else float16) on CUDA, float32 elsewhere")
    return parser.parse_args_with_demo(
        argv,
        data=DEMO_DATA,
        output=Path("output/demo"),
        model="mini",
        epochs=8,
        batch_size=4,
        lr=5e-4,
    )


def next_command(args: Namespace) -> str:
    """Return the command that compares what this run has trained."""
    if args.demo:
        return "python compare_models.py --demo"
    command = f"python compare_models.py --finetuned {args.output / 'sam2_best.pt'}"
    return command + (f" --data {args.data}" if args.data != Path("data") else "")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = select_device(args.device)
    args.precision = select_precision(args.precision, args.device)
    torch.manual_seed(args.seed)
    if args.demo and not is_filled(args.data):
        draw_demo(args.data)
    train_pairs = split_pairs(args.data, "train", args.limit)
    val_pairs = split_pairs(args.data, "val", args.limit)
    args.checkpoint = args.checkpoint or ensure_checkpoint(args.model)
    predictor, _ = load_predictor(args.model, args.checkpoint, args.device)
    try:
        train(predictor, train_pairs, val_pairs, args)
    except KeyboardInterrupt:
        if (args.output / STATE_FILE).is_file():
            print("\nstopped; to go on after the last finished epoch, add --resume")
        raise
    print(f"wrote sam2_best.pt, sam2_final.pt, train_log.csv, learning_curve.png to {args.output}")
    print(f"next: {next_command(args)}")


if __name__ == "__main__":
    run(main)
