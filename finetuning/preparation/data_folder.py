"""Fill a data folder with pairs, split into train, val and perhaps test.

data/images/{train,val,test}/NAME.jpg   copies of the user's images
data/masks/{train,val,test}/NAME.png    black and white, or a label map (NAME.tif: several)
data/split.json                         the facts: source, options, split, groups; a digest
data/sources.json                       the sources, to notice what changes in them
data/copies.csv, overview.png           duplicates; a picture to look at
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import listed, nfc, tell
from finetuning.basics.files import MAX_FILE_BYTES, require_file
from finetuning.dataset.splitting import LEFT_OUT, split_more, split_names
from finetuning.preparation.copies import (
    COPIES_FILE,
    Copy,
    describe_copies,
    find_copies,
    write_copies,
)
from finetuning.preparation.demo_images import write_demo_dataset
from finetuning.preparation.filling import UNSPLIT, Filled, Filler, move_to_splits
from finetuning.preparation.fingerprint import (
    SOURCES_KEY,
    Record,
    key_of,
    write_records,
)
from finetuning.preparation.groups import Grouping, divided_groups, find_groups
from finetuning.preparation.recordings import Arranged, arrange
from finetuning.preparation.replacing import new_dataset
from finetuning.sources.mask_values import MaskRule
from finetuning.sources.pairing import SourceExample


def check_examples(examples: list[SourceExample]) -> None:
    """Raise UserError, before any file is copied, for examples that cannot be.

    One is not a file or is too large, or Windows and macOS treat two names as the same.
    """
    for example in examples:
        for source in (example.image, *example.masks):
            if isinstance(source, Path):  # members of an archive have been checked already
                require_file(source, MAX_FILE_BYTES)
    seen: dict[tuple[str | None, str], SourceExample] = {}
    for example in examples:
        key = example.split, nfc(example.name.casefold())
        if key in seen:
            raise UserError(
                f"{seen[key].image} and {example.image} differ only in upper and lower case, which "
                "is the same name on Windows and macOS; rename one of them, and its mask"
            )
        seen[key] = example


def fill_folder(
    data: Path,
    examples: list[SourceExample],
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    grouping: Grouping,
    facts: dict[str, Any],
    record: Record,
) -> list[Filled]:
    """Check every example and copy it into `data`; return the filled images.

    Examples without a split are split by the seed and the fractions in `facts`; groups and copies
    stay together. If any file is invalid, nothing is copied and UserError is raised.
    record: of the source, from take_record.
    """
    check_examples(examples)
    per_object = gives_objects(examples, rule)
    facts = dict(facts)
    if per_object:
        facts["masks"] = "objects"
    if value_range:
        facts["value_range"] = list(value_range)
    if facts["test_fraction"] and any(example.split for example in examples):
        raise UserError("the images are split already; leave --test-fraction out")
    given = find_groups(examples, grouping)
    with new_dataset(data, facts) as folder:
        filler = Filler(folder, rule, per_object, value_range)
        filled = filler.fill(examples)
        filler.check_objects(filled)
        copies = find_copies_among(filled, given)
        arranged = arrange(examples, filled, copies, given, grouping, facts)
        filled = split_filled(folder, filled, arranged, facts)
        copies = write_kept_copies(folder, filled, given, copies)
        rows = {key_of(example): image.row for example, image in zip(examples, filled, strict=True)}
        facts[SOURCES_KEY] = write_records(folder, [record._replace(rows=rows)])
    report_filled(data, filler, filled, copies)
    is_ready = any(example.split for example in examples)
    if is_ready and (divided := divided_groups(given, [image.split for image in filled])):
        print(f"warning: the given split divides {len(divided)} groups: {listed(divided)}")
    return [image for image in filled if image.split != LEFT_OUT]


def gives_objects(examples: list[SourceExample], rule: MaskRule) -> bool:
    """Return whether an image may have several objects."""
    return rule.gives_objects or any(len(example.masks) != 1 for example in examples)


def find_copies_among(filled: list[Filled], given: Sequence[str | None]) -> list[Copy]:
    """Return the pairs of copies; they are found in the copied images, before the split.

    given: the group of each image. The slices of two patients may look the same, so only equal
    files are copies in two groups.
    """
    copies = find_copies([image.thumbnail for image in filled], [image.sha256 for image in filled])
    return [
        copy
        for copy in copies
        if given[copy.first] in (given[copy.second], None)
        or given[copy.second] is None
        or filled[copy.first].sha256 == filled[copy.second].sha256
    ]


def write_kept_copies(
    folder: Path, filled: list[Filled], given: Sequence[str | None], copies: list[Copy]
) -> list[Copy]:
    """Write and return the pairs of copies, without frames that are left out.

    Images that look the same in one of the given groups are not worth a word.
    """
    names = [(image.split, image.name) for image in filled]
    copies = [
        copy
        for copy in copies
        if LEFT_OUT not in (names[copy.first][0], names[copy.second][0])
        and (
            given[copy.first] is None
            or given[copy.first] != given[copy.second]
            or filled[copy.first].sha256 == filled[copy.second].sha256
        )
    ]
    write_copies(folder / COPIES_FILE, names, copies)
    return copies


def report_filled(data: Path, filler: Filler, filled: list[Filled], copies: list[Copy]) -> None:
    """Print how many parts were left out, and which images are copies."""
    if filler.reader.dropped_parts:
        print(
            f"left out {filler.reader.dropped_parts} parts of fewer than "
            f"{filler.reader.rule.smallest_part} pixels (--smallest-part)"
        )
    if copies:
        names = [(image.split, image.name) for image in filled]
        tell(describe_copies(data / COPIES_FILE, names, copies))


def split_filled(
    folder: Path,
    filled: list[Filled],
    arranged: Arranged,
    facts: dict[str, Any],
    is_addition: bool = False,
) -> list[Filled]:
    """Split the images in UNSPLIT, in time or at random; move their files; add all to `facts`.

    is_addition: split them so that all images together approach the fractions.
    """
    split_of = {filled[index].name: split for index, split in arranged.splits.items()}
    unsplit = {
        image.name: group
        for image, group in zip(filled, arranged.groups, strict=True)
        if image.split == UNSPLIT and image.name not in split_of
    }
    if unsplit:
        fractions = facts["val_fraction"], facts["seed"], facts["test_fraction"]
        if is_addition:
            known = [(image.split, group)
                     for image, group in zip(filled, arranged.groups, strict=True)
                     if image.split != UNSPLIT]  # fmt: skip
            split_of |= split_more(unsplit, *fractions, known)
        else:
            splits = split_names(unsplit, *fractions, unsplit)
            split_of |= {name: split for split, names in splits.items() for name in names}
    if split_of:
        move_to_splits(folder, split_of)
    filled = [
        image._replace(split=split_of[image.name]) if image.split == UNSPLIT else image
        for image in filled
    ]
    facts["groups"] = {}
    for index, (image, group) in enumerate(zip(filled, arranged.groups, strict=True)):
        facts.setdefault(image.split, []).append(image.name)
        if group:
            facts["groups"].setdefault(image.split, {})[image.name] = group
        if recording := arranged.recordings.get(index):
            facts.setdefault("recordings", {}).setdefault(image.split, {})[image.name] = recording
    return filled


def draw_demo(data: Path) -> None:
    """Draw the demo's images and masks into `data`."""
    tell(f"drawing the demo images into {data}")
    with new_dataset(data, {"source": "demo"}) as folder:
        write_demo_dataset(folder)
