"""Images and their masks on disk: found by name, read together."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePath
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.image_files import read_image, read_mask

DEMO_DATA, DEMO_OUTPUT = Path("data/demo"), Path("output/demo")
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
UNREADABLE_SUFFIXES = {".heic", ".heif"}  # of phones; OpenCV does not read them


class Pair(NamedTuple):
    """An image and its mask: files on disk, or members of a zip archive (zipfile.Path)."""

    name: str
    image: Path
    mask: Path


def find_pairs(image_dir: Path, mask_dir: Path) -> list[Pair]:
    """Pair the images and the masks of two folders by file stem, sorted by name.

    The suffixes may differ. Raises UserError unless every image has one mask, and the reverse.
    """
    images, masks = _files_by_stem(image_dir), _files_by_stem(mask_dir)
    if not images:
        raise UserError(f"no images in {image_dir}; expected files like name.jpg or name.png")
    _require_partners(images, masks, f"no mask of the same name in {mask_dir}")
    _require_partners(masks, images, f"no image of the same name in {image_dir}")
    return [Pair(stem, images[stem], masks[stem]) for stem in sorted(images)]


def _require_partners(files: dict[str, Path], partners: dict[str, Path], what: str) -> None:
    alone = sorted(files.keys() - partners.keys())
    if alone:
        names = ", ".join(files[stem].name for stem in alone[:3])
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise UserError(f"{names}{more}: {what}; add what is missing, or take these files away")


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Map the stem of each image file in `folder` to its path; hidden files are left out."""
    files: dict[str, Path] = {}
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; check the path")
    for path in folder.iterdir():
        name = PurePath(path.name)
        if name.suffix.lower() in UNREADABLE_SUFFIXES:
            raise UserError(f"{path} is in a format that cannot be read; save it as JPEG or PNG")
        if name.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        stem = unicodedata.normalize("NFC", name.stem)  # macOS decomposes 한글 in file names
        if stem in files:
            raise UserError(
                f"{files[stem].name} and {path.name} in {folder} have the same name but for the "
                "suffix; keep one of them"
            )
        files[stem] = path
    return files


def split_pairs(data: Path, split: str, limit: int | None = None) -> list[Pair]:
    """Return the pairs of a split ("train" or "val") of a data folder, the first `limit` of them.

    Raises UserError with the command to run where the folder is not there.
    """
    image_dir, mask_dir = data / "images" / split, data / "masks" / split
    for folder in (image_dir, mask_dir):
        if not folder.is_dir():
            option = "--demo" if data == DEMO_DATA else f"--data {data}"
            raise UserError(f"no data in {folder}; run: python download_dataset.py {option}")
    return find_pairs(image_dir, mask_dir)[:limit]


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Read an image (HxWx3 uint8 RGB) and its mask (HxW bool), which must have the same size."""
    image, mask = read_image(pair.image), read_mask(pair.mask)
    require_equal_sizes(pair.image, image.shape[:2], pair.mask, mask.shape)
    return image, mask


def require_equal_sizes(
    image: Path, image_size: tuple[int, int], mask: Path | str, mask_size: tuple[int, int]
) -> None:
    """Raise UserError unless an image and its mask have the same (H,W)."""
    if image_size != mask_size:
        raise UserError(
            f"{image} is {image_size[1]}x{image_size[0]} but {mask} is "
            f"{mask_size[1]}x{mask_size[0]}; a mask must have its image's size"
        )
