"""Draw the demo's images: polyps with a stalk, which the original model leaves out of its masks.

Everything is computed element by element in float64 NumPy and rounded to bytes at the end, so a
seed draws the same bytes on every platform. Lengths are fractions of the image's width; colours are
0 to 1. S is the image size in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetuning.basics.image_files import write_image


def draw_demo_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the inside of a bowel with a polyp on a stalk; the mask is the polyp with its stalk.

    The pretrained model segments only the head, because colour and texture change at the stalk.
    Fine-tuning can learn to include the stalk.

    Returns:
      image: SxSx3 uint8 RGB.
      mask: SxS bool.
    """
    # The wall of the bowel
    mucosa = np.array([0.78, 0.42, 0.36]) + rng.uniform(-0.08, 0.08, 3)
    clouds = 0.06 * smooth_noise(rng, size, 4) + 0.03 * smooth_noise(rng, size, 14)
    canvas = mucosa + clouds[..., None]
    paint_relief(rng, canvas)

    # The polyp: its stalk, and its head on top
    radius = rng.uniform(0.10, 0.16)
    center, axis = rng.uniform(0.3, 0.7, 2), direction(rng)
    stalk = _draw_stalk(rng, size, center, axis, radius)
    head = draw_blob(rng, size, center, radius, rng.uniform(1, 1.3), 0.15)
    paint(canvas, mucosa * 0.35, 0.5 * stalk.alpha(0.08 * size))
    _paint_flesh(canvas, stalk, mucosa * [1.1, 1.3, 1.25], 0.5 * clouds)
    paint(canvas, mucosa * 0.35, 0.6 * head.alpha(0.05 * size))
    pebbles = 0.07 * smooth_noise(rng, size, 40) + 0.05 * smooth_noise(rng, size, 16)
    _paint_flesh(canvas, head, mucosa * [0.95, 0.55, 0.6], pebbles)

    # The lamp and the lens
    paint_sparkle(rng, canvas)
    x, y = coordinates(size)
    distance = (x - 0.5) * (x - 0.5) + (y - 0.5) * (y - 0.5)
    canvas *= np.clip(1.1 - 1.2 * distance, 0, 1)[..., None]
    black = np.abs(x - 0.5) + np.abs(y - 0.5) > 0.85
    canvas[black] = 0.02
    return to_uint8(rng, canvas, 0.015), (stalk.mask | head.mask) & ~black


def _draw_stalk(
    rng: np.random.Generator, size: int, center: np.ndarray, axis: np.ndarray, radius: float
) -> Blob:
    """Draw a bent, rounded band from `center` along `axis`."""
    x, y = coordinates(size)
    x, y = x - center[0], y - center[1]
    length, half_width = radius * rng.uniform(2.6, 3.4), radius * rng.uniform(0.5, 0.65)
    along = (x * axis[0] + y * axis[1]) / length
    bend = radius * rng.uniform(-1, 1) * along * along
    across = (y * axis[0] - x * axis[1] - bend) / (half_width * (0.85 + 0.35 * along * along))
    beyond = np.maximum(0, np.abs(along - 0.5) - 0.35) / 0.15  # past the straight part
    height = 1 - across * across - beyond * beyond
    return Blob(height, np.stack([across * -axis[1], across * axis[0]]), half_width)


def _paint_flesh(canvas: np.ndarray, blob: Blob, color: np.ndarray, grain: np.ndarray) -> None:
    """Paint a rounded, unevenly coloured blob, lit from above, darker at its rim.

    color: 3 values; grain: SxS, added to the color.
    """
    rim = np.sqrt(np.clip(blob.height, 0, 1)) - 0.7
    light = 0.25 * rim - 0.06 * blob.slope[1] + grain
    paint(canvas, color + light[..., None], blob.alpha(2.0))


def write_demo_dataset(
    data: Path, seed: int = 42, train: int = 120, val: int = 40, size: int = 256
) -> None:
    """Write the demo's pairs, size x size pixels, to data/images/{train,val} and data/masks/..."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            # A generator per pair: other counts do not change a pair
            rng = np.random.default_rng([seed, split == "val", index])
            image, mask = draw_demo_pair(rng, size)
            name = f"demo_{index:03d}.png"
            write_image(data / "images" / split / name, image)
            write_image(data / "masks" / split / name, mask.astype(np.uint8) * 255)


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Return True with this probability."""
    return bool(rng.random() < probability)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw SxS smooth noise from -1 to 1: a random grid of `cells` cells per side, interpolated."""
    grid = rng.uniform(-1, 1, (cells + 2, cells + 2))
    position = (np.arange(size) + 0.5) * cells / size
    cell = position.astype(int)
    weight = position - cell
    weight = weight * weight * (3 - 2 * weight)  # smoothstep: no visible edges between cells
    rows = grid[cell] + (grid[cell + 1] - grid[cell]) * weight[:, None]
    return rows[:, cell] + (rows[:, cell + 1] - rows[:, cell]) * weight


def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x (1xS) and y (Sx1) of the pixel centers, from 0 to 1."""
    ramp = (np.arange(size) + 0.5) / size
    return ramp[None, :], ramp[:, None]


def direction(rng: np.random.Generator) -> np.ndarray:
    """Draw a unit vector (X,Y)."""
    while True:
        vector = rng.uniform(-1, 1, 2)
        length = np.sqrt(vector[0] * vector[0] + vector[1] * vector[1])
        if 0.1 < length < 1:
            return vector / length


class Blob(NamedTuple):
    """A smooth shape.

    height: SxS float; above 0 inside, 1 at the top.
    slope: 2xSxS float, a pixel's offset to the right and down from the center, about -1 to 1
      inside.
    radius: the mean radius.
    """

    height: np.ndarray
    slope: np.ndarray
    radius: float

    @property
    def mask(self) -> np.ndarray:
        return self.height > 0

    def alpha(self, softness: float) -> np.ndarray:
        """Return SxS opacities from 0 to 1, with an edge `softness` pixels wide."""
        pixels = self.height * 0.5 * self.radius * len(self.height) / softness
        return np.clip(pixels + 0.5, 0, 1)


def draw_blob(
    rng: np.random.Generator,
    size: int,
    center: np.ndarray,
    radius: float,
    elongation: float = 1.0,
    wobble: float = 0.3,
) -> Blob:
    """Draw an ellipse around `center` (X,Y), in a random direction, with an uneven outline."""
    x, y = coordinates(size)
    x, y = (x - center[0]) / radius, (y - center[1]) / radius
    axis = direction(rng)
    stretch = np.sqrt(elongation)
    along, across = (x * axis[0] + y * axis[1]) / stretch, (y * axis[0] - x * axis[1]) * stretch
    cells = max(2, round(1 / radius))
    bumps = smooth_noise(rng, size, cells) + 0.4 * smooth_noise(rng, size, 2 * cells)
    height = 1 - along * along - across * across + wobble * bumps
    return Blob(height, np.stack(np.broadcast_arrays(x, y)), radius)


def paint(canvas: np.ndarray, color: np.ndarray, alpha: np.ndarray) -> None:
    """Blend `color` (3 or SxSx3) into the SxSx3 canvas, in place, with SxS opacities."""
    canvas += (color - canvas) * alpha[..., None]


def paint_relief(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Turn the canvas into the inside of a cavity: paint folds, vessels and a dark depth."""
    size = len(canvas)
    x, y = coordinates(size)
    axis = direction(rng)
    folds = (x * axis[0] + y * axis[1]) * rng.uniform(2, 6) + 0.6 * smooth_noise(rng, size, 3)
    folds = folds - np.floor(folds)  # rises slowly, then falls sharply
    folds = np.minimum(folds, 4 * (1 - folds)) / 0.8
    canvas *= 1 + rng.uniform(0.1, 0.5) * (folds - 0.7)[..., None]
    if chance(rng, 0.6):
        vessels = 1 - np.abs(smooth_noise(rng, size, int(rng.integers(4, 9)))) / 0.06
        strength = np.clip(vessels, 0, 1) * np.clip(0.5 + smooth_noise(rng, size, 3), 0, 1)
        paint(canvas, canvas * [0.8, 0.5, 0.5], rng.uniform(0.3, 1) * strength)
    if chance(rng, 0.6):
        depth = draw_blob(rng, size, rng.uniform(0, 1, 2), rng.uniform(0.12, 0.3), 1.3)
        paint(canvas, canvas * rng.uniform(0.05, 0.4), depth.alpha(0.08 * size))


def paint_sparkle(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Scatter small reflections in clusters, as on a wet surface."""
    size = len(canvas)
    fine = int(rng.integers(24, 40))
    grains = smooth_noise(rng, size, fine) + 0.6 * smooth_noise(rng, size, fine // 2)
    clusters = smooth_noise(rng, size, 5) - rng.uniform(0, 0.4)
    strength = np.clip(6 * (grains - 0.9), 0, 1) * np.clip(5 * clusters, 0, 1)
    paint(canvas, np.full(3, 0.97), strength)


def to_uint8(rng: np.random.Generator, canvas: np.ndarray, grain: float) -> np.ndarray:
    """Add grain and round the SxSx3 canvas to bytes."""
    canvas = canvas + grain * rng.uniform(-1, 1, canvas.shape[:2])[..., None]
    return np.floor(np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
