"""Fine-tune SAM 2 as Hugging Face's published notebooks do for SAM, with transformers' Sam2Model.

The image encoder and prompt encoder are frozen. The mask decoder learns from boxes, with one image
per step, and each step runs the whole model. The loss is cross-entropy plus dice, the optimizer is
Adam. The weights are random: transformers cannot convert SAM 2's files, and time does not depend on
them.
"""

from __future__ import annotations

import numpy as np
import torch
from guides_loop import clock
from tqdm import tqdm

from finetuning.basics.image_files import read_image
from finetuning.dataset.pairs import Pair
from finetuning.segmentation.prompts import mask_box
from finetuning.training.losses import mask_losses

# Arguments of Sam2HieraDetConfig, whose defaults are tiny
BACKBONES = {
    "tiny": {},
    "small": {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
}


def train_transformers(
    name: str, pairs: list[Pair], masks: list[np.ndarray], device: torch.device
) -> float:
    """Train one step on each pair with its HxW bool mask; return the total seconds.

    Raises ImportError if transformers is not installed.
    """
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(**BACKBONES[name])
    model = Sam2Model(Sam2Config(vision_config=Sam2VisionConfig(backbone_config=backbone)))
    model.to(device)
    model.vision_encoder.requires_grad_(False)
    model.prompt_encoder.requires_grad_(False)
    optimizer = torch.optim.Adam(model.mask_decoder.parameters(), lr=1e-5)
    start = clock(device)
    for pair, mask in zip(tqdm(pairs, desc="transformers", unit="image"), masks, strict=True):
        image = torch.from_numpy(read_image(pair.image)).permute(2, 0, 1)[None] / 255
        pixels = torch.nn.functional.interpolate(image, (1024, 1024), mode="bilinear")
        box = torch.tensor(mask_box(mask)) * 1024 / torch.tensor(mask.shape[::-1] * 2)
        answer = model(
            pixel_values=pixels.to(device),
            input_boxes=box[None, None].float().to(device),
            multimask_output=False,
        )
        logits = answer.pred_masks.flatten(0, 1)
        truth = torch.from_numpy(mask).float()[None, None].to(device)
        truth = torch.nn.functional.interpolate(truth, logits.shape[-2:], mode="area")[:, 0]
        loss = mask_losses(logits, truth, dice_weight=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock(device) - start
