"""Measure training on images with many objects: the cost and the gain of --objects-per-image.

    python benchmarks/objects.py                        # draws images, trains mini; some minutes
    python benchmarks/objects.py --per-image 1 4 16     # other values of --objects-per-image
    python benchmarks/objects.py --memory               # 50 images of 300 objects each, peak memory

Draws images with 5 to 60 touching and overlapping cells into output/objects/, as label maps, and
fine-tunes mini with one point per object, each value of --objects-per-image in its own process.
Prints the mean IoU over all validation objects, before training and at the best epoch, and the
seconds. Peak memory is the process's resident memory, as Linux counts it.
"""

from __future__ import annotations

import csv
import multiprocessing
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

import train_sam2_proper
from finetuning.basics.command_line import ArgumentParser, number, run, seed
from finetuning.basics.image_files import write_image
from finetuning.preparation.demo_images import coordinates, draw_blob, paint, smooth_noise, to_uint8
from finetuning.preparation.filling import write_objects
from finetuning.preparation.replacing import new_dataset


class Drawn(NamedTuple):
    """The settings of a drawn data set."""

    name: str
    images: dict[str, int]  # per split
    size: int  # side of an image in pixels, as drawn
    cells: tuple[int, int]  # smallest and largest number per image
    enlarged: int = 1  # factor by which the drawn image is enlarged


CELLS = Drawn("cells", {"train": 60, "val": 20}, 256, (5, 60))
MANY = Drawn("many", {"train": 40, "val": 10}, 250, (400, 400), enlarged=8)


def draw_cells(
    rng: np.random.Generator, size: int, count: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw cells of one kind that touch and overlap.

    Returns:
      image: SxSx3 uint8 RGB.
      masks: SxS bool, the visible part of each cell; almost hidden cells are left out.
    """
    canvas = rng.uniform(0.1, 0.3, 3) + 0.08 * smooth_noise(rng, size, 6)[..., None]
    color = rng.uniform(0.35, 0.8, 3)
    radius = min(0.13, 0.42 / np.sqrt(count))
    labels = np.zeros((size, size), np.uint16)
    center = rng.uniform(0.2, 0.8, 2)
    for label in range(1, count + 1):
        if rng.random() < 0.5:  # next to the previous cell, so that they touch
            angle = rng.uniform(0, 2 * np.pi)
            center = center + 1.6 * radius * np.array([np.cos(angle), np.sin(angle)])
        if rng.random() < 0.5 or not (center.min() > 0.05 and center.max() < 0.95):
            center = rng.uniform(0.05, 0.95, 2)
        elongation = rng.uniform(1, 1.6)
        cell = draw_blob(rng, size, center, radius * rng.uniform(0.7, 1.2), elongation, 0.2)
        dome = np.sqrt(np.clip(cell.height, 0, 1))[..., None]
        body = (color + rng.uniform(-0.06, 0.06, 3)) * (0.65 + 0.4 * dome)
        paint(canvas, body + 0.06 * smooth_noise(rng, size, 30)[..., None], cell.alpha(1.5))
        labels[cell.mask] = label
    x, y = coordinates(size)
    canvas *= 1 - 0.4 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)[..., None]
    masks = [labels == label for label in range(1, count + 1)]
    smallest = max(12, 0.2 * np.pi * (radius * size) ** 2)
    return to_uint8(rng, canvas, 0.03), [mask for mask in masks if mask.sum() > smallest]


def draw_dataset(data: Path, drawn: Drawn) -> None:
    """Draw the images and masks of a data folder."""
    rng, pixel = np.random.default_rng(7), np.ones((drawn.enlarged,) * 2, np.uint8)
    side = drawn.size * drawn.enlarged
    with new_dataset(data, {"source": drawn.name, "masks": "objects"}) as folder:
        for split, count in drawn.images.items():
            for index in tqdm(range(count), desc=f"Drawing {split}", unit="image"):
                cells = int(rng.integers(drawn.cells[0], drawn.cells[1] + 1))
                image, masks = draw_cells(rng, drawn.size, cells)
                name = f"cells_{index:03}"
                image = np.kron(image, pixel[..., None])
                write_image(folder / "images" / split / f"{name}.png", image)
                enlarged = (np.kron(mask, pixel).astype(bool) for mask in masks)
                write_objects(folder / "masks" / split / name, enlarged, (side, side))


def train(data: Path, output: Path, options: list[str]) -> dict[str, float]:
    """Train mini with train_sam2_proper.py; return figures from its log, and the peak memory."""
    start = time.perf_counter()
    train_sam2_proper.main(
        ["--data", str(data), "--model", "mini", "--output", str(output), *options]
    )
    with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        before, *epochs = list(csv.DictReader(file))
    return {
        "before": float(before["val_iou"]),
        "best": max(float(row["val_iou"]) for row in (before, *epochs)),
        "epoch s": sum(float(row["seconds"]) for row in epochs) / len(epochs),
        "all s": time.perf_counter() - start,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument(
        "--per-image", type=at_least_1, nargs="+", default=[1, 2, 4, 8, 16], help="compared values"
    )
    parser.add_argument("--epochs", type=at_least_1, default=10, help="of each run")
    parser.add_argument("--seed", type=seed, default=42, help="of each run")
    parser.add_argument("--memory", action="store_true", help="300 objects in each of 50 images")
    parser.add_argument("--output", type=Path, default=Path("output/objects"), help="results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    drawn, per_image, epochs = CELLS, args.per_image, args.epochs
    if args.memory:
        drawn, per_image, epochs = MANY, [4], 1
    data = args.output / drawn.name
    if not data.is_dir():
        draw_dataset(data, drawn)
    rows = {}
    for count in per_image:
        options = ["--objects-per-image", count, "--epochs", epochs, "--seed", args.seed]
        output = args.output / f"{drawn.name}_{count}"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[count] = pool.apply(train, (data, output, list(map(str, options))))
    print(f"\nobjects per image & epoch | {' | '.join(next(iter(rows.values())))}")
    for count, row in rows.items():
        print(f"{count:>25} | {' | '.join(f'{value:.4f}' for value in row.values())}")


if __name__ == "__main__":
    run(main)
