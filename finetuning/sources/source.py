"""Where the examples of a data set come from, and the options for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import ArgumentParser, brief, listed
from finetuning.basics.files import (
    DATASET_SHA256,
    DATASET_URL,
    content_sha256,
    download_file,
    lies_in,
)
from finetuning.sources.annotations import read_annotations
from finetuning.sources.archives import open_archive
from finetuning.sources.folder_layouts import SPLIT_NAMES
from finetuning.sources.pairing import (
    Found,
    UnnamedExample,
    find_examples,
    find_in_folder,
    read_pairs_file,
    to_examples,
)
from finetuning.sources.volume_pairs import EMPTY_SHARE, NO_OPTIONS, SliceFolder, VolumeOptions


@dataclass(frozen=True)
class Source:
    """Where examples come from: an archive, folders, annotations, a table, or drawings."""

    archive: Path | None = None
    images: Path | None = None
    masks: Path | None = None
    annotations: Path | None = None
    pairs: Path | None = None
    demo: bool = False
    class_names: tuple[str, ...] = ()
    skip_unlabelled: bool = False
    volumes: VolumeOptions = NO_OPTIONS

    @property
    def name(self) -> str | None:
        """What identifies the source; None if the user has not chosen one."""
        if self.demo:
            return "demo"
        chosen = self.pairs or self.annotations or self.images or self.archive
        return str(chosen.resolve()) if chosen else None

    @property
    def options(self) -> dict[str, Any]:
        """The other choices, by name."""
        chosen = {name: getattr(self, name) for name in ("images", "masks") if getattr(self, name)}
        chosen = {name: str(path.resolve()) for name, path in chosen.items()}
        if self.class_names:
            chosen["class_names"] = list(self.class_names)
        if self.skip_unlabelled:
            chosen["skip_unlabelled"] = True
        if self.volumes.bands:
            chosen["bands"] = list(self.volumes.bands)
        if self.volumes.empty_share != EMPTY_SHARE:
            chosen["empty_share"] = self.volumes.empty_share
        return chosen

    def check_apart(self, data: Path) -> None:
        """Raise UserError if the folder to fill contains a source folder, or lies in one.

        An archive may lie in it, as Kvasir-SEG's does, or be a folder around it.
        """
        for folder in filter(None, (self.images, self.masks, self.annotations)):
            if lies_in(folder, data):
                raise UserError(f"{folder} is or lies inside {data}; use another --data folder")
        for folder in filter(None, (self.images, self.masks, self.archive)):
            if lies_in(data, folder) and (folder != self.archive or lies_in(folder, data)):
                raise UserError(f"{data} is or lies inside {folder}; use another --data folder")

    @contextlib.contextmanager
    def find(self, data: Path) -> Iterator[Found]:
        """Yield the examples while an archive is open; without a source, fetch Kvasir-SEG's.

        The slices of volumes are in a temporary folder meanwhile, which errors do not name.
        """
        folder = Path(tempfile.gettempdir(), f"sam2-slices-{uuid.uuid4().hex}")
        try:
            with self._find(data, SliceFolder(folder, self.volumes)) as found:
                yield found
        except UserError as error:
            place = re.escape(str(folder)) + r"[\\/]\d+[\\/]"
            raise UserError(re.sub(place, "", str(error))) from error
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _find(self, data: Path, slices: SliceFolder) -> Iterator[Found]:
        if self.pairs:
            yield read_pairs_file(self.pairs, self.images, self.masks, slices)
        elif self.annotations:
            yield find_annotated(
                self.annotations, self.images, self.class_names, self.skip_unlabelled
            )
        elif self.images:
            yield find_examples(self.images, self.masks, self.skip_unlabelled, slices)
        elif self.archive and self.archive.is_dir():
            yield find_in_folder(self.archive, self.skip_unlabelled, slices)
        else:
            archive = self.archive or fetch_archive(data / "kvasir-seg.zip")
            with open_archive(archive) as root:
                yield find_in_folder(root, self.skip_unlabelled)


def find_annotated(
    file: Path, images: Path | None, class_names: tuple[str, ...], skip_unlabelled: bool
) -> Found:
    """Return the examples of an annotation tool's export, with notes on it."""
    read = read_annotations(file, images, class_names)
    classes = ", ".join(f"{brief(name)} {count}" for name, count in sorted(read.counts.items()))
    notes = [f"{read.format}: {sum(read.counts.values())} objects ({classes})"]
    notes += [f"left out {count} {what}" for what, count in read.left_out.items()]
    if read.unlabelled and not skip_unlabelled:
        raise UserError(
            f"images without an object in {file}: {listed(read.unlabelled)}; "
            "leave them out with --skip-unlabelled"
        )
    if read.unlabelled:
        notes.append(f"left out {len(read.unlabelled)} without an object")
    # Only folders below the common one can be splits: all images may lie in a folder called train
    root = Path(os.path.commonpath([item.image.parent for item in read.images]))
    unnamed = []
    for item in read.images:  # in train/, valid/ and test/, as in YOLO's exports
        parts = item.image.relative_to(root).parts[:-1]
        splits = [SPLIT_NAMES[part.casefold()] for part in parts if part.casefold() in SPLIT_NAMES]
        split = splits[0] if splits else None
        unnamed.append(UnnamedExample(item.image, (), item.image.parent.name, split, item))
    return to_examples(unnamed, notes, skip_unlabelled)


def fetch_archive(path: Path) -> Path:
    """Return the path of Kvasir-SEG's archive, downloading it if it is missing or damaged."""
    if not path.is_file() or content_sha256(path) != DATASET_SHA256:
        by_hand = "download it with a browser and run again with --archive FILE.zip"
        download_file(DATASET_URL, path, DATASET_SHA256, by_hand)
    return path


def add_source_options(parser: ArgumentParser) -> None:
    """Add the options that say where the examples come from."""
    source = parser.add_argument_group("where the pairs come from")
    source.add_argument("--archive", type=Path, help="a zip or a folder with images and masks")
    source.add_argument("--images", type=Path, help="a folder of images")
    source.add_argument("--masks", type=Path, help="the folder of their masks")
    source.add_argument(
        "--pairs", type=Path, help="a table with columns image,mask, if names do not match"
    )
    source.add_argument(
        "--annotations", type=Path, help="a COCO file, or a folder of YOLO or labelme files"
    )
    source.add_argument(
        "--class-name", action="append", default=[], help="only this class; may be repeated"
    )
    source.add_argument(
        "--skip-unlabelled", action="store_true", help="leave out images without a mask"
    )
    source.add_argument("--demo", action="store_true", help="draw a demo data set in data/demo")
