"""Reading the directories of TIFF and EXIF data, without decoding pixels."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple

# Tags as in https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
TAGS = SUBFILE_TYPE, BITS, COMPRESSION, ORIENTATION, SAMPLES, PLANES, EXTRA_SAMPLES, FORMAT = (
    254, 258, 259, 274, 277, 284, 338, 339,
)  # fmt: skip
# First bytes: the byte order as in struct, and whether the file is a BigTIFF
TIFF_STARTS = {
    b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True),
}  # fmt: skip
INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's type codes and struct's
NOT_A_PAGE = 0b101  # SUBFILE_TYPE's bits for a thumbnail and a transparency mask


class Directory(NamedTuple):
    """One page of a TIFF, or the first directory of EXIF data."""

    start: int  # offset in the file
    tags: dict[int, tuple[int, ...]]  # the values of TAGS
    places: dict[int, tuple[str, int]]  # of these values: their struct format and offset

    def first(self, tag: int, default: int = 1) -> int:
        return self.tags.get(tag, (default,))[0]


def tiff_pages(content: bytes) -> list[Directory]:
    """Return the pages of a TIFF, without thumbnails and masks; none for any other file."""
    directories = tiff_directories(content)
    pages = [page for page in directories if not page.first(SUBFILE_TYPE, 0) & NOT_A_PAGE]
    return pages or directories[:1]


def tiff_directories(content: bytes) -> list[Directory]:
    """Return the directories of a TIFF, a BigTIFF or EXIF data.

    The list ends at a broken directory, or at one that is already in it.
    """
    order, is_big = TIFF_STARTS.get(content[:4], ("<", False))
    directories: dict[int, Directory] = {}
    with contextlib.suppress(struct.error, OverflowError):
        (start,) = struct.unpack_from(order + ("8xQ" if is_big else "4xI"), content)
        while content[:4] in TIFF_STARTS and start and start not in directories:
            directories[start], start = _read_directory(content, start, order, is_big)
    return list(directories.values())


def _read_directory(content: bytes, start: int, order: str, is_big: bool) -> tuple[Directory, int]:
    """Return the directory at an offset, and the offset of the next one, or 0."""
    count_code, offset_code, room = ("Q", "Q", 8) if is_big else ("H", "I", 4)
    entry_format, entry_size = f"{order}HH{offset_code}{room}s", 4 + 2 * room
    (count,) = struct.unpack_from(order + count_code, content, start)
    position = start + struct.calcsize(count_code)
    end = position + count * entry_size

    directory = Directory(start, {}, {})
    for tag, kind, length, value in struct.iter_unpack(entry_format, content[position:end]):
        position += entry_size
        if tag not in TAGS or kind not in INTEGER_TYPES or not length:
            continue
        layout, place = f"{order}{min(length, 4)}{INTEGER_TYPES[kind]}", position - room
        # Values that do not fit into the entry lie elsewhere, at an offset
        if length * struct.calcsize(order + INTEGER_TYPES[kind]) > room:
            (place,) = struct.unpack(order + offset_code, value)
        directory.tags[tag] = struct.unpack_from(layout, content, place)
        directory.places[tag] = layout, place
    return directory, *struct.unpack_from(order + offset_code, content, end)


def with_one_upright_page(content: bytes, page: Directory) -> bytearray:
    """Return a TIFF whose first page is `page`, without an orientation, as OpenCV needs it.

    OpenCV decodes the first directory, even if it is a thumbnail, and applies its orientation.
    """
    order, is_big = TIFF_STARTS[content[:4]]
    changed = bytearray(content)
    struct.pack_into(order + ("Q" if is_big else "I"), changed, 8 if is_big else 4, page.start)
    if ORIENTATION in page.places:
        layout, place = page.places[ORIENTATION]
        struct.pack_into(layout, changed, place, *[1] * len(page.tags[ORIENTATION]))
    return changed
