"""The names of SAM 2's weights: its own, those of transformers, and what other exports change."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

PATCH_EMBED = "image_encoder.trunk.patch_embed.proj.weight"  # in every SAM 2 checkpoint, once
TRANSFORMERS_TRUNK = "vision_encoder.backbone"
TRANSFORMERS_PATCH_EMBED = f"{TRANSFORMERS_TRUNK}.patch_embed.projection.weight"

# The parts of SAM 2 that segment images; the rest is its video memory, which Sam2Model lacks
IMAGE_PARTS = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
TRANSFORMERS_IMAGE_PARTS = ("vision_encoder.", "prompt_encoder.", "mask_decoder.")
FREQUENCIES = "prompt_encoder.shared_embedding.positional_embedding"
SHARED_FREQUENCIES = "shared_image_embedding.positional_embedding"
POINT_MATRIX = "prompt_encoder.point_embed.weight"
POINT_EMBEDDINGS = [f"sam_prompt_encoder.point_embeddings.{label}.weight" for label in range(4)]
# From SAM 2's names to Sam2Model's: regular expressions, applied one after another
RENAMES = {
    r"^image_encoder\.trunk\.": "vision_encoder.backbone.",
    r"^image_encoder\.neck\.convs\.(\d)\.conv\.": r"vision_encoder.neck.convs.\1.",
    r"\.patch_embed\.proj\.": ".patch_embed.projection.",
    r"^no_mem_embed$": "no_memory_embedding",
    r"^sam_": "",
    r"\.pe_layer\.positional_encoding_gaussian_matrix$": ".shared_embedding.positional_embedding",
    r"\.mask_downscaling\.0\.": ".mask_embed.conv1.",
    r"\.mask_downscaling\.1\.": ".mask_embed.layer_norm1.",
    r"\.mask_downscaling\.3\.": ".mask_embed.conv2.",
    r"\.mask_downscaling\.4\.": ".mask_embed.layer_norm2.",
    r"\.mask_downscaling\.6\.": ".mask_embed.conv3.",
    r"\.output_upscaling\.0\.": ".upscale_conv1.",
    r"\.output_upscaling\.1\.": ".upscale_layer_norm.",
    r"\.output_upscaling\.3\.": ".upscale_conv2.",
    r"\.out_proj\.": ".o_proj.",
    r"\.norm(\d|_final_attn)\.": r".layer_norm\1.",
    # Perceptrons: two layers in the blocks, three in the decoder's heads
    r"\.mlp\.layers\.0\.": ".mlp.proj_in.",
    r"\.mlp\.layers\.1\.": ".mlp.proj_out.",
    r"(_head|_mlps\.\d)\.layers\.0\.": r"\1.proj_in.",
    r"(_head|_mlps\.\d)\.layers\.1\.": r"\1.layers.0.",
    r"(_head|_mlps\.\d)\.layers\.2\.": r"\1.proj_out.",
}


def transformers_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return SAM 2's weights under the names of transformers' Sam2Model.

    Sam2Model has the four point embeddings in one matrix, and stores the frequencies of the
    positional encoding twice.
    """
    weights = {name: weight for name, weight in state_dict.items() if name.startswith(IMAGE_PARTS)}
    points = [weights.pop(name) for name in POINT_EMBEDDINGS]
    weights = {_rename(name): weight for name, weight in weights.items()}
    weights[SHARED_FREQUENCIES] = weights[FREQUENCIES].clone()
    weights[POINT_MATRIX] = torch.cat(points)
    return weights


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def find_weights(
    weights: dict[str, torch.Tensor], names: Iterable[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights of a file under SAM 2's names, and the names of all its other weights.

    Arguments:
      weights: under SAM 2's names or those of transformers; some exports write ".gamma" as
        ".weight". Of transformers' files, only the parts that segment images are taken.
      names: of all weights of the model.
    """
    found, others = {}, dict(weights)
    is_transformers = TRANSFORMERS_PATCH_EMBED in weights
    if is_transformers and (points := others.pop(POINT_MATRIX, None)) is not None:
        found = dict(zip(POINT_EMBEDDINGS, points.split(1), strict=False))
    if (frequencies := others.pop(SHARED_FREQUENCIES, None)) is not None:
        others.setdefault(FREQUENCIES, frequencies)  # some files have only one of the two
    for name in names:
        if is_transformers:
            spellings = [_rename(name)] if name.startswith(IMAGE_PARTS) else []
        else:
            spellings = [name, name.replace(".gamma", ".weight")]
        for spelling in spellings:
            if spelling in others:
                found[name] = others.pop(spelling)
                break
    return found, list(others)


def is_for_images(name: str) -> bool:
    """Return whether a weight belongs to the parts that segment images, in either naming."""
    return name.startswith((*IMAGE_PARTS, *TRANSFORMERS_IMAGE_PARTS))
