"""What a comparison says, as data: the same for the console and for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetuning.basics.command_line import one_line
from finetuning.basics.files import write_csv
from finetuning.basics.language import say
from finetuning.comparison.report_sentences import count_sentence, runs_sentence, split_sentences
from finetuning.comparison.tables import (
    BOX_WIDTH,
    Table,
    display_width,
    draw_box,
    format_table,
    pad,
)
from finetuning.evaluation.interval import format_interval, group_numbers
from finetuning.evaluation.measuring import Result, group_by_image, mean_metrics, unit_of
from finetuning.evaluation.metrics import METRICS, PIXEL_METRICS
from finetuning.evaluation.seen_images import Overlap
from finetuning.model.loading import Files
from finetuning.model.models import own_image_size
from finetuning.model.prompts import prompt_text

# Of an object, by the fraction of the image that its true mask covers: at least, and below
SIZES = {"small": (0.0, 0.05), "medium": (0.05, 0.15), "large": (0.15, np.inf)}


class Summary(NamedTuple):
    """What a comparison says, in the user's language."""

    images: int
    objects: int
    split: str
    measured: str  # on what, like "val", or "val, single mask"
    means: tuple[float, float]  # IoU of the original and of the fine-tuned model, 0 to 1
    interval: str  # of the improvement; empty where there is none
    sentences: list[str]
    overlap: Overlap  # with what the fine-tuned model has seen
    metrics: Table
    sizes: Table

    @property
    def original(self) -> str:
        return f"{self.means[0]:.2%}"

    @property
    def finetuned(self) -> str:
        return f"{self.means[1]:.2%}"

    @property
    def improvement(self) -> str:
        return f"{100 * (self.means[1] - self.means[0]):+.1f}%p"


def summarize(
    results: list[Result],
    split: str,
    overlap: Overlap,
    mask_kind: str = "best",
    seed: int = 0,
    runs_file: Path | None = None,
) -> Summary:
    """Summarize what two models made of all objects.

    Arguments:
      overlap: of what was measured with what the fine-tuned model has seen.
      mask_kind: best or single.
      seed: of the bootstrap.
      runs_file: where the IoUs of trainings with other seeds may be; see runs_sentence.
    """
    measured = say("{split}, single mask", split=split) if mask_kind == "single" else split
    gains = np.array([result.gain for result in results])
    images = len({result.index for result in results})
    interval, line = format_interval(gains, seed, group_numbers(results), images)
    sentences = [count_sentence(results), line, *split_sentences(split, overlap)]
    if runs_file and runs_file.is_file():
        sentences.append(runs_sentence(runs_file))
    return Summary(
        images=images,
        objects=len(results),
        split=split,
        measured=measured,
        means=tuple(mean_metrics(results, model)["IoU"] for model in (0, 1)),
        interval=interval,
        sentences=sentences,
        overlap=overlap,
        metrics=metrics_table(results),
        sizes=sizes_table(results),
    )


def format_box(summary: Summary) -> str:
    """Return the guide's box: mean IoU of both models, and the improvement in %p.

    Below it stands what makes these numbers doubtful, if anything does.
    """
    cells = {
        say("original SAM 2:"): summary.original,
        say("fine-tuned SAM 2:"): summary.finetuned,
        say("improvement:"): summary.improvement,
    }
    width = max(map(display_width, cells)) + 2
    original, finetuned, gain = (f"  {pad(name, width)}{value}" for name, value in cells.items())
    title = pad(say("mean IoU ({measured})", measured=summary.measured), BOX_WIDTH, "^")
    doubts = {
        say("trained on:"): 0 if summary.split == "train" else summary.overlap.trained_on,
        say("masks changed:"): summary.overlap.changed_masks,
    }
    of_images = say("{count} of {images} images", count="{count}", images=summary.overlap.images)
    lines = [
        f"  {pad(name, width)}{of_images.format(count=count)}"
        for name, count in doubts.items()
        if count
    ]
    return draw_box(
        [title, None, original, finetuned, None, gain, *([None] if lines else []), *lines]
    )


def format_summary(summary: Summary) -> str:
    """Return all that is printed of a summary."""
    parts = (format_table(summary.metrics), "\n".join(summary.sentences))
    return "\n\n".join([format_box(summary), *parts, format_table(summary.sizes)])


def format_files(files: Files, images: Path, is_test_by_default: bool) -> str:
    """Return what is compared on what, before it is; images: their folder."""
    labels = say("original:"), say("fine-tuned:"), say("images:")
    width = max(map(display_width, labels)) + 1
    original, finetuned, of_images = (pad(label, width) for label in labels)
    about = {
        None: "",
        True: " " + say("(SAM 2.1 {name}, as published)", name=files.model_name),
        False: " " + say("(not the published file of SAM 2.1 {name})", name=files.model_name),
    }[files.is_published]
    lines = [
        f"{original}{files.original}{about}",
        f"{finetuned}{files.finetuned_name} (SAM 2.1 {files.model_name})",
    ]
    if files.is_start is False:
        note = say("which is not the file that training started from")
        lines.insert(1, f"{'':{width}}{note}")
    if files.facts[0].get("epoch") == 0:
        note = say("which is the original: no epoch of the training was better")
        lines.append(f"{'':{width}}{note}")
    if files.image_size != own_image_size(files.model_name):
        note = say(
            "both see images of {size}x{size} pixels, as in training; the original's own size is "
            "{own}x{own}",
            size=files.image_size, own=own_image_size(files.model_name),
        )  # fmt: skip
        lines.append(f"{'':{width}}{note}")
    lines.append(f"{of_images}{images}")
    if is_test_by_default:
        lines[-1] += " " + say("(where there is a test split it is taken; --split val: the others)")
    return "\n".join(map(one_line, lines))


def metrics_table(results: list[Result]) -> Table:
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


def sizes_table(results: list[Result]) -> Table:
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
