"""What two models made of objects, as tables: metrics, sizes, and a row an object as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetuning.basics.files import write_csv
from finetuning.basics.language import ENGLISH, Language
from finetuning.evaluation.measuring import Result, group_by_image, mean_metrics, unit_of
from finetuning.evaluation.metrics import METRICS, PIXEL_METRICS
from finetuning.model.prompts import prompt_text
from finetuning.tables import Table

# Of an object, by the fraction of the image that its true mask covers: at least, and below
SIZES = {"small": (0.0, 0.05), "medium": (0.05, 0.15), "large": (0.15, np.inf)}


def metrics_table(results: list[Result], say: Language = ENGLISH) -> Table:
    """Return a row a metric: mean and median of both models."""
    header = [
        "",
        say("mean\noriginal"),
        say("mean\nfine-tuned"),
        say("median\noriginal"),
        say("median\nfine-tuned"),
    ]
    rows, in_pixels = [], [name for name in METRICS if name in PIXEL_METRICS]
    for name in METRICS:
        values = [[of_model[name] for of_model in result.metrics] for result in results]
        is_in_pixels = name in PIXEL_METRICS
        label = f"{name} (px)" if is_in_pixels else name
        rows.append([label, *_mean_and_median(values, 1 if is_in_pixels else 4)])
    if unit_of(results) == "object":
        medians = [
            np.median([[of_model["IoU"] for of_model in r.metrics] for r in of_image], axis=0)
            for of_image in group_by_image(results)
        ]
        rows.append([say("IoU, each image's median"), *_mean_and_median(medians, 4)])
    note = ", ".join(in_pixels)
    note = say("{metrics}: in pixels, lower is better", metrics=note) if in_pixels else ""
    title = say("metrics of {count} objects", count=len(results))
    if unit_of(results) == "image":
        title = say("metrics of {count} images", count=len(results))
    return Table(title, header, rows, note)


def _mean_and_median(values: Sequence, digits: int) -> list[str]:
    """Return the means, then the medians, of the columns of Mx2 numbers, as text."""
    numbers = np.asarray(values)
    both = (*numbers.mean(axis=0), *np.median(numbers, axis=0))
    return [f"{number:.{digits}f}" for number in both]


def size_of(area_fraction: float) -> str:
    """Return the name in SIZES of an object that covers this fraction of its image."""
    return next(name for name, (low, below) in SIZES.items() if low <= area_fraction < below)


def sizes_table(results: list[Result], say: Language = ENGLISH) -> Table:
    """Return a row a size of object: how many there are, and the mean IoU of both models."""
    names = {
        "small": (say("small"), say("below 5%")),
        "medium": (say("medium"), say("5 to 15%")),
        "large": (say("large"), say("15% and more")),
    }
    rows = []
    for size, texts in names.items():
        of_size = [result for result in results if size_of(result.area_fraction) == size]
        means = ["-", "-"]
        if of_size:
            means = [f"{mean_metrics(of_size, model)['IoU']:.4f}" for model in (0, 1)]
        rows.append([*texts, str(len(of_size)), *means])
    unit = say("images") if unit_of(results) == "image" else say("objects")
    header = ["", say("of the image"), unit, say("original"), say("fine-tuned")]
    return Table(say("mean IoU by object size"), header, rows)


def write_results(path: Path, results: list[Result]) -> None:
    """Write a row an object."""
    names = [name.lower().replace(" ", "_") for name in METRICS]
    columns = [f"{model}_{name}" for name in names for model in ("original", "finetuned")]
    rows = []
    for result in results:
        numbers = [of_model[name] for name in METRICS for of_model in result.metrics]
        numbers = [f"{value:.6f}" for value in (*numbers, result.area_fraction)]
        rows.append([*result.name, prompt_text(result.prompt), *numbers])
    write_csv(path, ["image", "object", "prompt", *columns, "area_fraction"], rows)
