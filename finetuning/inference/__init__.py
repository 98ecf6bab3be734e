"""New images: typed or clicked prompts, folders of images, and files of the results.

clicked_object: an object that is clicked on
coco_files: results as COCO files
folder_results: the results of a folder, by which a later run goes on
given_prompts: prompts that are typed, or in a table
result_files: masks, overlays and cutouts
segmenting: the images of a folder, one after the other
window: a window to click in
window_picture: what that window shows
"""
