"""Reading an annotation tool's export: the outlined objects of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sam2_utils import UserError

from finetuning.annotations.coco_format import (
    read_coco,
    read_run_lengths,
    read_sa1b,
    table_columns,
)
from finetuning.annotations.formats import (
    BOXES,
    SUPPORTED_FORMATS,
    Entry,
    Errors,
    read_json,
)
from finetuning.annotations.image_lookup import (
    ImageFinder,
    default_image_folder,
    is_hidden,
    split_of_source,
    with_splits,
)
from finetuning.annotations.labelme import read_labelme
from finetuning.annotations.outlines import AnnotatedImage, is_rectangle
from finetuning.annotations.yolo import NAMES_FILES, is_yolo, read_yolo
from finetuning.basics.command_line import brief, brief_path, listed, nfc
from finetuning.basics.files import require_file

OTHER_CLASSES, WITHOUT_IMAGE = "other classes", "their image is not there"
NOT_ANNOTATIONS = {*NAMES_FILES, "notes.json"}  # Label Studio writes notes.json beside them
# COCO's own other files, of the same images as instances_train2017.json
COCO_OTHERS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


class Annotations(NamedTuple):
    """The annotations of a set of images.

    images: those with at least one object of the wanted classes, sorted by name.
    unlabelled: the image files without any annotation, sorted.
    image_count: the number of all image files.
    counts: the number of objects of each wanted class.
    left_out: the number of annotations left out, by reason.
    notes: what the user is told about all this.
    """

    format: str
    images: list[AnnotatedImage]
    unlabelled: list[Path]
    image_count: int
    counts: dict[str, int]
    left_out: dict[str, int]
    notes: list[str]


class Export(NamedTuple):
    """What annotation files hold. files: those that were read; names: the classes they list."""

    format: str
    files: list[Path]
    entries: list[Entry]
    names: set[str]
    notes: list[str]


def read_annotations(
    path: Path,
    images: Path | None = None,
    classes: Sequence[str] = (),
    skip_missing: bool = False,
) -> Annotations:
    """Read an annotation file or a folder of them: COCO, SA-1B, YOLO, labelme or run lengths.

    The format is recognized by the content. images: the folder of the images; by default that of
    the annotations, or the folder "images" beside "labels". classes: the names of the wanted
    classes; by default all. skip_missing: leave out what has no image. Raises UserError for
    anything wrong with the files.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        message = "--annotations needs pycocotools; pip install pycocotools"
        raise UserError(message) from error
    export = _read_files(path)
    folder = images or default_image_folder(path, export.files)
    if not folder.is_dir():
        shown = brief_path(folder)
        raise UserError(f"no such folder: {shown}; name that of the images with --images")
    # Labelme files, and some COCO files, do not list their classes
    names = export.names | {name for entry in export.entries for name, _ in entry.objects}
    wanted = _wanted_classes(path, classes, names)
    return _assemble(path, export, wanted, ImageFinder(folder), skip_missing)


def holds_annotations(path: Path) -> bool:
    """Return whether a folder has an annotation file of a known format."""
    is_known = (_json_kind(read_json(file)) for file in _files_below(path, ".json"))
    return any(is_known) or any(map(is_yolo, _files_below(path, ".txt"))) or bool(_tables(path))


def _tables(path: Path) -> list[Path]:
    """Return the tables of run lengths in a folder, without Kaggle's examples of a submission."""
    files = [file for file in _files_below(path, ".csv") if table_columns(file)]
    return [file for file in files if "submission" not in file.stem.casefold()]


def _files_below(path: Path, suffix: str) -> list[Path]:
    """Return the files below a folder that may be annotations, sorted, or the file itself."""
    if not path.is_dir():
        return [path] if path.suffix.lower() == suffix else []
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() == suffix
        and file.name.casefold() not in NOT_ANNOTATIONS
        and not file.name.lower().startswith("readme")  # Roboflow adds one
        and not is_hidden(file.relative_to(path))
        and file.is_file()
    )


def _read_files(path: Path) -> Export:
    """Read the annotation file at a path, or the annotation files in a folder."""
    if not path.is_dir():
        require_file(path, what="file or folder")
    errors = Errors()
    if table_columns(path) or path.suffix.lower() == ".csv":
        export = Export("run lengths", [path], read_run_lengths(path, errors), set(), [])
        errors.raise_all(path)
        return export
    others = []
    for folder in (path / "labels", path):
        export = _read_json_files(folder, errors)
        if export is None and folder.is_dir():
            texts = _files_below(folder, ".txt")
            entries, names, others = read_yolo(texts, errors)
            files, notes = [entry.source for entry in entries], _note_others(others, texts)
            export = Export("YOLO", files, entries, names, notes) if files else None
        errors.raise_all(path)
        if export:
            return export
    if len(tables := _tables(path)) == 1:
        return _read_files(tables[0])
    if others:
        where = f"{brief_path(others[0])}, line 1"
        raise UserError(f"{where} is not a class number and numbers; {SUPPORTED_FORMATS}")
    raise UserError(f"no annotations in {brief_path(path)}; {SUPPORTED_FORMATS}")


def _note_others(others: list[Path], files: list[Path]) -> list[str]:
    """Return a note on those of some files that are no annotations."""
    if not others:
        return []
    of = f"{len(others)} of {len(files)} {others[0].suffix.lower()} files"
    return [f"left out {of}, which are no annotations: {listed(others)}"]


def _read_json_files(path: Path, errors: Errors) -> Export | None:
    """Read the COCO, SA-1B or labelme files at a path; None if there are none."""
    files = _files_below(path, ".json")
    if any(file.name.startswith("instances_") for file in files):
        files = [file for file in files if not file.name.startswith(COCO_OTHERS)]
    entries, names = [], set()
    used: dict[str, list[Path]] = {}
    others = []
    for file in files:
        with errors.gathered():
            document = read_json(file)
            kind = _json_kind(document)
            if kind == "COCO":
                more, classes = read_coco(file, document, errors)
                entries += more
                names |= classes
            elif kind is not None:
                read = read_labelme if kind == "labelme" else read_sa1b
                entries.append(read(file, document, errors))
            (used.setdefault(kind, []) if kind else others).append(file)
    if not used and path.is_file() and others:
        raise UserError(f"{brief_path(path)} is neither COCO nor labelme; {SUPPORTED_FORMATS}")
    if not used:
        return None
    if len(used) > 1:
        shown = " and ".join(f"{kind} ({brief(found[0].name)})" for kind, found in used.items())
        raise UserError(f"{brief_path(path)} holds files of {shown}; name one kind of them")
    ((kind, found),) = used.items()
    return Export(kind, found, entries, names, _note_others(others, files))


def _json_kind(document: Any) -> str | None:
    """Return the format of a JSON document; None if it is of no known format."""
    if isinstance(document, list):
        is_sam = document and all(isinstance(r, dict) and "segmentation" in r for r in document)
        return "SA-1B" if is_sam else None
    keys = document.keys() if isinstance(document, dict) else set()
    if {"images", "annotations"} <= keys:
        return "COCO"
    if "shapes" in keys:
        return "labelme"
    return "SA-1B" if {"image", "annotations"} <= keys else None


def _wanted_classes(path: Path, classes: Sequence[str], names: set[str]) -> set[str]:
    """Return the names of the wanted classes, which must exist; all if none is named."""
    wanted = {nfc(name) for name in classes}
    if wanted - names:
        unknown = ", ".join(brief(name) for name in sorted(wanted - names))
        found = listed(sorted(names), 20) or "none"
        raise UserError(f"no class {unknown} in {brief_path(path)}; its classes are: {found}")
    return wanted or names


def _assemble(
    path: Path, export: Export, wanted: set[str], finder: ImageFinder, skip_missing: bool
) -> Annotations:
    """Find the entries' image files, and count the objects that are used and left out."""
    images: list[AnnotatedImage] = []
    counts, left_out = Counter(), Counter()
    sources: dict[Path, Path] = {}
    missing: list[Entry] = []
    annotated = [entry for entry in export.entries if entry.objects]
    for entry in annotated:
        image = finder.find(entry)
        outlines = []
        for name, outline in entry.objects:
            if name not in wanted:
                left_out[OTHER_CLASSES] += 1
            elif isinstance(outline, str):
                left_out[outline] += 1
            else:
                outlines.append(outline)
                if image is None:
                    left_out[WITHOUT_IMAGE] += 1
                else:
                    counts[name] += 1
        if image is None:
            missing += [entry] if outlines else []
            continue
        if image in sources:
            _refuse_twice(image, {sources[image], entry.source})
        sources[image] = entry.source
        if outlines:
            is_yolo = export.format == "YOLO"
            split = split_of_source(entry)
            images.append(AnnotatedImage(image, outlines, entry.size, entry.source, is_yolo, split))
    if missing and not (skip_missing and images):
        finder.refuse_missing(missing, len(annotated))
    if not images:
        _refuse_without_outlines(path, wanted, left_out)
    images.sort(key=lambda item: (item.image.name, item.image))
    unlabelled = [file for file in finder.files.values() if file not in sources]
    notes = _count_notes(export, images, len(annotated), counts, left_out)
    if missing:
        of = f"{len(missing)} of {len(annotated)} annotated images"
        notes.append(f"left out {of}, which are not in {brief_path(finder.folder)}")
    notes += export.notes + _remarks(images) + finder.notes(export.files, len(images))
    images = with_splits(images)
    return Annotations(
        format=export.format,
        images=images,
        unlabelled=unlabelled,
        image_count=len(finder.files),
        counts=dict(counts),
        left_out=dict(left_out),
        notes=notes,
    )


def _count_notes(
    export: Export,
    images: list[AnnotatedImage],
    annotated: int,
    counts: Counter[str],
    left_out: Counter[str],
) -> list[str]:
    """Return how many of how many objects and images are used, and what is left out."""
    used, total = counts.total(), counts.total() + left_out.total()
    objects = f"{used} of {total}" if used < total else f"{used}"
    shown = f"{len(images)} of {annotated}" if len(images) < annotated else f"{annotated}"
    classes = ", ".join(f"{brief(name)} {count}" for name, count in sorted(counts.items()))
    kind = (
        f"{export.format} ({len(export.files)} files)" if len(export.files) > 1 else export.format
    )
    notes = [f"{kind}: {objects} objects in {shown} annotated images ({classes})"]
    notes += [f"left out {count} of {total} objects: {what}" for what, count in left_out.items()]
    return notes


def _remarks(images: list[AnnotatedImage]) -> list[str]:
    """Return what is said about the objects, with how many of how many it holds for."""
    outlines = [outline for item in images for outline in item.outlines]
    remarks = Counter(remark for outline in outlines for remark in outline.remarks)
    notes = []
    for remark, count in remarks.items():
        objects = f"{count} of {len(outlines)} objects"
        notes.append(remark.format(objects) if "{}" in remark else f"{objects} {remark}")
    if all(map(is_rectangle, outlines)):
        notes.append(
            f"warning: all {len(outlines)} outlines are rectangles (boxes), so the model learns to "
            "draw boxes; outline the objects, or give the boxes to test_my_image.py as prompts"
        )
    return notes


def _refuse_twice(image: Path, sources: set[Path]) -> NoReturn:
    files = " and ".join(brief_path(file) for file in sorted(sources))
    image_file = brief_path(image)
    raise UserError(f"{image_file} is annotated twice, in {files}; keep one of the two")


def _refuse_without_outlines(path: Path, wanted: set[str], left_out: Counter[str]) -> NoReturn:
    file = brief_path(path)
    if left_out.keys() == {BOXES}:
        raise UserError(f"{file} holds boxes (detection), not outlines; export it for segmentation")
    if not left_out:
        raise UserError(f"{file} holds no objects; outline some, and export them again")
    of = f"of class {listed(sorted(wanted))}" if left_out[OTHER_CLASSES] else "of objects"
    found = ", ".join(f"{what} ({count})" for what, count in left_out.items() if count)
    raise UserError(
        f"{file} holds no outlines {of}, but {found}; "
        "export the objects as polygons or masks, which SAM 2 learns from"
    )
