"""The options of train_sam2_proper.py, and how they resolve to a Recipe and a Machine."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import torch

from finetuning.basics import distributed
from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    number,
)
from finetuning.dataset.pairs import keep_out
from finetuning.evaluation.object_matching import MOST_TUNED
from finetuning.model.cache_places import CACHE_PLACES
from finetuning.model.checkpoints import checkpoint_path
from finetuning.model.models import MODELS, own_image_size, parse_image_size
from finetuning.model.trainable_encoder import DEFAULT_RANK, import_peft
from finetuning.training.recipe import AUTO_EPOCHS, DEMO, Recipe, encoder_defaults
from finetuning.training.recipe_options import RECIPE_OPTIONS, add_recipe_options, choose_defaults

ENCODER_OPTIONS = ("encoder_lr", "lora_rank", "gradient_checkpointing")


class Machine(NamedTuple):
    """How a run computes on its machine; none of it changes what is learned."""

    precision: torch.dtype
    cache: Path | None = None  # the folder of the feature cache; None: no cache
    cache_in: str = "auto"  # as in cache_places.choose_place
    checkpointing: bool | None = None  # of a learning encoder, as in let_encoder_learn
    compiling: str = "auto"  # on, off or auto, as in learner.speed_up


def parse_args(argv: list[str] | None, docstring: str = "") -> Namespace:
    """Return the options with their final values: as typed, else from --demo, else from --recipe.

    docstring: the description in --help. args.recipe becomes a Recipe; args.cache, the folder of
    the feature cache, or None.
    """
    parser = make_parser(docstring)
    args = parser.parse_typed(argv, {*DEMO, *RECIPE_OPTIONS}, choose_defaults)
    encoder_options = {name: getattr(args, name) for name in ENCODER_OPTIONS}
    problem = contradiction(args.train_encoder, encoder_options, args.lr, args.cache, args.compile)
    if problem:
        parser.error(problem)
    if args.lr == "auto" and distributed.world_size() > 1:
        raise UserError("--lr auto runs in one process; find the rate without torchrun first")
    learns = args.train_encoder != "none"
    if learns:
        args.compile = "off"
    args.gradient_checkpointing = {"on": True, "off": False}.get(args.gradient_checkpointing)
    # Features of an encoder that learns change in each step, so they cannot be cached
    args.cache = None if args.no_cache or learns else args.cache or args.output / "cache"
    # Without a cache, each epoch encodes the images: few images get no further epochs
    if args.epochs == "auto" and args.cache is None:
        args.epochs = AUTO_EPOCHS
    args.image_size = args.image_size or own_image_size(args.model)
    encoder_lr, lora_rank = encoder_defaults(
        args.train_encoder, args.lr, args.encoder_lr, args.lora_rank
    )
    args.recipe = Recipe(
        epochs=args.epochs,
        batch_size=args.batch_size,
        objects_per_image=args.objects_per_image,
        lr=args.lr,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        prompts=args.prompts,
        none_share=args.none_share,
        background_share=args.background_share,
        augment=args.augment,
        turns=args.turns,
        mask_loss=args.mask_loss,
        single_weight=args.single_weight,
        dice_weight=args.dice_weight,
        score_weight=args.score_weight,
        clean=args.clean,
        loss_grid=args.loss_grid,
        train_encoder=args.train_encoder,
        encoder_lr=encoder_lr,
        lora_rank=lora_rank,
    )
    keep_out(args.data, args.output, args.cache)
    return args


def make_parser(docstring: str) -> ArgumentParser:
    parser = ArgumentParser(docstring)
    add_file_options(parser)
    add_model_options(parser)
    add_recipe_options(parser)
    add_encoder_options(parser)
    add_machine_options(parser)
    return parser


def add_file_options(parser: ArgumentParser) -> None:
    """Add what a run reads and writes, and how often it trains."""
    files = parser.add_argument_group("what is read and written")
    files.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    files.add_argument(
        "--demo", action="store_true", help="train mini on drawn images, into output/demo"
    )
    files.add_argument("--limit", type=number(int, at_least=1), help="use only the first N images")
    files.add_argument("--output", type=Path, default=Path("output"), help="where results go")
    files.add_argument("--resume", action="store_true", help="continue the run in --output")
    cache = files.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, help="the folder of the feature cache (default: OUTPUT/cache)"
    )
    cache.add_argument(
        "--no-cache", action="store_true", help="encode each image again in each epoch (slow)"
    )
    repeats = files.add_mutually_exclusive_group()
    repeats.add_argument(
        "--runs",
        type=number(int, at_least=1),
        default=1,
        help="train this many times, with successive seeds; the mean of their weights is saved if "
        "it is better on val",
    )
    repeats.add_argument(
        "--folds",
        type=number(int, at_least=2),
        metavar="K",
        help="K-fold cross-validation over train and val; see compare_models.py --folds",
    )
    files.add_argument(
        "--choose-thresholds",
        action="store_true",
        help="after training, choose the score and area thresholds of test_my_image.py --auto "
        f"objects on {MOST_TUNED} training images (slow)",
    )


def add_model_options(parser: ArgumentParser) -> None:
    """Add the model to start from: --model, --checkpoint and --image-size."""
    model = parser.add_argument_group("the model to start from")
    model.add_argument("--model", choices=MODELS, default="small", help="its size")
    model.add_argument(
        "--checkpoint",
        type=checkpoint_path,
        help="its file or folder (default: SAM 2.1's, downloaded)",
    )
    model.add_argument(
        "--image-size",
        type=parse_image_size,
        metavar="S",
        help="images are resized to SxS pixels; 512 is several times faster than the default, "
        "1024, but shows less detail (mini: 256)",
    )


def add_encoder_options(parser: ArgumentParser) -> None:
    """Add --train-encoder and ENCODER_OPTIONS, which only make sense with it."""
    encoder = parser.add_argument_group("the image encoder")
    encoder.add_argument(
        "--train-encoder",
        choices=("none", "lora", "full"),
        default="none",
        help="train the image encoder too: low-rank adapters (lora, needs peft) or all weights "
        "(full); many times slower, as each image is encoded in each epoch",
    )
    encoder.add_argument(
        "--encoder-lr",
        type=number(float, above=0),
        help="its learning rate (default: --lr for lora, whose adapters start from zero; a tenth "
        "of --lr for full, so that it forgets less)",
    )
    encoder.add_argument(
        "--lora-rank",
        type=number(int, at_least=1),
        help=f"rank of the adapters: a higher one learns more (default: {DEFAULT_RANK})",
    )
    encoder.add_argument(
        "--gradient-checkpointing",
        choices=("on", "off"),
        help="recompute to save memory (default: on for full-size models, off for mini)",
    )


def contradiction(
    train_encoder: str,
    encoder_options: dict[str, Any],
    lr: float | str,
    cache: Path | None,
    compiling: str,
) -> str | None:
    """Return what is wrong with the options about the image encoder, in one line, or None.

    encoder_options: the typed value of each of ENCODER_OPTIONS, else None. Raises UserError if
    peft is missing, or under torchrun.
    """
    if train_encoder == "none":
        typed = [name for name in ENCODER_OPTIONS if encoder_options[name] is not None]
        options = [f"--{name.replace('_', '-')}" for name in typed]
        return f"{options[0]} needs --train-encoder lora or full" if options else None
    if train_encoder == "full" and encoder_options["lora_rank"] is not None:
        return "--lora-rank is for --train-encoder lora, not full"
    if lr == "auto":
        return "--lr auto is not for --train-encoder: its trials would take hours"
    if cache is not None:
        return "--cache does not work with --train-encoder: features change as the encoder learns"
    if compiling == "on":
        return "--compile on is not for --train-encoder: the decoder takes little of the time"
    if distributed.world_size() > 1:
        raise UserError("--train-encoder runs in one process; start it without torchrun")
    if train_encoder == "lora":
        import_peft()  # fail now if it is missing, not after the data has been read
    return None


def add_machine_options(parser: ArgumentParser) -> None:
    """Add --device, --threads, --precision, --cache-in and --compile."""
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(
        machine,
        "auto: bfloat16 if the hardware supports it, else float16 on CUDA, float32 elsewhere",
    )
    machine.add_argument(
        "--cache-in",
        choices=CACHE_PLACES,
        default="auto",
        help="where cached features are read from in each step; auto: the memory of a CUDA GPU if "
        "they fit into half of what is free, else the disk",
    )
    machine.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the decoder; auto: in bfloat16 on a CPU if the run is long enough to gain "
        "from it",
    )
