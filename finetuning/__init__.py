"""The parts of the four scripts, in one folder for each task.

basics: What all other folders need: the command line, safe files, images, processes.
annotations: Objects in other tools' files: COCO, YOLO, labelme.
volumes: Medical volumes and image stacks, slice by slice.
sources: The user's own files: folders, zips and tables of images and masks.
dataset: The data folder as training reads it: pairs, objects, splits.
preparation: Fills the data folder and adds to it.
segmentation: From image features and prompts to masks: the one path of all scripts.
model: SAM 2: built and loaded, and its image features cached.
evaluation: How good a model is: one way to measure, for training and for the comparison.
training_data: What training shows the model: images, prompts and true masks.
training: Fine-tuning: the recipe, the steps, and what a run writes.
comparison: What a comparison of two models shows: tables, pictures, and the report.
inference: New images: typed or clicked prompts, folders of images, and files of the results.
export: Models in the formats of other tools (python -m finetuning.export).
"""

import sam2_utils  # noqa: F401, it sets the environment that torch and OpenCV read on import
