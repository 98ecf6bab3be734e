"""Recognise consecutive frames of a recording, and split a recording in time.

Neighbouring frames of a video, or slices of a scan, are nearly the same image. A random split puts
them on both sides, and the results are too optimistic. So several recordings each stay in one
split, and a single one is divided in time: its end is for validation, after a gap.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import listed, tell
from finetuning.dataset.splitting import LEFT_OUT, split_in_time, time_order
from finetuning.preparation.copies import (
    FEWEST_FRAMES,
    SHARE,
    Copy,
    looks_consecutive,
    normalized,
    reach_of,
)
from finetuning.preparation.filling import Filled
from finetuning.preparation.groups import Grouping, join_groups, warn_of_videos
from finetuning.sources.folder_layouts import stem_of
from finetuning.sources.pairing import SourceExample

# What frames share in their names: all but the last number (video1_0012, or Roboflow's
# video1_mp4-12_jpg.rf.5f0c), or all but the numbers (snapshot-10h22m33s)
LAST_NUMBER = re.compile(r"(.*?)\d+(\D*?)(?:[._-](?:jpe?g|png)\.rf\..*)?")
MOST_LEFT_OUT = 0.05  # of a recording, in the gap between two splits
FEWEST_RECORDINGS = 3  # for train and val of whole recordings; one more with test
BLOCKS = 5  # of frames in a split at least, if it has so many; a comparison resamples blocks


class Recording(NamedTuple):
    """Consecutive frames of a video, or slices of a scan."""

    name: str
    frames: list[int]  # indices of the images, in time order
    reach: int  # frames so far apart are hardly alike


class Arranged(NamedTuple):
    """Which of N images stay together, and which are split in time."""

    groups: list[str | None]  # of each image: a patient, a recording, a block of frames, copies
    splits: dict[int, str]  # of each frame that is split in time, by index; perhaps LEFT_OUT
    recordings: dict[int, str]  # of each of these frames


def arrange(
    examples: Sequence[SourceExample],
    filled: Sequence[Filled],
    copies: Sequence[Copy],
    given: Sequence[str | None],
    grouping: Grouping,
    facts: dict[str, Any],
) -> Arranged:
    """Group N images by the given groups, copies and recordings; split recordings in time.

    Prints what is done with recordings, or a warning if names alone look like frames of videos.
    Raises UserError if there are too few frames to split in time.

    Arguments:
      examples, filled, given: the N images, and the groups that the user or the folders name.
      facts: with val_fraction and test_fraction.
    """
    names = [image.name for image in filled]
    alike = [copy[:2] for copy in copies] if grouping.joins_copies else []
    recordings, is_forced = [], grouping.frames == "time"
    if is_forced or (grouping.frames == "auto" and not grouping.is_given):
        thumbnails = [image.thumbnail for image in filled]
        recordings = find_recordings(examples, thumbnails, copies, given, is_forced)
        _warn_of_ready_split(examples, thumbnails, copies)
    if is_forced and not recordings:
        raise UserError("--frames time finds no images to split; are they split already?")
    if not recordings:
        if grouping.frames == "auto" and not any(given):
            warn_of_videos([stem_of(example.image) for example in examples])
        _tell_groups(given, grouping)
        return Arranged(join_groups(given, alike, names), {}, {})

    recording_of = {i: recording.name for recording in recordings for i in recording.frames}
    named = [group or recording_of.get(index) for index, group in enumerate(given)]
    groups = join_groups(named, alike, names)
    whole = [group for group, name in zip(groups, named, strict=True) if name]
    if not is_forced and _are_enough(whole, facts):
        if named == list(given):
            _tell_groups(given, grouping)
        else:
            tell(f"{_describe(recordings, len(names))}: each recording stays in one split")
        return Arranged(groups, {}, {})
    alike = [pair for pair in alike if not recording_of.keys() & set(pair)]
    arranged = Arranged(join_groups(given, alike, names), {}, recording_of)
    for recording in recordings:
        _divide(recording, copies, names, facts, arranged)
    what = _describe(recordings, len(names), "are" if is_forced else "look like")
    if not _add_others(examples, arranged, 2 + bool(facts["test_fraction"])):
        raise UserError(f"{what}, too few to be split in time; add more images")
    hint = "" if is_forced else " (--frames random: split at random)"
    tell(f"{what}: {_describe_division(len(recordings), arranged, facts)}{hint}")
    return arranged


def _tell_groups(given: Sequence[str | None], grouping: Grouping) -> None:
    """Print the number of groups that folders name; find_groups has printed the user's."""
    if any(given) and not grouping.is_given:
        names = sorted(set(filter(None, given)))
        print(f"groups: {len(names)}, which stay together: {listed(names)}")


def _warn_of_ready_split(
    examples: Sequence[SourceExample], thumbnails: Sequence[np.ndarray], copies: Sequence[Copy]
) -> None:
    """Print a warning if all images are split already, and frames of a recording at random."""
    if not all(example.split for example in examples):
        return
    # By their names alone, since each split has a folder of its own
    joined = [one._replace(split=None, image=Path(one.image.name)) for one in examples]
    divided = []
    for recording in find_recordings(joined, thumbnails, copies, [None] * len(joined)):
        splits = [examples[index].split for index in recording.frames]
        # In time, train, val and test follow each other: the split changes at most twice
        if sum(itertools.starmap(operator.ne, itertools.pairwise(splits))) > 2:
            divided.append(recording)
    if divided:
        tell(
            f"warning: {_describe(divided, len(examples))}, which the given split divides at "
            "random, so the results are too optimistic; put all images in one folder to split them "
            "in time"
        )


def _add_others(examples: Sequence[SourceExample], arranged: Arranged, needed: int) -> bool:
    """Leave images of no recording to a random split, or add them to train if they are too few.

    Returns whether each of the `needed` splits then has images.
    """
    others = {
        index: group or index
        for index, group in enumerate(arranged.groups)
        if index not in arranged.recordings and not examples[index].split
    }
    if len(set(others.values())) >= needed:
        return True
    arranged.splits.update(dict.fromkeys(others, "train"))
    return len(set(arranged.splits.values()) - {LEFT_OUT}) == needed


def find_recordings(
    examples: Sequence[SourceExample],
    thumbnails: Sequence[np.ndarray],
    copies: Sequence[Copy],
    groups: Sequence[str | None],
    is_forced: bool = False,
) -> list[Recording]:
    """Return the recordings among N images: those with numbered names that look consecutive.

    Images that are in a split already are in no recording, and no recording divides a group.

    Arguments:
      thumbnails, copies: of the N images, as in copies.py.
      groups: the group of each image, or None.
      is_forced: every group, and the rest of every folder, is a recording, whatever it looks like.
    """
    names = [example.name for example in examples]
    same = join_groups([None] * len(names), [copy[:2] for copy in copies], names)
    found = []
    for name, frames in _find_series(examples, groups, is_forced).items():
        rows = normalized(np.stack([thumbnails[index] for index in frames]))
        most = max(Counter(filter(None, (same[index] for index in frames))).values(), default=0)
        # If hardly anything moves, all are copies of each other
        looks = looks_consecutive(rows) or most >= max(FEWEST_FRAMES, SHARE * len(frames))
        reach = reach_of(rows, _longest_gap(len(frames)))
        found.append((Recording(name, frames, reach), is_forced or looks))
    # If most images are in recordings, so are those of series that are too short to tell
    sizes = {
        chosen: sum(len(one.frames) for one, its in found if its == chosen)
        for chosen in (True, False)
    }
    return [
        one
        for one, chosen in found
        if chosen or (len(one.frames) < FEWEST_FRAMES and sizes[True] > sizes[False])
    ]


def _find_series(
    examples: Sequence[SourceExample], groups: Sequence[str | None], is_forced: bool
) -> dict[str, list[int]]:
    """Return the images of each group and folder whose names differ in a number, in its order."""

    def folder(index: int) -> tuple:
        return groups[index], str(examples[index].image.parent)

    def all_but_last(index: int) -> tuple:
        found = LAST_NUMBER.fullmatch(stem_of(examples[index].image))
        return (*folder(index), *found.groups()) if found else (index,)

    def all_but_numbers(index: int) -> tuple:
        return (*folder(index), re.sub(r"\d+", "", stem_of(examples[index].image)))

    keys: list[Callable[[int], tuple]] = [all_but_last, all_but_numbers]
    if is_forced:
        keys = [lambda index: (groups[index] or index,), *keys, folder]
    left = [index for index, example in enumerate(examples) if example.split is None]
    found: list[list[int]] = []
    for key in keys:
        parts: dict[tuple, list[int]] = defaultdict(list)
        for index in left:
            parts[key(index)].append(index)
        found += [frames for frames in parts.values() if len(frames) > 1]
        left = [frames[0] for frames in parts.values() if len(frames) == 1]
    for frames in found:
        frames.sort(key=lambda index: time_order(examples[index].name))
    return dict(zip(_series_names(examples, groups, found), found, strict=True))


def _series_names(
    examples: Sequence[SourceExample], groups: Sequence[str | None], series: list[list[int]]
) -> list[str]:
    """Return a short, unique name of each series: its group, folder, or what its names share."""
    firsts = [examples[frames[0]] for frames in series]
    shared = [_shared_part([stem_of(examples[i].image) for i in frames]) for frames in series]
    folders = [first.image.parent.name for first in firsts]
    own = [groups[frames[0]] for frames in series]
    short = [a or b or c for a, b, c in zip(own, shared, folders, strict=True)]
    longer = ["/".join(filter(None, pair)) for pair in zip(folders, shared, strict=True)]
    whole = [str(first.image) for first in firsts]
    return next(names for names in (short, longer, whole) if len(set(names)) == len(names))


def _shared_part(stems: list[str]) -> str:
    """Return what names begin and end with, without their numbers: video1_012_left, video1_left."""
    parts = []
    for step in (1, -1):
        letters = zip(*(stem[::step] for stem in stems), strict=False)
        equal = itertools.takewhile(lambda same: len(set(same)) == 1, letters)
        start = "".join(same[0] for same in equal)
        parts.append(re.sub(r"[_. -]*\d*$", "", start)[::step])
    return "_".join(filter(None, parts))


def _longest_gap(count: int) -> int:
    return max(1, round(count * MOST_LEFT_OUT))


def _are_enough(groups: Sequence[str | None], facts: dict[str, Any]) -> bool:
    """Return whether whole recordings can be divided: enough of them, not nearly all in one.

    groups: of all their frames, and of images in other groups.
    """
    sizes = Counter(groups)
    wanted = len(groups) * (facts["val_fraction"] + facts["test_fraction"])
    fewest = FEWEST_RECORDINGS + bool(facts["test_fraction"])
    return len(sizes) >= fewest and len(groups) - max(sizes.values()) >= round(wanted)


def _divide(
    recording: Recording,
    copies: Iterable[Copy],
    names: Sequence[str],
    facts: dict[str, Any],
    arranged: Arranged,
) -> None:
    """Split the frames of a recording in time, and group those of each split into blocks.

    Adds both to `arranged`.
    """
    frames = recording.frames
    place = {index: time for time, index in enumerate(frames)}
    alike = [
        sorted((place[copy.first], place[copy.second]))
        for copy in copies
        if copy.first in place and copy.second in place
    ]

    def gap_before(start: int) -> int:
        """Return how many frames to leave out, so that none is like those after it."""
        most = _longest_gap(len(frames))
        across = [start - one for one, other in alike if start - most <= one < start <= other]
        return max(recording.reach, *across, 0)

    splits = split_in_time(len(frames), facts["val_fraction"], facts["test_fraction"], gap_before)
    arranged.splits.update(zip(frames, splits, strict=True))
    for split in dict.fromkeys(splits):
        own = [index for index, its in zip(frames, splits, strict=True) if its == split]
        length = 1 if split == LEFT_OUT else max(1, min(recording.reach, len(own) // BLOCKS))
        for block in np.array_split(own, len(own) // length):
            span = f"{recording.name}: {names[block[0]]} to {names[block[-1]]}"
            for index in block.tolist():
                arranged.groups[index] = span if len(block) > 1 else None


def _describe(recordings: list[Recording], count: int, verb: str = "look like") -> str:
    frames = sum(len(recording.frames) for recording in recordings)
    images = f"the {count} images" if frames == count else f"{frames} of the {count} images"
    names = f"{len(recordings)} recordings ({listed([one.name for one in recordings])})"
    what = "one recording" if len(recordings) == 1 else names
    return f"{images} {verb} consecutive frames of {what}"


def _describe_division(recordings: int, arranged: Arranged, facts: dict[str, Any]) -> str:
    """Return how recordings are split in time; recordings: their number."""
    val, test = (f"{100 * facts[name]:g}%" for name in ("val_fraction", "test_fraction"))
    of_each = " of each" if recordings > 1 else ""
    last = f"the last {val}{of_each} become val"
    if facts["test_fraction"]:
        last = f"the last {test}{of_each} become test, the {val} before val"
    count = Counter(arranged.splits.values())[LEFT_OUT]
    are = "s are" if count > 1 else " is"
    return last + f", {count} frame{are} left out before, as a gap" * bool(count)
