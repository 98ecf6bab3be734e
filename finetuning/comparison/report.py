"""The summary of a comparison, as text for the console and data for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetuning.basics.command_line import one_line
from finetuning.basics.files import write_csv
from finetuning.basics.language import say
from finetuning.comparison.report_sentences import (
    count_sentence,
    recordings_sentence,
    runs_sentence,
    split_sentences,
)
from finetuning.comparison.tables import (
    BOX_WIDTH,
    Table,
    display_width,
    draw_box,
    format_table,
    pad,
)
from finetuning.evaluation.interval import format_interval, group_numbers
from finetuning.evaluation.measuring import Result, counted_unit, group_by_image, mean_metrics
from finetuning.evaluation.metrics import METRICS, PIXEL_METRICS
from finetuning.evaluation.seen_images import Overlap
from finetuning.model.loading import Files
from finetuning.model.models import own_image_size
from finetuning.segmentation.prompts import prompt_text

# Size of an object: area of its true mask / area of the image, at least and below
SIZES = {"small": (0.0, 0.05), "medium": (0.05, 0.15), "large": (0.15, np.inf)}


class Summary(NamedTuple):
    """The numbers and sentences of a comparison, in the current language."""

    images: int
    objects: int
    split: str
    measured: str  # the split and kind of mask: "val" or "val, single mask"
    means: tuple[float, float]  # IoU of the original and of the fine-tuned model, 0 to 1
    interval: str  # of the improvement; may be empty
    sentences: list[str]
    overlap: Overlap  # with the images that the fine-tuned model has seen
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
    """Summarize the results of two models.

    Arguments:
      overlap: of the measured images with those that the fine-tuned model has seen.
      mask_kind: best or single.
      seed: of the bootstrap.
      runs_file: a table of trainings with other seeds, which may be missing; see runs_sentence.
    """
    measured = say("{split}, single mask", split=split) if mask_kind == "single" else split
    gains = np.array([result.gain for result in results])
    images = len({result.index for result in results})
    interval, line = format_interval(gains, seed, group_numbers(results), images)
    sentences = [count_sentence(results), line, *recordings_sentence(results, split)]
    sentences += split_sentences(split, overlap)
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
    """Return a box with the mean IoU of both models and the improvement in %p.

    Its last lines say what makes these numbers doubtful, if anything does.
    """
    cells = {
        say("original SAM 2:"): summary.original,
        say("fine-tuned SAM 2:"): summary.finetuned,
        say("improvement:"): summary.improvement,
    }
    width = max(map(display_width, cells)) + 2
    original, finetuned, gain = (f"  {pad(name, width)}{value}" for name, value in cells.items())
    title = pad(say("mean IoU ({measured})", measured=summary.measured), BOX_WIDTH, "^")
    # On the train split, all images were trained on: a sentence below the box says it
    doubts = {
        say("trained on:"): 0 if summary.split == "train" else summary.overlap.trained_on,
        say("masks changed:"): summary.overlap.changed_masks,
    }
    lines = [
        f"  {pad(name, width)}"
        + say("{count} of {images} images", count=count, images=summary.overlap.images)
        for name, count in doubts.items()
        if count
    ]
    return draw_box(
        [title, None, original, finetuned, None, gain, *([None] if lines else []), *lines]
    )


def format_summary(summary: Summary) -> str:
    """Return the whole summary as printed on the console."""
    parts = (format_table(summary.metrics), "\n".join(summary.sentences))
    return "\n\n".join([format_box(summary), *parts, format_table(summary.sizes)])


def format_files(files: Files, images: Path, is_test_by_default: bool) -> str:
    """Return what is compared, to be printed first; images: the folder of the images."""
    labels = say("original:"), say("fine-tuned:"), say("images:")
    width = max(map(display_width, labels)) + 1
    original, finetuned, compared = (pad(label, width) for label in labels)
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
        note = say("not the file that training started from")
        lines.insert(1, f"{'':{width}}{note}")
    if files.facts[0].get("epoch") == 0:
        note = say("identical to the original: no epoch of the training was better")
        lines.append(f"{'':{width}}{note}")
    # At another size than its own, the original may be worse than published
    if files.image_size != own_image_size(files.model_name):
        note = say(
            "both models see images resized to {size}x{size} pixels, as in training; the "
            "original's own size is {own}x{own}",
            size=files.image_size, own=own_image_size(files.model_name),
        )  # fmt: skip
        lines.append(f"{'':{width}}{note}")
    lines.append(f"{compared}{images}")
    if is_test_by_default:
        lines[-1] += " " + say(
            "(the test split is the default where there is one; --split val: the validation split)"
        )
    return "\n".join(map(one_line, lines))


def metrics_table(results: list[Result]) -> Table:
    """Return a table with one row per metric: mean and median of both models."""
    header = [
        "",
        say("mean\noriginal"),
        say("mean\nfine-tuned"),
        say("median\noriginal"),
        say("median\nfine-tuned"),
    ]
    rows, in_pixels = [], [name for name in METRICS if name in PIXEL_METRICS]
    for name in METRICS:
        values = [[metrics[name] for metrics in result.metrics] for result in results]
        is_in_pixels = name in PIXEL_METRICS
        label = f"{name} (px)" if is_in_pixels else name
        rows.append([label, *_mean_and_median(values, 1 if is_in_pixels else 4)])
    # An image with many objects dominates the rows above; in this one each image counts once
    if counted_unit(results) == "object":
        medians = [
            np.median([[metrics["IoU"] for metrics in r.metrics] for r in image_results], axis=0)
            for image_results in group_by_image(results)
        ]
        rows.append([say("IoU, median per image"), *_mean_and_median(medians, 4)])
    note = ", ".join(in_pixels)
    note = say("{metrics}: in pixels, lower is better", metrics=note) if in_pixels else ""
    title = say("metrics on {count} objects", count=len(results))
    if counted_unit(results) == "image":
        title = say("metrics on {count} images", count=len(results))
    return Table(title, header, rows, note)


def _mean_and_median(values: Sequence, digits: int) -> list[str]:
    """Return the means and then the medians of the columns of Mx2 numbers, as text."""
    numbers = np.asarray(values)
    both = (*numbers.mean(axis=0), *np.median(numbers, axis=0))
    return [f"{number:.{digits}f}" for number in both]


def size_class(area_fraction: float) -> str:
    """Return the size, by SIZES, of an object that covers this fraction of its image."""
    return next(name for name, (low, below) in SIZES.items() if low <= area_fraction < below)


def sizes_table(results: list[Result]) -> Table:
    """Return a table with one row per size: the number of objects and both models' mean IoU."""
    names = {
        "small": (say("small"), say("below 5%")),
        "medium": (say("medium"), say("5 to 15%")),
        "large": (say("large"), say("15% or more")),
    }
    rows = []
    for size, texts in names.items():
        matching = [result for result in results if size_class(result.area_fraction) == size]
        means = ["-", "-"]
        if matching:
            means = [f"{mean_metrics(matching, model)['IoU']:.4f}" for model in (0, 1)]
        rows.append([*texts, str(len(matching)), *means])
    unit = say("images") if counted_unit(results) == "image" else say("objects")
    header = ["", say("share of image"), unit, say("original"), say("fine-tuned")]
    return Table(say("mean IoU by object size"), header, rows)


def write_results(path: Path, results: list[Result]) -> None:
    """Write one row per object."""
    names = [name.lower().replace(" ", "_") for name in METRICS]
    columns = [f"{model}_{name}" for name in names for model in ("original", "finetuned")]
    rows = []
    for result in results:
        numbers = [metrics[name] for name in METRICS for metrics in result.metrics]
        numbers = [f"{value:.6f}" for value in (*numbers, result.area_fraction)]
        rows.append([*result.name, prompt_text(result.prompt), *numbers])
    write_csv(path, ["image", "object", "prompt", *columns, "area_fraction"], rows)
