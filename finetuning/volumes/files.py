"""Volumes in files of all kinds: find them in folders, read them, write masks in the same form."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path, nfc
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.volumes.dicom import (
    DICOM_SUFFIXES,
    is_dicom,
    read_dicom,
    split_series,
    write_masks_of_series,
)
from finetuning.volumes.nifti import NIFTI_SUFFIXES, read_nifti, write_nifti_like
from finetuning.volumes.tiff_stacks import TIFF_SUFFIXES, is_stack, read_stack, write_stack
from finetuning.volumes.volume import Bands, Volume, align

NIFTI, DICOM, TIFF = "NIfTI", "DICOM", "TIFF"
OME_SUFFIXES = (".ome.tif", ".ome.tiff")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *DICOM_SUFFIXES)  # that no ordinary image has


class VolumeFile(NamedTuple):
    """A volume on disk: one file, or the sorted files of a DICOM series."""

    name: str
    kind: str  # NIFTI, DICOM or TIFF
    files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.files[0]


def kind_of(path: Path, bands: Bands = ()) -> str | None:
    """Return the kind of volume that a file holds, or None if it is an ordinary image, or none.

    With bands, each TIFF counts as a volume: OpenCV would read only some of its channels.
    """
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return NIFTI
    if name.endswith(TIFF_SUFFIXES):
        return TIFF if bands or is_stack(path) else None
    return DICOM if is_dicom(path) else None


def name_of(path: Path) -> str:
    """Return a file's name without its suffix, which may be .nii.gz or .ome.tif."""
    name = nfc(path.name)
    suffixes = (*NIFTI_SUFFIXES, *OME_SUFFIXES, *TIFF_SUFFIXES, *DICOM_SUFFIXES)
    suffix = next((each for each in suffixes if name.lower().endswith(each)), "")
    return name.removesuffix(name[len(name) - len(suffix) :])


def find_volumes(
    files: Iterable[Path], folders: Iterable[Path] = (), bands: Bands = ()
) -> list[VolumeFile]:
    """Return the volumes among files of one folder, and in folders at any depth, sorted by name.

    A series of DICOM files is one volume, named like its folder, if that holds no other; a file
    is named like itself, and by its folder if that name is not the only one. Raises UserError for
    two volumes of one name.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        by_folder[path.parent].append(path)
    inside: dict[Path, Path] = {}  # the folder given, of each folder in it
    for top in folders:
        for path in sorted(top.rglob("*")):
            parts = path.relative_to(top).parts
            if path.is_file() and not any(part.startswith(".") for part in parts):
                by_folder[path.parent].append(path)
                inside[path.parent] = top
    found: list[tuple[VolumeFile, Path | None]] = []
    for folder, paths in by_folder.items():
        found += [(each, inside.get(folder)) for each in _in_folder(folder, paths, bands)]
    # In a folder of its own, a volume is named by it: case1/image.nii.gz is case1
    per_top = Counter(top for _, top in found if top)
    volumes = [
        each._replace(name=nfc(top.name)) if top and per_top[top] == 1 else each
        for each, top in found
    ]
    names = Counter(each.name for each in volumes)
    volumes = [
        each._replace(name=f"{nfc(each.path.parent.name)}_{each.name}")
        if names[each.name] > 1
        else each
        for each in volumes
    ]
    places: dict[str, VolumeFile] = {}
    for each in volumes:
        if (other := places.setdefault(each.name, each)) is not each:
            raise UserError(
                f"{brief_path(other.path)} and {brief_path(each.path)} would have slices of the "
                "same names; rename one of them"
            )
    return sorted(volumes)


def _in_folder(folder: Path, paths: Sequence[Path], bands: Bands) -> Iterator[VolumeFile]:
    dicom_files = []
    for path in paths:
        kind = kind_of(path, bands)
        if kind == DICOM:
            dicom_files.append(path)
        elif kind:
            yield VolumeFile(name_of(path), kind, (path,))
    series = split_series(dicom_files)
    is_alone = sum(len(members) > 1 for members in series) == 1
    for members in series:
        name = folder.name if len(members) > 1 and is_alone else name_of(members[0])
        yield VolumeFile(nfc(name), DICOM, tuple(members))


def volumes_at(path: Path, bands: Bands = ()) -> list[VolumeFile]:
    """Return the volumes of a path: a file, or a folder, or the folder of a series."""
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        files = [each for each in inside if each.is_file()]
        # In a folder of images, other folders are left alone
        are_images = any(each.suffix.lower() in IMAGE_SUFFIXES for each in files)
        folders = [] if are_images else [each for each in inside if each.is_dir()]
        return find_volumes(files, folders, bands)
    return find_volumes([path], (), bands) if path.is_file() else []


def read_volume(volume: VolumeFile, bands: Bands = (), upright: bool = True) -> Volume:
    """Read a volume. Raises UserError.

    Arguments:
      bands: the channels to take, counted from 1.
      upright: turn the slices of DICOM upright; else they are as other programs export them.
    """
    if volume.kind == NIFTI:
        return read_nifti(volume.path, bands)
    return (
        read_stack(volume.path, bands) if volume.kind == TIFF else read_dicom(volume.files, upright)
    )


def read_label(label: VolumeFile, image: VolumeFile, scan: Volume) -> np.ndarray:
    """Return the values of a label volume, uint8 or uint16, on the grid of its image.

    Returns slices x rows x columns (x 3 for colours). Raises UserError if the grids differ, or if
    the values are no whole numbers from 0 to 65535.
    """
    if label.kind == TIFF and image.kind == NIFTI:
        raise UserError(
            f"{brief_path(label.path)} does not say how it lies in {brief_path(image.path)}; save "
            "it as NIfTI"
        )
    like = image.path if label.kind == image.kind == NIFTI else None
    volume = read_nifti(label.path, like=like) if label.kind == NIFTI else read_volume(label)
    values = align(volume, scan)
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    least, most = values.min(), values.max()
    is_whole = values.dtype.kind in "iu" or np.array_equal(values, np.rint(values))
    if not (is_whole and least >= 0 and most <= 65535):
        raise UserError(
            f"{brief_path(label.path)} has values from {least:g} to {most:g}, but labels are whole "
            "numbers from 0 to 65535: is it an image?"
        )
    return values.astype(np.uint8 if most < 256 else np.uint16)


def write_masks(folder: Path, volume: VolumeFile, masks: np.ndarray) -> Path | None:
    """Write the masks of a volume, slices x rows x columns, as it is itself; return the file.

    A mask of NIfTI or of DICOM becomes NIfTI on the grid of the scan; that of a TIFF, a TIFF stack.
    Without a place in the body, DICOM has no such file: None.
    """
    path = folder / f"{volume.name}_masks.nii.gz"
    if volume.kind == NIFTI:
        write_nifti_like(path, masks, volume.path)
    elif volume.kind == TIFF:
        path = folder / f"{volume.name}_masks.tif"
        write_stack(path, masks)
    elif not write_masks_of_series(path, masks, volume.files):
        return None
    return path
