"""Tables that people write: CSV files, as spreadsheets save them here and there."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from sam2_utils import UserError

from finetuning.command_line import quoted
from finetuning.files import LARGEST_TABLE, read_file


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
