"""A folder's results: files for each image, and results.csv, from which a later run continues."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.basics.csv_files import read_table
from finetuning.basics.files import (
    atomic_write,
    content_sha256,
    read_file,
    without_apostrophe,
    write_csv,
)
from finetuning.basics.image_decoding import video_hint
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.inference.coco_files import coco_files
from finetuning.inference.result_files import IMAGE_ENDINGS, file_names, write_files
from finetuning.segmentation.automatic import Rule, SegmentedObject
from finetuning.segmentation.clean_masks import NO_CLEANING, Cleaning
from finetuning.segmentation.prompts import Prompt, mask_box, prompt_text

EARLIER_COLUMNS = ("image", "object", "prompt", "score", "area", "box", "files", "error")
RESULT_COLUMNS = (
    *("image", "object", "class", "status", "prompt", "score", "area", "box", "files", "error"),
    *("image_size", "image_time", "model_sha256"),
)
RESULTS_FILE, SETTINGS_FILE = "results.csv", "settings.json"
GONE_FOLDER = "gone"  # in the results: the files of images that are no longer there
RULE_SETTING = "way of finding objects"  # empty unless objects are found without a prompt
VIEWS_SETTING = "number of averaged views"
CLEAN_SETTING = "way of cleaning masks (--clean)"
# Of results that an earlier version wrote
EARLIER_SETTINGS = {VIEWS_SETTING: 1, CLEAN_SETTING: list(NO_CLEANING)}
WRITING_SHARE = 0.05  # of the time, at most: the files are written in full each time


class FolderImage(NamedTuple):
    """An image of a folder.

    name: the file name, as tables show it. stem: what the names of its result files start with.
    """

    path: Path
    name: str
    stem: str


def list_images(folder: Path) -> list[FolderImage]:
    """Return the images in a folder, without subfolders, sorted by name.

    If the names of several images differ only in suffix or case, their stems keep the suffix.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not (path.name.startswith(".") or path.is_dir())
    )
    if not paths:
        hint = video_hint(sorted(folder.iterdir())) or "; expected files like name.jpg or name.png"
        raise UserError(f"no images in {folder}{hint}")
    taken = Counter(path.stem.casefold() for path in paths)
    taken.update(path.name.casefold() for path in paths)  # a.jpg.png must not clash with a.jpg
    stems = [path.stem if taken[path.stem.casefold()] == 1 else path.name for path in paths]
    return [
        FolderImage(path, utf8_name(path.name), stem)
        for path, stem in zip(paths, stems, strict=True)
    ]


def utf8_name(name: str) -> str:
    """Return a file name with its undecodable bytes escaped, so that UTF-8 can encode it."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def make_settings(
    folder: Path,
    checkpoint: Path,
    value_range: tuple[float, float] | None,
    trained_range: tuple[float, float] | None,
    rule: Rule | None = None,
    cleaning: Cleaning = NO_CLEANING,
) -> dict[str, Any]:
    """Return the settings that a folder's results depend on, as settings.json holds them.

    rule: selects the objects that are found without a prompt, if any are. cleaning: of the masks.
    """
    return {
        "folder": str(folder.resolve()),
        "model": content_sha256(checkpoint),
        "value range": list(value_range or trained_range or ()),
        RULE_SETTING: list(rule or ()),
        CLEAN_SETTING: list(cleaning),
    }


def image_time(path: Path) -> str:
    """Return when a file was last changed, in UTC; it tells an image from its replacement.

    "" if the file is gone, or has no such time.
    """
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
    except (OSError, ValueError, OverflowError):
        return ""


class FolderResults:
    """The results of each image of a folder, kept in memory until they are written."""

    def __init__(
        self, folder: Path, kinds: set[str], settings: dict[str, Any], overwrite: bool
    ) -> None:
        """Read the results of an earlier run, if there are any.

        Arguments:
          kinds: what to save, of RESULT_KINDS.
          settings: as make_settings returns them.
          overwrite: discard results of other settings.

        Raises UserError for results of other settings unless `overwrite` is set, and for a
        results.csv that this script has not written.
        """
        self.folder, self.kinds, self.settings = folder, kinds, settings
        self.rows = _read_rows(folder / RESULTS_FILE)  # by image name
        self.files = {image: _files_in(rows) for image, rows in self.rows.items()}  # of each image
        # Existing COCO files are kept up to date, whether or not this run asks for them
        self.coco = coco_files(folder, is_forced="coco" in kinds)
        self.is_written, self.written_at, self.writing_took = True, time.monotonic(), 0.0
        for row in (row for rows in self.rows.values() for row in rows if not row["error"]):
            row["status"] = row["status"] or self._status(row["prompt"])
        if self.rows and (changed := self._changed_setting()):
            if not overwrite:
                raise UserError(
                    f"{folder / RESULTS_FILE} was made with another {changed}; choose another "
                    "--output, or add --overwrite to redo all images"
                )
            self.forget(list(self.rows))

    def _changed_setting(self) -> str | None:
        """Return the name of the first setting that differs from the earlier run's, or None."""
        try:
            earlier = EARLIER_SETTINGS | json.loads(read_file(self.folder / SETTINGS_FILE))
            return next((key for key in self.settings if earlier[key] != self.settings[key]), None)
        except (UserError, ValueError, KeyError, TypeError):
            return None  # a missing or damaged settings.json does not stop a run

    def is_done(self, image: FolderImage, prompts: dict[str, Prompt] | None) -> bool:
        """Return whether an image has all its files and rows, for these prompts if given."""
        rows = self.rows.get(image.name, [])
        if not rows or any(row.get("error") for row in rows) or self.is_replaced(image):
            return False
        given = [(row["object"], row["prompt"]) for row in rows]
        if prompts and given != [(name, prompt_text(prompt)) for name, prompt in prompts.items()]:
            return False
        names = file_names(image.stem, self.kinds, [bool(row["box"]) for row in rows])
        files = {name for object_names in names for name in object_names.values()}
        coco = self.coco if "coco" in self.kinds else ()
        is_in_coco = all(image.name in file.entries for file in coco)
        return is_in_coco and all((self.folder / name).is_file() for name in files)

    def is_replaced(self, image: FolderImage) -> bool:
        """Return whether an image's file has changed since it was segmented."""
        times = {row.get("image_time") for row in self.rows.get(image.name, [])} - {"", None}
        return bool(times) and times != {image_time(image.path)}

    def drop_gone(self, there: Iterable[str]) -> list[str]:
        """Drop the results of images that are gone, and return their names.

        Their files are moved to GONE_FOLDER, as objects may have been clicked on by hand.
        there: the names of all images that are not gone, whether this run segments them or not.
        """
        gone = sorted(self.files.keys() - set(there))
        for name in gone:
            for file in self.files.pop(name):
                if (self.folder / file).is_file():
                    (self.folder / GONE_FOLDER).mkdir(exist_ok=True)
                    (self.folder / file).replace(self.folder / GONE_FOLDER / file)
        if gone:
            self.forget(gone)
        return gone

    def _status(self, prompt: str) -> str:
        """Return how an object with this prompt was found: by a person or without one."""
        return "clicked" if prompt and not self.settings[RULE_SETTING] else "automatic"

    def forget(self, images: list[str]) -> None:
        """Drop the rows and COCO entries of images that will be redone."""
        for image in images:
            self.rows.pop(image, None)
            for file in self.coco:
                file.entries.pop(image, None)
        self.is_written = False
        self.write()

    def add(self, image: FolderImage, values: np.ndarray, objects: list[SegmentedObject]) -> None:
        """Write the files of an image, HxWx3 uint8 RGB, and add a row for each object."""
        names = write_files(self.folder, image.stem, values, objects, self.kinds)
        self._replace_files(image, {file for files in names for file in files.values()})
        for file in self.coco:
            file.put(image.name, objects)
        coco_names = [file.path.name for file in self.coco]
        height, width = values.shape[:2]
        shared = {
            "image_size": f"{width}x{height}",
            "image_time": image_time(image.path),
            "model_sha256": self.settings["model"],
        }
        self.rows[image.name] = [
            {
                "object": found.name,
                "status": self._status(prompt_text(found.prompt)),
                "prompt": prompt_text(found.prompt),
                "score": f"{found.score:.4f}",
                "area": str(found.mask.sum()),
                "box": " ".join(map(str, mask_box(found.mask))) if found.mask.any() else "",
                "files": ";".join([*object_names.values(), *coco_names]),
                **shared,
            }
            for found, object_names in zip(objects, names, strict=True)
        ]
        self.is_written = False

    def fail(self, image: FolderImage, reason: str) -> None:
        """Add a row with the reason why an image failed, and remove its earlier results."""
        self._replace_files(image, set())
        for file in self.coco:
            file.entries.pop(image.name, None)
        self.rows[image.name] = [{"error": reason}]
        self.is_written = False

    def _replace_files(self, image: FolderImage, files: set[str]) -> None:
        """Remove an image's earlier files, except the new ones."""
        for old in self.files.get(image.name, set()) - files:
            (self.folder / old).unlink(missing_ok=True)
        self.files[image.name] = files

    def write(self, after_seconds: float = 0) -> None:
        """Write the tables if anything is new and the last write is so many seconds ago.

        With after_seconds, writing takes WRITING_SHARE of the time at most, however long it takes.
        """
        if after_seconds:
            after_seconds = max(after_seconds, self.writing_took / WRITING_SHARE)
        started = time.monotonic()
        if self.is_written or started - self.written_at < after_seconds:
            return
        with atomic_write(self.folder / SETTINGS_FILE) as temporary:
            temporary.write_text(json.dumps(self.settings), encoding="utf-8")
        for file in self.coco:  # before results.csv, whose rows mark an image as done
            file.write()
        lines = [
            [image, *(row.get(column, "") for column in RESULT_COLUMNS[1:])]
            for image, rows in sorted(self.rows.items())
            for row in rows
        ]
        write_csv(self.folder / RESULTS_FILE, RESULT_COLUMNS, lines)
        self.is_written, self.written_at = True, time.monotonic()
        self.writing_took = self.written_at - started

    def close(self) -> None:
        """Write what is new, for contextlib.closing: also when a run fails or is interrupted."""
        self.write()


def _read_rows(file: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows of results.csv by image name; cells that an earlier version lacks are ""."""
    found: dict[str, list[dict[str, str]]] = {}
    if not file.is_file():
        return found
    foreign = (
        f"{file} has other columns, so this script has not written it; choose another --output"
    )
    try:
        for cells in read_table(file, EARLIER_COLUMNS):
            if not set(EARLIER_COLUMNS) <= cells.keys() <= set(RESULT_COLUMNS):
                raise UserError(foreign)
            row = dict.fromkeys(RESULT_COLUMNS, "") | cells
            found.setdefault(without_apostrophe(row.pop("image")), []).append(row)
    except UserError as error:
        raise UserError(foreign) from error
    for rows in found.values():
        for row in rows:
            row["object"] = without_apostrophe(row["object"])
    return found


def _files_in(rows: list[dict[str, str]]) -> set[str]:
    """Return the result files of one image that its rows name; COCO files are shared by all."""
    names = {name for row in rows for name in row["files"].split(";")}
    return {name for name in names if name.endswith(IMAGE_ENDINGS) and Path(name).name == name}
