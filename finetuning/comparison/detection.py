"""The objects that both models find without a prompt: a table and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.basics.files import write_csv
from finetuning.basics.language import say
from finetuning.comparison.tables import Table
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.object_matching import Counts, count_objects_found, total, tune_rule
from finetuning.model.model import Model
from finetuning.segmentation.automatic import Rule, rule_of

AUTO_FILE = "auto.csv"
AUTO_COLUMNS = ("image", "objects", "model", "found", "matched", "precision", "recall", "f1")


def compare_automatic(
    output: Path,
    models: list[Model],
    facts: dict[str, Any],
    pairs: list[Pair],
    training: list[Pair],
    seed: int,
) -> Table:
    """Count the objects that two models find without a prompt; write the file, return the table.

    facts: of the second, fine-tuned model's file. If it holds no rule, the rule is tuned on the
    training pairs; the original's always is.
    """
    # Each model gets its own thresholds: with those of the other it would look worse than it is
    original, finetuned = models
    rules = [
        tune_rule(original, training, seed),
        rule_of(facts) or tune_rule(finetuned, training, seed),
    ]
    counts = count_objects_found(models, rules, pairs)
    write_detection(output / AUTO_FILE, pairs, counts)
    return detection_table(counts, rules)


def detection_table(counts: Sequence[Sequence[Counts]], rules: Sequence[Rule]) -> Table:
    """Return a table of precision, recall and F1 over all images, and of the mean F1 per image."""
    totals = [total(model_counts) for model_counts in counts]
    means = [f"{np.mean([one.f1 for one in model_counts]):.4f}" for model_counts in counts]
    rows = [
        [say("precision"), *(f"{one.precision:.4f}" for one in totals)],
        [say("recall"), *(f"{one.recall:.4f}" for one in totals)],
        ["F1", *(f"{one.f1:.4f}" for one in totals)],
        [say("F1, mean over images"), *means],
        [say("masks found"), *(str(one.found) for one in totals)],
        [say("that match an object"), *(str(one.matched) for one in totals)],
        [say("minimum score"), *(f"{rule.min_score:.3f}" for rule in rules)],
        [say("minimum area"), *(f"{rule.min_area:.3%}" for rule in rules)],
    ]
    title = say(
        "objects found without a prompt ({count} objects in {images} images)",
        count=totals[0].objects, images=len(counts[0]),
    )  # fmt: skip
    note = say(
        "a mask matches an object from an IoU of 0.5 on; both thresholds were chosen on training "
        "images"
    )
    return Table(title, ["", say("original"), say("fine-tuned")], rows, note)


def write_detection(path: Path, pairs: list[Pair], counts: Sequence[Sequence[Counts]]) -> None:
    """Write one row per image and model."""
    rows = []
    for pair, *image_counts in zip(pairs, *counts, strict=True):
        for name, one in zip(("original", "finetuned"), image_counts, strict=True):
            shares = (f"{value:.6f}" for value in (one.precision, one.recall, one.f1))
            rows.append([pair.image.name, one.objects, name, one.found, one.matched, *shares])
    write_csv(path, AUTO_COLUMNS, rows)
