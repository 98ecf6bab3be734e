"""The features of images: what the image encoder computes, and the mask decoder reads."""

from __future__ import annotations

from typing import NamedTuple

from sam2_utils import copy_to

import torch


class Features(NamedTuple):
    """The features of B images, as SAM2ImagePredictor.set_image computes them.

    image_embed: BxCx(S/16)x(S/16).
    high_res_feats: Bx(C/8)x(S/4)x(S/4) and Bx(C/4)x(S/8)x(S/8).
    """

    image_embed: torch.Tensor
    high_res_feats: list[torch.Tensor]

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        """Concatenate the features of several batches into one batch."""
        if len(parts) == 1:
            return parts[0]
        image_embed, *high_res_feats = (
            torch.cat(maps)
            for maps in zip(
                *((part.image_embed, *part.high_res_feats) for part in parts), strict=True
            )
        )
        return cls(image_embed, high_res_feats)

    def to(self, device: torch.device, dtype: torch.dtype) -> Features:
        """Move to a device, then convert to a dtype there: float16 halves the copied bytes."""
        maps = (self.image_embed, *self.high_res_feats)
        moved = [copy_to(device, feature_map).to(dtype) for feature_map in maps]
        return Features(moved[0], moved[1:])

    def channels_last(self) -> Features:
        """Return the same values in channels-last memory order, which cached features have.

        In bfloat16, another memory order changes the last digits of results.
        """
        maps = (self.image_embed, *self.high_res_feats)
        ordered = [values.clone(memory_format=torch.channels_last) for values in maps]
        return Features(ordered[0], ordered[1:])

    def of(self, indices: list[int]) -> Features:
        """Return the features of the images with these indices, which may repeat."""
        if indices == list(range(len(self.image_embed))):
            return self
        image_embed, *high_res_feats = (
            feature_map[indices] for feature_map in (self.image_embed, *self.high_res_feats)
        )
        return Features(image_embed, high_res_feats)
