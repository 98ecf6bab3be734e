"""The data folder, as training and comparison read it: images, masks and splits.

objects: the objects of an image, each with its mask
pairs: find images and masks of a data folder; read split.json
splitting: choose images for validation, test and folds
"""
