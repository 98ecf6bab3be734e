"""Finding images and masks in folders and archives, by the usual layouts of data sets."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path, listed, nfc
from finetuning.basics.files import SPLIT_NAMES
from finetuning.basics.image_files import IMAGE_SUFFIXES
from finetuning.volumes.files import VOLUME_SUFFIXES, kind_of

# Names of folders in lower case; those of images and masks also without " ", "_" and "-"
IMAGE_FOLDERS = {"images", "image", "img", "imgs", "jpegimages", "original", "imagestr"}
MASK_FOLDERS = {"masks", "mask", "labels", "label", "annotations", "annotation", "ann", "gt"}
MASK_FOLDERS |= {"labelstr", "groundtruth", "segmentationclass", "segmentationobject"}
CHALLENGE = re.compile(r".*_(training|validation|test)(?:_part1)?_(input|data|groundtruth)")
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}
BY_TABLE = "pair them by a table: --pairs FILE.csv (image,mask)"
SEARCH_DEPTH = 6  # folders within folders


class Folder(NamedTuple):
    """The content of a folder, sorted by name, without hidden files."""

    path: Path
    files: list[Path]  # with the suffix of an image or, on disk, of a volume
    others: list[Path]
    folders: list[Folder]


class Level(NamedTuple):
    """A folder of images and the folder of their masks."""

    images: Folder
    masks: Folder | None
    split: str | None = None
    item: str | None = None  # the name of a folder that holds one image and its masks
    group: str | None = None  # the folder of these images below those of all: a patient, a video


def read_folder(root: Path) -> Folder:
    """List a folder, on disk or in an archive, down to SEARCH_DEPTH; a volume is listed alone."""
    if isinstance(root, Path) and root.is_file() and kind_of(root):
        return Folder(root.parent, [root], [], [])
    if not root.is_dir():
        raise UserError(f"no such folder: {brief_path(root)}; check the path")
    on_disk, members = isinstance(root, Path), defaultdict(list)
    if not on_disk:  # zipfile.Path.iterdir would go through the whole archive each time
        for name in root.root.namelist():
            members[posixpath.dirname(name.rstrip("/"))].append(zipfile.Path(root.root, name))

    def read(path: Path, depth: int, above: tuple[Path, ...]) -> Folder:
        folder = Folder(path, [], [], [])
        children = path.iterdir() if on_disk else members[path.at.rstrip("/")]
        for child in sorted(children, key=lambda child: child.name):
            if child.name.startswith(".") or child.name.lower() in IGNORED:
                continue
            if child.is_dir():
                real = child.resolve() if on_disk else child
                if real in above:
                    raise UserError(
                        f"{brief_path(child)} is a link to a folder around it; remove it"
                    )
                if depth < SEARCH_DEPTH:
                    folder.folders.append(read(child, depth + 1, (*above, real)))
            else:
                is_image = suffix_of(child) in IMAGE_SUFFIXES
                is_image |= on_disk and child.name.lower().endswith(VOLUME_SUFFIXES)
                (folder.files if is_image else folder.others).append(child)
        return folder

    return read(root, 0, (root.resolve(), *root.resolve().parents) if on_disk else ())


def find_places(folder: Folder) -> Iterator[tuple[Path, list[Level]]]:
    """Yield each folder that has images and masks in one of the usual layouts, and its levels."""
    levels = _layout(folder)
    if levels:
        yield folder.path, levels
    used = [PurePath(str(part.path)) for level in levels for part in level[:2] if part]
    used = {path for part in used for path in (part, *part.parents)}
    for child in folder.folders:
        if PurePath(str(child.path)) not in used:
            yield from find_places(child)


def _layout(folder: Folder) -> list[Level]:
    """Return the levels to pair in a folder, by the first usual layout that fits, or none."""
    images, masks = _called(folder, IMAGE_FOLDERS), _called(folder, MASK_FOLDERS)
    if images and masks:
        return pair_levels(images, masks)

    challenge: dict[str, dict[str, Folder]] = {}  # ISIC: X_Training_Input, X_Training_GroundTruth
    for child in folder.folders:
        if (match := CHALLENGE.fullmatch(child.path.name.lower())) and child.files:
            kind = "masks" if match[2] == "groundtruth" else "images"
            _put_once(challenge.setdefault(SPLIT_NAMES[match[1]], {}), kind, child)
    if any(len(kinds) == 2 for kinds in challenge.values()):
        return [
            Level(kinds.get("images", Folder(folder.path, [], [], [])), kinds.get("masks"), split)
            for split, kinds in challenge.items()
        ]

    parts = {split: (child, _layout(child)) for split, child in _by_split(folder).items()}
    if any(levels for _, levels in parts.values()):  # train/images, train/masks, test/images
        levels = []
        for split, (child, inside) in parts.items():
            images = _called(child, IMAGE_FOLDERS)
            inside = inside or (_mirrored(images, None) if images else [])
            levels += [level._replace(split=split) for level in inside]
        return levels

    # DSB 2018: ID/images/ID.png, ID/masks/*.png
    items = [(child, _called(child, IMAGE_FOLDERS)) for child in folder.folders]
    levels = [Level(images, _called(child, MASK_FOLDERS), None, child.path.name)
              for child, images in items if images and len(images.files) == 1]  # fmt: skip
    return levels if len(levels) > 1 and any(level.masks for level in levels) else []


def _called(folder: Folder, names: set[str]) -> Folder | None:
    """Return the one folder inside that has one of these names, preferably one with files."""
    found = [c for c in folder.folders if re.sub("[ _-]", "", c.path.name.casefold()) in names]
    with_files = [c for c in found if c.files or any(inside.files for inside in c.folders)]
    found = with_files or found
    # The names that this project uses itself win over others, such as annotations/ beside masks/
    found = [child for child in found if child.path.name in ("images", "masks")] or found
    kinds: dict[str, Folder] = {}
    for child in found:
        _put_once(kinds, "kind", child)
    return kinds.get("kind")


def _by_split(folder: Folder) -> dict[str, Folder]:
    found: dict[str, Folder] = {}
    for child in folder.folders:
        if split := SPLIT_NAMES.get(child.path.name.casefold()):
            _put_once(found, split, child)
    return found


def _put_once(found: dict[str, Folder], key: str, folder: Folder) -> None:
    """Add a folder under a key; raise UserError if there is one already."""
    if key in found:
        raise UserError(
            f"{brief_path(found[key].path)} or {brief_path(folder.path)}: it is not clear which to "
            "take; choose two folders by --images and --masks"
        )
    found[key] = folder


def pair_levels(images: Folder, masks: Folder) -> list[Level]:
    """Return the levels to pair in two folders: the folders, or their train/, val/ and test/.

    Where images lie in sub-folders, each of them is a level, paired with the same sub-folder of the
    masks.
    """
    splits = {} if images.files else _by_split(images)
    mask_splits = {} if masks.files else _by_split(masks)
    if not splits or not mask_splits:
        levels = _mirrored(images, masks)
        if len(levels) > 1 and all(len(level.images.files) == 1 for level in levels):
            # A folder an image: its masks are its own, whatever they are called
            return [level._replace(item=level.images.path.name, group=None) for level in levels]
        return levels
    for split in mask_splits.keys() - splits.keys():
        raise UserError(
            f"{brief_path(mask_splits[split].path)} has no partner in {brief_path(images.path)}; "
            "add its images"
        )
    levels = []
    for split, folder in splits.items():
        inside = _mirrored(folder, mask_splits.get(split))
        levels += [level._replace(split=split) for level in inside]
    return levels


def _mirrored(images: Folder, masks: Folder | None, group: str = "") -> list[Level]:
    """Return a level for each sub-folder of images, down to those with files."""
    folders = [folder for folder in images.folders if _holds_files(folder)]
    partners = {nfc(folder.path.name): folder for folder in masks.folders} if masks else {}
    names = [nfc(folder.path.name) for folder in folders]
    if images.files or not folders or (masks and not partners.keys() & set(names)):
        return [Level(images, masks, group=group or None)]
    for name in partners.keys() - set(names):
        if _holds_files(partners[name]):
            raise UserError(
                f"{brief_path(partners[name].path)} has no partner in {brief_path(images.path)}; "
                "add its images"
            )
    levels = []
    for name, folder in zip(names, folders, strict=True):
        levels += _mirrored(folder, partners.get(name), f"{group}/{name}" if group else name)
    return levels


def _holds_files(folder: Folder) -> bool:
    return bool(folder.files) or any(map(_holds_files, folder.folders))


def by_stem(folder: Folder) -> dict[str, Path]:
    """Map each stem to its file; raise UserError if two files differ only in their suffix."""
    files: dict[str, Path] = {}
    for path in folder.files:
        if (other := files.setdefault(stem_of(path), path)) is not path:
            raise UserError(
                f"{listed([other, path])} in {brief_path(folder.path)} have the same name but for "
                f"the suffix; move one kind into a folder of its own, or {BY_TABLE}"
            )
    return files


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lower case; pathlib's is slow for many thousands of files."""
    return "".join(path.name.rpartition(".")[1:]).lower() if "." in path.name else ""


def stem_of(path: Path) -> str:
    name = path.name.removesuffix(".gz")  # .nii.gz
    return nfc(name.rpartition(".")[0] or name)


def annotation_hint(folder: Folder) -> str:
    """Return a hint at --annotations if a folder has files of an annotation tool, else ""."""
    kinds = {suffix_of(path) for path in folder.others}
    is_annotated = kinds & {".json", ".txt", ".xml"}
    return "; use --annotations for COCO, YOLO and labelme files" if is_annotated else ""


def notes_on_unused(levels: list[Level]) -> list[str]:
    """Return notes on the files and folders that are not used."""
    folders = [folder for level in levels for folder in level[:2] if folder]
    others = [path for folder in folders for path in folder.others]
    used = {str(folder.path) for folder in folders}
    unused = [
        f"{child.path.name}/"
        for folder in folders
        for child in folder.folders
        if folder.files and str(child.path) not in used
    ]
    notes = [f"left out folders: {listed(unused)}"] if unused else []
    if others:
        kinds = ", ".join(sorted({suffix_of(p) or "no suffix" for p in others}))
        what = (
            "1 file of another kind" if len(others) == 1 else f"{len(others)} files of other kinds"
        )
        hint = max(map(annotation_hint, folders), key=len)
        notes.append(f"left out {what}: {brief_path(kinds)}{hint}")
    return notes
