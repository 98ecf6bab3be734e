"""Segmenting the images of a folder, one after the other."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.basics.command_line import brief
from finetuning.basics.image_files import read_image, read_values
from finetuning.inference.folder_results import FolderImage, Results
from finetuning.inference.given_prompts import check_inside
from finetuning.inference.result_files import Segmented
from finetuning.inference.window import ask_in_window
from finetuning.model.automatic import Rule, find_objects
from finetuning.model.model import Segmenter
from finetuning.model.prompts import Prompt, make_prompt

READ_AHEAD = 2  # images, while the model computes
WRITE_SECONDS = 3.0  # a killed run loses what it has done in so long
READ_ERRORS = (UserError, OSError, MemoryError)


class Tally(NamedTuple):
    """What has become of a folder's images; `failed` holds names, the others count."""

    segmented: int
    skipped: int  # in the window
    failed: list[str]
    had_results: int
    without_row: int


def read_like_training(
    path: Path,
    value_range: tuple[float, float] | None,
    trained_range: tuple[float, float] | None,
) -> np.ndarray:
    """Read an HxWx3 uint8 RGB image; one of more than 8 bits by the range given, or trained on."""
    if not value_range and trained_range and read_values(path)[0].dtype != np.uint8:
        value_range = trained_range
    return read_image(path, value_range)


def segment_prompts(
    segmenter: Segmenter, image: np.ndarray, prompts: dict[str, Prompt]
) -> list[Segmented]:
    """Segment the objects of an HxWx3 uint8 RGB image, which is encoded once."""
    segmenter.encode(image)
    return [
        Segmented(name, prompt, *segmenter.segment(prompt)[:2]) for name, prompt in prompts.items()
    ]


def segment_all(segmenter: Segmenter, image: np.ndarray, rule: Rule) -> list[Segmented]:
    """Find the objects of an HxWx3 uint8 RGB image; where there are none, one without pixels."""
    found = find_objects(segmenter.predictor, segmenter.precision, image, rule)
    nothing = Segmented("", make_prompt(), np.zeros(image.shape[:2], bool), 0.0)
    return [Segmented(str(n), *one) for n, one in enumerate(found, start=1)] or [nothing]


def segment_in_window(
    segmenters: dict[str, Segmenter], image: np.ndarray, title: str
) -> tuple[list[Segmented], bool]:
    """Let a person click on the objects of an image; return them, and whether that is the end."""
    answer = ask_in_window(image, title, segmenters)
    objects = [Segmented(str(n), *clicked) for n, clicked in enumerate(answer.objects, start=1)]
    return objects, answer.leaves


class Way(NamedTuple):
    """How images are segmented: by prompts, by a rule that finds all objects, or in a window.

    segmenters: by the names that the window shows; the first one is that for prompts and the rule.
    """

    segmenters: dict[str, Segmenter]
    rule: Rule | None
    asks: bool  # in a window

    def segment(
        self, image: np.ndarray, prompts: dict[str, Prompt] | None, title: str
    ) -> tuple[list[Segmented], bool]:
        """Return the objects of an HxWx3 uint8 RGB image, and whether no more is to follow.

        prompts: of the objects, by name; title: the window's.
        """
        if self.asks:
            return segment_in_window(self.segmenters, image, title)
        segmenter = next(iter(self.segmenters.values()))
        if self.rule:
            return segment_all(segmenter, image, self.rule), False
        return segment_prompts(segmenter, image, prompts), False


def segment_folder(
    images: list[FolderImage],
    prompts: dict[str, dict[str, Prompt]] | None,
    way: Way,
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None],
    results: Results,
    overwrite: bool,
) -> Tally:
    """Segment the images that have no results yet, or all, and write what was found.

    Arguments:
      prompts: of images by name, and of their objects, where there are any.
      ranges: as in read_like_training.

    An image that cannot be read, or whose prompts lie outside it, is named, and the others go on.
    """
    wanted = [image for image in images if prompts is None or image.name in prompts]
    todo = [image for image in wanted if overwrite or not _is_done(image, prompts, results)]
    if overwrite and not way.asks:
        results.forget([image.name for image in todo])
    left_out = {"had_results": len(wanted) - len(todo), "without_row": len(images) - len(wanted)}
    segmented, skipped, failed = 0, 0, []
    ahead = read_ahead(todo, functools.partial(_read, prompts=prompts, ranges=ranges))
    bar = tqdm(ahead, "Segmenting", len(todo), unit="image", leave=False, disable=way.asks)
    with contextlib.closing(results), contextlib.closing(ahead), bar:
        for number, (image, future) in enumerate(bar, start=1):
            try:
                values = future.result()
            except READ_ERRORS as error:
                failed.append(image.name)
                results.fail(image, str(error) or "the memory is full")
                bar.write(f"failed: {brief(image.name)}: {brief(str(error), 300)}", sys.stderr)
                continue
            of_image = prompts and prompts[image.name]
            title = f"{image.name} ({number} of {len(todo)})"
            objects, leaves = way.segment(values, of_image, title)
            if leaves:
                break
            if objects:
                results.add(image, values, objects)
            segmented, skipped = segmented + bool(objects), skipped + (not objects)
            results.write(0 if way.asks else WRITE_SECONDS)
    return Tally(segmented, skipped, failed, **left_out)


def _is_done(
    image: FolderImage, prompts: dict[str, dict[str, Prompt]] | None, results: Results
) -> bool:
    return results.is_done(image, prompts[image.name] if prompts else None)


def _read(
    image: FolderImage,
    prompts: dict[str, dict[str, Prompt]] | None,
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None],
) -> np.ndarray:
    """Read an image, and check that its prompts lie inside it."""
    values = read_like_training(image.path, *ranges)
    for prompt in prompts[image.name].values() if prompts else ():
        check_inside(prompt, values.shape[1], values.shape[0])
    return values


def read_ahead(
    images: list[FolderImage], read: Callable[[FolderImage], np.ndarray]
) -> Iterator[tuple[FolderImage, Future[np.ndarray]]]:
    """Yield each image with what `read` makes of it, in a thread that is READ_AHEAD further."""
    executor, pending = ThreadPoolExecutor(max_workers=1), deque()
    try:
        for image in images:
            pending.append((image, executor.submit(read, image)))
            if len(pending) > READ_AHEAD:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        executor.shutdown(cancel_futures=True)
