"""Annotation tools' exports: COCO, YOLO, labelme, and tables of run lengths.

coco_format: COCO, SA-1B and tables of run lengths to entries
formats: what the formats have in common: entries, JSON fields, errors
image_lookup: the image files that annotations name, and their split
labelme: labelme files to entries
outlines: polygons and run lengths, checked and drawn
reading: the outlined objects of each image
yolo: YOLO files to entries
"""
