"""Replace the content of a data folder completely, or not at all.

The new files are written to a temporary folder inside the data folder. When all are complete, the
old ones are moved out and the new ones in, split.json last. If a run fails or is killed before
that, everything is moved back: at once, or when the next run calls recover.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import tell
from finetuning.basics.files import only_run_in
from finetuning.dataset.pairs import SPLIT_FILE, facts_text, find_pairs, splits_of
from finetuning.preparation.copies import COPIES_FILE, write_copies
from finetuning.preparation.fingerprint import SOURCES_FILE, SOURCES_KEY, write_records
from finetuning.preparation.overview import OVERVIEW_FILE, draw_overview

# A data set, except its SPLIT_FILE
MOVED = ("images", "masks", OVERVIEW_FILE, COPIES_FILE, SOURCES_FILE)
BEGUN_FILE = "begun.json"  # identifies a temporary folder as this program's
TEMPORARY_PREFIX = ".partial-"  # of the temporary folders in a data folder


@contextlib.contextmanager
def new_dataset(data: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder; its images/ and masks/ replace those of `data` when complete.

    `facts` are written to SPLIT_FILE; the caller may add to them inside the block. After an error,
    `data` is as it was before; after a kill, it is once the next run has called `recover`.
    """
    with only_run_in(data):
        recover(data)
        folder = data / (TEMPORARY_PREFIX + uuid.uuid4().hex[:8])
        new, old = folder / "new", folder / "old"
        try:
            new.mkdir(parents=True)
            old.mkdir()
            (folder / BEGUN_FILE).write_text(mark_of(folder), encoding="utf-8")
            yield new
            per_object = facts.get("masks") == "objects"
            shown = splits_of(new)[0]
            pairs = find_pairs(new / "images" / shown, new / "masks" / shown, per_object)
            draw_overview(new / OVERVIEW_FILE, pairs)
            if not (new / COPIES_FILE).exists():
                write_copies(new / COPIES_FILE, [], [])
            if not (new / SOURCES_FILE).exists():
                facts = facts | {SOURCES_KEY: write_records(new, [])}
            (new / SPLIT_FILE).write_text(facts_text(facts), encoding="utf-8")
            # SPLIT_FILE is the first out and the last in: where it exists, the data set is complete
            for name in (SPLIT_FILE, *MOVED):
                if (data / name).exists():
                    (data / name).replace(old / name)
            for name in (*MOVED, SPLIT_FILE):
                (new / name).replace(data / name)
        finally:
            undo_unless_complete(folder)


def mark_of(folder: Path) -> str:
    """Return a text that distinguishes a folder from a copy of it made elsewhere."""
    return json.dumps([folder.stat().st_ino, str(folder.resolve())])


def is_ours(folder: Path) -> bool:
    """Return whether this program created a temporary folder, at this place."""
    if folder.is_symlink():
        return False
    mark = folder / BEGUN_FILE
    if not mark.is_file():  # an empty folder: killed before the mark was written
        return not any(path.is_file() for path in folder.rglob("*"))
    expected = mark_of(folder).encode()
    return mark.stat().st_size == len(expected) and mark.read_bytes() == expected


def undo_unless_complete(folder: Path) -> None:
    """Move everything back unless all files are in place; remove the temporary folder.

    If it is interrupted at any point, it can be run again. Raises UserError, and removes nothing,
    if a file cannot be moved back.
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
            (new / SPLIT_FILE).unlink()  # from here on, there is nothing left to move back
        except OSError as error:
            raise UserError(
                f"{data} is only partly restored, and its files may be in {old} ({error.strerror}: "
                f"{error.filename}); close the programs that use these files, then run this again"
            ) from error
    shutil.rmtree(folder, ignore_errors=True)  # the next run removes files that are in use now


def recover(data: Path) -> None:
    """Undo what killed runs left unfinished in `data`; the caller holds the folder's lock."""
    for folder in list(data.glob(TEMPORARY_PREFIX + "*")):
        if not is_ours(folder):
            tell(
                f"warning: {folder} was not made here by this program, so it is not removed. If "
                f"images of yours are missing, look into {folder / 'old'}"
            )
            continue
        was_moving = (folder / "new" / SPLIT_FILE).exists()
        undo_unless_complete(folder)
        if was_moving:
            tell(f"an earlier run was killed while filling {data}; its old content is restored")


def recover_if_killed(data: Path) -> None:
    """Lock `data` and call `recover`, if a killed run left a temporary folder."""
    if any(data.glob(TEMPORARY_PREFIX + "*")):
        with only_run_in(data):
            recover(data)
