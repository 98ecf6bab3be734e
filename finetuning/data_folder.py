"""A data folder: pairs split into train and val, filled as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.demo_images import write_demo_dataset
from finetuning.files import only_run_in
from finetuning.filling import Filled, Filler
from finetuning.mask_values import MaskRule
from finetuning.overview import OVERVIEW_FILE, draw_overview
from finetuning.pairing import Example
from finetuning.pairs import (
    IMAGE_SUFFIXES,
    SPLIT_FILE,
    SPLITS,
    find_pairs,
    read_facts,
    split_pairs,
)

MOVED = ("images", "masks", OVERVIEW_FILE)  # what a data set is, beside that
BEGUN_FILE = "begun.json"  # in each of its temporary folders, to know them by
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

    They are moved into place when complete, with a picture of some of them, and with `facts` about
    them in SPLIT_FILE, which goes first and comes last: where it is, the data set is whole. On any
    error `data` is again as it was; after a kill, once the next run has called `recover`.
    """
    with only_run_in(data):
        recover(data)
        folder = data / (PARTIAL + uuid.uuid4().hex[:8])
        new, old = folder / "new", folder / "old"
        try:
            new.mkdir(parents=True)
            old.mkdir()
            (folder / BEGUN_FILE).write_text(mark_of(folder), encoding="utf-8")
            yield new
            of_objects = facts.get("masks") == "objects"
            pairs = find_pairs(new / "images/train", new / "masks/train", of_objects)
            draw_overview(new / OVERVIEW_FILE, pairs)
            (new / SPLIT_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            for name in (SPLIT_FILE, *MOVED):
                if (data / name).exists():
                    (data / name).replace(old / name)
            for name in (*MOVED, SPLIT_FILE):
                (new / name).replace(data / name)
        finally:
            settle(folder)


def mark_of(folder: Path) -> str:
    """Return what tells a folder from a copy of it, which may have come from elsewhere."""
    return json.dumps([folder.stat().st_ino, str(folder.resolve())])


def is_ours(folder: Path) -> bool:
    """Say whether a temporary folder was begun by this program, here."""
    if folder.is_symlink():
        return False
    mark = folder / BEGUN_FILE
    if not mark.is_file():  # killed before it was written, unless there are files already
        return not any(path.is_file() for path in folder.rglob("*"))
    return mark.read_bytes() == mark_of(folder).encode()


def settle(folder: Path) -> None:
    """Move everything back unless all has been moved into place; remove the temporary folder.

    Stopped at any point, it can be run again. Raises UserError, and removes nothing, where
    something cannot be moved back.
    """
    data, new, old = folder.parent, folder / "new", folder / "old"
    if (new / SPLIT_FILE).exists():  # written before the first move, moved by the last
        try:
            for name in MOVED:
                if (data / name).exists() and not (new / name).exists():
                    (data / name).replace(new / name)
            for name in (*MOVED, SPLIT_FILE):
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
        if not is_ours(folder):
            print(
                f"warning: {folder} was not made here by this program; it is left alone. If images "
                f"of yours are missing, look into {folder / 'old'}"
            )
            continue
        was_moving = (folder / "new" / SPLIT_FILE).exists()
        settle(folder)
        if was_moving:
            print(f"an earlier run was killed while it filled {data}: all is back as it was before")


def recover_if_killed(data: Path) -> None:
    """Do what `recover` does, if there is anything to be done."""
    if any(data.glob(PARTIAL + "*")):
        with only_run_in(data):
            recover(data)


def is_kept(data: Path, source: str | None, options: dict[str, Any], force: bool) -> bool:
    """Say whether `data` already holds what is asked for: the pairs of `source`, or any if None.

    options: how they are taken from it. Raises UserError where it holds something else, or what is
    not this project's to replace.
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
        facts = read_facts(data)
        made_from, taken = facts["source"], facts.get("options", options)
    except (UserError, LookupError):  # edited by hand
        made_from, taken = "an unknown source", options
    if source and (made_from, taken) != (source, options):
        how = "" if taken == options else f" with other options ({json.dumps(taken)})"
        raise UserError(
            f"{data} already holds the data set made from {made_from}{how}; "
            "use another --data folder, or --force to replace it"
        )
    return True


def check_cases(examples: list[Example]) -> None:
    """Raise UserError for names that Windows and macOS take for one and the same."""
    seen: dict[tuple[str | None, str], Example] = {}
    for example in examples:
        key = example.split, unicodedata.normalize("NFC", example.name.casefold())
        if key in seen:
            raise UserError(
                f"{seen[key].image} and {example.image} differ in upper and lower case only, which "
                "is one name on Windows and macOS; rename one of them, and its mask"
            )
        seen[key] = example


def fill_folder(
    data: Path,
    examples: list[Example],
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    facts: dict[str, Any],
) -> list[Filled]:
    """Check every example and copy it into images/ and masks/ of `data`, in train/, val/, test/.

    Those that are in no split yet are split by facts["seed"] and facts["val_fraction"]. Returns
    what became of each.
    """
    check_cases(examples)
    of_objects = rule.gives_objects or any(len(example.masks) != 1 for example in examples)
    names: dict[str, list[str]] = {}
    for example in examples:
        names.setdefault(example.split or "", []).append(example.name)
    unsplit = names.pop("", [])
    splits = split_names(unsplit, facts["val_fraction"], facts["seed"]) if unsplit else {}
    split_of = {name: split for split, of_split in splits.items() for name in of_split}
    if of_objects:
        facts = {**facts, "masks": "objects"}
    if value_range:
        facts = {**facts, "value_range": list(value_range)}
    with new_dataset(data, **facts, **names, **splits) as folder:
        filler = Filler(folder, rule, of_objects, value_range)
        filled = filler.fill(examples, split_of)
    if filler.reader.dropped_parts:
        print(
            f"left out {filler.reader.dropped_parts} parts of fewer than {rule.smallest_part} "
            "pixels (--smallest-part)"
        )
    return filled


def count_pairs(data: Path) -> dict[str, int]:
    """Return the number of image files of each split in a data folder."""
    splits = [split for split in SPLITS if split != "test" or (data / "images" / split).is_dir()]
    return {split: len(split_pairs(data, split)) for split in splits}


def is_filled(data: Path) -> bool:
    """Say whether a data folder holds images and masks, whoever put them there."""
    return all(
        any(path.suffix.lower() in IMAGE_SUFFIXES for path in (data / kind).rglob("*"))
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
