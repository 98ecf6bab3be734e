"""The demo's images: drawn polyps with a stalk, which the original leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetuning.basics.image_files import write_image
from finetuning.synthetic_images import (
    Blob,
    _paint_relief,
    _paint_sparkle,
    _to_uint8,
    coordinates,
    direction,
    draw_blob,
    paint,
    smooth_noise,
)


def draw_demo_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the inside of a bowel with a polyp on a stalk; the mask is the polyp with its stalk.

    The pretrained model stops where colour and texture end, at the head: there is something to
    learn.

    Returns:
      image: SxSx3 uint8 RGB.
      mask: SxS bool.
    """
    # The wall
    mucosa = np.array([0.78, 0.42, 0.36]) + rng.uniform(-0.08, 0.08, 3)
    clouds = 0.06 * smooth_noise(rng, size, 4) + 0.03 * smooth_noise(rng, size, 14)
    canvas = mucosa + clouds[..., None]
    _paint_relief(rng, canvas)

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
    _paint_sparkle(rng, canvas)
    x, y = coordinates(size)
    distance = (x - 0.5) * (x - 0.5) + (y - 0.5) * (y - 0.5)
    canvas *= np.clip(1.1 - 1.2 * distance, 0, 1)[..., None]
    black = np.abs(x - 0.5) + np.abs(y - 0.5) > 0.85
    canvas[black] = 0.02
    return _to_uint8(rng, canvas, 0.015), (stalk.mask | head.mask) & ~black


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

    color: 3; grain: SxS, added to it.
    """
    rim = np.sqrt(np.clip(blob.height, 0, 1)) - 0.7
    light = 0.25 * rim - 0.06 * blob.slope[1] + grain
    paint(canvas, color + light[..., None], blob.alpha(2.0))


def write_demo_dataset(
    data: Path, seed: int = 42, train: int = 120, val: int = 40, size: int = 256
) -> None:
    """Draw the demo's pairs into data/images/{train,val} and data/masks/{train,val}.

    They are size x size pixels, and every pair has a random generator of its own.
    """
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            rng = np.random.default_rng([seed, split == "val", index])
            image, mask = draw_demo_pair(rng, size)
            name = f"demo_{index:03d}.png"
            write_image(data / "images" / split / name, image)
            write_image(data / "masks" / split / name, mask.astype(np.uint8) * 255)
