"""Opening the feature cache for a run: on disk, in memory, or on a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from sam2_utils import UserError

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.basics.command_line import tell
from finetuning.basics.files import remove_abandoned
from finetuning.model.feature_cache import FeatureCache

CACHE_PLACES = ("auto", "gpu", "memory", "disk")
HELD_SHARE = 0.5  # of a GPU's free memory, at most, for features; training needs the rest


def check_room(cache: FeatureCache, images: list[Path], folder: Path) -> None:
    """Say how much will be written to a folder; raise UserError if it has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = cache.bytes_of(len(cache.missing(images))), shutil.disk_usage(folder).free
    if needed:
        tell(f"features: {needed / 1e9:.2f} GB to write to {folder} ({free / 1e9:.1f} GB free)")
    if needed > 0.98 * free:
        raise UserError(
            f"{folder} has room for {free / 1e9:.2f} GB of features, not for "
            f"{needed / 1e9:.2f} GB; make room, name a folder on another disk with --cache, or "
            "go on without them with --no-cache (slow)"
        )


def open_cache(
    predictor: SAM2ImagePredictor,
    folder: Path,
    precision: torch.dtype,
    images: dict[str, list[Path]],
    cache_in: str = "disk",
) -> FeatureCache:
    """Return the cache in a folder, after encoding what is not yet there.

    images: by the names of their splits.

    What killed runs left half-written is removed. cache_in: where to read features from, as in
    choose_place. Processes other than the first hold those of the train split only, since they do
    not validate.

    Raises UserError, before anything slow, where the disk has no room for what is to be encoded.
    """
    cache = FeatureCache(folder, predictor, precision)
    everyone = list(dict.fromkeys(image for of_split in images.values() for image in of_split))
    read_here = everyone if distributed.rank() == 0 else images.get("train", [])
    place = choose_place(cache_in, predictor.device, cache.bytes_of(len(read_here)))
    if distributed.rank() == 0:
        remove_abandoned(folder)
    cache.look_up(everyone)
    distributed.from_first(lambda: check_room(cache, everyone, folder))
    try:
        for split, of_split in images.items():
            cache.fill(of_split, predictor, split)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the images that are left")
        raise
    if place is not None:
        cache.hold(read_here, place)
    return cache


def choose_place(cache_in: str, device: torch.device, needed: int) -> torch.device | None:
    """Return the device whose memory holds features while a run lasts; None: they are read anew.

    cache_in: gpu, memory (the computer's), disk, or auto: a CUDA GPU that has room for them. There
    they need not be copied in each step; a CPU reads files about as fast as its memory, where the
    system keeps them. needed: their bytes. Raises UserError for a GPU that is not there.
    """
    if cache_in == "gpu" and device.type == "cpu":
        raise UserError("--cache-in gpu: this run has no GPU; use --cache-in auto")
    if cache_in == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return device if needed < HELD_SHARE * free else None
    return {"gpu": device, "memory": torch.device("cpu")}.get(cache_in)
