"""The pictures of a comparison: which images, and what is drawn of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from finetuning.clicks import CLICK_FILES
from finetuning.dataset.objects import read_pair
from finetuning.detection import AUTO_FILE
from finetuning.drawing import draw_panels
from finetuning.evaluation.measuring import Result, group_by_image, mean_gain, mean_metrics
from finetuning.model.drawing import draw_object
from finetuning.model.model import features_for, segment_with_all

FIGURE_NAME = re.compile(r"comparison_\d+_[+-]\d+p_")
MODEL_NAMES = ("original", "fine-tuned")
REPORT_FILES = ("report.html", "scatter.png")


class Picture(NamedTuple):
    """A picture that was drawn of one image."""

    path: Path
    name: str  # of the image's file
    ious: tuple[float, float]  # of both models, the mean of its objects


def choose_figures(results: list[Result], count: int) -> list[list[Result]]:
    """Choose the images to draw, by their objects' mean gain: half the biggest, half the worst."""
    ranked = sorted(group_by_image(results), key=mean_gain, reverse=True)
    if count >= len(ranked):
        return ranked
    return ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def draw_comparisons(
    output: Path, results: list[Result], mask_kind: str, count: int
) -> list[Picture]:
    """Draw the chosen images, named by rank and gain in %p; return the pictures in that order."""
    chosen, pictures = choose_figures(results, count), []
    for rank, of_image in enumerate(tqdm(chosen, desc="Drawing", unit="figure"), start=1):
        pair, models = of_image[0].pair, of_image[0].models
        image, objects = read_pair(pair)
        features = features_for(models, [(pair.image, objects.size)])
        panels = [image.copy() for _ in range(1 + len(models))]
        for result in of_image:
            true_mask = objects[result.object]
            masks = segment_with_all(models, features, [result.prompt], [objects.size], mask_kind)
            draw_object(panels[0], prompt=result.prompt, true_mask=true_mask)
            for panel, (mask,) in zip(panels[1:], masks, strict=True):
                draw_object(panel, mask, true_mask=true_mask, number=result.object)
        ious = tuple(mean_metrics(of_image, model)["IoU"] for model in (0, 1))
        titles = [
            "prompt and true outline",
            *(f"{name}: IoU {iou:.2f}" for name, iou in zip(MODEL_NAMES, ious, strict=True)),
        ]
        name = f"comparison_{rank:02}_{round(100 * mean_gain(of_image)):+d}p_{pair.name}.png"
        draw_panels(output / name, dict(zip(titles, panels, strict=True)))
        pictures.append(Picture(output / name, pair.image.name, ious))
    return pictures


def remove_earlier(output: Path) -> None:
    """Remove an earlier comparison's files that would be taken for this one's."""
    for path in output.glob("comparison_*.png"):
        if FIGURE_NAME.match(path.name):
            path.unlink()
    for name in (*CLICK_FILES, AUTO_FILE, *REPORT_FILES):
        (output / name).unlink(missing_ok=True)
