"""Images to encode: a file as it is, or changed first, such as turned or mirrored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from finetuning.basics.image_files import read_image


class Change(Protocol):
    """What is done to an image before it is encoded; its repr says all of it."""

    def of_array(self, values: np.ndarray) -> np.ndarray:
        """Return the changed HxWx3 uint8 RGB image."""


class ImageVariant(NamedTuple):
    """An image file that is changed before it is encoded."""

    path: Path
    change: Change

    def __str__(self) -> str:
        return str(self.path)


CachedImage = Path | ImageVariant


def read_variant(image: CachedImage) -> np.ndarray:
    """Read an image as HxWx3 uint8 RGB, and change it if it is a variant."""
    if isinstance(image, Path):
        return read_image(image)
    return image.change.of_array(read_image(image.path))


def file_of(image: CachedImage) -> Path:
    """Return an image's file."""
    return image if isinstance(image, Path) else image.path
