"""Training of SAM 2's image encoder: low-rank adapters in its attention, or all of its weights."""

from __future__ import annotations

import functools
from types import ModuleType

from sam2_utils import UserError

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.checkpoint import checkpoint

from finetuning.model.segmentation import Features

DEFAULT_RANK = 8


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
    model: SAM2Base, how: str, rank: int | None, checkpointing: bool | None = None
) -> list[torch.nn.Parameter]:
    """Let the encoder of a frozen model learn; return what learns of it.

    how: none, lora or full. rank: of lora's adapters.
    checkpointing: keep less in memory and compute it twice; None: where the model is full-size.
    """
    if how == "none":
        return []
    if how == "lora":
        add_adapters(model, rank)
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
