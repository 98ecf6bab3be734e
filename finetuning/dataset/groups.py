"""Images that belong together, of one patient, video or slide: they stay on one side of a split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path, listed, nfc
from finetuning.basics.csv_files import read_table
from finetuning.sources.folder_layouts import SPLIT_NAMES, stem_of
from finetuning.sources.pairing import SourceExample

# Names like video3_000124: what comes before the number
FRAME = re.compile(r"(.+)[_-](?:frame)?\d+")
FRAME_OPTION = '--group-regex "(.+)[_-]"'
FRAMES = 3  # so many of a name, on average, are like a video's


class Grouping(NamedTuple):
    """How the user says which images belong together."""

    pattern: str | None = None  # a regular expression that finds the group in a file's name
    table: Path | None = None  # a CSV file with the columns image and group
    joins_copies: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What is chosen, by name."""
        chosen = {"group_regex": self.pattern, "groups": self.table and str(self.table.resolve())}
        chosen["copies"] = None if self.joins_copies else "ignore"
        return {name: value for name, value in chosen.items() if value}


def find_groups(examples: Sequence[SourceExample], grouping: Grouping) -> list[str | None]:
    """Return the group of each example, as the user says; None for one that has none.

    Prints how many groups there are, or warns where names look like frames of videos. Raises
    UserError for a pattern or a table that does not fit the images.
    """
    if grouping.table:
        groups = _read_groups(grouping.table, examples)
    elif grouping.pattern:
        groups = _match_groups(grouping.pattern, examples)
    else:
        _warn_of_frames([stem_of(example.image) for example in examples])
        return [None] * len(examples)
    alone = [example.image for example, group in zip(examples, groups, strict=True) if not group]
    rest = f"; {len(alone)} images are in none: {listed(alone)}" if alone else ""
    print(f"groups: {len(set(filter(None, groups)))}, which stay together{rest}")
    return groups


def _match_groups(pattern: str, examples: Sequence[SourceExample]) -> list[str | None]:
    """Search the file names for a pattern; or FOLDER/NAME, where it is in no file's name."""
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--group-regex {brief_path(pattern)} is no pattern: {error}") from error
    names = [nfc(example.image.name) for example in examples]
    if not any(map(search, names)):
        folders = [nfc(example.image.parent.name) for example in examples]
        names = [f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)]
    groups: list[str | None] = []
    for name in names:
        found = search(name)
        parts = [found[0], *found.groups()] if found else []
        groups.append(next(filter(None, parts[1:] or parts), None))
    if not any(groups):
        raise UserError(
            f"--group-regex {brief_path(pattern)} is in no image's name: "
            f"{listed([example.image for example in examples])}"
        )
    return groups


def _read_groups(table: Path, examples: Sequence[SourceExample]) -> list[str | None]:
    """Look the images up in a table, by FOLDER/NAME, by their file's name, or by its stem."""
    group_of: dict[str, str] = {}
    for number, row in enumerate(read_table(table, ("image", "group")), 2):
        image = nfc(row.get("image", "")).replace("\\", "/")
        group = row.get("group", "")
        tail = "/".join(image.split("/")[-2:])
        if image and group_of.setdefault(tail, group) != group:
            raise UserError(
                f"{brief_path(table)}, row {number}: {brief_path(tail)} is in two groups"
            )
    groups = []
    for example in examples:
        name = nfc(example.image.name)
        keys = (f"{nfc(example.image.parent.name)}/{name}", name, stem_of(example.image))
        groups.append(next(filter(None, (group_of.get(key) for key in keys)), None))
    missing = [example.image for example, group in zip(examples, groups, strict=True) if not group]
    if missing:
        raise UserError(
            f"{brief_path(table)} has no group for {len(missing)} of {len(examples)} images: "
            f"{listed(missing)}; add them (one that is alone gets a group of its own)"
        )
    return groups


def _warn_of_frames(stems: Sequence[str]) -> None:
    videos = Counter(found[1] for stem in stems if (found := FRAME.fullmatch(stem)))
    for name in SPLIT_NAMES.keys() & videos.keys():  # train_001, val_001
        del videos[name]
    if len(videos) > 1 and videos.total() >= max(FRAMES * len(videos), len(stems) / 2):
        print(
            f"warning: names like {listed(stems[:1])} look like frames of {len(videos)} videos, or "
            "images of as many patients; with some on both sides, val says too much: "
            f"{FRAME_OPTION} keeps them together"
        )


def join_groups(
    groups: Sequence[str | None], alike: Iterable[tuple[int, int]], names: Sequence[str]
) -> list[str | None]:
    """Return the group of each image that shares one with others: as given, or as a copy of them.

    alike: numbers of images that are to be together; the groups that they are in become one.
    """
    root = list(range(len(names)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = index = root[root[index]]
        return index

    first: dict[str, int] = {}
    of_group = [(first.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    for one, other in (*of_group, *alike):
        low, high = sorted((find(one), find(other)))
        root[high] = low
    roots = [find(index) for index in range(len(names))]
    given: dict[int, str] = {}
    for first_of, group in zip(roots, groups, strict=True):
        if group:
            given.setdefault(first_of, group)
    members = Counter(roots)
    return [
        (given.get(first_of) or f"copies of {names[first_of]}") if members[first_of] > 1 else None
        for first_of in roots
    ]


def torn_groups(groups: Sequence[str | None], splits: Sequence[str]) -> list[str]:
    """Return the groups of which some images are in one split and some in another."""
    sides: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        if group:
            sides.setdefault(group, set()).add(split)
    return [group for group, of_group in sides.items() if len(of_group) > 1]
