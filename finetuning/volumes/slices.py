"""Slices of volumes as image files, with one value range for all volumes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from finetuning.basics.image_files import to_8_bits
from finetuning.volumes.files import VolumeFile, read_volume
from finetuning.volumes.volume import Bands, Volume

PERCENTILES = 0.5, 99.5
SAMPLE = 1 << 18  # voxels of each volume that the percentiles are of
ValueRange = tuple[float, float]


def common_range(volumes: Sequence[VolumeFile], bands: Bands = ()) -> ValueRange | None:
    """Return the range of values, in the files' units, that holds 99% of all volumes' voxels.

    None if no volume has several slices of more than 8 bits: images are stretched one by one.
    """
    samples = []
    for each in tqdm(volumes, desc="Finding the value range", unit="volume", leave=False):
        values = read_volume(each, bands).values
        if values.dtype != np.uint8 and len(values) > 1:
            voxels = values.reshape(-1)[:: -(-values.size // SAMPLE)].astype(np.float32)
            samples.append(voxels[np.isfinite(voxels)])
    if not samples or not (voxels := np.concatenate(samples)).size:  # all may be NaN
        return None
    low, high = np.percentile(voxels, PERCENTILES).tolist()
    return (low, high) if low < high else (low, low + 1)


def slice_name(name: str, index: int, count: int) -> str:
    """Return the name of a slice, counted from 1: scan_012; a volume of one slice is an image."""
    return f"{name}_{index + 1:0{max(3, len(str(count)))}}" if count > 1 else name


def write_slice(
    path: Path, volume: Volume, index: int, value_range: ValueRange | None = None
) -> None:
    """Write a slice as an 8-bit image, with value_range as black and white; NaN is black."""
    values = volume.values[index]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        finite = values[np.isfinite(values)]
        low, high = value_range or (np.percentile(finite, PERCENTILES) if finite.size else (0, 0))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    is_8_bits = values.dtype == np.uint8
    write_png(path, values if is_8_bits else to_8_bits(volume.path, values, value_range))


def write_png(path: Path, values: np.ndarray) -> None:
    """Write a temporary PNG of H x W or H x W x 3 (RGB) values of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", values if values.ndim == 2 else values[..., ::-1])[1])


def empty_slices(
    labels: np.ndarray, value: int | None = None, ignored: int | None = None
) -> np.ndarray:
    """Return which slices of labels, slices x rows x columns (x 3), have no object: bool.

    value: the object's; None: all values but 0 and `ignored`.
    """
    is_object = (labels != 0) & (labels != ignored) if value is None else labels == value
    return ~is_object.reshape(len(labels), -1).any(axis=1)


def kept_slices(is_empty: np.ndarray, volume: Volume, most_empty: int) -> list[int]:
    """Return the indices of the slices to keep: all with an object, and some of the empty ones.

    The empty ones are evenly spaced. Slices of one value, outside the body, are not kept.
    """
    empty = [k for k in np.flatnonzero(is_empty).tolist() if _has_contrast(volume.values[k])]
    count = min(len(empty), most_empty)
    chosen = np.linspace(0, len(empty) - 1, count).round().astype(int) if count else []
    return sorted([*np.flatnonzero(~is_empty).tolist(), *(empty[k] for k in chosen)])


def _has_contrast(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return finite.size > 0 and bool(np.ptp(finite) > 0)
