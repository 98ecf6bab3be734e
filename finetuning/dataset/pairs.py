"""Find images and their masks by file name, and read a data folder's split.json."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import nfc, quote_command
from finetuning.basics.files import DEMO_DATA, MAX_FILE_BYTES, lies_in, read_file, require_file
from finetuning.basics.image_decoding import require_heic_reader
from finetuning.basics.image_files import IMAGE_SUFFIXES

SPLITS = ("train", "val", "test")  # not every data folder has all; see splits_of
SPLIT_FILE = "split.json"  # in every data folder that download_dataset.py filled
DIGEST_KEY = "sha256"  # in SPLIT_FILE: the hash of its other values


class Pair(NamedTuple):
    """An image and the mask file or files of its objects."""

    name: str  # the file stem
    image: Path
    mask: Path  # a black-and-white image; with per_object label maps, or a folder of such images
    per_object: bool = False  # whether the mask tells objects apart, else it is one object
    chosen: tuple[int, ...] | None = None  # indices of the objects to use; None: all
    as_one: bool = False  # whether all objects, chosen or not, are merged into one
    group: str | None = None  # shared by images that stay together (one patient, copies)
    recording: str | None = None  # one that is split in time, so it has frames in other splits, too

    def mask_files(self) -> list[Path]:
        """Return the mask file, or the image files of the mask folder, sorted."""
        return sorted(files_by_stem(self.mask).values()) if self.mask.is_dir() else [self.mask]


def find_pairs(image_dir: Path, mask_dir: Path, per_object: bool = False) -> list[Pair]:
    """Pair the images and masks of two folders by file stem; return the pairs sorted by name.

    The suffixes may differ. With per_object, a mask may be a folder. Raises UserError if an image
    has no mask, or a mask no image.
    """
    images, masks = files_by_stem(image_dir), files_by_stem(mask_dir, per_object)
    if not images:
        raise UserError(f"no images in {image_dir}; expected files like name.jpg or name.png")
    _require_partners(images, masks, f"no mask of the same name in {mask_dir}")
    _require_partners(masks, images, f"no image of the same name in {image_dir}")
    return [Pair(stem, images[stem], masks[stem], per_object) for stem in sorted(images)]


def _require_partners(files: dict[str, Path], partners: dict[str, Path], what: str) -> None:
    alone = sorted(files.keys() - partners.keys())
    if alone:
        names = ", ".join(files[stem].name for stem in alone[:3])
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise UserError(f"{names}{more}: {what}; add the missing files, or remove these")


def files_by_stem(folder: Path, with_folders: bool = False) -> dict[str, Path]:
    """Map the stem of each image file in a folder to its path; hidden files are ignored.

    with_folders: also map each folder, by its name. Raises UserError for two files of one stem.
    """
    files: dict[str, Path] = {}
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; check the path")
    with os.scandir(folder) as found:  # pathlib is slow for many thousands of files
        entries = list(found)
    for entry in entries:
        is_folder = with_folders and entry.is_dir()
        stem, _, suffix = entry.name.rpartition(".")
        suffix = f".{suffix.lower()}" if stem else ""
        if entry.name.startswith(".") or not (is_folder or suffix in IMAGE_SUFFIXES):
            continue
        path = folder / entry.name
        # macOS decomposes accents and 한글 in file names
        stem = nfc(entry.name if is_folder else stem)
        if stem in files:
            raise UserError(
                f"{files[stem].name} and {path.name} in {folder} have the same name, except for "
                "the suffix; rename one of them, or move it to another folder"
            )
        if not is_folder:
            if not entry.is_file() or entry.stat().st_size > MAX_FILE_BYTES:
                require_file(path, MAX_FILE_BYTES)
            if suffix in (".heic", ".heif"):
                require_heic_reader(path)
        files[stem] = path
    return files


def splits_of(data: Path) -> list[str]:
    """Return the splits that a data folder has; compare_models.py can do without train."""
    kinds = ("images", "masks")
    return [split for split in SPLITS if any((data / kind / split).is_dir() for kind in kinds)]


def split_pairs(data: Path, split: str, limit: int | None = None) -> list[Pair]:
    """Return the pairs of a split of a data folder, or the first `limit` of them.

    Raises UserError, with the command to run, if the folder does not exist.
    """
    image_dir, mask_dir = data / "images" / split, data / "masks" / split
    for folder in (image_dir, mask_dir):
        if not folder.is_dir():
            found = splits_of(data)
            if found and split not in found:
                how = "fill another --data folder"
                how += " with --test-fraction" * (split == "test")
                raise UserError(
                    f"{data} has no {split} images, only {' and '.join(found)}"
                    + ": there is nothing to train on" * (split == "train")
                    + f"; {how}"
                )
            raise UserError(f"no data in {folder}; {how_to_fill(data)}")
    facts = read_facts(data)
    pairs = find_pairs(image_dir, mask_dir, facts.get("masks") == "objects")[:limit]
    groups, recordings = (facts.get(kind, {}).get(split, {}) for kind in ("groups", "recordings"))
    return [
        pair._replace(group=groups.get(pair.name), recording=recordings.get(pair.name))
        for pair in pairs
    ]


def how_to_fill(data: Path) -> str:
    """Return what a user does who has no data in `data`: the command that fills a data folder."""
    command = "python download_dataset.py"
    own = None if data == DEMO_DATA else find_own_image(data)
    if own is None:
        options = ["--demo"] if data == DEMO_DATA else ["--data", str(data)]
        return f"run: {command} {quote_command(options)}"
    images, masks = own.parent, "YOUR_MASKS"
    if own.parent.is_relative_to(data / "images") and (data / "masks").is_dir():
        masks = data / "masks" / own.parent.relative_to(data / "images")
    options = ["--images", images, "--masks", masks, "--data", Path("data", data.resolve().name)]
    return f"make a data folder of these images: {command} {quote_command(list(map(str, options)))}"


def find_own_image(folder: Path) -> Path | None:
    """Return an image in a folder or below that no data set with a SPLIT_FILE holds, or None."""
    for parent, folders, names in os.walk(folder):
        is_dataset = SPLIT_FILE in names
        folders[:] = [] if is_dataset else sorted(n for n in folders if not n.startswith("."))
        for name in [] if is_dataset else sorted(names):
            if PurePath(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                return Path(parent, name)
    return None


def count_pairs(data: Path) -> dict[str, int]:
    """Return the number of pairs in each split of a data folder."""
    return {split: len(split_pairs(data, split)) for split in splits_of(data)}


def is_filled(data: Path) -> bool:
    """Return whether a data folder holds images and masks, from this script or the user."""
    return all(
        any(path.suffix.lower() in IMAGE_SUFFIXES for path in (data / kind).rglob("*"))
        for kind in ("images", "masks")
    )


def holds_files(data: Path) -> bool:
    """Return whether images/ or masks/ of a data folder contain any file that is not hidden."""
    return any(
        path.is_file() and not path.name.startswith(".")
        for kind in ("images", "masks")
        for path in (data / kind).rglob("*")
    )


def keep_out(data: Path, output: Path, cache: Path | None = None) -> None:
    """Raise UserError if an output or cache folder is the data folder or in its images or masks.

    The output must not be in the cache folder either, because users may delete that.
    """
    for name, folder in (("output", output), ("cache", cache or output)):
        is_data = lies_in(folder, data) and lies_in(data, folder)
        if is_data or any(lies_in(folder, data / kind) for kind in ("images", "masks")):
            raise UserError(
                f"--{name} {folder} is where the images and masks of --data {data} are; "
                "choose another folder"
            )
    if cache and lies_in(output, cache):
        raise UserError(
            f"--output {output} is in --cache {cache}, which may be deleted; use separate folders"
        )


def facts_text(facts: dict[str, Any]) -> str:
    """Return the text of a split.json with these facts and their digest, for read_facts."""
    return json.dumps({**facts, DIGEST_KEY: _digest(facts)}, indent=1)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_facts(data: Path) -> dict[str, Any]:
    """Return the facts in a data folder's split.json; {} if the user arranged the folder by hand.

    Raises UserError if the file does not match its digest.
    """
    path = data / SPLIT_FILE
    if not path.is_file():
        return {}
    try:
        facts = json.loads(read_file(path))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.pop(DIGEST_KEY, None) != _digest(facts):
        raise UserError(
            f"{path} is damaged, or was edited; restore it, or fill the folder again with "
            "download_dataset.py --force"
        )
    return facts
