"""What was segmented in an image, as files: masks, overlays, cutouts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from finetuning.basics.files import atomic_write
from finetuning.basics.image_files import write_image
from finetuning.model.drawing import draw_object
from finetuning.model.prompts import Prompt, mask_box

KINDS = ("masks", "overlays", "cutouts", "coco")
# How the names of a single image's files end; the coco files are those of finetuning/coco_results
ENDINGS = ("mask.png", "labels.png", "overlay.png", "1_cutout.png", "coco.json")


class Segmented(NamedTuple):
    """An object, as the model sees it: its HxW bool mask, and the model's own estimate of its IoU.

    name: what the table of prompts calls it, or its number in the image.
    """

    name: str
    prompt: Prompt
    mask: np.ndarray
    score: float


def free_name(folder: Path, stem: str) -> str:
    """Return `stem` with the first number that no result in `folder` has yet."""
    for number in itertools.count(1):
        name = f"{stem}_{number:03}"
        if not any((folder / f"{name}_{ending}").exists() for ending in ENDINGS):
            return name


def file_names(name: str, kinds: set[str], has_pixels: list[bool]) -> list[dict[str, str]]:
    """Return the files of each object of an image, by what they show.

    has_pixels: of each object whether its mask has any; an empty one has no cutout. The overlay
    is of all objects, as is the label map of several.
    """
    mask = "mask" if len(has_pixels) == 1 else "labels"
    shared = {"overlay": f"{name}_overlay.png"} if "overlays" in kinds else {}
    shared |= {mask: f"{name}_{mask}.png"} if "masks" in kinds else {}
    names = [dict(shared) for _ in has_pixels]
    if "cutouts" in kinds:
        for number, (of_object, is_there) in enumerate(zip(names, has_pixels, strict=True), 1):
            of_object |= {"cutout": f"{name}_{number}_cutout.png"} if is_there else {}
    return names


def write_files(
    folder: Path, name: str, image: np.ndarray, objects: list[Segmented], kinds: set[str]
) -> list[dict[str, str]]:
    """Write the files of an HxWx3 uint8 RGB image; return their names, as file_names does.

    In the label map, the first object is 1; where two overlap, the pixel is of the one with the
    higher score. Cutouts are transparent around the object, and cropped to its box.
    """
    names = file_names(name, kinds, [bool(found.mask.any()) for found in objects])
    if "overlay" in names[0]:
        overlay = image.copy()
        for number, found in enumerate(objects):
            draw_object(overlay, found.mask, found.prompt, number=number)
        write_image(folder / names[0]["overlay"], overlay)
    if "mask" in names[0]:
        write_image(folder / names[0]["mask"], objects[0].mask.astype(np.uint8) * 255)
    if "labels" in names[0]:
        write_image(folder / names[0]["labels"], _label_map(objects))
    for of_object, found in zip(names, objects, strict=True):
        if "cutout" in of_object:
            _write_rgba(folder / of_object["cutout"], cut_out(image, found.mask))
    return names


def _label_map(objects: list[Segmented]) -> np.ndarray:
    """Return the HxW uint8 label map of objects, or uint16 of more than 255."""
    labels = np.zeros(objects[0].mask.shape, np.uint8 if len(objects) < 256 else np.uint16)
    for number in sorted(range(len(objects)), key=lambda number: objects[number].score):
        labels[objects[number].mask] = number + 1
    return labels


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return what an HxW bool mask, which is not empty, shows of an image: hxwx4 uint8 RGBA."""
    x1, y1, x2, y2 = mask_box(mask)
    inside = slice(y1, y2 + 1), slice(x1, x2 + 1)
    alpha = mask[inside].astype(np.uint8) * 255
    return np.dstack([image[inside] * mask[inside][..., None], alpha])


def _write_rgba(path: Path, image: np.ndarray) -> None:
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA))[1]
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def remove_others(folder: Path, name: str, kept: list[dict[str, str]], objects: int) -> None:
    """Remove the files that an earlier run made of an image, of so many objects, but for `kept`."""
    names = {f"{name}_{kind}.png" for kind in ("mask", "labels", "overlay")}
    names |= {f"{name}_{number}_cutout.png" for number in range(1, objects + 1)}
    for old in names.difference(*(of_object.values() for of_object in kept)):
        (folder / old).unlink(missing_ok=True)
