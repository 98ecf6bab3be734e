"""Bootstrap confidence intervals over images, or over groups of images."""

from __future__ import annotations

import numpy as np

from finetuning.basics.language import say
from finetuning.evaluation.measuring import Result

RESAMPLES = 10_000  # of the bootstrap

FEW_IMAGES = 20  # with fewer, bootstrap intervals are clearly too narrow


def bootstrap_interval(
    gains: np.ndarray, seed: int, images: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean of M gains in IoU, one gain per object.

    This is the percentile interval of the bootstrap (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13). It resamples images, since objects of one image are not
    independent; the two IoUs of an object stay paired. images: M ints, equal for objects of one
    image; by default, each object has its own image.
    """
    images = np.arange(len(gains)) if images is None else images
    rng = np.random.default_rng(seed)
    _, numbers = np.unique(images, return_inverse=True)
    # The sum and count of each image are all that a mean over drawn images needs
    sums, counts = np.bincount(numbers, gains), np.bincount(numbers)
    parts = []
    for _ in range(100):  # all resamples at once could fill the memory
        drawn = rng.integers(len(sums), size=(RESAMPLES // 100, len(sums)))
        parts.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(low), float(high)


def group_numbers(results: list[Result]) -> np.ndarray:
    """Return one number per object, equal for objects of images that are not independent.

    Copies and images of one patient are not independent: they share a Pair.group. Any other image
    is a group of its own.
    """
    groups = [result.pair.group for result in results]
    # The index keeps images without a group apart; -1 is no index
    keys = [
        (group, -1 if group else result.index)
        for group, result in zip(groups, results, strict=True)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def format_interval(
    gains: np.ndarray,
    seed: int,
    groups: np.ndarray | None = None,
    images: int | None = None,
) -> tuple[str, str]:
    """Return the interval of the mean gain in %p, and a sentence on it with its caveats.

    The first is empty if there is no interval.

    Arguments:
      gains, groups: the gains and images of bootstrap_interval; an image may be a group of images.
      images: the number of images (default: the number of groups).
    """
    count = len(gains if groups is None else np.unique(groups))
    images = images or count
    line = say("improvement {gain:+.1f}%p", gain=100 * gains.mean())
    if count == 1 < images:
        return "", line + say("; one group of images is too few for a confidence interval")
    if count == 1:
        return "", line + say("; one image is too few for a confidence interval")
    low, high = bootstrap_interval(gains, seed, groups)
    interval = say("95% interval {low:+.1f} to {high:+.1f}", low=100 * low, high=100 * high)
    over = say(" (paired bootstrap over {images} images)", images=images)
    if count < images:
        over = say(
            " (paired bootstrap over {images} images in {groups} groups)",
            groups=count, images=images,
        )  # fmt: skip
    line += ", " + interval + over
    if low <= 0 <= high:
        line += say("; it includes 0, so this could be chance")
    if count < FEW_IMAGES:
        line += say("; with so few images, the true interval is wider")
    return interval, line
