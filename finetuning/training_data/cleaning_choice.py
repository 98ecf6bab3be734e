"""How the masks of a model are cleaned, chosen on the training masks alone.

No model takes part, so the choice stands before the first validation, which cleans its masks, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from finetuning.basics import distributed
from finetuning.basics.cropped_masks import CroppedMask
from finetuning.basics.threads import in_threads
from finetuning.dataset.objects import DRAW_SEED, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.segmentation.clean_masks import NO_CLEANING, Cleaning, find_holes, find_parts

MOST_IMAGES, MOST_OBJECTS = 200, 10  # read: images, and objects of each
# From strong to weak, as in Cleaning
MIN_PARTS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
# Without a prompt, larger parts stay: no click or box tells which of them is meant
WHOLE_MIN_PARTS = (0.1, 0.05, 0.02, 0.01)
# All or nothing: a model may find only a small part of a large true hole
MAX_HOLES = (0.1,)
CHANGE = 0.01  # of its area: an object that loses or gains more than that is changed
MOST_CHANGED = 0.01  # share of the objects that the choice may change
# Share of the objects that may have a second part. Where more have one, parts that a model finds
# are often true, however small, and all of them stay
MOST_SEVERAL = 0.1


class Shape(NamedTuple):
    """The areas of a mask's parts and of its holes, in pixels."""

    parts: np.ndarray
    holes: np.ndarray

    @property
    def has_several(self) -> bool:
        """Whether another part than the largest is more than CHANGE of the area."""
        return len(self.parts) > 1 and np.sort(self.parts)[-2] > CHANGE * self.parts.sum()

    def dropped(self, min_part: float) -> float:
        """Return the share of the area that is in parts below a share of the largest."""
        return self.parts[self.parts < min_part * self.parts.max()].sum() / self.parts.sum()

    def filled(self, max_hole: float) -> float:
        """Return the share of the area that holes up to a share of it would add."""
        area = self.parts.sum()
        return self.holes[self.holes <= max_hole * area].sum() / area


def choose_cleaning(pairs: list[Pair]) -> Cleaning:
    """Return the strongest cleaning that leaves nearly all training masks as they are.

    pairs: the training pairs; MOST_IMAGES of them and MOST_OBJECTS of each are drawn. The choice
    for masks of all objects of an image together is separate. Under torchrun, the first process
    chooses for all.
    """
    return distributed.from_first(lambda: _choose(pairs))


def _choose(pairs: list[Pair]) -> Cleaning:
    drawn = np.random.default_rng(DRAW_SEED).permutation(len(pairs))[:MOST_IMAGES]
    found = in_threads(
        lambda index: read_shapes(pairs[index], index), sorted(drawn), "Reading masks", "mask"
    )
    objects = [shape for shapes, _ in found for shape in shapes]
    wholes = [whole for _, image_wholes in found for whole in image_wholes]
    if not objects:
        return NO_CLEANING
    return Cleaning(
        min_part=choose_min_part(objects),
        max_hole=strongest(MAX_HOLES, Shape.filled, objects),
        # Objects that a model merges make the largest part, and others small beside it
        whole_min_part=0.0
        if len(objects) > len(wholes)
        else strongest(WHOLE_MIN_PARTS, Shape.dropped, wholes),
        whole_max_hole=strongest(MAX_HOLES, Shape.filled, wholes),
    )


def read_shapes(pair: Pair, index: int) -> tuple[list[Shape], list[Shape]]:
    """Return the shapes of an image's objects, and of all of them together; empty without any.

    index: of the image; it seeds the draw of its objects.
    """
    objects = read_objects(pair)
    if not len(objects):
        return [], []
    drawn = np.random.default_rng([DRAW_SEED, index]).permutation(len(objects))[:MOST_OBJECTS]
    shapes = [shape_of(objects.cropped(k)) for k in sorted(drawn)]
    return shapes, shapes if len(objects) == 1 else [shape_of(objects.together().cropped(0))]


def shape_of(mask: CroppedMask) -> Shape:
    """Return the shape of a mask that is not empty and cropped to its pixels."""
    (_, parts), (_, holes) = find_parts(mask.crop), find_holes(mask.crop)
    return Shape(parts[parts > 0].astype(float), holes[holes > 0].astype(float))


def choose_min_part(shapes: list[Shape]) -> float:
    """Return the first of MIN_PARTS that changes hardly any of the objects, or 0."""
    if np.mean([shape.has_several for shape in shapes]) > MOST_SEVERAL:
        return 0.0
    return strongest(MIN_PARTS, Shape.dropped, shapes)


def strongest(
    candidates: Sequence[float], change: Callable[[Shape, float], float], shapes: list[Shape]
) -> float:
    """Return the first size that changes at most MOST_CHANGED of the objects, or 0."""
    for size in candidates:
        are_changed = [change(shape, size) > CHANGE for shape in shapes]
        if np.mean(are_changed) <= MOST_CHANGED:
            return size
    return 0.0
