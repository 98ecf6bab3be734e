"""The guide's training loop, written out plainly: the baseline of the benchmarks."""

from __future__ import annotations

import time

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.dataset.objects import read_pair
from finetuning.dataset.pairs import Pair
from finetuning.segmentation.prompts import random_point
from finetuning.training.recipe import Recipe


def train_guide(
    predictor: SAM2ImagePredictor, pairs: list[Pair], recipe: Recipe
) -> dict[str, float]:
    """Train in float32 with one image per step; return the seconds of encoding and of the steps."""
    model, device = predictor.model, predictor.device
    model.sam_mask_decoder.train(True)
    model.sam_prompt_encoder.train(True)
    learned = [*model.sam_mask_decoder.parameters(), *model.sam_prompt_encoder.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=recipe.weight_decay)
    rng = np.random.default_rng(recipe.seed)
    seconds = {"encode": 0.0, "steps": 0.0}
    for _ in range(recipe.epochs):
        for index in tqdm(rng.permutation(len(pairs)), desc="the guide's loop", unit="image"):
            start = clock(device)
            image, objects = read_pair(pairs[index])
            mask = objects[0]
            predictor.set_image(image)
            encoded = clock(device)

            loss = guide_loss(predictor, mask, random_point(mask, rng), recipe.score_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds["encode"] += encoded - start
            seconds["steps"] += clock(device) - encoded
    model.eval()
    return seconds


def guide_loss(
    predictor: SAM2ImagePredictor, mask: np.ndarray, point: tuple[int, int], score_weight: float
) -> torch.Tensor:
    """Return the loss of a step after set_image, word for word as in the guide."""
    model = predictor.model
    points, label = np.array([[point]]), np.ones((1, 1), np.int32)
    _, coords, labels, _ = predictor._prep_prompts(
        points, label, box=None, mask_logits=None, normalize_coords=True
    )
    sparse_embeddings, dense_embeddings = model.sam_prompt_encoder(
        points=(coords, labels), boxes=None, masks=None
    )
    features = predictor._features["high_res_feats"]
    low_res_masks, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=predictor._features["image_embed"],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse_embeddings,
        dense_prompt_embeddings=dense_embeddings,
        multimask_output=True,
        repeat_image=False,
        high_res_features=[level[-1].unsqueeze(0) for level in features],
    )
    masks = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])
    truth = torch.from_numpy(mask.astype(np.float32)).to(predictor.device)
    probability = torch.sigmoid(masks[0, 0])
    seg_loss = -(
        truth * torch.log(probability + 1e-5) + (1 - truth) * torch.log(1 - probability + 1e-5)
    ).mean()
    predicted = (masks[0] > 0).float()
    intersection = (predicted * truth).sum((1, 2))
    union = predicted.sum((1, 2)) + truth.sum() - intersection
    score_loss = (scores[0] - intersection / (union + 1e-6)).abs().mean()
    return seg_loss + score_weight * score_loss


def clock(device: torch.device) -> float:
    """Wait until the device has finished its work, then return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
