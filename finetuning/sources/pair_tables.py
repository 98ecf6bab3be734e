"""Pairs of images and masks from a table, for names that do not match."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path, PurePath

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path
from finetuning.basics.csv_files import read_table
from finetuning.basics.files import SPLIT_NAMES
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.sources.pairing import Found, UnnamedExample, to_examples
from finetuning.sources.volume_pairs import SliceFolder, slice_rows
from finetuning.volumes.files import VOLUME_SUFFIXES


def read_pairs_file(
    file: Path, images: Path | None, masks: Path | None, slices: SliceFolder | None = None
) -> Found:
    """Read pairs from a CSV file with the columns image and mask, and optionally split.

    Files are searched in `images` or `masks`, then in the table's own folder. Rows with the same
    image are its objects. Raises UserError, which names the row, if a file or value is missing.
    """
    rows: dict[str, UnnamedExample] = {}
    notes: list[str] = []
    for number, cells in enumerate(read_table(file, ("image", "mask")), 2):
        if not any(cells.values()):
            continue
        where = f"{brief_path(file)}, row {number}"
        image = _find_file(cells.get("image", ""), [images, file.parent], f"{where}: image")
        mask = _find_file(cells.get("mask", ""), [masks, file.parent], f"{where}: mask")
        value = cells.get("split", "").casefold()
        if value and value not in SPLIT_NAMES:
            raise UserError(f"{where}: split is {brief_path(value)}, not train, val or test")
        split = SPLIT_NAMES.get(value)
        new = UnnamedExample(image, (), image.parent.name, split)
        row = rows.setdefault(str(image), new)
        if row.split != split:
            raise UserError(
                f"{where}: {brief_path(image.name)} is in another split in an earlier row"
            )
        if mask in row.masks:
            notes.append(f"left out row {number}, which repeats an earlier one")
        else:
            rows[str(image)] = row._replace(masks=(*row.masks, mask))
    if not rows:
        raise UserError(f"{brief_path(file)} has no rows below its header")
    rows = _with_shared_masks(rows, brief_path(file), notes)
    if len({row.split is None for row in rows.values()}) > 1:
        raise UserError(
            f"{brief_path(file)}: some rows have a split and some have none; fill in all"
        )
    every = list(rows.values())
    levels, value_range = slice_rows([row[:2] for row in every], slices, notes)
    unnamed = [
        UnnamedExample(
            each.image, (each.mask,), row.folder, row.split, None, row.group or each.volume
        )
        for row, level in zip(every, levels, strict=True)
        for each in level
    ] + [row for row, level in zip(every, levels, strict=True) if not level]
    return to_examples(unnamed, notes, skip_unlabelled=False)._replace(value_range=value_range)


def _with_shared_masks(
    rows: dict[str, UnnamedExample], table: str, notes: list[str]
) -> dict[str, UnnamedExample]:
    """Return the rows, grouped by their masks if each mask is given to equally many images.

    Raises UserError if only some masks are given to several images, or one mask to all.
    """
    counts = Counter(str(mask) for row in rows.values() for mask in row.masks)
    mask, count = counts.most_common(1)[0]
    if count == 1:
        return rows
    if len(counts) == 1 or set(counts.values()) != {count}:
        raise UserError(
            f"{table} gives the mask {brief_path(Path(mask).name)} to {count} of {len(rows)} "
            "images; give each image its own (if it is meant, copy the mask under several names)"
        )
    # Such as photos of one place in visible and in infrared light
    notes.append(f"each mask is given to {count} images, which stay together")
    return {image: row._replace(group=str(row.masks[0])) for image, row in rows.items()}


def _find_file(name: str, folders: list[Path | None], what: str) -> Path:
    """Return the file of this name in the first folder that has it, composed or decomposed."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES and not name.lower().endswith(VOLUME_SUFFIXES):
        raise UserError(f"{what} is {brief_path(name) or 'empty'}; expected a file like name.png")
    for folder in filter(None, folders):
        for form in ("NFC", "NFD"):
            for spelled in (name, name.replace("\\", "/")):
                path = folder / unicodedata.normalize(form, spelled)
                if len(path.name) < 256 and path.is_file():  # is_file raises for longer names
                    return path
    places = " or ".join(dict.fromkeys(brief_path(folder) for folder in folders if folder))
    raise UserError(f"{what} {brief_path(name)} is not in {places}; check its path")
