"""Notice what has changed in the sources of a data folder since it was filled.

    data/sources.json   each source: its paths and options, digests of the listing of its files, and
                        for each example its place in the data folder and the stamps of its files

If a source's listing (names, sizes, times; the content of text files) is unchanged, nothing else is
read. Otherwise its examples are compared, by content where only the time of a file differs, so that
a folder that was copied or moved is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import nfc
from finetuning.basics.files import content_sha256, read_file
from finetuning.dataset.splitting import LEFT_OUT
from finetuning.sources.folder_layouts import IGNORED
from finetuning.sources.pairing import SourceExample

SOURCES_FILE = "sources.json"  # beside split.json, which holds its SHA-256
SOURCES_KEY = "sources_sha256"  # of that hash in split.json
TEMPORARY_PREFIXES = ("finetuning-", "sam2-")  # of the names of temporary folders of a run
TEXT_SUFFIXES = (".csv", ".json", ".tsv", ".txt", ".xml", ".yaml", ".yml")  # compared by content


class Stamp(NamedTuple):
    """What identifies the content of a file."""

    size: int
    time: int  # of the last change, in ns; for a member of an archive its CRC, for outlines 0
    sha256: str


class Row(NamedTuple):
    """What a data folder's record says of one example."""

    place: str  # SPLIT/NAME in the data folder
    image: Stamp
    masks: tuple[Stamp, ...]  # of the mask files, or one of the outlines


class Record(NamedTuple):
    """One source of a data folder."""

    paths: dict[str, str]  # by option: absolute paths of the source, and of the table of groups
    folders: list[str]  # other folders that hold files of the source, from folders_beside
    options: dict[str, Any]
    listing: str  # digest of the names and sizes of its files, and of the content of text files
    times: str  # digest of the times of the other files
    groups: str | None  # SHA-256 of the table of groups
    rows: dict[str, Row]  # by key_of the example


class Match(NamedTuple):
    """An example, and the row that records its image; None if it is new."""

    example: SourceExample
    key: str | None
    row: Row | None
    image_changed: bool = False
    masks_changed: bool = False

    @property
    def is_new(self) -> bool:
        return self.row is None

    @property
    def is_left_out(self) -> bool:
        """Whether it is a frame between two splits of a recording, which no split has."""
        return self.row is not None and self.row.place.startswith(f"{LEFT_OUT}/")

    @property
    def is_changed(self) -> bool:
        return self.image_changed or self.masks_changed


def key_of(example: SourceExample) -> str:
    """Return SPLIT/NAME of an example in its source, where the split may be empty."""
    return f"{example.split or ''}/{example.name}"


# Stamps


def stamp_file(path: Path, sha256: str = "") -> Stamp:
    """Return the stamp of a file, or of a member of a zip archive (zipfile.Path)."""
    if isinstance(path, zipfile.Path):
        member = path.root.getinfo(path.at)
        return Stamp(member.file_size, member.CRC, sha256)
    facts = path.stat()
    return Stamp(facts.st_size, facts.st_mtime_ns, sha256)


def stamp_outlines(annotated: Any) -> Stamp:
    """Return the stamp of the outlines of an image, wherever their files are."""
    digest = hashlib.sha256()
    _add_to_digest(digest, annotated)
    return Stamp(0, 0, digest.hexdigest())


def _add_to_digest(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        _add_to_digest(digest, sorted(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add_to_digest(digest, item)
    elif is_dataclass(value):
        _add_to_digest(digest, vars(value))
    elif not isinstance(value, Path):
        digest.update(repr(value).encode("utf-8", "surrogateescape"))


def _sha256(path: Path) -> str:
    if isinstance(path, Path):
        return content_sha256(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_same(stamp: Stamp, path: Path) -> bool:
    now = stamp_file(path)
    return now[:2] == stamp[:2] or (now.size == stamp.size and _sha256(path) == stamp.sha256)


def _are_same_masks(row: Row, example: SourceExample) -> bool:
    if example.annotated is not None:
        return row.masks == (stamp_outlines(example.annotated),)
    same_count = len(row.masks) == len(example.masks)
    return same_count and all(map(_is_same, row.masks, example.masks))


def new_row(place: str, example: SourceExample) -> Row:
    """Return the row of an example, from its files as they are now."""
    masks = tuple(stamp_file(mask, _sha256(mask)) for mask in example.masks)
    if example.annotated is not None:
        masks = (stamp_outlines(example.annotated),)
    return Row(place, stamp_file(example.image, _sha256(example.image)), masks)


# The record in the data folder


def take_record(
    paths: dict[str, Path], folders: list[str], options: dict[str, Any], data: Path
) -> Record:
    """Return the record of a source, as yet without examples.

    Arguments:
      paths: of the source and the table of groups, by option.
      folders: from folders_beside.
      data: the folder to fill, whose files do not count.
    """
    listing, times = hashlib.sha256(), hashlib.sha256()
    roots = [(option, path, True) for option, path in sorted(paths.items())]
    roots += [(folder, Path(folder), False) for folder in folders]
    for label, root, with_folders in roots:
        for name, path, facts in sorted(_list_files(root, data.resolve(), with_folders)):
            listing.update(f"{label}/{name}\0{facts.st_size}\n".encode("utf-8", "surrogateescape"))
            if path.lower().endswith(TEXT_SUFFIXES):
                listing.update(content_sha256(Path(path)).encode())
            else:
                times.update(f"{facts.st_mtime_ns}\n".encode())
    table = paths.get("groups")
    return Record(
        {option: str(path.resolve()) for option, path in paths.items()},
        folders,
        options,
        listing.hexdigest(),
        times.hexdigest(),
        content_sha256(table) if table and table.is_file() else None,
        {},
    )


def folders_beside(paths: dict[str, Path], examples: Sequence[SourceExample]) -> list[str]:
    """Return the folders of images and masks that are not in one of the given paths, sorted.

    A table of pairs names files anywhere, and annotations may lie beside their images.
    """
    files = [path for example in examples for path in (example.image, *example.masks)]
    folders = {path.parent for path in files if isinstance(path, Path)}
    roots = [path.resolve() for path in paths.values()]
    beside = {folder.resolve() for folder in folders}
    return sorted(
        str(folder)
        for folder in beside
        if not (_is_temporary(folder) or any(map(folder.is_relative_to, roots)))
    )


def _is_temporary(folder: Path) -> bool:
    """Return whether a folder holds what was unpacked or sliced for this run."""
    place = Path(tempfile.gettempdir()).resolve()
    names = folder.relative_to(place).parts if folder.is_relative_to(place) else ()
    return bool(names) and names[0].startswith(TEMPORARY_PREFIXES)


def _list_files(
    root: Path, skipped: Path, with_folders: bool
) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield the path in `root`, the path and the facts of each file that is not hidden.

    with_folders: also in the folders inside.
    """
    if not root.is_dir():
        if root.exists():  # a missing file is refused, more precisely, by those who read it
            yield "", str(root), root.stat()
        return
    folders = [(str(root), "", {os.path.realpath(root)})]
    while folders:
        folder, inside, above = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = inside + nfc(entry.name)
                if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if with_folders and real not in above and real != str(skipped):
                        folders.append((entry.path, f"{name}/", above | {real}))
                elif entry.is_file():
                    yield name, entry.path, entry.stat()


def write_records(folder: Path, records: Sequence[Record]) -> str:
    """Write the records of a data folder; return the SHA-256 of the file."""
    text = json.dumps([record._asdict() for record in records], ensure_ascii=False)
    content = text.encode("utf-8", "surrogateescape")
    (folder / SOURCES_FILE).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_records(data: Path, facts: dict[str, Any]) -> list[Record] | None:
    """Return the records of a data folder; None if another version of this script filled it.

    facts: of its split.json. Raises UserError if the file does not match its hash.
    """
    if SOURCES_KEY not in facts:
        return None
    path = data / SOURCES_FILE
    content = read_file(path) if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != facts[SOURCES_KEY]:
        raise UserError(
            f"{path} is missing, damaged, or was edited; restore it, or fill the folder again with "
            "download_dataset.py --force"
        )
    records = json.loads(content.decode("utf-8", "surrogateescape"))
    if any(record.keys() != set(Record._fields) for record in records):
        return None  # of another version
    for record in records:
        for key, (place, image, masks) in record["rows"].items():
            record["rows"][key] = Row(place, Stamp(*image), tuple(Stamp(*mask) for mask in masks))
    return [Record(**record) for record in records]


# Comparing a source with its record


def match_examples(
    examples: Sequence[SourceExample], rows: Mapping[str, Row], others: Sequence[Row] = ()
) -> list[Match]:
    """Find the row of each example: of the same name and content, the same content, or the name.

    rows: of the same source, by key_of. others: of other sources. A row is given to one example.
    """
    matches: dict[int, Match] = {}
    taken: set[str] = set()  # places

    def match(index: int, key: str | None, row: Row, image_changed: bool = False) -> None:
        taken.add(row.place)
        changed = not _are_same_masks(row, examples[index])
        matches[index] = Match(examples[index], key, row, image_changed, changed)

    for index, example in enumerate(examples):
        row = rows.get(key_of(example))
        if row and row.place not in taken and _is_same(row.image, example.image):
            match(index, key_of(example), row)
    by_content: dict[str, list[tuple[str | None, Row]]] = {}
    for key, row in [*rows.items(), *((None, row) for row in others)]:
        by_content.setdefault(row.image.sha256, []).append((key, row))
    left = [index for index in range(len(examples)) if index not in matches]
    for index in left:
        for key, row in by_content.get(_sha256(examples[index].image), ()):
            if row.place not in taken:
                match(index, key, row)
                break
    for index in left:
        key = key_of(examples[index])
        if index not in matches and key in rows and rows[key].place not in taken:
            match(index, key, rows[key], image_changed=True)
    return [
        matches.get(index) or Match(example, None, None) for index, example in enumerate(examples)
    ]


def gone_rows(matches: Sequence[Match], rows: Mapping[str, Row]) -> list[Row]:
    """Return the rows of a source that no example matches."""
    places = {match.row.place for match in matches if match.row}
    return [row for row in rows.values() if row.place not in places]
