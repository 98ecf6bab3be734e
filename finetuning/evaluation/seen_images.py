"""Which images a model has seen in training: recorded in its file and counted in a comparison.

Images and masks are identified by the SHA-256 of their files, so that an image that the model was
trained on is recognised under another name and in another split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.files import hash_contents
from finetuning.dataset.pairs import Pair
from finetuning.model.checkpoints import setting
from finetuning.model.models import is_published

SEEN = "seen"  # the record, among the settings of a model's file

Contents = list[list[str]]  # one [image hash, hash of the masks] per pair


def hash_files(pairs: Iterable[Pair]) -> dict[Path, str]:
    """Return the SHA-256 of each image file and mask file."""
    return hash_contents(path for pair in pairs for path in (pair.image, *pair.mask_files()))


def pair_contents(pair: Pair, hashes: Mapping[Path, str]) -> list[str]:
    """Return the hash of a pair's image and of its mask; several masks share one hash."""
    masks = [hashes[path] for path in pair.mask_files()]
    joined = hashlib.sha256(" ".join(masks).encode()).hexdigest()
    return [hashes[pair.image], masks[0] if len(masks) == 1 else joined]


def seen_before(facts: dict[str, Any], checkpoint: Path) -> Contents | None:
    """Return what the start model of a training was trained on; None: unknown.

    facts: as from load_predictor. SAM 2.1's published files and mini have seen none of a user's
    images.
    """
    record = setting(facts, SEEN, dict)
    if record is None:
        return None if is_published(checkpoint, facts["model_name"]) is False else []
    before, train = _contents(record, "before"), _contents(record, "train")
    return None if None in (before, train) else [*before, *train]


def record_seen(
    pairs: dict[str, list[Pair]], hashes: Mapping[Path, str], before: Contents | None
) -> dict[str, Any]:
    """Return the record of a training on the train and val pairs.

    hashes: as from hash_files. before: as from seen_before.
    """
    contents = {
        split: [pair_contents(pair, hashes) for pair in part] for split, part in pairs.items()
    }
    return {"before": before, **contents}


class Overlap(NamedTuple):
    """The number of compared images that a model has seen in training."""

    images: int  # compared
    trained_on: int = 0
    validated_on: int = 0  # not trained on, but used to choose the best epoch
    changed_masks: int = 0  # seen, but with other masks than now
    is_known: bool = True  # False: the model's file does not record all its training images


def count_overlap(pairs: Sequence[Pair], facts: dict[str, Any]) -> Overlap:
    """Count the pairs that a fine-tuned model has seen; facts: as from load_predictor."""
    record = setting(facts, SEEN, dict) or {}
    before, train, val = (_contents(record, name) for name in ("before", "train", "val"))
    is_known = None not in (before, train, val)
    learnt, validated = [*(before or []), *(train or [])], val or []
    learnt_images, validated_images = (
        {image for image, _ in contents} for contents in (learnt, validated)
    )
    # A known image in a pair that is not known has a new mask
    seen = set(map(tuple, [*learnt, *validated]))
    trained_on = validated_on = changed = 0
    hashes = hash_files(pairs)
    for pair in pairs:
        image, mask = pair_contents(pair, hashes)
        trained_on += image in learnt_images
        validated_on += image in validated_images - learnt_images
        is_seen = image in learnt_images or image in validated_images
        changed += is_seen and (image, mask) not in seen
    return Overlap(len(pairs), trained_on, validated_on, changed, is_known)


def add_overlaps(overlaps: Sequence[Overlap]) -> Overlap:
    """Return the summed counts of several models, each with its own images."""
    *counts, are_known = zip(*overlaps, strict=True)
    return Overlap(*map(sum, counts), all(are_known))


def require_unseen(overlap: Overlap, model_name: str) -> None:
    """Raise UserError if the model was trained on test images; model_name is for the message."""
    if overlap.trained_on:
        raise UserError(
            f"{model_name} was trained on {overlap.trained_on} of these {overlap.images} test "
            "images; train again on this split, or add --allow-seen to measure them anyway"
        )


def _contents(record: dict[str, Any], name: str) -> Contents | None:
    """Return a part of a record; None: missing or malformed, since a file may hold anything."""
    rows = record.get(name)
    are_pairs = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)
        for row in rows
    )
    return rows if are_pairs else None
