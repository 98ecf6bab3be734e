"""Pretrain the mini model from scratch, on drawn images only; writes checkpoints/sam2_mini.pt.

    python benchmarks/pretrain_mini.py
    python benchmarks/pretrain_mini.py --resume     # after an interruption
    python benchmarks/pretrain_mini.py --evaluate   # what the weights reach on held-out images

Took 80 minutes on 2 CPU cores that other work shared. First at 128 pixels, where an image costs a
quarter, on easy images; then on harder ones; at the end at the model's own 256 pixels.

The weights in checkpoints/ come from these phases, but not from one undisturbed run: it was
interrupted and resumed, and the number of steps, which the learning rate follows, was cut from
7,200 to 4,200 on the way. A run from scratch ends in weights that are alike, not equal.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import calculate_iou

from finetuning.command_line import ArgumentParser, number, run, seed
from finetuning.encoder_training import encode_with_gradients
from finetuning.files import atomic_write
from finetuning.models import build_predictor, load_predictor, make_predictor
from finetuning.prompts import make_prompt, mask_box, prompt_from_mask, random_point
from finetuning.segmentation import Features, encode_images, predict_masks, segment
from finetuning.synthetic_images import draw_pretraining_image


class Phase(NamedTuple):
    """A stretch of the training, on a pool of images of its own."""

    image_size: int
    hardness: float
    pool: int
    steps: int
    batch_size: int


PHASES = (
    Phase(image_size=128, hardness=0.0, pool=9000, steps=1500, batch_size=32),
    Phase(image_size=128, hardness=0.5, pool=9000, steps=1500, batch_size=32),
    Phase(image_size=256, hardness=0.7, pool=4000, steps=1200, batch_size=16),
)
WARMUP_STEPS = 200
BOX_SHARE = 0.4  # of the steps; the others have one point
PROMPTS_PER_IMAGE = 3
HELD_OUT = 100
TRAINED = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")


class Drawing(NamedTuple):
    """image: SxSx3 uint8 RGB; masks: NxSxS bool."""

    image: np.ndarray
    masks: np.ndarray


def draw(job: tuple[int, int, int, float]) -> Drawing:
    seed, index, image_size, hardness = job
    rng = np.random.default_rng([seed, index])
    return Drawing(*draw_pretraining_image(rng, image_size, hardness))


def draw_pool(seed: int, count: int, image_size: int, hardness: float) -> list[Drawing]:
    jobs = [(seed, index, image_size, hardness) for index in range(count)]
    with multiprocessing.Pool() as workers:
        return workers.map(draw, jobs, chunksize=50)


def augment(drawing: Drawing, rng: np.random.Generator) -> Drawing:
    """Flip and transpose at random, and in half of the cases swap the colour channels."""
    image, masks = drawing
    if rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    if rng.random() < 0.5:
        image, masks = image[::-1], masks[:, ::-1]
    if rng.random() < 0.5:
        image, masks = image.swapaxes(0, 1), masks.swapaxes(1, 2)
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    return Drawing(image, masks)


def predictor_of_size(model: SAM2Base, image_size: int) -> SAM2ImagePredictor:
    """Let the model take square inputs of another size; its weights fit every size."""
    prompt_encoder = model.sam_prompt_encoder
    embedding_size = image_size // model.backbone_stride
    model.image_size = image_size
    model.sam_image_embedding_size = embedding_size
    prompt_encoder.input_image_size = (image_size, image_size)
    prompt_encoder.image_embedding_size = (embedding_size, embedding_size)
    prompt_encoder.mask_input_size = (4 * embedding_size, 4 * embedding_size)
    return make_predictor(model)


def calculate_loss(
    mask_logits: torch.Tensor, iou_scores: torch.Tensor, true_masks: torch.Tensor
) -> torch.Tensor:
    """Mix BCE, balanced between foreground and background, with dice and the score's error.

    Arguments:
      mask_logits: Bx3xhxw.
      iou_scores: Bx3.
      true_masks: Bx1xhxw, from 0 to 1.
    """
    bce = F.binary_cross_entropy_with_logits(
        mask_logits, true_masks.expand_as(mask_logits), reduction="none"
    )
    foreground = (bce * true_masks).sum((2, 3)) / true_masks.sum((2, 3)).clamp(min=1)
    background = (bce * (1 - true_masks)).sum((2, 3)) / (1 - true_masks).sum((2, 3)).clamp(min=1)
    probabilities = mask_logits.sigmoid()
    total = probabilities.sum((2, 3)) + true_masks.sum((2, 3))
    dice = 1 - (2 * (probabilities * true_masks).sum((2, 3)) + 1) / (total + 1)
    mask_loss = (foreground + background) / 2 + dice
    true_ious = calculate_iou(mask_logits > 0, true_masks > 0.5)
    score_loss = (iou_scores - true_ious).abs().mean()
    return 0.3 * mask_loss.mean() + 0.2 * mask_loss.min(dim=1).values.mean() + 0.1 * score_loss


def training_step(
    predictor: SAM2ImagePredictor, drawings: list[Drawing], rng: np.random.Generator
) -> torch.Tensor:
    """Return the loss of one step, with PROMPTS_PER_IMAGE prompts for each image."""
    # One blob and one prompt each
    drawings = [augment(drawing, rng) for drawing in drawings]
    masks = [
        drawing.masks[rng.integers(len(drawing.masks))]
        for drawing in drawings
        for _ in range(PROMPTS_PER_IMAGE)
    ]
    if rng.random() < BOX_SHARE:
        prompts = [make_prompt(box=mask_box(mask)) for mask in masks]
    else:
        prompts = [make_prompt([random_point(mask, rng)]) for mask in masks]

    # Image encoder, prompt encoder, mask decoder
    features = encode_with_gradients(predictor, [drawing.image.copy() for drawing in drawings])
    repeated = Features(
        features.image_embed.repeat_interleave(PROMPTS_PER_IMAGE, dim=0),
        [feat.repeat_interleave(PROMPTS_PER_IMAGE, dim=0) for feat in features.high_res_feats],
    )
    sizes = [mask.shape for mask in masks]
    prediction = predict_masks(predictor, repeated, prompts, sizes)
    mask_logits, iou_scores = prediction.mask_logits[:, 1:], prediction.iou_scores[:, 1:]

    # Loss of the three masks, at the resolution of the logits
    true_masks = torch.from_numpy(np.stack(masks)).float()[:, None]
    true_masks = F.adaptive_avg_pool2d(true_masks, mask_logits.shape[-2:])
    return calculate_loss(mask_logits, iou_scores, true_masks)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up, then fall along a cosine to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def draw_held_out(seed: int, image_size: int) -> dict[str, list[Drawing]]:
    """Draw the images, easy ones and hard ones, that no training sees."""
    return {
        name: draw_pool(seed + 1000, HELD_OUT, image_size, hardness)
        for name, hardness in (("easy", 0.0), ("hard", 1.0))
    }


@torch.no_grad()
def evaluate(predictor: SAM2ImagePredictor, held_out: dict[str, list[Drawing]]) -> dict[str, float]:
    """Return and print the mean IoU over all blobs, with one point (the center) and the box."""
    ious: dict[str, list[float]] = {}
    for name, drawings in held_out.items():
        for image, masks in drawings:
            features = encode_images(predictor, [image])
            for mask, kind in itertools.product(masks, ("center", "box")):
                prompt = prompt_from_mask(mask, kind)
                predicted, _ = segment(predictor, features, prompt, mask.shape)
                ious.setdefault(f"{name} {kind}", []).append(calculate_iou(predicted, mask))
    means = {name: float(np.mean(values)) for name, values in ious.items()}
    reached = "  ".join(f"{name} {iou:.3f}" for name, iou in means.items())
    print(f"held-out IoU: {reached}", flush=True)
    return means


def save(
    output: Path,
    state_file: Path,
    model: SAM2Base,
    optimizer: torch.optim.Optimizer,
    step: int,
    ious: dict[str, float],
) -> None:
    """Write the weights, in half precision (which load_state_dict undoes), and the state."""
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    with atomic_write(output) as temporary:
        torch.save({"model": weights, "model_name": "mini", "step": step, "iou": ious}, temporary)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with atomic_write(state_file) as temporary:
        torch.save(state, temporary)


def train_phase(
    model: SAM2Base,
    optimizer: torch.optim.Optimizer,
    index: int,
    first_step: int,
    lr: float,
    seed: int,
    every: int,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from `first_step` to the end of a phase; yield what is reached every so many steps."""
    phase = PHASES[index]
    total_steps = sum(phase.steps for phase in PHASES)
    last_step = sum(phase.steps for phase in PHASES[: index + 1])
    predictor = predictor_of_size(model, phase.image_size)
    print(f"drawing for {phase}", flush=True)
    pool = draw_pool(seed + index, phase.pool, phase.image_size, phase.hardness)
    held_out = draw_held_out(seed, phase.image_size)

    start, losses = time.perf_counter(), []
    for step in range(first_step, last_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, lr)
        rng = np.random.default_rng([seed, step])  # a resumed run draws the same
        drawings = [pool[index] for index in rng.choice(phase.pool, phase.batch_size)]
        loss = training_step(predictor, drawings, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

        if (step + 1) % every == 0 or step + 1 == last_step:
            print(
                f"step {step + 1}/{total_steps}  {time.perf_counter() - start:.0f} s  "
                f"loss {np.mean(losses[-every:]):.4f}"
            )
            yield step + 1, evaluate(predictor, held_out)


def pretrain(
    output: Path,
    state_file: Path,
    resume: bool,
    lr: float,
    weight_decay: float,
    seed: int,
    every: int,
) -> None:
    """Run all phases, or what is left of them; evaluate and save every so many steps."""
    torch.manual_seed(seed)
    model = build_predictor("mini", torch.device("cpu")).model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.98), weight_decay=weight_decay)
    done = 0
    if resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"going on after step {done}")
    for index in range(len(PHASES)):
        last_step = sum(phase.steps for phase in PHASES[: index + 1])
        if done < last_step:
            for step, ious in train_phase(model, optimizer, index, done, lr, seed, every):
                save(output, state_file, model, optimizer, step, ious)
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
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--every", type=at_least_1, default=500, help="steps between evaluations")
    parser.add_argument("--lr", type=number(float, above=0), default=1e-3, help="its peak")
    parser.add_argument(
        "--weight-decay", type=number(float, at_least=0), default=0.05, help="of AdamW"
    )
    parser.add_argument("--seed", type=seed, default=42, help="of weights, images and prompts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.evaluate:
        predictor, _ = load_predictor("mini", args.output, torch.device("cpu"))
        evaluate(predictor, draw_held_out(args.seed, predictor.model.image_size))
        return
    pretrain(
        args.output, args.state, args.resume, args.lr, args.weight_decay, args.seed, args.every
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
