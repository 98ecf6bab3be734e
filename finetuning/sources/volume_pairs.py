"""Pairing volumes with their label volumes, and turning both into slices, which are then images."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.basics.command_line import ArgumentParser, listed, number, parse_bands
from finetuning.sources.folder_layouts import Folder, Level
from finetuning.sources.name_matching import match_names
from finetuning.volumes.files import VolumeFile, find_volumes, read_label, read_volume
from finetuning.volumes.slices import (
    ValueRange,
    common_range,
    empty_slices,
    kept_slices,
    slice_name,
    write_png,
    write_slice,
)
from finetuning.volumes.volume import Bands, Volume

EMPTY_SHARE = 0.1
CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net's images are called case_0000, its labels case


class VolumeOptions(NamedTuple):
    """How to read volumes.

    bands: the channels to take, counted from 1; none: those that make a picture.
    value_range: the values of black and white; None: from all volumes.
    empty_share: the share of the slices without an object that is kept.
    object_value: the value of the object in the labels; None: any but 0 and ignored_value.
    """

    bands: Bands = ()
    value_range: ValueRange | None = None
    empty_share: float = EMPTY_SHARE
    object_value: int | None = None
    ignored_value: int | None = None


NO_OPTIONS = VolumeOptions()


class SliceFolder(NamedTuple):
    """A folder for the slices of volumes, made when there are any, and how to read these."""

    path: Path
    options: VolumeOptions


class VolumePair(NamedTuple):
    """A volume, its label volume if it has one, and the names of its slices if they are given."""

    image: VolumeFile
    label: VolumeFile | None
    name: str
    slice_names: tuple[str, ...] = ()


class Slice(NamedTuple):
    """An image file of a slice, that of its labels, and its volume, if that has several slices."""

    image: Path
    mask: Path | None
    volume: str | None


class Sliced(NamedTuple):
    """Levels whose volumes are slices; group_of: the volume of each slice; notes."""

    levels: list[Level]
    group_of: dict[Path, str | None]
    value_range: ValueRange | None
    notes: list[str]


def add_volume_options(parser: ArgumentParser) -> None:
    """Add the options of volumes: DICOM, NIfTI and TIFF stacks."""
    volumes = parser.add_argument_group("volumes (DICOM, NIfTI, TIFF stacks) and many channels")
    volumes.add_argument(
        "--bands",
        type=parse_bands,
        default=(),
        metavar='"4,3,2"',
        help="the channels to take as red, green and blue, or one as gray, counted from 1",
    )
    volumes.add_argument(
        "--empty-share",
        type=number(float, at_least=0, below=1.0000001),
        default=EMPTY_SHARE,
        help="the share of the slices without an object that is kept",
    )


def slice_levels(levels: list[Level], slices: SliceFolder | None, skip_unlabelled: bool) -> Sliced:
    """Write the slices of all volumes of levels, and put them in the volumes' place.

    Without a folder for slices, nothing is done. Raises UserError if a volume has no labels, unless
    it is skipped, or labels have no volume.
    """
    if slices is None:
        return Sliced(levels, {}, None, [])
    pairs: list[list[VolumePair]] = []
    rest: list[Level] = []  # the ordinary files and folders
    notes: list[str] = []
    for level in levels:
        images = find_volumes(*_paths(level.images), slices.options.bands)
        labels = find_volumes(*_paths(level.masks)) if level.masks and images else []
        left = _without(level.images, images)
        masks = _without(level.masks, labels) if level.masks else None
        found, unlabelled = _pair_volumes(images, labels, bool(masks and masks.files), notes)
        if unlabelled and not skip_unlabelled:
            raise UserError(
                f"{len(unlabelled)} of {len(images)} volumes have no label volume: "
                f"{listed([each.name for each in unlabelled])} (labels found: "
                f"{listed([each.name for each in labels])}); leave them out with --skip-unlabelled"
            )
        if unlabelled:
            notes.append(f"left out {len(unlabelled)} of {len(images)} volumes without labels")
        pairs.append(found)
        rest.append(level._replace(images=left, masks=masks))
    if not any(pairs):
        return Sliced(levels, {}, None, [])

    written, value_range, slice_notes = write_slices(pairs, *slices)
    others = [path for level in rest for path in level.images.files]
    if value_range and others:
        raise UserError(
            f"{listed(others)}: {len(others)} ordinary images beside volumes, whose value range "
            "they do not share; put them into a folder of their own"
        )
    group_of = {each.image: each.volume for level in written for each in level}
    new_levels = []
    for level, level_slices in zip(rest, written, strict=True):
        images = level.images.files + [each.image for each in level_slices]
        labels = [each.mask for each in level_slices if each.mask]
        masks = level.masks or Folder(level.images.path, [], [], [])
        masks = masks._replace(files=masks.files + labels) if labels else level.masks
        new_levels.append(level._replace(images=level.images._replace(files=images), masks=masks))
    return Sliced(new_levels, group_of, value_range, notes + slice_notes)


def _paths(folder: Folder) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder, of any kind, and its folders; none of a zip archive."""
    if not isinstance(folder.path, Path):
        return [], []
    return folder.files + folder.others, [child.path for child in folder.folders]


def _without(folder: Folder, volumes: list[VolumeFile]) -> Folder:
    """Return a folder without the files of volumes, and the folders that hold such files."""
    taken = {path for volume in volumes for path in volume.files}
    around = {above for path in taken for above in path.parents}
    return Folder(
        folder.path,
        [path for path in folder.files if path not in taken],
        [path for path in folder.others if path not in taken],
        [child for child in folder.folders if child.path not in around],
    )


def _pair_volumes(
    images: list[VolumeFile], labels: list[VolumeFile], has_masks: bool, notes: list[str]
) -> tuple[list[VolumePair], list[VolumeFile]]:
    """Pair volumes by their names; return the pairs, and the volumes without labels.

    has_masks: whether there are ordinary masks, too, which may belong to the slices.
    """
    if not labels:  # their slices are ordinary images, named like the files of a series
        return [VolumePair(each, None, each.name, _stems(each, has_masks)) for each in images], []
    if len(images) == len(labels) == 1:  # whatever they are called
        return [VolumePair(images[0], labels[0], images[0].name)], []
    names, label_names = {each.name: each for each in images}, [each.name for each in labels]
    first: dict[str, VolumeFile] = {}  # case_0001 is another channel of case_0000
    for each in images:
        first.setdefault(CHANNEL.sub("", each.name), each)
    if set(label_names) <= first.keys() and not set(label_names) <= names.keys():
        if others := len(images) - len(first):
            notes.append(f"left out {others} volumes of further channels, such as NAME_0001")
        names = first
    owners, note = match_names(list(names), label_names)
    if not owners:
        raise UserError(
            f"the names do not show which volumes these labels belong to: "
            f"{listed(label_names)}; volumes are called {listed(list(names))}; call them alike"
        )
    notes += [note] if note else []
    pairs, of_image = [], {owners[each.name]: each for each in labels}
    if len(of_image) < len(labels):
        raise UserError("several label volumes belong to one volume; keep one each")
    for name, each in names.items():
        if name in of_image:
            pairs.append(VolumePair(each, of_image[name], name))
    unlabelled = [each for name, each in names.items() if name not in of_image]
    if has_masks:
        return [*pairs, *(VolumePair(each, None, each.name) for each in unlabelled)], []
    return pairs, unlabelled


def slice_rows(
    rows: Sequence[tuple[Path, tuple[Path, ...]]], slices: SliceFolder | None, notes: list[str]
) -> tuple[list[list[Slice]], ValueRange | None]:
    """Write the slices of the volumes in a table of an image and its masks; notes get lines.

    Returns the slices of each row, none if it is no volume, and the value range of the volumes.
    Raises UserError unless each volume has one label volume.
    """
    pairs: list[list[VolumePair]] = []
    for image, masks in rows:
        volumes = find_volumes([image], (), slices.options.bands) if slices else []
        labels = find_volumes(masks) if volumes else []
        if volumes and (len(labels) != 1 or len(masks) != 1):
            raise UserError(f"{image.name} needs one label volume, such as a .nii.gz file")
        pairs.append([VolumePair(volumes[0], labels[0], volumes[0].name)] if volumes else [])
    if not any(pairs):
        return pairs, None
    written, value_range, slice_notes = write_slices(pairs, *slices)
    notes += slice_notes
    return written, value_range


def _stems(volume: VolumeFile, has_masks: bool) -> tuple[str, ...]:
    is_series = len(volume.files) > 1 and has_masks
    return tuple(path.stem for path in volume.files) if is_series else ()


def write_slices(
    pairs: Sequence[Sequence[VolumePair]], folder: Path, options: VolumeOptions
) -> tuple[list[list[Slice]], ValueRange | None, list[str]]:
    """Write the slices of levels of volumes; return those of each level, their range, and notes."""
    every = [pair for level in pairs for pair in level]
    value_range = options.value_range or common_range([p.image for p in every], options.bands)
    times = Counter(pair.name for pair in every)
    slices: list[list[Slice]] = []
    filled = empty = kept = 0
    with tqdm(total=len(every), desc="Cutting slices", unit="volume", leave=False) as bar:
        for number_of_level, level in enumerate(pairs):
            slices.append([])
            for pair in level:
                # Masks in ordinary files are drawn on slices as they are stored
                volume = read_volume(pair.image, options.bands, upright=pair.label is not None)
                indices, labels = list(range(len(volume.values))), None
                if pair.label:
                    labels = read_label(pair.label, pair.image, volume)
                    is_empty = empty_slices(labels, options.object_value, options.ignored_value)
                    if len(is_empty) > 1:
                        filled, empty = filled + int((~is_empty).sum()), empty + int(is_empty.sum())
                        # Rounded up or down by the name, so that other volumes change nothing
                        wanted = options.empty_share * int(is_empty.sum())
                        most = int(wanted + zlib.crc32(pair.name.encode()) / 2**32)
                        indices = kept_slices(is_empty, volume, most)
                        kept += sum(is_empty[indices])
                place = folder / str(number_of_level)
                # Two volumes of one name are two groups
                group = pair.name if times[pair.name] == 1 else str(pair.image.path)
                group = group if len(volume.values) > 1 else None
                slices[-1] += [
                    Slice(*files, group)
                    for files in _write(place, pair, volume, labels, indices, value_range)
                ]
                bar.update()
    if empty and not filled:
        raise UserError(
            f"none of the {empty} slices has an object: all labels are 0, or not --mask-value"
        )
    low, high = value_range or (0, 0)
    notes = [f"volumes: {len(every)}; slices: {sum(map(len, slices))}"]
    if filled or empty:
        notes[0] += (
            f", {filled} with an object and {kept} of the {empty} without "
            f"(--empty-share {options.empty_share:g})"
        )
    if value_range:
        notes.append(f"value range of all volumes: {low:g} is black, {high:g} is white")
    return slices, value_range, notes


def _write(
    folder: Path,
    pair: VolumePair,
    volume: Volume,
    labels: np.ndarray | None,
    indices: list[int],
    value_range: ValueRange | None,
) -> list[tuple[Path, Path | None]]:
    """Write the slices of these indices, and their labels under the same names; return both."""
    found = []
    for index in indices:
        name = slice_name(pair.name, index, len(volume.values))
        if pair.slice_names:
            name = pair.slice_names[index]
        image, mask = folder / "images" / f"{name}.png", folder / "masks" / f"{name}.png"
        write_slice(image, volume, index, value_range)
        if labels is not None:
            write_png(mask, labels[index])
        found.append((image, mask if labels is not None else None))
    return found
