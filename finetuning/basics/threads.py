"""Reading many files at once, in threads."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import cv2
from tqdm import tqdm

THREADS = min(8, os.cpu_count() or 1)
CHUNK = 16  # items per task: handing a task to a thread costs as much as reading a small file
SLOW = 1e-3  # seconds per item, above which threads are worth it: below, they wait for each other

T, Result = TypeVar("T"), TypeVar("Result")


def in_threads(
    function: Callable[[T], Result], items: Sequence[T], description: str, unit: str
) -> list[Result]:
    """Return a function's result for each item, in order, with a bar called `description`.

    Faster than a loop if the function mostly reads files, hashes or decodes images, which release
    the interpreter lock. Raises the error of the first failing item and skips items not yet begun.
    """
    begun = time.perf_counter()
    first = list(map(function, items[:CHUNK]))
    is_slow = time.perf_counter() - begun > SLOW * len(first)
    chunks = [items[start : start + CHUNK] for start in range(CHUNK, len(items), CHUNK)]
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # otherwise each of our threads waits for a pool that all of them share
    threads = ThreadPoolExecutor(THREADS if is_slow else 1)
    try:
        done = threads.map(lambda chunk: list(map(function, chunk)), chunks)
        results = itertools.chain(first, itertools.chain.from_iterable(done))
        options = {"total": len(items), "desc": description, "unit": unit}
        return list(tqdm(results, leave=False, delay=1, **options))
    finally:
        threads.shutdown(cancel_futures=True)
        cv2.setNumThreads(opencv_threads)
