"""What every room needs: the command line, safe files, images, processes.

command_line: options, one-line errors, exit status, texts fit for a console
csv_files: tables: those of people, and our own that are read again
distributed: several GPUs or machines
files: files read and written safely, locked folders, downloads
image_decoding: image files of every format to pixel values
image_files: images and masks, read as 8 bits and written
language: English and Korean
pictures: the colours of all pictures; saving a figure
run_outputs: the names of a training's files, and the table of several runs
threads: many files read at the same time, in threads
tiff: the directories of TIFF and EXIF
"""
