"""Finding the image files that annotations name, and the split that folders and files name."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NoReturn
from urllib.parse import unquote

from sam2_utils import UserError

from finetuning.annotations.formats import MOST_ERRORS, Entry
from finetuning.annotations.outlines import AnnotatedImage
from finetuning.basics.command_line import brief, brief_path, listed, nfc
from finetuning.basics.files import SPLIT_NAMES
from finetuning.basics.image_files import IMAGE_SUFFIXES

# Folders of annotations, which lie beside one called images
LABEL_FOLDERS = ("labels", "annotations")
# What tools write around the name of a split: train2017, train_images, CVAT's obj_train_data
AROUND_SPLIT = re.compile(r"^obj_|[-_ ]?(20\d\d|data|images|set)$")
NEAR = 2  # how many folders above a file may name its split


def split_of_folder(name: str) -> str | None:
    """Return "train", "val" or "test" if a folder is called so, as valid and train2017 are."""
    return SPLIT_NAMES.get(AROUND_SPLIT.sub("", name.casefold()))


def split_of_file(stem: str) -> str | None:
    """Return the one split that a file's name has as a word, as instances_val2017 has val."""
    words = {SPLIT_NAMES.get(word) for word in re.findall(r"[^\W\d_]+", stem.casefold())} - {None}
    return words.pop() if len(words) == 1 else None


def split_of_folders(folders: Iterable[str]) -> str | None:
    """Return the split that the last of some folders with such a name is called."""
    splits = [split for folder in folders if (split := split_of_folder(folder))]
    return splits[-1] if splits else None


def split_of_source(entry: Entry) -> str | None:
    """Return the split that an entry's annotation file or the folders near it name."""
    folders = entry.source.absolute().parts[:-1]
    of_list = split_of_file(entry.list_name) if entry.list_name else None
    return of_list or _split_of_json(entry) or split_of_folders(folders[-NEAR:])


def _split_of_json(entry: Entry) -> str | None:
    """Return the split in the name of a file of many images; train_1.json is of train_1.jpg."""
    stem = entry.source.stem
    is_shared = entry.file_name is not None and PurePath(entry.file_name).stem != stem
    return split_of_file(stem) if is_shared else None


def default_image_folder(path: Path, files: list[Path]) -> Path:
    """Return the folder of the images of annotation files at `path`, if the user names none.

    It is the folder "images" beside "labels", the folder of the annotations or, if that has no
    images, the one above. For the one file of a split it is the folder of that split.
    """
    folder = path if path.is_dir() else path.parent
    if files[0].suffix.lower() == ".txt" and (folder / "labels").is_dir():
        folder = folder / "labels"
    partner = Path(_swap_labels(folder.as_posix()))
    names_labels = folder.name.casefold() in (*LABEL_FOLDERS, "annotation", "ann", "json")
    places = [partner, folder, *([folder.absolute().parent] if names_labels else [])]
    places = [place for place in places if place.is_dir() and _has_images(place)] or [folder]
    found, split = places[0], split_of_file(files[0].stem)
    if len(files) == 1 and split:
        for parent in (found, found / "images"):
            inside = parent.iterdir() if parent.is_dir() else ()
            parts = [
                part for part in inside if part.is_dir() and split_of_folder(part.name) == split
            ]
            if len(parts) == 1 and _has_images(parts[0]):
                return parts[0]
    return found


def with_splits(images: list[AnnotatedImage]) -> list[AnnotatedImage]:
    """Set the split of each image: by the folders of images or, without any, by the sources."""
    # Only folders below the common one can be splits: all images may lie in a folder called train
    root = Path(os.path.commonpath([item.image.parent for item in images]))
    splits = [split_of_folders(item.image.parent.relative_to(root).parts) for item in images]
    if not any(splits):
        splits = [item.split for item in images]
        splits = splits if len(set(splits)) > 1 else [None] * len(images)
    return [item._replace(split=split) for item, split in zip(images, splits, strict=True)]


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def _swap_labels(path: str) -> str:
    """Replace the last "labels" or "annotations" in a path: labels/train becomes images/train."""
    parts = path.split("/")
    for number in reversed(range(len(parts))):
        if parts[number] in LABEL_FOLDERS:
            return "/".join([*parts[:number], "images", *parts[number + 1 :]])
    return path


class ImageFinder:
    """Finds image files below a folder, and only there, by the names in annotation files.

    bare: entries whose image was found by its name alone, although they name a folder.
    elsewhere: images of the right name but of another split, and what names the right split.
    """

    def __init__(self, folder: Path) -> None:
        """Index the images below `folder` by each tail of their path: b/a.jpg and a.jpg."""
        self.folder, self.root = folder, folder.resolve()
        self.beside = [path for path in self.root.parent.iterdir() if path.is_dir()]
        self.files: dict[str, Path] = {}
        self.by_tail: dict[str, list[str]] = {}
        self.bare: list[Entry] = []
        self.elsewhere: list[tuple[Path, Path | str]] = []
        for file in sorted(folder.rglob("*")):
            path = file.relative_to(folder)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if not is_image or is_hidden(path) or not file.is_file():
                continue
            name = nfc(path.as_posix())
            self.files[name] = file
            for tail in {*_tails(name), *_tails(name.removesuffix(path.suffix))}:
                self.by_tail.setdefault(tail, []).append(name)

    def find(self, entry: Entry) -> Path | None:
        """Return an entry's image: by its path, the end of its path, or the entry's file name.

        An image in the folder of another split than the entry names is not taken. Raises
        UserError if several images match.
        """
        found, tail = self._match(entry)
        if found is None:
            return None
        if self._contradicts(entry, found):
            of_split = entry.file_name if _named_split(entry) else entry.source
            self.elsewhere.append((self.files[found], of_split))
            return None
        named = (entry.file_name or "").replace("\\", "/").split("/")
        if "/" not in tail and named[-2:-1] not in ([], [self.root.name]):
            self.bare.append(entry)
        return self.files[found]

    def refuse_missing(self, missing: list[Entry], annotated: int) -> NoReturn:
        """Raise UserError: of a number of annotated images, some are missing."""
        names = listed([entry.file_name or entry.source.stem for entry in missing], MOST_ERRORS)
        hint = ""
        if self.elsewhere:
            file, of_split = map(brief_path, self.elsewhere[0])
            hint = f" ({file} is of another split than {of_split})"
        skip = ", or leave them out with --skip-missing" if len(missing) < annotated else ""
        raise UserError(
            f"{len(missing)} of {annotated} annotated images are not in {brief_path(self.folder)}: "
            f"{names}{hint}; name their folder (--annotations ... --images FOLDER){skip}"
        )

    def notes(self, files: list[Path], count: int) -> list[str]:
        """Return what is said about how `count` images of annotation files were found."""
        notes = []
        if self.bare:
            source, name = brief(self.bare[0].source.name), brief_path(self.bare[0].file_name)
            notes.append(
                f"{len(self.bare)} of {count} images were found by their names alone: "
                f"{source} names other folders ({name})"
            )
        of_file, of_folder = split_of_file(files[0].stem), split_of_folders([self.root.name])
        if len(files) == 1 and count > 1 and of_file and of_folder not in (None, of_file):
            name, folder = brief(files[0].name), brief_path(self.folder)
            notes.append(f"warning: {name} is read with the images in {folder}")
        return notes

    def _match(self, entry: Entry) -> tuple[str | None, str]:
        """Return the name of the image that fits best, and the end of its path that decided."""
        own_name = entry.source.with_suffix("").absolute().as_posix()
        names = [_swap_labels(own_name), own_name]
        if entry.file_name is not None:
            if beside := self._beside(entry):
                return beside, f"/{beside}"
            plain = unquote(entry.file_name.partition("?")[0])
            # Label Studio prefixes the names of uploads with 8 hexadecimal digits
            original = re.sub(r"^(.*[/\\])?[0-9a-f]{8}-", "", plain)
            names = [entry.file_name, plain, unquote(entry.file_name), original, *names]
        # The names go from the literal one to guesses; the longest tail that fits decides
        for name in names:
            name = nfc(name).replace("\\", "/")
            if name in self.files:
                return name, f"/{name}"
            for tail in _tails(name):
                found = self._nearest(self.by_tail.get(tail, []), entry)
                if len(found) > 1:
                    folder, source = (brief_path(p) for p in (self.folder, entry.source))
                    raise UserError(
                        f"{brief(found[0])} and {brief(found[1])} in {folder} could both be "
                        f"{brief(name)} of {source}; rename or remove one"
                    )
                if found:
                    return found[0], tail
        return None, ""

    def _beside(self, entry: Entry) -> str | None:
        """Return the image that the entry's path names as seen from its annotation file."""
        source = _resolved(entry.source)
        if not source.is_relative_to(self.root):
            return None
        start = source.parent.relative_to(self.root).as_posix()
        for place in (_swap_labels(start), start):
            name = posixpath.normpath(f"{place}/{nfc(entry.file_name)}".replace("\\", "/"))
            if name in self.files:
                return name
        return None

    def _nearest(self, names: list[str], entry: Entry) -> list[str]:
        """Return those of several images that are in the entry's split, and nearest to its file."""
        if len(names) < 2:
            return names
        if split := _named_split(entry) or split_of_source(entry):
            names = [name for name in names if split_of_folders(_folders(name)) == split] or names
        source = _resolved(entry.source).parts
        shared = [_shared(source, (self.root / name).parts) for name in names]
        return [name for name, count in zip(names, shared, strict=True) if count == max(shared)]

    def _contradicts(self, entry: Entry, name: str) -> bool:
        """Return whether an image is in the folder of another split than its annotations."""
        below = split_of_folders(_folders(name))
        if named := _named_split(entry):
            return (below or split_of_folders(self.root.parts[-NEAR:])) not in (None, named)
        # Only folders below the common one count: all may lie in a folder called test
        image, source = (self.root / name).parts[:-1], _resolved(entry.source).parts[:-1]
        common = _shared(image, source)
        of_image, of_source = (split_of_folders(parts[common:]) for parts in (image, source))
        of_file = _split_of_json(entry)
        if of_file and not below and split_of_folder(self.root.name) not in (None, of_file):
            # instances_train.json with the folder val/, and train/ beside it has the image, too
            beside = [part for part in self.beside if split_of_folder(part.name) == of_file]
            return any((part / name).is_file() for part in beside)
        pairs = ((of_image, of_source), (below, of_file))
        return any(split and other and split != other for split, other in pairs)


@functools.lru_cache
def _resolved(path: Path) -> Path:
    return path.resolve()


def _named_split(entry: Entry) -> str | None:
    """Return the split that the folders in an entry's own name of its image name."""
    return split_of_folders(_folders((entry.file_name or "").replace("\\", "/"))[-NEAR:])


def _shared(path: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts two paths share from their beginning."""
    pairs = zip(path, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]


def _tails(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
