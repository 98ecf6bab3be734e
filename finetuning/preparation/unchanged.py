"""Whether a filled data folder still holds what its source holds; if not, say what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import brief, brief_path, listed, tell
from finetuning.dataset.pairs import (
    SPLIT_FILE,
    find_own_image,
    holds_files,
    how_to_fill,
    is_filled,
    read_facts,
)
from finetuning.preparation.fingerprint import (
    Match,
    Record,
    Row,
    gone_rows,
    match_examples,
    read_records,
    take_record,
)
from finetuning.sources.source import Source

SPLIT_DEFAULTS = {"seed": 42, "val_fraction": 0.2, "test_fraction": 0.0}
PATH_OPTIONS = ("images", "masks", "groups")  # options with paths in folders of earlier versions
# Options whose names on the command line are not those in split.json
OPTION_NAMES = {
    "class_names": "--class-name", "value": "--mask-value", "each_value": "--instances",
    "ignored": "--ignore-value",
}  # fmt: skip
REPLACE = "--force fills the folder again, or use another --data folder"


def kept_value_range(data: Path) -> tuple[float, float] | None:
    """Return the value range of a filled data folder, which new volumes share; else None."""
    try:
        low_high = read_facts(data).get("value_range")
    except UserError:  # is_kept says more
        return None
    return tuple(low_high) if low_high else None


def is_kept(
    data: Path, source: Source, paths: dict[str, Path], facts: dict[str, Any], force: bool
) -> bool:
    """Return whether `data` already holds the pairs of a source, or of any if none is chosen.

    Raises UserError, which names the differences, if it holds another data set or an earlier state
    of this one, and if it holds files that this script did not put there.

    Arguments:
      paths: of the source and the table of groups, by option.
      facts: to store in split.json: the options, and the seed and the fractions of the split.
    """
    if not (data / SPLIT_FILE).is_file():
        if is_filled(data) and not (force or source.name):
            return True  # the user arranged the folder by hand
        if holds_files(data):
            raise UserError(
                f"{data} holds images or masks that this script did not put there; "
                "move them away, or use another --data folder"
            )
        if source.name in (None, "demo") and (own := find_own_image(data)):
            raise UserError(
                f"{data} holds images of yours ({brief(own.name)}); {how_to_fill(data)}"
            )
        return False
    if force or not is_filled(data):
        return False
    try:
        known = read_facts(data)
        records = read_records(data, known)
    except UserError as error:  # edited by hand
        if source.name:
            raise UserError(
                f"{data} already holds a data set made from an unknown source ({error}); {REPLACE}"
            ) from error
        return True
    if not source.name:
        _require_same_choices(data, known, facts)
    elif source.demo or not records:
        _require_same_source(data, source, paths, known, facts)
    else:
        _require_unchanged(data, source, paths, known, records, facts)
    return True


def _require_same_choices(data: Path, known: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise UserError if the user, who names no source, chose options that differ from known."""
    given = {name: known[name] for name in SPLIT_DEFAULTS if name in known}
    given |= {name: facts[name] for name, default in SPLIT_DEFAULTS.items()
              if facts[name] != default}  # fmt: skip
    taken = known.get("options", {})
    options = {**taken, **facts["options"]}
    if known["source"] != "demo" and (
        changes := [*split_changes(known, given), *differences(taken, options)]
    ):
        raise UserError(f"{data} was filled with other options: {', '.join(changes)}; {REPLACE}")


def _require_same_source(
    data: Path,
    source: Source,
    paths: dict[str, Path],
    known: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Raise UserError unless `data` was made from this source; its files are not compared.

    For the demo, and for folders that an earlier version filled, which recorded no files.
    """
    if known["source"] != source.name:
        raise UserError(
            f"{data} already holds a data set made from {brief_path(known['source'])}; {REPLACE}"
        )
    if source.demo:
        return
    taken = {k: v for k, v in known.get("options", {}).items() if k != "test_fraction"}
    options = facts["options"] | {
        option: str(paths[option].resolve()) for option in PATH_OPTIONS if option in paths
    }
    if changes := [*split_changes(known, facts), *differences(taken, options)]:
        raise UserError(f"{data} was filled with other options: {', '.join(changes)}; {REPLACE}")
    tell(
        f"warning: {data} was filled by an earlier version of this script, which did not record "
        "its sources, so changes in your files are not noticed; --force fills it again"
    )


def _require_unchanged(
    data: Path,
    source: Source,
    paths: dict[str, Path],
    known: dict[str, Any],
    records: list[Record],
    facts: dict[str, Any],
) -> None:
    """Raise UserError, which names the differences, if a source is not as it is in the records."""
    record = record_of(paths, records)
    now = take_record(paths, record.folders if record else [], facts["options"], data)
    for option, path in paths.items():
        if record and not path.exists():
            raise UserError(
                f"--{option} {brief_path(path)}, from which {data} was filled, is gone; to use "
                f"{data} as it is, leave out the options of the source"
            )
    # A folder that was moved or copied is the same source
    record = record or next((old for old in records if old.listing == now.listing), None)
    if not record:
        made_from = " and ".join(brief_path(_name_of(old)) for old in records)
        raise UserError(
            f"{data} already holds a data set made from {made_from}; --add adds these images to "
            f"it, {REPLACE}"
        )
    choices = [*split_changes(known, facts), *differences(record.options, now.options)]
    tables = [{"groups": old and True} for old in (record.groups, now.groups)]
    groups = differences(*tables)
    if not groups and now.groups != record.groups:
        groups = ["the table of --groups changed"]
    changes, can_add = [], not choices
    if (now.listing, now.times) != (record.listing, record.times):
        try:
            with source.find(data) as found:
                matches = match_examples(found.examples, record.rows)
                changes = describe_changes(matches, record.rows)
                can_add &= not gone_rows(matches, record.rows)
        except UserError as error:
            raise UserError(f"the source has changed since {data} was filled: {error}") from error
    if changes or groups or choices:
        how = "--add applies these changes and keeps the split, " if can_add else ""
        what = (
            "holds another state of this data set"
            if changes or groups
            else "was filled with other options"
        )
        raise UserError(
            f"{data} {what}: {', '.join([*changes, *groups, *choices])}; {how}{REPLACE}"
        )


def describe_changes(matches: Sequence[Match], rows: Mapping[str, Row]) -> list[str]:
    """Return phrases that name the differences between a source's examples and its rows."""
    known = [match for match in matches if match.row]

    def phrase(names: Sequence[str], one: str, several: str, of: str = "") -> list[str]:
        what = several if len(names) > 1 or of else one
        return [f"{what.format(f'{len(names)}{of}')} ({listed(names)})"] if names else []

    of = f" of {len(rows)}"
    masks = [
        (match.example.masks or [match.example.image])[0].name
        for match in known
        if match.masks_changed
    ]
    images = [match.example.image.name for match in known if match.image_changed]
    moved = [
        match.example.image.name
        for match in known
        if match.key and match.key.partition("/")[0] != (match.example.split or "")
    ]
    new = [match.example.image.name for match in matches if match.is_new]
    gone = [row.place.partition("/")[2] for row in gone_rows(matches, rows)]
    return [
        *phrase(masks, "", "the masks of {} images changed", of),
        *phrase(images, "", "{} images changed", of),
        *phrase(moved, "", "{} images have another split now", of),
        *phrase(new, "{} image is new", "{} images are new"),
        *phrase(gone, "{} image is gone", "{} images are gone"),
    ]


def record_of(paths: dict[str, Path], records: Sequence[Record]) -> Record | None:
    """Return the record of the source at these paths, wherever the table of groups is."""
    wanted = {option: str(path.resolve()) for option, path in paths.items() if option != "groups"}
    for record in records:
        if {option: path for option, path in record.paths.items() if option != "groups"} == wanted:
            return record
    return None


def _name_of(record: Record) -> str:
    """Return the most telling path of a source."""
    order = ("pairs", "annotations", "images", "archive")
    return next(record.paths[option] for option in order if option in record.paths)


def split_changes(known: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    names = [name for name in SPLIT_DEFAULTS if name in known]
    return differences({k: known[k] for k in names}, {k: facts[k] for k in names})


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return phrases like "--seed is 1 (was 42)" for options with different values."""

    def text(value: Any) -> str:
        if value is None or value is True:
            return "given" if value else "not given"
        if isinstance(value, list):
            return ",".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else brief(str(value))

    return [
        f"{OPTION_NAMES.get(name, '--' + name.replace('_', '-'))} is {text(new.get(name))} "
        f"(was {text(old.get(name))})"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
