"""Simulated clicks: a table, a chart and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.files import write_csv
from finetuning.basics.language import say
from finetuning.basics.pictures import save_figure
from finetuning.comparison.tables import Table
from finetuning.evaluation.measuring import Comparison, counted_unit
from finetuning.evaluation.simulated_clicks import measure_clicks

TARGET_IOUS = (0.85, 0.90)  # for NoC@85 and NoC@90
CLICK_FILES = ("clicks.csv", "clicks.png")


def compare_clicks(
    output: Path, comparisons: Sequence[Comparison], count: int, with_mask: bool, mask_kind: str
) -> Table:
    """Measure both models after 1 to `count` corrective clicks; write the files, return the table.

    with_mask: also give each model its previous mask as a prompt.
    """
    results = [result for comparison in comparisons for result in comparison.results]
    measured = [measure_clicks(one, count, with_mask, mask_kind) for one in comparisons]
    ious, unit = np.concatenate(measured, axis=1), counted_unit(results)
    write_clicks(output / "clicks.csv", [result.name for result in results], ious)
    draw_clicks(output / "clicks.png", ious, with_mask, unit)
    return clicks_table(ious, with_mask, unit)


def number_of_clicks(ious: np.ndarray, target: float) -> tuple[float, int]:
    """Return NoC, the mean number of clicks to reach an IoU of `target`, and the number of misses.

    ious: MxN, of M objects after 1 to N clicks. An object that never reaches the target counts as
    N clicks, as in RITM.
    """
    reached = ious >= target
    # argmax is the first click that reaches the target, but 0 if none does
    never = ~reached.any(axis=1)
    clicks = np.where(never, ious.shape[1], reached.argmax(axis=1) + 1)
    return float(clicks.mean()), int(never.sum())


def clicks_table(ious: np.ndarray, use_mask_prompt: bool, unit: str = "image") -> Table:
    """Return a table of both models' mean IoU after each click, and of their NoC.

    Arguments:
      ious: 2xMxN, of the original and the fine-tuned model on M objects after 1 to N clicks.
      unit: what one of the M is, as from counted_unit.
    """
    _, objects, count = ious.shape
    rows = [
        [str(click), *(f"{mean:.4f}" for mean in means)]
        for click, means in enumerate(ious.mean(axis=1).T, start=1)
    ]
    for target in TARGET_IOUS:
        nocs, never = zip(
            *(number_of_clicks(model_ious, target) for model_ious in ious), strict=True
        )
        rows.append([f"NoC@{100 * target:.0f}", *(f"{noc:.2f}" for noc in nocs)])
        rows.append([say("not reached"), *map(str, never)])
    note = say(
        "NoC@85: mean number of clicks to an IoU of 85% "
        "({count} objects; not reached counts as {clicks})",
        count=objects, clicks=count,
    )  # fmt: skip
    if unit == "image":
        note = say(
            "NoC@85: mean number of clicks to an IoU of 85% "
            "({count} images; not reached counts as {clicks})",
            count=objects, clicks=count,
        )  # fmt: skip
    how = say("without a mask prompt")
    if use_mask_prompt:
        how = say("with the previous mask as a prompt")
    return Table(
        say("mean IoU by simulated clicks ({how})", how=how),
        [say("clicks"), say("original"), say("fine-tuned")],
        rows,
        note,
    )


def write_clicks(path: Path, names: list[tuple[str, int]], ious: np.ndarray) -> None:
    """Write one row per object and click.

    names: (image file, number in the image) of the M objects; ious: 2xMxN as in clicks_table.
    """
    rows = [
        (*name, click, *(f"{iou:.6f}" for iou in both))
        for name, object_ious in zip(names, ious.transpose(1, 2, 0), strict=True)
        for click, both in enumerate(object_ious, start=1)
    ]
    write_csv(path, ("image", "object", "click", "original_iou", "finetuned_iou"), rows)


def draw_clicks(path: Path, ious: np.ndarray, use_mask_prompt: bool, unit: str = "image") -> None:
    """Draw the mean IoU of both models against the number of clicks; ious as in clicks_table."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, means in zip(("original", "fine-tuned"), ious.mean(axis=1), strict=True):
        axes.plot(range(1, len(means) + 1), means, "o-", label=name)
    axes.set(xlabel="clicks", ylabel=f"mean IoU of {ious.shape[1]} {unit}s")
    # Charts are in English: matplotlib's own font has no Korean characters
    how = "with the previous mask as a prompt" if use_mask_prompt else "without a mask prompt"
    axes.set_title(f"simulated clicks, {how}", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(path, figure)
