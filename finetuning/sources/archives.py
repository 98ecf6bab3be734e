"""Zip archives of images and masks, checked before anything is unpacked."""

from __future__ import annotations

import contextlib
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sam2_utils import UserError

from finetuning.basics.command_line import nfc
from finetuning.basics.files import require_file

# Limits of an archive. Each image is held in memory as a whole while it is checked.
MAX_UNPACKED_BYTES = 50 * 10**9
MAX_MEMBER_BYTES = 2 * 10**9
MAX_MEMBER_DEPTH = 20  # folders within folders
MAX_PATH_LENGTH = 1000  # characters
MAX_NAME_BYTES = 255  # the limit of Linux for the name of a file or folder
NAME_IS_UTF8 = 0x800  # a bit of a member's flags
# Also control characters and line breaks, which garble the output of any program
WINDOWS_REFUSES = re.compile(
    r"""[<>:"|?*\\\x00-\x1f\x7f-\x9f\u2028\u2029] | [. ]$
    | ^(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) \ * (\.|$)""",
    re.IGNORECASE | re.VERBOSE,
)
BY_HAND = "unpack it, then use --archive FOLDER"


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.Path]:
    """Yield the root of a zip archive, once check_archive has accepted it."""
    require_file(path, what="archive")
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            yield zipfile.Path(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole zip archive ({error}); download it again"
        ) from error


@contextlib.contextmanager
def unpacked(path: Path, root: Path | zipfile.Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder with the content of a zip archive; any other path as it is.

    root: what open_archive yielded for it, if it is open and checked already.
    """
    if not (path.is_file() and zipfile.is_zipfile(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="finetuning-") as folder:
        try:
            with contextlib.nullcontext(root) if root else open_archive(path) as opened:
                opened.root.extractall(folder)
        except OSError as error:
            raise UserError(f"{path} cannot be unpacked ({error}); {BY_HAND}") from error
        try:
            yield Path(folder)
        except UserError as error:  # name the archive instead of the temporary folder
            raise UserError(str(error).replace(folder, str(path))) from error


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError if an archive is damaged, too large, or has a member that is refused.

    Renames the members to what decode_name returns.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        member.filename = decode_name(member)
        if problem := member_problem(member):
            raise UserError(f"{path} {problem}")
        if member.filename in members:
            raise UserError(f"{path} has two members called {quoted(member.filename)}; {BY_HAND}")
        members[member.filename] = member
    archive.NameToInfo = members  # zipfile opens members by this dict

    # Read in parts, as copy_file does, no member unpacks to more than its stated size
    size = sum(member.file_size for member in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path} unpacks to {size / 1e9:.3g} GB, more than {MAX_UNPACKED_BYTES / 1e9:.3g} GB; "
            f"if you trust it, {BY_HAND}"
        )
    try:
        damaged = archive.testzip()
    except Exception as error:  # damaged data raises errors of zlib and others
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    if damaged:
        raise UserError(f"{path} is damaged at {quoted(damaged)}; download it again")


def decode_name(member: zipfile.ZipInfo) -> str:
    """Return a member's path as its author saw it, in composed characters (NFC).

    zipfile decodes names as CP437 unless the archive flags them as UTF-8. They may still be UTF-8
    (macOS) or CP949 (Korean Windows), or both in one archive.
    """
    name = member.orig_filename  # as stored; on Windows, zipfile changes `filename`
    if not member.flag_bits & NAME_IS_UTF8:
        content = name.encode("cp437")
        for encoding in ("utf-8", "cp949"):  # CP949 text is seldom valid UTF-8 by chance
            with contextlib.suppress(UnicodeDecodeError):
                name = content.decode(encoding)
                break
    return nfc(name)


def member_problem(member: zipfile.ZipInfo) -> str | None:
    """Return why a member of an archive is refused, or None.

    Names in images/ and masks/ must be valid on Windows; names in other folders are made valid.
    """
    name = member.filename
    shown = quoted(name)
    plain = PurePosixPath(name.replace("\\", "/"))
    if member.flag_bits & 1:
        return f"is encrypted; {BY_HAND}"
    if len(plain.parts) > MAX_MEMBER_DEPTH or len(name) > MAX_PATH_LENGTH:
        return f"has folders nested too deep: {shown}; {BY_HAND}"
    if problem := path_problem(name):
        return problem

    file_type = stat.S_IFMT(member.external_attr >> 16)  # 0 if the archive does not state it
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"has a link or special file in it: {shown}; {BY_HAND}"
    is_used = not {"images", "masks"}.isdisjoint(plain.parts[:-1])
    if is_used and not all(map(is_portable, plain.parts)):
        return (
            f"has a name that not every computer can store: {shown}; "
            "unpack it, rename that, then use --archive FOLDER"
        )

    # With LZMA and bzip2, zipfile unpacks more than the stated size before it stops
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed in another way than zip's usual one; {BY_HAND}"
    if member.file_size > MAX_MEMBER_BYTES:
        size, limit = member.file_size / 1e9, MAX_MEMBER_BYTES / 1e9
        return (
            f"has a member of {size:.3g} GB, more than {limit:.3g} GB: {shown}; "
            f"if you trust it, {BY_HAND}"
        )
    return None


def path_problem(name: str) -> str | None:
    """Return why a member's path is not that of a file below the archive's folder, or None.

    zipfile makes paths safe only when it extracts, and members are read in place as well; and some
    versions of zipfile.Path loop forever on //a/b (CVE-2024-8088).
    """
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or re.match("[A-Za-z]:", name):
        return f"has a member outside its folder: {quoted(name)}; do not trust it"
    if name.rstrip("/") != str(plain) or "\0" in name:
        return f"has a path that is not like folder/file: {quoted(name)}; {BY_HAND}"
    return None


def is_portable(name: str) -> bool:
    """Return whether Windows, macOS and Linux all allow this name of a file or folder."""
    return not WINDOWS_REFUSES.search(name) and len(name.encode()) <= MAX_NAME_BYTES


def quoted(name: str) -> str:
    """Return a member's name in quotes, escaped, and cut to 100 characters."""
    return repr(name if len(name) <= 100 else name[:100] + "...")
