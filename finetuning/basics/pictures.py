"""The colours of all pictures."""

from __future__ import annotations

GREEN, RED, YELLOW, WHITE = (0, 200, 0), (230, 0, 0), (255, 220, 0), (255, 255, 255)
# Of an image's objects, in turn
COLORS = (
    (30, 144, 255), (255, 127, 14), (148, 103, 189), (23, 190, 207), (227, 119, 194), (44, 160, 44),
    (140, 86, 75), (188, 189, 34),
)  # fmt: skip
