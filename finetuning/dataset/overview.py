"""A look at a data set before an hour is spent on it: counts, warnings, and a picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from finetuning.basics.image_files import read_image, write_image
from finetuning.basics.pictures import COLORS
from finetuning.dataset.filling import Filled
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair

OVERVIEW_FILE = "overview.png"
SHOWN = 12  # images
COLUMNS = 4
PANEL, TITLE, GAP = 360, 24, 8  # pixels; PANEL: an image's longer side
BLACK, FONT = (0, 0, 0), cv2.FONT_HERSHEY_SIMPLEX
MUCH = 0.5  # of the image: more than that is perhaps the background
MANY_PARTS = 3  # of a mask, on average, that counts as one object


def describe(filled: list[Filled], of_objects: bool) -> list[str]:
    """Return the report of a data set, a line each: objects, then what to beware of."""
    areas = [area for of_image in filled for area in of_image.areas]
    counts = [len(of_image.areas) for of_image in filled]
    lines = []
    if areas:
        fewest, most = min(filter(None, counts)), max(counts)
        each = f"{fewest} to {most} an image (median {np.median(counts):g})"
        if fewest == most:
            each = f"{'one' if most == 1 else most} an image"
        middle = 100 * np.median(areas)
        lines.append(f"objects: {len(areas)}, {each}; median area {middle:.2g}% of the image")
    return [*lines, *_warnings(filled, areas, counts, of_objects)]


def _warnings(
    filled: list[Filled], areas: list[float], counts: list[int], of_objects: bool
) -> list[str]:
    warnings = []
    if empty := counts.count(0):
        warnings.append(f"{empty} of {len(filled)} images have no object; training leaves them out")
    # Class maps and instances may well cover everything
    whole_masks = [] if of_objects else [of_image for of_image in filled if of_image.areas]
    covered = [sum(of_image.areas) for of_image in whole_masks]
    if covered and min(covered) > 0.999:
        warnings.append("every mask covers its whole image: was it exported all white?")
    elif covered and np.mean(covered) > MUCH:
        warnings.append(
            f"the masks cover {np.mean(covered):.0%} of their images on average: is black the "
            "object? Then add --mask-value 0"
        )
    parts = [of_image.parts for of_image in whole_masks]
    if parts and np.mean(parts) >= MANY_PARTS:
        warnings.append(
            f"a mask has {np.mean(parts):.0f} separate parts on average, but counts as one object, "
            "which one point prompts; --parts makes each part an object"
        )
    if turned := sum(of_image.is_turned for of_image in filled):
        warnings.append(
            f"{turned} images are turned upright by their EXIF orientation: "
            f"look at {OVERVIEW_FILE} whether their masks are upright, too"
        )
    return [f"warning: {warning}" for warning in warnings]


def draw_overview(path: Path, pairs: list[Pair]) -> None:
    """Draw a dozen images, taken evenly from all, with the outlines of their objects."""
    places = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    rows = -(-len(places) // COLUMNS)
    sheet = np.full((rows * (PANEL + TITLE), COLUMNS * (PANEL + GAP), 3), 255, np.uint8)
    for number, place in enumerate(places):
        canvas, count = draw_outlines(pairs[place])
        y, x = number // COLUMNS * (PANEL + TITLE), number % COLUMNS * (PANEL + GAP)
        title = f"{count} object{'s' * (count != 1)}"
        cv2.putText(sheet, title, (x, y + 16), FONT, 0.5, BLACK, 1, cv2.LINE_AA)
        sheet[y + TITLE :, x:][: len(canvas), : canvas.shape[1]] = canvas
    write_image(path, sheet)


def draw_outlines(pair: Pair) -> tuple[np.ndarray, int]:
    """Return an image, PANEL pixels on its longer side, its objects outlined; and their number."""
    image, objects = read_image(pair.image), read_objects(pair)
    scale = PANEL / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    smoothly = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(image, (width, height), interpolation=smoothly)
    for number, mask in enumerate(objects):
        small = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, COLORS[number % len(COLORS)], 2, cv2.LINE_AA)
    return canvas, len(objects)
