"""Safe files: refuse devices, write atomically, lock folders, download."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import http.client
import math
import os
import re
import socket
import ssl
import time
import urllib.error
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam2_utils import MAX_MEGAPIXELS, UserError

import torch

from finetuning.basics.command_line import tell
from finetuning.basics.threads import in_threads

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# Files are read whole. 10 bytes per pixel: 3 channels of 16 bits take 6, and headers add some
MAX_FILE_BYTES = MAX_MEGAPIXELS * 10**7
MAX_TABLE_BYTES = MAX_FILE_BYTES // 4  # in memory, its parsed text takes many times that
PARTIAL_FILES = ".*.partial"  # a glob pattern: files that are being written
ABANDONED_AFTER = 3600  # seconds
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs such cells as formulas
MAKE_SMALLER = (
    "make it smaller or, with much more than 8 GB of memory, set the environment variable "
    f"SAM2_MAX_MEGAPIXELS to more than {MAX_MEGAPIXELS}"
)

DOWNLOAD_TIMEOUT_SECONDS = 30.0
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    ValueError,  # an invalid response, perhaps from a proxy
)

DEMO_DATA, DEMO_OUTPUT = Path("data/demo"), Path("output/demo")

# Names of folders, in lower case, that hold one split of a data set
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SPLIT_NAMES |= {split: split for split in ("train", "val", "test")}

DATASET_URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
DATASET_SHA256 = "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7"


def require_file(path: Path, max_bytes: float = math.inf, what: str = "file") -> None:
    """Raise UserError unless a path is a file, or a link to one, of at most `max_bytes`.

    Reading a device could go on forever, and reading a pipe could wait forever.
    """
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a device or a pipe, not a file; remove it, or name another")
        raise UserError(f"no such {what}: {path}; check the path")
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(
            f"{path} has {size / 1e9:.3g} GB, more than {max_bytes / 1e9:.3g} GB; {MAKE_SMALLER}"
        )


def read_file(path: Path, max_bytes: float = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file; raise UserError like require_file."""
    require_file(path, max_bytes)
    return path.read_bytes()


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content; an unchanged file is read once per run.

    Raises UserError like require_file.
    """
    require_file(path)
    facts = path.stat()
    version = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns  # change with the content
    return _sha256(path, facts.st_dev, facts.st_ino, *version)


def hash_contents(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the content_sha256 of each file; files are read in threads."""
    unique = list(dict.fromkeys(paths))
    digests = in_threads(content_sha256, unique, "Hashing files", "file")
    return dict(zip(unique, digests, strict=True))


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is in a folder, or is that folder, following links, ignoring case."""
    path, folder = (Path(str(each.resolve()).casefold()) for each in (path, folder))
    return path.is_relative_to(folder)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move the file written there to `path` when complete.

    After an error inside the block, or a power failure, `path` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else the renamed file may be empty after a power failure
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the user does not know the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs; remove the partial files of a killed run.

    The system releases the lock when the process ends, even if it is killed. Raises UserError if
    another run holds the lock. On network drives without locks, prints a warning.
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
                f"warning: {folder} cannot be locked ({error.strerror}); make sure that no other "
                "run writes there"
            )
        try:
            for leftover in folder.glob(PARTIAL_FILES):
                leftover.unlink()
            yield
        finally:
            with contextlib.suppress(OSError):  # the drive has no locks
                _unlock(file.fileno())


def remove_abandoned(folder: Path) -> None:
    """Remove the partial files of killed runs from a folder to which other runs may be writing.

    A partial file counts as abandoned after ABANDONED_AFTER seconds without a write.
    """
    for leftover in folder.glob(PARTIAL_FILES):
        with contextlib.suppress(OSError):  # another run removed it, or permission is denied
            if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER:
                leftover.unlink()


def _lock(file: int) -> None:
    """Lock an open file, by its descriptor, or raise OSError.

    If another process holds the lock, that is a BlockingIOError, or a PermissionError on Windows.
    """
    if os.name == "nt":
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: int) -> None:
    """Unlock a file now: closing it would not, as long as forked processes have it open."""
    if os.name == "nt":
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table with a byte-order mark, so that Excel reads non-ASCII names.

    Text that a spreadsheet would run as a formula is prefixed with an apostrophe.
    """
    # File names need not be valid UTF-8
    encoding = {"encoding": "utf-8-sig", "errors": "backslashreplace"}
    with atomic_write(path) as temporary, temporary.open("w", newline="", **encoding) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([list(map(_without_formula, row)) for row in rows])


def _without_formula(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and cell.startswith(FORMULA_STARTS)
    # Negative numbers and the like stay numbers
    if is_formula and not re.fullmatch(r"[+-][\d.e+-]+", cell):
        return f"'{cell}"
    return cell


def without_apostrophe(cell: str) -> str:
    """Return a cell of such a table as it was before write_csv prefixed it."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA_STARTS) else cell


def download_file(url: str, destination: Path, sha256: str, by_hand: str) -> None:
    """Download `url` to `destination` with a progress bar; leave no partial file there.

    by_hand: tells the user what to do without this download. Raises UserError if the network
    fails or the file's SHA-256 is not `sha256`.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {url}")
    # torch.hub has no timeout of its own
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        torch.hub.download_url_to_file(url, str(destination), hash_prefix=sha256)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answered {error.code} {error.reason}; {by_hand}") from error
    except RuntimeError as error:  # from torch.hub: the hash differs
        raise UserError(
            f"the download of {url} was cut off or is not the published file; "
            f"try again, or {by_hand}"
        ) from error
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise UserError(f"{url} cannot be reached ({reason}); {by_hand}") from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
