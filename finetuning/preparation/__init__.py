"""Preparing the data folder: check the user's files, copy and split them, notice changes.

adding: add images to a filled folder, which keeps its split
copies: find duplicate and near-duplicate images, and consecutive frames
data_folder: fill a data folder and split its images
demo_images: draw the demo's images
filling: check images and masks, then copy or convert them
fingerprint: notice what has changed in the sources
groups: keep images that belong together in one split
overview: counts, warnings and a picture of a data folder
recordings: keep recordings whole, or split them in time
replacing: replace the content of a data folder completely, or not at all
unchanged: whether a filled folder still holds what its source holds
"""
