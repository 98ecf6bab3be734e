"""NIfTI files: read as slices that are upright, and masks written on the same grid."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path
from finetuning.basics.files import atomic_write
from finetuning.volumes.volume import Bands, Volume, choose_bands, require

NIFTI_SUFFIXES = (".nii.gz", ".nii")
KIND = "a NIfTI file"
THICK = 1.5  # so much longer than along the last axis, a voxel's longest side is across the slices


def read_nifti(path: Path, bands: Bands = (), like: Path | None = None) -> Volume:
    """Read a NIfTI file.

    Arguments:
      bands: of a fourth axis.
      like: a scan whose place the file takes if it has none of its own.

    The slices lie across the last axis, or the one of the largest spacing; they are turned as
    radiologists see them: the patient's right on the left, the front or the head at the top.
    """
    scan = _load(path)
    try:
        values = np.asanyarray(scan.dataobj)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{brief_path(path)} is damaged or cut off; copy it again") from error
    if values.dtype.fields:  # RGB
        values = np.stack([values[name] for name in ("R", "G", "B")], axis=-1)
    elif values.dtype == np.float64:
        values = values.astype(np.float32)
    values = values.reshape(values.shape + (1,) * (3 - values.ndim))
    spatial, channels = values.shape[:3], [n for n in values.shape[3:] if n > 1] or [1]
    if len(channels) > 1:
        raise UserError(f"{brief_path(path)} has {values.ndim} axes; save volumes of 3 axes")
    values = choose_bands(path, values.reshape(*spatial, *channels), bands)
    affine = _affine(scan if like is None or has_place(scan) else _load(like))
    nibabel, turn = require("nibabel", path, KIND), upright_turn(affine, spatial)
    values = nibabel.orientations.apply_orientation(values, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, spatial)
    return Volume(path, np.moveaxis(values, (0, 1, 2), (2, 1, 0)), affine)


def _load(path: Path) -> Any:
    nibabel = require("nibabel", path, KIND)
    try:
        return nibabel.load(path)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{brief_path(path)} is no readable NIfTI file; copy it again") from error


def _affine(scan: Any) -> np.ndarray:
    """Return a scan's 4x4 affine; that of its spacing if its own is not invertible."""
    affine = scan.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        spacing = [float(side) or 1.0 for side in scan.header.get_zooms()[:3]]
        affine = np.diag([*spacing, *[1.0] * (4 - len(spacing))])
    return affine


def has_place(scan: Any) -> bool:
    """Return whether a scan says where it lies: arrays are often saved with the identity."""
    return not np.allclose(np.abs(_affine(scan)), np.eye(4))


def upright_turn(affine: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return how a scan's three axes become columns, rows and slices, as nibabel's orientation.

    Row i is the new place (0: columns, 1: rows, 2: slices) of axis i, and 1, or -1 for a flip.
    """
    nibabel = require("nibabel", Path(), KIND)
    directions, size = nibabel.orientations.io_orientation(affine), np.array(size)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    across = 2
    if (size == 1).sum() == 1:
        across = int(size.argmin())
    elif spacing.max() > THICK * spacing[2]:
        across = int(spacing.argmax())
    column, row = sorted((k for k in range(3) if k != across), key=lambda k: directions[k, 0])
    turn = np.ones((3, 2))
    for place, axis in enumerate((column, row, across)):
        turn[axis, 0] = place
    for axis in (column, row):  # columns go to the left, rows to the back or the feet
        turn[axis, 1] = -directions[axis, 1]
    return turn


def write_nifti_like(path: Path, masks: np.ndarray, scan_path: Path) -> None:
    """Write masks on the grid of a NIfTI scan; masks: slices x rows x columns, as read_nifti's."""
    nibabel, scan = require("nibabel", path, KIND), _load(scan_path)
    shape = (*scan.shape, 1, 1)[:3]
    turn = upright_turn(_affine(scan), shape)
    back = nibabel.orientations.ornt_transform(
        np.array([[0, 1], [1, 1], [2, 1]], float), _inverse(turn)
    )
    values = nibabel.orientations.apply_orientation(masks.transpose(2, 1, 0), back)
    header = scan.header.copy()  # keeps qform and sform as they are
    header.set_data_dtype(masks.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    _save(type(scan)(values.reshape(scan.shape[:3]), None, header), path)


def _inverse(turn: np.ndarray) -> np.ndarray:
    """Return the orientation that undoes another one."""
    inverse = np.ones((3, 2))
    for axis, (place, flip) in enumerate(turn):
        inverse[int(place)] = axis, flip
    return inverse


def write_nifti(path: Path, masks: np.ndarray, affine: np.ndarray) -> None:
    """Write masks, slices x rows x columns, with the affine of a Volume."""
    nibabel = require("nibabel", path, KIND)
    _save(nibabel.Nifti1Image(masks.transpose(2, 1, 0), affine), path)


def _save(image: Any, path: Path) -> None:
    """Save a NIfTI image atomically; a partial file's name lacks the suffix that nibabel needs."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
