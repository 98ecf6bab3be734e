"""Reading and writing images and masks."""

from __future__ import annotations

from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.basics.files import atomic_write, read_file
from finetuning.basics.image_decoding import decode_image, decode_palette, is_lossy_format

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip

MAX_VALUE = 1e300  # differences of larger values overflow
LOSSY_NOISE = 32  # how far lossy compression moves black and white
FEW_VALUES = 8  # in a mask without noise and without soft edges
SMOOTH_STEP = 24  # the most by which a smooth edge changes around 3x3 equal pixels
CHANCE_PIXELS = 2  # with equal neighbours; an area of 4x4 pixels has 4


def require_equal_sizes(
    image: Path, image_size: tuple[int, int], mask: Path | str, mask_size: tuple[int, int]
) -> None:
    """Raise UserError unless an image and its mask have the same (H,W)."""
    if image_size != mask_size:
        turned = (
            ": perhaps the image is turned upright by its EXIF orientation and the mask is not; "
            "save the mask upright"
        )
        raise UserError(
            f"{image} is {image_size[1]}x{image_size[0]} but {mask} is "
            f"{mask_size[1]}x{mask_size[0]}; a mask must have its image's size"
            f"{turned if image_size == mask_size[::-1] else ''}"
        )


def read_image(path: Path, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Read an image, upright by its EXIF orientation and without transparency.

    Returns an HxWx3 uint8 array in RGB. Values of more than 8 bits are stretched to 0..255 by
    to_8_bits. Raises UserError if it cannot be read or has several pages.
    """
    image = decode_image(path, read_file(path), color=True)
    if image.ndim == 3:
        image = image[..., :3]
    image = to_8_bits(path, image, value_range)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image


def to_8_bits(
    path: Path, values: np.ndarray, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Convert any array to uint8, stretching `value_range` (low, high) to 0..255 if it is given.

    A uint8 array is unchanged, whatever the range. Without a range, values from 0 to 255 are
    unchanged, unless they are fractions up to 1; all others are stretched from the 0.5 and 99.5
    percentiles of all channels together. Values outside are clipped. Raises UserError, which names
    `path`, for NaN and infinity.
    """
    if values.dtype == np.uint8:
        return values
    least, most = float(values.min()), float(values.max())
    if not (abs(least) < MAX_VALUE and abs(most) < MAX_VALUE):
        raise UserError(f"{path} holds NaN or infinite values; remove them, or save an 8-bit PNG")
    is_8_bits = least >= 0 and most <= 255 and (values.dtype.kind != "f" or most > 1)
    if is_8_bits and value_range is None:
        return np.rint(values).astype(np.uint8)

    # Map each 16-bit level once, which is faster than mapping each pixel
    is_table = values.dtype == np.uint16
    kind = np.uint16 if is_table else np.float64
    # Work in place on new arrays: one of 100 megapixels in float64 takes 2 GB
    low, high = (
        value_range
        or np.percentile(values.astype(kind), (0.5, 99.5), overwrite_input=True).tolist()
    )
    levels = np.arange(1 << 16, dtype=np.float64) if is_table else values.astype(kind)
    if value_range is None and low == high:  # an even image with a few spots
        low, high = least, most
    if low < high:
        np.clip(levels, low, high, out=levels)
        levels -= low
        levels /= high - low
        levels *= 255
    np.clip(levels, 0, 255, out=levels)
    levels = np.rint(levels, out=levels).astype(np.uint8)
    return levels[values] if is_table else levels


def read_values(path: Path) -> tuple[np.ndarray, bool]:
    """Read the stored values of a mask file, upright by its EXIF orientation.

    Returns an HxW, HxWx3 (RGB) or HxWx4 (RGBA) array, with a palette's colours in place of its
    indices, and whether the format is lossy. Raises UserError if it cannot be read or has several
    pages.
    """
    content = read_file(path)
    return decode_image(path, content), is_lossy_format(content)


def read_palette(path: Path) -> tuple[np.ndarray, list[tuple[int, ...]]] | None:
    """Read the HxW uint8 indices of a file with a palette, and its RGB colours, like read_values.

    None if it has no palette. Call read_values first: it refuses files that are no single image.
    """
    return decode_palette(read_file(path))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask: gray > 127, or gray == 1 if a lossless file holds only 0 and 1.

    Returns an HxW bool array, upright by the file's EXIF orientation. Raises UserError if it
    cannot be read or is not a binary mask: a colour mask, one in the alpha channel, or a label
    map, which a threshold would silently misread.
    """
    mask, is_lossy = read_values(path)
    if not (mask.min() >= 0 and mask.max() <= (65535 if mask.dtype == np.uint16 else 255)):
        raise UserError(f"{path} holds values outside 0 to 255; save it in black and white")
    gray = _single_channel(path, mask, is_lossy)

    if gray.dtype.kind == "f":
        gray = gray * 255 if gray.max() <= 1 else gray
    elif not is_lossy and gray.max() <= 1:
        return gray == 1
    elif gray.dtype == np.uint16 and gray.max() > 255:
        gray = gray >> 8
    gray = gray.astype(np.uint8)
    if gray.any() and not _is_binary(gray, is_lossy):
        values = ", ".join(map(str, np.unique(gray)[:5]))
        raise UserError(
            f"{path} is not black and white (its values start {values}: a label map?); "
            "save one binary mask, 0 for background and 255 for the object"
        )
    return gray > 127


def _single_channel(path: Path, mask: np.ndarray, is_lossy: bool) -> np.ndarray:
    """Return the HxW values of a mask, which may be saved as 3 equal channels, or 4 with alpha."""
    if mask.ndim == 2:
        return mask
    if mask.shape[2] == 4 and mask[..., 3].min() < mask[..., 3].max():
        raise UserError(f"{path} has a transparent part; save the mask in black and white")
    # Lossy compression makes equal channels differ, also in a PNG that was once a JPEG
    colors = mask[..., :3]
    if (colors.max(axis=2) - colors.min(axis=2)).max() > (64 if is_lossy else 8):
        raise UserError(f"{path} is a mask in colour; save it in black and white (0 and 255)")
    return mask[..., 1]


def _is_binary(gray: np.ndarray, is_lossy: bool) -> bool:
    """Return whether the even areas of an HxW uint8 mask are background or one bright value.

    The soft edges of smoothed masks and the noise of lossy ones are not even areas.
    """
    noise, brightest = LOSSY_NOISE if is_lossy else 0, int(gray.max())
    kernel = np.ones((3, 3), np.uint8)
    is_even = cv2.erode(gray, kernel) == cv2.dilate(gray, kernel)
    is_third = is_even & (gray > noise) & (gray < brightest - noise)
    # A few even pixels happen by chance; a label map has whole areas of other values
    if brightest <= 127 or np.count_nonzero(is_third) > max(16, 0.01 * np.count_nonzero(gray)):
        return False
    if not is_third.any():
        return True

    # An area of a third value, however small, ends abruptly, or has no brighter (or no darker)
    # pixels near it; what is even by chance lies inside a smooth edge. A PNG that was once a JPEG
    # has even noise near black and near white
    if np.count_nonzero(np.bincount(gray.ravel(), minlength=256)) > FEW_VALUES:
        is_third &= (gray > LOSSY_NOISE) & (gray < brightest - LOSSY_NOISE)
    near, wide = np.ones((5, 5), np.uint8), np.ones((11, 11), np.uint8)
    is_abrupt = cv2.morphologyEx(gray, cv2.MORPH_GRADIENT, near) > SMOOTH_STEP
    is_extreme = (cv2.dilate(gray, wide) == gray) | (cv2.erode(gray, wide) == gray)
    return np.count_nonzero(is_third & (is_abrupt | is_extreme)) <= CHANCE_PIXELS


def write_image(path: Path, image: np.ndarray, in_partial_folder: bool = False) -> None:
    """Write an HxWx3 RGB or HxW gray array of uint8, or a uint16 label map, by the path's suffix.

    in_partial_folder: write it plainly, much faster, as the folder is removed after an error.
    """
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # cv2.imwrite fails on non-ASCII paths on Windows
    encoded = cv2.imencode(path.suffix, image)[1].tobytes()
    if in_partial_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)
