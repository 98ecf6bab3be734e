"""A volume: a stack of slices, perhaps with the place of its voxels in the body."""

from __future__ import annotations

import importlib
import itertools
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path

# What these packages say about odd files is no help to a user
warnings.filterwarnings("ignore", module="pydicom")
for _name in ("pydicom", "nibabel.global", "tifffile"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

Bands = tuple[int, ...]  # one or three channels, counted from 1; none: all, if they make a picture


class Volume(NamedTuple):
    """A stack of slices, upright as they are shown.

    values: slices x rows x columns (x 3 for RGB), of any dtype.
    affine: 4x4 float64, from (column, row, slice) indices to mm to the patient's right, front and
      head (RAS+, as in NIfTI); None if the file does not say.
    """

    path: Path
    values: np.ndarray
    affine: np.ndarray | None = None


class Turn(NamedTuple):
    """How the axes of an array as it is stored become columns, rows and slices, upright.

    axes: the stored axis of columns, rows and slices. flips: whether each is reversed.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return slices x rows x columns (x 3) of an array as it is stored."""
        values = values.transpose(*self.axes, *range(3, values.ndim))
        return np.moveaxis(np.flip(values, np.flatnonzero(self.flips)), (0, 1, 2), (2, 1, 0))

    def undo(self, values: np.ndarray) -> np.ndarray:
        """Return slices x rows x columns as they are stored."""
        values = np.flip(values.transpose(2, 1, 0), np.flatnonzero(self.flips))
        return values.transpose(np.argsort(self.axes))

    def affine(self, stored: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """Return a Volume's affine, of a 4x4 affine and the size of the array as it is stored."""
        matrix = np.eye(4)
        matrix[:3, :3] = 0
        for place, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            matrix[axis, place], matrix[axis, 3] = (-1, size[axis] - 1) if flip else (1, 0)
        return stored @ matrix


def upright_turn(affine: np.ndarray, across: int) -> Turn:
    """Return the turn that shows slices as radiologists see them.

    The patient's right is on the left; the front, or the head, is at the top. The slices keep
    their order. affine: 4x4, of the stored array, to RAS+; across: its axis across the slices.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # The axis of the body that each stored axis runs along: the assignment that fits best
    body = max(
        itertools.permutations(range(3)),
        key=lambda axes: np.abs(directions[list(axes), [0, 1, 2]]).sum(),
    )
    column, row = sorted((k for k in range(3) if k != across), key=lambda k: body[k])
    flips = [bool(directions[body[k], k] > 0) for k in (column, row)]
    return Turn((column, row, across), (*flips, False))


def require(package: str, path: Path, kind: str) -> ModuleType:
    """Import an optional package; raise UserError, which says what to install, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UserError(f"{brief_path(path)} is {kind}; pip install {name}") from error


def choose_bands(path: Path, values: np.ndarray, bands: Bands) -> np.ndarray:
    """Return one channel (... x H x W) or three (... x H x W x 3) of an ... x H x W x C array.

    Without bands, 1 or 3 channels are taken as they are. Raises UserError for other numbers, and
    for bands that the file does not have.
    """
    count = values.shape[-1]
    if not bands and count not in (1, 3):
        raise UserError(
            f"{brief_path(path)} has {count} channels; choose one or three (red, green, blue) of "
            'them: --bands 1, or --bands "3,2,1"'
        )
    bands = bands or tuple(range(1, count + 1))
    if max(bands) > count:
        raise UserError(f"{brief_path(path)} has {count} channels, so --bands has no {max(bands)}")
    chosen = values[..., [band - 1 for band in bands]]
    return chosen[..., 0] if len(bands) == 1 else chosen


def align(label: Volume, image: Volume) -> np.ndarray:
    """Return a label volume's values on the grid of its image: slices x rows x columns.

    Axes that the files store in another order or direction are exchanged or flipped. Raises
    UserError if the grids differ otherwise, because only the user can resample them.
    """
    size, label_size = image.values.shape[:3], label.values.shape[:3]
    if image.affine is None or label.affine is None:
        if size != label_size:
            raise UserError(_differ(label, image, "differs in size"))
        return label.values
    # From an index (column, row, slice) of the image to one of the label
    matrix = np.linalg.inv(label.affine) @ image.affine
    turn = np.rint(matrix[:3, :3]).astype(int)
    is_turn = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    axes = np.abs(turn).argmax(0)  # the label's axis for each axis of the image
    if not is_turn or tuple(np.array(label_size[::-1])[axes]) != size[::-1]:
        raise UserError(_differ(label, image, "differs in size or axes"))
    # The first and last voxel must lie in the same places, within half a voxel
    last = np.array(size[::-1]) - 1
    start = np.array([0 if turn[axis, k] > 0 else last[k] for k, axis in enumerate(axes)])
    for index in (np.zeros(3), last):
        expected = np.zeros(3)
        for k, axis in enumerate(axes):
            expected[axis] = abs(start[k] - index[k])
        if np.abs(matrix[:3, :3] @ index + matrix[:3, 3] - expected).max() > 0.5:
            raise UserError(_differ(label, image, "lies elsewhere in the body: its place differs"))
    values = np.moveaxis(label.values, (2, 1, 0), (0, 1, 2))  # to columns, rows, slices
    values = values.transpose(*axes, *range(3, values.ndim))
    values = np.flip(values, [k for k in range(3) if start[k]])
    return np.moveaxis(values, (0, 1, 2), (2, 1, 0))


def _differ(label: Volume, image: Volume, how: str) -> str:
    sizes = ["x".join(map(str, volume.values.shape[2::-1])) for volume in (label, image)]
    return (
        f"{brief_path(label.path)} ({sizes[0]} voxels) {how} from {brief_path(image.path)} "
        f"({sizes[1]}); resample it to the grid of the image"
    )
