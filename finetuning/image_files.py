"""Reading images and masks, and writing them."""

from __future__ import annotations

import re
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.files import atomic_write

# Two bytes that begin a segment of a JPEG, or end it; pixels and padding hold none such.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def read_image(path: Path) -> np.ndarray:
    """Read any image that OpenCV knows, upright by its EXIF orientation.

    Returns an HxWx3 uint8 array in RGB. Raises UserError when it cannot be read, or has values
    that would turn black when cut to 8 bits.
    """
    image = _decode(path, _read_bytes(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image.dtype == np.uint16 and image.max() >= 1 << 12:
        image = (image >> 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(
            f"{path} holds {image.dtype} values up to {image.max():g}, not the 0 to 255 of a "
            "picture; save it as 8-bit JPEG or PNG"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask: gray > 127, or gray == 1 where a lossless file holds only 0 and 1.

    Returns an HxW bool array. Raises UserError when it cannot be read, or is no binary mask: in
    colour, in the alpha channel, or a label map, which a threshold would silently misread.
    """
    content = _read_bytes(path)
    is_jpeg = content.startswith(b"\xff\xd8")
    is_lossy = is_jpeg or content[:16].endswith(b"WEBPVP8 ")
    # UNCHANGED keeps an alpha channel in sight, but turns no JPEG upright.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH if is_jpeg else cv2.IMREAD_UNCHANGED
    mask = _decode(path, content, flags)
    if not (mask.min() >= 0 and mask.max() <= (65535 if mask.dtype == np.uint16 else 255)):
        raise UserError(f"{path} holds values that are not 0 to 255; save it in black and white")
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
    """Return the HxW values of a mask that may have been saved with 3 or 4 equal channels."""
    if mask.ndim == 2:
        return mask
    if mask.shape[2] == 4 and mask[..., 3].min() < mask[..., 3].max():
        raise UserError(f"{path} has a transparent part; save the mask in black and white")
    colors = mask[..., :3].astype(np.float64)
    if (colors.max(axis=2) - colors.min(axis=2)).max() > (64 if is_lossy else 8):
        raise UserError(f"{path} is a mask in colour; save it in black and white (0 and 255)")
    return mask[..., 1]


def _is_binary(gray: np.ndarray, is_lossy: bool) -> bool:
    """Say whether an HxW uint8 mask has no even areas but background and one bright value.

    The soft edges of smoothed masks and the noise of lossy ones are no even areas.
    """
    noise, brightest = 32 if is_lossy else 0, int(gray.max())
    kernel = np.ones((3, 3), np.uint8)
    is_even = cv2.erode(gray, kernel) == cv2.dilate(gray, kernel)
    is_between = (gray > noise) & (gray < brightest - noise)
    between = np.count_nonzero(is_even & is_between)
    return brightest > 127 and between <= max(16, 0.01 * np.count_nonzero(gray))


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an HxWx3 RGB or HxW gray uint8 array; the suffix of `path` names the format."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(path.suffix, image)[1]
    with atomic_write(path) as temporary:  # cv2.imwrite fails on non-ASCII paths on Windows
        temporary.write_bytes(encoded.tobytes())


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path")
    return path.read_bytes()


def _decode(path: Path, content: bytes, flags: int) -> np.ndarray:
    try:
        buffer = np.frombuffer(content, np.uint8)
        image = None if _is_cut_off(content) else cv2.imdecode(buffer, flags)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise UserError(f"{path} has more than 250 megapixels; make it smaller") from error
        image = None
    if image is None:
        raise UserError(
            f"{path} is not a readable image (damaged, cut off, or another kind of file); "
            "copy it again, or save it as JPEG or PNG"
        )
    return image


def _is_cut_off(content: bytes) -> bool:
    """Say whether a file's end is missing, which some versions of OpenCV fill with gray."""
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content
    if not content.startswith(b"\xff\xd8"):
        return not content
    # From segment to segment, so that the end of a thumbnail inside one is not taken for the end
    position = 2
    while marker := JPEG_MARKER.search(content, position):
        if marker[0] == b"\xff\xd9":
            return False
        length = content[marker.end() : marker.end() + 2]
        position = marker.end() + int.from_bytes(length, "big")
    return True
