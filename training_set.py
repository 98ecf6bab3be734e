"""The training images in random order, each with a random prompt, as batches for the decoder.

A step is prompted as SAM 2 is used: with a point, or with a box as roughly as people draw them,
and often with some corrective clicks after it, which depend on what the model has answered.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import distributed
from command_line import UserError
from feature_cache import FeatureCache, mask_on_grid
from image_files import Pair, read_pair
from sam2_utils import (
    Features,
    Prompt,
    corrective_click,
    make_prompt,
    mask_box,
    random_inner_point,
    random_point,
)

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

LOSS_GRID = 256  # what the loss is measured on, in cells a side: full-size models' own resolution
BOX_SHARE = 0.25  # of the steps; the others start with a point
CLICK_SHARE = 0.35  # of the steps have 1 to MAX_CLICKS corrective clicks
MAX_CLICKS = 3
MASK_SHARE = 0.5  # of the steps with clicks get the mask to be corrected as a prompt, too
PREFETCH = 2  # batches that each loading process has ready
BOX_JITTER = 0.1  # standard deviation of a box's edges, in its sides; at most twice of it


class PromptPlan(NamedTuple):
    """What a step starts with (a random point, an inner point or a box), and how it goes on."""

    kind: str = "random"
    clicks: int = 0  # corrective clicks before the masks that the loss is of
    gives_mask: bool = False  # whether the mask to be corrected is a prompt, too


def plan_prompts(mix: str, rng: np.random.Generator) -> PromptPlan:
    """Draw what a step is prompted with; mix: point, inner or mixed."""
    if mix != "mixed":
        return PromptPlan("random" if mix == "point" else mix)
    kind = "box" if rng.random() < BOX_SHARE else "inner"
    clicks = int(rng.integers(1, MAX_CLICKS + 1)) if rng.random() < CLICK_SHARE else 0
    return PromptPlan(kind, clicks, gives_mask=bool(rng.random() < MASK_SHARE))


def draw_prompt(grid: np.ndarray, kind: str, rng: np.random.Generator) -> Prompt:
    """Draw a prompt of a plan's kind from an SxS bool mask; the box is drawn roughly."""
    if kind != "box":
        draw_point = random_point if kind == "random" else random_inner_point
        return make_prompt([draw_point(grid, rng)])
    x1, y1, x2, y2 = mask_box(grid)
    sides = np.array([x2 - x1, y2 - y1] * 2)
    jitter = rng.normal(0, BOX_JITTER, 4).clip(-2 * BOX_JITTER, 2 * BOX_JITTER) * sides
    return make_prompt(box=(np.array([x1, y1, x2, y2]) + jitter).clip(0, len(grid) - 1))


def add_click(prompt: Prompt, predicted: np.ndarray, true_mask: np.ndarray, size: int) -> Prompt:
    """Add the click that corrects HxW masks to a prompt in pixels of an SxS input.

    Where there is nothing to correct, the click confirms the mask at its deepest point.
    """
    nowhere = np.zeros_like(true_mask)
    click = corrective_click(predicted, true_mask) or corrective_click(nowhere, true_mask)
    *point, label = click or (0, 0, -1)  # -1: no point, to SAM 2
    height, width = true_mask.shape
    point = (np.array(point) + 0.5) * size / np.array([width, height]) - 0.5
    return Prompt(
        np.concatenate([prompt.point_coords, point[None].astype(np.float32)]),
        np.append(prompt.point_labels, np.int32(label)),
    )


class Step(NamedTuple):
    """What EpochSampler has a process do."""

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

    Prompts are drawn on the grid of the model's input. They follow from the seed, the epoch and the
    images alone: neither workers nor the cache change them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        cache: FeatureCache | None,
        image_size: int,
        seed: int,
        prompt_mix: str = "point",
    ) -> None:
        self.pairs, self.cache, self.image_size, self.seed = pairs, cache, image_size, seed
        self.prompt_mix = prompt_mix

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
            features, grids = self.cache.read(indices)
            images, true_masks = [], [_shrink(grid, LOSS_GRID) for grid in grids]
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
