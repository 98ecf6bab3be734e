"""Zip archives of images and masks: what they may hold."""

from __future__ import annotations

import contextlib
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sam2_utils import UserError

from finetuning.basics.command_line import nfc
from finetuning.basics.files import require_file

# What an archive may hold. Images are checked one at a time, each as a whole in memory.
MAX_UNPACKED_BYTES = 50 * 10**9
MAX_MEMBER_BYTES = 2 * 10**9
MAX_DEPTH = 20  # folders within folders
MAX_PATH_LENGTH = 1000  # characters
MAX_NAME_BYTES = 255  # of a file or folder, on Linux
NAME_IS_UTF8 = 0x800  # the bit of a member's flags that says so
# And control characters and ends of lines, which would spoil the output of any program.
WINDOWS_REFUSES = re.compile(
    r"""[<>:"|?*\\\x00-\x1f\x7f-\x9f\u2028\u2029] | [. ]$
    | ^(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) \ * (\.|$)""",
    re.IGNORECASE | re.VERBOSE,
)
BY_HAND = "unpack it, then use --archive FOLDER"


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.Path]:
    """Yield the root of a zip archive.

    Raises UserError, before anything is written, when the archive is damaged, or has a member that
    check_member refuses.
    """
    require_file(path, what="archive")
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            yield zipfile.Path(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole zip archive ({error}); download it again"
        ) from error


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError for an archive that is damaged, too large, or has an unfit member.

    From then on, its members are called what decode_name makes of their names.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        member.filename = decode_name(member)
        check_member(path, member)
        if member.filename in members:
            raise UserError(f"{path} has two members called {quoted(member.filename)}; {BY_HAND}")
        members[member.filename] = member
    archive.NameToInfo = members  # in which it looks up what to open

    # Read by parts, as in copy_file, no member unpacks to more than its stated size.
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


def decode_name(member: zipfile.ZipInfo) -> str:
    """Return a member's path as it was meant, in composed characters (NFC).

    Where the archive does not say that it is UTF-8, zipfile takes it for CP437. It may be UTF-8
    all the same (macOS) or CP949 (Korean Windows), in one archive, too.
    """
    name = member.orig_filename  # as it stands in the archive, on Windows too
    if not member.flag_bits & NAME_IS_UTF8:
        content = name.encode("cp437")
        for encoding in ("utf-8", "cp949"):  # what is CP949 is seldom UTF-8 by chance
            with contextlib.suppress(UnicodeDecodeError):
                name = content.decode(encoding)
                break
    return nfc(name)


def check_member(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise UserError for a member that no data set needs, or that not every computer can hold."""
    problem = describe_problem(member)
    if problem:
        raise UserError(f"{path} {problem}")


def describe_problem(member: zipfile.ZipInfo) -> str | None:
    """Say why a member of an archive is refused, or None where it is not.

    Names in images/ and masks/ must do on Windows; those in other folders are made to.
    """
    name = member.filename
    shown = quoted(name)
    plain = PurePosixPath(name.replace("\\", "/"))
    if member.flag_bits & 1:
        return f"is encrypted; {BY_HAND}"
    if len(plain.parts) > MAX_DEPTH or len(name) > MAX_PATH_LENGTH:
        return f"has folders nested too deep: {shown}; {BY_HAND}"
    for path in (name, member.orig_filename):  # decoded, and as it stands in the archive
        if problem := describe_path_problem(path):
            return problem

    file_type = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive does not say
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"has a link or special file in it: {shown}; {BY_HAND}"
    is_used = not {"images", "masks"}.isdisjoint(plain.parts[:-1])
    if is_used and not all(map(is_portable, plain.parts)):
        return (
            f"has a name that not every computer can store: {shown}; "
            "unpack it, rename that, then use --archive FOLDER"
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


def describe_path_problem(name: str) -> str | None:
    """Say why a path in an archive is none of a file below its folder, or None where it is.

    zipfile mends paths only where it extracts, as nothing here does; and in some versions
    zipfile.Path never comes back from //a/b (CVE-2024-8088).
    """
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or re.match("[A-Za-z]:", name):
        return f"has a member outside its folder: {quoted(name)}; do not trust it"
    if name.rstrip("/") != str(plain) or "\0" in name:
        return f"has a path that is not like folder/file: {quoted(name)}; {BY_HAND}"
    return None


def is_portable(name: str) -> bool:
    """Say whether Windows, macOS and Linux all allow this name of a file or folder."""
    return not WINDOWS_REFUSES.search(name) and len(name.encode()) <= MAX_NAME_BYTES


def quoted(name: str) -> str:
    """Return a member's name fit for one line of an error."""
    return repr(name if len(name) <= 100 else name[:100] + "...")
