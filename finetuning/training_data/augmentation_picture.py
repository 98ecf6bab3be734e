"""augmentation.png: training images as the first epochs show them, with true masks and prompts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.pictures import save_figure
from finetuning.model.image_variants import read_variant
from finetuning.segmentation.drawing import draw_object
from finetuning.training_data.batches import Batch, TrainingSet
from finetuning.training_data.epoch_sampling import EpochSampler, Step
from finetuning.training_data.training_masks import HALF

IMAGES, EPOCHS = 5, 8  # rows and columns, at most
TILE = 320  # pixels per side: images are square, as the model sees them


def draw_augmentation(
    path: Path, training_set: TrainingSet, sampler: EpochSampler, epochs: int
) -> None:
    """Draw some training images, each in a row, as the first of so many epochs show them.

    Masks and prompts are those of the batches that training uses, so an error in them would show.
    """
    indices = list(sampler.objects)[:: -(-len(sampler.objects) // IMAGES)]
    columns = min(EPOCHS, epochs)
    figure = Figure(figsize=(1.6 * columns, 1.6 * len(indices) + 0.3), layout="constrained")
    axes = figure.subplots(len(indices), columns, squeeze=False)
    for column in range(columns):
        sampler.epoch = column + 1
        steps = {index: step for step in sampler for index in step.indices}
        axes[0, column].set_title(f"epoch {sampler.epoch}", fontsize=9)
        for row, index in enumerate(indices):
            step = steps.get(index, Step(sampler.epoch, [index], 1.0))  # torchrun: another's image
            batch = load_alone(training_set, step, index)
            axes[row, column].imshow(draw_shown(batch, training_set.image_size))
            axes[row, column].axis("off")
    save_figure(path, figure)


def load_alone(training_set: TrainingSet, step: Step, index: int) -> Batch:
    """Load one image of a step with its prompts; raise the error that prevents it."""
    objects = step.objects and [step.objects[step.indices.index(index)]]
    alone = step._replace(indices=[index], objects=objects, fraction=1.0, image_fraction=1.0)
    batch = training_set[alone]
    if isinstance(batch, Exception):
        raise batch
    return batch


def draw_shown(batch: Batch, image_size: int) -> np.ndarray:
    """Draw the true masks and prompts of a batch of one image on it, TILExTILEx3 uint8 RGB."""
    shown = batch.shown[0]
    image = batch.images[0] if batch.images else shown.view.of_array(read_variant(shown.image))
    canvas = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
    for mask, prompt in zip(batch.true_masks.numpy(), batch.prompts, strict=True):
        mask = cv2.resize(mask, (TILE, TILE)) >= HALF
        coords = prompt.point_coords * (TILE / image_size)
        draw_object(canvas, None, prompt._replace(point_coords=coords), mask)
    return canvas
