"""Images and their masks on disk, found by name; and a data folder of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import nfc
from finetuning.basics.files import DEMO_DATA, MAX_FILE_BYTES, lies_in, read_file, require_file
from finetuning.basics.image_decoding import require_heic_reader
from finetuning.basics.image_files import IMAGE_SUFFIXES

SPLITS = ("train", "val", "test")  # the last of a set that comes with one
SPLIT_FILE = "split.json"  # in every data folder that download_dataset.py has filled
DIGEST = "sha256"  # in that file, of all else in it


class Pair(NamedTuple):
    """An image and the masks of its objects."""

    name: str
    image: Path
    mask: Path  # black and white; or of_objects: a label map, or a folder of one mask an object
    of_objects: bool = False
    chosen: tuple[int, ...] | None = None  # the objects that count, from 0; None: all
    as_one: bool = False  # whether all objects, chosen or not, are one together
    group: str | None = None  # the same for images of one patient, say, and for copies; None: alone

    def mask_files(self) -> list[Path]:
        """Return the mask's file, or those in its folder, sorted."""
        return sorted(self.mask.iterdir()) if self.mask.is_dir() else [self.mask]


def find_pairs(image_dir: Path, mask_dir: Path, of_objects: bool = False) -> list[Pair]:
    """Pair the images and the masks of two folders by file stem, sorted by name.

    The suffixes may differ. Raises UserError unless every image has one mask, and the reverse;
    with of_objects a mask may be a folder.
    """
    images, masks = files_by_stem(image_dir), files_by_stem(mask_dir, of_objects)
    if not images:
        raise UserError(f"no images in {image_dir}; expected files like name.jpg or name.png")
    _require_partners(images, masks, f"no mask of the same name in {mask_dir}")
    _require_partners(masks, images, f"no image of the same name in {image_dir}")
    return [Pair(stem, images[stem], masks[stem], of_objects) for stem in sorted(images)]


def _require_partners(files: dict[str, Path], partners: dict[str, Path], what: str) -> None:
    alone = sorted(files.keys() - partners.keys())
    if alone:
        names = ", ".join(files[stem].name for stem in alone[:3])
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise UserError(f"{names}{more}: {what}; add what is missing, or take these files away")


def files_by_stem(folder: Path, with_folders: bool = False) -> dict[str, Path]:
    """Map the stem of each image file in `folder` to its path; hidden files are left out.

    with_folders: a folder counts as well, by its name.
    """
    files: dict[str, Path] = {}
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; check the path")
    for path in folder.iterdir():
        name = PurePath(path.name)
        is_folder = with_folders and path.is_dir()
        if path.name.startswith(".") or not (is_folder or name.suffix.lower() in IMAGE_SUFFIXES):
            continue
        stem = nfc(name.name if is_folder else name.stem)
        if stem in files:
            raise UserError(
                f"{files[stem].name} and {path.name} in {folder} have the same name but for the "
                "suffix; rename one of them, or move it to another folder"
            )
        if not is_folder:
            require_file(path, MAX_FILE_BYTES)
            if name.suffix.lower() in (".heic", ".heif"):
                require_heic_reader(path)
        files[stem] = path
    return files


def split_pairs(data: Path, split: str, limit: int | None = None) -> list[Pair]:
    """Return the pairs of a split ("train" or "val") of a data folder, the first `limit` of them.

    Raises UserError with the command to run where the folder is not there.
    """
    image_dir, mask_dir = data / "images" / split, data / "masks" / split
    for folder in (image_dir, mask_dir):
        if not folder.is_dir():
            option = "--demo" if data == DEMO_DATA else f"--data {data}"
            raise UserError(f"no data in {folder}; run: python download_dataset.py {option}")
    facts = read_facts(data)
    pairs = find_pairs(image_dir, mask_dir, facts.get("masks") == "objects")[:limit]
    groups = facts.get("groups", {})
    of_split = groups.get(split, {}) if isinstance(groups, dict) else None
    if not isinstance(of_split, dict) or not all(isinstance(g, str) for g in of_split.values()):
        raise _damaged(data / SPLIT_FILE)
    return [pair._replace(group=of_split.get(pair.name)) for pair in pairs]


def keep_out(data: Path, output: Path, cache: Path | None = None) -> None:
    """Raise UserError where a folder to write to is a data folder, or in its images or masks.

    cache: another such folder, which may be deleted: the output must not be in it, either.
    """
    for name, folder in (("output", output), ("cache", cache or output)):
        is_data = lies_in(folder, data) and lies_in(data, folder)
        if is_data or any(lies_in(folder, data / kind) for kind in ("images", "masks")):
            raise UserError(
                f"--{name} {folder} is where the images and masks of --data {data} are; "
                "choose another folder"
            )
    if cache and lies_in(output, cache):
        raise UserError(f"--output {output} is in --cache {cache}, which may be deleted; part them")


def facts_text(facts: dict[str, Any]) -> str:
    """Return what a data folder's split.json is to hold, for read_facts."""
    return json.dumps({**facts, DIGEST: _digest(facts)}, indent=1)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_facts(data: Path) -> dict[str, Any]:
    """Return what a data folder's split.json says of it; nothing where it has none.

    Raises UserError where it is damaged; one of an earlier version has no digest to tell by.
    """
    path = data / SPLIT_FILE
    if not path.is_file():
        return {}
    try:
        facts = json.loads(read_file(path))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.pop(DIGEST, None) not in (None, _digest(facts)):
        raise _damaged(path)
    return facts


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged, or was edited; put the right one back, or fill the folder anew with "
        "download_dataset.py --force"
    )
