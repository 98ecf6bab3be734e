"""The user's own files: folders, zips, tables and annotations of images and masks.

annotation_formats: YOLO and labelme files to entries
annotations: the outlined objects of each image
archives: zip archives, checked before anything is unpacked
coco_format: COCO, SA-1B and tables of run lengths to entries
folder_layouts: finding images and masks in folders
image_lookup: the image files that annotations name, and their split
label_maps: exact values, palettes and soft edges of mask files
mask_values: what the values and colours of a mask file mean
name_matching: matching the names of masks to the names of images
outlines: polygons and run lengths, checked and drawn
pairing: which masks belong to which image
source: where examples come from, and the options for it
volume_pairs: volumes and their label volumes, as slices
"""
