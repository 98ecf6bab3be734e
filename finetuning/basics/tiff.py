"""What the directories of a TIFF, and of EXIF data, say; no pixels are decoded."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple

# Tags of TIFF and EXIF: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
TAGS = SUBFILE_TYPE, BITS, COMPRESSION, ORIENTATION, SAMPLES, PLANES, EXTRA_SAMPLES, FORMAT = (
    254, 258, 259, 274, 277, 284, 338, 339,
)  # fmt: skip
# The byte order, for struct, and whether it is a BigTIFF
TIFF_STARTS = {
    b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True),
}  # fmt: skip
INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # codes of TIFF, and of struct
NO_PAGE = 0b101  # the bits of SUBFILE_TYPE for a thumbnail and for a transparency mask


class Directory(NamedTuple):
    """One page of a TIFF, or the head of EXIF data: where it lies, and what its TAGS say."""

    start: int
    tags: dict[int, tuple[int, ...]]
    places: dict[int, tuple[str, int]]  # of the values: their format for struct, and offset

    def first(self, tag: int, default: int = 1) -> int:
        return self.tags.get(tag, (default,))[0]


def tiff_pages(content: bytes) -> list[Directory]:
    """Return the pages of a TIFF, without thumbnails and the like; none of any other file."""
    directories = tiff_directories(content)
    pages = [page for page in directories if not page.first(SUBFILE_TYPE, 0) & NO_PAGE]
    return pages or directories[:1]


def tiff_directories(content: bytes) -> list[Directory]:
    """Return the directories of a TIFF, a BigTIFF or EXIF data as far as they can be read.

    No pixels are decoded. What is broken ends the list, and so does a directory met before.
    """
    order, is_big = TIFF_STARTS.get(content[:4], ("<", False))
    directories: dict[int, Directory] = {}
    with contextlib.suppress(struct.error, OverflowError):
        (start,) = struct.unpack_from(order + ("8xQ" if is_big else "4xI"), content)
        while content[:4] in TIFF_STARTS and start and start not in directories:
            directories[start], start = _read_directory(content, start, order, is_big)
    return list(directories.values())


def _read_directory(content: bytes, start: int, order: str, is_big: bool) -> tuple[Directory, int]:
    """Return the directory at an offset, and the offset of the next one, 0 for none."""
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
        if length * struct.calcsize(order + INTEGER_TYPES[kind]) > room:
            (place,) = struct.unpack(order + offset_code, value)
        directory.tags[tag] = struct.unpack_from(layout, content, place)
        directory.places[tag] = layout, place
    return directory, *struct.unpack_from(order + offset_code, content, end)


def with_one_upright_page(content: bytes, page: Directory) -> bytearray:
    """Return a TIFF that begins with `page` and has no orientation: OpenCV obeys both."""
    order, is_big = TIFF_STARTS[content[:4]]
    changed = bytearray(content)
    struct.pack_into(order + ("Q" if is_big else "I"), changed, 8 if is_big else 4, page.start)
    if ORIENTATION in page.places:
        layout, place = page.places[ORIENTATION]
        struct.pack_into(layout, changed, place, *[1] * len(page.tags[ORIENTATION]))
    return changed
