"""How many of the objects are found without a prompt: precision, recall and F1; and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from finetuning.dataset.objects import Objects, read_pair
from finetuning.dataset.pairs import Pair
from finetuning.model.automatic import ANY, RULE, Rule, SegmentedObject, find_objects
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.model.prompts import mask_box

MATCH_IOU = 0.5  # of a mask with the object that it counts as
MOST_TUNED = 20  # images that a rule is chosen on
AREA_SHARES = (0.0, 0.25, 0.5, 1.0)  # of the smallest true object, to choose from


class Counts(NamedTuple):
    """How many objects there are, how many masks were found, how many of these are objects."""

    objects: int
    found: int
    matched: int

    @property
    def precision(self) -> float:
        """Of the masks, the share that are objects; 1 where there are none."""
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Of the objects, the share that were found; 1 where there are none."""
        return self.matched / self.objects if self.objects else 1.0

    @property
    def f1(self) -> float:
        """2 matched / (objects + found); 1 where there are none of both."""
        both = self.objects + self.found
        return 2 * self.matched / both if both else 1.0


def total(counts: Sequence[Counts]) -> Counts:
    """Return the counts of all images together."""
    return Counts(*(sum(column) for column in zip(*counts, strict=True)))


def match(found: Sequence[SegmentedObject], objects: Objects) -> np.ndarray:
    """Say of each mask whether it is an object: N bool.

    From the first mask on, each takes the object that it has the highest IoU with, of those that
    are not taken yet, if that is MATCH_IOU or more.
    """
    ious = iou_table(found, objects)
    is_object = np.zeros(len(found), bool)
    for row, of_mask in enumerate(ious):
        if of_mask.size and of_mask.max() >= MATCH_IOU:
            is_object[row] = True
            ious[:, of_mask.argmax()] = 0
    return is_object


def iou_table(found: Sequence[SegmentedObject], objects: Objects) -> np.ndarray:
    """Return the IoU of N masks, none of them empty, with M objects, NxM."""
    boxes = [mask_box(one.mask) for one in found]
    areas = [np.count_nonzero(one.mask) for one in found]
    ious = np.zeros((len(found), len(objects)))
    for column, true_mask in enumerate(objects):
        true_area = np.count_nonzero(true_mask)
        for row, (x1, y1, x2, y2) in enumerate(boxes):
            inside = slice(y1, y2 + 1), slice(x1, x2 + 1)
            overlap = np.count_nonzero(found[row].mask[inside] & true_mask[inside])
            ious[row, column] = overlap / (areas[row] + true_area - overlap)
    return ious


def choose_rule(model: Model, pairs: list[Pair], seed: int) -> Rule:
    """Return the rule that finds the objects of some training images best, by F1.

    pairs: of training; MOST_TUNED of them are drawn by seed. The smallest area is chosen, too.
    """
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:MOST_TUNED]
    scores, areas, are_objects, smallest, count = [], [], [], 1.0, 0
    for index in tqdm(sorted(drawn), desc="Choosing thresholds", unit="image", leave=False):
        image, objects = read_pair(pairs[index])
        found = find_objects(model.predictor, model.source.precision, image, ANY)
        scores += [one.score for one in found]
        areas += [one.mask.mean() for one in found]
        are_objects += match(found, objects).tolist()
        smallest = min([smallest, *(mask.mean() for mask in objects)])
        count += len(objects)
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
    """Choose the rule of a model and keep it in its file, as plain values.

    pairs, seed: as in choose_rule.
    """
    predictor, facts = load_predictor(None, checkpoint, device)
    rule = choose_rule(Model(predictor, FeatureSource(predictor, precision)), pairs, seed)
    save_checkpoint(checkpoint, predictor.model, **{**facts, RULE: rule._asdict()})
    print(
        f"{checkpoint.name}: for --auto objects, masks of a score of {rule.min_score:.3f} and an "
        f"area of {rule.min_area:.3%} of the image count"
    )


def best_score(scores: np.ndarray, are_objects: np.ndarray, count: int) -> tuple[float, float]:
    """Return the highest F1 of masks that a lowest score leaves, and that score.

    scores, are_objects: of N masks that ANY keeps; count: of the objects that there are.
    """
    if not len(scores):
        return 0.0, 1.0
    order = np.argsort(-scores, kind="stable")
    matched, found = np.cumsum(are_objects[order]), np.arange(1, len(scores) + 1)
    f1 = 2 * matched / (found + count)
    last = int(f1.argmax())
    below = scores[order][last + 1] if last + 1 < len(scores) else ANY.min_score
    return float(f1[last]), float((scores[order][last] + below) / 2)


def count_objects_found(
    models: Sequence[Model], rules: Sequence[Rule], pairs: list[Pair]
) -> list[list[Counts]]:
    """Return what each model finds in each image, by its rule; images without objects count."""
    counts: list[list[Counts]] = [[] for _ in models]
    for pair in tqdm(pairs, desc="Finding objects", unit="image", leave=False):
        image, objects = read_pair(pair)
        for of_model, model, rule in zip(counts, models, rules, strict=True):
            found = find_objects(model.predictor, model.source.precision, image, rule)
            matched = int(match(found, objects).sum())
            of_model.append(Counts(len(objects), len(found), matched))
    return counts
