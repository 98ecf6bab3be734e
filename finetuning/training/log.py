"""The log of a run: what the steps of an epoch report, a row an epoch, the learning curve.

What steps report is kept on the device, and read from it now and then.
"""

from __future__ import annotations

import time
from pathlib import Path

from sam2_utils import NotFiniteError

import numpy as np
import torch
from matplotlib.figure import Figure

from finetuning.basics.command_line import tell
from finetuning.basics.files import write_csv
from finetuning.basics.pictures import save_figure
from finetuning.basics.run_outputs import LOG_FILES

READ_EVERY = 20  # steps, on a GPU: each reading waits for all that it was given to do
RECENT = 50  # objects, whose means the progress bar shows

Log = list[dict[str, float]]  # a row an epoch; epoch 0 is the original, with its val metrics only

CURVE_EVERY = 30  # seconds: drawing takes half of one, which may be as long as an epoch


class EpochReport:
    """The loss, and what else is reported, of each object that an epoch has shown."""

    def __init__(self, epoch: int, device: torch.device) -> None:
        self.epoch, self.is_cpu = epoch, device.type == "cpu"
        self._steps = 0
        self._unread: list[torch.Tensor] = []  # NxP, of N names and a step's P objects
        self._values: dict[str, list[float]] = {}  # by name

    def add(
        self, parts: list[dict[str, torch.Tensor]], clipped: torch.Tensor, counts: bool
    ) -> None:
        """Add what a step reports of each object, part by part, and whether it was clipped.

        counts: False for the step of a process that only stands in.
        """
        self._steps += 1
        self._values = self._values or {name: [] for name in (*parts[0], "clipped")}
        for values in parts if counts else ():
            of_objects = torch.broadcast_tensors(*values.values(), clipped)
            self._unread.append(torch.stack(of_objects))

    def read(self) -> dict[str, list[float]]:
        """Return each name's values so far; raises NotFiniteError where a loss is not finite."""
        if self._unread:
            new = dict(zip(self._values, torch.cat(self._unread, dim=1).tolist(), strict=True))
            self._unread = []
            for loss in new["loss"]:
                if not np.isfinite(loss):
                    raise NotFiniteError(
                        f"the loss became {loss} in epoch {self.epoch}; the files of the epochs "
                        "before it are kept; use a smaller --lr, or --precision float32"
                    )
            for name, of_name in self._values.items():
                of_name += new[name]
        return self._values

    def recent(self, *names: str) -> dict[str, str] | None:
        """Return means over the last objects, to be shown; None where it is not yet time."""
        if not self.is_cpu and self._steps % READ_EVERY:
            return None
        values = self.read()
        return {name: f"{np.mean(values[name][-RECENT:]):.3f}" for name in names if values[name]}


def best_of(log: Log) -> dict[str, float]:
    """Return the row of the epoch with the highest val IoU; the earliest of several."""
    return max(log, key=lambda row: row["val_iou"])


def conclude(log: Log) -> str:
    """Return the last word on a run: how good it became, or that it did not help."""
    before, best = log[0]["val_iou"], best_of(log)
    if best["epoch"]:
        return (
            f"val IoU {before:.4f} before training, {best['val_iou']:.4f} at best "
            f"(epoch {best['epoch']})"
        )
    return (
        f"fine-tuning did not help: no epoch was better than the original (val IoU {before:.4f}), "
        "so sam2_best.pt is the original; try --lr auto or a smaller --lr, or more images"
    )


def write_log(output: Path, log: Log, draw_every: float = 0) -> None:
    """Write train_log.csv and learning_curve.png, a row and a point an epoch.

    Each is written whole, so that one that is open elsewhere only has to wait. draw_every: leave
    the curve as it is where it is younger than so many seconds.
    """
    columns = list(log[-1])
    table, curve = (output / name for name in LOG_FILES)
    try:
        write_csv(table, columns, [[row.get(column, "") for column in columns] for row in log])
        if not curve.exists() or time.time() - curve.stat().st_mtime >= draw_every:
            draw_learning_curve(curve, log)
    except PermissionError as error:
        tell(f"warning: {error.filename} cannot be written; is it open in another program?")


def draw_learning_curve(path: Path, log: list[dict[str, float]]) -> None:
    """Draw the loss and the mean IoU over the epochs."""
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.96)
    loss_axes, iou_axes = figure.subplots(1, 2)
    for axes, column, label in (
        (loss_axes, "loss", "training loss"),
        (iou_axes, "train_iou", "train (its own prompts)"),
        (iou_axes, "val_iou", "val (center point)"),
        (iou_axes, "val_iou_no_prompt", "val (no prompt)"),
    ):
        rows = [row for row in log if column in row]
        if not rows:
            continue
        axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], "o-", label=label)
    iou_axes.axhline(log[0]["val_iou"], color="gray", linestyle="--", label="val before training")
    for axes, name in ((loss_axes, "loss"), (iou_axes, "mean IoU")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(path, figure)
