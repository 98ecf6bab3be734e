"""Pretrain the mini model from scratch on drawn images; writes checkpoints/sam2_mini.pt.

    python benchmarks/pretrain_mini.py
    python benchmarks/pretrain_mini.py --resume     # after an interruption
    python benchmarks/pretrain_mini.py --evaluate   # measure the weights on held-out images

The weights in checkpoints/ come from one run: 7 minutes on an NVIDIA H200 shared with three other
runs, PyTorch 2.11; a CPU takes hours.

The prompt encoder and mask decoder first learn alone, on tiny images: if the image encoder learned
from the start, its features would soon drown the prompt's position, and the model would ignore the
prompt for a long time. Then the whole model learns at 128 pixels, where an image costs a quarter,
first on easy images and then on harder ones, and finally at its own 256 pixels. The loss trains all
four masks, their scores, and whether there is an object.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import calculate_iou, select_device

from benchmarks.pretraining_images import Drawing, draw_pretraining_image
from finetuning.basics.command_line import ArgumentParser, add_device_option, number, run, seed
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.models import build_predictor, load_predictor, make_predictor
from finetuning.model.trainable_encoder import encode_with_gradients
from finetuning.segmentation.predicting import (
    Prediction,
    choose_masks,
    encode_images,
    predict_masks,
    upscale_masks,
)
from finetuning.segmentation.prompts import (
    Prompt,
    make_prompt,
    mask_box,
    prompt_from_mask,
    random_point,
)
from finetuning.training.losses import dice_loss


class Phase(NamedTuple):
    """A phase of the training, with its own pool of images."""

    image_size: int
    hardness: float
    pool: int
    steps: int
    batch_size: int


PHASES = (
    Phase(image_size=64, hardness=0.0, pool=3000, steps=600, batch_size=16),  # encoder frozen
    Phase(image_size=128, hardness=0.0, pool=6000, steps=2000, batch_size=32),
    Phase(image_size=128, hardness=0.5, pool=6000, steps=1800, batch_size=32),
    Phase(image_size=256, hardness=0.7, pool=3000, steps=1100, batch_size=16),
)
PEAK_LR = 1e-3
ENCODER_PEAK_LR = 5e-4
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
PROMPTS_PER_IMAGE = 6  # cheap: the encoder takes most of the time
BOX_SHARE = 0.35  # share of steps with a box
POINTS_IN_BOX = (0, 0, 0, 1)  # number of points in a step with a box, drawn from these
POINTS = (1, 1, 1, 1, 2, 3, 4)  # number of points in a step without a box, drawn from these
OUTSIDE_SHARE = 0.5  # share of steps with several points whose last point is negative, outside
NOTHING_SHARE = 0.25  # share of single points that are on no blob: one prompt in ten
HELD_OUT = 100


def draw(seed: int, index: int, image_size: int, hardness: float) -> Drawing:
    return draw_pretraining_image(np.random.default_rng([seed, index]), image_size, hardness)


def draw_pool(
    seed: int, count: int, image_size: int, hardness: float, workers: int | None
) -> list[Drawing]:
    jobs = [(seed, index, image_size, hardness) for index in range(count)]
    with multiprocessing.Pool(workers) as pool:
        return pool.starmap(draw, jobs, chunksize=50)


def augment(drawing: Drawing, rng: np.random.Generator) -> Drawing:
    """Flip, transpose and permute the color channels, each with probability 0.5."""
    image, masks, background = drawing
    if rng.random() < 0.5:
        image, masks, background = image[:, ::-1], masks[:, :, ::-1], background[:, ::-1]
    if rng.random() < 0.5:
        image, masks, background = image[::-1], masks[:, ::-1], background[::-1]
    if rng.random() < 0.5:
        image, masks, background = image.swapaxes(0, 1), masks.swapaxes(1, 2), background.T
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    return Drawing(image, masks, background)


def predictor_of_size(model: SAM2Base, image_size: int) -> SAM2ImagePredictor:
    """Set the size of the model's square inputs; the weights fit every size."""
    prompt_encoder = model.sam_prompt_encoder
    embedding_size = image_size // model.backbone_stride
    model.image_size = image_size
    model.sam_image_embedding_size = embedding_size
    prompt_encoder.input_image_size = (image_size, image_size)
    prompt_encoder.image_embedding_size = (embedding_size, embedding_size)
    prompt_encoder.mask_input_size = (4 * embedding_size, 4 * embedding_size)
    return make_predictor(model)


def draw_prompts(
    drawings: list[Drawing], rng: np.random.Generator
) -> tuple[list[Prompt], list[np.ndarray]]:
    """Draw PROMPTS_PER_IMAGE prompts per image, all of one kind; return them and their SxS masks.

    The mask of a point that is on no blob is empty.
    """
    has_box = rng.random() < BOX_SHARE
    count = int(rng.choice(POINTS_IN_BOX if has_box else POINTS))
    outside = int(count > 1 and rng.random() < OUTSIDE_SHARE)
    prompts, masks = [], []
    for drawing in (drawing for drawing in drawings for _ in range(PROMPTS_PER_IMAGE)):
        mask = drawing.masks[rng.integers(len(drawing.masks))]
        is_single = count == 1 and not has_box
        if is_single and drawing.background.any() and rng.random() < NOTHING_SHARE:
            prompts.append(make_prompt([random_point(drawing.background, rng)]))
            masks.append(np.zeros_like(mask))
            continue
        inside = [random_point(mask, rng) for _ in range(count - outside)]
        beside = [random_point(~mask, rng) for _ in range(outside)]
        prompts.append(make_prompt(inside, beside, mask_box(mask) if has_box else None))
        masks.append(mask)
    return prompts, masks


def calculate_loss(prediction: Prediction, true_masks: torch.Tensor) -> torch.Tensor:
    """Return the mean loss: BCE balanced between foreground and background, dice, and the scores.

    true_masks: Bx1xhxw float, 0 to 1. If one is empty, its target scores are 0 and its target is
    "no object"; its masks learn nothing. The single mask weighs as much as the three together.
    """
    mask_logits, iou_scores, object_logits = prediction
    exists = (true_masks.amax((1, 2, 3)) > 0).float()
    bce = F.binary_cross_entropy_with_logits(
        mask_logits, true_masks.expand_as(mask_logits), reduction="none"
    )
    foreground = (bce * true_masks).sum((2, 3)) / true_masks.sum((2, 3)).clamp(min=1)
    background = (bce * (1 - true_masks)).sum((2, 3)) / (1 - true_masks).sum((2, 3)).clamp(min=1)
    dice = dice_loss(mask_logits.sigmoid(), true_masks)
    losses = (foreground + background) / 2 + dice
    single, three = losses[:, 0], losses[:, 1:]
    mask_loss = 0.5 * single + 0.3 * three.mean(dim=1) + 0.2 * three.min(dim=1).values

    true_ious = calculate_iou(mask_logits > 0, true_masks > 0.5) * exists[:, None]
    score_loss = (iou_scores - true_ious).abs().mean(dim=1)
    object_loss = F.softplus((1 - 2 * exists) * object_logits[:, 0])
    return (exists * mask_loss + 0.2 * (score_loss + object_loss)).mean()


def training_step(
    predictor: SAM2ImagePredictor, drawings: list[Drawing], rng: np.random.Generator
) -> torch.Tensor:
    """Return the loss of one step, with PROMPTS_PER_IMAGE prompts per image."""
    drawings = [augment(drawing, rng) for drawing in drawings]
    prompts, masks = draw_prompts(drawings, rng)

    # Image encoder, prompt encoder, mask decoder
    features = encode_with_gradients(predictor, [drawing.image.copy() for drawing in drawings])
    repeated = features.of([i for i in range(len(drawings)) for _ in range(PROMPTS_PER_IMAGE)])
    prediction = predict_masks(predictor, repeated, prompts, [mask.shape for mask in masks])

    # The loss, at the resolution of the logits
    true_masks = torch.from_numpy(np.stack(masks)).to(predictor.device).float()[:, None]
    true_masks = F.adaptive_avg_pool2d(true_masks, prediction.mask_logits.shape[-2:])
    return calculate_loss(prediction, true_masks)


def learning_rate(step: int, steps: int, peak: float, first_step: int) -> float:
    """Warm up linearly from first_step, then decay along a cosine to a hundredth of the peak."""
    warmed_up = min(1, max(0, (step + 1 - first_step) / WARMUP_STEPS))
    return peak * warmed_up * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def draw_held_out(seed: int, image_size: int, workers: int | None) -> dict[str, list[Drawing]]:
    """Draw easy and hard images for evaluation only."""
    return {
        name: draw_pool(seed + 1000, HELD_OUT, image_size, hardness, workers)
        for name, hardness in (("easy", 0.0), ("hard", 1.0))
    }


@torch.no_grad()
def evaluate(predictor: SAM2ImagePredictor, held_out: dict[str, list[Drawing]]) -> dict[str, float]:
    """Measure, print and return the mean IoU over all blobs, with the center point and the box.

    best and single are choose_masks' kinds. nothing is measured with a point on no blob in each
    image: the share with a predicted score below 0.5, and the share answered "no object".
    """
    results = defaultdict(list)
    rng = np.random.default_rng(0)
    for name, drawings in held_out.items():
        for image, masks, background in drawings:
            size = background.shape
            features = encode_images(predictor, [image]).of([0] * len(masks))
            for kind in ("center", "box"):
                prompts = [prompt_from_mask(mask, kind) for mask in masks]
                prediction = predict_masks(predictor, features, prompts, [size] * len(masks))
                for choice in ("best", "single"):
                    mask_logits, _ = choose_masks(predictor, prediction, choice)
                    predicted = upscale_masks(predictor, mask_logits, size)[:, 0].cpu().numpy() > 0
                    results[f"{name} {kind} {choice}"].extend(calculate_iou(predicted, masks))
            if background.any():
                prompts = [make_prompt([random_point(background, rng)])]
                prediction = predict_masks(predictor, features.of([0]), prompts, [size])
                _, score = choose_masks(predictor, prediction)
                results[f"{name} nothing score"].append(score.item() < 0.5)
                results[f"{name} nothing object"].append(prediction.object_logits.item() < 0)
    means = {name: float(np.mean(values)) for name, values in results.items()}
    reached = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(f"held out: {reached}", flush=True)
    return means


def save(
    output: Path,
    state_file: Path,
    model: SAM2Base,
    optimizer: torch.optim.Optimizer,
    step: int,
    reached: dict[str, float],
) -> None:
    """Write the weights in half precision, as load_state_dict converts them back, and the state."""
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    save_checkpoint(output, weights, model_name="mini", step=step, iou=reached)
    save_checkpoint(state_file, model, optimizer=optimizer.state_dict(), step=step)


def train_phase(
    model: SAM2Base,
    optimizer: torch.optim.Optimizer,
    index: int,
    first_step: int,
    args: Namespace,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from `first_step` to the end of a phase; yield evaluations with their steps."""
    phase = PHASES[index]
    total_steps = sum(phase.steps for phase in PHASES)
    last_step = sum(phase.steps for phase in PHASES[: index + 1])
    predictor = predictor_of_size(model, phase.image_size)
    model.image_encoder.requires_grad_(index > 0)
    print(f"drawing for {phase}", flush=True)
    pool = draw_pool(args.seed + index, phase.pool, phase.image_size, phase.hardness, args.workers)
    held_out = draw_held_out(args.seed, phase.image_size, args.workers)

    start, losses = time.perf_counter(), []
    for step in range(first_step, last_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, group["peak"], group["first_step"])
        rng = np.random.default_rng([args.seed, step])  # so that a resumed run draws the same
        drawings = [pool[index] for index in rng.choice(phase.pool, phase.batch_size)]
        loss = training_step(predictor, drawings, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

        if (step + 1) % args.every == 0 or step + 1 == last_step:
            print(
                f"step {step + 1}/{total_steps}  {time.perf_counter() - start:.0f} s  "
                f"loss {torch.stack(losses[-args.every :]).mean():.4f}"
            )
            yield step + 1, evaluate(predictor, held_out)


def pretrain(args: Namespace, device: torch.device) -> None:
    """Run all phases, or the rest of an interrupted run; save after each evaluation."""
    torch.manual_seed(args.seed)
    model = build_predictor("mini", device).model
    model.requires_grad_(False)
    encoder = list(model.image_encoder.parameters())
    prompted = [*model.sam_prompt_encoder.parameters(), *model.sam_mask_decoder.parameters()]
    learned = [model.no_mem_embed, *prompted]
    for parameter in learned:
        parameter.requires_grad_(True)
    groups = [
        {"params": encoder, "peak": ENCODER_PEAK_LR, "first_step": PHASES[0].steps},
        {"params": learned, "peak": PEAK_LR, "first_step": 0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    done = 0
    if args.resume:
        state = torch.load(args.state, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"resuming after step {done}")
    for index in range(len(PHASES)):
        last_step = sum(phase.steps for phase in PHASES[: index + 1])
        if done < last_step:
            for step, reached in train_phase(model, optimizer, index, done, args):
                save(args.output, args.state, model, optimizer, step, reached)
            done = last_step


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("checkpoints/sam2_mini.pt"), help="the weights"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("output/pretrain_mini.pt"), help="for --resume"
    )
    parser.add_argument("--evaluate", action="store_true", help="only measure --output")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--every", type=at_least_1, default=500, help="steps between evaluations")
    parser.add_argument("--workers", type=at_least_1, help="drawing processes (default: cores)")
    parser.add_argument("--seed", type=seed, default=42, help="for weights, images and prompts")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device)
    if args.evaluate:
        predictor, _ = load_predictor("mini", args.output, device)
        evaluate(predictor, draw_held_out(args.seed, predictor.model.image_size, args.workers))
        return
    pretrain(args, device)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
