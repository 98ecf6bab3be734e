"""DICOM files: single images, several frames in a file, and series of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path
from finetuning.volumes.nifti import write_nifti
from finetuning.volumes.volume import Volume, require, upright_turn

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
KIND = "a DICOM file"
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes go to the patient's left, back and head
UNEVEN = 0.1  # how far a slice may be from its even place, as a fraction of the step
# SOP classes that hold segmentations, not images
SEGMENTATIONS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a DICOM segmentation (SEG)",
    "1.2.840.10008.5.1.4.1.1.481.3": "a DICOM structure set (RTSTRUCT)",
}


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its suffix, or without one, by its content."""
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES:
        return True
    if suffix and not suffix[1:].isdecimal():  # names may end like 1.2.840.17
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> Any:
    """Read a DICOM file without its pixels. Raises UserError for segmentations and damage."""
    pydicom = require("pydicom", path, KIND)
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        kind = SEGMENTATIONS.get(str(header.get("SOPClassUID", "")))
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{brief_path(path)} is no readable DICOM file; copy it again") from error
    if kind:
        raise UserError(
            f"{brief_path(path)} is {kind}; convert it to NIfTI, for example with 3D Slicer, and "
            "give that as the mask"
        )
    return header


def split_series(files: Sequence[Path]) -> list[list[Path]]:
    """Sort DICOM files into series of equal size and direction; files without pixels are left out.

    The slices of a series are in the order of their positions, or of their numbers.
    """
    series: dict[tuple, list[tuple[tuple, Path]]] = {}
    for path in files:
        header = read_header(path)
        if "Rows" not in header or "Columns" not in header:
            continue  # a report, or a DICOMDIR
        try:
            key, order = _key_and_order(path, header)
        except Exception as error:  # odd values raise many kinds
            raise UserError(
                f"{brief_path(path)} has a damaged DICOM header; copy it again, or leave it out"
            ) from error
        series.setdefault(key, []).append((order, path))
    found = []
    for key, members in series.items():
        paths = [path for _, path in sorted(members)]
        found += [[path] for path in paths] if key[-1] else [paths]  # files of frames are volumes
    return found


def _key_and_order(path: Path, header: Any) -> tuple[tuple, tuple]:
    """Return what the files of a series have in common, and a file's place in their order."""
    key = header.get("PatientID"), header.get("SeriesInstanceUID") or path.name
    key = tuple(map(str, key)), int(header.Rows), int(header.Columns)
    axes = [float(value) for value in header.get("ImageOrientationPatient") or ()]
    key = (*key, tuple(np.round(axes, 1) + 0.0), int(header.get("NumberOfFrames") or 1) > 1)
    place = header.get("ImagePositionPatient")
    height = _normal(axes) @ np.array(place, float) if place and axes else 0.0
    number = header.get("InstanceNumber")
    return key, (round(float(height), 3), int(number) if number is not None else 0, path.name)


def _normal(axes: Sequence[float]) -> np.ndarray:
    return np.cross(axes[:3], axes[3:])


def read_dicom(files: Sequence[Path], upright: bool = True) -> Volume:
    """Read a DICOM file of one or more frames, or the sorted files of a series.

    upright: turn slices whose place in the body is known; else they are as they are stored.
    """
    frames, places = [], []
    for path in files:
        values, file_places = _read_file(path)
        frames.append(values)
        places += file_places
    if len({values.shape[1:] for values in frames}) > 1:
        raise UserError(f"{brief_path(files[0].parent)} mixes images of other sizes; divide them")
    values = np.concatenate(frames) if len(frames) > 1 else frames[0]
    places = places if all(place is not None for place in places) else []
    if len(files) == 1 and len(places) > 1:  # the frames of an enhanced file are in any order
        heights = [place[:3, 2] @ place[:3, 3] for place in places]
        order = np.argsort(heights, kind="stable")
        values, places = values[order], [places[index] for index in order]
    affine = _affine(places)
    if affine is None or not upright:
        return Volume(files[0], values, affine)
    turn, stored = upright_turn(affine, 2), np.moveaxis(values, (0, 1, 2), (2, 1, 0))
    return Volume(files[0], turn.apply(stored), turn.affine(affine, stored.shape))


def write_masks_of_series(path: Path, masks: np.ndarray, files: Sequence[Path]) -> bool:
    """Write masks, slices x rows x columns, as NIfTI on the grid of the sorted files of a series.

    Returns False, and writes nothing, if the files do not say where their slices are.
    """
    affine = read_dicom(files, upright=False).affine
    if affine is not None:
        write_nifti(path, upright_turn(affine, 2).undo(masks), affine)
    return affine is not None


def _affine(places: list[np.ndarray]) -> np.ndarray | None:
    """Return the affine of a Volume from its slices' own; None if they are not evenly placed or
    not usable.

    In the 4x4 matrix of a slice, the third column is its normal, times its thickness.
    """
    if not places:
        return None
    affine = places[0].copy()
    if len(places) > 1:
        starts = np.array([place[:3, 3] for place in places])
        step = (starts[-1] - starts[0]) / (len(starts) - 1)
        even = starts[0] + np.arange(len(starts))[:, None] * step
        length = np.linalg.norm(step)
        if length < 1e-6 or np.linalg.norm(starts - even, axis=1).max() > UNEVEN * length:
            return None
        affine[:3, 2] = step
    # A spacing of 0 or an unreadable one says nothing
    is_usable = np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-9
    return TO_RAS @ affine if is_usable else None


def _read_file(path: Path) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Return a file's frames, frames x rows x columns (x 3), and the 4x4 place of each, or None."""
    read_header(path)  # refuses what is no image
    pydicom = require("pydicom", path, KIND)
    pixels = require("pydicom.pixels", path, KIND)
    try:
        data = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in getattr(data, "file_meta", {}):
            data.file_meta = getattr(data, "file_meta", pydicom.dataset.FileMetaDataset())
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        values = pixels.pixel_array(data)
        if data.PhotometricInterpretation == "PALETTE COLOR":
            values = pixels.apply_color_lut(values, data)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(_unreadable(path, error)) from error
    count = int(data.get("NumberOfFrames") or 1)
    values = values.reshape(count, *values.shape[values.ndim - 2 - (_samples(data) > 1) :])
    if _samples(data) > 1:
        return values[..., :3], [_place(data, frame) for frame in range(count)]
    if data.PhotometricInterpretation == "MONOCHROME1":  # white is low
        highest = (1 << int(data.BitsStored)) - 1
        is_signed = int(data.PixelRepresentation)
        values = (-1 if is_signed else highest) - values.astype(np.int32)
    frames = [_rescale(data, frame, values[frame]) for frame in range(count)]
    kind = np.result_type(*frames)
    return np.stack([frame.astype(kind, copy=False) for frame in frames]), [
        _place(data, frame) for frame in range(count)
    ]


def _samples(data: Any) -> int:
    is_palette = data.PhotometricInterpretation == "PALETTE COLOR"
    return 3 if is_palette else int(data.get("SamplesPerPixel") or 1)


def _unreadable(path: Path, error: Exception) -> str:
    if "missing dependencies" in str(error) or "plugin" in str(error):
        return (
            f"{brief_path(path)} is compressed; pip install pylibjpeg pylibjpeg-libjpeg "
            "pylibjpeg-openjpeg"
        )
    return f"{brief_path(path)} is a DICOM file without a readable image; leave it out"


def _rescale(data: Any, frame: int, values: np.ndarray) -> np.ndarray:
    """Return an HxW frame in the file's units, such as HU: in int16 or int32 where it fits."""
    sequence = "PixelValueTransformationSequence"
    slope = _of_frame(data, frame, sequence, "RescaleSlope")
    slope = 1.0 if slope is None else float(slope)
    intercept = float(_of_frame(data, frame, sequence, "RescaleIntercept") or 0)
    if (slope, intercept) == (1.0, 0.0) and values.dtype.kind != "i":
        return values
    if slope.is_integer() and intercept.is_integer() and values.dtype.kind in "iu":
        scaled = values.astype(np.int64) * int(slope) + int(intercept)
        fits = np.iinfo(np.int16).min <= scaled.min() and scaled.max() <= np.iinfo(np.int16).max
        return scaled.astype(np.int16 if fits else np.int32)
    return (values * slope + intercept).astype(np.float32)


def _place(data: Any, frame: int) -> np.ndarray | None:
    """Return the 4x4 matrix from (column, row, frame) indices to mm, in DICOM's axes, or None."""
    axes = _of_frame(data, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    start = _of_frame(data, frame, "PlanePositionSequence", "ImagePositionPatient")
    spacing = _of_frame(data, frame, "PixelMeasuresSequence", "PixelSpacing")
    thickness = _of_frame(data, frame, "PixelMeasuresSequence", "SliceThickness")
    if not (axes and start and spacing):
        return None
    axes, place = np.array(axes, float), np.eye(4)
    place[:3, 0] = axes[:3] * float(spacing[1])
    place[:3, 1] = axes[3:] * float(spacing[0])
    place[:3, 2] = _normal(axes) * float(thickness or 1)
    place[:3, 3] = np.array(start, float)
    return place


def _of_frame(data: Any, frame: int, sequence: str, name: str) -> Any:
    """Return a value of a frame: its own, the one shared by all frames, or the file's."""
    for groups, index in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        items = data.get(groups) or []
        inside = items[index].get(sequence) if index < len(items) else None
        if inside and inside[0].get(name) is not None:
            return inside[0].get(name)
    return data.get(name)
