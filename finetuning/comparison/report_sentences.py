"""The sentences below a comparison's box: what was measured, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief
from finetuning.basics.language import ENGLISH, Language
from finetuning.basics.run_outputs import read_runs
from finetuning.evaluation.measuring import Result
from finetuning.evaluation.seen_images import Overlap


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
            path=brief(path),
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
