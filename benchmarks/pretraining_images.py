"""Draw the images that the mini model is pretrained on.

They involve no data set and no license. As with the demo's images, a seed draws the same bytes on
every platform.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finetuning.preparation.demo_images import (
    Blob,
    chance,
    coordinates,
    direction,
    draw_blob,
    paint,
    paint_relief,
    paint_sparkle,
    smooth_noise,
    to_uint8,
)


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw an SxS float texture, about -1 to 1: clouds, grain, ridges, spots or stripes."""
    kind = rng.integers(5)
    coarse = smooth_noise(rng, size, int(rng.integers(2, 8)))
    fine = smooth_noise(rng, size, int(rng.integers(10, 32)))
    if kind == 0:
        return coarse
    if kind == 1:
        return 0.5 * (coarse + fine)
    if kind == 2:
        return 1 - 4 * np.abs(coarse)
    if kind == 3:
        return np.clip(6 * fine, -1, 1)
    x, y = coordinates(size)
    step_x, step_y = rng.uniform(-15, 15, 2)
    phase = x * step_x + y * step_y + coarse
    return 4 * np.abs(phase - np.floor(phase) - 0.5) - 1


class Drawing(NamedTuple):
    """An image to pretrain on.

    image: SxSx3 uint8 RGB.
    masks: NxSxS bool, the visible part of every blob; N is at least 1.
    background: SxS bool, the pixels away from all blobs, hidden ones included; may be empty.
    """

    image: np.ndarray
    masks: np.ndarray
    background: np.ndarray


def draw_pretraining_image(rng: np.random.Generator, size: int, hardness: float) -> Drawing:
    """Draw blobs of any color on a textured background: a few, a large one, or a crowd.

    hardness: 0 to 1; the share of images with small blobs, and of images with folds, vessels and
    reflections. It also sets how many blobs have nearly the background's color.
    """
    while True:
        background = rng.uniform(0.05, 0.95, 3)
        if chance(rng, 0.35):  # the colors of flesh
            background = np.sort(background)[::-1].copy()
        contrast = rng.uniform(0.02, 0.2)
        canvas = background + contrast * _colored_texture(rng, size)
        is_cavity = hardness > 0 and chance(rng, hardness)
        if is_cavity:
            paint_relief(rng, canvas)
        blobs = _paint_blobs(rng, canvas, background, hardness)
        _paint_highlights(rng, canvas, np.stack([blob.mask for blob in blobs]).any(axis=0))
        if is_cavity:
            paint_sparkle(rng, canvas)
        lit = _shade_image(rng, canvas)
        masks = _visible_masks(blobs, lit)
        if len(masks):
            near = np.stack([blob.alpha(0.04 * size) > 0 for blob in blobs]).any(axis=0)
            return Drawing(to_uint8(rng, canvas, rng.uniform(0, 0.04)), masks, ~near)


def _colored_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw SxSx3 color variations around 0: one or two textures, each with a tint."""
    colored = np.zeros((size, size, 3))
    for _ in range(rng.integers(1, 3)):
        tint = 1 + rng.uniform(-0.7, 0.7, 3)
        colored += texture(rng, size)[..., None] * tint
    return colored


class Look(NamedTuple):
    """The appearance that blobs of one kind share.

    body: SxSx3, color and texture. light: (X,Y), how much brighter in this direction. dome: how
    much brighter inside than at the rim. softness: width of the edge in pixels. shadow: 0 for none.
    """

    body: np.ndarray
    light: np.ndarray
    dome: float
    softness: float
    shadow: float


def _draw_look(
    rng: np.random.Generator, size: int, background: np.ndarray, hardness: float
) -> Look:
    camouflaged = chance(rng, 0.15 + 0.5 * hardness)
    distance = (0.03, 0.15) if camouflaged else (0.25, 0.9)
    color = _color_apart(rng, background, *distance)
    return Look(
        body=color + rng.uniform(0.01, 0.15) * _colored_texture(rng, size),
        light=direction(rng) * rng.uniform(0.05 if camouflaged else 0, 0.22),
        dome=rng.uniform(-0.12, 0.3),
        softness=rng.uniform(1, 1 + 0.02 * size),
        shadow=rng.uniform(0.1, 0.5) if chance(rng, 0.4) else 0.0,
    )


def _paint_blob(canvas: np.ndarray, background: np.ndarray, blob: Blob, look: Look) -> None:
    lit = blob.slope[0] * look.light[0] + blob.slope[1] * look.light[1]
    dome = look.dome * (np.sqrt(np.clip(blob.height, 0, 1)) - 0.6)
    if look.shadow:
        paint(canvas, background * 0.3, look.shadow * blob.alpha(0.15 * len(canvas)))
    paint(canvas, look.body + (lit + dome)[..., None], blob.alpha(look.softness))


def _paint_blobs(
    rng: np.random.Generator, canvas: np.ndarray, background: np.ndarray, hardness: float
) -> list[Blob]:
    """Paint a crowd of one kind, or a few blobs, with or without a large one among them."""
    size = len(canvas)
    if chance(rng, 0.2):
        look = _draw_look(rng, size, background, hardness)
        rim = rng.uniform(0.12, 0.4) * rng.choice((-1, 1))  # separates touching blobs
        look = look._replace(dome=rim, softness=min(look.softness, 1.5))
        blobs = _draw_crowd(rng, size)
        for blob in blobs:
            shade = rng.uniform(-0.06, 0.06)
            _paint_blob(canvas, background, blob, look._replace(body=look.body + shade))
        return blobs

    smallest = 0.05 if chance(rng, hardness) else 0.09
    radii = [
        rng.uniform(smallest, 0.32 if chance(rng, 0.4) else 0.2) for _ in range(rng.integers(1, 6))
    ]
    if chance(rng, 0.25):
        radii = [rng.uniform(0.28, 0.45), *radii[: rng.integers(3)]]
    blobs = []
    for radius in radii:
        reach = max(0.05, radius - 0.2)  # large blobs lie near the middle
        center, elongation = rng.uniform(reach, 1 - reach, 2), rng.uniform(1, 2.2)
        if radius > 0.32:  # large blobs are not long, to leave some background
            elongation = np.sqrt(elongation)
        blob = draw_blob(rng, size, center, radius, elongation, wobble=rng.uniform(0, 0.45))
        _paint_blob(canvas, background, blob, _draw_look(rng, size, background, hardness))
        blobs.append(blob)
    return blobs


def _draw_crowd(rng: np.random.Generator, size: int) -> list[Blob]:
    """Draw up to 12 blobs of similar size, side by side like cells; most of them touch."""
    radius, spread = rng.uniform(0.05, 0.11), rng.uniform(1, 1.5)
    elongation, wobble = rng.uniform(1, 1.6), rng.uniform(0, 0.3)
    centers = rng.uniform(0.2, 0.8, (1, 2))
    for _ in range(rng.integers(10, 60)):
        center = rng.choice(centers) + 2 * radius * rng.uniform(0.9, spread) * direction(rng)
        distances = np.sqrt(np.square(centers - center).sum(axis=1))
        if distances.min() > 1.75 * radius and center.min() > 0.05 and center.max() < 0.95:
            centers = np.vstack([centers, center])
    sizes = radius * rng.uniform(0.85, 1.15, 12)
    return [
        draw_blob(rng, size, center, one, elongation, wobble)
        for center, one in zip(centers, sizes, strict=False)
    ]


def _color_apart(
    rng: np.random.Generator, color: np.ndarray, nearest: float, farthest: float
) -> np.ndarray:
    """Draw a color whose largest channel difference from `color` lies between the limits."""
    while True:
        other = np.clip(color + rng.uniform(-farthest, farthest, 3), 0, 1)
        if nearest < np.abs(other - color).max() < farthest:
            return other


def _visible_masks(blobs: list[Blob], lit: np.ndarray) -> np.ndarray:
    """Return the NxSxS visible masks of blobs painted in this order.

    Blobs that are mostly covered, tiny, or as large as the image are left out.
    lit: SxS bool, as _shade_image returns it.
    """
    masks = np.stack([blob.mask for blob in blobs])
    covered = ~lit
    kept = []
    for mask in masks[::-1]:
        visible = mask & ~covered
        covered |= mask
        if max(0.4 * mask.sum(), 0.004 * mask.size) < visible.sum() < 0.9 * mask.size:
            kept.append(visible)
    return np.stack(kept) if kept else masks[:0]


def _paint_highlights(rng: np.random.Generator, canvas: np.ndarray, where: np.ndarray) -> None:
    """Paint the reflections of a lamp, mostly on the blobs; they do not change any mask."""
    size = len(canvas)
    if chance(rng, 0.5):
        return
    inside = np.flatnonzero(where)
    for _ in range(rng.integers(1, 7)):
        pixel = rng.choice(inside) if chance(rng, 0.7) else rng.integers(size**2)
        center = np.array([pixel % size, pixel // size]) / size
        spot = draw_blob(rng, size, center, rng.uniform(0.008, 0.035), rng.uniform(1, 3))
        paint(canvas, rng.uniform(0.85, 1, 3), spot.alpha(2.0) * rng.uniform(0.5, 1))


def _shade_image(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Darken the canvas by uneven light, a vignette, and the black corners of an endoscope.

    Returns the SxS bool mask of the pixels that are not black.
    """
    size = len(canvas)
    x, y = coordinates(size)
    if chance(rng, 0.5):
        canvas *= 1 + (rng.uniform(0.1, 0.4) * smooth_noise(rng, size, 2))[..., None]
    center = rng.uniform(0.3, 0.7, 2)
    distance = (x - center[0]) * (x - center[0]) + (y - center[1]) * (y - center[1])
    if chance(rng, 0.5):
        canvas *= np.clip(1 - rng.uniform(0.3, 1.5) * distance, 0.1, 1)[..., None]
    black = np.zeros(canvas.shape[:2], bool)
    if chance(rng, 0.3):
        corner = np.abs(x - 0.5) + np.abs(y - 0.5) > rng.uniform(0.75, 0.95)
        side = np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) > rng.uniform(0.46, 0.5)
        black = corner | side
    canvas[black] = 0.02
    return ~black
