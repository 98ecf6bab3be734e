"""Tables of text, laid out for a console, where a Korean character takes two columns."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import unicodedata
from typing import NamedTuple

from finetuning.basics.command_line import can_print

BOX_WIDTH = 40
BOX_CHARACTERS = "┌┐└┘├┤─│"
ASCII_BOX = str.maketrans(BOX_CHARACTERS, "++++++-|")
ASCII_SIGNS = str.maketrans({"±": "+/-"})
# Consoles with these code pages may show box-drawing characters two columns wide
WIDE_ENCODINGS = {"cp949", "euc_kr", "johab"}


class Table(NamedTuple):
    """A table of text cells; the first column names the rows."""

    title: str
    header: list[str]  # "\n" in a cell marks a line break
    rows: list[list[str]]
    note: str = ""


def display_width(text: str) -> int:
    """Return a text's width on a console: 2 per wide character, 0 per combining character."""
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char)
        for char in text
    )


def pad(text: str, width: int, align: str = "<") -> str:
    """Pad a text with spaces to `width` columns; align is <, ^ or >, as in str.format."""
    space = max(0, width - display_width(text))
    before = {"<": 0, "^": space // 2, ">": space}[align]
    return " " * before + text + " " * (space - before)


def draw_box(rows: list[str | None]) -> str:
    """Return a box, BOX_WIDTH columns wide inside, around rows of text; None is a rule."""
    rule = "─" * BOX_WIDTH
    lines = [f"├{rule}┤" if row is None else f"│{pad(row, BOX_WIDTH)}│" for row in rows]
    return "\n".join([f"┌{rule}┐", *lines, f"└{rule}┘"])


def format_table(table: Table) -> str:
    """Return a table as lines of text: its title, columns of equal width, its note."""
    columns = [cell.split("\n") for cell in table.header]
    height = max(map(len, columns))
    header = zip(*([""] * (height - len(lines)) + lines for lines in columns), strict=True)
    rows = [*map(list, header), *table.rows]
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = [table.title]
    for first, *others in rows:
        cells = [pad(cell, width, ">") for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["  " + pad(first, widths[0]), *cells]).rstrip())
    return "\n".join([*lines, *(["  " + table.note] if table.note else [])])


def print_anywhere(text: str) -> None:
    """Print a text; replace box characters by ASCII if the console may not show them right."""
    encodings = console_encodings()
    if encodings & WIDE_ENCODINGS or not can_print(BOX_CHARACTERS):
        text = text.translate(ASCII_BOX)
    print(text if can_print("±") else text.translate(ASCII_SIGNS))


def console_encodings() -> set[str]:
    """Return Python's names for the encodings of standard output and of the console behind it.

    The two differ on Windows, where Python writes UTF-8 to consoles of any code page.
    """
    names = [sys.stdout.encoding or "ascii"]
    with contextlib.suppress(OSError, AttributeError, ValueError):  # a stream that is not a file
        names.append(os.device_encoding(sys.stdout.fileno()) or names[0])
    found = set()
    for name in names:
        with contextlib.suppress(LookupError):  # a code page unknown to Python
            found.add(codecs.lookup(name).name)
    return found
