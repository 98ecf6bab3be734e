"""The training log: statistics of the steps, a row per epoch, and the learning curve."""

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

READ_EVERY = 20  # steps, on a GPU: each reading waits until the GPU has finished its queue
RECENT = 50  # objects that the means in the progress bar are over

Log = list[dict[str, float]]  # a row per epoch; epoch 0 has the original's val metrics only

CURVE_EVERY = 30  # seconds; drawing takes half a second, and so may an epoch


class EpochReport:
    """The loss and other statistics of each object of an epoch, buffered on the device."""

    def __init__(self, epoch: int, device: torch.device) -> None:
        self.epoch, self.is_cpu = epoch, device.type == "cpu"
        self._steps = 0
        self._unread: list[torch.Tensor] = []  # NxP: N names, P objects of a step
        self._values: dict[str, list[float]] = {}  # by name

    def add(
        self, parts: list[dict[str, torch.Tensor]], clipped: torch.Tensor, counts: bool
    ) -> None:
        """Add a step: the values of its objects, part by part, and whether it was clipped.

        counts: False if this process only repeated an object to keep pace with the others.
        """
        self._steps += 1
        self._values = self._values or {name: [] for name in (*parts[0], "clipped")}
        for values in parts if counts else ():
            columns = torch.broadcast_tensors(*values.values(), clipped)
            self._unread.append(torch.stack(columns))

    def read(self) -> dict[str, list[float]]:
        """Return each name's values so far; raise NotFiniteError if a loss is not finite."""
        if self._unread:
            new = dict(zip(self._values, torch.cat(self._unread, dim=1).tolist(), strict=True))
            self._unread = []
            for loss in new["loss"]:
                if not np.isfinite(loss):
                    raise NotFiniteError(
                        f"the loss became {loss} in epoch {self.epoch}; the files of the epochs "
                        "before it are kept; use a smaller --lr, or --precision float32"
                    )
            for name, values in self._values.items():
                values += new[name]
        return self._values

    def recent(self, *names: str) -> dict[str, str] | None:
        """Return means over the last objects for the progress bar; None if it is not yet time."""
        if not self.is_cpu and self._steps % READ_EVERY:
            return None
        values = self.read()
        return {name: f"{np.mean(values[name][-RECENT:]):.3f}" for name in names if values[name]}


def best_of(log: Log) -> dict[str, float]:
    """Return the row with the highest val IoU; the earliest of equal ones."""
    return max(log, key=lambda row: row["val_iou"])


def conclude(log: Log) -> str:
    """Return the result of a run in a sentence: what it reached, or that it did not help."""
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
    """Write train_log.csv and learning_curve.png, with a row and a point per epoch.

    Both are rewritten whole each time: a file that another program holds open is only a warning,
    and complete after the next epoch. draw_every: keep a curve younger than this, in seconds.
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
    """Draw the loss and the mean IoU of each epoch."""
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.96)
    loss_axes, iou_axes = figure.subplots(1, 2)
    for axes, column, label in (
        (loss_axes, "loss", "training loss"),
        (iou_axes, "train_iou", "train (training prompts)"),
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
