"""The loss of a training step."""

from __future__ import annotations

from collections.abc import Sequence

from sam2_utils import calculate_iou, copy_to

import torch
import torch.nn.functional as F
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.segmentation.predicting import Prediction, upscale_masks
from finetuning.training.recipe import Recipe
from finetuning.training_data.training_masks import LOSS_GRIDS


def image_losses(
    prediction: Prediction, true_mask: torch.Tensor, recipe: Recipe, has_background: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each object, and the values to report of each.

    seg_loss: the mask_losses of the first, the best or all of the three masks (recipe.mask_loss).
    score_loss: the mean of |predicted score - actual IoU of the thresholded mask| over all three,
    so that choosing by score works; see actual_ious. The guide's loss is that of the first mask
    without dice. With recipe.single_weight, the mask and score of the single mask, which other
    tools use, learn the same way. In steps with points on background, the object score learns too:
    whether there is an object (cross-entropy, weighted like a score). Other steps would teach it to
    always say yes.

    An empty true mask means that the prompt is on background. Then the right answer is scores of 0
    and no object, whatever the masks; train_iou is 1 if the score is below 0.5.

    Arguments:
      prediction: ...x4xHxW mask logits, at the true mask's resolution; ...x4 scores; ...x1 objects.
      true_mask: ...xHxW float in [0, 1]: the covered part of each cell.
      has_background: whether the step has points on background, in this part of it or another.
    """
    mask_logits, iou_scores, object_logits = prediction
    exists = (true_mask.amax((-2, -1)) > 0).float()  # of each object
    is_fine = recipe.loss_grid in LOSS_GRIDS[1:]
    actual_iou = actual_ious(mask_logits > 0, true_mask, is_fine) * exists[..., None]
    score_losses = (iou_scores - actual_iou).abs()

    # The three masks
    learning = slice(1, 2) if recipe.mask_loss == "first" else slice(1, 4)
    losses = mask_losses(mask_logits[..., learning, :, :], true_mask, recipe.dice_weight)
    seg_loss = losses.min(-1).values if recipe.mask_loss == "best" else losses.mean(-1)
    score_loss = score_losses[..., 1:].mean(-1)
    loss = exists * seg_loss + recipe.score_weight * score_loss

    # The single mask
    if recipe.single_weight:
        single_loss = mask_losses(mask_logits[..., :1, :, :], true_mask, recipe.dice_weight)[..., 0]
        object_loss = F.softplus((1 - 2 * exists) * object_logits[..., 0])
        # Times 0, not left out: AdamW keeps moving by what rare steps taught the object score
        scores_loss = score_losses[..., 0] + has_background * object_loss
        single = exists * single_loss + recipe.score_weight * scores_loss
        loss = loss + recipe.single_weight * single

    score, chosen = iou_scores[..., 1:].max(-1, keepdim=True)
    train_iou = actual_iou[..., 1:].gather(-1, chosen) + (1 - exists[..., None]) * (score < 0.5)
    report = {
        "loss": loss.detach(),
        "seg_loss": (exists * seg_loss).detach(),
        "score_loss": score_loss.detach(),
        "train_iou": train_iou.squeeze(-1),
    }
    return loss, report


def actual_ious(predicted: torch.Tensor, true_mask: torch.Tensor, is_fine: bool) -> torch.Tensor:
    """Return the IoU of each mask, ...xC: predicted ...xCxHxW bool, true_mask as in image_losses.

    A cell is the object's from half coverage on. A fine grid (is_fine) is for thin objects, of
    which hardly a cell is covered whole, and this would be far from the IoU at full resolution.
    There, the covered parts of 2x2 cells are compared: the sum of the smaller ones over the sum of
    the larger ones.
    """
    if not is_fine:
        return calculate_iou(predicted, true_mask.unsqueeze(-3) > 0.5)
    predicted, true = (
        F.avg_pool2d(mask, 2) for mask in (predicted.float(), true_mask[..., None, :, :])
    )
    smaller, larger = torch.minimum(predicted, true), torch.maximum(predicted, true)
    return smaller.sum((-2, -1)) / (larger.sum((-2, -1)) + 1e-6)


def mask_losses(
    mask_logits: torch.Tensor, true_mask: torch.Tensor, dice_weight: float
) -> torch.Tensor:
    """Return the loss of each mask, ...xC: cross-entropy plus dice_weight times the dice loss.

    Cross-entropy is that of sigmoid(logits) against the true mask, mean over pixels. Takes
    ...xCxHxW logits and the ...xHxW true mask, as in image_losses.
    """
    targets = true_mask.unsqueeze(-3).expand_as(mask_logits)
    losses = F.binary_cross_entropy_with_logits(mask_logits, targets, reduction="none")
    losses = losses.mean((-2, -1))
    if dice_weight:
        losses = losses + dice_weight * dice_loss(mask_logits.sigmoid(), targets)
    return losses


def dice_loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return 1 - (2 sum(predicted true) + 1) / (sum(predicted) + sum(true) + 1), of ...xHxW.

    Unlike cross-entropy, it measures errors relative to the object, not to the image: missing a
    small object costs as much as missing a large one (Milletari et al., V-Net, 2016).
    """
    overlap = (predicted * true).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (predicted.sum((-2, -1)) + true.sum((-2, -1)) + 1)


def batch_loss(
    predictor: SAM2ImagePredictor,
    prediction: Prediction,
    true_masks: Sequence[torch.Tensor],
    recipe: Recipe,
    has_background: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the mean loss of P objects, and the values to report of each, on the device.

    true_masks: P masks, HxW uint8 on any device, perhaps of several sizes; 255: the mask covers
    all of a cell. has_background: as in image_losses. Objects whose masks have the same size are
    computed together, and come together in the report.
    """
    losses, reports = [], []
    for rows in rows_by_size(true_masks):
        masks = true_masks
        if not isinstance(masks, torch.Tensor):
            masks = torch.stack([masks[row] for row in rows])
        found = Prediction(
            *(values if len(rows) == len(values) else values[rows] for values in prediction)
        )
        logits, size = found.mask_logits, masks.shape[-2:]
        if logits.shape[-2:] != size:
            logits = upscale_masks(predictor, logits, size)
        covered = copy_to(logits.device, masks).float() / 255
        found = found._replace(mask_logits=logits)
        loss, report = image_losses(found, covered, recipe, has_background)
        losses.append(loss)
        reports.append(report)
    report = {name: torch.cat([one[name] for one in reports]) for name in reports[0]}
    return torch.cat(losses).mean(), report


def rows_by_size(masks: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the numbers of the masks of each size, HxW."""
    rows: dict[torch.Size, list[int]] = {}
    for row, mask in enumerate(masks):
        rows.setdefault(mask.shape, []).append(row)
    return list(rows.values())
