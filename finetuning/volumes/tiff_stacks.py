"""TIFF stacks, OME-TIFF, and TIFFs of many channels, with tifffile."""

from __future__ import annotations

import mmap
from pathlib import Path

from sam2_utils import UserError

import numpy as np

from finetuning.basics.command_line import brief_path
from finetuning.basics.files import atomic_write
from finetuning.basics.tiff import BITS, EXTRA_SAMPLES, SAMPLES, tiff_pages
from finetuning.volumes.volume import Bands, Volume, choose_bands, require

TIFF_SUFFIXES = (".tif", ".tiff")
KIND = "a TIFF of several pages or many channels"


def is_stack(path: Path) -> bool:
    """Return whether a TIFF has several pages, or channels that are no gray, RGB or RGBA image."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pages = tiff_pages(content)
    if len(pages) != 1:
        return len(pages) > 1
    samples, is_alpha = pages[0].first(SAMPLES), pages[0].first(EXTRA_SAMPLES, 0) in (1, 2)
    return samples > 4 or (samples == 2 and not (is_alpha and pages[0].first(BITS) == 8))


def read_stack(path: Path, bands: Bands = ()) -> Volume:
    """Read a TIFF: each page, or each Z and T of an OME-TIFF, is a slice.

    bands: of its channels: bands of a satellite image, or dyes of a microscope.
    """
    tifffile = require("tifffile", path, KIND)
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series
            if len({(each.shape, each.axes) for each in series}) > 1:
                raise UserError(
                    f"{brief_path(path)} holds {len(series)} images of different sizes; save the "
                    "one that you want as its own file"
                )
            values, axes = np.stack([each.asarray() for each in series]), f"I{series[0].axes}"
            is_alpha = series[0].keyframe.extrasamples[:1] in ((1,), (2,))
    except UserError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise UserError(_unreadable(path, error)) from error
    channels = [k for k, axis in enumerate(axes) if axis in "CS"]
    planes = [axes.rindex("Y"), axes.rindex("X")]
    others = [k for k in range(values.ndim) if k not in (*channels, *planes)]
    values = values.transpose(*others, *planes, *channels)
    height, width = values.shape[len(others) : len(others) + 2]
    values = values.reshape(int(np.prod(values.shape[: len(others)])), height, width, -1)
    if is_alpha and not bands and values.shape[-1] in (2, 4):
        values = values[..., :-1]
    return Volume(path, choose_bands(path, values, bands))


def _unreadable(path: Path, error: Exception) -> str:
    if "imagecodecs" in str(error):
        return f"{brief_path(path)} is compressed; pip install imagecodecs"
    return f"{brief_path(path)} is not a readable TIFF; copy it again, or export it again"


def write_stack(path: Path, masks: np.ndarray) -> None:
    """Write masks, slices x rows x columns, as a TIFF stack."""
    tifffile = require("tifffile", path, KIND)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        options = {"compression": "zlib", "photometric": "minisblack", "metadata": {"axes": "ZYX"}}
        tifffile.imwrite(file, masks, **options)
