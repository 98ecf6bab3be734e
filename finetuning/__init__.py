"""The parts that the four scripts are made of, in a folder for each thing that they do.

basics: What every room needs: the command line, safe files, images, processes.
sources: The user's own files: folders, zips, tables and annotations of images and masks.
dataset: The data folder: how it is filled, split and read.
model: SAM 2: built, loaded, prompted, and its image features cached.
evaluation: How good a model is: one way to measure, for training and for the comparison.
training: Fine-tuning: the recipe, the steps, and what a run writes.
comparison: What a comparison of two models shows: tables, pictures, and the report.
inference: New images: typed or clicked prompts, folders of images, and files of the results.
export: A model as other tools load it (python -m finetuning.export).
"""

import sam2_utils  # noqa: F401, which sets what torch and OpenCV read when they are imported
