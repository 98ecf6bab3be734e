"""The results of a folder: its files, and results.csv, by which a later run goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
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
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.inference.coco_files import coco_files
from finetuning.inference.result_files import Segmented, file_names, remove_others, write_files
from finetuning.model.automatic import Rule
from finetuning.model.prompts import Prompt, mask_box, prompt_text

COLUMNS = ("image", "object", "prompt", "score", "area", "box", "files", "error")
TABLE, SETTINGS = "results.csv", "settings.json"


class FolderImage(NamedTuple):
    """An image of a folder.

    name: the file's, as tables show it. stem: what the names of its results begin with.
    """

    path: Path
    name: str
    stem: str


def list_images(folder: Path) -> list[FolderImage]:
    """Return the images in a folder, not in those below it, by name.

    Where two differ only in suffix or case, the names of their results keep the suffix.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not (path.name.startswith(".") or path.is_dir())
    )
    if not paths:
        raise UserError(f"no images in {folder}; expected files like name.jpg or name.png")
    taken = Counter(path.stem.casefold() for path in paths)
    taken.update(path.name.casefold() for path in paths)  # a.jpg.png is not to meet a.jpg
    stems = [path.stem if taken[path.stem.casefold()] == 1 else path.name for path in paths]
    return [
        FolderImage(path, printable(path.name), stem)
        for path, stem in zip(paths, stems, strict=True)
    ]


def printable(name: str) -> str:
    """Return a file's name as it can be written in UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def settings_of(
    folder: Path,
    checkpoint: Path,
    value_range: tuple[float, float] | None,
    trained_range: tuple[float, float] | None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """Return what all results of a folder depend on, in plain values.

    rule: by which objects are found without a prompt, if they are.
    """
    return {
        "folder": str(folder.resolve()),
        "model": content_sha256(checkpoint),
        "value range": list(value_range or trained_range or ()),
        "way of finding objects": list(rule or ()),
    }


class Results:
    """What is known of each image of a folder; it is kept in memory until it is written."""

    def __init__(
        self, folder: Path, kinds: set[str], settings: dict[str, Any], starts_anew: bool
    ) -> None:
        """Read what an earlier run has left in a folder.

        kinds: of KINDS, what is saved. settings: plain values on which all results depend; those
        of others are left out where this run starts anew, else refused with a UserError, as is a
        results.csv that was not written here.
        """
        self.folder, self.kinds, self.settings = folder, kinds, settings
        self.rows = _read_rows(folder / TABLE)
        self.earlier = {image: len(rows) for image, rows in self.rows.items()}
        self.coco = coco_files(folder) if "coco" in kinds else []
        self.is_written, self.written_at = True, time.monotonic()
        if self.rows and (other := self._other_setting()):
            if not starts_anew:
                raise UserError(
                    f"{folder / TABLE} is of another {other}; choose another --output, or add "
                    "--overwrite to do all images again"
                )
            self.forget(list(self.rows))

    def _other_setting(self) -> str | None:
        """Return the name of a setting that is not that of the results, if these are known."""
        try:
            earlier = json.loads(read_file(self.folder / SETTINGS))
            earlier.setdefault("way of finding objects", [])  # of an earlier version
            return next((key for key in self.settings if earlier[key] != self.settings[key]), None)
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_done(self, image: FolderImage, prompts: dict[str, Prompt] | None) -> bool:
        """Say whether an image has its files and its rows, by these prompts if they are known."""
        rows = self.rows.get(image.name, [])
        if not rows or any(row.get("error") for row in rows):
            return False
        given = [(row["object"], row["prompt"]) for row in rows]
        if prompts and given != [(name, prompt_text(prompt)) for name, prompt in prompts.items()]:
            return False
        names = file_names(image.stem, self.kinds, [bool(row["box"]) for row in rows])
        files = {name for of_object in names for name in of_object.values()}
        is_in_coco = all(image.name in file.entries for file in self.coco)
        return is_in_coco and all((self.folder / name).is_file() for name in files)

    def forget(self, images: list[str]) -> None:
        """Leave out what is known of images, which are to be done again."""
        for image in images:
            self.rows.pop(image, None)
            for file in self.coco:
                file.entries.pop(image, None)
        self.is_written = False
        self.write()

    def add(self, image: FolderImage, values: np.ndarray, objects: list[Segmented]) -> None:
        """Write the files of an image, HxWx3 uint8 RGB, and keep a row of each of its objects."""
        names = write_files(self.folder, image.stem, values, objects, self.kinds)
        if image.name in self.earlier:
            remove_others(self.folder, image.stem, names, self.earlier[image.name])
        for file in self.coco:
            file.put(image.name, objects)
        self.rows[image.name] = [
            {
                "object": found.name,
                "prompt": prompt_text(found.prompt),
                "score": f"{found.score:.4f}",
                "area": str(found.mask.sum()),
                "box": " ".join(map(str, mask_box(found.mask))) if found.mask.any() else "",
                "files": ";".join([*of_object.values(), *(file.path.name for file in self.coco)]),
            }
            for found, of_object in zip(objects, names, strict=True)
        ]
        self.is_written = False

    def fail(self, image: FolderImage, reason: str) -> None:
        """Keep why an image has no results, and remove those of an earlier run."""
        remove_others(self.folder, image.stem, [], self.earlier.get(image.name, 0))
        for file in self.coco:
            file.entries.pop(image.name, None)
        self.rows[image.name] = [{"error": reason}]
        self.is_written = False

    def write(self, after_seconds: float = 0) -> None:
        """Write the tables, if there is anything new and the last time is so long ago."""
        if self.is_written or time.monotonic() - self.written_at < after_seconds:
            return
        with atomic_write(self.folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(self.settings), encoding="utf-8")
        for file in self.coco:  # before the rows, by which an image is done
            file.write()
        lines = [
            [image, *(row.get(column, "") for column in COLUMNS[1:])]
            for image, rows in sorted(self.rows.items())
            for row in rows
        ]
        write_csv(self.folder / TABLE, COLUMNS, lines)
        self.is_written, self.written_at = True, time.monotonic()

    def close(self) -> None:
        """Write what is new, however the run ends."""
        self.write()


def _read_rows(file: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each image in results.csv."""
    found: dict[str, list[dict[str, str]]] = {}
    if not file.is_file():
        return found
    foreign = f"{file} has other columns: it is not of this script; choose another --output"
    try:
        for row in read_table(file, COLUMNS):
            if row.keys() != set(COLUMNS):
                raise UserError(foreign)
            found.setdefault(without_apostrophe(row.pop("image")), []).append(row)
    except UserError as error:
        raise UserError(foreign) from error
    for rows in found.values():
        for row in rows:
            row["object"] = without_apostrophe(row["object"])
    return found
