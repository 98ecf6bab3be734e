"""What the steps of an epoch report: kept on the device, and read from it now and then."""

from __future__ import annotations

from sam2_utils import NotFiniteError

import numpy as np
import torch

READ_EVERY = 20  # steps, on a GPU: each reading waits for all that it was given to do
RECENT = 50  # objects, whose means the progress bar shows


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
