"""Keep images of one patient, video or slide in one split.

Images of the same patient resemble each other, so a validation set with patients of the training
set gives too optimistic results. The user names the groups with a table (--groups) or a pattern
(--group-regex); copies (copies.py) form groups by themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

from finetuning.basics.command_line import brief_path, listed, nfc
from finetuning.basics.csv_files import read_table
from finetuning.basics.files import SPLIT_NAMES
from finetuning.sources.folder_layouts import stem_of
from finetuning.sources.pairing import SourceExample

FRAME = re.compile(r"(.+)[_-](?:frame)?\d+")  # names like video3_000124
FRAME_OPTION = '--group-regex "(.+)[_-]"'
COPIES_OF = "copies of "  # begins the name of a group of copies alone
FEW_FRAMES = 3  # average number of images per name from which they look like frames of videos


class Grouping(NamedTuple):
    """The user's choice of which images belong together."""

    pattern: str | None = None  # a regular expression that finds the group in a file name
    table: Path | None = None  # a CSV file with the columns image and group
    joins_copies: bool = True
    frames: str = "auto"  # what happens to frames of a recording: auto, time or random

    @property
    def is_given(self) -> bool:
        """Whether the user names the groups."""
        return bool(self.pattern or self.table)

    @property
    def options(self) -> dict[str, Any]:
        """The options besides the table that differ from the default, for split.json."""
        chosen = {"group_regex": self.pattern, "copies": None if self.joins_copies else "ignore"}
        chosen["frames"] = None if self.frames == "auto" else self.frames
        return {name: value for name, value in chosen.items() if value}


def find_groups(examples: Sequence[SourceExample], grouping: Grouping) -> list[str | None]:
    """Return the group of each example that the user or its folder names, or None.

    Prints the number of the user's groups. Raises UserError if the pattern or the table does not
    fit the images.
    """
    if grouping.table:
        groups = _read_groups(grouping.table, examples)
    elif grouping.pattern:
        groups = _match_groups(grouping.pattern, examples)
    else:
        if is_one_group(examples):
            return [None] * len(examples)
        return [example.group for example in examples]  # arrange prints what becomes of them
    alone = [example.image for example, group in zip(examples, groups, strict=True) if not group]
    rest = f"; {len(alone)} images are in none: {listed(alone)}" if alone else ""
    together = "each split in time" if grouping.frames == "time" else "which stay together"
    print(f"groups: {len(set(filter(None, groups)))}, {together}{rest}")
    return groups


def is_one_group(examples: Sequence[SourceExample]) -> bool:
    """Return whether all images are of one folder or volume, which must be divided."""
    return len({example.group for example in examples}) == 1 and examples[0].group is not None


def _match_groups(pattern: str, examples: Sequence[SourceExample]) -> list[str | None]:
    """Search the file names for the pattern, or FOLDER/NAME if no file name contains it."""
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(
            f"--group-regex {brief_path(pattern)} is not a valid pattern: {error}"
        ) from error
    names = [nfc(example.image.name) for example in examples]
    if not any(map(search, names)):
        folders = [nfc(example.image.parent.name) for example in examples]
        names = [f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)]
    groups: list[str | None] = []
    for name in names:
        found = search(name)
        # The first capturing group that matched; the whole match if there are no such groups
        parts = [found[0], *found.groups()] if found else []
        groups.append(next(filter(None, parts[1:] or parts), None))
    if not any(groups):
        raise UserError(
            f"--group-regex {brief_path(pattern)} is in no image's name: "
            f"{listed([example.image for example in examples])}"
        )
    return groups


def _read_groups(table: Path, examples: Sequence[SourceExample]) -> list[str | None]:
    """Look up each image in a table, by FOLDER/NAME, by its file name, or by its stem."""
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
            f"{listed(missing)}; add them (an image that belongs to no other gets its own group)"
        )
    return groups


def warn_of_videos(stems: Sequence[str]) -> None:
    """Print a warning if names look like frames of several videos."""
    videos = Counter(found[1] for stem in stems if (found := FRAME.fullmatch(stem)))
    for name in SPLIT_NAMES.keys() & videos.keys():  # train_001, val_001
        del videos[name]
    if len(videos) > 1 and videos.total() >= max(FEW_FRAMES * len(videos), len(stems) / 2):
        print(
            f"warning: names like {listed(stems[:1])} look like frames of {len(videos)} videos, or "
            "images of as many patients; if train and val share some, val results are too "
            f"optimistic: {FRAME_OPTION} keeps them together"
        )


def join_groups(
    groups: Sequence[str | None], alike: Iterable[tuple[int, int]], names: Sequence[str]
) -> list[str | None]:
    """Merge the given groups with copies; return the group of each image, None if it is alone.

    alike: pairs of image indices that must stay together; their groups become one.
    """
    # Union-find: images with the same root belong together; the root is the first of them
    parent = list(range(len(names)))

    def find_root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[str, int] = {}
    same_group = [(first.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    for one, other in (*same_group, *alike):
        low, high = sorted((find_root(one), find_root(other)))
        parent[high] = low
    roots = [find_root(index) for index in range(len(names))]
    given: dict[int, str] = {}
    for root, group in zip(roots, groups, strict=True):
        if group:
            given.setdefault(root, group)
    members = Counter(roots)
    return [
        (given.get(root) or f"{COPIES_OF}{names[root]}") if members[root] > 1 else None
        for root in roots
    ]


def divided_groups(groups: Sequence[str | None], splits: Sequence[str]) -> list[str]:
    """Return the groups with images in more than one split."""
    group_splits: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        if group:
            group_splits.setdefault(group, set()).add(split)
    return [group for group, found in group_splits.items() if len(found) > 1]
