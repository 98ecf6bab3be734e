"""Measure what the grid of the loss is worth for thin objects: drawn vessels.

    python benchmarks/thin_objects.py            # trains mini with --loss-grid 256 and auto
    python benchmarks/thin_objects.py --limits   # the best masks that each grid leads to
    python benchmarks/thin_objects.py --cost     # CPU seconds and peak memory of a step

Draws images of vessels into output/thin_objects/. Training prints the best val IoU and its Dice for
each seed, and the seconds of an epoch. --limits trains no model: it fits one mask to each drawing,
256x256 logits as a full-size model answers, and measures it at full resolution. Peak memory is the
process's resident memory.
"""

from __future__ import annotations

import csv
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import calculate_iou

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from benchmark_training import in_own_process, peak_gigabytes
from objects import train
from tqdm import tqdm

from finetuning.basics.command_line import ArgumentParser, number, run
from finetuning.basics.image_files import write_image
from finetuning.model.models import build_predictor
from finetuning.preparation.demo_images import smooth_noise, to_uint8
from finetuning.preparation.replacing import new_dataset
from finetuning.segmentation.predicting import Features, feature_shapes, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training.learner import make_learner, take_step
from finetuning.training.losses import actual_ious, batch_loss, mask_losses
from finetuning.training.recipe import DEFAULT, GUIDE
from finetuning.training_data.training_masks import IMAGE, LOSS_GRIDS, mask_on_grid

# Of the drawings: (H,W), and the smallest and largest width of a vessel in pixels
DRAWINGS = (((584, 565), (1, 6)), ((1024, 1024), (2, 4)), ((2048, 2048), (3, 6)))
IMAGES = {"train": 30, "val": 15}
FITTED, FIT_STEPS, FIT_RATE = 2, 100, 0.5  # drawings of each kind; Adam's steps and learning rate
TIMED = 3  # steps


def draw_vessels(
    rng: np.random.Generator, size: tuple[int, int], widths: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a tree of vessels, as in a picture of a retina; return the RGB image and the bool mask.

    size: (H,W). widths: the smallest and largest, in pixels; each branch is narrower than its stem.
    """
    mask, step = np.zeros(size, np.uint8), max(size) / 60
    root = rng.uniform(0.35, 0.65, 2) * size[::-1]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(4) * np.pi / 2 + rng.normal(0, 0.3, 4)
    growing = [(root, angle, float(widths[1])) for angle in angles]
    while growing:
        point, angle, width = growing.pop()
        for _ in range(int(rng.integers(12, 35))):
            angle += rng.normal(0, 0.2)
            following = point + step * np.array([np.cos(angle), np.sin(angle)])
            ends = (tuple(map(int, end)) for end in (point, following))
            cv2.line(mask, *ends, 1, max(widths[0], round(width)))
            point, width = following, width * 0.98
            if width - 1 >= widths[0] and rng.random() < 0.12:
                turned = angle + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
                growing.append((point, turned, width - 1))
    side = max(size)
    ground = np.array([0.75, 0.4, 0.25]) + 0.08 * smooth_noise(rng, side, 5)[..., None]
    ground = (ground + 0.05 * smooth_noise(rng, side, 40)[..., None])[: size[0], : size[1]]
    dark = cv2.GaussianBlur(mask.astype(np.float64), (0, 0), 0.7)[..., None]
    return to_uint8(rng, ground * (1 - 0.4 * dark), 0.04), mask == 1


def draw_dataset(data: Path, size: tuple[int, int], widths: tuple[int, int]) -> None:
    """Draw the images and masks of a data folder."""
    rng = np.random.default_rng(7)
    with new_dataset(data, {"source": "drawn vessels", "masks": "binary"}) as folder:
        for split, count in IMAGES.items():
            for index in tqdm(range(count), desc=f"Drawing {split}", unit="image"):
                image, mask = draw_vessels(rng, size, widths)
                write_image(folder / "images" / split / f"vessels_{index:03}.png", image)
                labels = mask * np.uint8(255)
                write_image(folder / "masks" / split / f"vessels_{index:03}.png", labels)


def fit_mask(mask: np.ndarray, grid: int | str, side: int) -> tuple[float, float]:
    """Fit side x side logits to an HxW bool mask with the default's mask loss on a grid.

    Returns the IoU of the mask that they are, at full resolution, and the IoU that the score of
    this mask would learn on the grid.
    """
    size = mask.shape if grid == IMAGE else (grid, grid)
    values = mask * np.uint8(255) if grid == IMAGE else mask_on_grid(mask, grid)
    covered = torch.from_numpy(values).float() / 255
    logits = torch.zeros(1, 1, side, side, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=FIT_RATE)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        mask_losses(_resize(logits, size)[0], covered, DEFAULT.dice_weight).sum().backward()
        optimizer.step()
    whole = (_resize(logits.detach(), mask.shape)[0, 0] > 0).numpy()
    is_fine = grid in LOSS_GRIDS[1:]
    target = actual_ious(_resize(logits.detach(), size)[0] > 0, covered[None], is_fine)
    return float(calculate_iou(whole, mask)), target.item()


def _resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def print_limits() -> None:
    """Print a row per kind of drawing and side of the logits."""
    grids = (*LOSS_GRIDS, IMAGE)
    print(f"\ndrawing | logits | {' | '.join(map(str, grids))} (what the score learns)\n---|---")
    for size, widths in DRAWINGS:
        rng = np.random.default_rng(1)
        masks = [draw_vessels(rng, size, widths)[1] for _ in range(FITTED)]
        # Of full-size models; of mini at 512 and 256
        for side in (256, 128, 64)[: 3 if size == DRAWINGS[0][0] else 1]:
            cells = []
            for grid in grids:
                fitted = np.mean([fit_mask(mask, grid, side) for mask in masks], axis=0)
                cells.append("{:.3f} ({:.3f})".format(*fitted))
            name = f"{size[1]}x{size[0]}, {widths[0]} to {widths[1]} px"
            print(f"{name} | {side} | {' | '.join(cells)}", flush=True)


def measure_step(
    model_name: str, grid: int | str, objects: int, size: tuple[int, int]
) -> tuple[float, float, float]:
    """Return the CPU seconds of a step, those of its loss, and the peak GB; one thread, float32.

    objects: computed together. size: (H,W) of the drawing, whose pixels are the grid of IMAGE.
    """
    torch.set_num_threads(1)
    predictor = build_predictor(model_name, torch.device("cpu"))
    recipe = GUIDE if grid == IMAGE else DEFAULT
    learner = make_learner(predictor, recipe, torch.float32)
    maps = [
        torch.randn(objects, *shape).permute(0, 3, 1, 2)
        for shape in feature_shapes(predictor.model)
    ]
    mask = draw_vessels(np.random.default_rng(0), size, DRAWINGS[0][1])[1]
    true = mask * np.uint8(255) if grid == IMAGE else mask_on_grid(mask, grid)
    true_masks = [torch.from_numpy(true)] * objects
    prompts = [make_prompt([(size[1] / 2, size[0] / 2)])] * objects
    seconds = []
    for _ in range(1 + TIMED):
        start = time.process_time()
        learner.optimizer.zero_grad()
        prediction = predict_masks(
            predictor, Features(maps[0], maps[1:]), prompts, [size] * objects, learner.decoder
        )
        decoded = time.process_time()
        leaves = prediction._replace(
            mask_logits=prediction.mask_logits.detach().requires_grad_(),
            iou_scores=prediction.iou_scores.detach().requires_grad_(),
            object_logits=prediction.object_logits.detach().requires_grad_(),
        )
        batch_loss(predictor, leaves, true_masks, recipe)[0].backward()
        lost = time.process_time()
        answers = [(one, leaf.grad) for one, leaf in zip(prediction, leaves, strict=True)]
        answers = [(one, gradient) for one, gradient in answers if gradient is not None]
        torch.autograd.backward(*zip(*answers, strict=True))
        take_step(learner, recipe.max_grad_norm)
        seconds.append((time.process_time() - start, lost - decoded))
    return *np.mean(seconds[1:], axis=0), peak_gigabytes(predictor.device)


def print_cost() -> None:
    """Print a row per model and grid."""
    print("\nmodel | objects together | grid | step s | loss s | peak GB\n---|---|---|---|---|---")
    for model_name, objects in (("mini", 1), ("mini", 4), ("mini", 16), ("small", 1)):
        for grid in LOSS_GRIDS:
            cost = in_own_process(measure_step, model_name, grid, objects, (1024, 1024))
            print(f"{model_name} | {objects} | {grid} | {' | '.join(f'{x:.3f}' for x in cost)}")
    for size in ((352, 352), (3000, 4000)):
        cost = in_own_process(measure_step, "mini", IMAGE, 1, size)
        cells = " | ".join(f"{x:.3f}" for x in cost)
        print(f"mini, guide's recipe | 1 | {size[1]}x{size[0]} | {cells}")


def train_on_vessels(args: Namespace) -> None:
    """Train mini with each grid and seed, each in its own process, and print the results."""
    data = args.output / "vessels"
    if not data.is_dir():
        draw_dataset(data, *DRAWINGS[args.drawing])
    rows = {}
    for grid in args.grids:
        for seed in range(args.seeds):
            options = {
                "--loss-grid": grid, "--epochs": args.epochs, "--seed": seed,
                "--image-size": args.image_size, "--cache": args.output / "cache",
            }  # fmt: skip
            output = args.output / f"grid_{grid}_{args.image_size}_{seed}"
            words = [str(word) for pair in options.items() for word in pair]
            row = in_own_process(train, data, output, words)
            with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
                best = max(csv.DictReader(file), key=lambda epoch: float(epoch["val_iou"]))
            rows[grid, seed] = {**row, "best Dice": float(best["val_dice"])}
    print(f"\nimage size {args.image_size}\ngrid & seed | {' | '.join(next(iter(rows.values())))}")
    for (grid, seed), row in rows.items():
        print(f"{grid}, {seed} | {' | '.join(f'{value:.4f}' for value in row.values())}")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--limits", action="store_true", help="the best masks of each grid")
    what.add_argument("--cost", action="store_true", help="time and memory of a step")
    parser.add_argument("--grids", nargs="+", default=["256", "auto"], help="compared values")
    parser.add_argument("--drawing", type=int, choices=range(3), default=0, help="of DRAWINGS")
    parser.add_argument("--image-size", type=at_least_1, default=512, help="of the model's input")
    parser.add_argument("--epochs", type=at_least_1, default=6, help="of each run")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="runs of each value")
    parser.add_argument("--output", type=Path, default=Path("output/thin_objects"), help="results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.limits:
        print_limits()
    elif args.cost:
        print_cost()
    else:
        train_on_vessels(args)


if __name__ == "__main__":
    run(main)
