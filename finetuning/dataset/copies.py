"""Images that are the same, or nearly so: one in train gives away its copy in val."""

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
SIDE = 32  # of a thumbnail, in pixels
# How much alike thumbnails of copies are at least. On 900 images of Kvasir-SEG the fourth pair (one
# polyp, a second later) has 0.966 and 0.943; no other one has more than 0.950 and 0.931.
CORRELATION = 0.96  # of their gray values
OWN_CORRELATION = 0.9  # of what each has beside the mean image: a black frame is in all of them
MANY = 6  # images that are all alike show one scene rather than being copies
BLOCK = 512  # thumbnails that are compared with all at once


class Copy(NamedTuple):
    """Two images that are alike, by their numbers; how their thumbnails correlate."""

    first: int
    second: int
    correlation: float  # 1 for equal files


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """Return an HxWx3 uint8 RGB image as SIDExSIDE uint8 gray values."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def find_copies(thumbnails: Sequence[np.ndarray], contents: Sequence[str]) -> list[Copy]:
    """Return the pairs of N images that are equal files, or look alike in every respect.

    Arguments:
      thumbnails: of make_thumbnail.
      contents: hashes of the files.

    They must be alike as they are, and in what distinguishes them from the mean of all, or of those
    like them where these are MANY: frames, vignettes and backgrounds that images share make no
    copies, nor do fixed cameras.
    """
    found = {}
    by_content: dict[str, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        if content in by_content:
            found[by_content[content][0], index] = 1.0
        by_content[content].append(index)
    plain = _normalized(np.stack(thumbnails).reshape(len(thumbnails), -1).astype(np.float32))
    own = _own_parts(plain)
    starts = range(0, len(plain), BLOCK)
    for start in tqdm(starts, desc="Looking for copies", unit="block", leave=False):
        block = slice(start, start + BLOCK)
        alike = plain[block] @ plain.T
        are_copies = (alike >= CORRELATION) & (own[block] @ own.T >= OWN_CORRELATION)
        for first, second in np.argwhere(np.triu(are_copies, start + 1)).tolist():
            found.setdefault((start + first, second), float(alike[first, second]))
    return [Copy(*pair, min(found[pair], 1.0)) for pair in sorted(found)]


def _own_parts(plain: np.ndarray) -> np.ndarray:
    """Return what each of N thumbnails has beside the mean of all, or of those like it, if MANY."""
    means = np.broadcast_to(plain.mean(axis=0), plain.shape).copy()
    for start in range(0, len(plain), BLOCK):
        block = slice(start, start + BLOCK)
        are_alike = plain[block] @ plain.T >= CORRELATION
        counts = are_alike.sum(axis=1, keepdims=True)
        local = are_alike.astype(np.float32) @ plain / np.maximum(counts, 1)
        means[block] = np.where(counts >= MANY, local, means[block])
    return _normalized(plain - means)


def _normalized(rows: np.ndarray) -> np.ndarray:
    """Return rows with mean 0 and length 1; constant ones, which are like nothing, are 0."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(lengths > 1e-3, rows / np.maximum(lengths, 1e-3), 0)


def write_copies(path: Path, names: Sequence[tuple[str, str]], copies: list[Copy]) -> None:
    """Write a row a pair of copies; names: (split, name) of each image."""
    rows = [(*names[a][::-1], *names[b][::-1], f"{alike:.4f}") for a, b, alike in copies]
    write_csv(path, ("image", "split", "copy", "split_of_copy", "correlation"), rows)


def describe_copies(path: Path, names: Sequence[tuple[str, str]], copies: list[Copy]) -> str:
    """Return what is printed of copies, which are listed at `path`; arguments as of write_copies.

    It is a warning where some are on two sides of the split.
    """
    apart = [copy for copy in copies if names[copy.first][0] != names[copy.second][0]]
    shown = [f"{brief(names[a][1])} = {brief(names[b][1])}" for a, b, _ in (apart or copies)[:3]]
    more = ", ..." if len(apart or copies) > 3 else ""
    what = f"{len(copies)} pair{'s' * (len(copies) > 1)} of images (almost) the same"
    which = f"{', '.join(shown)}{more} ({path})"
    if not apart:
        return f"copies: {what}, kept on one side: {which}"
    return (
        f"warning: {what}, {len(apart)} of them on two sides of the split, so that its numbers say "
        f"too much: {which}"
    )
