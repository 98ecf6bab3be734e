"""Fine-tune SAM 2.1 on your images: the mask decoder and the prompt encoder learn.

    python train_sam2_proper.py                            # SAM 2.1 small on data/, 20 epochs
    python train_sam2_proper.py --model tiny --epochs 5    # a smaller model, a shorter run
    python train_sam2_proper.py --limit 20 --epochs 1      # a quick look
    python train_sam2_proper.py --resume                   # go on after an interruption
    python train_sam2_proper.py --lr auto                  # find the learning rate first
    python train_sam2_proper.py --demo                     # see it work in a minute
    python train_sam2_proper.py --recipe guide             # the guide's settings, not ours
    python train_sam2_proper.py --train-encoder lora       # the image encoder learns too
    torchrun --nproc_per_node=2 train_sam2_proper.py --batch-size 8    # on two GPUs

The image encoder stays frozen, so it sees each image once; what it says is kept in output/cache/
(not with --train-encoder, where that changes). Each step shows SAM 2 a point, a box, or clicks that
correct its own mask, and corrects the masks and the scores that it answers with. What is written to
output/: sam2_best.pt (best on val: the original where no epoch is better), sam2_final.pt,
train_log.csv, learning_curve.png.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import distributed
from command_line import ArgumentParser, UserError, number, run, seed
from device_check import trusted_device
from download_dataset import draw_demo, is_filled
from encoder_training import (
    add_encoder_options,
    encode_with_gradients,
    let_encoder_learn,
    merged_state_dict,
    settle_encoder_options,
)
from feature_cache import FeatureCache, check_room, load_features, pairs_with_objects
from image_files import (
    DEMO_DATA,
    Pair,
    atomic_write,
    only_run_in,
    read_mask,
    split_pairs,
    write_csv,
)
from learning_rate import (
    find_learning_rate,
    learning_rate_factor,
    parse_rate,
    split_for_trials,
)
from sam2_utils import (
    MODELS,
    Features,
    NotFiniteError,
    Prediction,
    Prompt,
    PromptedDecoder,
    add_device_option,
    add_precision_option,
    autocast,
    calculate_iou,
    choose_masks,
    copy_to,
    encode_images,
    ensure_checkpoint,
    feature_shapes,
    file_sha256,
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
from training_set import Batch, EpochSampler, TrainingSet, add_click, make_loader

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.data import DataLoader
from tqdm import tqdm

STATE_FILE = "train_state.pt"
# The settings that --recipe stands for; each is an option, too.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "batch_size": 4,
        "lr": 1e-4,
        "schedule": "cosine",
        "max_grad_norm": 1.0,
        "mask_loss": "first",
        "single_weight": 1.0,
        "dice_weight": 1.0,
        "score_weight": 0.05,
        "prompts": "mixed",
    },
    "guide": {
        "batch_size": 1,
        "lr": 1e-5,
        "schedule": "constant",
        "max_grad_norm": 0.0,
        "mask_loss": "first",
        "single_weight": 0.0,
        "dice_weight": 0.0,
        "score_weight": 0.05,
        "prompts": "point",
    },
}
MINI_LR = 3e-4  # mini was pretrained for an hour only, and has less to forget
# What is reported of a training image, beside the epoch's other figures
REPORTED = ("loss", "seg_loss", "score_loss", "train_iou", "clipped")
# What a resumed run must have in common with the run that it goes on with.
RESUME_SETTINGS = (
    "model", *RECIPES["guide"], "weight_decay", "precision", "seed", "limit",
    "train_encoder", "lora_rank", "encoder_lr", "no_cache",
)  # fmt: skip
# Compiling the decoder takes about a minute, which so many images of a full-size model win back.
COMPILE_FROM_IMAGES = 3000


class Learner(NamedTuple):
    """What learns, and how; all of it is saved to go on after an interruption."""

    weights: PromptedDecoder  # of the prompt encoder and the mask decoder, and see make_learner
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16 gradients; else it does nothing
    decoder: torch.nn.Module  # computes with these weights, perhaps compiled or distributed


def make_learner(predictor: SAM2ImagePredictor, args: Namespace) -> Learner:
    """Freeze the whole model but its prompt encoder and its mask decoder; these learn.

    What learns of the image encoder, if anything, joins their weights.
    """
    predictor.model.eval().requires_grad_(False)
    weights = PromptedDecoder(predictor.model).requires_grad_(True)
    groups = [{"params": list(weights.parameters())}]
    if args.train_encoder != "none":
        weights.encoder = torch.nn.ParameterList(let_encoder_learn(predictor.model, args))
        groups.append({"params": list(weights.encoder)})
    optimizer = torch.optim.AdamW(
        groups,
        lr=args.lr,
        weight_decay=args.weight_decay,
        fused=args.device.type in ("cpu", "cuda"),  # one kernel for all weights
    )
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == torch.float16)
    return Learner(weights, optimizer, scaler, decoder=weights)


def speed_up(
    learner: Learner, predictor: SAM2ImagePredictor, image_count: int, args: Namespace
) -> Learner:
    """Compile the decoder if the image_count images to come are worth it, and distribute it."""
    decoder = learner.decoder
    if args.compile == "on" or (args.compile == "auto" and compiling_pays(predictor, image_count)):
        decoder = compile_decoder(learner.weights, predictor, args)
    if distributed.world_size() > 1:
        decoder = torch.nn.parallel.DistributedDataParallel(decoder, find_unused_parameters=True)
    return learner._replace(decoder=decoder)


def compiling_pays(predictor: SAM2ImagePredictor, image_count: int) -> bool:
    """Say whether a faster decoder will have won back the time of compiling; measured on CPUs."""
    is_full_size = predictor.model.image_size >= 1024
    return predictor.device.type == "cpu" and is_full_size and image_count >= COMPILE_FROM_IMAGES


class CompiledDecoder(torch.nn.Module):
    """A decoder compiled for full batches; others, like the last of an epoch, go uncompiled."""

    def __init__(self, decoder: PromptedDecoder, batch_size: int) -> None:
        super().__init__()
        self.decoder, self.batch_size = decoder, batch_size
        self.compiled = torch.compile(decoder.decode_masks)

    def forward(
        self, features: Features, point_coords: torch.Tensor, *prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if len(point_coords) != self.batch_size:
            return self.decoder(features, point_coords, *prompts)
        prompts = point_coords, *prompts
        sparse_embeddings, dense_embeddings = self.decoder.embed_prompts(*prompts)
        # One kernel for prompts of any number of points, with masks and without
        torch._dynamo.mark_dynamic(sparse_embeddings, 1)
        return self.compiled(features, sparse_embeddings, dense_embeddings.float().contiguous())


def compile_decoder(
    decoder: PromptedDecoder, predictor: SAM2ImagePredictor, args: Namespace
) -> torch.nn.Module:
    """Return the decoder compiled, or as it is where that does not work here."""
    print("compiling the decoder (a minute or so; --compile off does without)")
    batch_size = len(distributed.share(list(range(args.batch_size))))
    compiled = CompiledDecoder(decoder, batch_size)
    maps = [
        torch.zeros(batch_size, *shape, device=args.device).permute(0, 3, 1, 2)
        for shape in feature_shapes(predictor.model)
    ]
    points = torch.zeros(batch_size, 1, 2, device=args.device)
    labels = torch.ones(batch_size, 1, dtype=torch.int32, device=args.device)
    try:
        features = Features(maps[0], maps[1:])
        with autocast(args.device, args.precision):
            if args.prompts == "mixed":  # clicks are placed without gradients
                with torch.no_grad():
                    compiled(features, points, labels, None)
            answers = compiled(features, points, labels, None)
        sum(answer.mean() for answer in answers).backward()
    except Exception as error:  # whatever compilers raise: the run can go on without one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"torch.compile does not work here ({reason}); going on without it, only slower")
        return decoder
    finally:
        decoder.zero_grad()
    return compiled


def image_losses(
    prediction: Prediction, true_mask: torch.Tensor, args: Namespace
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each image, and what to report of each.

    seg_loss: the mask_losses of the first, the best or all of the three masks (args.mask_loss).
    score_loss: mean |predicted score - actual IoU of the thresholded mask|, over all three, so
    that choosing by score stays honest. The guide's loss is that of the first mask without dice.
    With args.single_weight the single mask, which other tools take, learns as much: its mask and
    its score, and that there is an object (cross-entropy, weighted like a score).

    Arguments:
      prediction: ...x4xHxW mask logits, at the true mask's resolution; ...x4 scores; ...x1.
      true_mask: ...xHxW float in [0, 1]; where cells are larger than pixels, the part covered.
    """
    mask_logits, iou_scores, object_logits = prediction
    actual_iou = calculate_iou(mask_logits > 0, true_mask.unsqueeze(-3) > 0.5)
    score_losses = (iou_scores - actual_iou).abs()

    # The three masks
    learning = slice(1, 2) if args.mask_loss == "first" else slice(1, 4)
    losses = mask_losses(mask_logits[..., learning, :, :], true_mask, args.dice_weight)
    seg_loss = losses.min(-1).values if args.mask_loss == "best" else losses.mean(-1)
    score_loss = score_losses[..., 1:].mean(-1)
    loss = seg_loss + args.score_weight * score_loss

    # The single mask
    if args.single_weight:
        single_loss = mask_losses(mask_logits[..., :1, :, :], true_mask, args.dice_weight)[..., 0]
        scores_loss = score_losses[..., 0] + F.softplus(-object_logits)[..., 0]
        loss = loss + args.single_weight * (single_loss + args.score_weight * scores_loss)

    chosen = iou_scores[..., 1:].argmax(-1, keepdim=True)
    report = {
        "loss": loss.detach(),
        "seg_loss": seg_loss.detach(),
        "score_loss": score_loss.detach(),
        "train_iou": actual_iou[..., 1:].gather(-1, chosen).squeeze(-1),
    }
    return loss, report


def mask_losses(
    mask_logits: torch.Tensor, true_mask: torch.Tensor, dice_weight: float
) -> torch.Tensor:
    """Return the loss of each mask, ...xC: cross-entropy, and dice_weight times the dice loss.

    Cross-entropy is that between sigmoid(logits) and the true mask, mean over pixels. Takes
    ...xCxHxW logits and the ...xHxW true mask, as in image_losses.
    """
    targets = true_mask.unsqueeze(-3).expand_as(mask_logits)
    losses = F.binary_cross_entropy_with_logits(mask_logits, targets, reduction="none")
    losses = losses.mean((-2, -1))
    if dice_weight:
        losses = losses + dice_weight * dice_loss(mask_logits.sigmoid(), targets)
    return losses


def dice_loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return 1 - (2 sum(predicted true) + 1) / (sum(predicted) + sum(true) + 1), of ...xHxW.

    Unlike cross-entropy it weighs an object by its outline's share of itself, not of the image:
    of a small object, an empty mask is as wrong as of a large one (Milletari et al., V-Net, 2016).
    """
    overlap = (predicted * true).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (predicted.sum((-2, -1)) + true.sum((-2, -1)) + 1)


def batch_loss(
    predictor: SAM2ImagePredictor,
    prediction: Prediction,
    true_masks: list[torch.Tensor],
    args: Namespace,
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Return the mean of B images' losses, each at its true mask's resolution, and B reports."""
    if len({mask.shape for mask in true_masks}) == 1:  # all at once
        groups = [(prediction, torch.stack(true_masks))]
    else:
        groups = [
            (Prediction(*(answer[i : i + 1] for answer in prediction)), mask[None])
            for i, mask in enumerate(true_masks)
        ]
    losses, reports = [], []
    for answers, masks in groups:
        logits = answers.mask_logits
        masks = copy_to(logits.device, masks)
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = upscale_masks(predictor, logits, masks.shape[-2:])
        loss, report = image_losses(answers._replace(mask_logits=logits), masks, args)
        losses.append(loss)
        columns = [values.tolist() for values in report.values()]
        reports += [dict(zip(report, row, strict=True)) for row in zip(*columns, strict=True)]
    return torch.cat(losses).mean(), reports


@torch.no_grad()
def add_clicks(
    predictor: SAM2ImagePredictor, features: Features, batch: Batch, decoder: torch.nn.Module
) -> tuple[list[Prompt], torch.Tensor | None]:
    """Return the batch's prompts with the clicks of its plan, and what else goes in with them.

    Each click corrects the mask that the model itself would choose. With batch.plan.gives_mask
    the logits of the last one are returned too, Bx1x(S/4)x(S/4).
    """
    prompts, mask_inputs = batch.prompts, None
    size = predictor.model.image_size
    for _ in range(batch.plan.clicks):
        prediction = predict_masks(
            predictor, features, prompts, [(size, size)] * len(prompts), decoder, mask_inputs
        )
        chosen, _ = choose_masks(predictor, prediction)
        prompts = [
            add_click(
                prompt,
                (upscale_masks(predictor, logits[None], true_mask.shape)[0, 0] > 0).cpu().numpy(),
                true_mask.numpy() > 0.5,
                size,
            )
            for prompt, logits, true_mask in zip(prompts, chosen, batch.true_masks, strict=True)
        ]
        mask_inputs = chosen.clamp(-32, 32) if batch.plan.gives_mask else None
    return prompts, mask_inputs


def train_one_epoch(
    predictor: SAM2ImagePredictor,
    loader: DataLoader,
    learner: Learner,
    epoch: int,
    args: Namespace,
) -> dict[str, float]:
    """Go once through the training images in random order; return the means of what is reported.

    The order and the prompts follow from the seed and the epoch alone. Raises NotFiniteError when
    the loss is not finite.
    """
    loader.sampler.epoch = epoch
    encode = encode_images if args.train_encoder == "none" else encode_with_gradients
    groups = learner.optimizer.param_groups  # the decoder's, and the encoder's if it learns
    input_size = (predictor.model.image_size,) * 2
    reports: list[dict[str, float]] = []
    progress = tqdm(loader, desc=f"Epoch {epoch}/{args.epochs}", unit="step", leave=False)
    for step, batch in enumerate(progress, start=(epoch - 1) * len(loader)):
        factor = learning_rate_factor(step, args.epochs * len(loader), args.schedule)
        for group, highest in zip(groups, (args.lr, args.encoder_lr), strict=False):
            group["lr"] = factor * highest

        with autocast(args.device, args.precision):
            # Features of the image encoder: from the cache, or computed now
            features = batch.features or encode(predictor, batch.images)
            features = features.to(args.device, torch.float32)

            # What the model is shown: a prompt, perhaps with clicks that correct its answers
            prompts, mask_inputs = add_clicks(predictor, features, batch, learner.decoder)

            # Prompt encoder and mask decoder, with gradients
            prediction = predict_masks(
                predictor,
                features,
                prompts,
                [input_size] * len(prompts),
                learner.decoder,
                mask_inputs,
            )

        # The loss, mean over the batch
        loss, batch_reports = batch_loss(predictor, prediction, batch.true_masks, args)
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"the loss became {loss.item()} in epoch {epoch}; the files of the epochs before "
                f"it are kept in {args.output}; use a smaller --lr, or --precision float32"
            )

        # Step; the mean over processes is that over the images of all
        learner.optimizer.zero_grad()
        share = batch.fraction * distributed.world_size()
        learner.scaler.scale(loss * share).backward()
        clipped = clip_gradients(learner, args.max_grad_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        reports += [{**report, "clipped": clipped} for report in batch_reports if batch.fraction]
        if reports:
            recent = mean_of(reports[-50:])
            progress.set_postfix(loss=f"{recent['loss']:.4f}", IoU=f"{recent['train_iou']:.3f}")
    return mean_over_all(reports, args.device)


def clip_gradients(learner: Learner, max_norm: float) -> float:
    """Scale the gradients down to a norm of max_norm, over all weights; 0 leaves them alone.

    Returns 1.0 where they were longer, else 0.0.
    """
    if not max_norm:
        return 0.0
    learner.scaler.unscale_(learner.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(learner.weights.parameters(), max_norm)
    return float(norm > max_norm)


def mean_over_all(reports: list[dict[str, float]], device: torch.device) -> dict[str, float]:
    """Return the mean of each value over the reports of all processes."""
    sums = [float(sum(report[name] for report in reports)) for name in REPORTED]
    *sums, count = distributed.sum_over_all([*sums, float(len(reports))], device)
    return {name: total / count for name, total in zip(REPORTED, sums, strict=True)}


def mean_of(reports: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each value over the reports."""
    return {key: float(np.mean([report[key] for report in reports])) for key in reports[0]}


def evaluate(
    predictor: SAM2ImagePredictor,
    pairs: list[Pair],
    cache: FeatureCache | None,
    args: Namespace,
    indices: list[int] | None = None,
) -> float:
    """Return the mean IoU over pairs, each prompted with the point deepest inside its mask.

    compare_models.py measures in the same way. Pairs with an empty mask are left out, and so are
    those that are not among the indices, if any are given.
    """
    ious = []
    indices = range(len(pairs)) if indices is None else indices
    for index in tqdm(indices, desc="Validating", unit="image", leave=False):
        pair = pairs[index]
        true_mask = read_mask(pair.mask)
        if not true_mask.any():
            continue
        prompt = prompt_from_mask(true_mask, "center")
        features = load_features(predictor, cache, index, pair, args.precision)
        with autocast(args.device, args.precision):
            mask, _ = segment(predictor, features, prompt, true_mask.shape)
        ious.append(calculate_iou(mask, true_mask))
    if not ious:
        raise UserError("every validation mask is empty; check that objects are white (255)")
    return float(np.mean(ious))


def write_log(output: Path, log: list[dict[str, float]]) -> None:
    """Write train_log.csv and learning_curve.png, a row and a point an epoch; 0 is the original.

    They are written whole after each epoch, so that one that is open elsewhere only has to wait.
    """
    columns = list(log[-1])
    try:
        rows = [[row.get(column, "") for column in columns] for row in log]
        write_csv(output / "train_log.csv", columns, rows)
        draw_learning_curve(output / "learning_curve.png", log)
    except PermissionError as error:
        print(f"warning: {error.filename} cannot be written; is it open in another program?")


def draw_learning_curve(path: Path, log: list[dict[str, float]]) -> None:
    """Draw the loss and the mean IoU over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, iou_axes = figure.subplots(1, 2)
    for axes, column, label in (
        (loss_axes, "loss", "training loss"),
        (iou_axes, "train_iou", "train (its own prompts)"),
        (iou_axes, "val_iou", "val (center point)"),
    ):
        rows = [row for row in log if column in row]
        axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], "o-", label=label)
    iou_axes.axhline(log[0]["val_iou"], color="gray", linestyle="--", label="val before training")
    for axes, name in ((loss_axes, "loss"), (iou_axes, "mean IoU")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def run_settings(args: Namespace, pairs: list[Pair]) -> dict[str, Any]:
    """Return what fixes the outcome of a run, as plain values; it is saved with the model."""
    files = [path for pair in pairs for path in (pair.image, pair.mask)]
    sizes = [(path.parent.name, path.name, path.stat().st_size) for path in files]
    return {name: vars(args)[name] for name in RESUME_SETTINGS} | {
        "precision": str(args.precision).removeprefix("torch."),
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": file_sha256(args.checkpoint),
        "data": str(args.data),
        "data_sha256": hashlib.sha256(repr(sizes).encode()).hexdigest(),
        "cache": None if args.no_cache else str(args.cache),
    }


def save_state(
    learner: Learner, log: list[dict[str, float]], settings: dict[str, Any], args: Namespace
) -> None:
    """Save what load_state needs to go on after this epoch."""
    save_checkpoint(
        args.output / STATE_FILE,
        learner.weights,
        optimizer=learner.optimizer.state_dict(),
        scaler=learner.scaler.state_dict(),
        log=log,
        settings=settings,
    )


def load_state(settings: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """Read what save_state saved; settings["lr"] becomes the run's where it is auto.

    Raises UserError if there is no such run, or its settings, its data or its model differ.
    """
    path = args.output / STATE_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {args.output}; run without --resume")
    state = load_checkpoint(path)
    # Files from before there were recipes or --train-encoder do not say these.
    before = {**RECIPES["guide"], "train_encoder": "none", **state.get("settings", {})}
    if settings["lr"] == "auto":
        settings["lr"] = before["lr"]
    for name in RESUME_SETTINGS:
        if before.get(name) != settings[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"the run in {args.output} had {option} {before.get(name)}, not {settings[name]}; "
                "resume with the same, or use another --output"
            )
    for name, what in (
        ("checkpoint_sha256", f"started from another --checkpoint than {args.checkpoint}"),
        ("data_sha256", f"had other images or masks than {args.data} has now"),
    ):
        if before.get(name) != settings[name]:
            raise UserError(f"the run in {args.output} {what}; resume with the same, or start anew")
    if "original_iou" in state:  # a file from before epoch 0 had a row
        state["log"].insert(0, {"epoch": 0, "val_iou": state["original_iou"]})
    return state


def restore(learner: Learner, state: dict[str, Any]) -> None:
    """Put the learner back to where an interrupted run was."""
    learner.weights.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])


def train(
    predictor: SAM2ImagePredictor, train_pairs: list[Pair], val_pairs: list[Pair], args: Namespace
) -> None:
    """Fine-tune for args.epochs epochs, or for those that are left, and write the results."""
    settings = run_settings(args, train_pairs + val_pairs)
    state = load_state(settings, args) if args.resume else None
    print(f"{len(train_pairs)} training and {len(val_pairs)} validation images from {args.data}")
    print(f"SAM 2.1 {args.model} on {args.device} in {settings['precision']}")
    train_cache, val_cache = open_caches(predictor, train_pairs, val_pairs, args)
    loader = load_training_set(predictor, train_pairs, train_cache, args)

    is_first = distributed.rank() == 0
    if state:
        log = state["log"]
    elif is_first:
        log = [{"epoch": 0, "val_iou": evaluate(predictor, val_pairs, val_cache, args)}]
        print(f"before training: val IoU {log[0]['val_iou']:.4f}")
    else:
        log = [{"epoch": 0}]
    if settings["lr"] == "auto":
        settings["lr"] = try_learning_rates(predictor, loader, train_pairs, train_cache, args)
    args.lr = settings["lr"]
    learner = start(predictor, loader, state, log, settings, args)

    try:
        for epoch in range(log[-1]["epoch"] + 1, args.epochs + 1):
            begun = time.perf_counter()
            report = train_one_epoch(predictor, loader, learner, epoch, args)
            if is_first:
                val_iou = evaluate(predictor, val_pairs, val_cache, args)
                row = {
                    "epoch": epoch,
                    **report,
                    "val_iou": val_iou,
                    "lr": learner.optimizer.param_groups[0]["lr"],
                }
                log.append({**row, "seconds": time.perf_counter() - begun})
                save_epoch(predictor, learner, log, settings, args)
    except KeyboardInterrupt:
        print("\nstopped; to go on after the last finished epoch, add --resume")
        raise
    if is_first:
        write_log(args.output, log)  # a killed run may not have come to it
        save_model(args.output / "sam2_final.pt", predictor, log, settings)
        print(conclude(log))


def start(
    predictor: SAM2ImagePredictor,
    loader: DataLoader,
    state: dict[str, Any] | None,
    log: list[dict[str, float]],
    settings: dict[str, Any],
    args: Namespace,
) -> Learner:
    """Return what learns, as it is now or as it was in an interrupted run's state; say so."""
    learner = make_learner(predictor, args)
    done = log[-1]["epoch"]
    if distributed.rank() == 0:
        if not state:
            save_state(learner, log, settings, args)  # from here on it can be resumed
        if best_of(log)["epoch"] == 0:  # and the model is still the original
            save_model(args.output / "sam2_best.pt", predictor, log[:1], settings)
    if state:
        restore(learner, state)
        print(f"going on after epoch {done}")
    if args.train_encoder != "none":
        count = sum(weight.numel() for weight in learner.weights.encoder)
        print(
            f"the image encoder learns too ({args.train_encoder}, {count / 1e6:.2f} M weights): "
            "its features change, so no cache; each image is encoded in each epoch (slow)"
        )
    if done < args.epochs:
        return speed_up(learner, predictor, len(loader.sampler.indices) * args.epochs, args)
    print(f"all {done} epochs are done; for more, raise --epochs")
    return learner


def best_of(log: list[dict[str, float]]) -> dict[str, float]:
    """Return the row of the epoch with the highest val IoU; the earliest of several."""
    return max(log, key=lambda row: row["val_iou"])


def conclude(log: list[dict[str, float]]) -> str:
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


def try_learning_rates(
    predictor: SAM2ImagePredictor,
    loader: DataLoader,
    pairs: list[Pair],
    cache: FeatureCache | None,
    args: Namespace,
) -> float:
    """Find a learning rate on a loader's training images; it and the model stay as they are."""
    indices = loader.sampler.indices
    learn_from, held_out, epochs = split_for_trials(indices, args.seed)
    before = evaluate(predictor, pairs, cache, args, held_out)
    original = copy.deepcopy(predictor.model.state_dict())

    def try_rate(rate: float) -> float:
        trial = Namespace(**{**vars(args), "lr": rate, "epochs": epochs})
        learner = make_learner(predictor, trial)
        try:
            for epoch in range(1, epochs + 1):
                train_one_epoch(predictor, loader, learner, epoch, trial)
            return evaluate(predictor, pairs, cache, args, held_out)
        except NotFiniteError:
            return float("nan")
        finally:
            predictor.model.load_state_dict(original)

    loader.sampler.indices = learn_from
    try:
        return find_learning_rate(try_rate, before)
    finally:
        loader.sampler.indices = indices


def save_epoch(
    predictor: SAM2ImagePredictor,
    learner: Learner,
    log: list[dict[str, float]],
    settings: dict[str, Any],
    args: Namespace,
) -> None:
    """Save the model if it is the best so far, the state and the log; print the log's last row."""
    row = log[-1]
    is_best = best_of(log) is row
    if is_best:
        save_model(args.output / "sam2_best.pt", predictor, log, settings)
    save_state(learner, log, settings, args)
    write_log(args.output, log)
    print(
        f"epoch {row['epoch']:3}  loss {row['loss']:.4f}  train IoU {row['train_iou']:.4f}  "
        f"val IoU {row['val_iou']:.4f}  {row['seconds']:.1f} s{'  best' if is_best else ''}"
    )


def open_caches(
    predictor: SAM2ImagePredictor, train_pairs: list[Pair], val_pairs: list[Pair], args: Namespace
) -> tuple[FeatureCache, FeatureCache] | tuple[None, None]:
    """Return the features of both splits, encoding what is not yet there; or none of them.

    Raises UserError, before anything slow, where the disk has no room for what is to be encoded.
    """
    if args.no_cache:
        return None, None
    caches = [
        FeatureCache(args.cache / f"{split}.features", predictor, pairs, args.precision)
        for split, pairs in (("train", train_pairs), ("val", val_pairs))
    ]
    if distributed.rank() == 0:
        check_room(caches, args.cache)
    try:
        for cache in caches:
            cache.fill(predictor)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the images that are left")
        raise
    return tuple(caches)


def load_training_set(
    predictor: SAM2ImagePredictor, pairs: list[Pair], cache: FeatureCache | None, args: Namespace
) -> DataLoader:
    """Return the training images as batches; those with an empty mask are left out."""
    indices = pairs_with_objects(pairs, cache)
    if not indices:
        raise UserError("every training mask is empty; check that objects are white (255)")
    if len(indices) < len(pairs):
        skipped = len(pairs) - len(indices)
        print(f"skipped {skipped} of {len(pairs)} training images: their masks are empty")
    training_set = TrainingSet(pairs, cache, predictor.model.image_size, args.seed, args.prompts)
    sampler = EpochSampler(indices, args.batch_size, args.seed)
    return make_loader(training_set, sampler, args.device)


def save_model(
    path: Path, predictor: SAM2ImagePredictor, log: list[dict[str, float]], settings: dict[str, Any]
) -> None:
    """Save the whole model, with what it is and where it comes from beside its weights."""
    save_checkpoint(
        path,
        merged_state_dict(predictor.model),
        model_name=settings["model"],
        epoch=log[-1]["epoch"],
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
    cache = files.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, help="where the images' features are kept (default: OUTPUT/cache)"
    )
    cache.add_argument(
        "--no-cache", action="store_true", help="encode each image anew in each epoch (slow)"
    )

    model = parser.add_argument_group("the model to start from")
    model.add_argument("--model", choices=MODELS, default="small", help="its size")
    model.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")

    recipe = parser.add_argument_group("the recipe")
    at_least_0, at_least_1 = number(float, at_least=0), number(int, at_least=1)

    def add_setting(option: str, help: str, **limits: Any) -> None:
        """Add an option whose default is the recipe's."""
        name = option.removeprefix("--").replace("-", "_")
        ours, guides = (RECIPES[of_recipe][name] for of_recipe in ("default", "guide"))
        recipe.add_argument(option, default=ours, help=f"{help} (guide: {guides})", **limits)

    recipe.add_argument(
        "--recipe", choices=RECIPES, default="default", help="what sets the defaults below"
    )
    add_setting("--batch-size", "images a step", type=at_least_1)
    add_setting(
        "--lr",
        "learning rate, at its highest; auto: the best of some that are tried before training, "
        f"on a part of the training images; mini's default is {MINI_LR:g}",
        type=parse_rate,
    )
    add_setting(
        "--schedule",
        "whether the learning rate warms up and falls to zero over the epochs, or stays",
        choices=("cosine", "constant"),
    )
    add_setting(
        "--max-grad-norm", "longer gradients are scaled down to it (0: none are)", type=at_least_0
    )
    add_setting(
        "--mask-loss",
        "which of the three masks are corrected",
        choices=("first", "best", "all"),
    )
    add_setting(
        "--single-weight",
        "of the loss of the single mask, which other tools take, beside the three (0: none)",
        type=at_least_0,
    )
    add_setting("--dice-weight", "of the dice loss beside cross-entropy", type=at_least_0)
    add_setting("--score-weight", "of the score loss beside the mask loss", type=at_least_0)
    add_setting(
        "--prompts",
        "a random point in the mask (point); one that is likelier the deeper it lies (inner); "
        "or such points, rough boxes and corrective clicks (mixed)",
        choices=("mixed", "inner", "point"),
    )
    recipe.add_argument("--epochs", type=at_least_1, default=20, help="passes over the data")
    recipe.add_argument("--weight-decay", type=at_least_0, default=4e-5, help="of AdamW")
    recipe.add_argument("--seed", type=seed, default=42, help="of the order and the prompts")

    add_encoder_options(parser)

    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(
        machine,
        "auto: bfloat16 on GPUs and CPUs that multiply it, else float16 on CUDA, float32 elsewhere",
    )
    machine.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the decoder; auto: where the run is long enough to win the time back",
    )
    typed = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[typed.recipe])
    if typed.recipe == "default" and typed.model == "mini":
        parser.set_defaults(lr=MINI_LR)
    args = parser.parse_args_with_demo(
        argv,
        data=DEMO_DATA,
        output=Path("output/demo"),
        model="mini",
        epochs=8,
        batch_size=4,
        lr=1e-3,
        precision="float32",  # the same figures on every CPU
    )
    settle_encoder_options(parser, args)
    if args.lr == "auto" and distributed.world_size() > 1:
        raise UserError("--lr auto runs in one process; find the rate without torchrun first")
    args.cache = args.cache or args.output / "cache"
    return args


def next_command(args: Namespace) -> str:
    """Return the command that compares what this run has trained."""
    if args.demo:
        return "python compare_models.py --demo"
    command = f"python compare_models.py --finetuned {args.output / 'sam2_best.pt'}"
    return command + (f" --data {args.data}" if args.data != Path("data") else "")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    insists_on_mps = args.device == "mps"
    args.device = distributed.local_device(select_device(args.device))
    args.precision = select_precision(args.precision, args.device)
    torch.manual_seed(args.seed)
    with distributed.process_group(args.device), contextlib.ExitStack() as locks:
        if distributed.rank() == 0:
            fetch(args)
        distributed.wait_for_all()
        train_pairs = split_pairs(args.data, "train", args.limit)
        val_pairs = split_pairs(args.data, "val", args.limit)
        args.checkpoint = args.checkpoint or ensure_checkpoint(args.model)
        predictor, _ = load_predictor(args.model, args.checkpoint, args.device)
        args.device = trusted_device(predictor, args.device, insists_on_mps)
        if distributed.rank() == 0:
            for folder in [args.output] if args.no_cache else [args.output, args.cache]:
                locks.enter_context(only_run_in(folder))
        train(predictor, train_pairs, val_pairs, args)
        written = "sam2_best.pt, sam2_final.pt, train_log.csv, learning_curve.png"
        print(f"wrote {written} to {args.output}")
        if not args.no_cache:
            print(f"the features in {args.cache} may be deleted; another run would need them again")
        print(f"next: {next_command(args)}")


def fetch(args: Namespace) -> None:
    """Make the demo's data and download the checkpoint, where they are missing."""
    if args.demo and not is_filled(args.data):
        draw_demo(args.data)
    split_pairs(args.data, "train", args.limit)  # without data, no download is needed
    if args.checkpoint is None:
        ensure_checkpoint(args.model)


if __name__ == "__main__":
    run(main)
