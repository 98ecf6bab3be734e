"""Finding out which masks belong to which image, in folders, archives and tables."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path, listed, nfc
from finetuning.basics.files import SPLIT_NAMES
from finetuning.basics.image_decoding import video_hint
from finetuning.sources.folder_layouts import (
    BY_TABLE,
    Folder,
    Level,
    by_stem,
    find_places,
    notes_on_unused,
    pair_levels,
    read_folder,
    stem_of,
)
from finetuning.sources.name_matching import divide_folder, match_names, no_match
from finetuning.sources.volume_pairs import SliceFolder, slice_levels
from finetuning.volumes.files import VOLUME_SUFFIXES

# Characters that Windows refuses, control characters, and those that set the writing direction
UNSAFE = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


class SourceExample(NamedTuple):
    """An image and its masks: files on disk, or members of a zip archive (zipfile.Path)."""

    name: str  # of the image: unique in its split, NFC, safe as a file stem
    image: Path
    masks: tuple[Path, ...]  # one or more; each of several is an object
    split: str | None = None  # "train", "val" or "test" if the files are split already
    annotated: Any = None  # an AnnotatedImage, whose objects are drawn, in place of masks
    group: str | None = None  # images of one group stay in one split, such as a folder's


class Found(NamedTuple):
    """Examples sorted by split and name, and notes for the user on how they were found."""

    examples: list[SourceExample]
    notes: list[str]
    value_range: tuple[float, float] | None = None  # of volumes: what is black and white


class UnnamedExample(NamedTuple):
    """An image and its masks before the image has a unique name."""

    image: Path
    masks: tuple[Path, ...]
    folder: str  # distinguishes images of the same name
    split: str | None
    annotated: Any = None  # as in SourceExample
    group: str | None = None  # as in SourceExample


def find_examples(
    images: Path, masks: Path, skip_unlabelled: bool = False, slices: SliceFolder | None = None
) -> Found:
    """Pair the images and masks of two folders, or of one folder given twice, by their names.

    Volumes are paired, too, and become slices. Without a folder for these, they are left alone.
    Raises UserError if a mask, or an image unless skip_unlabelled, is left over, or if the names
    allow more than one pairing.
    """
    image_folder, mask_folder = read_folder(images), read_folder(masks)
    on_disk = isinstance(images, Path) and isinstance(masks, Path)
    if not (images.samefile(masks) if on_disk else str(images) == str(masks)):
        levels = pair_levels(image_folder, mask_folder)
        return _pair_all(levels, [], skip_unlabelled, slices)
    if image_folder.files:
        return _pair_all([divide_folder(image_folder)], [], skip_unlabelled, slices)
    return _find_in(image_folder, skip_unlabelled, slices)


def find_in_folder(
    root: Path, skip_unlabelled: bool = False, slices: SliceFolder | None = None
) -> Found:
    """Pair the files of the one place in a folder or archive that has images and masks.

    Raises UserError if there is no such place or several, and like find_examples.
    """
    return _find_in(read_folder(root), skip_unlabelled, slices)


def _find_in(root: Folder, skip_unlabelled: bool, slices: SliceFolder | None) -> Found:
    places = list(find_places(root)) or list(_find_mixed(root))
    if len(places) == 1:
        notes = [f"found in {brief_path(places[0][0])}"]
        return _pair_all(places[0][1], notes, skip_unlabelled, slices)
    inside = listed([f"{folder.path.name}/" for folder in root.folders])
    what = "has no folders like images/ and masks/ side by side in it"
    what += f" (the folders inside are {inside})" if inside else ""
    if places:
        what = f"has images and masks in several places: {listed([path for path, _ in places])}"
    raise UserError(f"{brief_path(root.path)} {what}; choose two folders by --images and --masks")


def _find_mixed(folder: Folder) -> Iterator[tuple[Path, list[Level]]]:
    """Yield each folder that has images and masks side by side, perhaps in train/ and val/."""
    parts = [(child, SPLIT_NAMES.get(child.path.name.casefold())) for child in folder.folders]
    parts = [(folder, None)] if folder.files else [part for part in parts if part[1]]
    levels = []
    for part, split in parts:
        with contextlib.suppress(UserError):
            levels += [divide_folder(part)._replace(split=split)] if part.files else []
    if levels:
        yield folder.path, levels
    else:
        for child in folder.folders:
            yield from _find_mixed(child)


def _pair_all(
    levels: list[Level], notes: list[str], skip_unlabelled: bool, slices: SliceFolder | None
) -> Found:
    sliced = slice_levels(levels, slices, skip_unlabelled)
    notes += sliced.notes
    unnamed = [
        example._replace(group=sliced.group_of.get(example.image) or example.group)
        for level in sliced.levels
        for example in _pair(level, notes)
    ]
    found = to_examples(unnamed, notes + notes_on_unused(sliced.levels), skip_unlabelled)
    return found._replace(value_range=sliced.value_range)


def _pair(level: Level, notes: list[str]) -> list[UnnamedExample]:
    """Pair the files of a level; images without masks are returned, too."""
    files, masks = by_stem(level.images), level.masks
    if not files:
        inside = video_hint(level.images.others) or _inside(level.images)
        inside += "; the masks must be in folders of the same names" if level.images.folders else ""
        raise UserError(f"no images in {brief_path(level.images.path)}{inside}")
    if not masks:
        groups = {}
    # Masks by the name of their image: those of one image's folder are its own, whatever they are
    # called; otherwise there is one file for each name, or one folder, masks/NAME/*.png
    elif level.item is not None:
        groups = {stem: masks.files for stem in files if masks.files}
    elif masks.files or not masks.folders:
        groups = {stem: [path] for stem, path in by_stem(masks).items()}
    else:
        groups = {nfc(folder.path.name): folder.files for folder in masks.folders if folder.files}
    if masks and not groups and level.item is None:
        raise UserError(f"no masks in {brief_path(masks.path)}{_inside(masks)}")

    owners, note = match_names(list(files), list(groups))
    if groups and not owners:
        raise no_match(files, groups)
    notes += [note] if note else []
    masks_of: dict[str, list[Path]] = {stem: [] for stem in files}
    for mask, stem in owners.items():
        masks_of[stem] += groups[mask]
    folder = level.images.path.name if level.item is None else level.item
    return [
        UnnamedExample(
            image=files[stem],
            masks=tuple(sorted(found, key=_in_numeric_order)),
            folder=folder,
            split=level.split,
            group=level.group,
        )
        for stem, found in masks_of.items()
    ]


def to_examples(unnamed: list[UnnamedExample], notes: list[str], skip_unlabelled: bool) -> Found:
    """Name the examples and describe them in notes.

    Raises UserError for images without masks, unless they are skipped, and if nothing is left to
    train on.
    """
    bare = [example for example in unnamed if not (example.masks or example.annotated)]
    unnamed = [example for example in unnamed if example.masks or example.annotated]
    if bare and not (skip_unlabelled and unnamed):
        raise UserError(
            f"{len(bare)} of {len(bare) + len(unnamed)} images have no mask: "
            f"{listed([example.image for example in bare])} (masks found: "
            f"{listed([example.masks[0] for example in unnamed]) or 'none'}); "
            f"leave them out with --skip-unlabelled, or {BY_TABLE}"
        )
    if bare:
        notes.append(f"left out {len(bare)} image{'s' * (len(bare) > 1)} without a mask")
    counts = {len(example.masks) for example in unnamed}
    if max(counts) > 1:
        several = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else max(counts)
        notes.append(f"{several} masks per image: each is an object")

    splits = Counter(example.split for example in unnamed)
    if splits.keys() - {None, "train"}:
        kinds = [split for split in ("train", "val", "test") if split in splits]
        ready = ", ".join(f"{splits[split]} {split}" for split in kinds)
        alone = "" if "train" in splits else "; to measure with compare_models.py, not to train on"
        notes.append(f"ready split: {ready}{alone}")
    # Without val, train is split into both; a ready test stays as it is
    if "val" not in splits:
        is_divided = "test" in splits and "train" in splits
        notes += ["no val: it will be split off from train"] if is_divided else []
        unnamed = [
            example._replace(split=None) if example.split == "train" else example
            for example in unnamed
        ]
    return Found(name_examples(unnamed), list(dict.fromkeys(notes)))


def name_examples(unnamed: list[UnnamedExample]) -> list[SourceExample]:
    """Name examples by their images; add folder and number to equal names in a split."""
    stems = [(example.split or "", safe_name(stem_of(example.image))) for example in unnamed]
    times, examples = Counter(stems), {}
    numbers: dict[tuple[str, str], int] = {}  # the last one of each split and base
    order = sorted(zip(stems, unnamed, strict=True), key=lambda pair: (pair[0], str(pair[1].image)))
    for (split, stem), example in order:
        # The folder distinguishes equal names; a number, equal names in equal folders
        name = base = stem if times[split, stem] == 1 else f"{safe_name(example.folder)}_{stem}"
        number = numbers.get((split, base), 1)
        while (split, name) in examples or (name != stem and (split, name) in times):
            number += 1
            name = f"{base}_{number}"
        numbers[split, base] = number
        examples[split, name] = SourceExample(name, *example[:2], *example[3:])
    return [examples[key] for key in sorted(examples)]


def safe_name(name: str) -> str:
    """Return a name without characters that some system refuses in file names."""
    return UNSAFE.sub("_", nfc(name)).rstrip(". ") or "_"


def _in_numeric_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", stem_of(path))
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def _inside(folder: Folder) -> str:
    if any(path.name.lower().endswith(VOLUME_SUFFIXES) for path in folder.others):
        return "; unpack the archive and give its folder: volumes are read from there"
    names = listed([f"{child.path.name}/" for child in folder.folders])
    return f"; there are folders inside: {names}" if names else "; expected files like name.png"
