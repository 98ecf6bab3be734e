"""The pictures of a comparison: images with both masks, and a scatter chart of all objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from finetuning.basics.pictures import save_figure
from finetuning.comparison.clicks import CLICK_FILES
from finetuning.comparison.detection import AUTO_FILE
from finetuning.comparison.report import size_class
from finetuning.dataset.objects import read_pair
from finetuning.evaluation.measuring import (
    Comparison,
    Result,
    counted_unit,
    group_by_image,
    in_parts,
    mean_gain,
    mean_metrics,
    prompts_at_once,
)
from finetuning.model.model import Model, features_for, segment_with_all
from finetuning.segmentation.drawing import draw_object

FIGURE_NAME = re.compile(r"comparison_\d+_[+-]\d+p_")
MODEL_NAMES = ("original", "fine-tuned")
REPORT_FILES = ("report.html", "scatter.png")

# Paul Tol's high-contrast scheme: distinguishable by colour-blind people and in grayscale
SIZE_COLORS = {"small": "#DDAA33", "medium": "#BB5566", "large": "#004488"}


class Picture(NamedTuple):
    """A picture of one image with both masks."""

    path: Path
    name: str  # the image's file name
    ious: tuple[float, float]  # mean over the image's objects, of each model


def choose_figures(results: list[Result], count: int) -> list[list[Result]]:
    """Choose the images to draw by the mean gain of their objects: half the best, half the worst.

    Returns the results of each chosen image, from the largest gain to the largest loss.
    """
    ranked = sorted(group_by_image(results), key=mean_gain, reverse=True)
    if count >= len(ranked):
        return ranked
    return ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def draw_comparisons(
    output: Path, comparisons: Sequence[Comparison], mask_kind: str, count: int
) -> list[Picture]:
    """Draw the chosen images, named by rank and gain in %p; return the pictures in that order."""
    results = [result for comparison in comparisons for result in comparison.results]
    # With folds, the best and worst images may come from several fine-tuned models
    models_by_image = {
        result.index: models for models, _, results in comparisons for result in results
    }
    chosen, pictures = choose_figures(results, count), []
    for rank, image_results in enumerate(tqdm(chosen, desc="Drawing", unit="figure"), start=1):
        panels = draw_masks(models_by_image[image_results[0].index], image_results, mask_kind)
        pair, gain = image_results[0].pair, round(100 * mean_gain(image_results))
        ious = tuple(mean_metrics(image_results, model)["IoU"] for model in (0, 1))
        titles = [
            "prompt and true outline",
            *(f"{name}: IoU {iou:.2f}" for name, iou in zip(MODEL_NAMES, ious, strict=True)),
        ]
        path = output / f"comparison_{rank:02}_{gain:+d}p_{pair.name}.png"
        draw_panels(path, dict(zip(titles, panels, strict=True)))
        pictures.append(Picture(path, pair.image.name, ious))
    return pictures


def draw_masks(
    models: Sequence[Model], image_results: list[Result], mask_kind: str
) -> list[np.ndarray]:
    """Return panels of one image, HxWx3 uint8 RGB: the prompts, then the masks of each model."""
    pair = image_results[0].pair
    image, objects = read_pair(pair)
    features = features_for(models, [(pair.image, objects.size)])
    panels = [image.copy() for _ in range(1 + len(models))]
    for part in in_parts(image_results, prompts_at_once(models)):
        # The masks were not kept, which would fill the memory: segment again
        masks = segment_with_all(
            models,
            [model_features.of([0] * len(part)) for model_features in features],
            [result.prompt for result in part],
            [objects.size] * len(part),
            mask_kind,
        )
        for result, *model_masks in zip(part, *masks, strict=True):
            true_mask = objects.cropped(result.object)
            draw_object(panels[0], prompt=result.prompt, true_mask=true_mask)
            for panel, mask in zip(panels[1:], model_masks, strict=True):
                draw_object(panel, mask, true_mask=true_mask, number=result.object)
    return panels


def remove_earlier(output: Path) -> None:
    """Remove the files of an earlier comparison that could be mistaken for this one's."""
    for path in output.glob("comparison_*.png"):
        if FIGURE_NAME.match(path.name):
            path.unlink()
    for name in (*CLICK_FILES, AUTO_FILE, *REPORT_FILES):
        (output / name).unlink(missing_ok=True)


def draw_ious(path: Path, results: list[Result]) -> None:
    """Draw the fine-tuned model's IoU against the original's, one dot per object."""
    ious = np.array([[metrics["IoU"] for metrics in result.metrics] for result in results])
    sizes = [size_class(result.area_fraction) for result in results]
    draw_scatter(path, ious, sizes, counted_unit(results))


def draw_scatter(path: Path, ious: np.ndarray, sizes: list[str], unit: str) -> None:
    """Write the chart of plot_scatter as a PNG file."""
    figure = Figure(figsize=(7, 7.3), layout="constrained")
    plot_scatter(figure.subplots(), ious, sizes, unit)
    # The legend goes below the chart: in any corner it could hide an object
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", markerscale=0.8)
    save_figure(path, figure, bbox_inches="tight")


def plot_scatter(axes: Axes, ious: np.ndarray, sizes: list[str], unit: str) -> None:
    """Plot the fine-tuned model's IoU against the original's, one dot per object, and the mean.

    Above the diagonal, the fine-tuned model is better.

    Arguments:
      ious: Mx2, 0 to 1, of the original and the fine-tuned model on M objects.
      sizes: the size of each object: small, medium or large.
      unit: what a dot stands for, such as "object".
    """
    count = len(ious)
    axes.plot((0, 1), (0, 1), "--", color="gray", linewidth=1, zorder=1)

    # Draw all sizes in one call, in random order: a size drawn last would hide the others
    order = np.random.default_rng(0).permutation(count)
    # The more dots, the smaller and the more transparent
    area, alpha = np.clip(8000 / count, 7, 70), np.clip(150 / count, 0.5, 0.8)
    colors = [SIZE_COLORS[sizes[k]] for k in order]
    axes.scatter(*ious[order].T, area, colors, alpha=alpha, linewidths=0, zorder=2)
    for size, color in SIZE_COLORS.items():
        if size in sizes:
            axes.scatter([], [], 40, color, label=f"{size} ({sizes.count(size)})")

    mean = ious.mean(axis=0)
    label = f"mean ({mean[0]:.4f}, {mean[1]:.4f})"
    axes.plot(*mean, "+", color="black", markersize=20, markeredgewidth=2, label=label)

    gains = ious[:, 1] - ious[:, 0]
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    axes.set_title(
        f"{count} {unit}{'s' if count > 1 else ''}: {better} above the diagonal (better), "
        f"{count - better - worse} on it, {worse} below (worse)",
        fontsize="medium",
    )
    axes.set(xlabel="IoU, original", ylabel="IoU, fine-tuned", aspect="equal")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))  # do not cut off dots at 0 and 1
    axes.grid(alpha=0.3)


def draw_panels(path: Path, panels: dict[str, np.ndarray]) -> None:
    """Draw HxWx3 uint8 RGB images side by side, with their titles."""
    figure = Figure(figsize=(12, 12), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.axis("off")
    save_figure(path, figure, bbox_inches="tight")
