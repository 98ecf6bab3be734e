"""Write objects as COCO files (cocodataset.org/#format-data), which annotation tools read.

coco.json holds exact RLEs; coco_polygons.json holds outlines, for tools that only read polygons.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import cv2
import numpy as np

from finetuning.basics.files import atomic_write, read_file
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.prompts import mask_box

MAKER = "segmented by test_my_image.py"  # marks a file as ours: it may be overwritten
CATEGORY = {"id": 1, "name": "object"}
# Largest error of a simplified outline in pixels: it smooths the steps of slanted edges, which are
# at most 0.71
OUTLINE_TOLERANCE = 0.75
FEW_POINTS = 50  # outlines up to this length stay exact: small parts would lose too much
THIN = 8.0  # pixels: parts up to this mean width stay exact, too, as they would vanish


def require_pycocotools() -> None:
    """Raise UserError if pycocotools is not installed."""
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
    """Return an outline x1, y1, x2, y2, ... of each part of an HxW bool mask that is not empty.

    Outlines follow the edges of pixels; long ones are simplified, within OUTLINE_TOLERANCE, unless
    the part is thin. A COCO polygon has no holes, so a cut of no width joins each to its outline.
    """
    x1, y1, x2, y2 = mask_box(mask)
    part = mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8)
    # OpenCV connects the centers of the outermost pixels, not their edges. After doubling, a pixel
    # x has the centers 2x and 2x+1, which (center + 1) // 2 maps to its edges x and x+1.
    doubled = part.repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(contour[:, 0] + 1) // 2 + np.array([x1, y1], np.int32) for contour in contours]
    holes: dict[int, list[np.ndarray]] = {}  # by the index of the outline around them
    for ring, (*_, parent) in zip(rings, tree[0], strict=True):
        holes.setdefault(int(parent), []).append(ring)
    outlines = [index for index, (*_, parent) in enumerate(tree[0]) if parent < 0]
    return [_to_polygon([rings[index], *holes.get(index, [])]) for index in outlines]


def _to_polygon(rings: list[np.ndarray]) -> list[int]:
    """Return the polygon of a part: its outline and holes, each Nx2 int32, joined by cuts."""
    area, *hole_areas = map(cv2.contourArea, rings)
    length = sum(cv2.arcLength(ring, closed=True) for ring in rings)
    if 2 * (area - sum(hole_areas)) >= THIN * length:
        rings = [
            ring
            if len(ring) <= FEW_POINTS
            else cv2.approxPolyDP(ring, OUTLINE_TOLERANCE, closed=True)[:, 0]
            for ring in rings
        ]
    return cut_open(*rings).ravel().tolist()


def cut_open(outline: np.ndarray, *holes: np.ndarray) -> np.ndarray:
    """Join an outline and the holes in it, each Nx2 in (X,Y), into one polygon.

    A cut of no width leads from the outline to each hole, and back.
    """
    detours: dict[int, list[np.ndarray]] = {}  # by the index of the outline's point
    for hole in holes:
        start = int(((outline - hole[0]) ** 2).sum(1).argmin())
        end = int(((hole - outline[start]) ** 2).sum(1).argmin())
        hole = np.roll(hole, -end, axis=0)
        detours.setdefault(start, []).append(np.concatenate([hole, hole[:1], outline[[start]]]))
    ends = sorted(detours)
    parts = np.split(outline, [end + 1 for end in ends])
    for part, end in enumerate(ends):
        parts[part] = np.concatenate([parts[part], *detours[end]])
    return np.concatenate(parts)


class CocoFile:
    """A COCO file that is read, changed and written back."""

    def __init__(self, path: Path, outline: Callable[[np.ndarray], Any]) -> None:
        """Read the file if it exists.

        outline: makes COCO's "segmentation" of an HxW bool mask.
        Raises UserError if another program wrote the file, as write would overwrite it.
        """
        self.path, self.outline = path, outline
        # By file name: COCO's image and its annotations
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
            message = (
                f"{path} was not written by this script; move it away, or choose another --output"
            )
            raise UserError(message) from error

    def put(self, image: str, objects: list[SegmentedObject]) -> None:
        """Replace an image's objects (at least one); empty masks are left out."""
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
        """Write the file, with images sorted by name and new ids."""
        images, annotations = [], []
        for number, (_, (image, its_annotations)) in enumerate(sorted(self.entries.items()), 1):
            images.append(image | {"id": number})
            for annotation in its_annotations:
                ids = {"id": len(annotations) + 1, "image_id": number}
                annotations.append(annotation | ids)
        document = {
            "info": {"description": MAKER},
            "images": images,
            "categories": [CATEGORY],
            "annotations": annotations,
        }
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def coco_files(folder: Path, prefix: str = "", is_forced: bool = True) -> list[CocoFile]:
    """Return a folder's two COCO files, with RLEs and with polygons; prefix starts their names.

    is_forced: False for those that exist already and are this script's.
    """
    outlines = {f"{prefix}coco.json": to_rle, f"{prefix}coco_polygons.json": to_polygons}
    if is_forced:
        return [CocoFile(folder / name, outline) for name, outline in outlines.items()]
    files = []
    for name, outline in outlines.items():
        with contextlib.suppress(UserError):
            files.append(CocoFile(folder / name, outline))
    files = [file for file in files if file.path.is_file()]
    if files:
        require_pycocotools()
    return files
