"""The recipe: how a model is fine-tuned, in values that are fixed before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT
from finetuning.training.prompt_sampling import PromptMix


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
