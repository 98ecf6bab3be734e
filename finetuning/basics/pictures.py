"""The colours of all pictures; saving a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.basics.files import atomic_write

if TYPE_CHECKING:  # Matplotlib is slow to import, and not every script draws figures
    from matplotlib.figure import Figure

GREEN, RED, YELLOW, WHITE = (0, 200, 0), (230, 0, 0), (255, 220, 0), (255, 255, 255)
# The colours of an image's objects, by number
COLORS = (
    (30, 144, 255), (255, 127, 14), (148, 103, 189), (23, 190, 207), (227, 119, 194), (44, 160, 44),
    (140, 86, 75), (188, 189, 34),
)  # fmt: skip


def save_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Save a Matplotlib figure as a PNG file; options: of Figure.savefig."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, **options)
