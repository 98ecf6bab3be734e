"""The parts of the four scripts, in one folder for each task.

basics: What all other folders need: the command line, safe files, images, processes.
sources: The user's own files: folders, zips, tables and annotations of images and masks.
dataset: The data folder: how it is filled, split and read.
model: SAM 2: built, loaded, prompted, and its image features cached.
evaluation: How good a model is: one way to measure, for training and for the comparison.
training: Fine-tuning: the recipe, the steps, and what a run writes.
comparison: What a comparison of two models shows: tables, pictures, and the report.
inference: New images: typed or clicked prompts, folders of images, and files of the results.
export: Models in the formats of other tools (python -m finetuning.export).
"""

import sam2_utils  # noqa: F401, it sets the environment that torch and OpenCV read on import
