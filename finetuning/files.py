"""Writing files that are never left half done."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.command_line import tell

if os.name == "nt":
    import msvcrt
else:
    import fcntl


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` when complete.

    An error inside the block, or a pulled plug, leaves whatever stood at `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs from writing to a folder; what a killed one left half-written is removed.

    The system takes the lock from a process that ends, however it ends. Raises UserError where
    another run holds it; some network drives have no locks, of which a warning is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another run is writing to {folder}; wait for it to end, or use another folder"
            ) from error
        except OSError as error:
            tell(
                f"warning: {folder} cannot be locked ({error.strerror}); see to it that no other "
                "run writes there"
            )
        try:
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
            yield
        finally:
            with contextlib.suppress(OSError):  # it has no lock
                _unlock(file.fileno())


def _lock(file: int) -> None:
    """Lock an open file, by its number, or raise an OSError, of two kinds where another has it."""
    if os.name == "nt":
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: int) -> None:
    """Unlock a file at once: closed, it would stay locked until forked processes close it, too."""
    if os.name == "nt":
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table; with a byte-order mark, so that Excel reads non-ASCII names.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    encoding = {"encoding": "utf-8-sig", "errors": "backslashreplace"}  # names may be no UTF-8
    with atomic_write(path) as temporary, temporary.open("w", newline="", **encoding) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([list(map(_without_formula, row)) for row in rows])


def _without_formula(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    if is_formula and not re.fullmatch(r"[+-][\d.e+-]+", cell):
        return f"'{cell}"
    return cell
