"""CSV files: those of people, as spreadsheets save them, and our own that are read again."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import quoted
from finetuning.basics.files import LARGEST_TABLE, read_file, write_csv

DIGEST = "digest"  # a column of tables by which a comparison goes: of all that is in the others


def read_table(file: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file below its header, of which the columns come in lower case.

    Raises UserError where a column that is needed is missing, or the file is no table.
    """
    content, text = read_file(file, LARGEST_TABLE), ""
    for encoding in ("cp949", "utf-8-sig"):  # the former is that of Excel in Korea
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [column.strip().casefold() for column in next(rows, [])]
        for column in needed:
            if column not in columns:
                raise UserError(
                    f"{quoted(file)}, row 1: no column {column}; save a table that starts "
                    f"{','.join(needed)} as CSV (UTF-8)"
                )
        for row in rows:
            yield dict(zip(columns, map(str.strip, row), strict=False))
    except csv.Error as error:
        raise UserError(f"{quoted(file)}, row {rows.line_num}: {error}; save it as CSV") from error


def write_with_digest(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table in which read_with_digest finds what has been damaged."""
    digest = _digest(rows)
    write_csv(path, (*columns, DIGEST), [(*row, digest) for row in rows])


def read_with_digest(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """Return the rows of such a table; of an earlier version's, too, which has no digest.

    Raises UserError where it is damaged, empty, or another table.
    """
    damaged = UserError(f"{quoted(path)} is damaged, or was edited; put it back, or train anew")
    try:
        text = read_file(path, LARGEST_TABLE).decode("utf-8-sig")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
    except (ValueError, csv.Error) as error:
        raise damaged from error
    if not rows or any(len(row) != len(header) for row in rows):
        raise damaged
    if header == [*columns, DIGEST]:
        digests, rows = {row[-1] for row in rows}, [row[:-1] for row in rows]
        if digests != {_digest(rows)}:
            raise damaged
    elif header != list(columns):
        raise damaged
    return rows


def _digest(rows: Sequence[Sequence]) -> str:
    text = "\n".join(",".join(map(str, row)) for row in rows)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
