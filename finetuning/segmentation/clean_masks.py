"""Clean the masks that a model predicts: drop parts without a click, fill holes.

How small a part or a hole has to be is chosen on the training masks and kept in the model's file.
SAM 2's own hole filling needs a CUDA extension that pip does not build.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np

from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.basics.language import say
from finetuning.segmentation.prompts import Prompt

CLEANING = "cleaning"  # the setting of a model's file that holds its sizes


class Cleaning(NamedTuple):
    """Which parts and holes of a mask are too small to be true; the defaults keep all.

    min_part: a part without a foreground click whose area is below this share of the largest
      part's is dropped. 0 keeps all parts, 1 only those with a click and the largest.
    max_hole: a hole whose area is up to this share of the mask's is filled. 0 fills none.
    whole_min_part, whole_max_hole: the same for masks without a prompt, of all objects together.
    """

    min_part: float = 0.0
    max_hole: float = 0.0
    whole_min_part: float = 0.0
    whole_max_hole: float = 0.0


NO_CLEANING = Cleaning()


def cleaning_from(values: Any) -> Cleaning:
    """Return the cleaning that a model's file holds as plain values, else NO_CLEANING."""
    # A file from anywhere may hold anything there
    if not isinstance(values, dict) or values.keys() != set(Cleaning._fields):
        return NO_CLEANING
    are_shares = all(isinstance(value, float) and 0 <= value <= 1 for value in values.values())
    return Cleaning(**values) if are_shares else NO_CLEANING


def describe_cleaning(cleaning: Cleaning) -> str:
    """Return which parts go and which holes are filled, in the current language."""
    changes, whole = (_describe_sizes(*sizes) for sizes in (cleaning[:2], cleaning[2:]))
    if changes == whole:
        return changes
    return say("{changes}; without a prompt, {whole}", changes=changes, whole=whole)


def _describe_sizes(min_part: float, max_hole: float) -> str:
    part, hole = (f"{100 * size:.3g}%" for size in (min_part, max_hole))
    changes = []
    if min_part == 1:
        changes.append(say("masks keep their largest part and those with a click"))
    elif min_part:
        text = say("parts without a click below {share} of the largest are dropped", share=part)
        changes.append(text)
    if max_hole:
        changes.append(say("holes up to {share} of the mask are filled", share=hole))
    return ", ".join(changes) or say("masks stay as they are")


def add_clean_option(parser: argparse._ActionsContainer) -> None:
    """Add --clean."""
    parser.add_argument(
        "--clean",
        choices=("auto", "off"),
        default="auto",
        help="auto: drop small parts and fill small holes of masks, as the fine-tuned model's "
        "training chose",
    )


def clean(mask: CroppedMask, prompt: Prompt, cleaning: Cleaning) -> CroppedMask:
    """Clean the mask that a model predicted for a prompt; a mask that is not empty stays so.

    A part under a background click goes, too, unless it holds a foreground click or is the only
    one. A hole with a background click stays; an opening to the image's border is no hole.
    """
    is_whole = not len(prompt.point_labels)
    min_part, max_hole = cleaning[2:] if is_whole else cleaning[:2]
    if min_part:
        mask = crop_mask(mask)
        clicks = (_pixels(mask, prompt, label) for label in (1, 0))
        mask = crop_mask(mask._replace(crop=keep_parts(mask.crop, min_part, *clicks)))
    if max_hole:
        mask = crop_mask(mask)  # a hole does not reach the edge of the mask's box
        filled = fill_holes(mask.crop, max_hole, _pixels(mask, prompt, 0))
        mask = mask._replace(crop=filled)
    return mask


def keep_parts(
    mask: np.ndarray,
    min_part: float,
    foreground: Iterable[tuple[int, int]] = (),
    background: Iterable[tuple[int, int]] = (),
) -> np.ndarray:
    """Return an HxW bool mask without its small parts; foreground, background: clicked (X,Y)."""
    labels, areas = find_parts(mask)
    if len(areas) <= 2:
        return mask
    is_kept = areas >= min_part * areas.max()
    for pixels, keeps in ((background, False), (foreground, True)):
        for x, y in pixels:
            is_kept[labels[y, x]] = keeps
    is_kept[0] = False
    if not is_kept.any():
        is_kept[areas.argmax()] = True
    return is_kept[labels]


def fill_holes(
    mask: np.ndarray, max_hole: float, background: Iterable[tuple[int, int]] = ()
) -> np.ndarray:
    """Return an HxW bool mask with its small holes filled; background: clicked (X,Y)."""
    labels, areas = find_holes(mask)
    is_filled = (areas > 0) & (areas <= max_hole * np.count_nonzero(mask))
    for x, y in background:
        is_filled[labels[y, x]] = False
    return mask | is_filled[labels] if is_filled.any() else mask


def find_parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each pixel of an HxW bool mask, and the area of each part in pixels.

    Part 0 is what is not in the mask; its area is given as 0. Pixels that touch at a corner are of
    one part.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0
    return labels, areas


def find_holes(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hole of each pixel of an HxW bool mask, and the area of each hole in pixels.

    Hole 0 is the mask. What reaches the edge of the array is no hole; its area is given as 0.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    areas, (height, width) = stats[:, cv2.CC_STAT_AREA], mask.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    areas[(left == 0) | (top == 0) | (right == width) | (bottom == height)] = 0
    areas[0] = 0
    return labels, areas


def _pixels(mask: CroppedMask, prompt: Prompt, label: int) -> list[tuple[int, int]]:
    """Return the (X,Y) pixels of a mask's crop that a prompt clicks on with a label."""
    height, width = mask.crop.shape
    points = np.floor(prompt.point_coords[prompt.point_labels == label]).astype(int)
    pixels = ((int(x) - mask.x, int(y) - mask.y) for x, y in points)
    return [(x, y) for x, y in pixels if 0 <= x < width and 0 <= y < height]
