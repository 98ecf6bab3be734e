"""Image files of every format to pixel values: one page, upright, as stored or in colour.

OpenCV decodes; what it gets wrong or passes over (orientation, pages, channels) is read from the
file's own headers here, so that it does not depend on OpenCV's version.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from sam2_utils import MAX_MEGAPIXELS, UserError

import cv2
import numpy as np
from PIL import Image

from finetuning.files import MAKE_SMALLER
from finetuning.tiff import (
    BITS,
    COMPRESSION,
    EXTRA_SAMPLES,
    FORMAT,
    ORIENTATION,
    PLANES,
    SAMPLES,
    Directory,
    tiff_directories,
    tiff_pages,
    with_one_upright_page,
)

# Two bytes that begin a segment of a JPEG, or end it; pixels and padding hold none such.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
JPEG_START, JPEG_END, JPEG_SCAN, JPEG_EXIF = b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xe1"
PNG_START = b"\x89PNG\r\n\x1a\n"

# EXIF orientation of an AVIF by its mirror (none, top to bottom, left to right) and quarter turns
AVIF_ORIENTATIONS = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}
# cv2.flip's code to turn an image upright by its EXIF orientation, after a transposition from 5 on
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}

# What OpenCV, or an older version of it, does not read, by how the file begins
OTHER_KINDS = {
    "a GIF image": rb"GIF8",
    "an AVIF image": rb".{4}ftypavi[fs]",
    "a HEIC photo": rb".{4}ftyp(hei|hev|mif|msf)",
    "a CMYK JPEG 2000 image": rb"\0\0\0\x0cjP.{,500}colr\x01..\0\0\0\x0c",
    "a DICOM file": rb".{128}DICM",
    "a NumPy array": rb"\x93NUMPY",
    "a PDF file": rb"%PDF",
    "a web page": rb"(?i)\s*<(!doctype )?html",
    "a pointer of Git LFS, not the image itself": rb"version https://git-lfs",
}


def decode(path: Path, content: bytes, color: bool = False) -> np.ndarray:
    """Decode the content of an image file, turned upright by its EXIF orientation.

    Returns an HxW, HxWx3 (RGB) or HxWx4 (RGBA) array of the stored dtype and values; with `color`
    HxWx3 where OpenCV makes colour of it, else as stored (some TIFFs of 32 and 64 bits). Raises
    UserError, with `path` in it, when it cannot be decoded or holds more than one image.
    """
    pages, turn = tiff_pages(content), orientation(content)
    if (count := len(pages) or _count_frames(content)) > 1:
        raise UserError(f"{path} holds {count} pages; save the one that you want as its own file")
    if pages:
        _require_known_channels(path, pages[0])
        content = with_one_upright_page(content, pages[0])
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH if color else cv2.IMREAD_UNCHANGED
    values = _imdecode(path, content, flags)
    if values is None and pages and color:
        values = _imdecode(path, content, cv2.IMREAD_UNCHANGED)  # gray of 32 bits, for one
    if values is None:
        raise UserError(f"{path} is not a readable image {_reason_and_remedy(content, pages)}")

    values = _in_rgb(values)
    if turn > 4:
        values = cv2.transpose(values)
    return cv2.flip(values, FLIPS[turn]) if turn in FLIPS else values


def orientation(content: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 where it has none, or a broken one.

    It names how to turn the stored pixels upright: 3 by a half, 6 by a quarter clockwise.
    """
    if content[4:11] == b"ftypavi":
        return _avif_orientation(content)
    directories = tiff_pages(content) or tiff_directories(_exif(content))
    value = directories[0].first(ORIENTATION) if directories else 1
    return value if value in range(1, 9) else 1


def is_lossy_format(content: bytes) -> bool:
    """Say whether a file is of a format that changes the values that were saved."""
    is_webp = content.startswith(b"RIFF")
    is_lossy_webp = is_webp and any(name == b"VP8 " for name, _, _ in _segments(content))
    return is_lossy_webp or content.startswith(JPEG_START) or content[4:11] == b"ftypavi"


def _imdecode(path: Path, content: bytes, flags: int) -> np.ndarray | None:
    try:
        buffer = np.frombuffer(content, np.uint8)
        # OpenCV's own turn depends on its version, the format and the flags.
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
        return None if _is_cut_off(content) else cv2.imdecode(buffer, flags)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise UserError(
                f"{path} has {_size_in_words(content)}more than {MAX_MEGAPIXELS} megapixels, or a "
                f"million a side; {MAKE_SMALLER}"
            ) from error
        return None


def _size_in_words(content: bytes) -> str:
    """Say of an image how large it is, where Pillow finds that in its header."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None
        width, height = Image.open(io.BytesIO(content)).size
        return f"{width}x{height} pixels, "
    return ""


def _in_rgb(values: np.ndarray) -> np.ndarray:
    """Return RGB or RGBA of OpenCV's BGR or BGRA; gray stays as it is."""
    if values.ndim == 2:
        return values
    if values.dtype == np.uint8:
        is_opaque = values.shape[2] == 3
        return cv2.cvtColor(values, cv2.COLOR_BGR2RGB if is_opaque else cv2.COLOR_BGRA2RGBA)
    return values[..., [2, 1, 0, 3][: values.shape[2]]]


def _require_known_channels(path: Path, page: Directory) -> None:
    """Raise UserError for channels of a TIFF that OpenCV does not read, or mixes up."""
    samples, bits = page.first(SAMPLES), page.first(BITS)
    is_gray_and_alpha = samples == 2 and bits == 8 and page.first(EXTRA_SAMPLES, 0) in (1, 2)
    if samples > 4 or (samples == 2 and not is_gray_and_alpha):
        raise UserError(f"{path} has {samples} channels; save three of them (RGB), or one")
    if samples > 1 and bits > 8 and page.first(PLANES) == 2:
        raise UserError(
            f"{path} holds its {samples} channels one after the other (planar), not pixel by "
            "pixel; save it as RGB, or as PNG"
        )


def _reason_and_remedy(content: bytes, pages: list[Directory]) -> str:
    """Say what a file is that OpenCV cannot read, as far as its header tells, and what to do."""
    kinds = (kind for kind, start in OTHER_KINDS.items() if re.match(start, content, re.DOTALL))
    kind = _odd_tiff(pages[0]) if pages else next(kinds, None)
    if kind:
        return f"({kind}, which OpenCV {cv2.__version__} does not read); save it as JPEG or PNG"
    return "(damaged, cut off, or another kind of file); copy it again, or save it as JPEG or PNG"


def _odd_tiff(page: Directory) -> str | None:
    """Name the values or the compression of a TIFF where they are not the usual ones."""
    bits, kind = page.first(BITS), page.first(FORMAT)
    kinds = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}
    usual = {1: (1, 2, 4, 8, 10, 12, 14, 16), 2: (8, 16, 32), 3: (32, 64)}
    if kind in kinds and bits not in usual.get(kind, ()):
        return f"a TIFF of {bits}-bit {kinds[kind]} values"
    if page.first(COMPRESSION) not in (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946):
        return f"a TIFF of compression {page.first(COMPRESSION)}"
    return None


def _segments(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the parts of a JPEG, PNG or WebP: their names, and where their data begins and ends."""
    if content.startswith(JPEG_START):
        # From one to the next, so that the end of a thumbnail inside one is not taken for the end
        position = 2
        while marker := JPEG_MARKER.search(content, position):
            start = marker.end() + 2
            position = start - 2 + int.from_bytes(content[start - 2 : start], "big")
            yield marker[0], start, position
    elif content.startswith((PNG_START, b"RIFF")):
        is_png = content.startswith(PNG_START)
        position, order = (8, "big") if is_png else (12, "little")
        while len(head := content[position : position + 8]) == 8:
            name, length = (head[4:], head[:4]) if is_png else (head[:4], head[4:])
            end = position + 8 + int.from_bytes(length, order)
            yield name, position + 8, end
            position = end + (4 if is_png else end % 2)  # a checksum, or padding


def _is_cut_off(content: bytes) -> bool:
    """Say whether a file's end is missing, which some versions of OpenCV fill with gray."""
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content
    if content.startswith(JPEG_START):
        return all(name != JPEG_END for name, _, _ in _segments(content))
    return not content


def _exif(content: bytes) -> bytes:
    for name, start, end in _segments(content):
        is_exif = name == JPEG_EXIF and content[start : start + 6] == b"Exif\0\0"
        if is_exif or name in (b"eXIf", b"EXIF"):
            return content[start:end].removeprefix(b"Exif\0\0")
        if name == JPEG_SCAN:
            break
    return b""


def _avif_orientation(content: bytes) -> int:
    """Return what the properties irot and imir say in EXIF's terms; AVIF's own EXIF has no say."""
    head = content[: content.find(b"mdat")]
    turns, mirror = head.find(b"irot") + 4, head.find(b"imir") + 4
    quarters = head[turns] & 3 if 4 <= turns < len(head) else 0
    return AVIF_ORIENTATIONS[head[mirror] & 1 if 4 <= mirror < len(head) else None][quarters]


def _count_frames(content: bytes) -> int:
    """Return how many frames an animated GIF, PNG, WebP or AVIF has; 1 or 0 for another file."""
    if content.startswith(b"GIF8"):
        return _count_gif_frames(content)
    if content[4:12] == b"ftypavis":
        at = content.find(b"stsz") + 12  # behind the table's name, version and one other number
        return int.from_bytes(content[at : at + 4], "big")
    if content.startswith(PNG_START):
        at = next((start for name, start, _ in _segments(content) if name == b"acTL"), 0)
        return int.from_bytes(content[at : at + 4], "big") if at else 1
    is_webp = content.startswith(b"RIFF")
    return sum(name == b"ANMF" for name, _, _ in _segments(content)) if is_webp else 1


def _count_gif_frames(content: bytes) -> int:
    """Count from block to block: https://www.w3.org/Graphics/GIF/spec-gif89a.txt."""
    frames = 0
    with contextlib.suppress(IndexError):  # cut off
        position = 13 + _gif_table_length(content[10])
        while content[position] != 0x3B:
            is_frame = content[position] == 0x2C
            frames += is_frame
            position += 11 + _gif_table_length(content[position + 9]) if is_frame else 2
            while content[position]:
                position += 1 + content[position]
            position += 1
    return frames


def _gif_table_length(flags: int) -> int:
    return 6 << (flags & 7) if flags & 0x80 else 0
