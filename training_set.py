"""The training images in random order, each with a random prompt, as batches for the decoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import distributed
from feature_cache import FeatureCache, mask_on_grid
from image_files import Pair, read_pair
from sam2_utils import Features, Prompt, prompt_from_mask

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

LOSS_GRID = 256  # what the loss is measured on, in cells a side: full-size models' own resolution


class Batch(NamedTuple):
    """What one process has of a step: B images, each with a prompt and its true mask."""

    features: Features | None  # of the cache, float16; None where the images are to be encoded
    images: list[np.ndarray]  # HxWx3 uint8 RGB, where there are no features
    prompts: list[Prompt]  # in pixels of the model's SxS input
    true_masks: list[torch.Tensor]  # float32 in [0, 1]: LOSS_GRID a side, or HxW with images
    fraction: float  # of the whole step's images; 0 for a stand-in where there is none to do


class TrainingSet(Dataset):
    """Batches by (epoch, indices, fraction), as EpochSampler names them.

    The prompt is a random pixel of the mask, on the grid of the model's input. It follows from the
    seed, the epoch and the image alone: neither workers nor processes nor the cache change it.
    """

    def __init__(
        self, pairs: list[Pair], cache: FeatureCache | None, image_size: int, seed: int
    ) -> None:
        self.pairs, self.cache, self.image_size, self.seed = pairs, cache, image_size, seed

    def __getitem__(self, step: tuple[int, list[int], float]) -> Batch:
        epoch, indices, fraction = step
        if self.cache is not None:
            features, grids = self.cache.read(indices)
            images, true_masks = [], [_shrink(grid, LOSS_GRID) for grid in grids]
        else:
            examples = [read_pair(self.pairs[index]) for index in indices]
            features, images = None, [image for image, _ in examples]
            grids = [mask_on_grid(mask, self.image_size) for _, mask in examples]
            true_masks = [mask.astype(np.float32) for _, mask in examples]
        prompts = [
            prompt_from_mask(grid, "random", np.random.default_rng([self.seed, epoch, index]))
            for index, grid in zip(indices, grids, strict=True)
        ]
        return Batch(features, images, prompts, list(map(torch.from_numpy, true_masks)), fraction)


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

    def __iter__(self) -> Iterator[tuple[int, list[int], float]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.indices).tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            mine = distributed.share(batch)
            yield self.epoch, mine or batch[:1], len(mine) / len(batch)


def make_loader(
    training_set: TrainingSet, sampler: EpochSampler, device: torch.device
) -> DataLoader:
    """Load batches ahead in other processes where the device would wait for them: Linux with CUDA.

    Elsewhere a process costs more to start, or takes a core from the decoder.
    """
    workers = 4 if device.type == "cuda" and sys.platform == "linux" else 0
    return DataLoader(
        training_set,
        sampler=sampler,
        batch_size=None,  # the sampler's steps are batches
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
