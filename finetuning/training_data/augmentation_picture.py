"""augmentation.png: training images as the first epochs show them, with true masks and prompts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from finetuning.basics.image_files import read_image
from finetuning.basics.pictures import save_figure
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
    steps = []  # of each epoch, by image
    for column in range(columns):
        sampler.epoch = column + 1
        steps.append({index: step for step in sampler for index in step.indices})
        axes[0, column].set_title(f"epoch {sampler.epoch}", fontsize=9)
    for row, index in enumerate(indices):
        image = read_image(training_set.pairs[index].image)
        for column in range(columns):
            # Under torchrun, the step may be that of another process
            step = steps[column].get(index, Step(column + 1, [index], 1.0))
            batch = load_alone(training_set, step, index)
            axes[row, column].imshow(draw_shown(image, batch, training_set.image_size))
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


def draw_shown(image: np.ndarray, batch: Batch, image_size: int) -> np.ndarray:
    """Draw the true masks and prompts of a batch of one image on it, TILExTILEx3 uint8 RGB.

    image: the HxWx3 uint8 RGB image of the file. image_size: of the model's input.
    """
    canvas = cv2.resize(batch.shown[0].of_array(image), (TILE, TILE), interpolation=cv2.INTER_AREA)
    sizes = batch.prompt_sizes(image_size)
    for mask, prompt, size in zip(batch.true_masks, batch.prompts, sizes, strict=True):
        mask = cv2.resize(mask.numpy(), (TILE, TILE)) >= HALF
        coords = prompt.point_coords * (TILE / np.array(size[::-1], np.float32))
        draw_object(canvas, None, prompt._replace(point_coords=coords), mask)
    return canvas
