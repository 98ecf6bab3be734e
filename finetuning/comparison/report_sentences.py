"""The sentences below a comparison's box: what was measured, and how reliable it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief
from finetuning.basics.language import say
from finetuning.basics.run_outputs import read_runs
from finetuning.evaluation.measuring import Comparison, Result, find_in_empty
from finetuning.evaluation.seen_images import Overlap
from finetuning.segmentation.clean_masks import NO_CLEANING, describe_cleaning
from finetuning.segmentation.views import View


def count_sentence(results: list[Result]) -> str:
    """Return how many images, or objects in images, got better and how many worse."""
    gains = np.array([result.gain for result in results])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    counts = {"better": better, "equal": len(gains) - better - worse, "worse": worse}
    images = len({result.index for result in results})
    if images < len(results):
        return say(
            "{count} objects in {images} images: {better} better, {equal} equal, {worse} worse",
            count=len(results), images=images, **counts,
        )  # fmt: skip
    return say(
        "{count} images: {better} better, {equal} equal, {worse} worse", count=images, **counts
    )


def recordings_sentence(results: list[Result], split: str) -> list[str]:
    """Return what numbers on frames of recordings that were split in time do not say."""
    images = {result.index: result.pair.recording for result in results}
    count = sum(map(bool, images.values()))
    if not count or split == "train":
        return []
    return [
        say(
            "{count} of these {images} images are frames of recordings that also have frames in "
            "train: neither the numbers nor the interval show how good the model is on other "
            "recordings",
            count=count, images=len(images),
        )
    ]  # fmt: skip


def split_sentences(split: str, overlap: Overlap) -> list[str]:
    """Return what makes numbers on a split reliable, and what makes them doubtful."""
    images, sentences = overlap.images, []
    is_unseen = overlap.is_known and not overlap.trained_on
    # First what speaks for the numbers, then what speaks against them
    if split == "val" and not overlap.trained_on:
        text = say(
            "val: the best epoch was chosen on these images, so this is slightly optimistic; "
            "download_dataset.py --test-fraction 0.1 sets a test split aside"
        )
        sentences.append(text)
    if split.endswith("folds") and is_unseen:
        text = say(
            "folds: each image was measured by the model that had not seen it, after that "
            "model's last epoch; no epoch was chosen on it"
        )
        sentences.append(text)
    if split == "test" and is_unseen and not overlap.validated_on:
        text = say("test: no training has read these images, and no epoch was chosen by them")
        sentences.append(text)
    if split == "train" and overlap.trained_on == images:
        sentences.append(say("train: the model was trained on these images"))
    elif overlap.trained_on:
        text = say(
            "warning: the model was trained on {count} of these {images} images; these "
            "numbers do not show how good it is on new images",
            count=overlap.trained_on, images=images,
        )  # fmt: skip
        sentences.append(text)
    if split == "test" and overlap.validated_on:
        text = say(
            "the best epoch was chosen on {count} of these {images} images",
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
            "it is not known whether the model was trained on these images: its file, or that of "
            "the model it started from, has no complete record"
        )
        sentences.append(text)
    return sentences


def cleaning_sentences(comparisons: list[Comparison]) -> list[str]:
    """Return how the masks are cleaned; the models of folds may differ in that."""
    found = dict.fromkeys(comparison.models[-1].cleaning for comparison in comparisons)
    return [
        say(
            "the masks of both models are cleaned: {changes}; --clean off leaves them as they are",
            changes=describe_cleaning(cleaning),
        )
        for cleaning in found
        if cleaning != NO_CLEANING
    ]


def describe_empty(comparisons: list[Comparison], prompt_kind: str, mask_kind: str) -> list[str]:
    """Return a sentence on the images without an object, if there are any.

    It counts them and, without a prompt, those in which the models find something all the same.
    """
    count, found = 0, []
    for models, pairs, results in comparisons:
        measured = {result.pair.image for result in results}
        empty = [pair for pair in pairs if pair.image not in measured]
        count += len(empty)
        # A point or a box needs an object
        if prompt_kind == "none":
            found += find_in_empty(models, empty, mask_kind)
    counts = np.sum(found, axis=0).astype(int).tolist()  # 0 if nothing was measured
    return [empty_sentence(count, counts or [])] if count else []


def describe_views(views: tuple[View, ...]) -> list[str]:
    """Return a sentence that says that masks of several views were averaged, if they were."""
    if len(views) == 1:
        return []
    return [
        say(
            "both models: each mask is the average for {count} mirrored views of the image",
            count=len(views),
        )
    ]


def empty_sentence(count: int, found: Sequence[int]) -> str:
    """Return how many images have no object, and in how many of them the models find one.

    found: the number for the original and for the fine-tuned model; empty if not measured.
    """
    if not found:
        return say("{count} more images have no object and are not measured", count=count)
    original, finetuned = found
    return say(
        "{count} more images have no object; the original finds something in {original} of them, "
        "the fine-tuned model in {finetuned}",
        count=count, original=original, finetuned=finetuned,
    )  # fmt: skip


def runs_sentence(path: Path) -> str:
    """Return the spread of training runs with different seeds, or a warning that it is unreadable.

    path: the table that train_sam2_proper.py --runs writes.
    """
    try:
        ious = read_runs(path)
    except (OSError, ValueError, UserError):
        return say(
            "warning: {path} was not written by train_sam2_proper.py --runs; it is ignored",
            path=brief(path),
        )
    (best, last), (best_spread, last_spread) = ious.mean(axis=0), ious.std(axis=0, ddof=1)
    lowest, highest = ious[:, 0].min(), ious[:, 0].max()
    return say(
        "{count} training runs with different seeds: val IoU best {best:.4f} ± {best_spread:.4f} "
        "({lowest:.4f} to {highest:.4f}), last {last:.4f} ± {last_spread:.4f}; "
        "the 95% interval over images does not include this spread",
        count=len(ious), best=best, best_spread=best_spread, lowest=lowest, highest=highest,
        last=last, last_spread=last_spread,
    )  # fmt: skip
