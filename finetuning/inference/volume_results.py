"""Volumes to segment: their slices as the images of a folder, and masks in the form of the volume.

volumes = list_slices(volumes_at(path), bands, slice_number, has_prompts)
with slices_on_disk(volumes, ranges, bands) as images: ...segment_folder(images, ...)
write_volumes(folder, volumes, results)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.basics.command_line import (
    ArgumentParser,
    brief,
    brief_path,
    number,
    parse_bands,
    tell,
)
from finetuning.basics.image_files import read_values
from finetuning.inference.folder_results import FolderImage, FolderResults, list_images, utf8_name
from finetuning.volumes.files import TIFF, VolumeFile, read_volume, write_masks
from finetuning.volumes.slices import ValueRange, common_range, slice_name, write_slice
from finetuning.volumes.volume import Bands


class SlicedVolume(NamedTuple):
    """A volume, its size (slices, rows, columns) and the names of its slices."""

    file: VolumeFile
    size: tuple[int, int, int]
    names: list[str]
    wanted: list[int]  # the indices of the slices to segment


def add_volume_options(parser: ArgumentParser) -> None:
    """Add the options of volumes: DICOM, NIfTI and TIFF stacks."""
    volumes = parser.add_argument_group("volumes (DICOM, NIfTI, TIFF stacks) and many channels")
    volumes.add_argument(
        "--slice",
        type=number(int, at_least=1),
        metavar="N",
        help="segment only this slice of the volume, counted from 1",
    )
    volumes.add_argument(
        "--bands",
        type=parse_bands,
        default=(),
        metavar='"4,3,2"',
        help="the channels to take as red, green and blue, or one as gray, as in training",
    )


def list_slices(
    volumes: Sequence[VolumeFile], bands: Bands, slice_number: int | None, has_prompts: bool
) -> list[SlicedVolume]:
    """Return the volumes with the names of their slices, which are counted from 1.

    Arguments:
      slice_number: the only slice to segment; None: all of them.
      has_prompts: whether points or boxes are given, which are for a single slice.

    Raises UserError if a volume cannot be read, or lacks the slice.
    """
    sliced = []
    for volume in volumes:
        size = read_volume(volume, bands).values.shape[:3]
        names = [utf8_name(slice_name(volume.name, k, size[0])) for k in range(size[0])]
        wanted = list(range(size[0])) if slice_number is None else [slice_number - 1]
        if wanted[-1] >= size[0]:
            raise UserError(f"{brief_path(volume.path)} has {size[0]} slices, no {slice_number}")
        sliced.append(SlicedVolume(volume, size, names, wanted))
    count = sum(len(volume.wanted) for volume in sliced)
    if has_prompts and count > 1:
        raise UserError(
            f"points and boxes are for one slice, and there are {count}; add --slice N, or use "
            "--prompts FILE.csv, or --auto"
        )
    if slice_number is not None and len(volumes) > 1:
        raise UserError("--slice is for a single volume; give one as --image")
    return sliced


def list_others(path: Path, volumes: Sequence[VolumeFile]) -> list[FolderImage]:
    """Return the images of a folder that are not of its volumes, like list_images."""
    if path.is_file():
        return []
    taken = {file for volume in volumes for file in volume.files}
    with contextlib.suppress(UserError) if volumes else contextlib.nullcontext():
        return [image for image in list_images(path) if image.path not in taken]
    return []


@contextlib.contextmanager
def slices_on_disk(
    volumes: Sequence[SlicedVolume],
    ranges: tuple[ValueRange | None, ValueRange | None],
    bands: Bands,
) -> Iterator[list[FolderImage]]:
    """Yield the slices to segment as images in a temporary folder, and say their value range.

    ranges: the user's and that of training; without both, it is that of all these volumes.
    """
    with tempfile.TemporaryDirectory(prefix="sam2-slices-") as folder:
        chosen = ranges[0] or ranges[1]
        if not chosen and (chosen := common_range([each.file for each in volumes], bands)):
            print(f"values:  {chosen[0]:g} is black and {chosen[1]:g} white (--value-range)")
        images = []
        for volume in tqdm(volumes, "Cutting slices", unit="volume", leave=False):
            values = read_volume(volume.file, bands)
            changed = max(path.stat().st_mtime_ns for path in volume.file.files)
            for index in volume.wanted:
                path = Path(folder) / str(len(images)) / f"{volume.names[index]}.png"
                write_slice(path, values, index, chosen)
                os.utime(path, ns=(changed, changed))  # as old as the volume
                images.append(FolderImage(path, volume.names[index], volume.names[index]))
        yield images


def write_volumes(folder: Path, volumes: Sequence[SlicedVolume], results: FolderResults) -> None:
    """Write the masks of all slices of each volume as one file, and tell its name.

    A mask has the values 0 and 1 (in a TIFF 255). In a label map, an object has the same value in
    each slice that names it; objects without names are counted in each slice.
    """
    for volume in volumes if "masks" in results.kinds else ():
        if volume.size[0] == 1 and volume.file.kind == TIFF:
            continue  # the PNG of its slice is the same
        masks, names, count = _assemble(folder, volume, results)
        if volume.file.kind == TIFF and masks.max() == 1:
            masks *= 255
        try:
            path = write_masks(folder, volume.file, masks)
        except UserError as error:  # a package is missing; the slices' own masks are there
            tell(f"warning: no mask of the whole {brief_path(volume.file.name)}: {error}")
            continue
        if path:
            tell(f"masks:   {path} ({count} of {volume.size[0]} slices)")
        else:
            tell(
                f"masks:   {volume.file.name} does not say where it lies: each slice has a PNG mask"
            )
        if any(not name.isdecimal() for name in names):
            values = ", ".join(f"{value} {brief(name)}" for value, name in enumerate(names, 1))
            tell(f"values:  {values}")


def _assemble(
    folder: Path, volume: SlicedVolume, results: FolderResults
) -> tuple[np.ndarray, list[str], int]:
    """Return a volume's masks, its objects' names, and the number of slices with results.

    The masks are slices x rows x columns. The names are in the order of their values, from 1:
    numbers first, then the others as they occur.
    """
    found = {}
    for index, name in enumerate(volume.names):
        rows = results.rows.get(name, [])
        file = folder / f"{name}_{'mask' if len(rows) == 1 else 'labels'}.png"
        if rows and not rows[0].get("error") and file.is_file():
            found[index] = [row["object"] for row in rows], file
    names = list(dict.fromkeys(name for objects, _ in found.values() for name in objects))
    names.sort(key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0))
    value_of = {name: value for value, name in enumerate(names, 1)}
    masks = np.zeros(volume.size, np.uint8 if len(names) < 256 else np.uint16)
    for index, (objects, file) in found.items():
        values = read_values(file)[0]
        values = (values > 0).astype(np.uint8) if len(objects) == 1 else values
        masks[index] = np.array([0, *(value_of[name] for name in objects)])[values]
    return masks, names, len(found)
