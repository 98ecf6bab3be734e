"""Decoding image files of every format: one page, upright, as stored or in colour.

OpenCV decodes, and Pillow takes the formats that OpenCV lacks. Versions of OpenCV differ in
orientation, pages, channels and truncated files, so Pillow or, for TIFFs, tiff.py checks these.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from sam2_utils import MAX_MEGAPIXELS, UserError

import cv2
import numpy as np
from PIL import Image

from finetuning.basics.files import MAKE_SMALLER
from finetuning.basics.tiff import (
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

# Pillow reads these formats' headers, and the pixels of READ_BY_PILLOW where this OpenCV cannot
PILLOW_FORMATS = ["AVIF", "GIF", "JPEG", "PNG", "WEBP"]
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()  # turns images upright and sets their EXIF orientation to 1
    PILLOW_FORMATS.append("HEIF")
READ_BY_PILLOW = ("AVIF", "GIF", "HEIF")
PALETTE_FORMATS = ("PNG", "GIF", "BMP", "TIFF")
Image.MAX_IMAGE_PIXELS = None  # decode_image checks MAX_MEGAPIXELS instead
warnings.filterwarnings("ignore", module="PIL")  # about damaged EXIF, for example

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
HEIC_START = rb".{4}ftyp(hei|hev|mif|msf)"
# EXIF orientation: cv2.flip's code to turn an image upright, after transposing from 5 on
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}

# Kinds of files that OpenCV does not read, and patterns of their first bytes
OTHER_KINDS = {
    "a CMYK JPEG 2000 image": rb"\0\0\0\x0cjP.{,500}colr\x01..\0\0\0\x0c",
    "a DICOM file": rb".{128}DICM",
    "a NumPy array": rb"\x93NUMPY",
    "a PDF file": rb"%PDF",
    "a web page": rb"(?i)\s*<(!doctype )?html",
    "a pointer of Git LFS, not the image itself": rb"version https://git-lfs",
}
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
# First bytes of MP4 and MOV (but not of AVIF and HEIC), AVI, MKV and WebM, MPEG, WMV, FLV
VIDEO_START = (
    rb"....ftyp(?!avif|avis|hei|hev|mif|msf)|....(moov|mdat|wide)|RIFF....AVI |\x1aE\xdf\xa3"
    rb"|\0\0\x01[\xb3\xba]|0&\xb2u\x8ef\xcf\x11|FLV\x01"
)


def decode_image(path: Path, content: bytes, color: bool = False) -> np.ndarray:
    """Decode the content of an image file, turned upright by its EXIF orientation.

    Returns an HxW, HxWx3 (RGB) or HxWx4 (RGBA) array of the stored dtype and values. With `color`,
    HxWx3 unless OpenCV cannot convert it to colour (some TIFFs of 32 and 64 bits). Raises
    UserError, which names `path`, if it cannot be decoded or has more than one page.
    """
    pages, image = tiff_pages(content), _open(content)
    if image and image.width * image.height > MAX_MEGAPIXELS * 10**6:
        raise _too_large(path, f"{image.width}x{image.height} pixels, ")
    if (count := len(pages) or _count_frames(image)) > 1:
        raise UserError(f"{path} holds {count} pages; save the one that you want as its own file")
    turn = _orientation(content, pages, image)
    if pages:
        _require_known_channels(path, pages[0])
        content = with_one_upright_page(content, pages[0])
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH if color else cv2.IMREAD_UNCHANGED
    # OpenCV would read a truncated JPEG without an error
    is_cut_off = content.startswith(JPEG_START) and _is_cut_off(content, image)
    values = None if is_cut_off else _imdecode(path, content, flags)
    if values is None and pages and color:
        values = _imdecode(path, content, cv2.IMREAD_UNCHANGED)  # 32-bit gray, for example
    values = _load(image) if values is None else _in_rgb(values)
    if values is None:
        if re.match(HEIC_START, content, re.DOTALL):
            require_heic_reader(path)
        if re.match(VIDEO_START, content, re.DOTALL):
            raise UserError(f"{path} is a video; {how_to_save_frames(path.name)}")
        raise UserError(f"{path} is not a readable image {_reason_and_remedy(content, pages)}")

    return _upright(values, turn)


def _upright(values: np.ndarray, turn: int) -> np.ndarray:
    if turn > 4:  # 5 to 8 are quarter turns
        values = cv2.transpose(values)
    return cv2.flip(values, FLIPS[turn]) if turn in FLIPS else values


def decode_palette(content: bytes) -> tuple[np.ndarray, list[tuple[int, ...]]] | None:
    """Return the HxW uint8 indices of a one-page palette image, upright, and its RGB colours.

    None if the file has no palette, or one with a transparent colour that is not a black first one.
    """
    pages = tiff_pages(content)
    if pages:
        content = with_one_upright_page(content, pages[0])
    with contextlib.suppress(Exception):  # damaged files raise many kinds
        image = Image.open(io.BytesIO(content), formats=PALETTE_FORMATS)
        colors = list(map(tuple, np.reshape(image.getpalette() or [], (-1, 3)).tolist()))
        while image.format in ("GIF", "TIFF") and colors[1:] and not any(colors[-1]):
            colors.pop()  # these formats fill palettes up with black
        clear = image.info.get("transparency", b"")  # an index, or the opacity of each
        clear = {clear} if isinstance(clear, int) else {i for i, a in enumerate(clear) if a < 255}
        if image.mode == "P" and (not clear or (clear == {0} and not any(colors[0]))):
            turn = 1 if pages else _orientation(content, pages, image)
            return _upright(np.array(image), turn), colors
    return None


def orientation(content: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 if it is missing or invalid.

    It says how to turn the stored pixels upright: 3 is half a turn, 6 a quarter turn clockwise.
    """
    return _orientation(content, tiff_pages(content), _open(content))


def _orientation(content: bytes, pages: list[Directory], image: Image.Image | None) -> int:
    directories = pages or tiff_directories(_exif(content, image))
    value = directories[0].first(ORIENTATION) if directories else 1
    return value if value in range(1, 9) else 1


def is_lossy_format(content: bytes) -> bool:
    """Return whether a file's format is lossy, so that saved values change."""
    is_lossy_webp = content.startswith(b"RIFF") and b"VP8 " in content
    return is_lossy_webp or content.startswith(JPEG_START) or content[4:8] == b"ftyp"


def how_to_save_frames(video: str) -> str:
    """Return what to do with a video of this file name."""
    frames = f"{video.rpartition('.')[0]}_%05d.png"
    return (
        "save its frames as images first, such as two a second: "
        f'ffmpeg -i "{video}" -vf fps=2 "{frames}"'
    )


def video_hint(files: Iterable[Path]) -> str:
    """Return what to do with the first video among the files, or ""."""
    names = [path.name for path in files if path.name.lower().endswith(VIDEO_SUFFIXES)]
    return f"; {names[0]} is a video: {how_to_save_frames(names[0])}" if names else ""


def require_heic_reader(path: Path) -> None:
    """Raise UserError, which names the path of a HEIC photo, unless HEIC can be read."""
    if "HEIF" not in PILLOW_FORMATS:
        raise UserError(f"{path} is HEIC; pip install pillow-heif, or save it as JPEG or PNG")


def _open(content: bytes) -> Image.Image | None:
    """Open an image of PILLOW_FORMATS, reading its header only; return None for other files."""
    with contextlib.suppress(Exception):  # damaged files raise many kinds
        return Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    return None


def _exif(content: bytes, image: Image.Image | None) -> bytes:
    if not image:
        return b""
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" in content:
        # The EXIF data may follow the pixels, which must then be read first
        with contextlib.suppress(Exception):
            image.load()
    return (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")


def _count_frames(image: Image.Image | None) -> int:
    """Return the number of frames of an animation, or 1."""
    with contextlib.suppress(Exception):
        # MPO is a JPEG followed by further images, such as previews
        return 1 if image.format == "MPO" else image.n_frames
    return 1


def _is_cut_off(content: bytes, image: Image.Image | None) -> bool:
    """Return whether a JPEG is truncated: no end marker follows its header.

    A thumbnail in the header has its own end marker. Some versions of OpenCV fill missing pixels
    with gray; Pillow does so if the file ends in zeros.
    """
    return not image or content.find(JPEG_END, image.fp.tell()) < 0


def _load(image: Image.Image | None) -> np.ndarray | None:
    """Return the HxW, RGB or RGBA pixels of a format in READ_BY_PILLOW, or None."""
    with contextlib.suppress(Exception):
        if image.format in READ_BY_PILLOW:
            is_known = image.mode in ("L", "RGB", "RGBA")
            return np.array(image if is_known else image.convert("RGB"))  # a writable copy
    return None


def _imdecode(path: Path, content: bytes, flags: int) -> np.ndarray | None:
    try:
        buffer = np.frombuffer(content, np.uint8)
        # Whether OpenCV turns an image upright depends on its version, the format and the flags
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(buffer, flags)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise _too_large(path) from error
        return None


def _too_large(path: Path, size: str = "") -> UserError:
    return UserError(
        f"{path} has {size}more than {MAX_MEGAPIXELS} megapixels, or a million a side; "
        f"{MAKE_SMALLER}"
    )


def _in_rgb(values: np.ndarray) -> np.ndarray:
    """Convert OpenCV's BGR or BGRA to RGB or RGBA; gray is unchanged."""
    if values.ndim == 2:
        return values
    if values.dtype == np.uint8:
        is_opaque = values.shape[2] == 3
        return cv2.cvtColor(values, cv2.COLOR_BGR2RGB if is_opaque else cv2.COLOR_BGRA2RGBA)
    return values[..., [2, 1, 0, 3][: values.shape[2]]]


def _require_known_channels(path: Path, page: Directory) -> None:
    """Raise UserError for TIFF channels that OpenCV does not read, or mixes up."""
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
    """Return what kind of unreadable file this is, according to its header, and what to do."""
    kinds = (kind for kind, start in OTHER_KINDS.items() if re.match(start, content, re.DOTALL))
    kind = _odd_tiff(pages[0]) if pages else next(kinds, None)
    if kind:
        return f"({kind}, which OpenCV {cv2.__version__} does not read); save it as JPEG or PNG"
    return "(damaged, cut off, or another kind of file); copy it again, or save it as JPEG or PNG"


def _odd_tiff(page: Directory) -> str | None:
    """Return the unusual values or compression of a TIFF, or None."""
    bits, kind = page.first(BITS), page.first(FORMAT)
    kinds = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}
    usual = {1: (1, 2, 4, 8, 10, 12, 14, 16), 2: (8, 16, 32), 3: (32, 64)}
    if kind in kinds and bits not in usual.get(kind, ()):
        return f"a TIFF of {bits}-bit {kinds[kind]} values"
    if page.first(COMPRESSION) not in (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946):
        return f"a TIFF of compression {page.first(COMPRESSION)}"
    return None
