"""Average the masks of several views of an image (test-time augmentation, --tta).

A model answers a little differently for an image and its mirror image. The mean of the answers is
more accurate than each of them, and takes as many times as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from finetuning.basics.language import say
from finetuning.segmentation.features import Features
from finetuning.segmentation.prompts import Prompt
from finetuning.segmentation.views import MIRRORS, UPRIGHT, View

MOST_CERTAIN = 32.0  # as SAM2ImagePredictor clamps logits: no view outvotes all others


class ViewFeatures(NamedTuple):
    """The features of several views of B images, whose masks are averaged.

    of_views: one for each view.
    """

    views: tuple[View, ...]
    of_views: list[Features]

    @classmethod
    def join(cls, parts: list[ViewFeatures]) -> ViewFeatures:
        """Concatenate the features of several batches, in the same views, into one batch."""
        by_view = zip(*(part.of_views for part in parts), strict=True)
        return cls(parts[0].views, [Features.join(list(of_view)) for of_view in by_view])

    def of(self, indices: list[int]) -> ViewFeatures:
        """Return the features of the images with these indices, which may repeat."""
        return self._replace(of_views=[features.of(indices) for features in self.of_views])


def with_views(views: tuple[View, ...], of_views: list[Features]) -> Features | ViewFeatures:
    """Return the features of an image's views; those of the upright one alone stay as they are."""
    return of_views[0] if views == (UPRIGHT,) else ViewFeatures(views, of_views)


def average_views(
    predict: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    features: ViewFeatures,
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    mask_inputs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict one mask per image from each view, turn it back, and average.

    Arguments:
      predict: called with Features, prompts, image_sizes and mask_inputs of one view; returns
        Bx1xhxw mask logits and Bx1 scores.
      prompts, image_sizes, mask_inputs: as in predict_masks, of the upright images.

    Returns the mean Bx1xhxw mask logits and the mean Bx1 scores.
    """
    all_logits, all_scores = [], []
    for view, of_view in zip(features.views, features.of_views, strict=True):
        logits, scores = predict(
            of_view,
            [view.of_prompt(*both) for both in zip(prompts, image_sizes, strict=True)],
            list(map(view.of_size, image_sizes)),
            None if mask_inputs is None else view.of_maps(mask_inputs),
        )
        all_logits.append(view.undone().of_maps(logits.clamp(-MOST_CERTAIN, MOST_CERTAIN)))
        all_scores.append(scores)
    return torch.stack(all_logits).mean(0), torch.stack(all_scores).mean(0)


def add_views_option(parser: argparse._ActionsContainer) -> None:
    """Add --tta, for choose_views."""
    parser.add_argument(
        "--tta",
        action="store_true",
        help=f"average the masks of {len(MIRRORS)} mirrored views of each image, which takes "
        f"{len(MIRRORS)} times as long (default: off)",
    )


def choose_views(tta: bool) -> tuple[View, ...]:
    """Return the views of each image whose masks are averaged; print what several cost."""
    if not tta:
        return (UPRIGHT,)
    print(
        say(
            "averaging {count} views of each image: encoding takes {count} times as long",
            count=len(MIRRORS),
        )
    )
    return MIRRORS
