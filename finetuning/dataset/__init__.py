"""The data folder: how it is filled, split and read.

copies: duplicate and near-duplicate images
data_folder: a data folder, filled as a whole or not at all
demo_images: the demo's drawn images
filling: images and masks, checked and copied or redrawn
groups: images that belong together stay in one split
objects: the objects of an image, each with its mask
overview: counts, warnings and a picture of a data folder
pairs: images and masks of a data folder, and split.json
splitting: which images are for validation, for a test, and in which fold
"""
