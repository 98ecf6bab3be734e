"""Split images into train, val and test, or into the folds of a cross-validation.

A split depends only on the names, the groups and the seed, so it is the same on every platform. All
images of a group are in the same split.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import brief
from finetuning.basics.csv_files import read_with_digest
from finetuning.basics.files import hash_contents
from finetuning.basics.run_outputs import FINAL_FILE, FOLDS_FILE
from finetuning.dataset.pairs import Pair

LEFT_OUT = "left out"  # the split of frames between two splits of a recording
FOLD_COLUMNS = ("fold", "image", "sha256")


def split_names(
    names: Iterable[str],
    val_fraction: float,
    seed: int,
    test_fraction: float = 0.0,
    group_of: Mapping[str, str | None] | None = None,
) -> dict[str, list[str]]:
    """Split names into train, val and, with a test_fraction, test.

    Each split gets at least one group, and a number of names as near to its fraction as the groups
    allow. val is the same with and without a test split. Raises UserError for too few groups.

    group_of: the group of each name; a name without one (or None) is a group by itself.
    """
    groups = _in_random_order(names, seed, group_of or {})
    count = sum(map(len, groups))
    needed = 3 if test_fraction else 2
    if len(groups) < needed:
        splits = "train, val and test" if test_fraction else "train and val"
        what = f"{count} pair{'s' * (count != 1)}"
        hint = "add more pairs"
        if len(groups) < count:
            hint = "add pairs of others, or divide each group in the order of names: --frames time"
            what += f" in {len(groups)} group{'s' * (len(groups) > 1)}, which stay together,"
        raise UserError(f"{what} cannot be split into {splits}; {hint}")
    # val comes first, so that it does not depend on test_fraction
    val, rest = choose_groups(groups, count * val_fraction)
    if len(rest) < needed - 1:  # too few groups for train and test: make val as small as possible
        val = [min(groups, key=len)]
        rest = [group for group in groups if group is not val[0]]
    test, train = choose_groups(rest, count * test_fraction) if test_fraction else ([], rest)
    splits = {"train": train, "val": val, "test": test}
    return {
        split: sorted(name for group in chosen for name in group)
        for split, chosen in splits.items()
        if chosen
    }


def split_more(
    group_of: Mapping[str, str | None],
    val_fraction: float,
    seed: int,
    test_fraction: float,
    known: Iterable[tuple[str, str | None]],
) -> dict[str, str]:
    """Return the split of each new name, so that all images together approach the fractions.

    Names of a group that is known go to its split: the one with most of its images.

    Arguments:
      group_of: the group of each new name, or None if it is alone.
      known: the split and the group of each image that is split already.
    """
    homes: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for split, group in known:
        counts[split] += 1
        if group:
            homes.setdefault(group, Counter())[split] += 1
    total = counts.total() + len(group_of)
    wanted = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    split_of = {}
    for names in _in_random_order(group_of, seed, group_of):
        group = group_of[names[0]]
        if group in homes:
            split = homes[group].most_common(1)[0][0]
        else:  # where most is missing
            split = max(wanted, key=lambda split: wanted[split] * total - counts[split])
        counts[split] += len(names)
        split_of |= dict.fromkeys(names, split)
    return split_of


def split_in_time(
    count: int,
    val_fraction: float,
    test_fraction: float,
    gap_before: Callable[[int], int] = lambda start: 0,
) -> list[str]:
    """Return the split of each frame of a recording: train, then val, then test.

    All are train if there are too few frames.

    gap_before: how many frames to leave out before a split that starts at this frame.
    """
    splits: list[str] = []
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if fraction:
            splits = [split] * max(1, round(count * fraction)) + splits
            splits = [LEFT_OUT] * gap_before(max(0, count - len(splits))) + splits
    if len(splits) < count:
        return ["train"] * (count - len(splits)) + splits
    has_gaps = LEFT_OUT in splits
    return split_in_time(count, val_fraction, test_fraction) if has_gaps else ["train"] * count


def time_order(name: str) -> list[str | int]:
    """Return a sort key in which the numbers in a name count as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def make_folds(
    names: Iterable[str], count: int, seed: int, group_of: Mapping[str, str | None]
) -> list[list[str]]:
    """Divide names at random into `count` lists of about equal length, without dividing groups.

    Raises UserError if there are fewer groups than lists.
    """
    groups = _in_random_order(names, seed, group_of)
    if len(groups) < count:
        raise UserError(f"--folds {count} needs as many groups of images; there are {len(groups)}")
    folds: list[list[str]] = [[] for _ in range(count)]
    # Large groups first, each into the shortest fold; the sort is stable, so the seed decides ties
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return [sorted(fold) for fold in folds]


def fold_groups(pairs: Mapping[str, Pair], count: int) -> dict[str, str | None]:
    """Return the group of each pair, by key; a recording that is split in time has one per fold.

    These groups are consecutive parts, so few frames have neighbours in another fold.
    """
    groups = {key: pair.group for key, pair in pairs.items()}
    recordings: dict[str, list[str]] = {}
    for key, pair in sorted(pairs.items(), key=lambda item: time_order(item[1].name)):
        if pair.recording:
            recordings.setdefault(pair.recording, []).append(key)
    for recording, keys in recordings.items():
        parts = {key: place * count // len(keys) for place, key in enumerate(keys)}
        groups |= {key: f"{recording}, part {part}" for key, part in parts.items()}
    return groups


def _in_random_order(
    names: Iterable[str], seed: int, group_of: Mapping[str, str | None]
) -> list[list[str]]:
    """Return the names of each group; names and groups are in an order drawn by the seed."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    groups: dict[tuple[str | None, str], list[str]] = {}
    for name in shuffled:
        group = group_of.get(name)
        groups.setdefault((group, "" if group else name), []).append(name)
    return list(groups.values())


def choose_groups(
    groups: list[list[str]], wanted: float
) -> tuple[list[list[str]], list[list[str]]]:
    """Choose some groups, but not all, with a total size as near to `wanted` as possible.

    Of several such choices, it is the one with the earliest groups; if every group has one name,
    these are the first `wanted`. Returns the chosen and the other groups.
    """
    # A subset-sum problem. reachable[k] is a bit set: bit n says that some of the last k groups
    # have total size n.
    sizes = [len(group) for group in groups]
    target = round(wanted)
    most = (1 << (target + max(sizes) + 1)) - 1
    reachable = [1]
    for size in reversed(sizes):
        reachable.append((reachable[-1] | reachable[-1] << size) & most)
    totals = [n for n in range(1, min(most.bit_length(), sum(sizes))) if reachable[-1] >> n & 1]
    left = min(totals, key=lambda total: abs(total - target))

    # Take a group whenever the groups after it can make up what is then left
    chosen, others = [], []
    for group, after in zip(groups, reversed(reachable[:-1]), strict=True):
        is_chosen = len(group) <= left and after >> (left - len(group)) & 1
        (chosen if is_chosen else others).append(group)
        left -= len(group) if is_chosen else 0
    return chosen, others


def keyed(pairs: dict[str, list[Pair]]) -> dict[str, Pair]:
    """Return the pairs by the key SPLIT/NAME, because several splits may contain the same name."""
    return {f"{split}/{pair.name}": pair for split, found in pairs.items() for pair in found}


def fold_folder(output: Path, number: int) -> Path:
    return output / f"fold_{number}"


def read_folds(output: Path, pairs: dict[str, list[Pair]]) -> dict[Path, list[Pair]]:
    """Map the model of each fold to the fold's pairs, which it has not seen in training.

    It is the model of the last epoch. Not the best epoch: it was selected on this fold. Images are
    matched by content, so a changed name or split does not matter. Raises UserError if there are no
    folds, if they contain other images, or if a fold has no model yet.
    """
    file = output / FOLDS_FILE
    if not file.is_file():
        raise UserError(f"no {file}; run: python train_sam2_proper.py --folds 5")
    folds: dict[Path, list[Pair]] = {}
    by_content: dict[str, dict[str, Pair]] = {}  # image hash -> key -> pair; several if identical
    by_key = keyed(pairs)
    hashes = hash_contents(pair.image for pair in by_key.values())
    for key, pair in by_key.items():
        by_content.setdefault(hashes[pair.image], {})[key] = pair
    for fold, key, sha256 in read_with_digest(file, FOLD_COLUMNS):
        same = by_content.get(sha256)
        if not same or not fold.isdecimal():
            raise UserError(f"{file} has {brief(key)}, which is not in this --data; train again")
        pair = same.pop(key if key in same else next(iter(same)))
        folds.setdefault(fold_folder(output, int(fold)) / FINAL_FILE, []).append(pair)
    if left := sum(map(len, by_content.values())):
        print(f"images in no fold, which are not measured: {left}")
    for model in folds:
        if not model.is_file():
            raise UserError(f"{model} is missing; finish training with --folds and --resume")
    return folds
