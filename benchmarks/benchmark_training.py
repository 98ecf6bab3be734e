"""Measure the cost of fine-tuning: this project against other loops, on the same images.

    python benchmarks/benchmark_training.py --random-weights --limit 24     # small, on data/
    python benchmarks/benchmark_training.py --random-weights --limit 24 --image-sizes 1024 512
    python benchmarks/benchmark_training.py --model mini --image-sizes 256 128

The variants run one after the other, each in its own process:
  - the guide's loop (float32, batch size 1, the encoder runs in every step)
  - Hugging Face's loop, if transformers is installed
  - train_sam2_proper.py from its command line, with timed parts: at each image size, with the
    guide's recipe and the default one, compiled and not
  - the machine's limit: the model's operations, at the rate of multiplying large matrices

A total is images x encode + compile + 20 epochs x images x step, from the measured seconds.
Validation and saving have their own columns, as the other loops do neither. --all-epochs S adds a
complete run of 20 epochs at one size, in wall-clock time.
Prints a table and writes it to output/benchmark/ as benchmark.csv and benchmark.png.
--random-weights gives the same time and memory as the real weights, but no useful model.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import UserError, select_device, select_precision

import numpy as np
import torch
from guides_loop import clock, train_guide
from matplotlib.figure import Figure
from peer_transformers import BACKBONES, train_transformers
from torch.utils.flop_counter import FlopCounterMode

import train_sam2_proper
from finetuning.basics.command_line import ArgumentParser, add_device_option, number, run, seed
from finetuning.basics.files import write_csv
from finetuning.basics.pictures import save_figure
from finetuning.dataset.objects import count_objects, read_objects
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation.measuring import Validation
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.models import (
    MODELS,
    build_predictor,
    ensure_checkpoint,
    load_predictor,
    own_image_size,
    parse_image_size,
)
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training import run_files
from finetuning.training.learner import make_learner
from finetuning.training.recipe import GUIDE

GUIDES_LOOP, PEER = "the guide's loop", "transformers' loop"
EPOCHS = 20  # in the totals
TOTAL = f"{EPOCHS} epochs s"
# The timed parts of train_sam2_proper.py: the owner and name of the function that does each
PARTS = {
    "encode": (FeatureCache, "fill"),
    "compile": (train_sam2_proper, "speed_up"),
    "steps": (train_sam2_proper, "train_one_epoch"),
    "validation": (Validation, "measure"),
    "saving": (run_files, "save_epoch"),
}
COLUMNS = (
    "variant", "size", "encode s/image", "step s/image", "compile s", TOTAL, "ratio",
    "validation s/image", "saving s/epoch", "peak GB",
)  # fmt: skip


class Bench(NamedTuple):
    """The settings that all variants share."""

    model: str
    checkpoint: Path
    device: str
    threads: int | None
    data: Path
    limit: int | None
    images: int  # training images with an object
    val_images: int
    epochs: int
    seed: int
    output: Path

    def torch_device(self) -> torch.device:
        """Return the device, and set the number of torch's threads."""
        return select_device(self.device, self.threads)

    def pairs(self, count: int | None = None) -> list[Pair]:
        """Return the first `count` training pairs that have an object; by default, all."""
        pairs = split_pairs(self.data, "train", self.limit)
        return [pairs[index] for index in count_objects(pairs)][:count]


def measure_guide(bench: Bench, size: int, image_count: int) -> dict[str, Any]:
    """Time the guide's loop on the first images."""
    torch.manual_seed(bench.seed)
    predictor, _ = load_predictor(bench.model, bench.checkpoint, bench.torch_device(), size)
    pairs = bench.pairs(image_count)
    train_guide(predictor, pairs[:1], replace(GUIDE, epochs=1))  # warm up
    seconds = train_guide(predictor, pairs, replace(GUIDE, epochs=1, seed=bench.seed))
    of_image = {part: of_all / len(pairs) for part, of_all in seconds.items()}
    return row_of(GUIDES_LOOP, size, sum(of_image.values()), predictor.device)


def measure_peer(bench: Bench, image_count: int) -> dict[str, Any] | None:
    """Time Hugging Face's loop on the first images; return None if transformers is missing."""
    device, pairs = bench.torch_device(), bench.pairs(image_count)
    masks = [read_objects(pair)[0] for pair in pairs]
    try:
        seconds = train_transformers(bench.model, pairs, masks, device)
    except ImportError:
        return None
    return row_of(PEER, 1024, seconds / len(pairs), device)


def row_of(variant: str, size: int, step: float, device: torch.device) -> dict[str, Any]:
    """Return a row of the table; step: seconds per image and epoch."""
    known = {"variant": variant, "size": size, "step s/image": step, "compile s": 0.0}
    return {**dict.fromkeys(COLUMNS), **known, "peak GB": peak_gigabytes(device)}


def measure_project(
    bench: Bench, variant: str, recipe: str, size: int, compiling: str, epochs: int
) -> dict[str, Any]:
    """Run train_sam2_proper.py and time its PARTS."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(getattr(owner, name), part, seconds))
    output = bench.output / "run"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "--model": bench.model, "--checkpoint": bench.checkpoint, "--data": bench.data,
        "--device": bench.device, "--limit": bench.limit, "--threads": bench.threads,
        "--seed": bench.seed, "--recipe": recipe, "--image-size": size, "--compile": compiling,
        "--epochs": epochs, "--augment": "off", "--cache": bench.output / "cache",
        "--output": output,
    }  # fmt: skip
    start = time.perf_counter()
    train_sam2_proper.main([str(word) for each in options.items() if each[1] for word in each])
    wall = time.perf_counter() - start
    images, val_images = bench.images, bench.val_images
    step = seconds["steps"] / (epochs * images)
    return {
        **row_of(variant, size, step, bench.torch_device()),
        "encode s/image": seconds["encode"] / (images + val_images),
        "compile s": seconds["compile"],
        "validation s/image": seconds["validation"] / ((epochs + 1) * val_images),
        "saving s/epoch": seconds["saving"] / epochs,
        "seconds": {**seconds, "all": wall},
    }


def timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function so that each call adds its seconds to seconds[part]."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start

    return call


def measure_roofline(bench: Bench, size: int) -> dict[str, Any]:
    """Return the seconds of encoding and a step at the rate of multiplying large matrices."""
    device = bench.torch_device()
    predictor, _ = load_predictor(bench.model, bench.checkpoint, device, size)
    precision = select_precision("auto", device)
    learner = make_learner(predictor, GUIDE, precision)
    operations = {}
    with FlopCounterMode(display=False) as counter:
        features = encode_images(predictor, [np.zeros((size, size, 3), np.uint8)])
    operations["encode"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        prompt = make_prompt([(size / 2, size / 2)])
        answers = predict_masks(predictor, features, [prompt], [(size, size)], learner.decoder)
        sum(answer.mean() for answer in answers).backward()
    operations["step"] = counter.get_total_flops()
    rate = multiplication_rate(device, precision)
    return {
        **row_of(f"the limit, {rate / 1e9:.0f} GFLOPS", size, operations["step"] / rate, device),
        "encode s/image": operations["encode"] / rate,
        "peak GB": None,
    }


def multiplication_rate(device: torch.device, precision: torch.dtype, side: int = 4096) -> float:
    """Return the floating-point operations per second in multiplying two large matrices."""
    matrix = torch.randn(side, side, device=device, dtype=precision)
    matrix @ matrix
    start = clock(device)
    for _ in range(3):
        matrix @ matrix
    return 3 * 2 * side**3 / (clock(device) - start)


def peak_gigabytes(device: torch.device) -> float | None:
    """Return this process's peak memory: on the GPU, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that memory and caches start empty."""
    # Unlike a Pool's processes, this one may start others, which load the batches
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(bench: Bench, sizes: list[int], guide_images: int) -> list[dict[str, Any]]:
    """Measure the variants one after the other; return a row for each, the limits last."""
    rows = [in_own_process(measure_guide, bench, sizes[0], guide_images)]
    if bench.model in BACKBONES and sizes[0] == 1024:
        peer = in_own_process(measure_peer, bench, guide_images)
        rows += [peer] if peer else []
    for size in sizes:
        modes = ("off", "on") if size == sizes[0] and size >= 512 else ("off",)
        encoding = None
        for compiling, recipe in itertools.product(modes, ("guide", "default")):
            name = {"guide": "this project, guide's recipe", "default": "this project"}[recipe]
            name += ", compiled" * (compiling == "on")
            options = (name, recipe, size, compiling, bench.epochs)
            row = in_own_process(measure_project, bench, *options)
            encoding = encoding or row["encode s/image"]  # later runs find the first one's cache
            rows.append({**row, "encode s/image": encoding})
    return rows + [in_own_process(measure_roofline, bench, size) for size in sizes]


def add_totals(rows: list[dict[str, Any]], image_count: int) -> None:
    """Add each row's seconds for EPOCHS epochs of image_count images, and the speedup."""
    for row in rows:
        once, step = row["encode s/image"] or 0.0, row["step s/image"]
        row[TOTAL] = row["compile s"] + image_count * (once + EPOCHS * step)
        row["ratio"] = rows[0][TOTAL] / row[TOTAL]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [[_format(row[column]) for column in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw_totals(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw each variant's minutes of EPOCHS epochs."""
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['variant']}, {row['size']}" for row in rows]
    minutes = [row[TOTAL] / 60 for row in rows]
    axes.barh(names, minutes)
    for place, (row, of_row) in enumerate(zip(rows, minutes, strict=True)):
        axes.text(of_row, place, f" {of_row:.0f} min, {row['ratio']:.1f}x", va="center")
    axes.set(xlabel=f"minutes of {EPOCHS} epochs", title=title, xscale="log")
    axes.set_xlim(right=5 * max(minutes))  # leave room for the texts
    axes.invert_yaxis()
    save_figure(path, figure)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument(
        "--image-sizes",
        type=parse_image_size,
        nargs="+",
        metavar="S",
        help="the first for all variants, the others for this project only (default: the model's)",
    )
    parser.add_argument(
        "--all-epochs", type=parse_image_size, metavar="S", help="also run all epochs at this size"
    )
    parser.add_argument("--random-weights", action="store_true", help="for time and memory only")
    parser.add_argument("--limit", type=at_least_1, help="use only the first N images of a split")
    parser.add_argument(
        "--guide-images", type=at_least_1, default=10, help="N of them for the other loops"
    )
    parser.add_argument(
        "--totals-for", type=at_least_1, help="images in the totals (default: as measured)"
    )
    parser.add_argument("--epochs", type=at_least_1, default=2, help="how many to measure")
    parser.add_argument("--seed", type=seed, default=42, help="for weights, order and prompts")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), help="results")
    add_device_option(parser)
    return parser.parse_args(argv)


def prepare(args: Namespace) -> Bench:
    """Return the settings of the options; write random weights if asked for."""
    checkpoint = args.checkpoint
    if args.random_weights:
        checkpoint = args.output / f"random_{args.model}.pt"
        torch.manual_seed(args.seed)
        save_checkpoint(checkpoint, build_predictor(args.model, torch.device("cpu")).model)
    images, val_images = (
        len(count_objects(split_pairs(args.data, split, args.limit))) for split in ("train", "val")
    )
    if images < 5:
        raise UserError("a benchmark needs at least 5 training images; raise --limit")
    return Bench(
        *(args.model, checkpoint or ensure_checkpoint(args.model), args.device, args.threads),
        *(args.data, args.limit, images, val_images, args.epochs, args.seed, args.output),
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    bench, sizes = prepare(args), args.image_sizes or [own_image_size(args.model)]
    shutil.rmtree(args.output / "cache", ignore_errors=True)
    rows = measure_all(bench, sizes, args.guide_images)
    shutil.rmtree(args.output / "cache")

    image_count, device = args.totals_for or bench.images, bench.torch_device()
    add_totals(rows, image_count)
    precision = str(select_precision("auto", device)).removeprefix("torch.")
    title = f"SAM 2.1 {args.model}, {image_count} images, {device}, {precision}"
    cores = f"{torch.get_num_threads()} threads, {platform.system()}, PyTorch {torch.__version__}"
    print(f"{title}; the other loops in float32; {cores}\n")
    print(format_table(rows))
    if args.all_epochs:
        options = ("a whole run", "default", args.all_epochs, "auto", EPOCHS)
        seconds = in_own_process(measure_project, bench, *options)["seconds"]
        parts = ", ".join(f"{part} {of_part:.0f}" for part, of_part in seconds.items())
        print(f"{EPOCHS} epochs of {bench.images} images at {args.all_epochs}, seconds: {parts}")
        shutil.rmtree(args.output / "cache")
    table = [[row[column] for column in COLUMNS] for row in rows]
    write_csv(args.output / "benchmark.csv", COLUMNS, table)
    draw_totals(args.output / "benchmark.png", rows, title)
    print(f"wrote benchmark.csv and benchmark.png to {args.output}")


if __name__ == "__main__":
    run(main)
