"""Simulated clicks, as a table, a chart and a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.files import write_csv
from finetuning.basics.language import ENGLISH, Language
from finetuning.basics.pictures import save_figure
from finetuning.comparison.tables import Table

TARGET_IOUS = (0.85, 0.90)  # of NoC@85 and NoC@90
CLICK_FILES = ("clicks.csv", "clicks.png")


def number_of_clicks(ious: np.ndarray, target: float) -> tuple[float, int]:
    """Return NoC, the mean number of clicks to an IoU of `target`, and how many never reach it.

    ious: MxN, of M objects after 1 to N clicks. An object that never reaches the target counts as
    N clicks, as in RITM.
    """
    reached = ious >= target
    never = ~reached.any(axis=1)
    clicks = np.where(never, ious.shape[1], reached.argmax(axis=1) + 1)
    return float(clicks.mean()), int(never.sum())


def describe_clicks(use_mask_prompt: bool, say: Language = ENGLISH) -> str:
    """Say how the clicks were given to the models."""
    return say("previous mask as a prompt too") if use_mask_prompt else say("no mask prompt")


def clicks_table(
    ious: np.ndarray, use_mask_prompt: bool, unit: str = "image", say: Language = ENGLISH
) -> Table:
    """Return the mean IoU of both models after each click, and their NoC.

    Arguments:
      ious: 2xMxN, of the original and the fine-tuned model on M objects after 1 to N clicks.
      unit: what one of the M is, as unit_of says.
    """
    _, objects, count = ious.shape
    rows = [
        [str(click), *(f"{mean:.4f}" for mean in means)]
        for click, means in enumerate(ious.mean(axis=1).T, start=1)
    ]
    for target in TARGET_IOUS:
        nocs, never = zip(*(number_of_clicks(of_model, target) for of_model in ious), strict=True)
        rows.append([f"NoC@{100 * target:.0f}", *(f"{noc:.2f}" for noc in nocs)])
        rows.append([say("not reached"), *map(str, never)])
    note = say(
        "NoC@85: mean number of clicks to an IoU of 85% "
        "(of {count} objects; not reached counts as {clicks})",
        count=objects, clicks=count,
    )  # fmt: skip
    if unit == "image":
        note = say(
            "NoC@85: mean number of clicks to an IoU of 85% "
            "(of {count} images; not reached counts as {clicks})",
            count=objects, clicks=count,
        )  # fmt: skip
    how = describe_clicks(use_mask_prompt, say)
    return Table(
        say("mean IoU by simulated clicks ({how})", how=how),
        [say("clicks"), say("original"), say("fine-tuned")],
        rows,
        note,
    )


def write_clicks(path: Path, names: list[tuple[str, int]], ious: np.ndarray) -> None:
    """Write a row an object and click.

    names: of the M objects, each its image's and its own number; ious: 2xMxN as in clicks_table.
    """
    rows = [
        (*name, click, *(f"{iou:.6f}" for iou in both))
        for name, of_object in zip(names, ious.transpose(1, 2, 0), strict=True)
        for click, both in enumerate(of_object, start=1)
    ]
    write_csv(path, ("image", "object", "click", "original_iou", "finetuned_iou"), rows)


def draw_clicks(path: Path, ious: np.ndarray, use_mask_prompt: bool, unit: str = "image") -> None:
    """Draw the mean IoU of both models over the clicks; ious as in clicks_table."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, means in zip(("original", "fine-tuned"), ious.mean(axis=1), strict=True):
        axes.plot(range(1, len(means) + 1), means, "o-", label=name)
    axes.set(xlabel="clicks", ylabel=f"mean IoU of {ious.shape[1]} {unit}s")
    axes.set_title(f"simulated clicks, {describe_clicks(use_mask_prompt)}", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(path, figure)
