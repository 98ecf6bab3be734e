"""Zip archives of images and masks: what they may hold, and where in them the pairs are."""

from __future__ import annotations

import contextlib
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sam2_utils import UserError

from finetuning.pairs import Pair, find_pairs

# What an archive may hold. Images are checked one at a time, each as a whole in memory.
MAX_UNPACKED_BYTES = 50 * 10**9
MAX_MEMBER_BYTES = 2 * 10**9
MAX_DEPTH = 20  # folders within folders
MAX_PATH_LENGTH = 1000  # characters
MAX_NAME_BYTES = 255  # of a file or folder, on Linux
WINDOWS_REFUSES = re.compile(
    r"""[<>:"|?*\\\x00-\x1f] | [. ]$
    | ^(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) \ * (\.|$)""",
    re.IGNORECASE | re.VERBOSE,
)
BY_HAND = "unpack it, then use --images and --masks"


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[list[Pair]]:
    """Yield the pairs inside a zip archive, wherever in it images/ and masks/ lie side by side.

    Raises UserError, before anything is written, when the archive is damaged, has a member that
    check_member refuses, or does not pair up.
    """
    if not path.is_file():
        raise UserError(f"no such archive: {path}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            root = find_dataset_root(path, archive)
            yield find_pairs(root / "images", root / "masks")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole zip archive ({error}); download it again"
        ) from error


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError for an archive that is damaged, too large, or has an unfit member."""
    names = set()
    for member in archive.infolist():
        check_member(path, member)
        if member.filename in names:
            raise UserError(f"{path} has two members called {quoted(member.filename)}; {BY_HAND}")
        names.add(member.filename)

    # Read by parts, as here and in copy_pairs, no member unpacks to more than its stated size.
    size = sum(member.file_size for member in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path} unpacks to {size / 1e9:.3g} GB, more than {MAX_UNPACKED_BYTES / 1e9:.3g} GB; "
            f"if you trust it, {BY_HAND}"
        )
    try:
        damaged = archive.testzip()
    except Exception as error:  # damaged data raise errors of zlib and others
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    if damaged:
        raise UserError(f"{path} is damaged at {quoted(damaged)}; download it again")


def check_member(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise UserError for a member that no data set needs, or that not every computer can hold."""
    problem = describe_problem(member)
    if problem:
        raise UserError(f"{path} {problem}")


def describe_problem(member: zipfile.ZipInfo) -> str | None:
    """Say why a member of an archive is refused, or None where it is not.

    Only members in images/ or masks/ become files, so only their names must do on Windows.
    """
    name = member.orig_filename  # as it stands in the archive, on Windows too
    shown = quoted(name)
    plain = PurePosixPath(name.replace("\\", "/"))
    if member.flag_bits & 1:
        return f"is encrypted; {BY_HAND}"
    if len(plain.parts) > MAX_DEPTH or len(name) > MAX_PATH_LENGTH:
        return f"has folders nested too deep: {shown}; {BY_HAND}"
    if plain.is_absolute() or ".." in plain.parts or re.match("[A-Za-z]:", name):
        return f"has a member outside its folder: {shown}; do not trust it"
    if name.rstrip("/") != str(plain) or "\0" in name:
        return f"has a path that is not like folder/file: {shown}; {BY_HAND}"

    file_type = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive does not say
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"has a link or special file in it: {shown}; {BY_HAND}"
    is_used = not {"images", "masks"}.isdisjoint(plain.parts[:-1])
    if is_used and not all(map(is_portable, plain.parts)):
        return (
            f"has a name that not every computer can store: {shown}; "
            "unpack it, rename that, then use --images and --masks"
        )

    # Of LZMA and bzip2, zipfile unpacks more than the stated size before it stops.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed in another way than zip's usual one; {BY_HAND}"
    if member.file_size > MAX_MEMBER_BYTES:
        size, limit = member.file_size / 1e9, MAX_MEMBER_BYTES / 1e9
        return (
            f"has a member of {size:.3g} GB, more than {limit:.3g} GB: {shown}; "
            f"if you trust it, {BY_HAND}"
        )
    return None


def is_portable(name: str) -> bool:
    """Say whether Windows, macOS and Linux all allow this name of a file or folder."""
    return not WINDOWS_REFUSES.search(name) and len(name.encode()) <= MAX_NAME_BYTES


def quoted(name: str) -> str:
    """Return a member's name fit for one line of an error."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


def find_dataset_root(path: Path, archive: zipfile.ZipFile) -> zipfile.Path:
    """Return the one folder of the archive that has images/ and masks/ in it."""
    folders = {parent for name in archive.namelist() for parent in PurePosixPath(name).parents} | {
        PurePosixPath(name) for name in archive.namelist() if name.endswith("/")
    }
    folders = {folder for folder in folders if "__MACOSX" not in folder.parts}
    roots = [f.parent for f in folders if f.name == "images" and f.parent / "masks" in folders]
    if len(roots) != 1:
        raise UserError(
            f"{path} has {len(roots)} folders with images/ and masks/ in them, not one; {BY_HAND}"
        )
    prefix = "" if roots[0] == PurePosixPath(".") else f"{roots[0]}/"
    return zipfile.Path(archive, prefix)
