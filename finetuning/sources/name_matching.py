"""Matching the names of masks to the names of images, and telling both apart in one folder."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path, listed, nfc
from finetuning.sources.folder_layouts import (
    BY_TABLE,
    Folder,
    Level,
    annotation_hint,
    by_stem,
    stem_of,
    suffix_of,
)

# The first or last word in the names of masks: 000_masks beside 000_img
MASK_WORDS = {"mask", "masks", "label", "labels", "labelmap", "seg", "segs", "segmentation", "gt"}
MASK_WORDS |= {"groundtruth", "truth", "annotation", "annotations", "annot", "ann", "manual"}
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
MAX_GUESSES = 50  # if more endings are equally frequent, none of them marks masks

OBJECT_NUMBER = re.compile(r"[ _.-]?\(\d+\)$|[ _.-]?\d+$")  # at the end of a mask's name
Affix = tuple[str, str]  # the prefix and the suffix around a name


def match_names(images: list[str], masks: list[str]) -> tuple[dict[str, str], str]:
    """Return the image's name for each mask's name, and a note on how, unless they are equal.

    Returns no names if no way assigns every mask to an image. Raises UserError if several ways
    do: an ambiguous name is never matched by luck.
    """
    for fold, note in ((str, ""), (_fold, "names are compared ignoring case")):
        image_of, mask_of = {fold(n): n for n in images}, {fold(n): n for n in masks}
        is_unique = len(image_of) == len(images) and len(mask_of) == len(masks)
        if is_unique and mask_of.keys() <= image_of.keys():
            return {mask: image_of[key] for key, mask in mask_of.items()}, note
    # Only if names are not equal: an affix
    for fold in (str, _fold):
        image_of, mask_of = {fold(n): n for n in images}, {fold(n): n for n in masks}
        if len(image_of) == len(images) and len(mask_of) == len(masks):
            owners, note = _choose(list(image_of), list(mask_of))
            if owners:
                return {mask_of[mask]: image_of[image] for mask, image in owners.items()}, note
    return {}, ""


def _fold(name: str) -> str:
    return nfc(name.casefold())


def _choose(images: list[str], masks: list[str]) -> tuple[dict[str, str], str]:
    """Return the one way to assign all masks to images, or nothing."""
    chosen, rivals = ({}, ""), []
    for owners, note, is_doubtful in _ways(images, masks):
        count = len(set(owners.values()))
        is_complete = count == len(images)
        if not is_doubtful and (is_complete or count > 1):  # a single image may match by luck
            chosen = chosen if chosen[0] else (owners, note)
            rivals.append(owners)
        # A doubtful way is never chosen, but makes the choice ambiguous if it is as plausible: if
        # every image has a mask, or so few have one that luck cannot be told from a rule
        elif is_complete or count < 3:
            rivals.append(owners)
    for owners in rivals if chosen[0] else []:
        _require_equal(chosen[0], owners)
    return chosen


def _require_equal(owners: dict[str, str], others: dict[str, str]) -> None:
    for mask in sorted(owners.keys() | others.keys()):
        pair = [brief_path(way[mask]) if mask in way else "none" for way in (owners, others)]
        if pair[0] != pair[1]:
            raise UserError(
                f"the names are ambiguous: {brief_path(mask)} may be a mask of "
                f"{' or '.join(pair)}; {BY_TABLE}"
            )


def _ways(images: list[str], masks: list[str]) -> Iterator[tuple[dict[str, str], str, bool]]:
    """Yield every way to read all masks' names as an image's name, an affix, perhaps a number.

    An image's name is the whole name (x, x_mask), or the part that differs between images
    (x_sat, x_mask). Each way comes with a note, and whether it is doubtful.
    """
    head = _common_start(images)
    tail = _common_start([name[len(head) :][::-1] for name in images])[::-1]
    for own in dict.fromkeys([("", ""), (head, tail)]):
        image_of = {name[len(own[0]) : len(name) - len(own[1])]: name for name in images}
        # With shortened names, or a single mask, an affix that continues a word is doubtful, too
        is_strict = any(own) or len(masks) == 1
        # An affix of all masks is in any sample of them, which is much faster to search
        sample = masks[:: len(masks) // 8 + 1]
        affixes = set.intersection(*(affixes_in(mask, image_of) for mask in sample))
        for affix in sorted(affixes):
            # x_2 may be the mask of image x_2, or the second mask of image x: try both
            for with_exact in (True, False):
                every = (core_of(mask, affix, image_of, with_exact) for mask in masks)
                # Stops at the first mask that does not fit
                cores = list(itertools.takewhile(lambda core: core is not None, every))
                if len(cores) < len(masks):
                    continue
                doubtful = any(own) and _numbers_differ(own, affix)
                doubtful |= any(_is_glued(core, affix, is_strict) for core in cores)
                length = len(affix[0]) + len(affix[1])
                pairs = zip(masks, cores, strict=True)
                is_numbered = any(len(mask) > len(core) + length for mask, core in pairs)
                note = f"masks are called {brief_path('NAME'.join(affix))}"
                note += " and a number" if is_numbered else ""
                note += f", images {brief_path('NAME'.join(own))}" if any(own) else ""
                yield {m: image_of[c] for m, c in zip(masks, cores, strict=True)}, note, doubtful


def _common_start(names: list[str]) -> str:
    """Return the common start of all names, ending between words and numbers, not inside one."""
    # What the first and the last name in order have in common, all names have
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    start = "".join(left for left, _ in equal)
    while start and any(_is_run(start[-1], name[len(start) : len(start) + 1]) for name in names):
        start = start[:-1]
    return start


def _is_run(left: str, right: str, letters: bool = True) -> bool:
    """Return whether two characters are both digits, or both letters; one may be empty."""
    is_letters = letters and left.isalpha() and right.isalpha()
    return is_letters or (left.isdecimal() and right.isdecimal())


def _is_glued(core: str, affix: Affix, letters: bool) -> bool:
    """Return whether a name and its affix meet inside a number or, if `letters`, inside a word."""
    return _is_run(affix[0][-1:], core[:1], letters) or _is_run(core[-1:], affix[1][:1], letters)


def _numbers_differ(own: Affix, affix: Affix) -> bool:
    """Return whether images and masks differ in the numbers that all share: p1_ and p2_."""
    heads, tails = ([re.findall(r"\d+", way[i]) for way in (own, affix)] for i in (0, 1))
    # Compare from the name outwards: prefixes backwards, suffixes forwards
    pairs = [*zip(heads[0][::-1], heads[1][::-1], strict=False), *zip(*tails, strict=False)]
    return any(left != right for left, right in pairs)


def affixes_in(mask: str, cores: Collection[str]) -> set[Affix]:
    """Return the affix around each of `cores` in a mask's name, with or without its number."""
    names = {mask, OBJECT_NUMBER.sub("", mask)}
    return {
        (name[:start], name[end:])
        for name in names
        for start in range(len(name) + 1)
        for end in range(start, len(name) + 1)
        if name[start:end] in cores
    }


def core_of(mask: str, affix: Affix, cores: Collection[str], with_exact: bool = True) -> str | None:
    """Return the one of `cores` that is a mask's name without the affix and perhaps a number."""
    number = OBJECT_NUMBER.search(mask) if mask[-1:] == ")" or mask[-1:].isdecimal() else None
    names = [mask] if with_exact else []
    # Before the number there must be a separator or the affix's letter: x12 is not mask 2 of x1
    if number and (affix[1][-1:].isalpha() or not number[0][0].isdecimal()):
        names.append(mask[: number.start()])
    for name in names:
        end = len(name) - len(affix[1])
        if end >= len(affix[0]) and name.startswith(affix[0]) and name.endswith(affix[1]):
            core = name[len(affix[0]) : end]
            if core in cores:
                return core
    return None


def marked_masks(stems: list[str]) -> set[str]:
    """Return the names that are another name with one fixed addition, such as _mask; or none."""
    names, ways = set(stems), []
    # If all images have masks, the longest name is a mask's; otherwise try the frequent additions
    sample = [max(stems, key=len), *stems[:: len(stems) // 50 + 1]]
    found = [affix for stem in sample for affix in affixes_in(stem, names)]
    # With letters: x_1 beside x need not be its mask
    counts = Counter(affix for affix in found if any(map(str.isalpha, affix[0] + affix[1])))
    often = {affix for affix, count in counts.items() if 2 * count >= max(counts.values())}
    longest = affixes_in(sample[0], names) & counts.keys()
    for affix in sorted(longest | (often if len(often) <= MAX_GUESSES else set())):
        owners = {stem: core for stem in stems if (core := core_of(stem, affix, names)) is not None}
        glued = any(_is_glued(core, affix, letters=True) for core in owners.values())
        # A name cannot be a mask and an image at once
        if owners and not glued and not owners.keys() & set(owners.values()):
            ways.append((len(owners.keys() | set(owners.values())) == len(names), owners))
    # Ways that use every name win over ways that leave names over
    best = max((is_all for is_all, _ in ways), default=False)
    ways = [owners for is_all, owners in ways if is_all == best]
    for owners in ways[1:]:
        _require_equal(ways[0], owners)
    return set(ways[0]) if ways else set()


def worded_masks(stems: list[str]) -> set[str]:
    """Return the names whose first or last word says that they are masks: 000_masks; or none.

    They must belong to the other names, which are those of images: 000_img.
    """
    found: list[set[str]] = []
    for place in (0, -1):
        words = {stem: re.findall(r"[^\W\d_]+", stem) for stem in stems}
        masks = {stem for stem in stems if words[stem] and words[stem][place].lower() in MASK_WORDS}
        images = [stem for stem in stems if stem not in masks]
        if masks and images and match_names(images, sorted(masks))[0]:
            found.append(masks)
    return found[0] if found and all(masks == found[0] for masks in found) else set()


def divide_folder(folder: Folder) -> Level:
    """Separate masks from images in one folder: by name, or as the files that are not JPEG."""
    files = {path: suffix_of(path) for path in folder.files}
    # Masks are exact, so photos and masks in one folder are often JPEG and PNG
    files = {path: ".jpg" if kind in JPEG_SUFFIXES else kind for path, kind in files.items()}
    stems = [stem_of(path) for path in files]
    is_unique = len(set(stems)) == len(stems)
    marked = (marked_masks(stems) or worded_masks(stems)) if is_unique else set()
    if marked:
        masks = {path: None for path, stem in zip(files, stems, strict=True) if stem in marked}
    elif len(set(files.values())) == 2 and ".jpg" in files.values():
        masks = {path: None for path, kind in files.items() if kind != ".jpg"}
    else:
        by_stem(folder)  # may raise a more precise error
        raise UserError(
            f"{brief_path(folder.path)} was given for both images and masks, but names like "
            f"{listed(folder.files)} do not show which are the masks; move those into a folder of "
            f"their own, or {BY_TABLE}{annotation_hint(folder)}"
        )
    images = [path for path in files if path not in masks]
    return Level(folder._replace(files=images), Folder(folder.path, list(masks), [], []))


def no_match(files: dict[str, Path], groups: dict[str, list[Path]]) -> UserError:
    """Return the error that names masks without an image, and images that may be meant.

    Both map names to files, as match_names got them.
    """
    # If most masks match an image with the most frequent affix, name only those that do not
    sample = list(groups)[:: len(groups) // 8 + 1]
    affixes = Counter(affix for mask in sample for affix in sorted(affixes_in(mask, files)))
    affix = affixes.most_common(1)[0][0] if affixes else ("", "")
    owners = {mask: core for mask in groups if (core := core_of(mask, affix, files)) is not None}
    if not len(groups) / 2 < len(owners) < len(groups):  # fewer may match by luck
        owners = {}
    alone = [paths[0] for mask, paths in groups.items() if mask not in owners]
    free = files.keys() - set(owners.values()) or files.keys()
    return UserError(
        f"the names do not show which images these masks belong to: {listed(alone)}; images are "
        f"called {listed(sorted(files[stem].name for stem in free))}; {BY_TABLE}"
    )
