"""Reading an annotation tool's export: the outlined objects of each image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import unquote

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief, brief_path, listed, nfc
from finetuning.basics.files import require_file
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.sources.annotation_formats import (
    BOXES,
    SUPPORTED_FORMATS,
    Entry,
    read_coco,
    read_json,
    read_labelme,
    read_yolo,
)
from finetuning.sources.outlines import Outline, draw_outline, refuse_size

OTHER_CLASSES = "objects of other classes"
NOT_ANNOTATIONS = {"classes.txt", "notes.json"}  # Label Studio writes these beside them


class AnnotatedImage(NamedTuple):
    """An image file and the outlines of its objects.

    size: (H,W) stated in the annotation file, or None.
    source: the annotation file.
    has_fractions: polygons are in fractions of the image, not in pixels.
    """

    image: Path
    outlines: list[Outline]
    size: tuple[int, int] | None
    source: Path
    has_fractions: bool = False

    def masks(self, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the HxW bool mask of each object, for an image of `size` (H,W).

        Parts outside the image are cut off, so a mask may be empty. Raises UserError if the
        annotations are for an image of another size.
        """
        if self.size not in (None, size):
            refuse_size(self.image, self.source, self.size, size)
        source = brief_path(self.source)
        for number, outline in enumerate(self.outlines, start=1):
            for part in outline:
                if isinstance(part, dict) and tuple(part["size"]) != size:
                    refuse_size(self.image, self.source, tuple(part["size"]), size)
            where = f"{source}: object {number} of {brief(self.image.name)}"
            yield draw_outline(outline, size, self.has_fractions, where)


class Annotations(NamedTuple):
    """The annotations of a set of images.

    images: those with at least one object of the wanted classes, sorted by name.
    unlabelled: the image files without any annotation, sorted.
    counts: the number of objects of each wanted class.
    left_out: the number of annotations left out, by reason.
    """

    format: str
    images: list[AnnotatedImage]
    unlabelled: list[Path]
    counts: dict[str, int]
    left_out: dict[str, int]


def read_annotations(
    path: Path, images: Path | None = None, classes: Sequence[str] = ()
) -> Annotations:
    """Read a COCO or labelme file, or a folder of COCO, YOLO or labelme files.

    The format is recognized by the content. images: the folder of the images; by default that of
    the annotations, or the folder "images" beside "labels". classes: the names of the wanted
    classes; by default all. Raises UserError for anything wrong with the files.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        message = "--annotations needs pycocotools; pip install pycocotools"
        raise UserError(message) from error
    files = _annotation_files(path)
    kind, entries, names = _read_files(files)
    folder = images or _image_folder(path, files[0])
    if not folder.is_dir():
        shown = brief_path(folder)
        raise UserError(f"no such folder: {shown}; name that of the images with --images")
    # Labelme files, and some COCO files, do not list their classes
    names = names | {name for entry in entries for name, _ in entry.objects}
    wanted = _wanted_classes(path, classes, names)
    return _assemble(path, kind, entries, wanted, _ImageFinder(folder))


def _annotation_files(path: Path) -> list[Path]:
    """Return the JSON files at a path or, if there are none, its text files."""
    if not path.is_dir():
        require_file(path, what="file or folder")
    if path.is_file() and path.suffix.lower() == ".json":
        return [path]
    for folder in (path / "labels", path, path / "annotations"):
        for candidates, suffix in ((folder.glob("*"), ".json"), (folder.rglob("*"), ".txt")):
            files = [
                file
                for file in candidates
                if file.suffix.lower() == suffix
                and file.name not in NOT_ANNOTATIONS
                and not file.name.lower().startswith("readme")  # Roboflow adds one
                if not _is_hidden(file.relative_to(folder)) and file.is_file()
            ]
            if files:
                return sorted(files)
    raise UserError(f"no annotations in {brief_path(path)}; {SUPPORTED_FORMATS}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_files(files: list[Path]) -> tuple[str, list[Entry], set[str]]:
    """Return the format, the entries and the class names of YOLO, labelme or COCO files."""
    if files[0].suffix.lower() == ".txt":
        return ("YOLO", *read_yolo(files))
    entries = []
    for file in files:
        document = read_json(file)
        keys = document.keys() if isinstance(document, dict) else set()
        if {"images", "annotations"} <= keys:
            if len(files) > 1:
                folder = brief_path(file.parent)
                names = ", ".join(brief(file.name) for file in files[:3])
                raise UserError(f"{folder} holds {names}; name one COCO file of them")
            return ("COCO", *read_coco(file, document))
        if "shapes" not in keys:
            file_name = brief_path(file)
            raise UserError(f"{file_name} is neither COCO nor labelme; {SUPPORTED_FORMATS}")
        entries.append(read_labelme(file, document))
    return "labelme", entries, set()


def _image_folder(path: Path, file: Path) -> Path:
    """Return the folder where the images are expected: "images", or that of the annotations."""
    folder = path if path.is_dir() else path.parent
    if file.suffix.lower() == ".txt" and (folder / "labels").is_dir():
        folder = folder / "labels"
    # Replace the last "labels" or "annotations" in the path: labels/train becomes images/train
    for depth, name in enumerate(reversed(folder.parts)):
        if name in ("labels", "annotations"):
            start = len(folder.parts) - 1 - depth
            partner = Path(*folder.parts[:start], "images", *folder.parts[start + 1 :])
            return partner if partner.is_dir() else folder
    return folder


def _wanted_classes(path: Path, classes: Sequence[str], names: set[str]) -> set[str]:
    """Return the names of the wanted classes, which must exist; all if none is named."""
    wanted = {nfc(name) for name in classes}
    if wanted - names:
        unknown = ", ".join(brief(name) for name in sorted(wanted - names))
        found = listed(sorted(names), 20) or "none"
        raise UserError(f"no class {unknown} in {brief_path(path)}; its classes are: {found}")
    return wanted or names


class _ImageFinder:
    """Finds image files below a folder, and only there, by the names in annotation files."""

    def __init__(self, folder: Path) -> None:
        """Index the images below `folder` by each tail of their path: b/a.jpg and a.jpg."""
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.by_tail: dict[str, list[str]] = {}
        for file in sorted(folder.rglob("*")):
            path = file.relative_to(folder)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if not is_image or _is_hidden(path) or not file.is_file():
                continue
            name = nfc(path.as_posix())
            self.files[name] = file
            for tail in {*_tails(name), *_tails(name.removesuffix(path.suffix))}:
                self.by_tail.setdefault(tail, []).append(name)

    def find(self, entry: Entry) -> Path | None:
        """Return an entry's image: by its path, the end of its path, or the entry's file name.

        Raises UserError if several images match.
        """
        names = [entry.source.with_suffix("").as_posix()]
        if entry.file_name is not None:
            plain = unquote(entry.file_name.partition("?")[0])
            # Label Studio prefixes the names of uploads with 8 hexadecimal digits
            original = re.sub(r"^(.*[/\\])?[0-9a-f]{8}-", "", plain)
            names = [entry.file_name, plain, unquote(entry.file_name), original, *names]
        # The names go from the literal one to guesses; the longest tail that fits decides
        for name in names:
            name = nfc(name).replace("\\", "/")
            if name in self.files:
                return self.files[name]
            for tail in _tails(name):
                found = self.by_tail.get(tail, [])
                if len(found) > 1:
                    folder, source = (brief_path(p) for p in (self.folder, entry.source))
                    raise UserError(
                        f"{brief(found[0])} and {brief(found[1])} in {folder} could both be "
                        f"{brief(name)} of {source}; rename or remove one"
                    )
                if found:
                    return self.files[found[0]]
        return None


def _tails(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _assemble(
    path: Path, kind: str, entries: list[Entry], wanted: set[str], finder: _ImageFinder
) -> Annotations:
    """Find the entries' image files, and count the objects that are used and left out."""
    images: list[AnnotatedImage] = []
    counts, left_out = Counter(), Counter()
    sources: dict[Path, Path] = {}
    missing: list[Entry] = []
    for entry in (entry for entry in entries if entry.objects):
        outlines = []
        for name, outline in entry.objects:
            if name not in wanted or isinstance(outline, str):
                left_out[outline if name in wanted else OTHER_CLASSES] += 1
            else:
                counts[name] += 1
                outlines.append(outline)
        image = finder.find(entry)
        if image is None:
            missing += [entry] if outlines else []
            continue
        if image in sources:
            _refuse_twice(image, {sources[image], entry.source})
        sources[image] = entry.source
        if outlines:
            images.append(AnnotatedImage(image, outlines, entry.size, entry.source, kind == "YOLO"))
    if missing:
        _refuse_missing(missing, finder.folder)
    if not images:
        _refuse_without_outlines(path, left_out)
    images.sort(key=lambda item: (item.image.name, item.image))
    unlabelled = [file for file in finder.files.values() if file not in sources]
    return Annotations(kind, images, unlabelled, dict(counts), dict(left_out))


def _refuse_twice(image: Path, sources: set[Path]) -> NoReturn:
    files = " and ".join(brief_path(file) for file in sorted(sources))
    image_file = brief_path(image)
    raise UserError(f"{image_file} is annotated twice, in {files}; keep one of the two")


def _refuse_missing(missing: list[Entry], folder: Path) -> NoReturn:
    names = listed([entry.file_name or entry.source.stem for entry in missing])
    raise UserError(
        f"{names}: annotated, but no such image in {brief_path(folder)}; "
        "name the folder of the images with --images"
    )


def _refuse_without_outlines(path: Path, left_out: Counter[str]) -> NoReturn:
    file = brief_path(path)
    if left_out[BOXES] and left_out.keys() <= {BOXES, OTHER_CLASSES}:
        raise UserError(f"{file} holds boxes (detection), not outlines; export it for segmentation")
    found = ", ".join(f"{count} {what}" for what, count in left_out.items()) or "nothing"
    raise UserError(f"{file} holds no outlines of objects (but {found}); draw some first")
