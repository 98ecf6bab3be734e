"""Measure what fine-tuning costs: the guide's loop against this project's, on the same images.

    python benchmarks/benchmark_training.py --limit 50                      # small, on data/
    python benchmarks/benchmark_training.py --model mini --epochs 4 --val-limit 100
    python benchmarks/benchmark_training.py --random-weights --limit 50 --totals-for 400

Every variant runs in a process of its own, one after the other: the guide's loop, written out
plainly (float32, batch 1, the encoder in every step); this project's with the guide's recipe, with
the compiled decoder and without; with its own recipe, whose corrective clicks cost something; and,
as the floor, the bare decoder, forward and backward on tensors in memory.
Prints a table and writes it to output/benchmark/ as benchmark.csv and benchmark.png. A total is
encode + epochs x epoch (+ compiling), from what was measured; validation is in none of them.
With --random-weights, time and memory are those of the real weights; the IoU means nothing.
"""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import UserError, autocast, select_device, select_precision

import numpy as np
import torch
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.batches import EpochSampler, TrainingSet, make_loader
from finetuning.checkpoints import save_checkpoint
from finetuning.command_line import ArgumentParser, add_device_option, number, run, seed
from finetuning.evaluation import Model, measure
from finetuning.feature_cache import FeatureCache, FeatureSource
from finetuning.files import atomic_write, write_csv
from finetuning.learner import make_learner, speed_up
from finetuning.models import (
    MODELS,
    build_predictor,
    ensure_checkpoint,
    load_predictor,
    parse_image_size,
)
from finetuning.objects import count_objects, read_pair
from finetuning.pairs import Pair, split_pairs
from finetuning.prompts import prompt_from_mask, random_point
from finetuning.recipe import DEFAULT, GUIDE, Recipe
from finetuning.segmentation import encode_images, predict_masks
from train_sam2_proper import evaluate, train_one_epoch

GUIDES_LOOP, OURS = "the guide's loop", "this project, default recipe"
COMPILED, PLAIN = "this project, guide's recipe", "this project, guide's recipe, not compiled"
TOTALS = {1: "1 epoch s", 5: "5 epochs s", 20: "20 epochs s"}
RATIO = "20 epochs, ratio"
COLUMNS = (
    "variant", "encode s/image", "step s/image", "epoch s", "compile s", *TOTALS.values(), RATIO,
    "peak GB", "val IoU", "images shown",
)  # fmt: skip


class Bench(NamedTuple):
    """What all variants have in common."""

    model: str
    checkpoint: Path
    device: torch.device
    pairs: list[Pair]  # to train on, all with an object
    val_pairs: list[Pair]
    cache: Path
    image_size: int | None  # that the models resize images to; None: their own

    def load(self, seed: int = 0) -> SAM2ImagePredictor:
        """Return the model as it is before training."""
        torch.manual_seed(seed)
        return load_predictor(self.model, self.checkpoint, self.device, self.image_size)[0]

    def val_iou(self, predictor: SAM2ImagePredictor, precision: torch.dtype) -> float:
        """Return the mean val IoU, in the precision of the variant and without a cache."""
        model = Model(predictor, FeatureSource(predictor, precision))
        return evaluate(model, self.val_pairs)["val_iou"]


def measure_guide(bench: Bench, recipe: Recipe, image_count: int | None) -> dict[str, Any]:
    """Run the guide's loop on so many of the images, and time its two parts."""
    predictor, pairs = bench.load(recipe.seed), bench.pairs[:image_count]
    model = predictor.model
    model.sam_mask_decoder.train(True)
    model.sam_prompt_encoder.train(True)
    learned = [*model.sam_mask_decoder.parameters(), *model.sam_prompt_encoder.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=recipe.weight_decay)
    rng = np.random.default_rng(recipe.seed)
    encode_seconds = step_seconds = 0.0
    for _ in range(recipe.epochs):
        for index in tqdm(rng.permutation(len(pairs)), desc=GUIDES_LOOP, unit="image"):
            start = clock(bench.device)
            image, objects = read_pair(pairs[index])
            mask = objects[0]
            predictor.set_image(image)
            encoded = clock(bench.device)

            loss = guide_loss(predictor, mask, random_point(mask, rng), recipe.score_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            encode_seconds += encoded - start
            step_seconds += clock(bench.device) - encoded
    shown = recipe.epochs * len(pairs)
    model.eval()
    return {
        "variant": GUIDES_LOOP,
        "encode s/image": encode_seconds / shown,
        "step s/image": step_seconds / shown,
        "compile s": 0.0,
        "peak GB": peak_gigabytes(bench.device),
        "val IoU": bench.val_iou(predictor, torch.float32),
        "images shown": shown,
    }


def guide_loss(
    predictor: SAM2ImagePredictor, mask: np.ndarray, point: tuple[int, int], score_weight: float
) -> torch.Tensor:
    """Return the loss of the guide's step after set_image, word for word."""
    model = predictor.model
    points, label = np.array([[point]]), np.ones((1, 1), np.int32)
    _, coords, labels, _ = predictor._prep_prompts(
        points, label, box=None, mask_logits=None, normalize_coords=True
    )
    sparse_embeddings, dense_embeddings = model.sam_prompt_encoder(
        points=(coords, labels), boxes=None, masks=None
    )
    features = predictor._features["high_res_feats"]
    low_res_masks, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=predictor._features["image_embed"],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse_embeddings,
        dense_prompt_embeddings=dense_embeddings,
        multimask_output=True,
        repeat_image=False,
        high_res_features=[level[-1].unsqueeze(0) for level in features],
    )
    masks = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])
    truth = torch.from_numpy(mask.astype(np.float32)).to(predictor.device)
    probability = torch.sigmoid(masks[0, 0])
    seg_loss = -(
        truth * torch.log(probability + 1e-5) + (1 - truth) * torch.log(1 - probability + 1e-5)
    ).mean()
    predicted = (masks[0] > 0).float()
    intersection = (predicted * truth).sum((1, 2))
    union = predicted.sum((1, 2)) + truth.sum() - intersection
    score_loss = (scores[0] - intersection / (union + 1e-6)).abs().mean()
    return seg_loss + score_weight * score_loss


def measure_project(
    bench: Bench, variant: str, recipe: Recipe, compiling: str, fill: bool = False
) -> dict[str, Any]:
    """Run this project's loop over the feature cache, which is filled first or is there already."""
    predictor, precision = bench.load(recipe.seed), select_precision("auto", bench.device)
    if fill:
        shutil.rmtree(bench.cache, ignore_errors=True)
    start = clock(bench.device)
    cache = FeatureCache(bench.cache, predictor, precision)
    cache.fill([pair.image for pair in bench.pairs], predictor, "train")
    encode_seconds = clock(bench.device) - start

    count = len(bench.pairs)
    training_set = TrainingSet(
        bench.pairs, cache, predictor.model.image_size, recipe.seed, recipe.prompt_mix
    )
    objects = count_objects(bench.pairs)
    sampler = EpochSampler(objects, recipe.batch_size, recipe.seed, recipe.objects_per_image)
    loader = make_loader(training_set, sampler, bench.device)
    start = clock(bench.device)
    learner = make_learner(predictor, recipe, precision)
    learner = speed_up(learner, predictor, recipe, objects, compiling)
    compiled = clock(bench.device)
    for epoch in range(1, recipe.epochs + 1):
        train_one_epoch(predictor, loader, learner, recipe, epoch)
    seconds = clock(bench.device) - compiled
    return {
        "variant": variant,
        "encode s/image": encode_seconds / count if fill else None,
        "step s/image": seconds / (recipe.epochs * count),
        "compile s": compiled - start,
        "peak GB": peak_gigabytes(bench.device),
        "val IoU": bench.val_iou(predictor, precision),
        "images shown": recipe.epochs * count,
    }


def measure_floor(bench: Bench, recipe: Recipe, compiling: str) -> float:
    """Return the bare decoder's seconds an image: forward and backward, on tensors in memory."""
    predictor, precision = bench.load(recipe.seed), select_precision("auto", bench.device)
    learner = make_learner(predictor, recipe, precision)
    learner = speed_up(learner, predictor, recipe, {0: 1}, compiling)
    batch = bench.pairs[: recipe.batch_size]
    images, objects = zip(*map(read_pair, batch), strict=True)
    with autocast(bench.device, precision):
        features = encode_images(predictor, list(images)).to(bench.device, torch.float32)
    prompts = [prompt_from_mask(of_image[0], "center") for of_image in objects]
    sizes = [of_image.size for of_image in objects]

    def step() -> None:
        learner.weights.zero_grad()
        with autocast(bench.device, precision):
            prediction = predict_masks(predictor, features, prompts, sizes, learner.decoder)
        sum(answer.mean() for answer in prediction).backward()

    return time_repeated(step, bench.device, times=40) / len(batch)


def measure_comparison(bench: Bench) -> dict[str, float]:
    """Return seconds an image of evaluating one model, and of comparing two, without a cache."""
    original, finetuned = bench.load(), bench.load()
    source = FeatureSource(original, select_precision("auto", bench.device))
    models, pairs = [Model(original, source), Model(finetuned, source)], bench.pairs[:5]
    return {
        "one": time_repeated(lambda: measure(models[:1], pairs), bench.device, times=2) / 5,
        "two": time_repeated(lambda: measure(models, pairs), bench.device, times=2) / 5,
    }


def clock(device: torch.device) -> float:
    """Return seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_repeated(step: Callable[[], None], device: torch.device, times: int) -> float:
    """Return the mean seconds of a step, after one that warms up."""
    step()
    start = clock(device)
    for _ in range(times):
        step()
    return (clock(device) - start) / times


def peak_gigabytes(device: torch.device) -> float | None:
    """Return the most memory that this process has held: the GPU's, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, whose memory and caches are nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_all(
    bench: Bench, guide: Recipe, ours: Recipe, guide_images: int | None
) -> list[dict[str, Any]]:
    """Return a row a variant: the guide's loop, then this project's, one after the other."""
    rows = [
        in_own_process(measure_guide, bench, guide, guide_images),
        in_own_process(measure_project, bench, COMPILED, guide, "on", True),
        in_own_process(measure_project, bench, PLAIN, guide, "off"),
        in_own_process(measure_project, bench, OURS, ours, "on"),
    ]
    for row in rows[2:]:
        row["encode s/image"] = rows[1]["encode s/image"]
    return rows


def add_totals(rows: list[dict[str, Any]], image_count: int) -> None:
    """Add the seconds of an epoch over image_count images, and of several, to measured rows."""
    for row in rows:
        in_each_epoch, once = row["step s/image"], row["encode s/image"]
        if row["variant"] == GUIDES_LOOP:
            in_each_epoch, once = in_each_epoch + once, 0.0
        row["epoch s"] = image_count * in_each_epoch
        for epochs, column in TOTALS.items():
            row[column] = row["compile s"] + image_count * once + epochs * row["epoch s"]
        row[RATIO] = rows[0][TOTALS[20]] / row[TOTALS[20]]


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
    """Draw each variant's hours over the number of epochs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, max(TOTALS) + 1)
    for row in rows:
        once = row[TOTALS[1]] - row["epoch s"]
        axes.plot(epochs, (once + epochs * row["epoch s"]) / 3600, label=row["variant"])
    axes.set(xlabel="epochs", ylabel="hours", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument("--image-size", type=parse_image_size, metavar="S", help="of all variants")
    parser.add_argument("--random-weights", action="store_true", help="for time and memory only")
    parser.add_argument("--limit", type=at_least_1, help="the first N training images only")
    parser.add_argument("--guide-images", type=at_least_1, help="show the guide's loop N of them")
    parser.add_argument(
        "--totals-for", type=at_least_1, help="images of the totals (default: those measured)"
    )
    parser.add_argument("--val-limit", type=at_least_1, default=10, help="val images to measure")
    parser.add_argument("--epochs", type=at_least_1, default=1, help="how many to measure")
    parser.add_argument("--batch-size", type=at_least_1, default=1, help="of this project's loop")
    parser.add_argument("--lr", type=number(float, above=0), default=1e-5, help="of all loops")
    parser.add_argument("--seed", type=seed, default=42, help="of weights, order and prompts")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), help="results")
    add_device_option(parser)
    return parser.parse_args(argv)


def prepare(args: Namespace) -> Bench:
    """Return what the options say of the model and the images."""
    device, checkpoint = select_device(args.device, args.threads), args.checkpoint
    if args.random_weights:
        checkpoint = args.output / f"random_{args.model}.pt"
        torch.manual_seed(args.seed)
        save_checkpoint(checkpoint, build_predictor(args.model, torch.device("cpu")).model)
    checkpoint = checkpoint or ensure_checkpoint(args.model)
    pairs = split_pairs(args.data, "train", args.limit)
    pairs = [pairs[index] for index in count_objects(pairs)]
    if len(pairs) < 5:
        raise UserError("a benchmark needs at least 5 training images; raise --limit")
    val_pairs = split_pairs(args.data, "val", args.val_limit)
    cache = args.output / "cache"
    return Bench(args.model, checkpoint, device, pairs, val_pairs, cache, args.image_size)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    bench = prepare(args)
    shared = {name: getattr(args, name) for name in ("lr", "batch_size", "epochs", "seed")}
    guide, ours = replace(GUIDE, **shared), replace(DEFAULT, **shared)
    rows = measure_all(bench, guide, ours, args.guide_images)
    floors = {mode: in_own_process(measure_floor, bench, guide, mode) for mode in ("on", "off")}
    comparison = in_own_process(measure_comparison, bench)
    shutil.rmtree(bench.cache)

    image_count = args.totals_for or len(bench.pairs)
    add_totals(rows, image_count)
    precision = str(select_precision("auto", bench.device)).removeprefix("torch.")
    at = f" at {args.image_size}" if args.image_size else ""
    title = f"SAM 2.1 {args.model}{at}, {image_count} images, {bench.device}, {precision}"
    cores = f"{torch.get_num_threads()} threads, {platform.system()}, PyTorch {torch.__version__}"
    print(f"{title}; the guide's loop in float32; {cores}\n")
    print(format_table(rows))
    for row, floor in ((rows[1], floors["on"]), (rows[2], floors["off"])):
        ratio = row["step s/image"] / floor
        print(f"{row['variant']}: {ratio:.2f} times the bare decoder's {floor:.3f} s an image")
    print(
        f"comparing two models: {comparison['two'] / comparison['one']:.3f} times evaluating one "
        f"({comparison['one']:.3f} s an image, encoded anew)"
    )
    table = [[row[column] for column in COLUMNS] for row in rows]
    write_csv(args.output / "benchmark.csv", COLUMNS, table)
    draw_totals(args.output / "benchmark.png", rows, title)
    print(f"wrote benchmark.csv and benchmark.png to {args.output}")


if __name__ == "__main__":
    run(main)
