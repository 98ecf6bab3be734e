"""How many objects both models find without a prompt, as a table and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.basics.files import write_csv
from finetuning.basics.language import say
from finetuning.comparison.tables import Table
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.object_matching import Counts, choose_rule, count_objects_found, total
from finetuning.model.automatic import Rule, rule_of
from finetuning.model.model import Model

AUTO_FILE = "auto.csv"
COLUMNS = ("image", "objects", "model", "found", "matched", "precision", "recall", "f1")


def compare_automatic(
    output: Path,
    models: list[Model],
    facts: dict[str, Any],
    pairs: list[Pair],
    training: list[Pair],
    seed: int,
) -> Table:
    """Measure and write how many objects two models find without a prompt; return the table.

    facts: of the second, fine-tuned file. The rule that it does not say, and that of the first, are
    chosen on training images.
    """
    original, finetuned = models
    rules = [
        choose_rule(original, training, seed),
        rule_of(facts) or choose_rule(finetuned, training, seed),
    ]
    counts = count_objects_found(models, rules, pairs)
    write_detection(output / AUTO_FILE, pairs, counts)
    return detection_table(counts, rules)


def detection_table(counts: Sequence[Sequence[Counts]], rules: Sequence[Rule]) -> Table:
    """Return how many objects both models find, of all images together and as images' mean F1."""
    totals = [total(of_model) for of_model in counts]
    rows = [
        [say("precision"), *(f"{of_model.precision:.4f}" for of_model in totals)],
        [say("recall"), *(f"{of_model.recall:.4f}" for of_model in totals)],
        ["F1", *(f"{of_model.f1:.4f}" for of_model in totals)],
        [say("F1, mean of images"), *(f"{np.mean([one.f1 for one in of]):.4f}" for of in counts)],
        [say("masks found"), *(str(of_model.found) for of_model in totals)],
        [say("that are objects"), *(str(of_model.matched) for of_model in totals)],
        [say("lowest score"), *(f"{rule.min_score:.3f}" for rule in rules)],
        [say("smallest area"), *(f"{rule.min_area:.3%}" for rule in rules)],
    ]
    title = say(
        "objects found without a prompt: {count} in {images} images",
        count=totals[0].objects, images=len(counts[0]),
    )  # fmt: skip
    note = say(
        "a mask counts as an object from an IoU of 0.5 on; both thresholds were chosen on training "
        "images"
    )
    return Table(title, ["", say("original"), say("fine-tuned")], rows, note)


def write_detection(path: Path, pairs: list[Pair], counts: Sequence[Sequence[Counts]]) -> None:
    """Write a row an image and model."""
    rows = []
    for pair, *of_image in zip(pairs, *counts, strict=True):
        for name, one in zip(("original", "finetuned"), of_image, strict=True):
            shares = (f"{value:.6f}" for value in (one.precision, one.recall, one.f1))
            rows.append([pair.image.name, one.objects, name, one.found, one.matched, *shares])
    write_csv(path, COLUMNS, rows)
