"""A data folder: pairs split into train and val, filled as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from sam2_utils import UserError

from tqdm import tqdm

from finetuning.demo_images import write_demo_dataset
from finetuning.files import only_run_in
from finetuning.pairs import IMAGE_SUFFIXES, Pair, find_pairs, read_pair

SPLITS = ("train", "val")
SPLIT_FILE = "split.json"  # in every data folder that this script has filled
PARTIAL = ".partial-"  # how the names of its temporary folders in there start


def split_names(names: list[str], val_fraction: float, seed: int) -> dict[str, list[str]]:
    """Split names into train and val, the same on every platform for the same seed.

    Both splits get at least one name. Raises UserError for fewer than two names.
    """
    if len(names) < 2:
        raise UserError(f"{len(names)} pair cannot be split into train and val; add more pairs")
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    val_count = min(max(round(len(names) * val_fraction), 1), len(names) - 1)
    return {"train": sorted(shuffled[val_count:]), "val": sorted(shuffled[:val_count])}


@contextlib.contextmanager
def new_dataset(data: Path, **facts: Any) -> Iterator[Path]:
    """Yield an empty folder; the images/ and masks/ put there become those of `data`.

    They are moved into place when complete, with `facts` about them in SPLIT_FILE, which goes
    first and comes last: where it is, the data set is whole. On any error `data` is again as it
    was; after a kill, once the next run has called `recover`.
    """
    with only_run_in(data):
        recover(data)
        folder = data / (PARTIAL + uuid.uuid4().hex[:8])
        new, old = folder / "new", folder / "old"
        try:
            new.mkdir(parents=True)
            old.mkdir()
            yield new
            (new / SPLIT_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            for name in (SPLIT_FILE, "images", "masks"):
                if (data / name).exists():
                    (data / name).replace(old / name)
            for name in ("images", "masks", SPLIT_FILE):
                (new / name).replace(data / name)
        finally:
            settle(folder)


def settle(folder: Path) -> None:
    """Move everything back unless all has been moved into place; remove the temporary folder.

    Stopped at any point, it can be run again. Raises UserError, and removes nothing, where
    something cannot be moved back.
    """
    data, new, old = folder.parent, folder / "new", folder / "old"
    if (new / SPLIT_FILE).exists():  # written before the first move, moved by the last
        try:
            for name in ("images", "masks"):
                if (data / name).exists() and not (new / name).exists():
                    (data / name).replace(new / name)
            for name in ("images", "masks", SPLIT_FILE):
                if (old / name).exists():
                    (old / name).replace(data / name)
            (new / SPLIT_FILE).unlink()  # from here on, there is nothing to move back
        except OSError as error:
            raise UserError(
                f"{data} is half changed, and what it held may be in {old} ({error.strerror}: "
                f"{error.filename}); close the programs that use these files, then run this again"
            ) from error
    shutil.rmtree(folder, ignore_errors=True)  # the next run removes what is in use


def recover(data: Path) -> None:
    """Undo what killed runs have left half done in `data`, where no other run is writing."""
    for folder in list(data.glob(PARTIAL + "*")):
        was_moving = (folder / "new" / SPLIT_FILE).exists()
        settle(folder)
        if was_moving:
            print(f"an earlier run was killed while it filled {data}: all is back as it was before")


def recover_if_killed(data: Path) -> None:
    """Do what `recover` does, if there is anything to be done."""
    if any(data.glob(PARTIAL + "*")):
        with only_run_in(data):
            recover(data)


def is_kept(data: Path, source: str | None, force: bool) -> bool:
    """Say whether `data` already holds what is asked for: the pairs of `source`, or any if None.

    Raises UserError where it holds something else, or what is not this project's to replace.
    """
    split_file = data / SPLIT_FILE
    if not split_file.is_file():
        if is_filled(data) and not (force or source):
            return True  # put there by hand, as the layout asks
        if holds_files(data):
            raise UserError(
                f"{data} holds images or masks that this script did not put there; "
                "move them away, or use another --data folder"
            )
        return False
    if force or not is_filled(data):
        return False
    try:
        made_from = json.loads(split_file.read_text(encoding="utf-8"))["source"]
    except (ValueError, LookupError):  # edited by hand
        made_from = "an unknown source"
    if source and made_from != source:
        raise UserError(
            f"{data} already holds the data set made from {made_from}; "
            "use another --data folder, or --force to replace it"
        )
    return True


def check_cases(pairs: list[Pair]) -> None:
    """Raise UserError for names that Windows and macOS take for one and the same."""
    seen: dict[str, Pair] = {}
    for pair in pairs:
        key = unicodedata.normalize("NFC", pair.name.casefold())
        if key in seen:
            raise UserError(
                f"{seen[key].image} and {pair.image} differ in upper and lower case only, which is "
                "one name on Windows and macOS; rename one of them, and its mask"
            )
        seen[key] = pair


def copy_pairs(pairs: list[Pair], data: Path, source: str, val_fraction: float, seed: int) -> None:
    """Check every pair and copy it into images/ and masks/ of `data`, in train/ and val/."""
    check_cases(pairs)
    splits = split_names([pair.name for pair in pairs], val_fraction, seed)
    split_of = {name: split for split, names in splits.items() for name in names}
    facts = {"source": source, "seed": seed, "val_fraction": val_fraction}
    with new_dataset(data, **facts, **splits) as folder:
        for pair in tqdm(pairs, desc="Checking and copying", unit="pair"):
            copies = []
            for kind, source in (("images", pair.image), ("masks", pair.mask)):
                suffix = PurePath(source.name).suffix
                copy = folder / kind / split_of[pair.name] / (pair.name + suffix)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with source.open("rb") as original, copy.open("wb") as file:
                    shutil.copyfileobj(original, file)  # by parts: see check_archive
                copies.append(copy)
            check_pair(pair, *copies)


def check_pair(pair: Pair, image_copy: Path, mask_copy: Path) -> None:
    """Raise UserError, in terms of the user's own files, for a pair that cannot be trained on."""
    try:
        read_pair(Pair(pair.name, image_copy, mask_copy))
    except UserError as error:
        message = str(error).replace(str(image_copy), str(pair.image))
        raise UserError(message.replace(str(mask_copy), str(pair.mask))) from error


def count_pairs(data: Path) -> dict[str, int]:
    """Return the number of image files of each split in a data folder."""
    return {
        split: len(find_pairs(data / "images" / split, data / "masks" / split)) for split in SPLITS
    }


def is_filled(data: Path) -> bool:
    """Say whether a data folder holds images and masks, whoever put them there."""
    return all(
        any(path.suffix.lower() in IMAGE_SUFFIXES for path in (data / kind).glob("*/*"))
        for kind in ("images", "masks")
    )


def holds_files(data: Path) -> bool:
    """Say whether images/ or masks/ of a data folder hold any files but hidden ones."""
    return any(
        path.is_file() and not path.name.startswith(".")
        for kind in ("images", "masks")
        for path in (data / kind).rglob("*")
    )


def draw_demo(data: Path) -> None:
    """Draw the demo's images and masks into `data`."""
    print(f"drawing the demo's images into {data}")
    with new_dataset(data, source="demo") as folder:
        write_demo_dataset(folder)
