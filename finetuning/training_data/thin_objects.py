"""Thin objects, such as vessels, cracks and roots: what a coarse grid loses of them.

Of an object narrower than a cell, most pixels lie in cells that it covers by less than half. There
the loss hardly asks for it, and prompts would not find it. A finer grid loses less, but takes more
time and memory.
"""

from __future__ import annotations

import cv2
import numpy as np

from finetuning.basics import distributed
from finetuning.basics.threads import in_threads
from finetuning.dataset.objects import DRAW_SEED, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.training_data.training_masks import HALF, LOSS_GRID, LOSS_GRIDS, cell_coverage

TOLERATED = 0.1  # the share of its pixels that an object may lose
MOST_MEASURED = 200  # training objects by which the grid is chosen


def lost_share(coverage: np.ndarray) -> float:
    """Return the share of an object's pixels that lie in cells covered by less than half.

    coverage: of each cell, GxG uint8, 255 for all of it.
    """
    total = cv2.sumElems(coverage)[0]
    kept = cv2.sumElems(cv2.threshold(coverage, HALF - 1, 0, cv2.THRESH_TOZERO)[1])[0]
    return 1 - kept / total if total else 0.0


def object_cells(coverage: np.ndarray) -> np.ndarray:
    """Return which cells are an object's for prompts and clicks, GxG bool.

    These are the cells that it covers by half or more. If they hold less than half of its pixels,
    less covered cells join them, the most covered ones first, until they hold half.
    """
    if lost_share(coverage) <= 0.5:
        return coverage >= HALF
    pixels = np.bincount(coverage.ravel(), minlength=256) * np.arange(256)
    held = pixels[::-1].cumsum()[::-1]  # in cells of at least this coverage
    return coverage >= np.flatnonzero(2 * held >= held[0])[-1]


def forgiven_cells(coverage: np.ndarray) -> np.ndarray:
    """Return in which cells a click corrects nothing, GxG bool: what else a thin object touches.

    An object that loses little on the grid has none of them: beside it, a cell is right or wrong.
    """
    if lost_share(coverage) <= TOLERATED:
        return np.zeros(coverage.shape, bool)
    return (coverage > 0) & ~object_cells(coverage)


def choose_loss_grid(
    pairs: list[Pair], image_size: int = LOSS_GRIDS[-1], seed: int = DRAW_SEED
) -> int:
    """Return the coarsest of LOSS_GRIDS on which training objects lose a tenth of their pixels.

    It is not finer than the images, nor than the model's input, image_size pixels wide. Prints a
    line if the objects are thin or small. The share is the mean over objects, not the median, so
    that some thin objects among thick ones count. The same seed in every run, whatever its --seed,
    keeps runs comparable.
    """
    found = distributed.from_first(lambda: _measure(pairs, seed))
    if not found:
        return LOSS_GRID
    side = min(image_size, np.median([image_side for image_side, _ in found]))
    means = np.mean([losses for _, losses in found], axis=0)
    lost = {grid: mean for grid, mean in zip(LOSS_GRIDS, means, strict=True) if grid <= side}
    enough = [grid for grid, mean in lost.items() if mean <= TOLERATED]
    chosen = min(enough) if enough else max(lost, default=LOSS_GRID)
    if chosen != LOSS_GRID:
        print(
            f"thin or small objects: on a grid of {LOSS_GRID} they lose {lost[LOSS_GRID]:.0%} of "
            f"their pixels (mean), on {chosen} {lost[chosen]:.0%}; the loss uses {chosen}"
        )
    return chosen


def _measure(pairs: list[Pair], seed: int) -> list[tuple[int, list[float]]]:
    """Return the image's longer side and the lost share on each of LOSS_GRIDS, of each object."""
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:MOST_MEASURED].tolist()
    most = -(-MOST_MEASURED // len(drawn))  # objects of an image

    def measure_image(index: int) -> list[tuple[int, list[float]]]:
        objects = read_objects(pairs[index])
        chosen = np.random.default_rng([seed, index]).permutation(len(objects))[:most].tolist()
        side = max(objects.size)
        return [(side, [_lost_on_grid(objects[k], grid) for grid in LOSS_GRIDS]) for k in chosen]

    images = in_threads(measure_image, drawn, "Measuring objects", "mask")
    return [measured for image in images for measured in image]


def _lost_on_grid(mask: np.ndarray, grid: int) -> float:
    """Return the lost share of an HxW bool mask; on a grid finer than its image it is 0."""
    return lost_share(cell_coverage(mask, grid)) if grid <= max(mask.shape) else 0.0
