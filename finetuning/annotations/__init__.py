"""Annotation tools' exports: COCO, YOLO, labelme, and tables of run lengths.

coco_format: COCO, SA-1B and tables of run lengths to entries
formats: YOLO and labelme files to entries
image_lookup: the image files that annotations name, and their split
outlines: polygons and run lengths, checked and drawn
reading: the outlined objects of each image
"""
