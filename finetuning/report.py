"""What the comparison prints: the guide's box, an interval, objects by size."""

from __future__ import annotations

import sys

import numpy as np

from finetuning.evaluation import METRICS, Result, bootstrap_interval, mean_metrics, unit_of

BOX_WIDTH = 40
ASCII_BOX = str.maketrans("┌┐└┘├┤─│", "++++++-|")
FEW_IMAGES = 20  # below it, bootstrap intervals are clearly too narrow
# Of an object, by the fraction of the image that its true mask covers
SIZES = (
    ("small", "below 5%", 0.0, 0.05),
    ("medium", "5 to 15%", 0.05, 0.15),
    ("large", "15% and more", 0.15, np.inf),
)


def format_table(results: list[Result], measured: str) -> str:
    """Return the guide's box: mean IoU of both models, and the improvement in %p.

    measured: on what, like "val".
    """
    original, finetuned = (mean_metrics(results, model)["IoU"] for model in (0, 1))
    rule = "─" * BOX_WIDTH
    rows = [
        f"mean IoU ({measured})".center(BOX_WIDTH),
        None,
        f"  original SAM 2:    {original:.2%}",
        f"  fine-tuned SAM 2:  {finetuned:.2%}",
        None,
        f"  improvement:       {100 * (finetuned - original):+.1f}%p",
    ]
    lines = [f"├{rule}┤" if row is None else f"│{row:<{BOX_WIDTH}}│" for row in rows]
    return "\n".join([f"┌{rule}┐", *lines, f"└{rule}┘"])


def print_anywhere(table: str) -> None:
    """Print a table, with ASCII in place of box characters where the console lacks them."""
    try:
        table.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        table = table.translate(ASCII_BOX)
    print(table)


def format_details(results: list[Result], seed: int) -> str:
    """Return what is printed below the box; seed: of the bootstrap."""
    original, finetuned = mean_metrics(results, 0), mean_metrics(results, 1)
    gains = np.array([result.gain for result in results])
    images = np.array([result.index for result in results])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    equal, count = len(results) - better - worse, len(set(images.tolist()))
    what = f"images     {count}"
    if count < len(results):
        what = f"objects    {len(results)} in {count} images"
    return "\n".join(
        [
            *(f"mean {name:<5} {original[name]:.4f} -> {finetuned[name]:.4f}" for name in METRICS),
            f"{what}: {better} better, {equal} equal, {worse} worse",
            format_interval(gains, seed, images),
            format_sizes(results),
        ]
    )


def format_interval(gains: np.ndarray, seed: int, images: np.ndarray | None = None) -> str:
    """Return the mean gain and its interval in %p, and what to beware of.

    gains, images: as in bootstrap_interval.
    """
    line = f"improvement {100 * gains.mean():+.1f}%p"
    count = len(gains if images is None else np.unique(images))
    if count == 1:
        return f"{line}, of one image: too few for an interval"
    low, high = bootstrap_interval(gains, seed, images)
    line += f", 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    line += f" (paired bootstrap over {count} images)"
    if low <= 0 <= high:
        line += "; it includes 0: could be chance"
    if count < FEW_IMAGES:
        line += "; few images: take it as wider"
    return line


def format_sizes(results: list[Result]) -> str:
    """Return a line a size of object: how many there are, and the mean IoU of both models."""
    what = unit_of(results)
    lines = ["mean IoU by object size, in % of the image's area"]
    for name, limits, at_least, below in SIZES:
        of_size = [result for result in results if at_least <= result.area_fraction < below]
        means = "-"
        if of_size:
            means = " -> ".join(f"{mean_metrics(of_size, model)['IoU']:.4f}" for model in (0, 1))
        count = f"{len(of_size)} {what}{'s' * (len(of_size) != 1)}"
        lines.append(f"  {name:<6}  {limits:<12}  {count:>11}  {means}")
    return "\n".join(lines)
