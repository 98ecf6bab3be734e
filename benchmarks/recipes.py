"""Compare fine-tuning recipes with the same images, initial weights and number of epochs.

    python benchmarks/recipes.py --model mini --epochs 6              # hours on 2 cores
    python benchmarks/recipes.py --model mini --epochs 2 --seeds 1    # a quick look
    python benchmarks/recipes.py --model mini --recipes "the default" --train-images 45 180 720

Each recipe is trained with its best learning rate, the one with the highest IoU for one point on a
held-out quarter of the training images. The default and those near it keep the default's rate;
"plain" is the default without augmentation. Then each recipe trains on all training images, or the
first N, once per seed. Its last weights are measured on all validation images, which influenced no
choice:
  - with one point (the deepest, as in compare_models.py, or a random one), a box, and no prompt
  - after 3 and 5 corrective clicks
  - the single mask, which other tools use, with one point and with a box
  - the share of points on background that are answered "no object"

--held-out measures on that quarter of the training images instead: choose by it, report on val.
Training seconds are those of one seed's steps: seconds of the CPU, or on a GPU the time; the table
says what encoding an image takes.

Writes to output/recipes/: runs.csv (a row per run; finished runs are not repeated), weights/ (the
decoders, which may be deleted), recipes.csv (a row per recipe) and recipes.png.
"""

from __future__ import annotations

import os
import platform
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import UserError, autocast, select_device, select_precision

import torch

from benchmarks.recipe_measures import measure_all
from benchmarks.recipe_runs import (
    AS_IT_IS,
    HELD_OUT,
    TUNING,
    USES,
    VAL,
    Bench,
    Run,
    clock,
    do_runs,
    encode_views,
    in_use,
    split_images,
)
from benchmarks.recipe_table import Case, draw_recipes, format_table, summarize
from finetuning.basics.command_line import ArgumentParser, add_device_option, number, run
from finetuning.basics.files import write_csv
from finetuning.basics.image_files import read_image
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.model.cache_places import open_cache
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import MODELS, ensure_checkpoint, load_predictor
from finetuning.segmentation.predicting import encode_images
from finetuning.training.recipe import DEFAULT, GUIDE, MINI_LR, Recipe

PLAIN = replace(DEFAULT, augment="off")
BATCH = replace(GUIDE, batch_size=4, loss_grid="auto")
DICE = replace(BATCH, dice_weight=1.0)
COSINE = replace(DICE, schedule="cosine")
ALWAYS = replace(PLAIN, none_share=0.0)  # every step has a prompt
MIXED = replace(ALWAYS, background_share=0.0, single_weight=0.0, max_grad_norm=0.0)
LOW, MIDDLE, HIGH = (1e-5, 3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)
OWN = ()
# Each recipe and its candidate learning rates; OWN: the default's learning rate for the model
COMPARED: dict[str, tuple[Recipe, tuple[float, ...]]] = {
    "guide": (GUIDE, LOW),
    "+ batch of 4": (BATCH, MIDDLE),
    "+ dice": (DICE, MIDDLE),
    "+ cosine": (COSINE, HIGH),
    "+ inner points": (replace(COSINE, prompts="inner"), HIGH),
    "+ boxes and clicks": (MIXED, HIGH),
    "the same, all masks": (replace(MIXED, mask_loss="all"), HIGH),
    # The default without augmentation, and without another part
    "plain, but the single mask": (replace(ALWAYS, single_weight=0.0), OWN),
    "plain, not clipped": (replace(ALWAYS, max_grad_norm=0.0), OWN),
    "plain, but always a prompt": (ALWAYS, OWN),
    "plain, without points on background": (replace(PLAIN, background_share=0.0), OWN),
    "plain": (PLAIN, OWN),
    "plain, 1 step in 10 without a prompt": (replace(PLAIN, none_share=0.1), OWN),
    "plain, 1 step in 5 without": (replace(PLAIN, none_share=0.2), OWN),
    "plain, half of the points with one on background": (replace(PLAIN, background_share=0.5), OWN),
    # Augmentation: of cached features, encoded variants (auto: as many as are worth it), or both
    "features mirrored": (replace(DEFAULT, augment=1, mirror_from=1), OWN),
    "features turned": (replace(DEFAULT, augment=1, mirror_from=1, turns=True), OWN),
    "variants": (replace(DEFAULT, mirror_from=99), OWN),
    "variants, turned": (replace(DEFAULT, mirror_from=99, turns=True), OWN),
    "the default": (DEFAULT, OWN),
    "the default, turned": (replace(DEFAULT, turns=True), OWN),
    "the default, 2 variants": (replace(DEFAULT, augment=2), OWN),
    "the default, 4 variants": (replace(DEFAULT, augment=4), OWN),
    "the default, 8 variants": (replace(DEFAULT, augment=8), OWN),
}
TIMED_IMAGES = 5  # encoded to see how long it takes


def choose_learning_rates(cases: list[Case], bench: Bench) -> dict[Case, Recipe]:
    """Return each case's recipe with its epochs and its learning rate.

    Of several rates, the best is chosen by the IoU with one point on held-out training images.
    """
    own = MINI_LR if bench.model == "mini" else DEFAULT.lr
    candidates: dict[Case, list[Recipe]] = {}
    for case in cases:
        recipe, rates = COMPARED[case.name]
        candidates[case] = [replace(recipe, epochs=case.epochs, lr=lr) for lr in rates or (own,)]
    trials = [
        (case, recipe)
        for case, recipes in candidates.items()
        for recipe in recipes
        if len(recipes) > 1
    ]
    runs = [
        Run(case.name, recipe, images=case.images, measured_on=TUNING) for case, recipe in trials
    ]
    best = {case: (0.0, recipes[0]) for case, recipes in candidates.items()}
    rows = do_runs(runs, bench, "Tuning") if runs else []
    for (case, recipe), row in zip(trials, rows, strict=True):
        reached = float(row["one point"]), recipe
        best[case] = max(best[case], reached, key=lambda found: found[0])
    return {case: recipe for case, (_, recipe) in best.items()}


def measure_cases(
    recipes: dict[Case, Recipe], seeds: int, measured_on: str, uses: Sequence[str],
    averages: bool, bench: Bench,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row of the table for each case and use, and with averages for the mean weights."""
    all_seeds = [(seed,) for seed in range(seeds)]
    each = {
        (case, use): [
            Run(case.name, recipe, of_run, case.images, measured_on, use=use)
            for of_run in all_seeds
        ]
        for case, recipe in recipes.items()
        for use in uses
    }
    do_runs([planned for runs in each.values() for planned in runs], bench, "Training")
    rows = []
    for (case, use), runs in each.items():
        name = case.name if use == AS_IT_IS else f"{case.name}, {use}"
        lr = recipes[case].lr
        rows.append(summarize(name, case, lr, do_runs(runs, bench, "Training")))
        if averages:
            together = [runs[0]._replace(seeds=tuple(range(seeds)))]
            name += f", mean weights of {seeds} seeds"
            rows.append(summarize(name, case, lr, do_runs(together, bench, "Averaging")))
    return rows


def time_encoding(model: Model, pairs: list[Pair]) -> float:
    """Return the seconds that encoding an image takes, as clock counts them."""
    images = [read_image(pair.image) for pair in pairs[:TIMED_IMAGES]]
    device = model.predictor.device
    with autocast(device, model.source.precision):
        encode_images(model.predictor, images[:1])  # warm up
        start = clock(device)
        for image in images:
            encode_images(model.predictor, [image])
    return (clock(device) - start) / len(images)


def add_bench_options(parser: ArgumentParser) -> None:
    """Add the options of open_bench, and --epochs and --seeds."""
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument(
        "--limit", type=at_least_1, help="first N images only, of val too: a quick look"
    )
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="runs of each recipe")
    parser.add_argument("--jobs", type=at_least_1, default=2, help="runs at the same time")
    parser.add_argument("--output", type=Path, default=Path("output/recipes"), help="results")
    parser.add_argument("--cache", type=Path, help="features (default: cache in --output)")
    add_device_option(parser)


def open_bench(args: Namespace) -> tuple[Bench, Model, dict[str, list[Pair]]]:
    """Return the settings of the options, the original model, and the encoded pairs."""
    device = select_device(args.device)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    precision = select_precision("auto", device)
    checkpoint = args.checkpoint or ensure_checkpoint(args.model)
    bench = Bench(
        *(args.model, checkpoint, device, precision, args.data, args.limit, args.output),
        *(args.cache or args.output / "cache", args.jobs, threads),
    )
    predictor, _ = load_predictor(args.model, checkpoint, device)
    pairs = {split: split_pairs(args.data, split, args.limit) for split in ("train", "val")}
    images = {split: [pair.image for pair in found] for split, found in pairs.items()}
    cache = open_cache(predictor, bench.cache, precision, images)
    return bench, Model(predictor, FeatureSource(predictor, precision, cache)), pairs


def check_counts(counts: Sequence[int], pairs: list[Pair]) -> None:
    """Raise UserError if fewer training images exist than are to be trained on."""
    if max(counts, default=0) > len(pairs):
        raise UserError(f"--train-images: there are {len(pairs)} training images; name fewer")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument(
        "--recipes", nargs="+", choices=COMPARED, default=list(COMPARED), help="which of them"
    )
    parser.add_argument(
        "--train-images", nargs="+", type=at_least_1, default=[], metavar="N",
        help="train on the first N training images (default: all); val stays whole",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", nargs="+", type=at_least_1, default=[10], metavar="N", help="of each recipe"
    )
    parser.add_argument(
        "--uses", nargs="+", choices=USES, default=[AS_IT_IS],
        help="how the models are used: as it is, with the mean of mirrored views, with clean masks",
    )  # fmt: skip
    parser.add_argument(
        "--average", action="store_true", help="also measure the mean of the seeds' weights"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="measure on held-out training images, not on val"
    )
    add_bench_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_counts(args.train_images, split_pairs(args.data, "train", args.limit))
    bench, model, pairs = open_bench(args)
    measured_on = HELD_OUT if args.held_out else VAL
    cases = [
        Case(name, images, epochs)
        for images in args.train_images or [None]
        for name in args.recipes
        for epochs in args.epochs
    ]
    train, measured = split_images(Run("", DEFAULT, measured_on=measured_on), bench)
    summaries = []
    for use in args.uses:
        original = in_use(model, use, train)
        encode_views(original, measured)
        name = "original, not fine-tuned" + f", {use}" * (use != AS_IT_IS)
        summaries.append(summarize(name, None, None, [measure_all(original, measured)]))
    recipes = choose_learning_rates(cases, bench)
    averages = args.average and args.seeds > 1
    summaries += measure_cases(recipes, args.seeds, measured_on, args.uses, averages, bench)

    title = (
        f"SAM 2.1 {args.model}, {args.data}: {len(pairs['train'])} training images, {args.seeds} "
        f"seeds; mean IoU on {len(measured)} images ({measured_on}), %"
    )
    print(f"{title}; {platform.system()}, PyTorch {torch.__version__}\n\n{format_table(summaries)}")
    print(f"\nencoding an image takes {time_encoding(model, pairs['train']):.3f} s")
    table = [list(summary.values()) for summary in summaries]
    write_csv(args.output / "recipes.csv", list(summaries[0]), table)
    draw_recipes(args.output / "recipes.png", summaries, title)
    print(f"wrote runs.csv, recipes.csv and recipes.png to {args.output}")


if __name__ == "__main__":
    run(main)
