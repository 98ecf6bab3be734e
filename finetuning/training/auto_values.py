"""What auto means for a run, of the values that follow from its training masks."""

from __future__ import annotations

import dataclasses
from typing import Any

from finetuning.dataset.pairs import Pair
from finetuning.model.loading import cleaning_of
from finetuning.segmentation.clean_masks import NO_CLEANING, Cleaning, describe_cleaning
from finetuning.training.recipe import Recipe
from finetuning.training_data.cleaning_choice import choose_cleaning
from finetuning.training_data.thin_objects import choose_loss_grid


def resolve_auto(
    recipe: Recipe, state: dict[str, Any] | None, pairs: list[Pair], image_size: int
) -> tuple[Recipe, Cleaning]:
    """Return the recipe with values for its auto epochs and loss_grid, and how masks are cleaned.

    state: of an interrupted run, whose values are kept, the number of variants among them. pairs:
    the training pairs. image_size: of the model's input.
    """
    if state:
        saved = state["settings"]
        recipe = dataclasses.replace(recipe, augment=saved["augment"], loss_grid=saved["loss_grid"])
        if recipe.epochs == "auto" and isinstance(saved["epochs"], int):
            recipe = dataclasses.replace(recipe, epochs=saved["epochs"])
    elif recipe.loss_grid == "auto":
        recipe = dataclasses.replace(recipe, loss_grid=choose_loss_grid(pairs, image_size))
    recipe = recipe.with_epochs(len(pairs))
    if recipe.clean == "off":
        return recipe, NO_CLEANING
    cleaning = cleaning_of(state) if state else choose_cleaning(pairs)
    if cleaning != NO_CLEANING:
        print(f"cleaning: {describe_cleaning(cleaning)}; --clean off leaves masks as they are")
    return recipe, cleaning
