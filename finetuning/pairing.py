"""Which masks belong to which image, in folders, archives and tables as people have them."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import posixpath
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.pairs import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES

# What folders are called, in lower case; of images and masks also without blanks and the like
SPLITS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SPLITS |= {split: split for split in ("train", "val", "test")}
IMAGE_FOLDERS = {"images", "image", "img", "imgs", "jpegimages", "original"}
MASK_FOLDERS = {"masks", "mask", "labels", "label", "annotations", "annotation", "ann", "gt"}
MASK_FOLDERS |= {"groundtruth"}
CHALLENGE = re.compile(r".*_(training|validation|test)(?:_part1)?_(input|data|groundtruth)")
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}
MAX_DEPTH = 6  # folders within folders
MAX_GUESSES = 50  # where more endings are as frequent, none of them is a mask's
BY_TABLE = "pair them by a table: --pairs FILE.csv (image,mask)"
OBJECT_NUMBER = re.compile(r"[ _.-]?\(\d+\)$|[ _.-]?\d+$")  # at the end of a mask's name
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
Affix = tuple[str, str]  # what stands before and after a name


class Example(NamedTuple):
    """An image and its masks: files on disk, or members of a zip archive (zipfile.Path)."""

    name: str  # the image's, unique in its split, NFC, safe as a file stem
    image: Path
    masks: tuple[Path, ...]  # one or more; several are the image's objects
    split: str | None = None  # "train", "val" or "test" where the files are split already
    annotated: Any = None  # an AnnotatedImage, whose objects are drawn; there are no masks then


class Found(NamedTuple):
    """Examples by split and name, and what the user should know of how they were found."""

    examples: list[Example]
    notes: list[str]


class Folder(NamedTuple):
    """What is in a folder, sorted by name, but for hidden files."""

    path: Path
    files: list[Path]  # images and masks, by their suffixes
    others: list[Path]
    folders: list[Folder]


class Level(NamedTuple):
    """Two folders of which the files are paired with each other."""

    images: Folder
    masks: Folder | None
    split: str | None = None
    item: str | None = None  # the name of the folder of one image and its masks only


class Row(NamedTuple):
    """An image on its way to an Example."""

    image: Path
    masks: tuple[Path, ...]
    folder: str  # what tells it from images of the same name
    split: str | None


def find_examples(images: Path, masks: Path, skip_unlabelled: bool = False) -> Found:
    """Pair the images and masks of two folders, or of one folder given twice, by their names.

    Raises UserError where a mask or, unless they are skipped, an image is left over, and where the
    names allow more than one pairing.
    """
    image_folder, mask_folder = read_folder(images), read_folder(masks)
    on_disk = isinstance(images, Path) and isinstance(masks, Path)
    if not (images.samefile(masks) if on_disk else str(images) == str(masks)):
        return _pair_all(_levels(image_folder, mask_folder), [], skip_unlabelled)
    if image_folder.files:
        return _pair_all([_divide(image_folder)], [], skip_unlabelled)
    return _find_in(image_folder, skip_unlabelled)


def find_in_folder(root: Path, skip_unlabelled: bool = False) -> Found:
    """Pair the files of the one place below a folder, or in an archive, that has images and masks.

    Raises UserError for no place or several, and as find_examples does.
    """
    return _find_in(read_folder(root), skip_unlabelled)


def _find_in(root: Folder, skip_unlabelled: bool) -> Found:
    places = list(_places(root))
    if len(places) == 1:
        return _pair_all(places[0][1], [f"found in {shown(places[0][0])}"], skip_unlabelled)
    inside = _names([f"{folder.path.name}/" for folder in root.folders])
    what = "has no folders like images/ and masks/ side by side in it"
    what += f" (the folders inside are {inside})" if inside else ""
    if places:
        what = f"has images and masks in several places: {_names([path for path, _ in places])}"
    raise UserError(f"{shown(root.path)} {what}; choose two folders by --images and --masks")


def read_pairs_file(file: Path, images: Path | None, masks: Path | None) -> Found:
    """Read pairs from a CSV file with the columns image and mask, and perhaps split.

    Files are looked for in `images` or `masks`, then in the table's own folder; rows with the same
    image are its objects. Raises UserError with the row where a file or a value is missing.
    """
    rows: dict[str, Row] = {}
    notes: list[str] = []
    for number, cells in enumerate(_read_table(file), 2):
        if not any(cells.values()):
            continue
        where = f"{shown(file)}, row {number}"
        image = _find_file(cells.get("image", ""), [images, file.parent], f"{where}: image")
        mask = _find_file(cells.get("mask", ""), [masks, file.parent], f"{where}: mask")
        value = cells.get("split", "").casefold()
        if value and value not in SPLITS:
            raise UserError(f"{where}: split is {shown(value)}, not train, val or test")
        row = rows.setdefault(str(image), Row(image, (), image.parent.name, SPLITS.get(value)))
        if row.split != SPLITS.get(value):
            raise UserError(f"{where}: {shown(image.name)} is in another split further up")
        if mask in row.masks:
            notes.append(f"row {number} repeats an earlier one: left out")
        else:
            rows[str(image)] = row._replace(masks=(*row.masks, mask))
    if not rows:
        raise UserError(f"{shown(file)} has no rows below its header")
    if len({row.split is None for row in rows.values()}) > 1:
        raise UserError(f"{shown(file)}: some rows have a split and some have none; fill in all")
    return _finish(list(rows.values()), notes, skip_unlabelled=False)


def _read_table(file: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file below its header, of which the columns come in lower case."""
    if not file.is_file():
        raise UserError(f"no such file: {shown(file)}; check the path")
    content, text = file.read_bytes(), ""
    for encoding in ("cp949", "utf-8-sig"):  # the former is that of Excel in Korea
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [column.strip().casefold() for column in next(rows, [])]
        for column in ("image", "mask"):
            if column not in columns:
                raise UserError(f"{shown(file)}, row 1: no column {column}; save a table that "
                                "starts image,mask as CSV (UTF-8)")  # fmt: skip
        for row in rows:
            yield dict(zip(columns, map(str.strip, row), strict=False))
    except csv.Error as error:
        raise UserError(f"{shown(file)}, row {rows.line_num}: {error}; save it as CSV") from error


def _find_file(name: str, folders: list[Path | None], what: str) -> Path:
    """Return the first of these folders' file of that name, however it spells 한글."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"{what} is {shown(name) or 'empty'}; expected a file like name.png")
    for folder in filter(None, folders):
        for form in ("NFC", "NFD"):
            for spelled in (name, name.replace("\\", "/")):
                path = folder / unicodedata.normalize(form, spelled)
                if len(path.name) < 256 and path.is_file():
                    return path
    places = " or ".join(dict.fromkeys(shown(folder) for folder in folders if folder))
    raise UserError(f"{what} {shown(name)} is not in {places}; check its path")


# Folders


def read_folder(root: Path) -> Folder:
    """Read what is in a folder, on disk or in an archive, down to MAX_DEPTH."""
    if not root.is_dir():
        raise UserError(f"no such folder: {shown(root)}; check the path")
    members = defaultdict(list)
    if isinstance(root, zipfile.Path):  # its iterdir goes through the whole archive each time
        for name in root.root.namelist():
            members[posixpath.dirname(name.rstrip("/"))].append(zipfile.Path(root.root, name))

    def read(path: Path, depth: int) -> Folder:
        folder = Folder(path, [], [], [])
        children = members[path.at.rstrip("/")] if members else path.iterdir()
        for child in sorted(children, key=lambda child: child.name):
            if child.name.startswith(".") or child.name.lower() in IGNORED:
                continue
            if child.is_dir():
                folder.folders.extend([read(child, depth + 1)] if depth < MAX_DEPTH else [])
            else:
                is_image = _kind(child) in IMAGE_SUFFIXES
                (folder.files if is_image else folder.others).append(child)
        return folder

    return read(root, 0)


def _places(folder: Folder) -> Iterator[tuple[Path, list[Level]]]:
    """Yield where below a folder images and masks lie, and how they are laid out there."""
    levels = _layout(folder)
    if levels:
        yield folder.path, levels
    used = [PurePath(str(part.path)) for level in levels for part in level[:2] if part]
    used = {path for part in used for path in (part, *part.parents)}
    for child in folder.folders:
        if PurePath(str(child.path)) not in used:
            yield from _places(child)


def _layout(folder: Folder) -> list[Level]:
    """Return what is to be paired in a folder: nothing, or by one of the usual layouts."""
    images, masks = _called(folder, IMAGE_FOLDERS), _called(folder, MASK_FOLDERS)
    if images and masks:
        return _levels(images, masks)

    challenge: dict[str, dict[str, Folder]] = {}  # ISIC: X_Training_Input, X_Training_GroundTruth
    for child in folder.folders:
        if (match := CHALLENGE.fullmatch(child.path.name.lower())) and child.files:
            kind = "masks" if match[2] == "groundtruth" else "images"
            _put(challenge.setdefault(SPLITS[match[1]], {}), kind, child)
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
            inside = inside or ([Level(images, None)] if images else [])
            levels += [level._replace(split=split) for level in inside]
        return levels

    items = [(child, _called(child, IMAGE_FOLDERS)) for child in folder.folders]
    levels = [Level(images, _called(child, MASK_FOLDERS), None, child.path.name)
              for child, images in items if images and len(images.files) == 1]  # fmt: skip
    # DSB 2018: ID/images/ID.png, ID/masks/*.png
    return levels if len(levels) > 1 and any(level.masks for level in levels) else []


def _called(folder: Folder, names: set[str]) -> Folder | None:
    """Return the one folder inside that has one of these names, and anything in it."""
    found = [c for c in folder.folders if re.sub("[ _-]", "", c.path.name.casefold()) in names]
    found = [child for child in found if child.files or child.folders] or found
    found = [child for child in found if child.path.name in ("images", "masks")] or found
    kinds: dict[str, Folder] = {}
    for child in found:
        _put(kinds, "kind", child)
    return kinds.get("kind")


def _by_split(folder: Folder) -> dict[str, Folder]:
    found: dict[str, Folder] = {}
    for child in folder.folders:
        if split := SPLITS.get(child.path.name.casefold()):
            _put(found, split, child)
    return found


def _put(found: dict[str, Folder], key: str, folder: Folder) -> None:
    """Note a folder, which must be the only one of its kind."""
    if key in found:
        raise UserError(
            f"{shown(found[key].path)} or {shown(folder.path)}: it is not clear which to take; "
            "choose two folders by --images and --masks"
        )
    found[key] = folder


def _levels(images: Folder, masks: Folder) -> list[Level]:
    """Return what is to be paired in two folders: they themselves, or train/, val/ and test/."""
    splits = {} if images.files else _by_split(images)
    mask_splits = {} if masks.files else _by_split(masks)
    if not splits or not mask_splits:
        return [Level(images, masks)]
    for split in mask_splits.keys() - splits.keys():
        raise UserError(f"{shown(mask_splits[split].path)} has no partner in {shown(images.path)}")
    return [Level(folder, mask_splits.get(split), split) for split, folder in splits.items()]


def _divide(folder: Folder) -> Level:
    """Tell the masks in a folder from the images beside them: by name, or by JPEG and PNG."""
    files = {path: _kind(path) for path in folder.files}
    files = {path: ".jpg" if kind in JPEG_SUFFIXES else kind for path, kind in files.items()}
    stems = [_stem(path) for path in files]
    marked = _marked_masks(stems) if len(set(stems)) == len(stems) else set()
    if marked:
        masks = {path: None for path, stem in zip(files, stems, strict=True) if stem in marked}
    elif len(set(files.values())) == 2 and ".jpg" in files.values():
        masks = {path: None for path, kind in files.items() if kind != ".jpg"}
    else:
        _by_stem(folder)  # raises where there is a better reason
        raise UserError(
            f"{shown(folder.path)} was given for both images and masks, but names like "
            f"{_names(folder.files)} do not tell which are the masks; move those into a folder of "
            f"their own, or {BY_TABLE}"
        )
    images = [path for path in files if path not in masks]
    return Level(folder._replace(files=images), Folder(folder.path, list(masks), [], []))


def _marked_masks(stems: list[str]) -> set[str]:
    """Return the names that are another's with one and the same addition, as _mask; or none."""
    names, ways = set(stems), []
    # The longest name is a mask's where all images have masks; else what is frequent is tried.
    sample = [max(stems, key=len), *stems[:: len(stems) // 50 + 1]]
    found = [affix for stem in sample for affix in _affixes_in(stem, names)]
    counts = Counter(a for a in found if any(map(str.isalpha, a[0] + a[1])))  # not as x_1 beside x
    often = {affix for affix, count in counts.items() if 2 * count >= max(counts.values())}
    longest = _affixes_in(sample[0], names) & counts.keys()
    for affix in sorted(longest | (often if len(often) <= MAX_GUESSES else set())):
        owners = {stem: core for stem in stems if (core := _core(stem, affix, names)) is not None}
        glued = any(_is_glued(core, affix, letters=True) for core in owners.values())
        if owners and not glued and not owners.keys() & set(owners.values()):
            ways.append((len(owners.keys() | set(owners.values())) == len(names), owners))
    best = max((is_all for is_all, _ in ways), default=False)
    ways = [owners for is_all, owners in ways if is_all == best]
    for owners in ways[1:]:
        _require_equal(ways[0], owners)
    return set(ways[0]) if ways else set()


# Names


def match_names(images: list[str], masks: list[str]) -> tuple[dict[str, str], str]:
    """Return the image's name for each mask's name, and how they were matched, if not by equality.

    Returns no names where there is no way in which each mask belongs to an image. Raises UserError
    where there are several: a name that could be either's is never matched by luck.
    """
    for fold, note in ((str, ""), (_fold, "names are compared without upper and lower case")):
        image_of, mask_of = {fold(n): n for n in images}, {fold(n): n for n in masks}
        is_unique = len(image_of) == len(images) and len(mask_of) == len(masks)
        if is_unique and mask_of.keys() <= image_of.keys():
            return {mask: image_of[key] for key, mask in mask_of.items()}, note
    for fold in (str, _fold):
        image_of, mask_of = {fold(n): n for n in images}, {fold(n): n for n in masks}
        if len(image_of) == len(images) and len(mask_of) == len(masks):
            owners, note = _choose(list(image_of), list(mask_of))
            if owners:
                return {mask_of[mask]: image_of[image] for mask, image in owners.items()}, note
    return {}, ""


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _choose(images: list[str], masks: list[str]) -> tuple[dict[str, str], str]:
    """Return the one way in which all masks belong to images, or nothing."""
    chosen, rivals = ({}, ""), []
    for owners, note, is_doubtful in _ways(images, masks):
        count = len(set(owners.values()))
        is_complete = count == len(images)
        if not is_doubtful and (is_complete or count > 1):  # one alone may be luck
            chosen = chosen if chosen[0] else (owners, note)
            rivals.append(owners)
        elif is_complete or count < 3:
            rivals.append(owners)
    for owners in rivals if chosen[0] else []:
        _require_equal(chosen[0], owners)
    return chosen


def _require_equal(owners: dict[str, str], others: dict[str, str]) -> None:
    for mask in sorted(owners.keys() | others.keys()):
        pair = [shown(way[mask]) if mask in way else "none" for way in (owners, others)]
        if pair[0] != pair[1]:
            raise UserError(
                f"the names are ambiguous: {shown(mask)} may be a mask of {' or '.join(pair)}; "
                + BY_TABLE
            )


def _ways(images: list[str], masks: list[str]) -> Iterator[tuple[dict[str, str], str, bool]]:
    """Yield every way in which all masks are called by an image, an affix, and perhaps a number.

    Of an image its whole name counts (x, x_mask), or what all images do not have in common
    (x_sat, x_mask). With each way comes a note, and whether it is doubtful.
    """
    head = _common_start(images)
    tail = _common_start([name[len(head) :][::-1] for name in images])[::-1]
    for own in dict.fromkeys([("", ""), (head, tail)]):
        image_of = {name[len(own[0]) : len(name) - len(own[1])]: name for name in images}
        is_strict = any(own) or len(masks) == 1
        sample = masks[:: len(masks) // 8 + 1]
        affixes = set.intersection(*(_affixes_in(mask, image_of) for mask in sample))
        for affix in sorted(affixes):
            for with_exact in (True, False):
                every = (_core(mask, affix, image_of, with_exact) for mask in masks)
                cores = list(itertools.takewhile(lambda core: core is not None, every))
                if len(cores) < len(masks):
                    continue
                doubtful = any(own) and _numbers_differ(own, affix)
                doubtful |= any(_is_glued(core, affix, is_strict) for core in cores)
                length = len(affix[0]) + len(affix[1])
                pairs = zip(masks, cores, strict=True)
                is_numbered = any(len(mask) > len(core) + length for mask, core in pairs)
                note = f"masks are called {shown('NAME'.join(affix))}"
                note += " and a number" if is_numbered else ""
                note += f", images {shown('NAME'.join(own))}" if any(own) else ""
                yield {m: image_of[c] for m, c in zip(masks, cores, strict=True)}, note, doubtful


def _common_start(names: list[str]) -> str:
    """Return what all names begin with, without a part of a run of letters or of digits."""
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    start = "".join(left for left, _ in equal)
    while start and any(_is_run(start[-1], name[len(start) : len(start) + 1]) for name in names):
        start = start[:-1]
    return start


def _is_run(left: str, right: str, letters: bool = True) -> bool:
    """Say whether two characters, or none, are both digits, or both letters."""
    is_letters = letters and left.isalpha() and right.isalpha()
    return is_letters or (left.isdecimal() and right.isdecimal())


def _is_glued(core: str, affix: Affix, letters: bool) -> bool:
    """Say whether a name and its affix meet inside a run of digits, or of letters if they count."""
    return _is_run(affix[0][-1:], core[:1], letters) or _is_run(core[-1:], affix[1][:1], letters)


def _numbers_differ(own: Affix, affix: Affix) -> bool:
    """Say whether numbers that images have in common are others than those of masks: p1_, p2_."""
    heads, tails = ([re.findall(r"\d+", way[i]) for way in (own, affix)] for i in (0, 1))
    pairs = [*zip(heads[0][::-1], heads[1][::-1], strict=False), *zip(*tails, strict=False)]
    return any(left != right for left, right in pairs)


def _affixes_in(mask: str, cores: Collection[str]) -> set[Affix]:
    """Return what stands around each name that is found in a mask's, with or without its number."""
    names = {mask, OBJECT_NUMBER.sub("", mask)}
    return {
        (name[:start], name[end:])
        for name in names
        for start in range(len(name) + 1)
        for end in range(start, len(name) + 1)
        if name[start:end] in cores
    }


def _core(mask: str, affix: Affix, cores: Collection[str], with_exact: bool = True) -> str | None:
    """Return the one of `cores` that a mask is called by: with the affix, and perhaps a number."""
    number = OBJECT_NUMBER.search(mask) if mask[-1:] == ")" or mask[-1:].isdecimal() else None
    names = [mask] if with_exact else []
    if number and (affix[1][-1:].isalpha() or not number[0][0].isdecimal()):
        names.append(mask[: number.start()])
    for name in names:
        end = len(name) - len(affix[1])
        if end >= len(affix[0]) and name.startswith(affix[0]) and name.endswith(affix[1]):
            core = name[len(affix[0]) : end]
            if core in cores:
                return core
    return None


# Examples


def _pair_all(levels: list[Level], notes: list[str], skip_unlabelled: bool) -> Found:
    rows = [row for level in levels for row in _pair(level, notes)]
    return _finish(rows, notes + _left_out(levels), skip_unlabelled)


def _pair(level: Level, notes: list[str]) -> list[Row]:
    """Pair the files of two folders; an image without masks is a Row without masks."""
    files, masks = _by_stem(level.images), level.masks
    if not files:
        raise UserError(f"no images in {shown(level.images.path)}{_inside(level.images)}")
    if not masks:
        groups = {}
    elif level.item is not None:
        groups = {stem: masks.files for stem in files if masks.files}
    elif masks.files or not masks.folders:
        groups = {stem: [path] for stem, path in _by_stem(masks).items()}
    else:  # masks/NAME/*.png
        groups = {_nfc(folder.path.name): folder.files for folder in masks.folders if folder.files}
    if masks and not groups and level.item is None:
        raise UserError(f"no masks in {shown(masks.path)}{_inside(masks)}")

    owners, note = match_names(list(files), list(groups))
    if groups and not owners:
        _refuse(files, groups)
    notes += [note] if note else []
    masks_of: dict[str, list[Path]] = {stem: [] for stem in files}
    for mask, stem in owners.items():
        masks_of[stem] += groups[mask]
    folder = level.images.path.name if level.item is None else level.item
    return [
        Row(files[stem], tuple(sorted(found, key=_in_numeric_order)), folder, level.split)
        for stem, found in masks_of.items()
    ]


def _refuse(files: dict[str, Path], groups: dict[str, list[Path]]) -> None:
    """Raise UserError that names masks without an image, and images that they may be meant for."""
    sample = list(groups)[:: len(groups) // 8 + 1]
    affixes = Counter(affix for mask in sample for affix in sorted(_affixes_in(mask, files)))
    affix = affixes.most_common(1)[0][0] if affixes else ("", "")
    owners = {mask: core for mask in groups if (core := _core(mask, affix, files)) is not None}
    if not len(groups) / 2 < len(owners) < len(groups):  # by luck
        owners = {}
    alone = [paths[0] for mask, paths in groups.items() if mask not in owners]
    free = files.keys() - set(owners.values()) or files.keys()
    raise UserError(
        f"the names do not tell to which images these masks belong: {_names(alone)}; images are "
        f"called {_names(sorted(files[stem].name for stem in free))}; {BY_TABLE}"
    )


def _by_stem(folder: Folder) -> dict[str, Path]:
    for path in folder.others:
        if _kind(path) in UNREADABLE_SUFFIXES:
            raise UserError(
                f"{shown(path)} is in a format that cannot be read; save it as JPEG or PNG"
            )
    files: dict[str, Path] = {}
    for path in folder.files:
        if (other := files.setdefault(_stem(path), path)) is not path:
            raise UserError(
                f"{_names([other, path])} in {shown(folder.path)} have the same name but for the "
                f"suffix; move one kind into a folder of its own, or {BY_TABLE}"
            )
    return files


def _left_out(levels: list[Level]) -> list[str]:
    """Say which files and folders are not used."""
    folders = [folder for level in levels for folder in level[:2] if folder]
    others = [path for folder in folders for path in folder.others]
    used = {str(folder.path) for folder in folders}
    unused = [
        f"{child.path.name}/"
        for folder in folders
        for child in folder.folders
        if folder.files and str(child.path) not in used
    ]
    notes = [f"folders inside left out: {_names(unused)}"] if unused else []
    if others:
        kinds = ", ".join(sorted({_kind(p) or "no suffix" for p in others}))
        what = (
            "1 file of another kind" if len(others) == 1 else f"{len(others)} files of other kinds"
        )
        notes.append(f"{what} left out: {shown(kinds)}")
    return notes


def _finish(rows: list[Row], notes: list[str], skip_unlabelled: bool) -> Found:
    """Turn rows into examples with unique names; leave out images without masks, or raise."""
    bare, rows = [r for r in rows if not r.masks], [r for r in rows if r.masks]
    if bare and not (skip_unlabelled and rows):
        raise UserError(
            f"{len(bare)} of {len(bare) + len(rows)} images have no mask: "
            f"{_names([row.image for row in bare])} (masks are there like "
            f"{_names([row.masks[0] for row in rows]) or 'none'}); --skip-unlabelled leaves them "
            f"out, or {BY_TABLE}"
        )
    if bare:
        notes.append(f"{len(bare)} image{'s' * (len(bare) > 1)} without a mask left out")
    counts = {len(row.masks) for row in rows}
    if max(counts) > 1:
        several = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else max(counts)
        notes.append(f"{several} masks an image: each is an object of its own")

    splits = Counter(row.split for row in rows)
    if splits.keys() - {None, "train"}:
        kinds = [split for split in ("train", "val", "test") if split in splits]
        ready = ", ".join(f"{splits[split]} {split}" for split in kinds)
        notes.append(f"ready split: {ready}")
        if "train" not in splits:
            raise UserError(f"there are no images to train on ({ready}); add train")
        if "val" not in splits:
            notes.append("there is no val: it will be drawn from train")
    if "val" not in splits:
        rows = [row._replace(split=None) if row.split == "train" else row for row in rows]
    return Found(name_examples(rows), list(dict.fromkeys(notes)))


def name_examples(rows: list[Row]) -> list[Example]:
    """Name examples by their images and, where those of a split are alike, by folder and number."""
    stems = [(row.split or "", _safe(_stem(row.image))) for row in rows]
    times, examples = Counter(stems), {}
    order = sorted(zip(stems, rows, strict=True), key=lambda pair: (pair[0], str(pair[1].image)))
    for (split, stem), row in order:
        name = base = stem if times[split, stem] == 1 else f"{_safe(row.folder)}_{stem}"
        number = 1
        while (split, name) in examples or (name != stem and (split, name) in times):
            number += 1
            name = f"{base}_{number}"
        examples[split, name] = Example(name, row.image, row.masks, row.split)
    return [examples[key] for key in sorted(examples)]


def _safe(name: str) -> str:
    return UNSAFE.sub("_", _nfc(name)).rstrip(". ") or "_"


def _stem(path: Path) -> str:
    return _nfc(path.name.rpartition(".")[0] or path.name)


def _kind(path: Path) -> str:
    """Return a file's suffix in lower case; pathlib's own takes long for many thousand files."""
    return "".join(path.name.rpartition(".")[1:]).lower() if "." in path.name else ""


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS decomposes 한글 in file names


def _in_numeric_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", _stem(path))
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def _inside(folder: Folder) -> str:
    names = _names([f"{child.path.name}/" for child in folder.folders])
    return f"; there are folders inside: {names}" if names else "; expected files like name.png"


def _names(files: Iterable[Path | str]) -> str:
    """Name up to three files, on one line."""
    names = [shown(file if isinstance(file, str) else file.name) for file in files]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def shown(name: Path | str) -> str:
    """Return a name or path fit for one line of a message."""
    name = str(name) if len(str(name)) <= 200 else f"...{str(name)[-200:]}"
    return name if name.isprintable() else repr(name)
