"""Open the feature cache for a run, and choose where its features are held.

Features are always cached on disk. While a run lasts, they can also be held in the memory of the
computer or of a GPU, so that no step reads or copies them again (--cache-in).
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from sam2_utils import UserError

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.command_line import tell
from finetuning.basics.files import remove_abandoned
from finetuning.model.feature_cache import CachedImage, FeatureCache
from finetuning.model.image_variants import ImageVariant

CACHE_PLACES = ("auto", "gpu", "memory", "disk")
MEASURED = 4  # images that are encoded to estimate the time of the others
HELD_SHARE = 0.5  # largest share of a GPU's free memory for features; training needs the rest


def check_room(cache: FeatureCache, images: list[CachedImage], folder: Path) -> None:
    """Print how much will be written to the folder; raise UserError if its disk is too small."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = cache.size_in_bytes(len(cache.missing(images))), shutil.disk_usage(folder).free
    if needed:
        tell(f"features: {needed / 1e9:.2f} GB to write to {folder} ({free / 1e9:.1f} GB free)")
    if needed > 0.98 * free:
        raise UserError(
            f"{folder} has room for {free / 1e9:.2f} GB of features, not for "
            f"{needed / 1e9:.2f} GB; make room, name a folder on another disk with --cache, or "
            "run without a cache with --no-cache (slow)"
        )


def open_cache(
    predictor: SAM2ImagePredictor,
    folder: Path,
    precision: torch.dtype,
    images: dict[str, list[CachedImage]],
    cache_in: str = "disk",
) -> FeatureCache:
    """Return the cache in a folder, after encoding the images that are missing, as fill_cache."""
    cache = FeatureCache(folder, predictor, precision)
    fill_cache(cache, predictor, images, cache_in)
    return cache


def fill_cache(
    cache: FeatureCache,
    predictor: SAM2ImagePredictor,
    images: dict[str, list[CachedImage]],
    cache_in: str = "disk",
    variants: Sequence[ImageVariant] = (),
) -> None:
    """Encode the images that are missing.

    Incomplete files of killed runs are removed. Raises UserError, before anything slow, if the disk
    has no room for the features.

    Arguments:
      images: the images of each split, by its name.
      cache_in: where features are read from, as in choose_place.
      variants: of images of the train split; encoded last.
    """
    plain = list(dict.fromkeys(itertools.chain.from_iterable(images.values())))
    all_images = [*plain, *variants]
    # Only the first process validates; the others read the train split alone
    read_here = [*images.get("train", []), *variants]
    read_here = all_images if distributed.rank() == 0 else read_here
    place = choose_place(cache_in, predictor.device, cache.size_in_bytes(len(read_here)))
    if distributed.rank() == 0:
        remove_abandoned(cache.folder)
    cache.look_up(all_images)
    distributed.from_first(lambda: check_room(cache, all_images, cache.folder))
    try:
        count, start = len(cache.missing(plain)), time.perf_counter()
        for split, split_images in images.items():
            cache.fill(split_images, predictor, split)
        seconds = (time.perf_counter() - start) / count if count else None
        fill_variants(cache, predictor, variants, seconds)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to encode the remaining images")
        raise
    if place is not None:
        cache.hold(read_here, place)


def fill_variants(
    cache: FeatureCache,
    predictor: SAM2ImagePredictor,
    variants: Sequence[ImageVariant],
    seconds: float | None,
) -> None:
    """Encode the variants that are missing; first print how many there are and what they cost.

    seconds: what encoding an image has taken; None: measure it.
    """
    missing = cache.missing(variants)
    if not missing:
        return
    if seconds is None:
        start, few = time.perf_counter(), missing[:MEASURED]
        cache.fill(few, predictor, "the first variants")
        seconds = (time.perf_counter() - start) / len(few)
    gigabytes, minutes = cache.size_in_bytes(len(missing)) / 1e9, seconds * len(missing) / 60
    tell(
        f"augmentation: {len(missing)} variants of the training images to encode, once "
        f"({gigabytes:.2f} GB, about {minutes:.1f} minutes); --augment off does without"
    )
    cache.fill(missing, predictor, "variants")


def choose_place(cache_in: str, device: torch.device, needed: int) -> torch.device | None:
    """Return the device whose memory holds the features during a run; None: read files each time.

    cache_in: gpu, memory (the computer's), disk, or auto: the GPU, if it is a CUDA GPU with enough
    free memory, else disk. needed: the size of the features in bytes. Raises UserError if there
    is no GPU.
    """
    if cache_in == "gpu" and device.type == "cpu":
        raise UserError("--cache-in gpu: this run has no GPU; use --cache-in auto")
    # A GPU saves a copy in each step. A CPU gains nothing: the system keeps the files in memory.
    if cache_in == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return device if needed < HELD_SHARE * free else None
    return {"gpu": device, "memory": torch.device("cpu")}.get(cache_in)
