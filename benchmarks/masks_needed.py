"""How many masks, and how much time, the default recipe needs to be as good as the guide's.

    python benchmarks/masks_needed.py --model mini --train-images 45 90 180
    python benchmarks/masks_needed.py --model mini --train-images 45 90 180 --epochs 80 40 20

The guide's recipe trains on all training images, with its own learning rate and with the one that
is best for mini. Its best epoch on val counts, as in its sam2_best.pt. The default, or another
--recipe of recipes.py, trains on the first N images, for each N and seed, and its last weights
count. The answer is the smallest N from which on the mean IoU on val, with one point, reaches the
guide's.

The hours are computed from seconds an image of a full-size model: `small` at 1024 pixels on 2 CPU
cores, as benchmark_training.py measured them (benchmarks/README.md). Options give others. So the
answer joins the masks that --model needs with the time that `small` takes: say so with it.

Writes masks_needed.csv to output/recipes/, where it finds the finished runs of recipes.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import UserError

import numpy as np

from benchmarks.recipe_runs import BEST, LAST, Bench, Run, do_runs
from benchmarks.recipes import COMPARED, add_bench_options, check_counts, open_bench
from finetuning.basics.command_line import ArgumentParser, number, run
from finetuning.basics.files import write_csv
from finetuning.dataset.pairs import split_pairs
from finetuning.training.recipe import DEFAULT, GUIDE, MINI_LR, Recipe

MEASURE = "one point"
COLUMNS = (
    "recipe", "training images", "lr", "epochs", "seeds", "val IoU", "spread", "hours",
    "times faster",
)  # fmt: skip


class Seconds(NamedTuple):
    """What a full-size model takes, in seconds an image."""

    guide_step: float  # of the guide's loop, which encodes the image each time
    encode: float  # once
    step: float  # of this project, with cached features

    def of_guide(self, images: int, epochs: int) -> float:
        return images * epochs * self.guide_step

    def with_cache(self, encoded: int, images: int, epochs: int) -> float:
        """Return the seconds of encoding images, or variants of them, and of the steps."""
        return encoded * self.encode + images * epochs * self.step


def plan_guide(lrs: Sequence[float], epochs: int, seeds: int) -> dict[float, list[Run]]:
    """Return the runs of the guide's recipe, by learning rate."""
    return {
        lr: [
            Run("guide", replace(GUIDE, epochs=epochs, lr=lr), (seed,), weights=weights)
            for seed in range(seeds)
            for weights in (BEST, LAST)
        ]
        for lr in lrs
    }


def plan_few(
    name: str, lr: float, counts: Sequence[int], epochs: Sequence[int], seeds: int
) -> dict[int, list[Run]]:
    """Return the runs of a recipe with few training images, by their number.

    name: of the recipe, in COMPARED. epochs: of each number of images, or one for all.
    """
    epochs = epochs * len(counts) if len(epochs) == 1 else epochs
    if len(epochs) != len(counts):
        raise UserError("--epochs: give one number, or one for each of --train-images")
    recipes = {
        count: replace(COMPARED[name][0], epochs=own_epochs, lr=lr)
        for count, own_epochs in sorted(zip(counts, epochs, strict=True))
    }
    return {
        count: [Run(name, recipe, (seed,), count) for seed in range(seeds)]
        for count, recipe in recipes.items()
    }


def find_needed(reached: dict[int, float], goal: float) -> int | None:
    """Return the smallest number of images from which on all reach the goal; None: none does."""
    needed = None
    for count in sorted(reached, reverse=True):
        if reached[count] < goal:
            break
        needed = count
    return needed


def rows_of_guide(
    runs: dict[float, list[Run]], images: int, seconds: Seconds, bench: Bench
) -> list[dict[str, object]]:
    """Do the guide's runs; return a row for each learning rate and kind of weights."""
    rows = []
    done = do_runs([planned for each in runs.values() for planned in each], bench, "The guide's")
    for weights in (BEST, LAST):
        for lr, planned in runs.items():
            ious = [
                float(row[MEASURE])
                for row in done
                if row["lr"] == str(lr) and row["weights"] == weights
            ]
            recipe = planned[0].recipe
            took = seconds.of_guide(images, recipe.epochs)
            rows.append(row_of(f"guide, {weights}", recipe, images, ious, took, took))
    return rows


def rows_of_few(
    runs: dict[int, list[Run]], guide_took: float, seconds: Seconds, bench: Bench
) -> list[dict[str, object]]:
    """Do the runs of plan_few, fewest images first; return a row for each number."""
    rows = []
    for count, planned in runs.items():
        done = do_runs(planned, bench, f"{count} images")
        recipe, encoded = planned[0].recipe, int(done[0]["encoded images"])
        took = seconds.with_cache(encoded, count, recipe.epochs)
        ious = [float(row[MEASURE]) for row in done]
        rows.append(row_of(f"{planned[0].name}, {LAST}", recipe, count, ious, took, guide_took))
    return rows


def row_of(
    name: str, recipe: Recipe, images: int, ious: list[float], took: float, guide_took: float
) -> dict[str, object]:
    spread = float(np.std(ious, ddof=1)) if len(ious) > 1 else 0.0
    values = (name, images, recipe.lr, recipe.epochs, len(ious), float(np.mean(ious)), spread)
    return dict(zip(COLUMNS, (*values, took / 3600, guide_took / took), strict=True))


def format_rows(rows: list[dict[str, object]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        *plain, iou, spread, hours, faster = row.values()
        numbers = f"{iou:.4f}", f"{spread:.4f}" if row["seeds"] > 1 else "", f"{hours:.2f}"
        lines.append((*map(str, plain), *numbers, f"{faster:.1f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1, above_0 = number(int, at_least=1), number(float, above=0)
    parser.add_argument(
        "--recipe", choices=COMPARED, default="the default", help="the one that is to need fewer"
    )
    parser.add_argument(
        "--train-images", nargs="+", type=at_least_1, default=[45, 90, 180], metavar="N",
        help="train the recipe on the first N training images",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", nargs="+", type=at_least_1, default=[20], metavar="N",
        help="of the recipe, for all numbers of images or for each",
    )  # fmt: skip
    parser.add_argument("--guide-epochs", type=at_least_1, default=20, help="of the guide's")
    parser.add_argument(
        "--guide-lrs", nargs="+", type=above_0, default=[GUIDE.lr, 1e-4], metavar="LR",
        help="learning rates of the guide's recipe: its own, and mini's best",
    )  # fmt: skip
    parser.add_argument("--guide-seeds", type=at_least_1, default=1, help="its runs, for each rate")
    parser.add_argument("--guide-step", type=above_0, default=5.11, help="seconds of its loop")
    parser.add_argument("--encode", type=above_0, default=4.91, help="seconds of encoding, once")
    parser.add_argument("--step", type=above_0, default=0.353, help="seconds with cached features")
    add_bench_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_counts(args.train_images, split_pairs(args.data, "train", args.limit))
    lr = MINI_LR if args.model == "mini" else DEFAULT.lr
    runs = plan_few(args.recipe, lr, args.train_images, args.epochs, args.seeds)
    bench, _, pairs = open_bench(args)
    seconds = Seconds(args.guide_step, args.encode, args.step)
    guide_runs = plan_guide(args.guide_lrs, args.guide_epochs, args.guide_seeds)
    images = len(pairs["train"])
    rows = rows_of_guide(guide_runs, images, seconds, bench)
    guide_took = seconds.of_guide(images, args.guide_epochs)
    few = rows_of_few(runs, guide_took, seconds, bench)

    print(f"{bench.model} on {args.data}, {len(pairs['val'])} val images, {MEASURE}")
    print(f"hours: computed from {seconds}, seconds an image\n")
    print(format_rows([*rows, *few]))
    reached = {row["training images"]: row["val IoU"] for row in few}
    print()
    for row in rows[: len(args.guide_lrs)]:  # of the best epochs
        needed = find_needed(reached, row["val IoU"])
        count = f"{needed} of them" if needed else f"more than {max(args.train_images)}"
        goal = f"--lr {row['lr']:g} reaches {row['val IoU']:.4f} with {images} masks"
        print(f"the guide's recipe with {goal}; {args.recipe} needs {count}")
    table = [list(row.values()) for row in (*rows, *few)]
    write_csv(args.output / "masks_needed.csv", COLUMNS, table)
    print(f"wrote runs.csv and masks_needed.csv to {args.output}")


if __name__ == "__main__":
    run(main)
