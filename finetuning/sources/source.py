"""Where the examples of a data set come from, and the options for it."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.annotations.coco_format import table_columns
from finetuning.annotations.reading import holds_annotations, read_annotations
from finetuning.basics.command_line import ArgumentParser, brief_path, listed
from finetuning.basics.files import (
    DATASET_SHA256,
    DATASET_URL,
    content_sha256,
    download_file,
    lies_in,
)
from finetuning.sources.archives import open_archive, unpacked
from finetuning.sources.pair_tables import read_pairs_file
from finetuning.sources.pairing import (
    Found,
    UnnamedExample,
    find_examples,
    find_in_folder,
    to_examples,
)
from finetuning.sources.volume_pairs import EMPTY_SHARE, NO_OPTIONS, SliceFolder, VolumeOptions

KVASIR_FILE = "kvasir-seg.zip"  # in the data folder
ANNOTATION_SUFFIXES = (".json", ".txt", ".csv")
MASKS_HAVE_NO_CLASSES = "these are masks, without classes; leave --class-name out"


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
    skip_missing: bool = False
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
        """The choices besides paths, by name."""
        chosen = {"class_names": list(self.class_names), "bands": list(self.volumes.bands)}
        chosen |= {name: getattr(self, name) for name in ("skip_unlabelled", "skip_missing")}
        chosen = {name: value for name, value in chosen.items() if value}
        if self.volumes.empty_share != EMPTY_SHARE:
            chosen["empty_share"] = self.volumes.empty_share
        return chosen

    def paths(self, data: Path) -> dict[str, Path]:
        """Return the files and folders of the source by option; `data` is the folder to fill."""
        names = ("archive", "images", "masks", "annotations", "pairs")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name)}
        return chosen or {"archive": data / KVASIR_FILE}

    def check_apart(self, data: Path) -> None:
        """Raise UserError if the folder to fill contains a source folder, or lies in one.

        An archive may lie in it, as Kvasir-SEG's does, or be a folder around it.
        """
        for folder in filter(None, (self.images, self.masks, self.annotations)):
            if lies_in(folder, data):
                raise UserError(f"{folder} is or lies inside {data}; use another --data folder")
        for folder in filter(None, (self.images, self.masks, self.annotations, self.archive)):
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
        run_lengths = self.pairs if self.pairs and table_columns(self.pairs) else None
        if annotations := self.annotations or run_lengths:
            with unpacked(annotations) as path:
                yield self._find_annotated(path)
        elif self.pairs:
            if self.class_names:
                raise UserError(MASKS_HAVE_NO_CLASSES)
            yield read_pairs_file(self.pairs, self.images, self.masks, slices)
        elif self.images:
            yield find_examples(self.images, self.masks, self.skip_unlabelled, slices)
        else:
            archive = self.archive or fetch_archive(data / KVASIR_FILE)
            with self._find_in(archive, slices) as found:
                yield found

    @contextlib.contextmanager
    def _find_in(self, archive: Path, slices: SliceFolder) -> Iterator[Found]:
        """Yield the examples of a folder or zip: images and masks or, without any, annotations."""
        with contextlib.ExitStack() as opened:
            root = archive if archive.is_dir() else opened.enter_context(open_archive(archive))
            try:
                with_slices = slices if archive.is_dir() else None
                found = find_in_folder(root, self.skip_unlabelled, with_slices)
                if self.class_names:
                    raise UserError(MASKS_HAVE_NO_CLASSES)
            except UserError as error:
                names = [] if archive.is_dir() else root.root.namelist()
                if names and not any(name.lower().endswith(ANNOTATION_SUFFIXES) for name in names):
                    raise  # without unpacking it all
                folder = opened.enter_context(unpacked(archive, root))
                if not _may_hold_annotations(folder):
                    raise error
                found = self._find_annotated(folder)
            yield found

    def _find_annotated(self, path: Path) -> Found:
        return find_annotated(
            path, self.images, self.class_names, self.skip_unlabelled, self.skip_missing
        )


def _may_hold_annotations(folder: Path) -> bool:
    """Return whether a folder holds annotations; not if one of its files cannot be read."""
    try:
        return holds_annotations(folder)
    except UserError:
        return False


def find_annotated(
    path: Path,
    images: Path | None,
    class_names: tuple[str, ...],
    skip_unlabelled: bool,
    skip_missing: bool = False,
) -> Found:
    """Return the examples of an annotation tool's export, with notes on it."""
    read = read_annotations(path, images, class_names, skip_missing)
    notes, total = read.notes, read.image_count
    if read.unlabelled and not skip_unlabelled:
        raise UserError(
            f"{len(read.unlabelled)} of {total} images have no object in {brief_path(path)}: "
            f"{listed(read.unlabelled, 10)}; leave them out with --skip-unlabelled"
        )
    if read.unlabelled:
        notes.append(f"left out {len(read.unlabelled)} of {total} images: without an object")
    unnamed = [
        UnnamedExample(item.image, (), item.image.parent.name, item.split, item)
        for item in read.images
    ]
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
    source.add_argument(
        "--archive", type=Path, help="a zip or a folder with images and masks, or annotations"
    )
    source.add_argument("--images", type=Path, help="a folder of images")
    source.add_argument("--masks", type=Path, help="the folder of their masks")
    source.add_argument(
        "--pairs",
        type=Path,
        help="a table with columns image,mask, if names do not match; or ImageId,EncodedPixels",
    )
    source.add_argument(
        "--annotations",
        type=Path,
        help="a COCO file, or a folder or zip of COCO, SA-1B, YOLO or labelme files",
    )
    source.add_argument(
        "--class-name", action="append", default=[], help="only this class; may be repeated"
    )
    source.add_argument(
        "--skip-unlabelled", action="store_true", help="leave out images without a mask"
    )
    source.add_argument(
        "--skip-missing", action="store_true", help="leave out annotations without an image"
    )
    source.add_argument("--demo", action="store_true", help="draw a demo data set in data/demo")
