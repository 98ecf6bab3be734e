"""What a comparison says, as data: the same for the console and for the HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.command_line import one_line, quoted
from finetuning.compared_models import Files
from finetuning.evaluation import Result, bootstrap_interval, mean_metrics
from finetuning.language import ENGLISH, Language
from finetuning.models import own_image_size
from finetuning.repeats import read_runs
from finetuning.result_tables import metrics_table, sizes_table
from finetuning.tables import BOX_WIDTH, Table, display_width, draw_box, format_table, pad

FEW_IMAGES = 20  # below it, bootstrap intervals are clearly too narrow


class Summary(NamedTuple):
    """What a comparison says, in the user's language."""

    images: int
    objects: int
    measured: str  # on what, like "val"
    means: tuple[float, float]  # IoU of the original and of the fine-tuned model, 0 to 1
    interval: str  # of the improvement; empty where there is none
    sentences: list[str]
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
    mask_kind: str = "best",
    seed: int = 0,
    runs_file: Path | None = None,
    say: Language = ENGLISH,
) -> Summary:
    """Summarize what two models made of all objects.

    Arguments:
      mask_kind: best or single.
      seed: of the bootstrap.
      runs_file: where the IoUs of trainings with other seeds may be; see runs_sentence.
    """
    measured = say("{split}, single mask", split=split) if mask_kind == "single" else split
    gains = np.array([result.gain for result in results])
    images = len({result.index for result in results})
    interval, line = format_interval(gains, seed, group_numbers(results), images, say)
    sentences = [count_sentence(results, say), line, split_sentence(split, say)]
    if runs_file and runs_file.is_file():
        sentences.append(runs_sentence(runs_file, say))
    return Summary(
        images=images,
        objects=len(results),
        measured=measured,
        means=tuple(mean_metrics(results, model)["IoU"] for model in (0, 1)),
        interval=interval,
        sentences=sentences,
        metrics=metrics_table(results, say),
        sizes=sizes_table(results, say),
    )


def format_box(summary: Summary, say: Language = ENGLISH) -> str:
    """Return the guide's box: mean IoU of both models, and the improvement in %p."""
    cells = {
        say("original SAM 2:"): summary.original,
        say("fine-tuned SAM 2:"): summary.finetuned,
        say("improvement:"): summary.improvement,
    }
    width = max(map(display_width, cells)) + 2
    original, finetuned, gain = (f"  {pad(name, width)}{value}" for name, value in cells.items())
    title = pad(say("mean IoU ({measured})", measured=summary.measured), BOX_WIDTH, "^")
    return draw_box([title, None, original, finetuned, None, gain])


def format_summary(summary: Summary, say: Language = ENGLISH) -> str:
    """Return all that is printed of a summary."""
    parts = (format_table(summary.metrics), "\n".join(summary.sentences))
    return "\n\n".join([format_box(summary, say), *parts, format_table(summary.sizes)])


def format_files(files: Files, images: Path, is_test_by_default: bool, say: Language) -> str:
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
    if files.facts.get("epoch") == 0:
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


def count_sentence(results: list[Result], say: Language = ENGLISH) -> str:
    """Say how many images, or objects in images, got better, and how many worse."""
    gains = np.array([result.gain for result in results])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    counts = {"better": better, "equal": len(gains) - better - worse, "worse": worse}
    images = len({result.index for result in results})
    if images < len(results):
        return say(
            "objects {count} in {images} images: {better} better, {equal} equal, {worse} worse",
            count=len(results), images=images, **counts,
        )  # fmt: skip
    return say(
        "images {count}: {better} better, {equal} equal, {worse} worse", count=images, **counts
    )


def group_numbers(results: list[Result]) -> np.ndarray:
    """Return a number an object, equal for those of images that are not independent.

    Such are copies and the images of one patient: of one Pair.group. Others are on their own.
    """
    groups = [result.pair.group for result in results]
    keys = [
        (group, -1 if group else result.index)
        for group, result in zip(groups, results, strict=True)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def format_interval(
    gains: np.ndarray,
    seed: int,
    groups: np.ndarray | None = None,
    images: int | None = None,
    say: Language = ENGLISH,
) -> tuple[str, str]:
    """Return the interval of the mean gain in %p, and a sentence that says what to beware of.

    The first is empty where there is no interval.

    Arguments:
      gains, groups: as in bootstrap_interval, whose images may be groups of images.
      images: how many there are (default: as many as groups).
    """
    count = len(gains if groups is None else np.unique(groups))
    images = images or count
    line = say("improvement {gain:+.1f}%p", gain=100 * gains.mean())
    if count == 1 < images:
        return "", line + say(", of one group of images: too few for an interval")
    if count == 1:
        return "", line + say(", of one image: too few for an interval")
    low, high = bootstrap_interval(gains, seed, groups)
    interval = say("95% interval {low:+.1f} to {high:+.1f}", low=100 * low, high=100 * high)
    over = say(" (paired bootstrap over {images} images)", images=images)
    if count < images:
        over = say(
            " (paired bootstrap over {groups} groups of {images} images)",
            groups=count, images=images,
        )  # fmt: skip
    line += ", " + interval + over
    if low <= 0 <= high:
        line += say("; it includes 0: could be chance")
    if count < FEW_IMAGES:
        line += say("; few images: take it as wider")
    return interval, line


def split_sentence(split: str, say: Language = ENGLISH) -> str:
    """Say how far a number that was measured on a split can be believed."""
    if split == "val":
        return say(
            "val chose the best epoch, so this flatters a little: "
            "download_dataset.py with --test-fraction 0.1 keeps images apart for it"
        )
    if split.endswith("folds"):
        return say(
            "folds: each image was measured by the model that had not seen it, after its last "
            "epoch, which was not chosen by it"
        )
    if split == "test":
        return say("test: no training has read these images, and no epoch was chosen by them")
    return say("train: the model has learnt these images")


def runs_sentence(path: Path, say: Language = ENGLISH) -> str:
    """Say how far apart trainings with other seeds came out; or that the file is not about that.

    path: of what train_sam2_proper.py --runs wrote.
    """
    try:
        ious = read_runs(path)
    except (OSError, ValueError, UserError):
        return say(
            "warning: {path} is not what train_sam2_proper.py --runs writes; it is left out",
            path=quoted(path),
        )
    (best, last), (best_spread, last_spread) = ious.mean(axis=0), ious.std(axis=0, ddof=1)
    lowest, highest = ious[:, 0].min(), ious[:, 0].max()
    return say(
        "{count} trainings with different seeds: val IoU best {best:.4f} ± {best_spread:.4f} "
        "({lowest:.4f} to {highest:.4f}), last {last:.4f} ± {last_spread:.4f}; "
        "the 95% interval over images does not contain this",
        count=len(ious), best=best, best_spread=best_spread, lowest=lowest, highest=highest,
        last=last, last_spread=last_spread,
    )  # fmt: skip
