"""Which masks belong to which image, in folders, archives and tables as people have them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import listed, nfc, shown
from finetuning.basics.csv_files import read_table
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.sources.folder_layouts import (
    BY_TABLE,
    SPLITS,
    Folder,
    Level,
    annotation_hint,
    by_stem,
    find_places,
    left_out,
    pair_levels,
    read_folder,
    stem_of,
    suffix_of,
)
from finetuning.sources.name_matching import affixes_in, core_of, marked_masks, match_names

JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
# What Windows refuses, control characters, and those that turn the direction of writing
UNSAFE = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


class Example(NamedTuple):
    """An image and its masks: files on disk, or members of a zip archive (zipfile.Path)."""

    name: str  # the image's, unique in its split, NFC, safe as a file stem
    image: Path
    masks: tuple[Path, ...]  # one or more; several are the image's objects
    split: str | None = None  # "train", "val" or "test" where the files are split already
    annotated: Any = None  # an AnnotatedImage, whose objects are drawn; there are no masks then


class Found(NamedTuple):
    """Examples by split and name, and what the user should know of how they were found."""

    examples: list[Example]
    notes: list[str]


class Row(NamedTuple):
    """An image on its way to an Example."""

    image: Path
    masks: tuple[Path, ...]
    folder: str  # what tells it from images of the same name
    split: str | None
    annotated: Any = None  # as in Example


def find_examples(images: Path, masks: Path, skip_unlabelled: bool = False) -> Found:
    """Pair the images and masks of two folders, or of one folder given twice, by their names.

    Raises UserError where a mask or, unless they are skipped, an image is left over, and where the
    names allow more than one pairing.
    """
    image_folder, mask_folder = read_folder(images), read_folder(masks)
    on_disk = isinstance(images, Path) and isinstance(masks, Path)
    if not (images.samefile(masks) if on_disk else str(images) == str(masks)):
        return _pair_all(pair_levels(image_folder, mask_folder), [], skip_unlabelled)
    if image_folder.files:
        return _pair_all([_divide(image_folder)], [], skip_unlabelled)
    return _find_in(image_folder, skip_unlabelled)


def find_in_folder(root: Path, skip_unlabelled: bool = False) -> Found:
    """Pair the files of the one place below a folder, or in an archive, that has images and masks.

    Raises UserError for no place or several, and as find_examples does.
    """
    return _find_in(read_folder(root), skip_unlabelled)


def _find_in(root: Folder, skip_unlabelled: bool) -> Found:
    places = list(find_places(root))
    if len(places) == 1:
        return _pair_all(places[0][1], [f"found in {shown(places[0][0])}"], skip_unlabelled)
    inside = listed([f"{folder.path.name}/" for folder in root.folders])
    what = "has no folders like images/ and masks/ side by side in it"
    what += f" (the folders inside are {inside})" if inside else ""
    if places:
        what = f"has images and masks in several places: {listed([path for path, _ in places])}"
    raise UserError(f"{shown(root.path)} {what}; choose two folders by --images and --masks")


def read_pairs_file(file: Path, images: Path | None, masks: Path | None) -> Found:
    """Read pairs from a CSV file with the columns image and mask, and perhaps split.

    Files are looked for in `images` or `masks`, then in the table's own folder; rows with the same
    image are its objects. Raises UserError with the row where a file or a value is missing.
    """
    rows: dict[str, Row] = {}
    notes: list[str] = []
    for number, cells in enumerate(read_table(file, ("image", "mask")), 2):
        if not any(cells.values()):
            continue
        where = f"{shown(file)}, row {number}"
        image = _find_file(cells.get("image", ""), [images, file.parent], f"{where}: image")
        mask = _find_file(cells.get("mask", ""), [masks, file.parent], f"{where}: mask")
        value = cells.get("split", "").casefold()
        if value and value not in SPLITS:
            raise UserError(f"{where}: split is {shown(value)}, not train, val or test")
        row = rows.setdefault(str(image), Row(image, (), image.parent.name, SPLITS.get(value)))
        if row.split != SPLITS.get(value):
            raise UserError(f"{where}: {shown(image.name)} is in another split further up")
        if mask in row.masks:
            notes.append(f"row {number} repeats an earlier one: left out")
        else:
            rows[str(image)] = row._replace(masks=(*row.masks, mask))
    if not rows:
        raise UserError(f"{shown(file)} has no rows below its header")
    if len({row.split is None for row in rows.values()}) > 1:
        raise UserError(f"{shown(file)}: some rows have a split and some have none; fill in all")
    return finish(list(rows.values()), notes, skip_unlabelled=False)


def _find_file(name: str, folders: list[Path | None], what: str) -> Path:
    """Return the first of these folders' file of that name, however it spells 한글."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"{what} is {shown(name) or 'empty'}; expected a file like name.png")
    for folder in filter(None, folders):
        for form in ("NFC", "NFD"):
            for spelled in (name, name.replace("\\", "/")):
                path = folder / unicodedata.normalize(form, spelled)
                if len(path.name) < 256 and path.is_file():
                    return path
    places = " or ".join(dict.fromkeys(shown(folder) for folder in folders if folder))
    raise UserError(f"{what} {shown(name)} is not in {places}; check its path")


def _divide(folder: Folder) -> Level:
    """Tell the masks in a folder from the images beside them: by name, or by JPEG and PNG."""
    files = {path: suffix_of(path) for path in folder.files}
    files = {path: ".jpg" if kind in JPEG_SUFFIXES else kind for path, kind in files.items()}
    stems = [stem_of(path) for path in files]
    marked = marked_masks(stems) if len(set(stems)) == len(stems) else set()
    if marked:
        masks = {path: None for path, stem in zip(files, stems, strict=True) if stem in marked}
    elif len(set(files.values())) == 2 and ".jpg" in files.values():
        masks = {path: None for path, kind in files.items() if kind != ".jpg"}
    else:
        by_stem(folder)  # raises where there is a better reason
        raise UserError(
            f"{shown(folder.path)} was given for both images and masks, but names like "
            f"{listed(folder.files)} do not tell which are the masks; move those into a folder of "
            f"their own, or {BY_TABLE}{annotation_hint(folder)}"
        )
    images = [path for path in files if path not in masks]
    return Level(folder._replace(files=images), Folder(folder.path, list(masks), [], []))


def _pair_all(levels: list[Level], notes: list[str], skip_unlabelled: bool) -> Found:
    rows = [row for level in levels for row in _pair(level, notes)]
    return finish(rows, notes + left_out(levels), skip_unlabelled)


def _pair(level: Level, notes: list[str]) -> list[Row]:
    """Pair the files of two folders; an image without masks is a Row without masks."""
    files, masks = by_stem(level.images), level.masks
    if not files:
        raise UserError(f"no images in {shown(level.images.path)}{_inside(level.images)}")
    if not masks:
        groups = {}
    elif level.item is not None:
        groups = {stem: masks.files for stem in files if masks.files}
    elif masks.files or not masks.folders:
        groups = {stem: [path] for stem, path in by_stem(masks).items()}
    else:  # masks/NAME/*.png
        groups = {nfc(folder.path.name): folder.files for folder in masks.folders if folder.files}
    if masks and not groups and level.item is None:
        raise UserError(f"no masks in {shown(masks.path)}{_inside(masks)}")

    owners, note = match_names(list(files), list(groups))
    if groups and not owners:
        _refuse(files, groups)
    notes += [note] if note else []
    masks_of: dict[str, list[Path]] = {stem: [] for stem in files}
    for mask, stem in owners.items():
        masks_of[stem] += groups[mask]
    folder = level.images.path.name if level.item is None else level.item
    return [
        Row(files[stem], tuple(sorted(found, key=_in_numeric_order)), folder, level.split)
        for stem, found in masks_of.items()
    ]


def _refuse(files: dict[str, Path], groups: dict[str, list[Path]]) -> None:
    """Raise UserError that names masks without an image, and images that they may be meant for."""
    sample = list(groups)[:: len(groups) // 8 + 1]
    affixes = Counter(affix for mask in sample for affix in sorted(affixes_in(mask, files)))
    affix = affixes.most_common(1)[0][0] if affixes else ("", "")
    owners = {mask: core for mask in groups if (core := core_of(mask, affix, files)) is not None}
    if not len(groups) / 2 < len(owners) < len(groups):  # by luck
        owners = {}
    alone = [paths[0] for mask, paths in groups.items() if mask not in owners]
    free = files.keys() - set(owners.values()) or files.keys()
    raise UserError(
        f"the names do not tell to which images these masks belong: {listed(alone)}; images are "
        f"called {listed(sorted(files[stem].name for stem in free))}; {BY_TABLE}"
    )


def finish(rows: list[Row], notes: list[str], skip_unlabelled: bool) -> Found:
    """Turn rows into examples with unique names; leave out images without masks, or raise."""
    bare = [row for row in rows if not (row.masks or row.annotated)]
    rows = [row for row in rows if row.masks or row.annotated]
    if bare and not (skip_unlabelled and rows):
        raise UserError(
            f"{len(bare)} of {len(bare) + len(rows)} images have no mask: "
            f"{listed([row.image for row in bare])} (masks are there like "
            f"{listed([row.masks[0] for row in rows]) or 'none'}); --skip-unlabelled leaves them "
            f"out, or {BY_TABLE}"
        )
    if bare:
        notes.append(f"{len(bare)} image{'s' * (len(bare) > 1)} without a mask left out")
    counts = {len(row.masks) for row in rows}
    if max(counts) > 1:
        several = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else max(counts)
        notes.append(f"{several} masks an image: each is an object of its own")

    splits = Counter(row.split for row in rows)
    if splits.keys() - {None, "train"}:
        kinds = [split for split in ("train", "val", "test") if split in splits]
        ready = ", ".join(f"{splits[split]} {split}" for split in kinds)
        notes.append(f"ready split: {ready}")
        if "train" not in splits:
            raise UserError(f"there are no images to train on ({ready}); add train")
    if "val" not in splits:
        notes += ["there is no val: it will be drawn from train"] if "test" in splits else []
        rows = [row._replace(split=None) if row.split == "train" else row for row in rows]
    return Found(name_examples(rows), list(dict.fromkeys(notes)))


def name_examples(rows: list[Row]) -> list[Example]:
    """Name examples by their images and, where those of a split are alike, by folder and number."""
    stems = [(row.split or "", _safe(stem_of(row.image))) for row in rows]
    times, examples = Counter(stems), {}
    order = sorted(zip(stems, rows, strict=True), key=lambda pair: (pair[0], str(pair[1].image)))
    for (split, stem), row in order:
        name = base = stem if times[split, stem] == 1 else f"{_safe(row.folder)}_{stem}"
        number = 1
        while (split, name) in examples or (name != stem and (split, name) in times):
            number += 1
            name = f"{base}_{number}"
        examples[split, name] = Example(name, *row[:2], *row[3:])
    return [examples[key] for key in sorted(examples)]


def _safe(name: str) -> str:
    return UNSAFE.sub("_", nfc(name)).rstrip(". ") or "_"


def _in_numeric_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", stem_of(path))
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def _inside(folder: Folder) -> str:
    names = listed([f"{child.path.name}/" for child in folder.folders])
    return f"; there are folders inside: {names}" if names else "; expected files like name.png"
