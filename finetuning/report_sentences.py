"""The sentences below a comparison's box: what was measured, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import quoted
from finetuning.basics.language import ENGLISH, Language
from finetuning.basics.run_outputs import read_runs
from finetuning.evaluation import Result, bootstrap_interval
from finetuning.seen_images import Overlap

FEW_IMAGES = 20  # below it, bootstrap intervals are clearly too narrow


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


def split_sentences(split: str, overlap: Overlap, say: Language = ENGLISH) -> list[str]:
    """Say how far a number that was measured on a split can be believed, and what is against it."""
    images, sentences = overlap.images, []
    is_unseen = overlap.is_known and not overlap.trained_on
    if split == "val" and not overlap.trained_on:
        text = say(
            "val chose the best epoch, so this flatters a little: "
            "download_dataset.py with --test-fraction 0.1 keeps images apart for it"
        )
        sentences.append(text)
    if split.endswith("folds") and is_unseen:
        text = say(
            "folds: each image was measured by the model that had not seen it, after its last "
            "epoch, which was not chosen by it"
        )
        sentences.append(text)
    if split == "test" and is_unseen and not overlap.validated_on:
        text = say("test: no training has read these images, and no epoch was chosen by them")
        sentences.append(text)
    if split == "train" and overlap.trained_on == images:
        sentences.append(say("train: the model has learnt these images"))
    elif overlap.trained_on:
        text = say(
            "warning: the model was trained on {count} of these {images} images; how good it is "
            "on new images this does not say",
            count=overlap.trained_on, images=images,
        )  # fmt: skip
        sentences.append(text)
    if split == "test" and overlap.validated_on:
        text = say(
            "the best epoch was chosen by {count} of these {images} images",
            count=overlap.validated_on, images=images,
        )  # fmt: skip
        sentences.append(text)
    if overlap.changed_masks:
        text = say(
            "warning: the masks of {count} of these {images} images have changed since training",
            count=overlap.changed_masks, images=images,
        )  # fmt: skip
        sentences.append(text)
    if not overlap.is_known:
        text = say(
            "whether the model was trained on these images is not known in full: its file, or "
            "that of the model it started from, does not say"
        )
        sentences.append(text)
    return sentences


def empty_sentence(count: int, found: Sequence[int], say: Language = ENGLISH) -> str:
    """Say how many images without an object there are, and in how many of them one is found.

    found: by the original and by the fine-tuned model; empty where this was not measured.
    """
    if not found:
        return say("{count} more images have no object, and are not measured", count=count)
    original, finetuned = found
    return say(
        "{count} more images have no object; the original finds something in {original} of them, "
        "the fine-tuned model in {finetuned}",
        count=count, original=original, finetuned=finetuned,
    )  # fmt: skip


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
