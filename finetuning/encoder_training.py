"""Training of SAM 2's image encoder: low-rank adapters in its attention, or all of its weights."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from sam2_utils import UserError

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.checkpoint import checkpoint

from finetuning.basics import distributed
from finetuning.basics.command_line import ArgumentParser, number
from finetuning.recipe import Recipe
from finetuning.segmentation import Features

DEFAULT_RANK = 8
ENCODER_OPTIONS = ("encoder_lr", "lora_rank", "gradient_checkpointing")


def encode_with_gradients(predictor: SAM2ImagePredictor, images: list[np.ndarray]) -> Features:
    """Do what segmentation.encode_images does, but let gradients reach the image encoder.

    They reach the decoder's two convolutions on high-resolution features too. Under autocast,
    weights and their gradients stay float32, and the features are of autocast's dtype or float32.
    """
    # The very function that encode_images calls, without the no_grad that decorates it
    SAM2ImagePredictor.set_image_batch.__wrapped__(predictor, images)
    features = Features(**predictor._features)
    predictor.reset_predictor()  # or it would keep the graph alive
    return features


def let_encoder_learn(
    model: SAM2Base, recipe: Recipe, checkpointing: bool | None = None
) -> list[torch.nn.Parameter]:
    """Let the encoder of a frozen model learn as the recipe says; return what learns of it.

    checkpointing: keep less in memory and compute it twice; None: where the model is full-size.
    """
    if recipe.train_encoder == "none":
        return []
    if recipe.train_encoder == "lora":
        add_adapters(model, recipe.lora_rank)
    else:
        model.image_encoder.requires_grad_(True)
    if model.image_size >= 1024 if checkpointing is None else checkpointing:
        checkpoint_blocks(model)
    return [weight for weight in model.image_encoder.parameters() if weight.requires_grad]


def add_adapters(model: SAM2Base, rank: int) -> None:
    """Add LoRA adapters to the attention of the encoder's last two stages (Hu et al., 2021).

    These have most of its blocks (13 of 16 in small) and make image_embed. The stages before them
    see edges and textures on maps up to 16 times as large; without adapters there, no gradient
    has to be computed for them, nor anything kept in memory.
    """
    peft = import_peft()
    trunk = model.image_encoder.trunk
    blocks = "|".join(map(str, range(trunk.stage_ends[1] + 1, len(trunk.blocks))))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,  # so that the rank does not change how fast they learn
        target_modules=rf"trunk\.blocks\.({blocks})\.attn\.(qkv|proj)",
    )
    # In place, without a wrapper around the model; what was frozen stays frozen
    peft.inject_adapter_in_model(config, model.image_encoder)
    model.eval()


def import_peft() -> ModuleType:
    """Return the peft library; raises UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("--train-encoder lora needs peft; pip install peft") from error
    return peft


@torch.no_grad()
def merged_state_dict(model: SAM2Base) -> dict[str, torch.Tensor]:
    """Return the weights under SAM 2's own names, adapters merged in; the model stays as it is."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = weight + sum(map(layer.get_delta_weight, layer.active_adapters))
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight
    return weights


def checkpoint_blocks(model: SAM2Base) -> None:
    """Let the trunk's blocks that learn keep their input only, and compute the rest again."""
    learns = False
    for block in model.image_encoder.trunk.blocks:
        learns = learns or any(weight.requires_grad for weight in block.parameters())
        if learns:  # or comes after one that does
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
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
