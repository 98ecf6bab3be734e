"""CSV files: users' tables, as spreadsheets save them, and our own tables with a checksum."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import brief
from finetuning.basics.files import MAX_TABLE_BYTES, read_file, write_csv

DIGEST_COLUMN = "digest"  # a checksum of all other columns


def read_table(file: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield each row of a CSV file, by its column names in lower case.

    Raises UserError if a needed column is missing or the file is not a table.
    """
    content, text = read_file(file, MAX_TABLE_BYTES), ""
    for encoding in ("cp949", "utf-8-sig"):  # Excel in Korea saves CP949; UTF-8 wins if both fit
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
    # The most frequent one in the header: some countries' spreadsheets separate by semicolons
    separator = max(",;\t", key=text.partition("\n")[0].count)
    csv.field_size_limit(min(MAX_TABLE_BYTES, 2**31 - 1))  # run lengths make long cells
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [column.strip().casefold() for column in next(rows, [])]
        for column in needed:
            if column not in columns:
                raise UserError(
                    f"{brief(file)}, row 1: no column {column}; save a table that starts "
                    f"{','.join(needed)} as CSV (UTF-8)"
                )
        for row in rows:
            yield dict(zip(columns, map(str.strip, row), strict=False))
    except csv.Error as error:
        raise UserError(f"{brief(file)}, row {rows.line_num}: {error}; save it as CSV") from error


def write_with_digest(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table with a checksum, so that read_with_digest detects damage."""
    digest = _digest(rows)
    write_csv(path, (*columns, DIGEST_COLUMN), [(*row, digest) for row in rows])


def read_with_digest(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """Return the rows of such a table; raise UserError if it is damaged, empty or another table."""
    damaged = UserError(f"{brief(path)} is damaged, or was edited; restore it, or train again")
    try:
        text = read_file(path, MAX_TABLE_BYTES).decode("utf-8-sig")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
    except (ValueError, csv.Error) as error:
        raise damaged from error
    is_table = header == [*columns, DIGEST_COLUMN] and all(len(row) == len(header) for row in rows)
    # Each row repeats the digest of all rows, so that no row can be cut off unnoticed
    digests, rows = {row[-1] for row in rows if row}, [row[:-1] for row in rows]
    if not is_table or digests != {_digest(rows)}:
        raise damaged
    return rows


def _digest(rows: Sequence[Sequence]) -> str:
    text = "\n".join(",".join(map(str, row)) for row in rows)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
