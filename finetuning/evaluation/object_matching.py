"""Precision, recall and F1 of the objects found without a prompt, and the choice of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from finetuning.basics.cropped_masks import crop_mask
from finetuning.dataset.objects import Objects, read_pair
from finetuning.dataset.pairs import Pair
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.segmentation.automatic import ANY, RULE, Rule, SegmentedObject, find_objects

MATCH_IOU = 0.5  # a mask matches an object from this IoU on
MOST_TUNED = 20  # images that a rule is tuned on
AREA_SHARES = (0.0, 0.25, 0.5, 1.0)  # candidate minimum areas / area of the smallest true object


class Counts(NamedTuple):
    """The number of true objects, of masks found, and of masks that match an object."""

    objects: int
    found: int
    matched: int

    @property
    def precision(self) -> float:
        """The share of the masks that match an object; 1 if there is no mask."""
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """The share of the objects that were found; 1 if there is no object."""
        return self.matched / self.objects if self.objects else 1.0

    @property
    def f1(self) -> float:
        """2 matched / (objects + found); 1 if there is neither a mask nor an object."""
        both = self.objects + self.found
        return 2 * self.matched / both if both else 1.0


def total(counts: Sequence[Counts]) -> Counts:
    """Return the sum of the counts of all images."""
    return Counts(*(sum(column) for column in zip(*counts, strict=True)))


def match(found: Sequence[SegmentedObject], objects: Objects) -> np.ndarray:
    """Return whether each of N masks matches an object: N bool.

    The masks are matched greedily, in order. Each takes the free object with the highest IoU, if
    that is at least MATCH_IOU.
    """
    ious = iou_table(found, objects)
    is_object = np.zeros(len(found), bool)
    for row, mask_ious in enumerate(ious):
        if mask_ious.size and mask_ious.max() >= MATCH_IOU:
            is_object[row] = True
            ious[:, mask_ious.argmax()] = 0  # an object is found once
    return is_object


def iou_table(found: Sequence[SegmentedObject], objects: Objects) -> np.ndarray:
    """Return the NxM IoU of N masks, none of them empty, with M objects."""
    masks = [crop_mask(one.mask) for one in found]
    areas = [mask.area for mask in masks]
    ious = np.zeros((len(found), len(objects)))
    for column, true_mask in enumerate(objects.all_cropped()):
        true_area = true_mask.area
        for row, mask in enumerate(masks):
            overlap = mask.overlap(true_mask)
            ious[row, column] = overlap / (areas[row] + true_area - overlap)
    return ious


def tune_rule(model: Model, pairs: list[Pair], seed: int) -> Rule:
    """Return the rule with the highest F1 on training images: a minimum score and area.

    pairs: the training pairs; MOST_TUNED of them are drawn by seed.
    """
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:MOST_TUNED]
    scores, areas, are_objects, smallest, count = [], [], [], 1.0, 0
    for index in tqdm(sorted(drawn), desc="Choosing thresholds", unit="image", leave=False):
        image, objects = read_pair(pairs[index])
        found = find_objects(model.predictor, model.source.precision, image, ANY)
        scores += [one.score for one in found]
        areas += [one.mask.mean() for one in found]
        are_objects += match(found, objects).tolist()
        pixels = np.prod(objects.size)
        smallest = min([smallest, *(mask.area / pixels for mask in objects.all_cropped())])
        count += len(objects)
    # All candidate masks are known by now: any thresholds only select among them
    best, rule = 0.0, Rule()
    for area in (share * smallest for share in AREA_SHARES):
        kept = np.array(areas) >= area
        f1, score = best_score(np.array(scores)[kept], np.array(are_objects)[kept], count)
        if f1 > best:
            best, rule = f1, ANY._replace(min_score=score, min_area=float(area))
    return rule


def keep_rule(
    checkpoint: Path, device: torch.device, precision: torch.dtype, pairs: list[Pair], seed: int
) -> None:
    """Tune the rule of a model and save it in the model's file, as plain values.

    pairs, seed: as in tune_rule.
    """
    predictor, facts = load_predictor(None, checkpoint, device)
    rule = tune_rule(Model(predictor, FeatureSource(predictor, precision)), pairs, seed)
    save_checkpoint(checkpoint, predictor.model, **{**facts, RULE: rule._asdict()})
    print(
        f"{checkpoint.name}: --auto objects keeps masks with a score of at least "
        f"{rule.min_score:.3f} and an area of at least {rule.min_area:.3%} of the image"
    )


def best_score(scores: np.ndarray, are_objects: np.ndarray, count: int) -> tuple[float, float]:
    """Return the highest F1 that a minimum score can reach, and that score.

    scores, are_objects: of the N masks that ANY keeps; count: the number of true objects.
    """
    if not len(scores):
        return 0.0, 1.0
    order = np.argsort(-scores, kind="stable")
    matched, found = np.cumsum(are_objects[order]), np.arange(1, len(scores) + 1)
    f1 = 2 * matched / (found + count)
    last = int(f1.argmax())
    # Halfway between the last score that is kept and the next lower one
    below = scores[order][last + 1] if last + 1 < len(scores) else ANY.min_score
    return float(f1[last]), float((scores[order][last] + below) / 2)


def count_objects_found(
    models: Sequence[Model], rules: Sequence[Rule], pairs: list[Pair]
) -> list[list[Counts]]:
    """Return the counts of each model in each image, by its rule; images may have no objects."""
    counts: list[list[Counts]] = [[] for _ in models]
    for pair in tqdm(pairs, desc="Finding objects", unit="image", leave=False):
        image, objects = read_pair(pair)
        for model_counts, model, rule in zip(counts, models, rules, strict=True):
            found = find_objects(model.predictor, model.source.precision, image, rule)
            matched = int(match(found, objects).sum())
            model_counts.append(Counts(len(objects), len(found), matched))
    return counts
