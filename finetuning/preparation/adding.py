"""Add images to a filled data folder (--add): the earlier ones stay in their split."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import listed, tell
from finetuning.basics.files import content_sha256
from finetuning.basics.image_files import read_image, read_mask
from finetuning.basics.threads import in_threads
from finetuning.dataset.pairs import SPLITS, Pair, read_facts, split_pairs, splits_of
from finetuning.dataset.splitting import keyed
from finetuning.preparation.copies import Copy, make_thumbnail
from finetuning.preparation.data_folder import (
    check_examples,
    find_copies_among,
    gives_objects,
    report_filled,
    split_filled,
    write_kept_copies,
)
from finetuning.preparation.filling import UNSPLIT, Filled, Filler, write_objects
from finetuning.preparation.fingerprint import (
    SOURCES_KEY,
    Match,
    Record,
    Row,
    gone_rows,
    key_of,
    match_examples,
    new_row,
    read_records,
    stamp_file,
    write_records,
)
from finetuning.preparation.groups import COPIES_OF, Grouping, find_groups, join_groups
from finetuning.preparation.recordings import Arranged, find_recordings
from finetuning.preparation.replacing import new_dataset
from finetuning.preparation.unchanged import (
    REPLACE,
    SPLIT_DEFAULTS,
    differences,
    record_of,
    split_changes,
)
from finetuning.sources.folder_layouts import IMAGE_FOLDERS
from finetuning.sources.mask_values import MaskRule
from finetuning.sources.pairing import SourceExample, safe_name


def add_to_folder(
    data: Path,
    examples: list[SourceExample],
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    grouping: Grouping,
    facts: dict[str, Any],
    now: Record,
) -> list[Filled] | None:
    """Add a source's new images to a filled `data`, and replace those that have changed.

    Images in train, val or test stay there. Returns the added and replaced images; None if there is
    nothing to do. Raises UserError, and changes nothing, if images of the same source are gone or
    the options differ.

    Arguments:
      facts: as for is_kept.
      now: the source's record, from take_record.
    """
    known, records = _require_addable(data, facts, value_range)
    record = record_of({option: Path(path) for option, path in now.paths.items()}, records)
    matches = _match(examples, now, record, records)
    changed = [index for index, match in enumerate(matches) if match.is_new or match.is_changed]
    keys = {key_of(example) for example in examples}
    if not changed and not (record and (now.groups, keys) != (record.groups, record.rows.keys())):
        return None
    todo = [index for index in changed if not matches[index].is_left_out]
    check_examples(examples)
    given = find_groups(examples, grouping)
    if not grouping.is_given:  # in a filled folder, a single volume can stay together
        given = [example.group for example in examples]
    pairs = keyed({split: split_pairs(data, split) for split in splits_of(data)})
    placed = _place(matches, pairs)
    given_of, group_of = _groups_by_place(pairs, placed, given)
    facts = {name: value for name, value in known.items() if name not in (*SPLITS, "groups")}
    per_object = known.get("masks") == "objects" or gives_objects(examples, rule)
    facts |= {"masks": "objects"} if per_object else {}
    replaced = {_place_of(placed[index]) for index in todo}
    kept = {place: pair for place, pair in pairs.items() if place not in replaced}
    with new_dataset(data, facts) as folder:
        images = _carry_over(folder, kept, records, per_object)
        filler = Filler(folder, rule, per_object, value_range)
        added = [placed[index] for index in todo]
        images += filler.fill(added)
        given = [given_of.get(_place_of(image)) for image in images]
        groups, copies = _group_all(images, added, group_of, given, grouping)
        images = split_filled(folder, images, Arranged(groups, {}, {}), facts, is_addition=True)
        copies = write_kept_copies(folder, images, given, copies)
        filled = dict(zip(todo, images[len(kept) :], strict=True))
        rows = {key_of(match.example): _row_now(match, filled.get(index))
                for index, match in enumerate(matches)}  # fmt: skip
        others = [old for old in records if old is not record]
        facts[SOURCES_KEY] = write_records(folder, [*others, now._replace(rows=rows)])
    report_filled(data, filler, images, copies)
    tell(_summary([matches[index] for index in todo], list(filled.values())))
    return list(filled.values())


def _require_addable(
    data: Path, facts: dict[str, Any], value_range: tuple[float, float] | None
) -> tuple[dict[str, Any], list[Record]]:
    """Return the facts and the records of a folder to which images can be added."""
    known = read_facts(data)
    records = read_records(data, known) if known else None
    if not records:
        raise UserError(
            f"{data} has no record of its sources (arranged by hand, the demo, or filled by an "
            "earlier version), so --add cannot tell what is new; use another --data folder, or "
            "--force to fill it again"
        )
    given = {name: facts[name] if facts[name] != default else known[name]
             for name, default in SPLIT_DEFAULTS.items()}  # fmt: skip
    changes = split_changes(known, given)
    new_range = list(value_range) if value_range else facts.get("value_range")
    changes += differences({"value_range": known.get("value_range")}, {"value_range": new_range})
    if changes:
        raise UserError(f"--add keeps the split and the values: {', '.join(changes)}; {REPLACE}")
    return known, records


def _match(
    examples: list[SourceExample], now: Record, record: Record | None, records: list[Record]
) -> list[Match]:
    """Match the examples to the rows of their source (record), then to those of other sources."""
    if record and (changes := differences(record.options, now.options)):
        raise UserError(f"--add needs the same options as before: {', '.join(changes)}; {REPLACE}")
    rows = record.rows if record else {}
    others = {row.place: row for old in records if old is not record for row in old.rows.values()}
    matches = match_examples(examples, rows, list(others.values()))
    if gone := [row.place.partition("/")[2] for row in gone_rows(matches, rows)]:
        raise UserError(
            f"{len(gone)} of {len(rows)} images, or their masks, are gone from the source: "
            f"{listed(gone)}; bring them back, or fill the folder again without them: --force"
        )
    return matches


def _named_group(pair: Pair) -> str | None:
    """Return a pair's group, unless it consists of copies or of frames that are split in time."""
    return None if pair.recording or (pair.group or "").startswith(COPIES_OF) else pair.group


def _place_of(image: SourceExample | Filled) -> str:
    return f"{image.split or UNSPLIT}/{image.name}"


def _place(matches: Sequence[Match], places: Iterable[str]) -> list[SourceExample]:
    """Return the examples with their names and splits in the data folder.

    A new image with a name that is there gets its folder's name and a number, as in name_examples.
    """
    names = {place.partition("/")[2].casefold() for place in places}
    placed = []
    for match in matches:
        example = match.example
        if match.row:
            split, _, name = match.row.place.partition("/")
        else:
            split, name = example.split, example.name
            folders = [example.image.parent.name, example.image.parent.parent.name]
            telling = [folder for folder in folders if folder.casefold() not in IMAGE_FOLDERS]
            base = f"{safe_name(telling[0])}_{name}" if any(telling[:1]) else name
            number = 0
            while name.casefold() in names:
                number += 1
                name = base if number == 1 else f"{base}_{number}"
            names.add(name.casefold())
        placed.append(example._replace(name=name, split=split))
    return placed


def _carry_over(
    folder: Path, kept: dict[str, Pair], records: Sequence[Record], per_object: bool
) -> list[Filled]:
    """Link the files of pairs into a new data folder; return what the split needs of them."""
    hashes = {row.place: row.image.sha256 for old in records for row in old.rows.values()}
    for kind in ("images", "masks"):
        for split in {place.partition("/")[0] for place in kept}:
            (folder / kind / split).mkdir(parents=True)

    def carry(place: str) -> Filled:
        pair, (split, _, name) = kept[place], place.partition("/")
        _link(pair.image, folder / "images" / split / pair.image.name)
        mask = folder / "masks" / split / pair.mask.name
        if per_object and not pair.per_object:  # a label map, as the added images need
            binary = read_mask(pair.mask)
            write_objects(mask.with_name(name), [binary], binary.shape)
        elif pair.mask.is_dir():
            mask.mkdir()
            for file in pair.mask_files():
                _link(file, mask / file.name)
        else:
            _link(pair.mask, mask)
        sha256 = hashes.get(place) or content_sha256(pair.image)
        thumbnail = make_thumbnail(read_image(pair.image))
        return Filled(name, split, [], 0, False, sha256, thumbnail)

    return in_threads(carry, list(kept), "Reading the images that are there", "image")


def _groups_by_place(
    pairs: dict[str, Pair], placed: Sequence[SourceExample], given: Sequence[str | None]
) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Return by SPLIT/NAME the groups that are given, and those with which an image stays.

    given: the group of each of `placed`.
    """
    given_of = {place: _named_group(pair) for place, pair in pairs.items()}
    given_of |= {_place_of(image): group for image, group in zip(placed, given, strict=True)}
    # Frames that are split in time stay in their blocks
    in_time = {place for place, pair in pairs.items() if pair.recording}
    group_of = {place: pair.group for place, pair in pairs.items()}
    group_of |= {
        place: group for place, group in given_of.items() if group and place not in in_time
    }
    return given_of, group_of


def _group_all(
    images: list[Filled],
    added: list[SourceExample],
    group_of: dict[str, str | None],
    given: Sequence[str | None],
    grouping: Grouping,
) -> tuple[list[str | None], list[Copy]]:
    """Return the group of each image, after copies have joined groups, and the copies.

    Arguments:
      added: the examples of the last images.
      group_of: the known groups by SPLIT/NAME.
      given: the groups of the images that the user or their folders name, as in fill_folder.
    """
    first_added = len(images) - len(added)
    if grouping.frames != "random" and not grouping.is_given:
        new = [pair for pair in zip(added, images[first_added:], strict=True) if not pair[0].split]
        group_of = _group_new_recordings(new, set(group_of.values())) | group_of
    known_groups = [group_of.get(_place_of(image)) for image in images]
    copies = find_copies_among(images, given)
    # Earlier images are joined already, except frames that are split in time, which must not be
    alike = [copy[:2] for copy in copies if copy.second >= first_added]
    alike = alike if grouping.joins_copies else []
    return join_groups(known_groups, alike, [image.name for image in images]), copies


def _group_new_recordings(
    added: list[tuple[SourceExample, Filled]], known: set[str | None]
) -> dict[str, str]:
    """Return the recording of each new frame, by its place: frames of one go to the same split.

    known: the groups of the earlier images; a recording that is one of them goes to its split.
    """
    if not added:
        return {}
    examples, images = zip(*added, strict=True)
    thumbnails = [image.thumbnail for image in images]
    recordings = find_recordings(examples, thumbnails, [], [None] * len(examples))
    return {
        _place_of(images[index]): (
            recording.name if recording.name in known else f"{recording.name}: added"
        )
        for recording in recordings
        for index in recording.frames
    }


def _link(file: Path, to: Path) -> None:
    """Give a file a second name, or copy it where the drive has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def _row_now(match: Match, filled: Filled | None) -> Row:
    """Return the row of a match, which was filled now or is as it was but for its times."""
    if filled:
        return filled.row
    example, (place, image, masks) = match.example, match.row
    if match.is_changed:  # a frame that is left out, so it is not filled
        return new_row(place, example)
    if example.annotated is None:
        masks = tuple(map(stamp_file, example.masks, [mask.sha256 for mask in masks]))
    return Row(place, stamp_file(example.image, image.sha256), masks)


def _summary(done: Sequence[Match], filled: Sequence[Filled]) -> str:
    """Return the line that says what was added and replaced."""
    pairs = list(zip(done, filled, strict=True))
    splits = Counter(image.split for match, image in pairs if match.is_new)
    where = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split])
    replaced = {
        "image": sum(match.image_changed for match in done),
        "mask": sum(match.masks_changed and not match.image_changed for match in done),
    }
    parts = [f"{splits.total()} new image{'s' * (splits.total() > 1)} ({where})"] if where else []
    parts += [f"{n} replaced {what}{'s' * (n > 1)}" for what, n in replaced.items() if n]
    return f"added: {', '.join(parts) or 'no image'}; every earlier image keeps its split"
