"""The options that say how a model is fine-tuned: --recipe, and those that change a value of it."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from finetuning.basics.command_line import ArgumentParser, number, seed
from finetuning.training.recipe import (
    AUTO_EPOCHS,
    AUTO_MOST_EPOCHS,
    AUTO_SHOWN,
    DEMO,
    DEMO_LR,
    MINI_LR,
    RECIPES,
)
from finetuning.training_data.training_masks import IMAGE, LOSS_GRIDS


def auto_or(parse: Callable[[str], float]) -> Callable[[str], float | str]:
    """Return an argparse type: "auto" or a number that parse accepts."""
    return lambda text: text if text == "auto" else parse(text)


MOST_VARIANTS = 1000


def parse_augment(text: str) -> int | str:
    """Parse --augment as an argparse type: "auto", "off" or a number of variants; 1 is off."""
    parse = auto_or(number(int, at_least=1, below=MOST_VARIANTS))
    count = text if text == "off" else parse(text)
    return "off" if count == 1 else count


def parse_loss_grid(text: str) -> int | str:
    """Parse --loss-grid as an argparse type; raises ValueError for what is none of GRIDS."""
    return GRIDS[list(map(str, GRIDS)).index(text)]


GRIDS = ("auto", *LOSS_GRIDS, IMAGE)
AT_LEAST_0, AT_LEAST_1 = number(float, at_least=0), number(int, at_least=1)
# The options of the recipe: name, help text, further arguments of add_argument
OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "epochs",
        f"passes over the images; auto: {AUTO_EPOCHS}, with augmentation up to {AUTO_MOST_EPOCHS}, "
        f"so that {AUTO_SHOWN:,} images are shown",
        {"type": auto_or(AT_LEAST_1), "metavar": "auto|N"},
    ),
    ("batch_size", "images per step", {"type": AT_LEAST_1}),
    ("objects_per_image", "objects of an image shown per epoch, at most", {"type": AT_LEAST_1}),
    (
        "lr",
        "highest learning rate; auto: the best of several that are tried on part of the training "
        f"images first; mini's default is {MINI_LR:g}",
        {"type": auto_or(number(float, above=0))},
    ),
    (
        "schedule",
        "cosine: the learning rate warms up, then falls to zero over the epochs",
        {"choices": ("cosine", "constant")},
    ),
    ("weight_decay", "AdamW's weight decay", {"type": AT_LEAST_0}),
    ("max_grad_norm", "gradient clipping: the largest norm (0: off)", {"type": AT_LEAST_0}),
    (
        "mask_loss",
        "which of the three masks the loss trains",
        {"choices": ("first", "best", "all")},
    ),
    (
        "single_weight",
        "weight of the loss of the single mask, which other tools use (0: off)",
        {"type": AT_LEAST_0},
    ),
    ("dice_weight", "weight of the dice loss, relative to cross-entropy", {"type": AT_LEAST_0}),
    ("score_weight", "weight of the score loss, relative to the mask loss", {"type": AT_LEAST_0}),
    (
        "loss_grid",
        "cells per side at which the loss compares masks; auto: 256, or more if training objects "
        "are so thin that they lose over a tenth of their pixels; image: the pixels of each image",
        {"type": parse_loss_grid, "metavar": "{" + ",".join(map(str, GRIDS)) + "}"},
    ),
    (
        "prompts",
        "random: a random point in the mask; inner: a point, more likely deep inside the mask; "
        "mixed: inner points, rough boxes and corrective clicks",
        {"choices": ("mixed", "inner", "random")},
    ),
    (
        "none_share",
        "share of steps without a prompt, which teach the model to find all objects",
        {"type": number(float, at_least=0, below=1)},
    ),
    (
        "background_share",
        "share of point steps that add a point on background, which teach the model to answer "
        "that no object is there (0: it forgets this)",
        {"type": number(float, at_least=0, below=1)},
    ),
    (
        "augment",
        "variants of each training image, the unchanged one included: mirrored, cropped, in other "
        "colours; encoded and cached once, each epoch shows one of them. auto: up to 8, fewer if "
        "there are more than 125 images, so that about 1,000 are encoded; off: none",
        {"type": parse_augment, "metavar": "auto|off|N"},
    ),
    (
        "turns",
        "the images have no upright (cells, satellite images): augmentation also turns them",
        {"action": "store_true"},
    ),
    (
        "clean",
        "auto: predicted masks lose small parts without a click and small holes, as far as the "
        "training masks have none; kept in the model's file",
        {"choices": ("auto", "off")},
    ),
    ("seed", "seed of the image order and the prompts", {"type": seed}),
)
RECIPE_OPTIONS = tuple(name for name, *_ in OPTIONS)


def add_recipe_options(parser: ArgumentParser) -> None:
    """Add --recipe and the options that change single values of it."""
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument(
        "--recipe", choices=RECIPES, default="default", help="the defaults of the options below"
    )
    for name, text, arguments in OPTIONS:
        default, guide = (getattr(RECIPES[key], name) for key in ("default", "guide"))
        difference = "" if default == guide else f" (guide: {guide})"
        recipe.add_argument(
            f"--{name.replace('_', '-')}", default=default, help=text + difference, **arguments
        )


def choose_defaults(typed: Namespace) -> dict[str, Any]:
    """Return the defaults of options that are not typed: from --demo, else from --recipe."""
    defaults = dataclasses.asdict(RECIPES[typed.recipe])
    is_mini = typed.model == "mini" or (typed.model is None and typed.demo)
    if typed.recipe == "default" and is_mini:
        defaults["lr"] = DEMO_LR if typed.demo else MINI_LR
    return {**defaults, **(DEMO if typed.demo else {})}
