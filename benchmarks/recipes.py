"""Compare recipes of fine-tuning: the same images, weights and number of images shown for all.

    python benchmarks/recipes.py --model mini --epochs 6              # about an hour on 2 cores
    python benchmarks/recipes.py --model mini --epochs 2 --seeds 1    # a quick look

Each recipe takes the learning rate that is best for it with one point: found on a quarter of the
training images, after training on the others; the default keeps its own. Then it trains on all
training images, once a seed, and its last weights are measured on the val images, which no choice
has seen: with one point (the deepest, as compare_models.py does, or a random one), with a box, and
after 3 and 5 corrective clicks; and, of the single mask that other tools take, with one point and
a box. Written to output/recipes/: runs.csv (a row a run; what it has is not run again), recipes.csv
(a row a recipe), recipes.png.
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
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sam2_proper
from clicks import simulate_clicks
from command_line import ArgumentParser, number, run
from feature_cache import FeatureCache, check_room, load_features
from image_files import Pair, atomic_write, read_mask, split_pairs, write_csv
from sam2_utils import (
    MODELS,
    add_device_option,
    autocast,
    calculate_iou,
    ensure_checkpoint,
    load_predictor,
    prompt_from_mask,
    segment,
    select_device,
    select_precision,
)

import numpy as np
import torch
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm


class Recipe(NamedTuple):
    """What train_sam2_proper.py is run with, and the learning rates to choose from."""

    options: str
    learning_rates: tuple[float, ...]


GUIDE = "--recipe guide"
BATCH = f"{GUIDE} --batch-size 4"
DICE = f"{BATCH} --dice-weight 1"
COSINE = f"{DICE} --schedule cosine"
PLAIN = "--single-weight 0 --max-grad-norm 0"
MINI_LR = (train_sam2_proper.MINI_LR,)
LOW, MIDDLE, HIGH = (1e-5, 3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)
RECIPES = {
    "guide": Recipe(GUIDE, LOW),
    "+ batch of 4": Recipe(BATCH, MIDDLE),
    "+ dice": Recipe(DICE, MIDDLE),
    "+ cosine": Recipe(COSINE, HIGH),
    "+ inner points": Recipe(f"{COSINE} --prompts inner", HIGH),
    "+ boxes and clicks": Recipe(PLAIN, HIGH),
    "the same, all masks": Recipe(f"{PLAIN} --mask-loss all", HIGH),
    "the default, but the single mask": Recipe("--single-weight 0", MINI_LR),
    "the default, not clipped": Recipe("--max-grad-norm 0", MINI_LR),
    "the default": Recipe("", MINI_LR),
}
MEASURES = (
    "one point", "random point", "box", "3 clicks", "5 clicks", "single: one point", "single: box",
)  # fmt: skip
RUN_COLUMNS = (
    "recipe", "options", "model", "epochs", "lr", "seed", "measured on", *MEASURES, "seconds",
)  # fmt: skip
KEY_COLUMNS = RUN_COLUMNS[:7]
HELD_OUT = "training images held out"


def plan_run(name: str, lr: float, seed: int, measured_on: str, args: Namespace) -> dict[str, Any]:
    """Return what tells a run from all others: the first columns of its row."""
    facts = (name, RECIPES[name].options, args.model, args.epochs, lr, seed, measured_on)
    return dict(zip(KEY_COLUMNS, map(str, facts), strict=True))


def splits_of(measured_on: str, args: Namespace) -> tuple[list[int], list[int], str]:
    """Return the indices to train on, those to measure on, and of which split the latter are."""
    count = len(split_pairs(args.data, "train", args.limit))
    if measured_on != HELD_OUT:
        return (
            list(range(count)),
            list(range(len(split_pairs(args.data, "val", args.limit)))),
            "val",
        )
    order = np.random.default_rng(0).permutation(count).tolist()
    return order[count // 4 :], order[: count // 4], "train"


def train_and_measure(planned: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """Train as planned and return the row of the run, in a process of its own."""
    start = time.perf_counter()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    settings = train_sam2_proper.parse_args(
        [
            *planned["options"].split(),
            *("--lr", planned["lr"], "--seed", planned["seed"], "--epochs", planned["epochs"]),
        ]
    )
    settings.device, settings.precision = args.device, args.precision
    torch.manual_seed(settings.seed)
    predictor, _ = load_predictor(args.model, args.checkpoint, args.device)
    learned_from, measured_on, split = splits_of(planned["measured on"], args)
    caches = open_caches(predictor, args)

    learner = train_sam2_proper.make_learner(predictor, settings)
    loader = train_sam2_proper.load_training_set(
        predictor, split_pairs(args.data, "train", args.limit), caches["train"], settings
    )
    loader.sampler.indices = sorted(set(learned_from) & set(loader.sampler.indices))
    for epoch in range(1, settings.epochs + 1):
        train_sam2_proper.train_one_epoch(predictor, loader, learner, epoch, settings)
    is_final = planned["measured on"] != HELD_OUT
    means = measure(predictor, caches[split], measured_on, args, clicks=5 if is_final else 1)
    return {**planned, **means, "seconds": f"{time.perf_counter() - start:.0f}"}


def measure(
    predictor: SAM2ImagePredictor,
    cache: FeatureCache,
    indices: list[int],
    args: Namespace,
    clicks: int = 5,
) -> dict[str, str]:
    """Return the mean IoU of the images with an object, for each of MEASURES."""
    ious = []
    for index in indices:
        pair: Pair = cache.pairs[index]
        true_mask = read_mask(pair.mask)
        if not true_mask.any():
            continue
        features = load_features(predictor, cache, index, pair, args.precision)
        with autocast(args.device, args.precision):
            by_click = simulate_clicks(predictor, features, true_mask, clicks, use_mask_prompt=True)
            by_kind = []
            for kind, of in (
                ("random", "best"), ("box", "best"), ("center", "single"), ("box", "single"),
            ):  # fmt: skip
                prompt = prompt_from_mask(true_mask, kind, np.random.default_rng(index))
                mask, _ = segment(predictor, features, prompt, true_mask.shape, of)
                by_kind.append(calculate_iou(mask, true_mask))
        by_click += [np.nan] * (5 - len(by_click))
        ious.append((by_click[0], *by_kind[:2], by_click[2], by_click[4], *by_kind[2:]))
    means = np.mean(ious, axis=0)
    return {name: f"{mean:.6f}" for name, mean in zip(MEASURES, means, strict=True)}


def open_caches(predictor: SAM2ImagePredictor, args: Namespace) -> dict[str, FeatureCache]:
    """Return the features of both splits, as far as they are computed."""
    return {
        split: FeatureCache(
            args.output / f"cache/{split}.features",
            predictor,
            split_pairs(args.data, split, args.limit),
            args.precision,
        )
        for split in ("train", "val")
    }


def do_runs(planned: list[dict[str, Any]], args: Namespace) -> list[dict[str, str]]:
    """Return the rows of the planned runs, after doing those that runs.csv does not have."""
    path = args.output / "runs.csv"
    rows = {key_of(row): row for row in read_rows(path)}
    missing = [run for run in planned if key_of(run) not in rows]
    description = "Tuning" if any(run["measured on"] == HELD_OUT for run in planned) else "Training"
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come, whose bars would be too many
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        done = pool.imap_unordered(functools.partial(train_and_measure, args=args), missing)
        for row in tqdm(done, desc=description, unit="run", total=len(missing)):
            rows[key_of(row)] = row
            write_csv(path, RUN_COLUMNS, [list(row.values()) for row in rows.values()])
    return [rows[key_of(run)] for run in planned]


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY_COLUMNS)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def choose_learning_rates(args: Namespace) -> dict[str, float]:
    """Return each recipe's best learning rate with one point, on the images held out."""
    rates = {name: RECIPES[name].learning_rates for name in args.recipes}
    planned = [
        plan_run(name, lr, 0, HELD_OUT, args)
        for name in args.recipes
        for lr in rates[name]
        if len(rates[name]) > 1
    ]
    best: dict[str, dict[str, str]] = {}
    for row in do_runs(planned, args):
        name = row["recipe"]
        if name not in best or float(row["one point"]) > float(best[name]["one point"]):
            best[name] = row
    return {name: float(best[name]["lr"]) if name in best else rates[name][0] for name in rates}


def summarize(name: str, lr: float, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Return a recipe's row: mean and standard deviation over the seeds, for each of MEASURES."""
    summary = {"recipe": name, "lr": lr, "runs": len(rows)}
    for measure in MEASURES:
        ious = np.array([float(row[measure]) for row in rows])
        summary[measure] = ious.mean()
        summary[f"{measure}, spread"] = ious.std(ddof=1) if len(ious) > 1 else 0.0
    return summary


def format_table(summaries: list[dict[str, Any]]) -> str:
    """Return the recipes as a Markdown table; the first row is the original."""
    lines = [("recipe", "lr", *MEASURES), ("---",) * (2 + len(MEASURES))]
    for summary in summaries:
        cells = [
            f"{100 * summary[measure]:.1f} ± {100 * summary[f'{measure}, spread']:.1f}"
            if summary["runs"] > 1
            else f"{100 * summary[measure]:.1f}"
            for measure in MEASURES
        ]
        lines.append((summary["recipe"], f"{summary['lr']:g}" if summary["lr"] else "", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_recipes(path: Path, summaries: list[dict[str, Any]], title: str) -> None:
    """Draw the mean IoU of each recipe, a panel a measure; lines end at one standard deviation."""
    figure = Figure(figsize=(14, 1 + 0.4 * len(summaries)), layout="constrained")
    names = [summary["recipe"] for summary in summaries]
    for axes, measure in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        means = [100 * summary[measure] for summary in summaries]
        spreads = [100 * summary[f"{measure}, spread"] for summary in summaries]
        axes.errorbar(means, names, xerr=spreads, fmt="o")
        axes.axvline(means[0], color="gray", linestyle="--")
        axes.set(title=measure, xlabel="mean IoU, %")
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument("--limit", type=at_least_1, help="use the first N images only")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which of them"
    )
    parser.add_argument("--epochs", type=at_least_1, default=10, help="passes over the images")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="runs of each recipe")
    parser.add_argument("--jobs", type=at_least_1, default=2, help="runs at the same time")
    parser.add_argument("--output", type=Path, default=Path("output/recipes"), help="results")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = select_device(args.device)
    args.precision = select_precision("auto", args.device)
    args.checkpoint = args.checkpoint or ensure_checkpoint(args.model)
    predictor, _ = load_predictor(args.model, args.checkpoint, args.device)
    caches = open_caches(predictor, args)
    check_room(list(caches.values()), args.output)
    for cache in caches.values():
        cache.fill(predictor)
    val_indices = list(range(len(caches["val"].pairs)))
    original = measure(predictor, caches["val"], val_indices, args)

    rates = choose_learning_rates(args)
    rows = do_runs(
        [
            plan_run(name, rates[name], seed, "val", args)
            for name in rates
            for seed in range(args.seeds)
        ],
        args,
    )
    summaries = [summarize("original, not fine-tuned", 0, [original])]
    for name, lr in rates.items():
        summaries.append(summarize(name, lr, [row for row in rows if row["recipe"] == name]))

    shown = args.epochs * len(caches["train"].pairs)
    title = (
        f"SAM 2.1 {args.model}, {args.data}: {len(caches['train'].pairs)} training and "
        f"{len(val_indices)} val images, {shown} shown, {args.seeds} seeds; mean IoU on val, %"
    )
    print(f"{title}; {platform.system()}, PyTorch {torch.__version__}\n\n{format_table(summaries)}")
    table = [list(summary.values()) for summary in summaries]
    write_csv(args.output / "recipes.csv", list(summaries[0]), table)
    draw_recipes(args.output / "recipes.png", summaries, title)
    print(f"wrote runs.csv, recipes.csv and recipes.png to {args.output}")


if __name__ == "__main__":
    run(main)
