"""The recipe: all values that say how a model is fine-tuned, fixed before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT
from finetuning.model.trainable_encoder import DEFAULT_RANK
from finetuning.training_data.augmentation import Augment
from finetuning.training_data.prompt_sampling import PromptMix
from finetuning.training_data.training_masks import IMAGE

AUTO_EPOCHS = 20  # auto: at least, and without augmentation
AUTO_MOST_EPOCHS, AUTO_SHOWN = 80, 3600  # auto: as many epochs as show so many images


@dataclass(frozen=True)
class Recipe:
    """The values of --recipe and of the options that change it; these are the default ones."""

    # The steps
    epochs: int | str = "auto"  # as many as with_epochs says
    batch_size: int = 4  # in images
    objects_per_image: int = 4  # shown per epoch, at most
    lr: float | str = 1e-4  # the learning rate at its highest; "auto": found by trials first
    schedule: str = "cosine"  # or constant
    weight_decay: float = 4e-5
    max_grad_norm: float = 1.0  # gradient clipping; 0: off
    seed: int = 42

    # What each step shows: mixed (points, boxes and clicks), inner or random points
    prompts: str = "mixed"
    none_share: float = 0.05  # share of steps without a prompt, which ask for all objects
    # Share of point steps with another point on background. A model that only sees objects forgets
    # to answer that there is none, and SAM 2's video predictor blanks masks by that answer
    background_share: float = 0.1

    # Augmentation: variants of each training image, the unchanged one included. auto: as many as
    # about 1,000 encoded images allow, at most 8; off
    augment: int | str = "auto"
    turns: bool = False  # whether images have no upright: variants are turned, not only mirrored
    mirror_from: int = 2  # variants of an image, with which cached features are mirrored, too

    # The loss
    mask_loss: str = "first"  # which of the three masks learn: first, best or all
    single_weight: float = 1.0  # of the single mask, which other tools use
    dice_weight: float = 1.0  # relative to cross-entropy
    score_weight: float = 0.05  # relative to the mask loss
    # Cells per side at which the loss compares masks; "auto": as many as thin objects need;
    # "image": the pixels of each image
    loss_grid: int | str = "auto"

    # The masks: auto: their small parts and holes go, as chosen on the training masks; or off
    clean: str = "auto"

    # The image encoder
    train_encoder: str = "none"  # or lora or full
    encoder_lr: float | None = None  # set unless train_encoder is none
    lora_rank: int | None = None  # set if it is lora

    def with_lr(self, lr: float) -> Recipe:
        """Return the same recipe with another learning rate."""
        return replace(self, lr=lr)

    def with_epochs(self, images: int) -> Recipe:
        """Return the recipe with a number of epochs, if that is auto, for so many training images.

        Variants of few images are worth more epochs than the images alone, which a model would
        learn by heart.
        """
        if self.epochs != "auto":
            return self
        longer = AUTO_MOST_EPOCHS if self.augment != "off" else AUTO_EPOCHS
        epochs = min(max(AUTO_EPOCHS, -(-AUTO_SHOWN // images)), longer)
        return replace(self, epochs=epochs)

    @property
    def augmentation(self) -> Augment:
        """The part of the recipe that varies the training images."""
        return Augment(self.augment, self.turns, self.mirror_from)

    @property
    def prompt_mix(self) -> PromptMix:
        """The part of the recipe that draws prompts."""
        return PromptMix(self.prompts, self.none_share, self.background_share)


DEFAULT = Recipe()
GUIDE = Recipe(
    epochs=AUTO_EPOCHS,
    batch_size=1,
    lr=1e-5,
    schedule="constant",
    max_grad_norm=0.0,
    prompts="random",
    none_share=0.0,
    background_share=0.0,
    augment="off",
    single_weight=0.0,
    dice_weight=0.0,
    clean="off",
    loss_grid=IMAGE,
)
RECIPES = {"default": DEFAULT, "guide": GUIDE}
MINI_LR = 3e-4  # default recipe: mini was pretrained for only an hour and has less to forget
DEMO_LR = 1e-3  # default recipe, for a run of a minute
DEMO = {  # the other defaults of --demo
    "data": DEMO_DATA,
    "output": DEMO_OUTPUT,
    "model": "mini",
    "epochs": 8,
    "augment": "off",  # variants pay off in longer runs
    "precision": "float32",  # for the same results on every CPU
}


def encoder_defaults(
    train_encoder: str, lr: float | str, encoder_lr: float | None, lora_rank: int | None
) -> tuple[float | None, int | None]:
    """Return the encoder's learning rate and the rank of its adapters, None where not used."""
    if train_encoder == "none":
        return None, None
    if train_encoder == "lora":
        return encoder_lr or lr, lora_rank or DEFAULT_RANK
    return encoder_lr or lr * 0.1, None
