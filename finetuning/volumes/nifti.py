"""NIfTI files: read as slices that are upright, and masks written on the same grid."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path
from finetuning.basics.files import atomic_write
from finetuning.volumes.volume import Bands, Volume, choose_bands, require, upright_turn

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
    turn = upright_turn(affine, _across(affine, spatial))
    return Volume(path, turn.apply(values), turn.affine(affine, spatial))


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


def _across(affine: np.ndarray, size: tuple[int, ...]) -> int:
    """Return the axis across the slices: the last, or that of one voxel or of a large spacing."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if size.count(1) == 1:
        return size.index(1)
    return int(spacing.argmax()) if spacing.max() > THICK * spacing[2] else 2


def write_nifti_like(path: Path, masks: np.ndarray, scan_path: Path) -> None:
    """Write masks on the grid of a NIfTI scan; masks: slices x rows x columns, as read_nifti's."""
    scan = _load(scan_path)
    size, affine = (*scan.shape, 1, 1)[:3], _affine(scan)
    values = upright_turn(affine, _across(affine, size)).undo(masks)
    header = scan.header.copy()  # keeps qform and sform as they are
    header.set_data_dtype(masks.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    _save(type(scan)(values, None, header), path)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write an array of three axes with its 4x4 affine."""
    nibabel = require("nibabel", path, KIND)
    _save(nibabel.Nifti1Image(values, affine), path)


def _save(image: Any, path: Path) -> None:
    """Save a NIfTI image atomically; a partial file's name lacks the suffix that nibabel needs."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
