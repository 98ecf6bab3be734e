"""An image turned and mirrored, with its masks and prompts.

A View is one of the 8 symmetries of a square. What is true of an image is true of each view of it,
so training can show more of them, and the masks predicted from several views can be averaged
(test-time augmentation).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from finetuning.segmentation.prompts import Prompt


class View(NamedTuple):
    """Quarter turns counterclockwise, then perhaps a mirror image, left to right."""

    turns: int = 0  # 0 to 3
    is_mirrored: bool = False

    def of_array(self, values: np.ndarray) -> np.ndarray:
        """Return the view of an image or mask, HxW or HxWxC."""
        turned = np.rot90(values, self.turns)
        # A copy: torch takes no negative strides, which even an image of one pixel would keep
        return (turned[:, ::-1] if self.is_mirrored else turned).copy()

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the view of ...xHxW maps, such as mask logits."""
        turned = torch.rot90(maps, self.turns, (-2, -1)) if self.turns else maps
        return turned.flip(-1) if self.is_mirrored else turned

    def of_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (H,W) of the view of an image of (H,W)."""
        return size[::-1] if self.turns % 2 else size

    def of_prompt(self, prompt: Prompt, size: tuple[int, int]) -> Prompt:
        """Return a prompt in pixels of an image of (H,W) as one in pixels of its view."""
        (height, width), coords = size, prompt.point_coords
        for _ in range(self.turns % 4):  # (X,Y) goes to (Y, W-1-X)
            coords = np.stack([coords[:, 1], width - 1 - coords[:, 0]], axis=1)
            height, width = width, height
        if self.is_mirrored:
            coords = np.stack([width - 1 - coords[:, 0], coords[:, 1]], axis=1)
        coords = coords.astype(np.float32).reshape(-1, 2)
        # A box's first corner stays its top left one
        corners = (
            [int(np.flatnonzero(prompt.point_labels == label)[0]) for label in (2, 3)]
            if (2 in prompt.point_labels)
            else []
        )
        if corners:
            coords[corners] = np.sort(coords[corners], axis=0)
        return prompt._replace(point_coords=coords)

    def undone(self) -> View:
        """Return the view that leads back."""
        return self if self.is_mirrored else View(-self.turns % 4)


UPRIGHT = View()
MIRRORED = View(0, True)
# Turned half round and mirrored is mirrored top to bottom
MIRRORS = (UPRIGHT, MIRRORED, View(2, True), View(2))
ALL_VIEWS = tuple(View(turns, mirrored) for mirrored in (False, True) for turns in range(4))
