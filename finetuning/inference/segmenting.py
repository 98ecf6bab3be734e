"""Segment an image by prompts, by finding all objects, or in a window; or a folder of images."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.basics.command_line import brief, listed, one_line, tell
from finetuning.basics.image_files import read_image
from finetuning.inference.folder_results import GONE_FOLDER, FolderImage, FolderResults
from finetuning.inference.given_prompts import check_inside
from finetuning.inference.window import ask_in_window
from finetuning.model.model import Segmenter
from finetuning.segmentation.automatic import ANY, Rule, SegmentedObject, find_objects, rule_of
from finetuning.segmentation.prompts import Prompt, make_prompt

READ_AHEAD = 2  # images that are read while the model computes
WRITE_SECONDS = 3.0  # between writes of results.csv: what a killed run loses at most
READ_ERRORS = (UserError, OSError, MemoryError)

ValueRange = tuple[float, float]


class Tally(NamedTuple):
    """How many images of a folder were segmented, and how many were not; failed: their names."""

    segmented: int
    skipped: int  # closed the window without a click
    failed: list[str]
    had_results: int
    without_row: int  # not in the table of prompts


def read_like_training(
    path: Path, value_range: ValueRange | None, trained_range: ValueRange | None
) -> np.ndarray:
    """Read an image as HxWx3 uint8 RGB.

    value_range: the values that become black and white in an image of more than 8 bits; by default
    trained_range, the range of the training.
    """
    return read_image(path, value_range or trained_range)


def resolve_rule(
    facts: dict[str, Any], checkpoint: Path, min_score: float | None, min_area: float | None
) -> Rule:
    """Return which masks --auto objects keeps: by the options, else the checkpoint, else SAM 2."""
    rule = rule_of(facts)
    if not rule and min_score is not None:
        rule = ANY  # the user's threshold replaces all of SAM 2's
    elif not rule:
        rule = Rule()
        tell(
            f"warning: {checkpoint} has no thresholds for --auto objects, so SAM 2's own are used; "
            "repeat the training command with --resume --choose-thresholds, or give --min-score"
        )
    given = {"min_score": min_score, "min_area": min_area}
    rule = rule._replace(**{name: value for name, value in given.items() if value is not None})
    area = f"{rule.min_area:.2%} of the image"
    print(f"kept:    masks with a score above {rule.min_score:.3g} and an area of {area} or more")
    return rule


def segment_prompts(
    segmenter: Segmenter, image: np.ndarray, prompts: dict[str, Prompt]
) -> list[SegmentedObject]:
    """Segment the objects of an HxWx3 uint8 RGB image by their prompts; encode it once."""
    segmenter.encode(image)
    return [
        SegmentedObject(prompt, *segmenter.segment(prompt)[:2], name)
        for name, prompt in prompts.items()
    ]


def segment_all(segmenter: Segmenter, image: np.ndarray, rule: Rule) -> list[SegmentedObject]:
    """Find all objects of an HxWx3 uint8 RGB image.

    If there are none, return one object with an empty mask, so that the image still gets a row.
    """
    found = find_objects(segmenter.predictor, segmenter.precision, image, rule)
    return _numbered(found) or [
        SegmentedObject(make_prompt(), np.zeros(image.shape[:2], bool), 0.0)
    ]


def _numbered(objects: list[SegmentedObject]) -> list[SegmentedObject]:
    return [found._replace(name=str(number)) for number, found in enumerate(objects, start=1)]


class SegmentationMethod(NamedTuple):
    """How to segment images: by prompts, by a rule that selects objects, or in a window.

    segmenters: by the names that the window shows. Prompts and the rule use the first one.
    """

    segmenters: dict[str, Segmenter]
    rule: Rule | None
    opens_window: bool

    def segment(
        self, image: np.ndarray, prompts: dict[str, Prompt] | None, title: str
    ) -> tuple[list[SegmentedObject], bool]:
        """Segment an HxWx3 uint8 RGB image; return its objects, and whether the user cancelled.

        prompts: by object name; None if objects are clicked on or found. title: the window's.
        """
        if self.opens_window:
            answer = ask_in_window(image, title, self.segmenters)
            return _numbered(answer.objects), answer.is_cancelled
        segmenter = next(iter(self.segmenters.values()))
        if self.rule:
            return segment_all(segmenter, image, self.rule), False
        return segment_prompts(segmenter, image, prompts), False


def segment_folder(
    images: list[FolderImage],
    prompts: dict[str, dict[str, Prompt]] | None,
    method: SegmentationMethod,
    ranges: tuple[ValueRange | None, ValueRange | None],
    results: FolderResults,
    overwrite: bool,
    others: Sequence[str] = (),
) -> Tally:
    """Segment a folder's images and write their results.

    Arguments:
      prompts: by image name and object name; images without any are left out. None: as in
        SegmentationMethod.segment.
      ranges: value_range and trained_range of read_like_training.
      overwrite: also segment images that have results.
      others: names of images that are there and keep their results, such as other slices.

    An image that cannot be read, or with a prompt outside it, is reported; the others go on.
    """
    wanted, todo = _choose_images(images, prompts, results, overwrite, others)
    # In the window the user may stop early: images keep their results until new ones are saved
    if overwrite and not method.opens_window:
        results.forget([image.name for image in todo])
    left_out = {"had_results": len(wanted) - len(todo), "without_row": len(images) - len(wanted)}
    segmented, skipped, failed = 0, 0, []
    ahead = read_ahead(todo, functools.partial(_read_checked, prompts=prompts, ranges=ranges))
    in_window = method.opens_window  # its title counts the images
    bar = tqdm(ahead, "Segmenting", len(todo), unit="image", leave=False, disable=in_window)
    with contextlib.closing(results), contextlib.closing(ahead), bar:
        for number, (image, future) in enumerate(bar, start=1):
            try:
                pixels = future.result()
            except READ_ERRORS as error:
                failed.append(image.name)
                results.fail(image, str(error) or "the memory is full")
                bar.write(f"failed: {brief(image.name)}: {brief(str(error), 300)}", sys.stderr)
                continue
            image_prompts = prompts and prompts[image.name]
            title = f"{image.name} ({number} of {len(todo)})"
            objects, is_cancelled = method.segment(pixels, image_prompts, title)
            if is_cancelled:
                break
            if objects:
                results.add(image, pixels, objects)
            segmented, skipped = segmented + bool(objects), skipped + (not objects)
            results.write(0 if in_window else WRITE_SECONDS)  # no click is ever lost
    return Tally(segmented, skipped, failed, **left_out)


def _choose_images(
    images: list[FolderImage],
    prompts: dict[str, dict[str, Prompt]] | None,
    results: FolderResults,
    overwrite: bool,
    others: Sequence[str],
) -> tuple[list[FolderImage], list[FolderImage]]:
    """Return the images with prompts, and those of them to segment now.

    The arguments are those of segment_folder. Results of images that are gone are dropped. Prints
    the numbers of images that are gone or have changed.
    """
    had_results = len(results.files)
    if gone := results.drop_gone([*(image.name for image in images), *others]):
        tell(
            f"{len(gone)} of {had_results} images with results are gone: {listed(gone)}; "
            f"their rows are dropped, and their files moved to {results.folder / GONE_FOLDER}"
        )
    wanted = [image for image in images if prompts is None or image.name in prompts]
    todo = [image for image in wanted if overwrite or not _is_done(image, prompts, results)]
    if replaced := [image.name for image in todo if results.is_replaced(image)]:
        tell(
            f"{len(replaced)} of {had_results} images with results have changed and are segmented "
            f"again: {listed(replaced)}"
        )
    return wanted, todo


def _is_done(
    image: FolderImage, prompts: dict[str, dict[str, Prompt]] | None, results: FolderResults
) -> bool:
    return results.is_done(image, prompts[image.name] if prompts else None)


def _read_checked(
    image: FolderImage,
    prompts: dict[str, dict[str, Prompt]] | None,
    ranges: tuple[ValueRange | None, ValueRange | None],
) -> np.ndarray:
    """Read an image, and check that its prompts lie inside it."""
    pixels = read_like_training(image.path, *ranges)
    for prompt in prompts[image.name].values() if prompts else ():
        check_inside(prompt, pixels.shape[1], pixels.shape[0])
    return pixels


def print_tally(tally: Tally, table: Path) -> None:
    """Print how many of a folder's images were segmented; exit with status 1 if any failed."""
    had_results = f"{tally.had_results} had results already (--overwrite redoes them)"
    parts = [
        f"{tally.segmented} segmented",
        had_results * (tally.had_results > 0),
        f"{tally.without_row} without a row in the table" * (tally.without_row > 0),
        f"{tally.skipped} skipped" * (tally.skipped > 0),
    ]
    print(f"images:  {', '.join(filter(None, parts))}")
    if table.is_file():
        tell(f"results: {table}, and files beside it")
    if tally.failed:
        names = ", ".join(map(brief, tally.failed[:3])) + ", ..." * (len(tally.failed) > 3)
        message = f"{len(tally.failed)} image(s) failed: {names}; {one_line(table)} says why"
        print(f"error: {message}; fix them and run this again", file=sys.stderr)
        raise SystemExit(1)


def read_ahead(
    images: list[FolderImage], read: Callable[[FolderImage], np.ndarray]
) -> Iterator[tuple[FolderImage, Future[np.ndarray]]]:
    """Yield each image with a future of read(image); a thread reads READ_AHEAD images ahead."""
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
