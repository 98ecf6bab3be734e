"""Encode the images of a training and their variants, once each."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.command_line import tell
from finetuning.dataset.pairs import Pair
from finetuning.model.cache_places import fill_cache
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.image_variants import CachedImage
from finetuning.model.model import FeatureSource
from finetuning.training_data.augmentation import (
    NO_AUGMENT,
    Augment,
    Augmentation,
    Drawn,
    auto_number,
    draw_variants,
    images_of,
)

DISK_SHARE = 0.5  # largest share of a disk's free space that auto writes to


def open_features(
    predictor: SAM2ImagePredictor,
    precision: torch.dtype,
    folder: Path | None,
    cache_in: str,
    pairs: dict[str, list[Pair]],
    augment: Augment = NO_AUGMENT,
) -> tuple[FeatureSource, Augmentation]:
    """Encode the images that the cache folder lacks, and variants of those of the train split.

    Returns where to get all features, and how the training images are shown: an augmentation whose
    number is no longer auto, unless folder is None. Then there is no cache, the images are encoded
    whenever they are needed, and each epoch draws new variants.
    """
    if not folder:
        return FeatureSource(predictor, precision), Augmentation(augment)
    cache = FeatureCache(folder, predictor, precision)
    images = {split: [pair.image for pair in found] for split, found in pairs.items()}
    number, train = augment.number, pairs["train"]
    wanted = {"auto": auto_number(len(train)), "off": 1}.get(number, number)
    further = draw_variants(train, wanted, augment.turns)
    if number == "auto":
        plain = [image for of_split in images.values() for image in of_split]
        number = _number_that_fits(cache, plain, train, further)
        if number < 1 + max(map(len, further), default=0):
            tell(
                f"augmentation: {number} of {wanted} variants of each image, as the disk of "
                f"{folder} is nearly full; --cache names a folder on another one"
            )
        further = [of_image[: number - 1] for of_image in further]
    fill_cache(cache, predictor, images, cache_in, variants=images_of(train, further))
    augmentation = Augmentation(augment._replace(number=number), further)
    return FeatureSource(predictor, precision, cache), augmentation


def _number_that_fits(
    cache: FeatureCache,
    images: list[CachedImage],
    pairs: list[Pair],
    further: list[list[Drawn]],
) -> int:
    """Return how many variants of each image fit into DISK_SHARE of a disk's space; at least 1.

    The space is what is free, and what their features take already, so that a second run with the
    same options has as many. images: those that are encoded in any case.
    """
    most = 1 + max(map(len, further), default=0)

    def up_to(number: int) -> list[CachedImage]:
        return [*images, *images_of(pairs, [of_image[: number - 1] for of_image in further])]

    def find() -> int:
        cached = len(set(up_to(most))) - len(cache.missing(up_to(most)))
        free = shutil.disk_usage(cache.folder).free
        room = DISK_SHARE * (free + cache.size_in_bytes(cached))
        for number in range(most, 1, -1):
            images = up_to(number)
            if cache.size_in_bytes(len(set(images))) <= room or not cache.missing(images):
                return number
        return 1

    if most == 1:
        return 1
    cache.folder.mkdir(parents=True, exist_ok=True)
    cache.look_up(up_to(most))
    return distributed.from_first(find)
