"""Reading label maps: exact values and colours, palettes, and soft edges.

Soft edges are those of files that were resized with interpolation, or drawn with anti-aliasing:
rings of other values between two areas, which would become objects. A pixel belongs to such a ring
if it is in no area of its value, but near areas of lower and of higher values. Thin objects and
tiny ones are not: they lie on one other value. Nor are the slivers of touching objects: each is at
one place, while the values of rings are scattered.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.basics.image_files import read_palette, read_values

MAX_VALUE = 65535  # of a label map
Value = tuple[int, ...]  # a gray value (V,), or a colour (R,G,B)

AREA = np.ones((3, 3), np.uint8)  # the smallest area of one value
REACH = np.ones((7, 7), np.uint8)  # how near the areas on both sides of a ring are
MIN_PIXELS = 12  # of rings; fewer may be chance
# The share of ring pixels among all pixels at edges, by the step in which pixels are sampled: the
# wide rings of strongly enlarged files are narrow in a sample. Drawn label maps of cells, vessels
# and tissue have up to 0.03 at full size and 0.1 in samples, interpolated ones mostly 0.1 to 0.5.
SHARES = {1: 0.08, 2: 0.15, 4: 0.15}
# A single value in rings may be a class of its own, such as the border of cells, unless there are
# many of them and most pixels of the value are in areas elsewhere
SINGLE_SHARE, AREA_SHARE = 0.12, 0.6


class Pixels(NamedTuple):
    """The values of a mask file. In a file with a palette of colours, they are its indices."""

    codes: np.ndarray  # HxW integers: to_code of each pixel's value
    values: list[Value]  # that occur, without the background: black, or index 0
    channels: np.ndarray  # HxWxC, as stored; of a palette, the colours
    palette: list[Value] | None = None  # the colours by index
    has_indices: bool = False  # whether `values` are indices of the palette

    def where(self, value: Value) -> np.ndarray:
        """Return the HxW bool mask of a value or colour that the user gave."""
        codes = [to_code(same) for same in self.same(value)]
        return self.codes == codes[0] if len(codes) == 1 else np.isin(self.codes, codes)

    def same(self, value: Value) -> list[Value]:
        """Return what a value or colour that the user gave stands for among the file's values."""
        if self.palette is None:
            return [value]
        by_color = [(i,) for i, color in enumerate(self.palette) if color == value]
        is_index = len(value) == 1 and value[0] < len(self.palette)
        if self.has_indices:
            return [value] if is_index else by_color
        # In a palette of grays, a number is a gray first, and an index if there is no such gray
        return [self.palette[value[0]]] if is_index and not by_color else [value]

    def color(self, value: Value) -> Value:
        """Return the colour of a value: of an index in the palette, else the value itself."""
        return self.palette[value[0]] if self.has_indices else value

    def area_values(self) -> list[Value]:
        """Return the values that fill an area of at least 3x3 pixels somewhere."""
        codes = self.codes.astype(np.float64)
        is_even = cv2.erode(codes, AREA) == cv2.dilate(codes, AREA)
        found = set(np.unique(self.codes[is_even]).tolist())
        return [value for value in self.values if to_code(value) in found]

    def soft_values(self) -> list[Value]:
        """Return the values that occur as rings between areas; see soft_edges."""
        found = find_soft_values(self.channels, self.codes)
        if self.has_indices and not len(found):  # interpolated after the indices were read
            found = find_soft_values(self.codes[..., None], self.codes)
        return [from_code(int(code)) for code in found]


def to_code(value: Value) -> int:
    """Return one integer for a gray value or a colour; an 8-bit gray has its colour's code."""
    if len(value) == 3:
        red, green, blue = value
        return red << 16 | green << 8 | blue
    return value[0] * 0x010101 if value[0] < 256 else value[0] << 24


def from_code(code: int) -> Value:
    """Return the gray value or colour that has this code; a gray colour becomes a gray value."""
    if code >> 24:
        return (code >> 24,)
    red, green, blue = code >> 16, code >> 8 & 255, code & 255
    return (red,) if red == green == blue else (red, green, blue)


def read_pixels(path: Path, problem: UserError | None) -> Pixels:
    """Return the values of a mask file.

    problem: why it is not a binary mask; raised if the file has no exact values either.
    """
    pixels, is_lossy = read_values(path)
    if is_lossy:
        raise problem or UserError(
            f"{path} is stored with losses (like a JPEG), so its values are not exact; "
            "export the masks as PNG"
        )
    indices, palette = read_palette(path) or (None, None)
    if pixels.dtype not in (np.uint8, np.uint16) or (pixels.ndim == 3 and pixels.dtype != np.uint8):
        pixels = _whole_numbers(path, pixels)
    # A transparent part is background if it is exactly what is black; otherwise it is ambiguous
    if palette is None and pixels.ndim == 3 and pixels.shape[2] == 4:
        is_clear = pixels[..., 3] == 0
        if is_clear.any() and (is_clear != ~pixels[..., :3].any(axis=2)).any():
            raise problem or UserError(
                f"{path} has a transparent part that is not black; save it without transparency"
            )
    if palette:
        palette = [from_code(to_code(color)) for color in palette]
        has_indices = any(len(color) == 3 for color in palette)
        if has_indices:
            return _with_indices(indices, palette)
    if pixels.ndim == 3:
        channels = pixels[..., :3]
        red, green, blue = np.moveaxis(channels, 2, 0).astype(np.uint32)
        codes = red << 16 | green << 8 | blue
        found = np.unique(codes)
    else:
        channels, occurring = pixels[..., None], np.flatnonzero(np.bincount(pixels.ravel()))
        table = np.zeros(int(occurring[-1]) + 1, np.int64)
        table[occurring] = found = [to_code((int(value),)) for value in occurring]
        codes = table[pixels]
    return Pixels(codes, [from_code(int(code)) for code in found if code], channels, palette)


def _with_indices(indices: np.ndarray, palette: list[Value]) -> Pixels:
    """Return the values of a file with a palette of colours."""
    codes = indices.astype(np.int64) * to_code((1,))
    # Background is index 0, or black where a program has sorted the palette in another way
    occurring = np.flatnonzero(np.bincount(indices.ravel()))
    palette += [(0,)] * (int(occurring[-1]) + 1 - len(palette))
    black = [i for i in occurring if palette[i] == (0,)]
    background = [0] if palette[0] == (0,) or not black else black
    found = [(int(i),) for i in occurring if i not in background]
    colors = np.array([color * 3 if len(color) == 1 else color for color in palette], np.uint8)
    return Pixels(codes, found, colors[indices], palette, has_indices=True)


def _whole_numbers(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Return a label map of any type as uint16; raise UserError for values that do not fit."""
    is_whole = (
        np.isfinite(pixels) & (pixels >= 0) & (pixels <= MAX_VALUE) & (np.rint(pixels) == pixels)
    )
    if pixels.ndim == 3 or not is_whole.all():
        example = pixels[~is_whole][:1]
        what = (
            f"values like {example[0]:g}" if example.size else f"colours of {pixels.dtype} values"
        )
        raise UserError(
            f"{path} holds {what}; a label map holds whole numbers from 0 to {MAX_VALUE}, "
            "so save it as a PNG or TIFF of 8 or 16 bits"
        )
    return pixels.astype(np.uint16)


def find_soft_values(channels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the codes of the values in rings between areas; an empty array if edges are sharp.

    Arguments:
      channels: HxWxC values of the pixels.
      codes: HxW integers, one for each different value.
    """
    for step, share in SHARES.items():
        found = _find_in_sample(channels[::step, ::step], codes[::step, ::step], share)
        if len(found) > 1 or (len(found) and step == 1):
            return found
    return np.array([], codes.dtype)


def _find_in_sample(channels: np.ndarray, codes: np.ndarray, share: float) -> np.ndarray:
    nothing = np.array([], codes.dtype)
    layers = [np.ascontiguousarray(layer, np.float32) for layer in np.moveaxis(channels, 2, 0)]
    is_even = np.ones(codes.shape, bool)
    for layer in layers:
        is_even &= cv2.erode(layer, AREA) == cv2.dilate(layer, AREA)
    in_area = cv2.dilate(is_even.astype(np.uint8), AREA) > 0
    is_between = np.zeros(codes.shape, bool)
    for layer in layers:
        highest = cv2.dilate(np.where(in_area, layer, -np.inf).astype(np.float32), REACH)
        lowest = cv2.erode(np.where(in_area, layer, np.inf).astype(np.float32), REACH)
        is_between |= (lowest < layer) & (layer < highest)
    is_between &= ~in_area
    at_edges = np.count_nonzero(~is_even)
    needed = max(MIN_PIXELS, share * at_edges)
    if np.count_nonzero(is_between) < needed:
        return nothing

    is_between &= ~_touches_own(codes, in_area)
    values, counts, is_scattered = _scattered_values(is_between, codes)
    in_rings, values = counts[is_scattered].sum(), values[is_scattered]
    if len(values) == 1:
        is_value = codes == values[0]
        is_class = np.count_nonzero(is_value & in_area) < AREA_SHARE * np.count_nonzero(is_value)
        return nothing if is_class or in_rings < SINGLE_SHARE * at_edges else values
    return values if in_rings >= needed else nothing


def _touches_own(codes: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return which pixels have a marked pixel of the same code among themselves and neighbours."""
    around, marks = np.pad(codes, 1), np.pad(marked, 1)
    height, width = codes.shape
    touches = np.zeros_like(marked)
    for y in range(3):
        for x in range(3):
            window = slice(y, y + height), slice(x, x + width)
            touches |= marks[window] & (around[window] == codes)
    return touches


def _scattered_values(
    chosen: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the codes of the chosen pixels, their numbers, and which are not at one place.

    A code is at one place if its chosen pixels fill a good part of their bounding box.
    """
    values, inverse, counts = np.unique(codes[chosen], return_inverse=True, return_counts=True)
    if not len(values):
        return values, counts, np.zeros(0, bool)
    order, starts = np.argsort(inverse, kind="stable"), np.cumsum(counts) - counts
    box = np.ones(len(values), np.int64)
    for positions in np.nonzero(chosen):
        positions = positions[order]
        lengths = np.maximum.reduceat(positions, starts) - np.minimum.reduceat(positions, starts)
        box *= lengths + 1
    return values, counts, (counts == 1) | (box > 4 * counts + 4)
