"""The user's own files: folders, zips, tables and volumes of images and masks.

archives: zip archives, checked before anything is unpacked
folder_layouts: finding images and masks in folders
label_maps: exact values, palettes and soft edges of mask files
mask_values: what the values and colours of a mask file mean
name_matching: matching the names of masks to the names of images
pair_tables: pairs from a table
pairing: which masks belong to which image
source: where examples come from, and the options for it
volume_pairs: volumes and their label volumes, as slices
"""
