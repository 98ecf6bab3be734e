"""Write an image's objects as files: masks, overlays, cutouts."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np

from finetuning.basics.files import atomic_write
from finetuning.basics.image_files import write_image
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.drawing import draw_object
from finetuning.segmentation.prompts import mask_box

RESULT_KINDS = ("masks", "overlays", "cutouts", "coco")  # coco: see coco_files.py
IMAGE_ENDINGS = ("_mask.png", "_labels.png", "_overlay.png", "_cutout.png")  # of result files
# Suffixes of a single image's results; where one exists, its number is taken
ENDINGS = ("mask.png", "labels.png", "overlay.png", "1_cutout.png", "coco.json")


def free_name(folder: Path, stem: str) -> str:
    """Return `stem` with the first number that no result in `folder` has."""
    for number in itertools.count(1):
        name = f"{stem}_{number:03}"
        if not any((folder / f"{name}_{ending}").exists() for ending in ENDINGS):
            return name


def file_names(name: str, kinds: set[str], has_pixels: list[bool]) -> list[dict[str, str]]:
    """Return each object's file names, by what the files show.

    Arguments:
      name: what the file names start with.
      has_pixels: for each object, whether its mask has any; an empty mask gets no cutout.

    The objects of an image share the overlay and, if there are several, the label map.
    """
    mask = "mask" if len(has_pixels) == 1 else "labels"
    shared = {"overlay": f"{name}_overlay.png"} if "overlays" in kinds else {}
    shared |= {mask: f"{name}_{mask}.png"} if "masks" in kinds else {}
    names = [dict(shared) for _ in has_pixels]
    if "cutouts" in kinds:
        for number, (object_names, is_there) in enumerate(zip(names, has_pixels, strict=True), 1):
            object_names |= {"cutout": f"{name}_{number}_cutout.png"} if is_there else {}
    return names


def write_files(
    folder: Path, name: str, image: np.ndarray, objects: list[SegmentedObject], kinds: set[str]
) -> list[dict[str, str]]:
    """Write the files of an HxWx3 uint8 RGB image; return their names, as file_names does.

    In the label map, the first object has the value 1; where objects overlap, the one with the
    highest score wins. Cutouts are cropped to the object's box and transparent around the object.
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
    for object_names, found in zip(names, objects, strict=True):
        if "cutout" in object_names:
            _write_rgba(folder / object_names["cutout"], cut_out(image, found.mask))
    return names


def _label_map(objects: list[SegmentedObject]) -> np.ndarray:
    """Return the HxW label map of objects: uint8, or uint16 for more than 255 objects."""
    labels = np.zeros(objects[0].mask.shape, np.uint8 if len(objects) < 256 else np.uint16)
    # Highest score last, so that it wins where objects overlap
    for number in sorted(range(len(objects)), key=lambda number: objects[number].score):
        labels[objects[number].mask] = number + 1
    return labels


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut an HxW bool mask, not empty, out of an HxWx3 uint8 RGB image; return hxwx4 uint8 RGBA."""
    x1, y1, x2, y2 = mask_box(mask)
    inside = slice(y1, y2 + 1), slice(x1, x2 + 1)
    alpha = mask[inside].astype(np.uint8) * 255
    return np.dstack([image[inside] * mask[inside][..., None], alpha])


def _write_rgba(path: Path, image: np.ndarray) -> None:
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA))[1]
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
