"""Compare fine-tuning recipes with the same images, initial weights and number of training images.

    python benchmarks/recipes.py --model mini --epochs 6              # two hours on 2 cores
    python benchmarks/recipes.py --model mini --epochs 2 --seeds 1    # a quick look

Each recipe is trained with its best learning rate, the one with the highest IoU for one point on a
held-out quarter of the training images. The default and its variants keep the default's rate. Then
each recipe trains on all training images, once per seed. Its last weights are measured on the
validation images, which influenced no choice:
  - with one point (the deepest, as in compare_models.py, or a random one), a box, and no prompt
  - after 3 and 5 corrective clicks
  - the single mask, which other tools use, with one point and with a box
  - the share of points on background that are answered "no object"

Writes to output/recipes/: runs.csv (a row per run; finished runs are not repeated), recipes.csv (a
row per recipe) and recipes.png.
"""

from __future__ import annotations

import csv
import functools
import multiprocessing
import os
import platform
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import UserError, autocast, select_device, select_precision

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from finetuning.basics.command_line import ArgumentParser, add_device_option, number, run
from finetuning.basics.files import without_apostrophe, write_csv
from finetuning.basics.pictures import save_figure
from finetuning.dataset.objects import count_objects, read_objects
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation.measuring import Comparison, mean_metrics, measure
from finetuning.evaluation.simulated_clicks import measure_clicks
from finetuning.model.cache_places import open_cache
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.model import FeatureSource, Model, features_for
from finetuning.model.models import MODELS, ensure_checkpoint, load_predictor
from finetuning.segmentation.predicting import predict_masks
from finetuning.segmentation.prompts import prompt_from_mask
from finetuning.training.learner import make_learner
from finetuning.training.recipe import DEFAULT, GUIDE, MINI_LR, Recipe
from finetuning.training.recipe_options import RECIPE_OPTIONS
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler
from finetuning.training_data.thin_objects import choose_loss_grid
from train_sam2_proper import train_one_epoch

BATCH = replace(GUIDE, batch_size=4)
DICE = replace(BATCH, dice_weight=1.0)
COSINE = replace(DICE, schedule="cosine")
ALWAYS = replace(DEFAULT, none_share=0.0)  # every step has a prompt
PLAIN = replace(ALWAYS, background_share=0.0, single_weight=0.0, max_grad_norm=0.0)
LOW, MIDDLE, HIGH = (1e-5, 3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)
OWN = ()
# Each recipe and its candidate learning rates; OWN: the default's learning rate for the model
COMPARED: dict[str, tuple[Recipe, tuple[float, ...]]] = {
    "guide": (GUIDE, LOW),
    "+ batch of 4": (BATCH, MIDDLE),
    "+ dice": (DICE, MIDDLE),
    "+ cosine": (COSINE, HIGH),
    "+ inner points": (replace(COSINE, prompts="inner"), HIGH),
    "+ boxes and clicks": (PLAIN, HIGH),
    "the same, all masks": (replace(PLAIN, mask_loss="all"), HIGH),
    "the default, but the single mask": (replace(ALWAYS, single_weight=0.0), OWN),
    "the default, not clipped": (replace(ALWAYS, max_grad_norm=0.0), OWN),
    "the default, but always a prompt": (ALWAYS, OWN),
    "the default, without points on background": (replace(DEFAULT, background_share=0.0), OWN),
    "the default": (DEFAULT, OWN),
    "1 step in 10 without a prompt": (replace(DEFAULT, none_share=0.1), OWN),
    "1 step in 5 without": (replace(DEFAULT, none_share=0.2), OWN),
    "half of the points with one on background": (replace(DEFAULT, background_share=0.5), OWN),
}
# The measures: each prompt's kind and which mask counts, and each number of clicks
PROMPTED = {
    "one point": ("center", "best"),
    "random point": ("random", "best"),
    "box": ("box", "best"),
    "no prompt": ("none", "best"),
    "single: one point": ("center", "single"),
    "single: box": ("box", "single"),
}
CLICKED = {"3 clicks": 3, "5 clicks": 5}
BACKGROUND = "no object on background"
BACKGROUND_POINTS = 5  # per image
MEASURES = (*PROMPTED, *CLICKED, BACKGROUND)
KEY_COLUMNS = (
    "recipe", "options", "model", "data", "limit", "epochs", "lr", "seed", "measured on",
)  # fmt: skip
RUN_COLUMNS = (*KEY_COLUMNS, *MEASURES, "seconds")
VAL, HELD_OUT = "val", "training images held out"


class Bench(NamedTuple):
    """The settings that all runs share."""

    model: str
    checkpoint: Path
    device: torch.device
    precision: torch.dtype
    data: Path
    limit: int | None  # images used of each split
    output: Path
    jobs: int  # parallel runs
    threads: int  # per run


class Run(NamedTuple):
    """One training of a recipe, with its learning rate, epochs and seed."""

    name: str
    recipe: Recipe
    measured_on: str  # VAL or HELD_OUT

    def key(self, bench: Bench) -> dict[str, str]:
        """Return the columns that identify the run: the first ones of its row."""
        recipe = self.recipe
        options = " ".join(
            f"--{name.replace('_', '-')} {getattr(recipe, name)}"
            for name in RECIPE_OPTIONS
            if name not in KEY_COLUMNS
        )
        facts = (
            *(self.name, options, bench.model, bench.data, bench.limit or "all"),
            *(recipe.epochs, recipe.lr, recipe.seed, self.measured_on),
        )
        return dict(zip(KEY_COLUMNS, map(str, facts), strict=True))


def split_images(planned: Run, bench: Bench) -> tuple[list[Pair], dict[int, int], list[Pair]]:
    """Return the training pairs, the number of objects in each, and the pairs to measure.

    The numbers of objects are by index of the training pairs; held-out pairs are not among them.
    """
    pairs = split_pairs(bench.data, "train", bench.limit)
    objects = count_objects(pairs)
    if planned.measured_on == VAL:
        return pairs, objects, split_pairs(bench.data, "val", bench.limit)
    order = np.random.default_rng(0).permutation(list(objects)).tolist()
    held_out, learned_from = order[: len(order) // 4], order[len(order) // 4 :]
    learned_from = {index: objects[index] for index in sorted(learned_from)}
    return pairs, learned_from, [pairs[index] for index in held_out]


def train_and_measure(planned: Run, bench: Bench) -> dict[str, str]:
    """Do a run and return its row; each run has its own process."""
    start = time.perf_counter()
    torch.set_num_threads(bench.threads)
    recipe = planned.recipe
    torch.manual_seed(recipe.seed)
    predictor, _ = load_predictor(bench.model, bench.checkpoint, bench.device)
    cache = FeatureCache(bench.output / "cache", predictor, bench.precision)
    pairs, objects, measured = split_images(planned, bench)
    if recipe.loss_grid == "auto":
        recipe = replace(recipe, loss_grid=choose_loss_grid(pairs))

    training_set = TrainingSet(
        pairs,
        cache,
        predictor.model.image_size,
        recipe.seed,
        recipe.prompt_mix,
        recipe.loss_grid,
    )
    sampler = EpochSampler(objects, recipe.batch_size, recipe.seed, recipe.objects_per_image)
    loader = make_loader(training_set, sampler, bench.device)
    learner = make_learner(predictor, recipe, bench.precision)
    for epoch in range(1, recipe.epochs + 1):
        train_one_epoch(predictor, loader, learner, recipe, epoch)

    model = Model(predictor, FeatureSource(predictor, bench.precision, cache))
    if planned.measured_on == VAL:
        ious = measure_all(model, measured)
    else:  # the learning rate is chosen by this alone
        ious = {"one point": mean_metrics(measure([model], measured))["IoU"]}
    reached = {name: f"{ious[name]:.6f}" if name in ious else "" for name in MEASURES}
    return {**planned.key(bench), **reached, "seconds": f"{time.perf_counter() - start:.0f}"}


def measure_all(model: Model, pairs: list[Pair]) -> dict[str, float]:
    """Return the MEASURES: mean IoUs over objects, and the result of measure_background."""
    results = {name: measure([model], pairs, *how) for name, how in PROMPTED.items()}
    ious = {name: mean_metrics(of_prompt)["IoU"] for name, of_prompt in results.items()}
    clicked = Comparison([model], pairs, results["one point"])
    by_click = measure_clicks(clicked, max(CLICKED.values()), True, "best")
    means = by_click[0].mean(axis=0)
    after_clicks = {name: float(means[count - 1]) for name, count in CLICKED.items()}
    return {**ious, **after_clicks, BACKGROUND: measure_background(model, pairs)}


@torch.no_grad()
def measure_background(model: Model, pairs: list[Pair]) -> float:
    """Return the share of points outside all objects for which the model answers "no object".

    The points are drawn uniformly and are the same for all models. Returns NaN if no image has any
    background.
    """
    no_object, predictor = [], model.predictor
    for index, pair in enumerate(pairs):
        objects = read_objects(pair._replace(as_one=True))
        background = ~objects[0] if objects else np.ones(objects.size, bool)
        if not background.any():
            continue
        rng, count = np.random.default_rng([0, index]), BACKGROUND_POINTS
        points = [prompt_from_mask(background, "random", rng) for _ in range(count)]
        (of_image,) = features_for([model], [(pair.image, objects.size)])
        features = of_image.of([0] * count)
        with autocast(predictor.device, model.source.precision):
            prediction = predict_masks(predictor, features, points, [objects.size] * count)
        no_object += (prediction.object_logits <= 0).flatten().tolist()
    return float(np.mean(no_object)) if no_object else float("nan")


def do_runs(runs: list[Run], bench: Bench, description: str) -> list[dict[str, str]]:
    """Do the runs that runs.csv does not have; return the rows of all."""
    path = bench.output / "runs.csv"
    rows = {key_of(row): row for row in read_rows(path)}
    keys = [key_of(planned.key(bench)) for planned in runs]
    missing = [planned for planned, key in zip(runs, keys, strict=True) if key not in rows]
    os.environ["TQDM_DISABLE"] = "1"  # for the new processes, whose bars would mix
    with multiprocessing.get_context("spawn").Pool(bench.jobs, maxtasksperchild=1) as pool:
        done = pool.imap_unordered(functools.partial(train_and_measure, bench=bench), missing)
        for row in tqdm(done, desc=description, unit="run", total=len(missing)):
            rows[key_of(row)] = row
            write_csv(path, RUN_COLUMNS, [list(row.values()) for row in rows.values()])
    return [rows[key] for key in keys]


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY_COLUMNS)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read runs.csv if it exists; raise UserError if it has other columns."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != RUN_COLUMNS:
            raise UserError(f"{path} has other columns; use another --output")
        return [{column: without_apostrophe(cell) for column, cell in row.items()} for row in table]


def choose_learning_rates(names: list[str], epochs: int, bench: Bench) -> dict[str, Recipe]:
    """Return each recipe with these epochs and its learning rate.

    Of several rates, the best is chosen by the IoU with one point on held-out training images.
    """
    own = MINI_LR if bench.model == "mini" else DEFAULT.lr
    candidates: dict[str, list[Recipe]] = {}
    for name in names:
        recipe, rates = COMPARED[name]
        candidates[name] = [replace(recipe, epochs=epochs, lr=lr, seed=0) for lr in rates or (own,)]
    runs = [
        Run(name, recipe, HELD_OUT)
        for name, recipes in candidates.items()
        for recipe in recipes
        if len(recipes) > 1
    ]
    best = {name: (0.0, recipes[0]) for name, recipes in candidates.items()}
    for planned, row in zip(runs, do_runs(runs, bench, "Tuning"), strict=True):
        reached = float(row["one point"]), planned.recipe
        best[planned.name] = max(best[planned.name], reached, key=lambda found: found[0])
    return {name: recipe for name, (_, recipe) in best.items()}


def summarize(name: str, lr: float | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a recipe's row: mean and standard deviation over the seeds, for each measure."""
    summary = {"recipe": name, "lr": lr, "runs": len(rows)}
    for column in MEASURES:
        ious = np.array([float(row[column]) for row in rows])
        summary[column] = ious.mean()
        summary[f"{column}, spread"] = ious.std(ddof=1) if len(ious) > 1 else 0.0
    return summary


def format_table(summaries: list[dict[str, Any]]) -> str:
    """Return the recipes as a Markdown table; the first row is the original."""
    lines = [("recipe", "lr", *MEASURES), ("---",) * (2 + len(MEASURES))]
    for summary in summaries:
        cells = [
            f"{100 * summary[column]:.1f} ± {100 * summary[f'{column}, spread']:.1f}"
            if summary["runs"] > 1
            else f"{100 * summary[column]:.1f}"
            for column in MEASURES
        ]
        lines.append((summary["recipe"], f"{summary['lr']:g}" if summary["lr"] else "", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_recipes(path: Path, summaries: list[dict[str, Any]], title: str) -> None:
    """Draw each recipe's mean with one standard deviation, in a panel for each measure."""
    figure = Figure(figsize=(16, 1 + 0.4 * len(summaries)), layout="constrained")
    names = [summary["recipe"] for summary in summaries]
    for axes, column in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        means = [100 * summary[column] for summary in summaries]
        spreads = [100 * summary[f"{column}, spread"] for summary in summaries]
        axes.errorbar(means, names, xerr=spreads, fmt="o")
        axes.axvline(means[0], color="gray", linestyle="--")
        axes.set_title(column, fontsize="medium")
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    figure.suptitle(title)
    save_figure(path, figure)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument("--limit", type=at_least_1, help="use the first N images only")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument(
        "--recipes", nargs="+", choices=COMPARED, default=list(COMPARED), help="which of them"
    )
    parser.add_argument("--epochs", type=at_least_1, default=10, help="passes over the images")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="runs of each recipe")
    parser.add_argument("--jobs", type=at_least_1, default=2, help="runs at the same time")
    parser.add_argument("--output", type=Path, default=Path("output/recipes"), help="results")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    precision = select_precision("auto", device)
    checkpoint = args.checkpoint or ensure_checkpoint(args.model)
    bench = Bench(
        *(args.model, checkpoint, device, precision, args.data, args.limit, args.output),
        *(args.jobs, threads),
    )
    predictor, _ = load_predictor(args.model, checkpoint, device)
    pairs = {split: split_pairs(args.data, split, args.limit) for split in ("train", "val")}
    cache = open_cache(
        predictor,
        args.output / "cache",
        precision,
        {split: [pair.image for pair in found] for split, found in pairs.items()},
    )
    model = Model(predictor, FeatureSource(predictor, precision, cache))
    original = measure_all(model, pairs["val"])

    recipes = choose_learning_rates(args.recipes, args.epochs, bench)
    runs = [
        Run(name, replace(recipe, seed=seed), VAL)
        for name, recipe in recipes.items()
        for seed in range(args.seeds)
    ]
    rows = do_runs(runs, bench, "Training")
    summaries = [summarize("original, not fine-tuned", None, [original])]
    for name, recipe in recipes.items():
        of_recipe = [row for row in rows if row["recipe"] == name]
        summaries.append(summarize(name, recipe.lr, of_recipe))

    shown = args.epochs * len(pairs["train"])
    title = (
        f"SAM 2.1 {args.model}, {args.data}: {len(pairs['train'])} training and "
        f"{len(pairs['val'])} val images, {shown} shown, {args.seeds} seeds; mean IoU on val, %"
    )
    print(f"{title}; {platform.system()}, PyTorch {torch.__version__}\n\n{format_table(summaries)}")
    table = [list(summary.values()) for summary in summaries]
    write_csv(args.output / "recipes.csv", list(summaries[0]), table)
    draw_recipes(args.output / "recipes.png", summaries, title)
    print(f"wrote runs.csv, recipes.csv and recipes.png to {args.output}")


if __name__ == "__main__":
    run(main)
