"""Many files read at the same time, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

THREADS = min(8, os.cpu_count() or 1)

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
        results = threads.map(function, items)
        options = {"total": len(items), "desc": description, "unit": unit}
        return list(tqdm(results, leave=False, delay=1, **options))
    finally:
        threads.shutdown(cancel_futures=True)
