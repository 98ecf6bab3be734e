"""Training of SAM 2's image encoder: low-rank adapters in its attention, or all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics import distributed
from finetuning.basics.command_line import ArgumentParser, number
from finetuning.model.trainable_encoder import DEFAULT_RANK, import_peft

ENCODER_OPTIONS = ("encoder_lr", "lora_rank", "gradient_checkpointing")


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
