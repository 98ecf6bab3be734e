"""Many files read at the same time, in threads."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

THREADS = min(8, os.cpu_count() or 1)
CHUNK = 16  # items that a thread takes at a time: handing over one costs as much as a small file

T, Result = TypeVar("T"), TypeVar("Result")


def in_threads(
    function: Callable[[T], Result], items: Sequence[T], description: str, unit: str
) -> list[Result]:
    """Return what a function returns for each item, in their order; `description`: of the bar.

    Worth it where the function mostly reads files, hashes, or decodes images, which leave the
    interpreter to other threads. Raises what the first item that fails raises; the items that are
    not begun by then are left out.
    """
    threads = ThreadPoolExecutor(THREADS)
    try:
        chunks = [items[first : first + CHUNK] for first in range(0, len(items), CHUNK)]
        done = threads.map(lambda chunk: list(map(function, chunk)), chunks)
        options = {"total": len(items), "desc": description, "unit": unit}
        return list(tqdm(itertools.chain.from_iterable(done), leave=False, delay=1, **options))
    finally:
        threads.shutdown(cancel_futures=True)
