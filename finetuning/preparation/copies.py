"""Find duplicates and near-duplicates, which would leak from the training to the validation set.

Images are compared as thumbnails of 32x32 gray values. Two images are copies if their thumbnails
correlate strongly, both as they are and after subtracting the mean image. Thumbnails also show
whether images in the order of their names are consecutive frames of a recording.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from finetuning.basics.command_line import brief
from finetuning.basics.files import write_csv

COPIES_FILE = "copies.csv"
SIDE = 32  # side of a thumbnail, in pixels
# Smallest correlations of copies. Among 900 images of Kvasir-SEG, the fourth most similar pair (one
# polyp, a second later) has 0.966 and 0.943; no pair below it exceeds 0.950 and 0.931.
CORRELATION = 0.96  # of the gray values
OWN_CORRELATION = 0.9  # after subtracting the mean image, which holds shared parts like a frame
MANY = 6  # so many similar images are one scene, say from a fixed camera, rather than copies
BLOCK = 512  # thumbnails compared with all others at once; bounds the memory
COMPONENTS = 96  # of a thumbnail's 1024, which bound its correlations
ROUNDING = 1e-4  # of float32 dot products
FEW_PAIRS = 8192  # whose correlations are computed one by one

FEWEST_FRAMES = 8  # of a recording that is recognised
# In a recording, at least this share of consecutive frames are more alike than three quarters of
# those 2 to 8 frames apart or, if little moves, far apart. Drawn videos: mostly 0.9 to 1; 900
# images of Kvasir-SEG in any order: 0.2 to 0.3; drawn patients, 10 images of each: 0.2 to 0.5.
SHARE, QUARTILE = 0.8, 0.75
LITTLE_MOVES = 0.9  # correlation of consecutive frames
ALIKE = 0.5  # correlation below which two frames of a recording are hardly alike


class Copy(NamedTuple):
    """A pair of copies: the indices of two images and the correlation of their thumbnails."""

    first: int
    second: int
    correlation: float  # 1 for identical files


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink an HxWx3 uint8 RGB image to SIDExSIDE uint8 gray values."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def find_copies(thumbnails: Sequence[np.ndarray], contents: Sequence[str]) -> list[Copy]:
    """Return the pairs among N images that are identical files or look the same.

    Two thumbnails must correlate as they are, and after subtracting the mean of all images (or of
    the similar ones, if there are MANY). So images do not count as copies because they share a
    frame, a vignette, a background or a fixed camera.

    Arguments:
      thumbnails: of the N images, from make_thumbnail.
      contents: hashes of the N files.
    """
    found = {}
    by_content: dict[str, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        if content in by_content:
            found[by_content[content][0], index] = 1.0
        by_content[content].append(index)
    plain = normalized(np.stack(thumbnails))
    coarse = _coarse(plain)
    own = _own_parts(plain, coarse)
    starts = range(0, len(plain), BLOCK)
    for start in tqdm(starts, desc="Looking for copies", unit="block", leave=False):
        first, second, alike = _similar(plain, coarse, start)
        is_pair = second > first  # each pair once
        first, second, alike = first[is_pair], second[is_pair], alike[is_pair]
        are_copies = _correlations(own, first, second, start) >= OWN_CORRELATION
        pairs = zip(first[are_copies].tolist(), second[are_copies].tolist(), strict=True)
        for pair, correlation in zip(pairs, alike[are_copies].tolist(), strict=True):
            found.setdefault(pair, correlation)
    return [Copy(*pair, min(found[pair], 1.0)) for pair in sorted(found)]


def _coarse(plain: np.ndarray) -> np.ndarray:
    """Return N shorter rows, whose dot products are upper bounds of those of N normalized rows.

    These are the first COMPONENTS principal components and the length of the rest. They rule out
    most of N x N pairs quickly. Few rows are returned as they are.
    """
    if len(plain) <= 4 * COMPONENTS:
        return plain
    axes = np.linalg.eigh(plain.T @ plain)[1][:, -COMPONENTS:]
    parts = plain @ axes
    rest = np.sqrt(np.maximum(1 - (parts**2).sum(axis=1, keepdims=True), 0))
    return np.hstack([parts, rest])


def _similar(
    plain: np.ndarray, coarse: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the thumbnails similar to each of a block of them.

    Returns the indices of both thumbnails and the correlation of each similar pair.
    """
    bounds = coarse[start : start + BLOCK] @ coarse.T
    first, second = np.nonzero(bounds >= CORRELATION - ROUNDING)
    first += start
    correlations = _correlations(plain, first, second, start)
    are_similar = correlations >= CORRELATION
    return first[are_similar], second[are_similar], correlations[are_similar]


def _correlations(
    rows: np.ndarray, first: np.ndarray, second: np.ndarray, start: int
) -> np.ndarray:
    """Return the dot product of each pair of rows; the first of each pair is in one block."""
    if len(first) > FEW_PAIRS:
        return (rows[start : start + BLOCK] @ rows.T)[first - start, second]
    return np.einsum("ij,ij->i", rows[first], rows[second])


def _own_parts(plain: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Subtract from each of N thumbnails the mean of all, or of the similar ones if there are MANY.

    Returns normalized rows.
    """
    means = np.broadcast_to(plain.mean(axis=0), plain.shape).copy()
    for start in range(0, len(plain), BLOCK):
        first, second, _ = _similar(plain, coarse, start)
        counts = np.bincount(first, minlength=len(plain))
        many = np.flatnonzero(counts >= MANY)
        if not len(many):
            continue
        are_similar = np.zeros((len(many), len(plain)), np.float32)
        is_one = counts[first] >= MANY
        are_similar[np.searchsorted(many, first[is_one]), second[is_one]] = 1
        means[many] = are_similar @ plain / counts[many, None]
    return normalized(plain - means)


def normalized(rows: np.ndarray) -> np.ndarray:
    """Scale rows, NxD or NxHxW, to mean 0 and length 1: dot products become correlations.

    Returns NxD float32. A constant row becomes 0, which correlates with nothing.
    """
    rows = rows.reshape(len(rows), -1).astype(np.float32, copy=False)
    rows = rows - rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(lengths > 1e-3, rows / np.maximum(lengths, 1e-3), 0)


def looks_consecutive(rows: np.ndarray) -> bool:
    """Return whether images, in this order, look like a recording, by SHARE.

    rows: NxD, the normalized thumbnails.
    """
    count = len(rows)
    if count < FEWEST_FRAMES:
        return False
    own = normalized(rows - rows.mean(axis=0))
    lags = [range(2, min(9, count))]
    if np.median(_lag_correlations(rows, 1)) >= LITTLE_MOVES:
        lags.append(range(count // 4, count // 2 + 1, max(1, count // 32)))
    return max(_share_of_near(own, some) for some in lags) >= SHARE


def _share_of_near(rows: np.ndarray, lags: Sequence[int]) -> float:
    """Return the share of consecutive rows that are more alike than most rows `lags` apart."""
    others = np.full((len(rows), 2 * len(lags)), np.nan, np.float32)  # rows before, rows after
    for column, lag in enumerate(lags):
        others[lag:, column] = others[:-lag, len(lags) + column] = _lag_correlations(rows, lag)
    usual = np.nanquantile(others, QUARTILE, axis=1)
    # A margin, so that equal images do not differ by rounding
    return np.mean(_lag_correlations(rows, 1) > np.maximum(usual[:-1], usual[1:]) + 1e-4)


def _lag_correlations(rows: np.ndarray, lag: int, step: int = 1) -> np.ndarray:
    """Return the correlation of every `step`-th normalized row with the one `lag` rows after it."""
    return np.einsum("nd,nd->n", rows[:-lag:step], rows[lag::step])


def reach_of(rows: np.ndarray, most: int) -> int:
    """Return how many frames apart the images of a recording are hardly alike, up to `most`.

    rows: NxD, the normalized thumbnails in time order.
    """
    own = normalized(rows - rows.mean(axis=0))
    step = len(rows) // 500 + 1  # as many pairs are enough
    near = (lag for lag in range(1, most) if np.median(_lag_correlations(own, lag, step)) < ALIKE)
    return next(near, most)


def write_copies(path: Path, names: Sequence[tuple[str, str]], copies: list[Copy]) -> None:
    """Write one row per pair of copies; names: (split, name) of each image."""
    rows = [(*names[a][::-1], *names[b][::-1], f"{alike:.4f}") for a, b, alike in copies]
    write_csv(path, ("image", "split", "copy", "split_of_copy", "correlation"), rows)


def describe_copies(path: Path, names: Sequence[tuple[str, str]], copies: list[Copy]) -> str:
    """Return the line to print about copies; a warning if some are in different splits.

    The arguments are those of write_copies.
    """
    apart = [copy for copy in copies if names[copy.first][0] != names[copy.second][0]]
    shown = [f"{brief(names[a][1])} = {brief(names[b][1])}" for a, b, _ in (apart or copies)[:3]]
    more = ", ..." if len(apart or copies) > 3 else ""
    what = f"{len(copies)} pair{'s' * (len(copies) > 1)} of (nearly) identical images"
    which = f"{', '.join(shown)}{more} ({path})"
    if not apart:
        return f"copies: {what}, each kept in one split: {which}"
    return (
        f"warning: {what}, {len(apart)} of them in different splits, which makes the results too "
        f"optimistic: {which}"
    )
