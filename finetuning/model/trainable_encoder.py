"""Train SAM 2's image encoder: low-rank adapters in its attention, or all of its weights.

The encoder is frozen by default, which allows caching its features. With --train-encoder its
features change in every step, so each step encodes its images, with gradients:

let_encoder_learn      add adapters (lora) or unfreeze the encoder (full); returns its parameters
encode_with_gradients  what encode_images does, with gradients
merged_state_dict      weights with the adapters merged in: a plain SAM 2 checkpoint
merged_adapters        compute as that checkpoint does, for a while
checkpoint_blocks      gradient checkpointing: less memory, more computation
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType

from sam2_utils import UserError

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.checkpoint import checkpoint

from finetuning.segmentation.predicting import Features

DEFAULT_RANK = 8


def encode_with_gradients(predictor: SAM2ImagePredictor, images: list[np.ndarray]) -> Features:
    """Encode HxWx3 uint8 RGB images of any sizes, with gradients.

    Gradients reach the image encoder and the decoder's two convolutions on high-resolution
    features. Under autocast, weights and gradients stay float32; the features have autocast's dtype
    or float32.
    """
    # The function that encode_images calls, without its no_grad decorator
    SAM2ImagePredictor.set_image_batch.__wrapped__(predictor, images)
    features = Features(**predictor._features)
    predictor.reset_predictor()  # otherwise it keeps the autograd graph alive
    return features


def let_encoder_learn(
    model: SAM2Base, how: str, rank: int | None, checkpointing: bool | None = None
) -> list[torch.nn.Parameter]:
    """Make the image encoder of a frozen model trainable; return its trainable parameters.

    Arguments:
      how: none, lora or full.
      rank: of the LoRA adapters.
      checkpointing: whether to save memory by computing activations twice; None: if the input size
        is at least 1024.
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

    These stages contain most of the blocks (13 of 16 in small) and compute image_embed. The first
    two see edges and textures on maps up to 16 times as large; without adapters, they need no
    gradients and no activations in memory.
    """
    peft = import_peft()
    trunk = model.image_encoder.trunk
    blocks = "|".join(map(str, range(trunk.stage_ends[1] + 1, len(trunk.blocks))))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,  # a fixed alpha / rank: the rank does not change the learning speed
        target_modules=rf"trunk\.blocks\.({blocks})\.attn\.(qkv|proj)",
    )
    # In place, without a wrapper around the model; frozen weights stay frozen
    peft.inject_adapter_in_model(config, model.image_encoder)
    model.eval()


def import_peft() -> ModuleType:
    """Return the peft library; raise UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("--train-encoder lora needs peft; pip install peft") from error
    return peft


@torch.no_grad()
def merged_state_dict(model: SAM2Base) -> dict[str, torch.Tensor]:
    """Return the weights under SAM 2's own names with adapters merged in; the model is unchanged.

    A LoRA layer computes (W + BA) x, so W + BA is the weight of the plain layer.
    """
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith(".base_layer.weight"):
            weight = _merged_weight(model.get_submodule(name.removesuffix(".base_layer.weight")))
        if ".lora_" not in name:  # the adapters' own A and B
            weights[name.replace(".base_layer.", ".")] = weight
    return weights


@contextlib.contextmanager
def merged_adapters(model: SAM2Base) -> Iterator[None]:
    """Compute with merged weights inside the block, as the model's saved checkpoint does.

    In bfloat16, merged weights give other last digits than adapters beside them. Afterwards the
    adapters and the weights are what they were, to the bit.
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "merged_adapters")]
    originals = [layer.base_layer.weight.data for layer in layers]
    try:
        for layer in layers:
            layer.base_layer.weight.data = _merged_weight(layer).detach()
            layer.merged_adapters.extend(layer.active_adapters)  # peft leaves them out from now on
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.base_layer.weight.data = original
            layer.merged_adapters.clear()


def _merged_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return W + BA of a LoRA layer."""
    return layer.base_layer.weight + sum(map(layer.get_delta_weight, layer.active_adapters))


def checkpoint_blocks(model: SAM2Base) -> None:
    """Make trainable blocks of the trunk keep only their input and recompute activations."""
    learns = False
    for block in model.image_encoder.trunk.blocks:
        learns = learns or any(weight.requires_grad for weight in block.parameters())
        if learns:  # this block or an earlier one is trainable, so gradients pass through it
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
