"""Which images are kept for validation and for a test: by seed, and never half a group of them.

And the folds of a cross-validation, as a training has written them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import brief
from finetuning.basics.csv_files import read_with_digest
from finetuning.basics.files import hash_contents
from finetuning.basics.run_outputs import FINAL_FILE, FOLDS_FILE
from finetuning.dataset.pairs import Pair

FOLD_COLUMNS = ("fold", "image", "sha256")


def split_names(
    names: Iterable[str],
    val_fraction: float,
    seed: int,
    test_fraction: float = 0.0,
    group_of: Mapping[str, str | None] | None = None,
) -> dict[str, list[str]]:
    """Split names into train, val and, with a test_fraction, test: alike on every platform.

    group_of: names of one group stay together; one that has None is a group of its own. Each split
    gets at least one group, and else a number of names as near to its fraction of them as groups
    allow. val is the same with a test split and without. Raises UserError for too few groups.
    """
    groups = _in_random_order(names, seed, group_of or {})
    count = sum(map(len, groups))
    needed = 3 if test_fraction else 2
    if len(groups) < needed:
        splits = "train, val and test" if test_fraction else "train and val"
        what = f"{count} pair{'s' * (count != 1)}"
        hint = ""
        if len(groups) < count:
            hint = ", or leave the groups out (copies: --copies ignore)"
            what += f" in {len(groups)} group{'s' * (len(groups) > 1)}, which stay together,"
        raise UserError(f"{what} cannot be split into {splits}; add more pairs{hint}")
    val, rest = choose_groups(groups, count * val_fraction)
    if len(rest) < needed - 1:  # nothing would be left for train or for test
        val = [min(groups, key=len)]
        rest = [group for group in groups if group is not val[0]]
    test, train = choose_groups(rest, count * test_fraction) if test_fraction else ([], rest)
    splits = {"train": train, "val": val, "test": test}
    return {
        split: sorted(name for group in of_split for name in group)
        for split, of_split in splits.items()
        if of_split
    }


def make_folds(
    names: Iterable[str], count: int, seed: int, group_of: Mapping[str, str | None]
) -> list[list[str]]:
    """Divide names into `count` lists of about equal length, groups kept whole, by seed.

    Raises UserError where there are fewer groups than that.
    """
    groups = _in_random_order(names, seed, group_of)
    if len(groups) < count:
        raise UserError(f"--folds {count} needs as many groups of images; there are {len(groups)}")
    folds: list[list[str]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):  # the large ones first; the sort is stable
        min(folds, key=len).extend(group)
    return [sorted(fold) for fold in folds]


def _in_random_order(
    names: Iterable[str], seed: int, group_of: Mapping[str, str | None]
) -> list[list[str]]:
    """Return the names by group, both in an order that follows from the seed."""
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
    """Choose some groups, not all, of which the sizes together come nearest to `wanted`.

    Of several such choices it is that with the earliest groups: where each has one name, the first
    so many. Returns the chosen ones and the others.
    """
    # Which totals the groups from each one on can make: bit n of a whole number is total n
    sizes = [len(group) for group in groups]
    target = round(wanted)
    most = (1 << (target + max(sizes) + 1)) - 1
    reachable = [1]
    for size in reversed(sizes):
        reachable.append((reachable[-1] | reachable[-1] << size) & most)
    totals = [n for n in range(1, min(most.bit_length(), sum(sizes))) if reachable[-1] >> n & 1]
    left = min(totals, key=lambda total: abs(total - target))

    chosen, others = [], []
    for group, after in zip(groups, reversed(reachable[:-1]), strict=True):
        is_chosen = len(group) <= left and after >> (left - len(group)) & 1
        (chosen if is_chosen else others).append(group)
        left -= len(group) if is_chosen else 0
    return chosen, others


def keyed(pairs: dict[str, list[Pair]]) -> dict[str, Pair]:
    """Return pairs by SPLIT/NAME, since a name may be in several splits."""
    return {f"{split}/{pair.name}": pair for split, found in pairs.items() for pair in found}


def fold_folder(output: Path, number: int) -> Path:
    return output / f"fold_{number}"


def read_folds(output: Path, pairs: dict[str, list[Pair]]) -> dict[Path, list[Pair]]:
    """Return the pairs of each fold, by the model of its last epoch, which has not seen them.

    Images are matched by their content: another split or name changes nothing. The best epoch is
    none to take here: the fold itself chose it. Raises UserError where the folds are not there, are
    not those of these pairs, or are not all trained.
    """
    file = output / FOLDS_FILE
    if not file.is_file():
        raise UserError(f"no {file}; run: python train_sam2_proper.py --folds 5")
    folds: dict[Path, list[Pair]] = {}
    of_content: dict[str, dict[str, Pair]] = {}  # several by their keys, where some are the same
    by_key = keyed(pairs)
    hashes = hash_contents(pair.image for pair in by_key.values())
    for key, pair in by_key.items():
        of_content.setdefault(hashes[pair.image], {})[key] = pair
    for fold, key, sha256 in read_with_digest(file, FOLD_COLUMNS):
        same = of_content.get(sha256)
        if not same or not fold.isdecimal():
            raise UserError(f"{file} has {brief(key)}, which is not in this --data; train anew")
        pair = same.pop(key if key in same else next(iter(same)))
        folds.setdefault(fold_folder(output, int(fold)) / FINAL_FILE, []).append(pair)
    if left := sum(map(len, of_content.values())):
        print(f"images that are in no fold, and so are not measured: {left}")
    for model in folds:
        if not model.is_file():
            raise UserError(f"{model} is missing; train with --folds to the end (--resume goes on)")
    return folds
