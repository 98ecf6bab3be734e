"""The steps of an epoch: which images and which of their objects, in random order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from finetuning.basics import distributed


class Step(NamedTuple):
    """One process's share of a training step: some objects of some images."""

    epoch: int
    indices: list[int]  # of this process's images among the pairs
    fraction: float  # this share of the step's objects; 0 if it only repeats one to keep pace
    number: int = 0  # of the step in its epoch; the same in all processes
    objects: list[tuple[int, ...]] | None = None  # numbers, per image; None: the first of each
    image_fraction: float = 1.0  # this share of the step's images


class EpochSampler(Sampler):
    """Yields the steps of an epoch: the images in random order, in batches shared by processes.

    An epoch shows at most objects_per_image objects of an image; the next epoch shows others.
    """

    def __init__(
        self, objects: dict[int, int], batch_size: int, seed: int, objects_per_image: int = 1
    ) -> None:
        """objects: the number of objects of each image, by its index. batch_size: in images."""
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
            # All processes must take every step together. With fewer images than processes, one
            # without an image repeats the first, with fraction 0: it adds nothing
            mine = distributed.share(batch)
            fraction, image_fraction = _count(mine) / _count(batch), len(mine) / len(batch)
            indices, objects = zip(*(mine or batch[:1]), strict=True)
            yield Step(self.epoch, list(indices), fraction, number, list(objects), image_fraction)

    def _draw(self, index: int) -> tuple[int, ...]:
        """Return the numbers of the objects of an image that this epoch shows."""
        count, most = self.objects[index], self.objects_per_image
        if count <= most:
            return tuple(range(count))
        # The order is the same in all epochs, and each continues where the last one stopped, so
        # that every object gets its turn. Epochs count from 1: no prompt uses the stream of 0
        order = np.random.default_rng([self.seed, 0, index, 0, 1]).permutation(count)
        turns = (np.arange(most) + (self.epoch - 1) * most) % count
        return tuple(sorted(order[turns].tolist()))


def _count(batch: list[tuple[int, tuple[int, ...]]]) -> int:
    return sum(len(objects) for _, objects in batch)
