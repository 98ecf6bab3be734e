"""The table and the picture of recipes.py: a row per recipe, mean and spread over its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.recipe_measures import MEASURES
from finetuning.basics.pictures import save_figure

COSTS = ("training images", "epochs", "lr", "encoded images", "training s")


class Case(NamedTuple):
    """A row of the table: a recipe, and how much it is trained."""

    name: str
    images: int | None  # the first training images; None: all
    epochs: int


def summarize(
    name: str, case: Case | None, lr: float | None, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a row of the table: mean and standard deviation over the runs, for each measure.

    case: None for the original, whose only row has the measures alone.
    """
    costs = {"training images": None, "epochs": None, "lr": lr}
    if case:
        encoded = int(rows[0]["encoded images"])
        seconds = np.mean([float(row["training s"]) for row in rows])
        costs |= {"training images": case.images or "all", "epochs": case.epochs}
        costs |= {"encoded images": encoded, "training s": seconds}
    summary = {"recipe": name, **dict.fromkeys(COSTS), **costs, "runs": len(rows)}
    for column in MEASURES:
        values = np.array([float(row[column]) for row in rows])
        summary[column] = values.mean()
        summary[f"{column}, spread"] = values.std(ddof=1) if len(values) > 1 else 0.0
    return summary


def format_table(summaries: list[dict[str, Any]]) -> str:
    """Return the recipes as a Markdown table; the first row is the original."""
    columns = ("recipe", *COSTS, *MEASURES)
    lines = [columns, ("---",) * len(columns)]
    for summary in summaries:
        measured = [
            f"{100 * summary[column]:.1f} ± {100 * summary[f'{column}, spread']:.1f}"
            if summary["runs"] > 1
            else f"{100 * summary[column]:.1f}"
            for column in MEASURES
        ]
        costs = [
            f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
            for value in map(summary.get, COSTS)
        ]
        lines.append((summary["recipe"], *costs, *measured))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_recipes(path: Path, summaries: list[dict[str, Any]], title: str) -> None:
    """Draw each recipe's mean with one standard deviation, in a panel for each measure."""
    figure = Figure(figsize=(16, 1 + 0.4 * len(summaries)), layout="constrained")
    names = [
        f"{summary['recipe']}, {summary['training images']} images, {summary['epochs']} epochs"
        if summary["epochs"]
        else summary["recipe"]
        for summary in summaries
    ]
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
