"""Whether a device computes SAM 2 as the CPU does: one image through encoder, decoder and back.

Some systems' MPS gives zero masks, or gradients that are garbage, and no error (macOS 26 with torch
2.8 to 2.13, GitHub actions/runner-images issue 14380; pytorch issues 140902 and 142344).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.models import make_predictor
from finetuning.prompts import make_prompt
from finetuning.segmentation import encode_images, predict_masks

TOLERANCE = 0.02  # relative; float32 differs by less than 0.001 between devices that are right


def trusted_device(
    predictor: SAM2ImagePredictor, device: torch.device, insists: bool
) -> torch.device:
    """Return the predictor's device; or, where MPS computes wrongly, move it to the CPU.

    It says so, and how to mend it. Who insists on MPS keeps it, with a warning.
    """
    if device.type != "mps":
        return device
    wrong = [
        f"{name} by {difference:.0%}"
        for name, difference in differences_from_cpu(predictor).items()
        if not difference <= TOLERANCE  # nor NaN
    ]
    if not wrong:
        return device
    print(
        f"warning: MPS computes SAM 2 wrongly on this system ({', '.join(wrong)} off what the CPU "
        "gives); a newer macOS or PyTorch may be right"
    )
    if insists:
        print("warning: going on with MPS all the same, as --device mps asks")
        return device
    print("going on with the CPU, only slower")
    predictor.model.to("cpu")
    return torch.device("cpu")


def differences_from_cpu(predictor: SAM2ImagePredictor) -> dict[str, float]:
    """Return |here - CPU| / |CPU| of an image's features, its mask logits, and their gradients.

    The model stays as it is.
    """
    on_cpu = make_predictor(copy.deepcopy(predictor.model).to("cpu"))
    here, expected = _compute(predictor), _compute(on_cpu)
    return {
        name: float((here[name] - values).norm() / values.norm())
        for name, values in expected.items()
    }


def _compute(predictor: SAM2ImagePredictor) -> dict[str, torch.Tensor]:
    """Return the features, mask logits and gradients of a drawn disk, each a vector on the CPU."""
    size = 256
    y, x = np.mgrid[:size, :size]
    disk = (x - 140) ** 2 + (y - 110) ** 2 < 50**2
    noise = np.random.default_rng(0).integers(0, 60, (size, size, 3), dtype=np.uint8)
    image = noise + (150 * disk[..., None]).astype(np.uint8)

    features = encode_images(predictor, [image])
    prediction = predict_masks(predictor, features, [make_prompt([(140, 110)])], [(size, size)])
    target = torch.from_numpy(disk.astype(np.float32)).to(predictor.device)[None, None]
    target = F.interpolate(target, prediction.mask_logits.shape[-2:]).expand_as(
        prediction.mask_logits
    )
    loss = F.binary_cross_entropy_with_logits(prediction.mask_logits, target)
    loss = loss + prediction.iou_scores.mean()
    weights = list(predictor.model.sam_mask_decoder.parameters())
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        "features": _vector([features.image_embed, *features.high_res_feats]),
        "mask logits": _vector([prediction.mask_logits]),
        "gradients": _vector([gradient for gradient in gradients if gradient is not None]),
    }


def _vector(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().cpu().float().flatten() for tensor in tensors])
