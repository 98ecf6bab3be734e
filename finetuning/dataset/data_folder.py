"""A data folder: pairs split into train and val, filled as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import listed, nfc, tell
from finetuning.basics.files import MAX_FILE_BYTES, only_run_in, require_file
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.dataset.copies import COPIES_FILE, describe_copies, find_copies, write_copies
from finetuning.dataset.demo_images import write_demo_dataset
from finetuning.dataset.filling import UNSPLIT, Filled, Filler, move_to_splits
from finetuning.dataset.groups import Grouping, find_groups, join_groups, torn_groups
from finetuning.dataset.overview import OVERVIEW_FILE, draw_overview
from finetuning.dataset.pairs import (
    SPLIT_FILE,
    SPLITS,
    facts_text,
    find_pairs,
    read_facts,
    split_pairs,
)
from finetuning.dataset.splitting import split_names
from finetuning.sources.mask_values import MaskRule
from finetuning.sources.pairing import SourceExample

MOVED = ("images", "masks", OVERVIEW_FILE, COPIES_FILE)  # what a data set is, beside that
SPLIT_OPTIONS = ("test_fraction", "group_regex", "groups", "copies")
BEGUN_FILE = "begun.json"  # in each of its temporary folders, to know them by
PARTIAL = ".partial-"  # how the names of its temporary folders in there start


@contextlib.contextmanager
def new_dataset(data: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder; the images/ and masks/ put there become those of `data`.

    They are moved into place when complete, with a picture of some of them, and with `facts` about
    them, which may be added to until then, in SPLIT_FILE, which goes first and comes last: where it
    is, the data set is whole. On any error `data` is again as it was; after a kill, once the next
    run has called `recover`.
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
            if not (new / COPIES_FILE).exists():
                write_copies(new / COPIES_FILE, [], [])
            (new / SPLIT_FILE).write_text(facts_text(facts), encoding="utf-8")
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
    expected = mark_of(folder).encode()
    return mark.stat().st_size == len(expected) and mark.read_bytes() == expected


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
            tell(
                f"warning: {folder} was not made here by this program; it is left alone. If images "
                f"of yours are missing, look into {folder / 'old'}"
            )
            continue
        was_moving = (folder / "new" / SPLIT_FILE).exists()
        settle(folder)
        if was_moving:
            tell(f"an earlier run was killed while it filled {data}: all is back as it was before")


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
        made_from = facts["source"]
        # Files of earlier versions say nothing of options, but had none of these
        before = {name: value for name, value in options.items() if name not in SPLIT_OPTIONS}
        taken = facts.get("options", before)
    except (UserError, LookupError):  # edited by hand
        made_from, taken = "an unknown source", options
    if (source and made_from != source) or ((source or options) and taken != options):
        how = "" if taken == options else f" with other options ({json.dumps(taken)})"
        raise UserError(
            f"{data} already holds the data set made from {made_from}{how}; "
            "use another --data folder, or --force to replace it"
        )
    return True


def check_files(examples: list[SourceExample]) -> None:
    """Raise UserError for what is no file, or one too large, before any is copied."""
    for example in examples:
        for source in (example.image, *example.masks):
            if isinstance(source, Path):  # not in an archive, which has been checked
                require_file(source, MAX_FILE_BYTES)


def check_cases(examples: list[SourceExample]) -> None:
    """Raise UserError for names that Windows and macOS take for one and the same."""
    seen: dict[tuple[str | None, str], SourceExample] = {}
    for example in examples:
        key = example.split, nfc(example.name.casefold())
        if key in seen:
            raise UserError(
                f"{seen[key].image} and {example.image} differ in upper and lower case only, which "
                "is one name on Windows and macOS; rename one of them, and its mask"
            )
        seen[key] = example


def fill_folder(
    data: Path,
    examples: list[SourceExample],
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    grouping: Grouping,
    facts: dict[str, Any],
) -> list[Filled]:
    """Check every example and copy it into images/ and masks/ of `data`, in train/, val/, test/.

    Those that are in no split yet are split by the seed and the fractions in `facts`, what belongs
    together or is alike on one side. Returns what became of each.
    """
    check_files(examples)
    check_cases(examples)
    of_objects = rule.gives_objects or any(len(example.masks) != 1 for example in examples)
    facts = dict(facts)
    if of_objects:
        facts["masks"] = "objects"
    if value_range:
        facts["value_range"] = list(value_range)
    if facts["test_fraction"] and any(example.split for example in examples):
        raise UserError("the images are split already; leave --test-fraction out")
    given = find_groups(examples, grouping)
    with new_dataset(data, facts) as folder:
        filler = Filler(folder, rule, of_objects, value_range)
        filled = filler.fill(examples)
        copies = find_copies(
            [of_image.thumbnail for of_image in filled], [of_image.content for of_image in filled]
        )
        alike = [copy[:2] for copy in copies] if grouping.joins_copies else []
        groups = join_groups(given, alike, [of_image.name for of_image in filled])
        filled = split_filled(folder, filled, groups, facts)
        names = [(of_image.split, of_image.name) for of_image in filled]
        write_copies(folder / COPIES_FILE, names, copies)
    if filler.reader.dropped_parts:
        print(
            f"left out {filler.reader.dropped_parts} parts of fewer than {rule.smallest_part} "
            "pixels (--smallest-part)"
        )
    if copies:
        tell(describe_copies(data / COPIES_FILE, names, copies))
    if torn := torn_groups(given, [of_image.split for of_image in filled]):
        print(
            f"warning: {len(torn)} groups are on several sides of the ready split: {listed(torn)}"
        )
    return filled


def split_filled(
    folder: Path, filled: list[Filled], groups: list[str | None], facts: dict[str, Any]
) -> list[Filled]:
    """Split what is in no split yet, and move its files there; add names and groups to `facts`."""
    unsplit = {
        of_image.name: group
        for of_image, group in zip(filled, groups, strict=True)
        if of_image.split == UNSPLIT
    }
    split_of = {}
    if unsplit:
        splits = split_names(
            unsplit, facts["val_fraction"], facts["seed"], facts["test_fraction"], unsplit
        )
        split_of = {name: split for split, names in splits.items() for name in names}
        move_to_splits(folder, split_of)
    filled = [
        of_image._replace(split=split_of[of_image.name]) if of_image.split == UNSPLIT else of_image
        for of_image in filled
    ]
    facts["groups"] = {}
    for of_image, group in zip(filled, groups, strict=True):
        facts.setdefault(of_image.split, []).append(of_image.name)
        if group:
            facts["groups"].setdefault(of_image.split, {})[of_image.name] = group
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
    tell(f"drawing the demo's images into {data}")
    with new_dataset(data, {"source": "demo"}) as folder:
        write_demo_dataset(folder)
