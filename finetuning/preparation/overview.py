"""Describe a new data set, so that mistakes show before training: counts, warnings, a picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from finetuning.basics.cropped_masks import CroppedMask
from finetuning.basics.image_files import read_image, write_image
from finetuning.basics.pictures import COLORS
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.preparation.filling import Filled

OVERVIEW_FILE = "overview.png"
SHOWN_IMAGES, SHEET_COLUMNS = 12, 4
PANEL, TITLE, GAP = 360, 24, 8  # pixels; PANEL: the longer side of an image
BLACK, FONT = (0, 0, 0), cv2.FONT_HERSHEY_SIMPLEX
MUCH = 0.5  # mean covered fraction above which masks may show the background
MANY_PARTS = 3  # mean number of parts from which a mask may hold several objects


def describe_dataset(filled: list[Filled], per_object: bool) -> list[str]:
    """Return the lines to print about a data set: its objects, then warnings."""
    areas = [area for image in filled for area in image.areas]
    counts = [len(image.areas) for image in filled]
    lines = []
    if areas:
        fewest, most = min(filter(None, counts)), max(counts)
        each = f"{fewest} to {most} per image (median {np.median(counts):g})"
        if fewest == most:
            each = f"{'one' if most == 1 else most} per image"
        middle = 100 * np.median(areas)
        lines.append(f"objects: {len(areas)}, {each}; median area {middle:.2g}% of the image")
    return [*lines, *_warnings(filled, areas, counts, per_object)]


def _warnings(
    filled: list[Filled], areas: list[float], counts: list[int], per_object: bool
) -> list[str]:
    warnings = []
    if empty := counts.count(0):
        warnings.append(f"{empty} of {len(filled)} images have no object; training ignores them")
    # Not for label maps: classes and instances often cover the whole image
    whole_masks = [] if per_object else [image for image in filled if image.areas]
    covered = [sum(image.areas) for image in whole_masks]
    if covered and min(covered) > 0.999:
        warnings.append("every mask covers its whole image: was it exported all white?")
    elif covered and np.mean(covered) > MUCH:
        warnings.append(
            f"the masks cover {np.mean(covered):.0%} of their images on average: is black the "
            "object? Then add --mask-value 0"
        )
    parts = [image.parts for image in whole_masks]
    if parts and np.mean(parts) >= MANY_PARTS:
        warnings.append(
            f"a mask has {np.mean(parts):.0f} separate parts on average, but counts as one object "
            "with one point prompt; --parts makes each part an object"
        )
    if turned := sum(image.is_turned for image in filled):
        warnings.append(
            f"{turned} images are turned upright by their EXIF orientation: "
            f"check in {OVERVIEW_FILE} that their masks are upright, too"
        )
    return [f"warning: {warning}" for warning in warnings]


def draw_overview(path: Path, pairs: list[Pair]) -> None:
    """Draw a dozen images, evenly spaced among all, with the outlines of their objects."""
    indices = np.linspace(0, len(pairs) - 1, min(SHOWN_IMAGES, len(pairs))).round().astype(int)
    rows = -(-len(indices) // SHEET_COLUMNS)
    sheet = np.full((rows * (PANEL + TITLE), SHEET_COLUMNS * (PANEL + GAP), 3), 255, np.uint8)
    for number, index in enumerate(indices):
        canvas, count = draw_outlines(pairs[index])
        y, x = number // SHEET_COLUMNS * (PANEL + TITLE), number % SHEET_COLUMNS * (PANEL + GAP)
        title = f"{count} object{'s' * (count != 1)}"
        cv2.putText(sheet, title, (x, y + 16), FONT, 0.5, BLACK, 1, cv2.LINE_AA)
        sheet[y + TITLE :, x:][: len(canvas), : canvas.shape[1]] = canvas
    write_image(path, sheet)


def draw_outlines(pair: Pair) -> tuple[np.ndarray, int]:
    """Return an image, resized to PANEL pixels, with its objects outlined, and their number."""
    image, objects = read_image(pair.image), read_objects(pair)
    scale = PANEL / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(image, (width, height), interpolation=interpolation)
    for number, mask in enumerate(objects.all_cropped()):
        small, *place, _ = shrink(mask, (height, width))
        if not small.size:  # smaller than a pixel here
            continue
        how = cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        contours, _ = cv2.findContours(small.astype(np.uint8), *how, offset=place)
        cv2.drawContours(canvas, contours, -1, COLORS[number % len(COLORS)], 2, cv2.LINE_AA)
    return canvas, len(objects)


def shrink(mask: CroppedMask, size: tuple[int, int]) -> CroppedMask:
    """Resize a mask to (H,W) by taking the nearest pixels."""
    # The pixels that are taken along each axis, and which of them lie in the mask's box
    taken = [np.arange(new) * old // new for new, old in zip(size, mask.size, strict=True)]
    kept = [
        slice(*np.searchsorted(indices, (box.start, box.stop)))
        for indices, box in zip(taken, mask.box, strict=True)
    ]
    rows, columns = (
        indices[part] - box.start for indices, part, box in zip(taken, kept, mask.box, strict=True)
    )
    return CroppedMask(mask.crop[np.ix_(rows, columns)], kept[1].start, kept[0].start, size)
