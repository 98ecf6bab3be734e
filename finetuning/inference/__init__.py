"""Segment new images: prompts that are typed or clicked, folders of images, and result files.

clicked_object: one object in the window, its clicks and its masks
coco_files: objects as COCO files
folder_results: a folder's results, from which a later run continues
given_prompts: prompts from options, or from a table
result_files: masks, overlays and cutouts
segmenting: an image by prompts, by finding all objects, or in a window; or a folder of images
volume_results: slices of volumes as images, and masks as volumes
window: the window to click in
window_picture: what the window shows
"""
