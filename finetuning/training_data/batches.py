"""Training data: images in random order with random prompts, as batches for the decoder.

Steps are prompted as users prompt SAM 2: with a point or a roughly drawn box, often followed by
clicks that correct the model's answer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetuning.basics import distributed
from finetuning.basics.image_files import read_image, require_equal_sizes
from finetuning.basics.threads import in_threads
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.image_variants import file_of
from finetuning.segmentation.predicting import Features
from finetuning.segmentation.prompts import Prompt
from finetuning.training_data.augmentation import (
    UNCHANGED,
    Augmentation,
    Shown,
    Variant,
    turn_features,
    visible_objects,
)
from finetuning.training_data.epoch_sampling import EpochSampler, Step
from finetuning.training_data.prompt_sampling import (
    RANDOM_POINTS,
    PromptMix,
    PromptPlan,
    draw_prompt,
    plan_prompts,
    scale_prompt,
)
from finetuning.training_data.thin_objects import object_cells
from finetuning.training_data.training_masks import (
    ALL_OBJECTS,
    BACKGROUND,
    IMAGE,
    LOSS_GRID,
    MAX_PREPARED,
    ImageMasks,
    pack_masks,
)

PREFETCH = 2  # batches that each worker process loads ahead


class Batch(NamedTuple):
    """One process's part of a step: P objects of B images, each with a prompt and a true mask."""

    features: Features | None  # cached, float16; None: encode the images
    images: list[np.ndarray]  # HxWx3 uint8 RGB; empty if there is a cache
    image_of: list[int]  # the index of each object's image, 0 to B-1
    prompts: list[Prompt]  # before any clicks, in pixels of the model's SxS input
    plan: PromptPlan
    # PxGxG uint8, 255: the mask covers all of a cell; or, on the pixels of the images, a list
    true_masks: torch.Tensor | list[torch.Tensor]
    fraction: float  # this part of the step, as in Step
    shown: Sequence[Shown] = ()  # the B images, and how the step shows them
    is_on_images: bool = False  # whether masks and prompts are in pixels of the images

    def prompt_sizes(self, image_size: int) -> list[tuple[int, int]]:
        """Return the (H,W) in whose pixels each prompt is. image_size: of the model's input."""
        if self.is_on_images:
            return [tuple(mask.shape) for mask in self.true_masks]
        return [(image_size, image_size)] * len(self.prompts)

    def parts(self, at_once: int) -> Iterator[Batch]:
        """Yield parts of at most `at_once` objects, each with its fraction of the step."""
        for first in range(0, len(self.prompts), at_once):
            rows = slice(first, first + at_once)
            prompts = self.prompts[rows]
            yield self._replace(
                image_of=self.image_of[rows],
                prompts=prompts,
                true_masks=self.true_masks[rows],
                fraction=self.fraction * len(prompts) / len(self.prompts),
            )


class TrainingSet(Dataset):
    """Loads the batch of a Step.

    Prompts and variants depend only on the seed, the epoch, the step's number and the images, so
    worker processes do not change them. Without a cache, each epoch draws new variants.
    """

    def __init__(
        self,
        pairs: list[Pair],
        cache: FeatureCache | None,
        image_size: int,
        seed: int,
        mix: PromptMix = RANDOM_POINTS,
        augmentation: Augmentation = UNCHANGED,
        loss_grid: int | str = LOSS_GRID,
    ) -> None:
        """loss_grid: cells per side of the true masks, or IMAGE."""
        self.pairs, self.cache, self.image_size, self.seed = pairs, cache, image_size, seed
        self.mix, self.augmentation, self.loss_grid = mix, augmentation, loss_grid
        self._masks: dict[int, ImageMasks] = {}  # by image; filled by prepare and when needed
        self._variant_masks: dict[tuple[int, Variant], ImageMasks] = {}  # filled when needed

    def prepare(self) -> dict[int, int]:
        """Read the masks; return the number of objects of each image that has any, by its index.

        The first process reads each file once and sends the packed masks to all: about a kB each,
        20 to 60 MB for 20,000 images with one object. Raises UserError for a mask that is
        unreadable or not of its image's size, and if all masks are empty.
        """
        indices = range(len(self.pairs))
        masks = distributed.from_first(
            lambda: in_threads(self._prepare, indices, "Reading masks", "mask")
        )
        self._masks = dict(enumerate(masks))
        counts = {index: masks.count for index, masks in self._masks.items() if masks.count}
        if not counts:
            raise UserError("every training mask is empty; check that objects are white (255)")
        if skipped := len(self.pairs) - len(counts):
            print(f"skipped {skipped} of {len(self.pairs)} training images: their masks are empty")
        return counts

    def _prepare(self, index: int) -> ImageMasks:
        pair = self.pairs[index]
        objects = read_objects(pair)
        size = self.cache.size(pair.image) if self.cache else None
        require_equal_sizes(pair.image, size or objects.size, pair.mask, objects.size)
        if not 0 < len(objects) <= MAX_PREPARED:
            return pack_masks(objects, [], self.loss_grid)
        combined = [ALL_OBJECTS] * (self.mix.none_share > 0)
        combined += [BACKGROUND] * (self.mix.background_share > 0)
        return pack_masks(objects, [*range(len(objects)), *combined], self.loss_grid)

    def __getitem__(self, step: Step) -> Batch | Exception:
        """Return the batch of a step, or the error that prevents it, which BatchLoader raises."""
        try:
            return self._load(step)
        except (UserError, OSError) as error:
            return error

    def _load(self, step: Step) -> Batch:
        epoch, indices, fraction, number, objects, image_fraction = step
        objects = objects or [(0,)] * len(indices)
        # No image has the index len(self.pairs), so this stream differs from those of the objects
        rng = np.random.default_rng([self.seed, epoch, len(self.pairs), number])
        plan = plan_prompts(self.mix, rng)
        # Without a prompt, the answer is one mask per image, of all its objects together
        if plan.kind == "none":
            objects, fraction = [(ALL_OBJECTS,)] * len(indices), image_fraction
        # Background adds a point per image. The whole step has mine / fraction objects in
        # images / image_fraction images, from which the new fraction follows
        if plan.background and fraction:
            mine, images = sum(map(len, objects)), len(indices)
            fraction = (mine + images) / (mine / fraction + images / image_fraction)
            objects = [(*chosen, BACKGROUND) for chosen in objects]
        shown = [
            self.augmentation.show(self.pairs[index], index, epoch, self.seed) for index in indices
        ]
        features, images, sizes = self._read(shown)
        image_of, prompts, true_masks = [], [], []
        is_on_images = self.loss_grid == IMAGE
        for i, (index, chosen) in enumerate(zip(indices, objects, strict=True)):
            masks = self._masks_of(index, chosen, sizes[i], shown[i])
            for k, mask in zip(chosen, masks, strict=True):
                grid = object_cells(mask)
                if not grid.any():  # objects cover the whole image: it has no background
                    continue
                # A stream per object: its prompt does not depend on which others the step shows
                rng = np.random.default_rng([self.seed, epoch, index, k])
                prompt = draw_prompt(grid, plan.kind, rng)
                image_of.append(i)
                to = grid.shape if is_on_images else (self.image_size,) * 2
                prompts.append(scale_prompt(prompt, grid.shape, to))
                true_masks.append(mask * np.uint8(k != BACKGROUND))  # background: no object
        if is_on_images:
            true_masks = [torch.from_numpy(mask) for mask in true_masks]
        else:
            true_masks = torch.from_numpy(np.stack(true_masks))
        batch = Batch(features, images, image_of, prompts, plan, true_masks, fraction, shown)
        return batch._replace(is_on_images=is_on_images)

    def _read(
        self, shown: list[Shown]
    ) -> tuple[Features | None, list[np.ndarray], list[tuple[int, int]]]:
        """Return the cached features or the images of a batch, and the (H,W) of each image file.

        Features held in memory are added by BatchLoader.
        """
        files = [file_of(one.image) for one in shown]
        if self.cache is not None:
            features = None if self.cache.held_on is not None else read_features(self.cache, shown)
            return features, [], [self.cache.size(path) for path in files]
        images = [read_image(path) for path in files]
        seen = [one.of_array(image) for one, image in zip(shown, images, strict=True)]
        return None, seen, [image.shape[:2] for image in images]

    def _masks_of(
        self, index: int, chosen: tuple[int, ...], size: tuple[int, int], shown: Shown
    ) -> list[np.ndarray]:
        """Return the masks of chosen objects of an image of (H,W) on the grid, as it is shown.

        Other objects replace those that the variant hides.
        """
        pair, variant = self.pairs[index], shown.variant
        known, key = (self._variant_masks, (index, variant)) if variant else (self._masks, index)
        masks, objects = known.get(key), None
        if shown.hidden:
            count = masks.count if masks else len(objects := read_objects(pair))
            chosen = visible_objects(chosen, shown.hidden, count)
        new = [k for k in chosen if masks is None or k not in masks.packed]
        if new:
            objects = objects or read_objects(pair)
            change = variant.of_mask if variant else None
            read = pack_masks(objects, new, self.loss_grid, change)
            masks = read._replace(packed=(masks.packed if masks else {}) | read.packed)
            if not self.augmentation.draws_anew:  # else no other epoch shows this variant
                known[key] = masks
        require_equal_sizes(pair.image, size, pair.mask, masks.size)
        return [shown.view.of_array(masks.grid(k)) for k in chosen]


def read_features(cache: FeatureCache, shown: Sequence[Shown]) -> Features:
    """Return the cached features of images as a step shows them."""
    features = cache.read([one.image for one in shown])
    return turn_features(features, [one.view for one in shown])


class BatchLoader(DataLoader):
    """A DataLoader that adds features held in memory and raises its workers' errors unchanged.

    A plain DataLoader replaces their message with the worker's traceback.
    """

    def __iter__(self) -> Iterator[Batch]:
        cache = self.dataset.cache
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            if cache is not None and cache.held_on is not None:
                batch = batch._replace(features=read_features(cache, batch.shown))
            yield batch


def make_loader(
    training_set: TrainingSet, sampler: EpochSampler, device: torch.device
) -> BatchLoader:
    """Return a loader of the training set's batches, with worker processes on Linux with CUDA.

    Elsewhere workers take longer to start, or take a core from the decoder.
    """
    workers = 0
    if device.type == "cuda" and sys.platform == "linux":
        step = next(iter(sampler))
        workers = count_workers(_batch_bytes(training_set[step]))
    return BatchLoader(
        training_set,
        sampler=sampler,
        batch_size=None,  # the sampler's steps are batches
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def count_workers(batch_bytes: int, shared_memory: Path = Path("/dev/shm")) -> int:
    """Return the number of worker processes: up to 4, one per core, if shared memory allows.

    It holds PREFETCH batches of each worker and two more on their way to the GPU. Docker gives a
    container only 64 MB of shared memory.
    """
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0
    batches = free // (max(1, batch_bytes) * distributed.world_size())
    return int(np.clip((batches - 2) // PREFETCH, 0, min(4, os.cpu_count() or 1)))


def _batch_bytes(batch: Batch | Exception) -> int:
    """Return the bytes of a batch's tensors and images; raise the error if it is one."""
    if isinstance(batch, Exception):
        raise batch
    maps = [batch.features.image_embed, *batch.features.high_res_feats] if batch.features else []
    return sum(array.nbytes for array in (*maps, *batch.images, *batch.true_masks))


def _unchanged(batch: Batch | Exception) -> Batch | Exception:
    return batch
