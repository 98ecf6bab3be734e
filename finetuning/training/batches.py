"""The training images in random order, each with a random prompt, as batches for the decoder.

A step is prompted as SAM 2 is used: with a point, or with a box as roughly as people draw them,
and often with some corrective clicks after it, which depend on what the model has answered.
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
from torch.utils.data import DataLoader, Dataset, Sampler

from finetuning.basics import distributed
from finetuning.basics.image_files import read_image, require_equal_sizes
from finetuning.basics.threads import in_threads
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.prompts import Prompt
from finetuning.model.segmentation import Features
from finetuning.training.prompt_sampling import (
    RANDOM_POINTS,
    PromptMix,
    PromptPlan,
    draw_prompt,
    plan_prompts,
    scale_prompt,
)
from finetuning.training.training_masks import ALL, BACKGROUND, FEW, HALF, ImageMasks, pack_masks

PREFETCH = 2  # batches that each loading process has ready


class Step(NamedTuple):
    """One process's share of a training step: which objects of which images, in which epoch."""

    epoch: int
    indices: list[int]  # of this process's images
    fraction: float  # of the whole step's objects; 0 for a stand-in where there is none to do
    number: int = 0  # of the step in its epoch, alike in all processes
    objects: list[tuple[int, ...]] | None = None  # of each image; None: its first
    image_fraction: float = 1.0  # like fraction, of the whole step's images


class Batch(NamedTuple):
    """What one process has of a step: P objects of B images, each with a prompt and a true mask."""

    features: Features | None  # of the cache, float16; None where the images are to be encoded
    images: list[np.ndarray]  # HxWx3 uint8 RGB, where there is no cache
    image_of: list[int]  # of each object, which of the B images it is in
    prompts: list[Prompt]  # what the step starts with, in pixels of the model's SxS input
    plan: PromptPlan
    true_masks: torch.Tensor  # PxLOSS_GRIDxLOSS_GRID uint8: how much of each cell is covered
    fraction: float  # of the step, as in Step
    paths: Sequence[Path] = ()  # of the B images

    def parts(self, at_once: int) -> Iterator[Batch]:
        """Return the batch in parts of at most so many objects, each with its share of the step."""
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
    """Batches by Step.

    Prompts follow from the seed, the epoch, the step's number and the images alone: neither
    workers nor the cache change them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        cache: FeatureCache | None,
        image_size: int,
        seed: int,
        mix: PromptMix = RANDOM_POINTS,
    ) -> None:
        self.pairs, self.cache, self.image_size, self.seed = pairs, cache, image_size, seed
        self.mix = mix
        self._masks: dict[int, ImageMasks] = {}  # so far, by image

    def prepare(self) -> dict[int, int]:
        """Prepare the masks before training; return how many objects each image has that has any.

        The first process reads the files, each once, in threads, and every process keeps the
        masks: a kB or so for each object, and for an image's ALL and BACKGROUND, where the mix
        shows them: 20 to 60 MB for 20,000 images of one object. Images with more than a FEW objects
        are counted only. Raises UserError for a mask that is unreadable, or not of its image's
        size, and where all are empty.
        """
        everyone = range(len(self.pairs))
        found = distributed.from_first(
            lambda: in_threads(self._prepare, everyone, "Reading masks", "mask")
        )
        self._masks = dict(enumerate(found))
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
        numbers: list[int] = []
        if 0 < len(objects) <= FEW:
            numbers += range(len(objects))
            numbers += [ALL] * (self.mix.none_share > 0)
            numbers += [BACKGROUND] * (self.mix.background_share > 0)
        return pack_masks(objects, numbers)

    def __getitem__(self, step: Step) -> Batch | Exception:
        """Return the batch of a step, or why there is none, for BatchLoader to raise."""
        try:
            return self._load(step)
        except (UserError, OSError) as error:
            return error

    def _load(self, step: Step) -> Batch:
        epoch, indices, fraction, number, objects, image_fraction = step
        objects = objects or [(0,)] * len(indices)
        rng = np.random.default_rng([self.seed, epoch, len(self.pairs), number])
        plan = plan_prompts(self.mix, rng)
        if plan.kind == "none":  # nothing says which object is meant: it is all of them
            objects, fraction = [(ALL,)] * len(indices), image_fraction
        if plan.background and fraction:
            mine, images = sum(map(len, objects)), len(indices)
            fraction = (mine + images) / (mine / fraction + images / image_fraction)
            objects = [(*chosen, BACKGROUND) for chosen in objects]
        paths = [self.pairs[index].image for index in indices]
        features, images = None, []
        if self.cache is None:
            images = [read_image(path) for path in paths]
        elif self.cache.held_on is None:  # else BatchLoader adds them
            features = self.cache.read(paths)
        image_of, prompts, true_masks = [], [], []
        for i, (index, chosen) in enumerate(zip(indices, objects, strict=True)):
            size = images[i].shape[:2] if images else self.cache.size(paths[i])
            for k, mask in zip(chosen, self._masks_of(index, chosen, size), strict=True):
                grid = mask >= HALF
                if not grid.any():  # the background of an image that is full of objects
                    continue
                rng = np.random.default_rng([self.seed, epoch, index, k])
                prompt = draw_prompt(grid, plan.kind, rng)
                image_of.append(i)
                prompts.append(scale_prompt(prompt, grid.shape, self.image_size))
                true_masks.append(mask * np.uint8(k != BACKGROUND))
        true_masks = torch.from_numpy(np.stack(true_masks))
        return Batch(features, images, image_of, prompts, plan, true_masks, fraction, paths)

    def _masks_of(
        self, index: int, chosen: tuple[int, ...], size: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return masks of objects of an image of (H,W) on the grid of the loss.

        The mask file is read where one of them is not prepared yet.
        """
        pair, masks = self.pairs[index], self._masks.get(index)
        new = [k for k in chosen if masks is None or k not in masks.packed]
        if new:
            read = pack_masks(read_objects(pair), new)
            masks = read._replace(packed=(masks.packed if masks else {}) | read.packed)
            self._masks[index] = masks
        require_equal_sizes(pair.image, size, pair.mask, masks.size)
        return [masks.grid(k) for k in chosen]


class EpochSampler(Sampler):
    """The images of each epoch in random order, in batches, of which each process takes a share.

    Of an image's objects an epoch has at most so many, others in the next, in an order by seed.
    """

    def __init__(
        self, objects: dict[int, int], batch_size: int, seed: int, objects_per_image: int = 1
    ) -> None:
        """objects: how many each image has, by its index; batch_size: in images."""
        self.objects, self.batch_size, self.seed = objects, batch_size, seed
        self.objects_per_image = objects_per_image
        self.epoch = 1

    def __len__(self) -> int:
        return -(-len(self.objects) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(list(self.objects)).tolist()
        for number in range(len(self)):
            batch = [
                (index, self._draw(index))
                for index in order[number * self.batch_size :][: self.batch_size]
            ]
            mine = distributed.share(batch)
            fraction = _count(mine) / _count(batch)
            indices, objects = zip(*(mine or batch[:1]), strict=True)
            of_images = len(mine) / len(batch)
            yield Step(self.epoch, list(indices), fraction, number, list(objects), of_images)

    def _draw(self, index: int) -> tuple[int, ...]:
        """Return which of an image's objects this epoch has; in the end, all have had a turn."""
        count, most = self.objects[index], self.objects_per_image
        if count <= most:
            return tuple(range(count))
        order = np.random.default_rng([self.seed, 0, index, 0, 1]).permutation(count)
        turns = (np.arange(most) + (self.epoch - 1) * most) % count
        return tuple(sorted(order[turns].tolist()))


def _count(batch: list[tuple[int, tuple[int, ...]]]) -> int:
    return sum(len(objects) for _, objects in batch)


class BatchLoader(DataLoader):
    """A DataLoader that adds features held in memory, and raises errors of its worker processes.

    DataLoader itself would raise them with the worker's traceback as their message.
    """

    def __iter__(self) -> Iterator[Batch]:
        cache = self.dataset.cache
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            is_held = cache is not None and cache.held_on is not None
            yield batch._replace(features=cache.read(batch.paths)) if is_held else batch


def make_loader(
    training_set: TrainingSet, sampler: EpochSampler, device: torch.device
) -> BatchLoader:
    """Load batches ahead in other processes where the device would wait for them: Linux with CUDA.

    Elsewhere a process costs more to start, or takes a core from the decoder.
    """
    workers = 0
    if device.type == "cuda" and sys.platform == "linux":
        step = next(iter(sampler))
        workers = count_workers(_bytes_of(training_set[step]))
    return BatchLoader(
        training_set,
        sampler=sampler,
        batch_size=None,  # the sampler's steps are batches
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def count_workers(batch_bytes: int, shared_memory: Path = Path("/dev/shm")) -> int:
    """Return how many processes to load with: up to 4, one a core, and as shared memory allows.

    Their batches wait there: PREFETCH of each process, and two on their way to the GPU. Docker
    gives a container 64 MB of it.
    """
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0
    batches = free // (max(1, batch_bytes) * distributed.world_size())
    return int(np.clip((batches - 2) // PREFETCH, 0, min(4, os.cpu_count() or 1)))


def _bytes_of(batch: Batch | Exception) -> int:
    """Return the size of a batch's tensors and images."""
    if isinstance(batch, Exception):
        raise batch
    maps = [batch.features.image_embed, *batch.features.high_res_feats] if batch.features else []
    return sum(array.nbytes for array in (*maps, *batch.images, batch.true_masks))


def _as_it_is(batch: Batch | Exception) -> Batch | Exception:
    return batch
