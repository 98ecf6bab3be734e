"""The training images in random order, each with a random prompt, as batches for the decoder.

A step is prompted as SAM 2 is used: with a point, or with a box as roughly as people draw them,
and often with some corrective clicks after it, which depend on what the model has answered.
"""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetuning import distributed
from finetuning.feature_cache import FeatureCache, pairs_with_objects
from finetuning.image_files import read_mask
from finetuning.pairs import Pair, read_pair, require_equal_sizes
from finetuning.prompts import Prompt, PromptPlan, draw_prompt, plan_prompts
from finetuning.segmentation import Features

LOSS_GRID = 256  # what the loss is measured on, in cells a side: full-size models' own resolution
PREFETCH = 2  # batches that each loading process has ready


class Step(NamedTuple):
    """One process's share of a training step: which images, in which epoch."""

    epoch: int
    indices: list[int]  # of this process's images
    fraction: float  # of the whole step's images; 0 for a stand-in where there is none to do
    number: int = 0  # of the step in its epoch, alike in all processes


class Batch(NamedTuple):
    """What one process has of a step: B images, each with a prompt and its true mask."""

    features: Features | None  # of the cache, float16; None where the images are to be encoded
    images: list[np.ndarray]  # HxWx3 uint8 RGB, where there are no features
    prompts: list[Prompt]  # what the step starts with, in pixels of the model's SxS input
    plan: PromptPlan
    true_masks: list[torch.Tensor]  # float32 in [0, 1]: LOSS_GRID a side, or HxW with images
    fraction: float  # of the step, as in Step


class TrainingSet(Dataset):
    """Batches by Step.

    Prompts are drawn on the grid of the model's input. They follow from the seed, the epoch, the
    step's number and the images alone: neither workers nor the cache change them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        cache: FeatureCache | None,
        image_size: int,
        seed: int,
        prompt_mix: str = "random",
    ) -> None:
        self.pairs, self.cache, self.image_size, self.seed = pairs, cache, image_size, seed
        self.prompt_mix = prompt_mix
        self._grids: dict[int, bytes] = {}  # of the masks read so far, packed; a few kB each

    def __getitem__(self, step: Step) -> Batch | Exception:
        """Return the batch of a step, or why there is none, for BatchLoader to raise."""
        try:
            return self._load(step)
        except (UserError, OSError) as error:
            return error

    def _load(self, step: Step) -> Batch:
        epoch, indices, fraction, number = step
        rng = np.random.default_rng([self.seed, epoch, len(self.pairs), number])
        plan = plan_prompts(self.prompt_mix, rng)
        if self.cache is not None:
            features, images = self.cache.read([self.pairs[index].image for index in indices]), []
            grids = [self._grid(index) for index in indices]
            true_masks = [_shrink(grid, LOSS_GRID) for grid in grids]
        else:
            examples = [read_pair(self.pairs[index]) for index in indices]
            features, images = None, [image for image, _ in examples]
            grids = [mask_on_grid(mask, self.image_size) for _, mask in examples]
            true_masks = [mask.astype(np.float32) for _, mask in examples]
        prompts = [
            draw_prompt(grid, plan.kind, np.random.default_rng([self.seed, epoch, index]))
            for index, grid in zip(indices, grids, strict=True)
        ]
        true_masks = list(map(torch.from_numpy, true_masks))
        return Batch(features, images, prompts, plan, true_masks, fraction)

    def _grid(self, index: int) -> np.ndarray:
        """Return the mask on the grid of an image in the cache; its file is read once only."""
        size = self.image_size
        if index not in self._grids:
            pair = self.pairs[index]
            mask = read_mask(pair.mask)
            image_size = self.cache.size(pair.image)
            require_equal_sizes(pair.image, image_size, pair.mask, mask.shape)
            self._grids[index] = zlib.compress(np.packbits(mask_on_grid(mask, size)), level=1)
        packed = np.frombuffer(zlib.decompress(self._grids[index]), np.uint8)
        return np.unpackbits(packed, count=size * size).reshape(size, size).view(bool)


def mask_on_grid(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize an HxW bool mask to size x size cells; the smallest object keeps a cell."""
    # Sides that shrink first: OpenCV takes the mean over areas only where none grows.
    shrunk = tuple(min(side, size) for side in mask.shape[::-1])
    covered = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
    grid = cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA) >= 0.5
    if not grid.any():
        y, x = np.nonzero(mask)
        grid[y * size // mask.shape[0], x * size // mask.shape[1]] = True
    return grid


def _shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the fraction of each of size x size cells that an SxS bool mask covers."""
    return cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)


class EpochSampler(Sampler):
    """The images of each epoch in random order, in batches, of which each process takes a share."""

    def __init__(self, indices: list[int], batch_size: int, seed: int) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.epoch = 1

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.indices).tolist()
        for number in range(len(self)):
            batch = order[number * self.batch_size :][: self.batch_size]
            mine = distributed.share(batch)
            yield Step(self.epoch, mine or batch[:1], len(mine) / len(batch), number)


class BatchLoader(DataLoader):
    """A DataLoader that raises the errors of its worker processes as they are.

    DataLoader itself would raise them with the worker's traceback as their message.
    """

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


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
    return sum(array.nbytes for array in (*maps, *batch.images, *batch.true_masks))


def _as_it_is(batch: Batch | Exception) -> Batch | Exception:
    return batch


def training_indices(pairs: list[Pair], cache: FeatureCache | None) -> list[int]:
    """Return the indices of the training images with an object; say how many have none."""
    indices = pairs_with_objects(pairs, cache)
    if not indices:
        raise UserError("every training mask is empty; check that objects are white (255)")
    if len(indices) < len(pairs):
        skipped = len(pairs) - len(indices)
        print(f"skipped {skipped} of {len(pairs)} training images: their masks are empty")
    return indices
