"""Segmented objects as COCO files (cocodataset.org/#format-data), which annotation tools read.

coco.json holds RLEs, which are exact; coco_polygons.json outlines, for tools that take no others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.basics.files import atomic_write, read_file
from finetuning.inference.result_files import Segmented
from finetuning.model.prompts import mask_box

MAKER = "segmented by test_my_image.py"  # what tells such a file from one that a person made
CATEGORY = {"id": 1, "name": "object"}
TOLERANCE = 0.75  # pixels that an outline may be off; the steps of a slanted edge are at most 0.71
FEW_POINTS = 50  # of an outline, for it to be left as it is: small parts would lose much


def require_pycocotools() -> None:
    """Raise UserError where pycocotools is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        message = "--save coco needs pycocotools; pip install pycocotools"
        raise UserError(message) from error


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed RLE of an HxW bool mask."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Return the outlines x1, y1, x2, y2, ... of the parts of an HxW bool mask, not empty.

    They run along the edges of pixels; those of large parts are simplified, within TOLERANCE. A
    hole in a part is filled: polygons of COCO know none.
    """
    x1, y1, x2, y2 = mask_box(mask)
    part = mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8)
    # OpenCV goes from centre to centre of the outermost pixels. With each pixel as 2x2, those
    # of odd coordinates end where the pixel does, those of even ones where it begins.
    doubled = part.repeat(2, axis=0).repeat(2, axis=1)
    outlines, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for outline in outlines:
        edges = (outline + 1) // 2 + np.array([x1, y1], np.int32)
        if len(edges) > FEW_POINTS:
            edges = cv2.approxPolyDP(edges, TOLERANCE, closed=True)
        polygons.append(edges.ravel().tolist())
    return polygons


class CocoFile:
    """One COCO file: what an earlier run has put there, and what is added."""

    def __init__(self, path: Path, outline: Callable[[np.ndarray], Any]) -> None:
        """Read the file, if there is one; `outline` makes a "segmentation" of an HxW bool mask.

        Raises UserError where it was not written here: it would be lost.
        """
        self.path, self.outline = path, outline
        self.entries: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        if not path.is_file():
            return
        try:
            document = json.loads(read_file(path))
            if document["info"]["description"] != MAKER:
                raise ValueError(path)
            by_id = {image["id"]: (image, []) for image in document["images"]}
            for annotation in document["annotations"]:
                by_id[annotation["image_id"]][1].append(annotation)
            self.entries = {entry[0]["file_name"]: entry for entry in by_id.values()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"{path} is not of this script; move it away, or choose another --output"
            raise UserError(message) from error

    def put(self, image: str, objects: list[Segmented]) -> None:
        """Keep the objects of an image, at least one, in place of earlier ones; not empty masks."""
        height, width = objects[0].mask.shape
        annotations = []
        for found in objects:
            if not found.mask.any():
                continue
            x1, y1, x2, y2 = mask_box(found.mask)
            annotation = {
                "category_id": CATEGORY["id"],
                "segmentation": self.outline(found.mask),
                "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1],
                "area": int(found.mask.sum()),
                "iscrowd": 0,
                "score": round(found.score, 6),
                "object": found.name,
            }
            annotations.append(annotation)
        self.entries[image] = {"file_name": image, "width": width, "height": height}, annotations

    def write(self) -> None:
        """Write all, with the images sorted by name and everything numbered."""
        images, annotations = [], []
        for number, (_, (image, of_image)) in enumerate(sorted(self.entries.items()), start=1):
            images.append(image | {"id": number})
            for annotation in of_image:
                numbers = {"id": len(annotations) + 1, "image_id": number}
                annotations.append(annotation | numbers)
        document = {
            "info": {"description": MAKER},
            "images": images,
            "categories": [CATEGORY],
            "annotations": annotations,
        }
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def coco_files(folder: Path, prefix: str = "") -> list[CocoFile]:
    """Return the two files, of RLEs and of polygons, in a folder; their names begin with prefix."""
    return [
        CocoFile(folder / f"{prefix}coco.json", to_rle),
        CocoFile(folder / f"{prefix}coco_polygons.json", to_polygons),
    ]
