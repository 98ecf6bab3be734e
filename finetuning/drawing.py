"""Pictures: masks and prompts on an image, curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.files import atomic_write


def draw_panels(path: Path, panels: dict[str, np.ndarray]) -> None:
    """Draw HxWx3 uint8 RGB images beside each other, with their titles."""
    figure = Figure(figsize=(12, 12), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
