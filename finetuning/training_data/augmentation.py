"""Augmentation: training images and their masks, varied: mirrored, turned, cropped, recoloured.

The frozen encoder sees a fixed number of variants of each image, so their features are cached like
those of the image. Each epoch shows an image in one of them. Their cached features are mirrored,
too: these are nearly the features of the mirrored image, and cost nothing. Without a cache, each
epoch draws new variants.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from finetuning.basics import distributed
from finetuning.basics.files import content_sha256
from finetuning.basics.threads import in_threads
from finetuning.dataset.objects import Objects, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.model.image_variants import CachedImage, ImageVariant
from finetuning.segmentation.predicting import Features
from finetuning.segmentation.views import ALL_VIEWS, MIRRORED, UPRIGHT, View

AUTO_IMAGES, AUTO_MOST = 1000, 8  # auto: up to so many encoded images, and variants of each
HUE, SATURATION, VALUE = 6, 0.2, 0.25  # the largest changes; hue in OpenCV's half degrees
SMALLEST_SIDE = 0.55  # of a crop, as a share of the image's
KEPT_SHARE = 0.7  # the smallest share of all objects' pixels that a crop keeps
VISIBLE_SHARE = 0.5  # of an object's pixels; a crop that shows less of it does not ask for it
TRIES = 20  # to find such a crop
VARIANT_SEED = 42  # of cached variants: they are the same in all runs, whatever their --seed


class Variant(NamedTuple):
    """A change of an image and its masks: a crop, other colours, then a view."""

    view: View = UPRIGHT
    left: float = 0.0  # where the crop lies, as a share of the pixels that it leaves out
    top: float = 0.0
    side: float = 1.0  # of the crop, as a share of the image's width and height
    hue: int = 0  # added, in OpenCV's half degrees
    saturation: float = 1.0  # factors
    value: float = 1.0

    def of_array(self, values: np.ndarray) -> np.ndarray:
        """Return the variant of an HxWx3 uint8 RGB image."""
        return self.view.of_array(self._recoloured(values[self.crop(values.shape[:2])]))

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """Return the variant of an HxW mask."""
        return self.view.of_array(mask[self.crop(mask.shape)])

    def crop(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the rows and columns of an image of (H,W) that the variant shows."""
        height, width = (max(1, round(self.side * length)) for length in size)
        top, left = round(self.top * (size[0] - height)), round(self.left * (size[1] - width))
        return slice(top, top + height), slice(left, left + width)

    def _recoloured(self, image: np.ndarray) -> np.ndarray:
        if (self.hue, self.saturation, self.value) == (0, 1.0, 1.0):
            return image
        levels = np.arange(256)
        tables = (levels + self.hue) % 180, levels * self.saturation, levels * self.value
        tables = np.rint(np.stack(tables, axis=-1)).clip(0, 255).astype(np.uint8)
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        return cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB)


class Drawn(NamedTuple):
    """A variant of an image, and the objects that it does not ask for: it shows too little."""

    variant: Variant
    hidden: frozenset[int] = frozenset()


def draw_view(rng: np.random.Generator, turns: bool) -> View:
    """Draw one of the 8 views of an image that has no upright, else the image or its mirror."""
    return ALL_VIEWS[rng.integers(8)] if turns else (UPRIGHT, MIRRORED)[rng.integers(2)]


class ObjectPixels:
    """Counts the pixels of an image's objects inside a crop."""

    def __init__(self, objects: Objects) -> None:
        self.size, self._masks = objects.size, list(objects.all_cropped())
        self.areas = np.array([mask.area for mask in self._masks], np.int64)
        edges = [(y.start, x.start, y.stop, x.stop) for y, x in (mask.box for mask in self._masks)]
        self._boxes = np.array(edges, np.int64).reshape(-1, 4)

    def inside(self, crop: tuple[slice, slice]) -> np.ndarray:
        """Return the number of pixels of each object inside a crop, given by rows and columns."""
        (top, bottom), (left, right) = ((edge.start, edge.stop) for edge in crop)
        y1, x1, y2, x2 = self._boxes.T
        is_inside = (y1 >= top) & (x1 >= left) & (y2 <= bottom) & (x2 <= right)
        is_outside = (y2 <= top) | (x2 <= left) | (y1 >= bottom) | (x1 >= right)
        counts = np.where(is_inside, self.areas, 0)
        for k in np.flatnonzero(~is_inside & ~is_outside):  # the crop cuts their boxes
            mask = self._masks[k]
            rows = slice(max(0, top - mask.y), bottom - mask.y)
            columns = slice(max(0, left - mask.x), right - mask.x)
            counts[k] = np.count_nonzero(mask.crop[rows, columns])
        return counts


def draw_variant(rng: np.random.Generator, pixels: ObjectPixels, turns: bool) -> Drawn:
    """Draw a variant of an image that keeps most of its objects' pixels."""
    variant = Variant(
        draw_view(rng, turns),
        hue=int(rng.integers(-HUE, HUE + 1)),
        saturation=round(float(rng.uniform(1 - SATURATION, 1 + SATURATION)), 3),
        value=round(float(rng.uniform(1 - VALUE, 1 + VALUE)), 3),
    )
    for _ in range(TRIES):
        side, left, top = np.round(rng.uniform((SMALLEST_SIDE, 0, 0), 1), 3).tolist()
        cropped = variant._replace(left=left, top=top, side=side)
        inside = pixels.inside(cropped.crop(pixels.size))
        # At least one object keeps KEPT_SHARE, which is more than VISIBLE_SHARE
        if inside.sum() >= KEPT_SHARE * pixels.areas.sum():
            hidden = np.flatnonzero(inside < VISIBLE_SHARE * pixels.areas)
            return Drawn(cropped, frozenset(hidden.tolist()))
    return Drawn(variant)


class Augment(NamedTuple):
    """The part of a recipe that varies the training images."""

    number: int | str = "off"  # of variants of an image, the unchanged one included; auto; off
    turns: bool = False  # whether images have no upright: they are turned, not only mirrored
    # Cached features are mirrored (or turned), too, with so many variants of an image or more
    mirror_from: int = 2


NO_AUGMENT = Augment()


class Shown(NamedTuple):
    """How an epoch shows an image."""

    image: CachedImage
    hidden: frozenset[int] = frozenset()  # objects to replace by others
    view: View = UPRIGHT  # of the cached features

    @property
    def variant(self) -> Variant | None:
        return self.image.change if isinstance(self.image, ImageVariant) else None

    def of_array(self, image: np.ndarray) -> np.ndarray:
        """Return the HxWx3 uint8 RGB image of the file as it is shown."""
        return self.view.of_array(self.variant.of_array(image) if self.variant else image)


class Augmentation(NamedTuple):
    """How a training varies its images; nothing by default."""

    augment: Augment = NO_AUGMENT
    further: Sequence[Sequence[Drawn]] | None = None  # the cached variants of each pair's image

    @property
    def draws_anew(self) -> bool:
        """Whether each epoch draws new variants."""
        return self.augment.number != "off" and self.further is None

    @property
    def is_on(self) -> bool:
        """Whether images are shown otherwise than they are."""
        return self.draws_anew or self._mirrors or any(self.further or ())

    @property
    def _mirrors(self) -> bool:
        number = self.augment.number
        return isinstance(number, int) and number >= self.augment.mirror_from

    def show(self, pair: Pair, index: int, epoch: int, seed: int) -> Shown:
        """Return how an epoch shows the image of a pair, by its index among the pairs."""
        if self.augment.number == "off":
            return Shown(pair.image)
        # The streams of the image order and the prompts have no fifth number
        if self.draws_anew:
            rng = np.random.default_rng([seed, epoch, index, 0, 2])
            drawn = draw_variant(rng, ObjectPixels(read_objects(pair)), self.augment.turns)
            return Shown(ImageVariant(pair.image, drawn.variant), drawn.hidden)
        # Each variant once in as many epochs as there are variants, then in another order
        further = self.further[index]
        block, place = divmod(epoch - 1, 1 + len(further))
        order = np.random.default_rng([seed, block, index, 0, 3]).permutation(1 + len(further))
        drawn, view = further[order[place] - 1] if order[place] else None, UPRIGHT
        if self._mirrors:
            rng = np.random.default_rng([seed, epoch, index, 0, 4])
            view = draw_view(rng, self.augment.turns)
        if drawn is None:
            return Shown(pair.image, view=view)
        return Shown(ImageVariant(pair.image, drawn.variant), drawn.hidden, view)


UNCHANGED = Augmentation()


def auto_number(images: int) -> int:
    """Return how many variants of each image auto encodes: fewer if there are more images."""
    return max(1, min(AUTO_MOST, AUTO_IMAGES // images))


def draw_variants(pairs: list[Pair], number: int, turns: bool) -> list[list[Drawn]]:
    """Draw the variants 1 to number - 1 of each pair's image; variant 0 is the image.

    They depend on the image file's content, its objects and their number only, so features are
    encoded again neither for other seeds and folds nor after images were added. The first process
    reads the masks.
    """

    def draw(pair: Pair) -> list[Drawn]:
        pixels, content = ObjectPixels(read_objects(pair)), int(content_sha256(pair.image), 16)
        if not len(pixels.areas):  # the image is not shown
            return []
        rngs = [np.random.default_rng([VARIANT_SEED, content, k]) for k in range(1, number)]
        return [draw_variant(rng, pixels, turns) for rng in rngs]

    if number < 2:
        return [[] for _ in pairs]
    return distributed.from_first(lambda: in_threads(draw, pairs, "Drawing variants", "image"))


def images_of(pairs: list[Pair], further: Sequence[Sequence[Drawn]]) -> list[CachedImage]:
    """Return the variants to encode beside the unchanged images."""
    return [
        ImageVariant(pair.image, drawn.variant)
        for pair, of_image in zip(pairs, further, strict=True)
        for drawn in of_image
    ]


def visible_objects(chosen: tuple[int, ...], hidden: frozenset[int], count: int) -> tuple[int, ...]:
    """Replace hidden objects of `count` by visible ones, which repeat if there are too few."""
    if hidden.isdisjoint(chosen):
        return chosen
    visible = [k for k in range(count) if k not in hidden]
    others = [k for k in visible if k not in chosen] or visible
    # Chosen numbers differ by epoch, and so does the first of the others
    following = itertools.cycle(np.roll(others, -chosen[0]).tolist())
    return tuple(next(following) if k in hidden else k for k in chosen)


def turn_features(features: Features, views: Sequence[View]) -> Features:
    """Turn and mirror each image's features, in place; their memory order stays."""
    for i, view in enumerate(views):
        if view != UPRIGHT:
            for maps in (features.image_embed, *features.high_res_feats):
                maps[i] = view.of_maps(maps[i])
    return features
