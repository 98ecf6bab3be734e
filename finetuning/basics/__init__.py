"""What all other folders need: the command line, safe files, images, processes.

command_line: options, one-line errors, exit status, text that is safe to print
cropped_masks: masks stored as their bounding box
csv_files: users' tables, and our own with a checksum
distributed: several GPUs or machines
files: reading and writing files safely, locked folders, downloads
image_decoding: pixel values of image files of every format
image_files: reading images, and black and white masks, as 8 bits; writing them
language: English and Korean
pictures: the colours of all pictures; saving a figure
run_outputs: the names of a training run's files, and the table of repeated runs
threads: reading many files at once
tiff: the directories of TIFF and EXIF data
"""
