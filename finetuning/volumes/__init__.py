"""Medical and scientific files: volumes to slices, and masks back to volumes.

dicom: DICOM files and series (pydicom)
files: find volumes in folders, read them, write their masks
nifti: NIfTI files, in and out (nibabel)
slices: one value range for all volumes; slices as image files
tiff_stacks: TIFF stacks, OME-TIFF and many bands (tifffile)
volume: a volume, its channels, and the place of its voxels
"""
