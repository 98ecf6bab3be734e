"""What the frozen image encoder says of each image: computed once, kept on disk, read by index.

A cache is one file a split, of records of equal size: a key, whether the mask has an object, the
mask on the grid of the model's input, and what SAM2ImagePredictor.set_image computes, in half
precision. A record counts only under the key of all that it was computed from, and the key is
written after everything else has reached the disk: what is stale or half-written is not read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import distributed
from command_line import UserError, is_memory_error
from image_files import Pair, read_mask, read_pair
from sam2_utils import Features, NotFiniteError, autocast, encode_images, feature_shapes

import cv2
import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

FORMAT = 1  # of the records; another one makes a cache stale
KEY_BYTES = 64
SECONDS_BETWEEN_COMMITS = 5.0  # what a pulled plug may cost
ENCODED_AT_ONCE = {"cuda": 8}  # images; one elsewhere
FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")


def hash_encoder(model: SAM2Base) -> str:
    """Return a SHA-256 of the weights that features depend on.

    set_image uses the image encoder, the mask decoder's two convolutions on high-resolution
    features, and no_mem_embed.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if name.startswith(("image_encoder.", "sam_mask_decoder.conv_s", "no_mem_embed")):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def mask_on_grid(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize an HxW bool mask to size x size cells; the smallest object keeps a cell."""
    # Sides that shrink first: OpenCV takes the mean over areas only where none grows.
    shrunk = tuple(min(side, size) for side in mask.shape[::-1])
    covered = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
    grid = cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA) >= 0.5
    if not grid.any():
        y, x = np.nonzero(mask)
        grid[y * size // mask.shape[0], x * size // mask.shape[1]] = True
    return grid


class FeatureCache:
    """The features and masks of a list of pairs, as one model computes them, in one file."""

    def __init__(
        self,
        path: Path,
        predictor: SAM2ImagePredictor,
        pairs: list[Pair],
        precision: torch.dtype,
    ) -> None:
        """Look up which pairs the file at `path` has, if there is one; nothing is written."""
        size = predictor.model.image_size
        self.path, self.pairs, self.image_size, self.precision = path, pairs, size, precision
        self.record = np.dtype(
            [
                ("key", f"S{KEY_BYTES}"),
                ("has_object", np.bool_),
                ("mask", np.uint8, (size * size // 8,)),
                # Channels last, as set_image leaves them
                *(
                    (name, np.float16, shape)
                    for name, shape in zip(FEATURES, feature_shapes(predictor.model), strict=True)
                ),
            ]
        )
        device = predictor.device.type
        source = [FORMAT, torch.__version__, device, precision, size, hash_encoder(predictor.model)]
        self.keys = [_key(source, pair) for pair in pairs]
        self._look_up()

    def _look_up(self) -> None:
        """Find which records of the file are those of the pairs."""
        wanted = {key: index for index, key in enumerate(self.keys)}
        self._slots: dict[int, int] = {}  # where the records of the pairs are
        self._used: set[int] = set()  # records with any key
        self._has_object: dict[int, bool] = {}
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for slot in range(os.fstat(file.fileno()).st_size // self.record.itemsize):
                file.seek(slot * self.record.itemsize)
                key, has_object = file.read(KEY_BYTES), file.read(1) == b"\x01"
                if any(key):
                    self._used.add(slot)
                if key in wanted:
                    self._slots[wanted[key]] = slot
                    self._has_object[wanted[key]] = has_object

    def __contains__(self, index: int) -> bool:
        return index in self._slots

    def has_object(self, index: int) -> bool:
        """Say whether the mask of a pair that the cache holds is not empty."""
        return self._has_object[index]

    def read(self, indices: list[int]) -> tuple[Features, list[np.ndarray]]:
        """Return float16 features of B images on the CPU, and their B SxS bool masks.

        The file is mapped for a moment only, so that memory does not grow with what was read.
        """
        records = [
            np.memmap(self.path, self.record, "r", self._slots[index] * self.record.itemsize, 1)[0]
            for index in indices
        ]
        if any(record["key"] != self.keys[i] for i, record in zip(indices, records, strict=True)):
            raise UserError(f"another run is writing to {self.path}; use another --cache folder")
        maps = [
            torch.from_numpy(np.stack([record[name] for record in records])).permute(0, 3, 1, 2)
            for name in FEATURES
        ]
        shape = (self.image_size, self.image_size)
        masks = [np.unpackbits(record["mask"]).reshape(shape).view(bool) for record in records]
        return Features(maps[0], maps[1:]), masks

    def bytes_to_come(self) -> int:
        """Return by how much the file will grow when it is filled."""
        missing, stale = len(self.pairs) - len(self._slots), len(self._used) - len(self._slots)
        return max(0, missing - stale) * self.record.itemsize

    def fill(self, predictor: SAM2ImagePredictor) -> None:
        """Encode the images that are missing, each process its share of them.

        Raises UserError for an image or a mask that is unreadable.
        """
        missing = [index for index in range(len(self.pairs)) if index not in self]
        if not missing:
            return
        taken = set(self._slots.values())
        free = (slot for slot in itertools.count() if slot not in taken)
        places = list(zip(missing, free, strict=False))
        if distributed.rank() == 0:
            self._make_room(places)
        distributed.wait_for_all()
        if self.path.is_file():
            with self.path.open("rb+") as file:
                self._encode(file, distributed.share(places), predictor)
        distributed.wait_for_all()
        self._look_up()
        if len(self._slots) < len(self.pairs):
            raise UserError(f"not all machines see {self.path}; name a shared folder with --cache")

    def _make_room(self, places: list[tuple[int, int]]) -> None:
        """Take the key from each record to be replaced, and set the file's size."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._slots:  # all stale, perhaps of another model
            self.path.unlink(missing_ok=True)
            self._used = set()
        self.path.touch()
        with self.path.open("rb+") as file:
            size = os.fstat(file.fileno()).st_size
            file.truncate(size - size % self.record.itemsize)  # a record cut off may have its key
            for _, slot in places:
                if slot in self._used:
                    file.seek(slot * self.record.itemsize)
                    file.write(bytes(KEY_BYTES))
            end = (max(slot for _, slot in places) + 1) * self.record.itemsize
            file.truncate(max(end, size - size % self.record.itemsize))
            _flush(file)

    def _encode(
        self, file: BinaryIO, places: list[tuple[int, int]], predictor: SAM2ImagePredictor
    ) -> None:
        """Write the records of (index, slot), and every few seconds the keys of those written."""
        batch_size = ENCODED_AT_ONCE.get(predictor.device.type, 1)
        written: list[tuple[int, int]] = []
        last_commit = time.monotonic()
        progress = tqdm(total=len(places), desc=f"Encoding {self.path.stem}", unit="image")
        try:
            while places:
                batch = places[:batch_size]
                try:
                    records = self._compute([index for index, _ in batch], predictor)
                except RuntimeError as error:
                    batch_size = _smaller_batch(batch_size, error)
                    continue
                for (_, slot), record in zip(batch, records, strict=True):
                    file.seek(slot * self.record.itemsize + KEY_BYTES)
                    file.write(record.tobytes()[KEY_BYTES:])
                places = places[len(batch) :]
                written += batch
                progress.update(len(batch))
                if time.monotonic() - last_commit > SECONDS_BETWEEN_COMMITS:
                    self._commit(file, written)
                    written, last_commit = [], time.monotonic()
        finally:  # also when interrupted
            progress.close()
            self._commit(file, written)

    def _commit(self, file: BinaryIO, written: list[tuple[int, int]]) -> None:
        """Make written records valid by their keys, once all else has reached the disk."""
        _flush(file)
        for index, slot in written:
            file.seek(slot * self.record.itemsize)
            file.write(self.keys[index])
        _flush(file)

    def _compute(self, indices: list[int], predictor: SAM2ImagePredictor) -> np.ndarray:
        """Return the records of some pairs, without their keys.

        Raises NotFiniteError rather than keep features that are NaN or beyond half precision.
        """
        images, masks = zip(*(read_pair(self.pairs[index]) for index in indices), strict=True)
        with autocast(predictor.device, self.precision):
            features = encode_images(predictor, list(images))
        records = np.zeros(len(indices), self.record)
        maps = (features.image_embed, *features.high_res_feats)
        for name, feature_map in zip(FEATURES, maps, strict=True):
            records[name] = feature_map.permute(0, 2, 3, 1).half().cpu().numpy()
            for index, values in zip(indices, records[name], strict=True):
                if not np.isfinite(values).all():
                    raise NotFiniteError(
                        f"the features of {self.pairs[index].image} are not finite (NaN) in "
                        f"{str(self.precision).removeprefix('torch.')}; use --precision float32, "
                        "or another --checkpoint"
                    )
        for record, mask in zip(records, masks, strict=True):
            record["has_object"] = mask.any()
            record["mask"] = np.packbits(mask_on_grid(mask, self.image_size))
        return records


def check_room(caches: list[FeatureCache], folder: Path) -> None:
    """Say how much the caches will write to a folder; raise UserError if it has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(cache.bytes_to_come() for cache in caches), shutil.disk_usage(folder).free
    if needed:
        print(f"features: {needed / 1e9:.2f} GB to write to {folder} ({free / 1e9:.1f} GB free)")
    if needed > 0.98 * free:
        raise UserError(
            f"{folder} has room for {free / 1e9:.2f} GB of features, not for "
            f"{needed / 1e9:.2f} GB; make room, name a folder on another disk with --cache, or "
            "go on without them with --no-cache (slow)"
        )


def load_features(
    predictor: SAM2ImagePredictor,
    cache: FeatureCache | None,
    index: int,
    pair: Pair,
    precision: torch.dtype,
) -> Features:
    """Return float32 features of one pair's image: from the cache if they are there, else anew."""
    if cache is not None and index in cache:
        return cache.read([index])[0].to(predictor.device, torch.float32)
    image, _ = read_pair(pair)
    with autocast(predictor.device, precision):
        features = encode_images(predictor, [image])
    return features.to(predictor.device, torch.float32)


def pairs_with_objects(pairs: list[Pair], cache: FeatureCache | None) -> list[int]:
    """Return the indices of the pairs whose masks are not empty."""
    if cache is not None:
        return [index for index in range(len(pairs)) if cache.has_object(index)]
    progress = tqdm(pairs, desc="Reading masks", unit="mask", leave=False)
    return [index for index, pair in enumerate(progress) if read_mask(pair.mask).any()]


def _key(source: list, pair: Pair) -> bytes:
    """Return a hash of all that a record is computed from, in KEY_BYTES hexadecimal digits."""
    files = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (pair.image, pair.mask)
    ]
    return hashlib.sha256(repr([*source, *files]).encode()).hexdigest().encode()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _smaller_batch(batch_size: int, error: RuntimeError) -> int:
    """Return half a batch size where memory ran out; any other error is raised again.

    Raises UserError where even one image was too many.
    """
    if not is_memory_error(error):
        raise error
    if batch_size == 1:
        raise UserError(
            "the memory is too small to encode even one image; use a smaller --model, "
            "or --device cpu"
        ) from error
    torch.cuda.empty_cache()  # does nothing where there is no CUDA
    return batch_size // 2
