"""The user's own files: folders, zips, tables and annotations of images and masks.

annotation_formats: COCO, YOLO and labelme
annotations: which objects are outlined in which image
archives: zip archives: what they may hold
folder_layouts: where images and masks lie in folders
mask_values: what the values and colours of a mask file mean
name_matching: which names of masks belong to which names of images
outlines: polygons and run lengths: checked and drawn
pairing: which masks belong to which image
source: where pairs come from, and the options that say it
"""
