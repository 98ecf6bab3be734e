"""The options of a training, and what follows from them."""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics import distributed
from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    number,
    seed,
)
from finetuning.evaluation.object_matching import MOST_TUNED
from finetuning.model.cache_places import CACHE_PLACES
from finetuning.model.models import MODELS as MODEL_SIZES
from finetuning.model.models import parse_image_size
from finetuning.model.trainable_encoder import DEFAULT_RANK, import_peft
from finetuning.training.recipe import DEFAULT, DEMO, DEMO_LR, GUIDE, MINI_LR, RECIPES

ENCODER_OPTIONS = ("encoder_lr", "lora_rank", "gradient_checkpointing")


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


def add_file_options(parser: ArgumentParser) -> argparse._ActionsContainer:
    """Add what a run reads and writes, and the model that it starts from; return the former."""
    files = parser.add_argument_group("what is read and written")
    files.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    files.add_argument(
        "--demo", action="store_true", help="train mini on drawn images, into output/demo"
    )
    files.add_argument("--limit", type=number(int, at_least=1), help="use the first N images only")
    files.add_argument("--output", type=Path, default=Path("output"), help="where results go")
    files.add_argument("--resume", action="store_true", help="go on with the run in --output")
    cache = files.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, help="where the images' features are kept (default: OUTPUT/cache)"
    )
    cache.add_argument(
        "--no-cache", action="store_true", help="encode each image anew in each epoch (slow)"
    )

    model = parser.add_argument_group("the model to start from")
    model.add_argument("--model", choices=MODEL_SIZES, default="small", help="its size")
    model.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    model.add_argument(
        "--image-size",
        type=parse_image_size,
        metavar="S",
        help="pixels a side that images are resized to; 512 is several times faster than the "
        "default, 1024, and sees less (mini: 256)",
    )
    return files


def add_repeat_options(files: argparse._ActionsContainer) -> None:
    """Add --runs and --folds."""
    repeats = files.add_mutually_exclusive_group()
    repeats.add_argument(
        "--runs", type=number(int, at_least=1), default=1, help="train so often, by further seeds"
    )
    repeats.add_argument(
        "--folds",
        type=number(int, at_least=2),
        metavar="K",
        help="train K times, each without another part of train and val; compare with --folds",
    )


def add_encoder_options(parser: ArgumentParser) -> None:
    """Add --train-encoder and what goes with it, for contradiction."""
    encoder = parser.add_argument_group("the image encoder")
    encoder.add_argument(
        "--train-encoder",
        choices=("none", "lora", "full"),
        default="none",
        help="let it learn too: through low-rank adapters (needs peft), or all of it; "
        "many times slower, as each image is encoded anew in each epoch",
    )
    encoder.add_argument(
        "--encoder-lr",
        type=number(float, above=0),
        help="its learning rate (default: --lr for lora, whose adapters start from zero, and a "
        "tenth of --lr for full, so that it forgets less of what it knows)",
    )
    encoder.add_argument(
        "--lora-rank",
        type=number(int, at_least=1),
        help=f"of the adapters: higher learns more (default: {DEFAULT_RANK})",
    )
    encoder.add_argument(
        "--gradient-checkpointing",
        choices=("on", "off"),
        help="compute more to use less memory (default: on for full-size models, off for mini)",
    )


def contradiction(
    train_encoder: str,
    encoder_options: dict[str, Any],
    lr: float | str,
    cache: Path | None,
    compiling: str,
) -> str | None:
    """Return what is wrong with options about the image encoder, in one line, or None.

    encoder_options: what was typed of ENCODER_OPTIONS, None where nothing was. Raises UserError
    where peft is missing, or under torchrun.
    """
    if train_encoder == "none":
        typed = [name for name in ENCODER_OPTIONS if encoder_options[name] is not None]
        options = [f"--{name.replace('_', '-')}" for name in typed]
        return f"{options[0]} needs --train-encoder lora or full" if options else None
    if train_encoder == "full" and encoder_options["lora_rank"] is not None:
        return "--lora-rank is for --train-encoder lora, not full"
    if lr == "auto":
        return "--lr auto is not for --train-encoder, whose trials would take hours"
    if cache is not None:
        return "--cache is of no use with --train-encoder: features change as it learns"
    if compiling == "on":
        return "--compile on is not for --train-encoder: the decoder is little of its time"
    if distributed.world_size() > 1:
        raise UserError("--train-encoder runs in one process; start it without torchrun")
    if train_encoder == "lora":
        import_peft()  # now, rather than after the data has been read
    return None


def encoder_settings(
    train_encoder: str, lr: float | str, encoder_lr: float | None, lora_rank: int | None
) -> dict[str, Any]:
    """Return what a recipe has of the image encoder, with the defaults that follow from it."""
    if train_encoder == "none":
        return {"train_encoder": "none"}
    is_lora = train_encoder == "lora"
    return {
        "train_encoder": train_encoder,
        "encoder_lr": encoder_lr or lr * (1 if is_lora else 0.1),
        "lora_rank": (lora_rank or DEFAULT_RANK) if is_lora else None,
    }


def add_machine_options(parser: ArgumentParser) -> None:
    """Add --device, --threads, --precision, --cache-in and --compile."""
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(
        machine,
        "auto: bfloat16 on GPUs and CPUs that multiply it, else float16 on CUDA, float32 elsewhere",
    )
    machine.add_argument(
        "--cache-in",
        choices=CACHE_PLACES,
        default="auto",
        help="where features are read from in each step; auto: the memory of a CUDA GPU, if they "
        "take less than half of what is free, else the disk",
    )
    machine.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the decoder; auto: in bfloat16 on a CPU, where the run is long enough to win "
        "the time back",
    )


def add_threshold_option(parser: argparse._ActionsContainer) -> None:
    """Add --choose-thresholds, for keep_rule."""
    parser.add_argument(
        "--choose-thresholds",
        action="store_true",
        help="after training, choose the score and area thresholds of test_my_image.py --auto "
        f"objects on {MOST_TUNED} training images (slow)",
    )
