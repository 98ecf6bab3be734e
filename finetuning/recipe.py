"""The recipe: how a model is fine-tuned, in values that are fixed before the first step."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from finetuning.basics.command_line import ArgumentParser, number, seed
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT
from finetuning.prompts import PromptMix


@dataclass(frozen=True)
class Recipe:
    """What --recipe sets, and the options of the recipe one by one; the default is as here."""

    # The steps
    epochs: int = 20
    batch_size: int = 4  # in images
    objects_per_image: int = 4  # at most, of an image in an epoch
    lr: float | str = 1e-4  # the learning rate at its highest; "auto": to be found first
    schedule: str = "cosine"  # or constant
    weight_decay: float = 4e-5
    max_grad_norm: float = 1.0  # longer gradients are scaled down to it; 0: none are
    seed: int = 42

    # What each step shows: mixed (points, boxes and clicks), inner or random points
    prompts: str = "mixed"
    none_share: float = 0.05  # of the steps show no prompt, and ask for all objects
    # Of the steps with a point have another on background: a model that is only shown objects
    # forgets to answer that there is none, by which SAM 2's video predictor blanks masks
    background_share: float = 0.1

    # The loss
    mask_loss: str = "first"  # which of the three masks learn; or best, or all
    single_weight: float = 1.0  # of the single mask, which other tools take
    dice_weight: float = 1.0  # beside cross-entropy
    score_weight: float = 0.05  # beside the mask loss

    # The image encoder
    train_encoder: str = "none"  # or lora, or full
    encoder_lr: float | None = None
    lora_rank: int | None = None

    @property
    def prompt_mix(self) -> PromptMix:
        """What each step shows."""
        return PromptMix(self.prompts, self.none_share, self.background_share)


DEFAULT = Recipe()
GUIDE = Recipe(
    batch_size=1,
    lr=1e-5,
    schedule="constant",
    max_grad_norm=0.0,
    prompts="random",
    none_share=0.0,
    background_share=0.0,
    single_weight=0.0,
    dice_weight=0.0,
)
RECIPES = {"default": DEFAULT, "guide": GUIDE}
MINI_LR = 3e-4  # of the default recipe: mini was pretrained for an hour only, with less to forget
DEMO_LR = 1e-3  # of the default recipe, for a run of a minute
DEMO = {  # what --demo sets beside it
    "data": DEMO_DATA,
    "output": DEMO_OUTPUT,
    "model": "mini",
    "epochs": 8,
    "precision": "float32",  # the same figures on every CPU
}


def parse_rate(text: str) -> float | str:
    """Parse --lr, as an argparse type: "auto", or a number above 0."""
    return text if text == "auto" else number(float, above=0)(text)


def parse_prompts(name: str) -> str:
    """Parse --prompts, as an argparse type."""
    return "random" if name == "point" else name  # as it was once called


AT_LEAST_0, AT_LEAST_1 = number(float, at_least=0), number(int, at_least=1)
# The options of the recipe one by one: what each is, and what it takes
OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("epochs", "passes over the data", {"type": AT_LEAST_1}),
    ("batch_size", "images a step", {"type": AT_LEAST_1}),
    ("objects_per_image", "of an image's objects, so many an epoch, by seed", {"type": AT_LEAST_1}),
    (
        "lr",
        "learning rate, at its highest; auto: the best of some that are tried before training, "
        f"on a part of the training images; mini's default is {MINI_LR:g}",
        {"type": parse_rate},
    ),
    (
        "schedule",
        "whether the learning rate warms up and falls to zero over the epochs, or stays",
        {"choices": ("cosine", "constant")},
    ),
    ("weight_decay", "of AdamW", {"type": AT_LEAST_0}),
    ("max_grad_norm", "longer gradients are scaled down to it (0: none)", {"type": AT_LEAST_0}),
    (
        "mask_loss",
        "which of the three masks are corrected",
        {"choices": ("first", "best", "all")},
    ),
    (
        "single_weight",
        "of the loss of the single mask, which other tools take, beside the three (0: none)",
        {"type": AT_LEAST_0},
    ),
    ("dice_weight", "of the dice loss beside cross-entropy", {"type": AT_LEAST_0}),
    ("score_weight", "of the score loss beside the mask loss", {"type": AT_LEAST_0}),
    (
        "prompts",
        "a random point in the mask (random); one that is likelier the deeper it lies (inner); "
        "or such points, rough boxes and corrective clicks (mixed)",
        {"type": parse_prompts, "choices": ("mixed", "inner", "random")},
    ),
    (
        "none_share",
        "of the steps show no prompt: the model learns to find all objects by itself",
        {"type": number(float, at_least=0, below=1)},
    ),
    (
        "background_share",
        "of the steps with a point have another where no object is: there the model learns to "
        "answer that there is none, and to score its masks 0 (0: it forgets to)",
        {"type": number(float, at_least=0, below=1)},
    ),
    ("seed", "of the order and the prompts", {"type": seed}),
)
RECIPE_OPTIONS = tuple(name for name, *_ in OPTIONS)


def add_recipe_options(parser: ArgumentParser) -> None:
    """Add --recipe, and an option for each of RECIPE_OPTIONS, whose default is the recipe's."""
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument(
        "--recipe", choices=RECIPES, default="default", help="what sets the defaults below"
    )
    for name, what, takes in OPTIONS:
        ours, guides = getattr(DEFAULT, name), getattr(GUIDE, name)
        differs = "" if ours == guides else f" (guide: {guides})"
        recipe.add_argument(
            f"--{name.replace('_', '-')}", default=ours, help=what + differs, **takes
        )


def choose_defaults(typed: Namespace) -> dict[str, Any]:
    """Return what options are where they are not typed: of --demo, then of --recipe."""
    defaults = dataclasses.asdict(RECIPES[typed.recipe])
    is_mini = typed.model == "mini" or (typed.model is None and typed.demo)
    if typed.recipe == "default" and is_mini:
        defaults["lr"] = DEMO_LR if typed.demo else MINI_LR
    return {**defaults, **(DEMO if typed.demo else {})}
