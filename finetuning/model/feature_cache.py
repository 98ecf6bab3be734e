"""What the frozen image encoder says of each image: computed once, kept on disk.

A folder holds one safetensors file an image, named by a hash of all that it was computed from: the
encoder's weights, the image file's content, the precision. An image that is moved, renamed or in
several splits is encoded once, runs may share a folder, and what is stale is never asked for.
Files are written whole, and each holds a digest of itself, by which damaged ones are found.
"""

from __future__ import annotations

import hashlib
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sam2_utils import NotFiniteError, UserError, autocast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.basics import distributed
from finetuning.basics.command_line import is_memory_error
from finetuning.basics.files import atomic_write, content_sha256, hash_contents
from finetuning.basics.image_files import read_image
from finetuning.basics.threads import in_threads
from finetuning.model.segmentation import Features, encode_images, feature_shapes

FORMAT = 2  # of the files; another one is not read
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


class FeatureCache:
    """The features of images, as one model computes them in one precision, in a folder.

    An image's content, and whether its features are there and undamaged, is looked up once a run.
    """

    def __init__(self, folder: Path, predictor: SAM2ImagePredictor, precision: torch.dtype) -> None:
        """Nothing is read or written yet; the folder need not be there."""
        model, device = predictor.model, predictor.device.type
        self.folder, self.precision = folder, precision
        self._shapes = dict(zip(FEATURES, feature_shapes(model), strict=True))
        self._source = [
            FORMAT, torch.__version__, device, precision, model.image_size, hash_encoder(model),
        ]  # fmt: skip
        self.held_on: torch.device | None = None
        self._held: dict[Path, dict[str, torch.Tensor]] = {}  # on that device, by the file's path
        self._paths: dict[Path, Path] = {}  # of the features, by the image's
        self._sizes: dict[Path, tuple[int, int] | None] = {}  # by those; None: not there

    def __getstate__(self) -> dict[str, Any]:
        """Return what a loading process gets, which reads nothing that is held."""
        return {**self.__dict__, "_held": {}}

    def __contains__(self, image: Path) -> bool:
        return self.size(image) is not None

    def size(self, image: Path) -> tuple[int, int] | None:
        """Return the (H,W) of an image whose features are there, or None where they are not."""
        path = self._path(image)
        if path not in self._sizes:
            self._sizes[path] = self._size_in(path)
        return self._sizes[path]

    def look_up(self, images: list[Path]) -> None:
        """Look up which images have features: the first process, in threads, for all of them."""

        def find() -> tuple[dict[Path, Path], dict[Path, tuple[int, int] | None]]:
            hash_contents(image for image in images if image not in self._paths)
            paths = {image: self._path(image) for image in images}
            new = [path for path in dict.fromkeys(paths.values()) if path not in self._sizes]
            sizes = in_threads(self._size_in, new, "Looking up features", "image")
            return paths, dict(zip(new, sizes, strict=True))

        paths, sizes = distributed.from_first(find)
        self._paths.update(paths)
        self._sizes.update(sizes)

    def missing(self, images: list[Path]) -> list[Path]:
        """Return the images that are to be encoded, one of each content."""
        by_path = {self._path(image): image for image in images if image not in self}
        return list(by_path.values())

    def bytes_of(self, count: int) -> int:
        """Return how much the features of so many images are."""
        values = sum(height * width * depth for height, width, depth in self._shapes.values())
        return count * values * torch.float16.itemsize

    def hold(self, images: list[Path], device: torch.device) -> None:
        """Keep the features of images in a device's memory, from where read returns them.

        Raises UserError where they are too many for it.
        """
        self.held_on = device
        try:
            for image in tqdm(images, desc=f"Features to {device}", unit="image", leave=False):
                maps, _ = _map(self._path(image))
                self._held[self._path(image)] = {
                    name: values.to(device, copy=True) for name, values in maps.items()
                }
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            raise UserError(
                f"the memory of {device} is too small for all features; use --cache-in disk"
            ) from error

    def read(self, images: list[Path]) -> Features:
        """Return float16 features of B images, in the order asked for, on the CPU or where held.

        Files are mapped for a moment only, so that memory does not grow with what was read.
        Raises UserError where features are not there, or no longer.
        """
        paths = [self._path(image) for image in images]
        try:
            files = [self._held.get(path) or _map(path)[0] for path in paths]
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"features are missing from {self.folder}, or were damaged since the run began; "
                "start it again to encode those images anew"
            ) from error
        maps = [torch.stack([file[name] for file in files]) for name in FEATURES]
        image_embed, *high_res_feats = (values.permute(0, 3, 1, 2) for values in maps)
        return Features(image_embed, high_res_feats)

    def fill(self, images: list[Path], predictor: SAM2ImagePredictor, description: str) -> None:
        """Encode the images that are missing, each process its share; `description`: of what.

        Raises UserError for an image that is unreadable, NotFiniteError rather than keep features
        that are NaN or beyond half precision.
        """
        self.look_up(images)
        missing = self.missing(images)
        if missing:
            self._encode(distributed.share(missing), predictor, description)
            distributed.wait_for_all()
            for image in missing:
                del self._sizes[self._path(image)]
            self.look_up(missing)
        # The first process has looked; another may be on a machine with other files
        is_first = distributed.rank() == 0
        if self.missing(missing) or not (is_first or self._are_files(images)):
            raise UserError(
                f"not all machines see {self.folder}; name a shared folder with --cache"
            )

    def _path(self, image: Path) -> Path:
        """Return where an image's features are, or will be."""
        if image not in self._paths:
            self._paths[image] = self._path_for(content_sha256(image))
        return self._paths[image]

    def _path_for(self, content: str) -> Path:
        """Return the same for an image whose file has this SHA-256."""
        key = hashlib.sha256(repr([*self._source, content]).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _are_files(self, images: list[Path]) -> bool:
        paths = [self._path(image) for image in images]
        return all(in_threads(Path.is_file, paths, "Looking for features", "image"))

    def _size_in(self, path: Path) -> tuple[int, int] | None:
        """Return the (H,W) of the image whose features a file holds; None if it is damaged."""
        if not path.is_file():
            return None
        try:
            maps, metadata = _map(path)
        except SafetensorError:  # cut off, or something else
            return None
        size = metadata.get("size", "")
        kinds = {name: (values.dtype, tuple(values.shape)) for name, values in maps.items()}
        if kinds != {name: (torch.float16, shape) for name, shape in self._shapes.items()}:
            return None
        if metadata.get("digest") != _digest(path, size, maps):
            return None
        height, width = map(int, size.split("x"))
        return height, width

    def _encode(self, images: list[Path], predictor: SAM2ImagePredictor, description: str) -> None:
        """Encode images and write each one's features; what is written stays if it is stopped.

        While some are computed, those before them are written, and the next ones are read.
        """
        batch_size = ENCODED_AT_ONCE.get(predictor.device.type, 1)
        reading: list[tuple[Path, Future[np.ndarray]]] = []
        writing: list[Future[None]] = []
        progress = tqdm(total=len(images), desc=f"Encoding {description}", unit="image")
        with progress, ThreadPoolExecutor(2) as threads:
            to_read = iter(images)
            while True:
                ahead = itertools.islice(to_read, max(0, 2 * batch_size - len(reading)))
                reading += [(image, threads.submit(read_image, image)) for image in ahead]
                batch = [(image, pixels.result()) for image, pixels in reading[:batch_size]]
                if not batch:
                    break
                try:
                    maps = self._compute([pixels for _, pixels in batch], predictor)
                except RuntimeError as error:
                    batch_size = _smaller_batch(batch_size, error)
                    continue
                reading = reading[len(batch) :]
                _wait_for(writing)
                writing = [
                    threads.submit(self._write, image, pixels.shape, of_image)
                    for (image, pixels), of_image in zip(batch, maps, strict=True)
                ]
                progress.update(len(batch))
            _wait_for(writing)

    def _compute(
        self, images: list[np.ndarray], predictor: SAM2ImagePredictor
    ) -> list[dict[str, torch.Tensor]]:
        """Return each image's HxWxC float16 maps, on the CPU."""
        with autocast(predictor.device, self.precision):
            features = encode_images(predictor, images)
        maps = [  # channels last, as set_image leaves them
            feature_map.permute(0, 2, 3, 1).half().cpu().contiguous()
            for feature_map in (features.image_embed, *features.high_res_feats)
        ]
        return [dict(zip(FEATURES, of_image, strict=True)) for of_image in zip(*maps, strict=True)]

    def _write(self, image: Path, shape: tuple[int, ...], maps: dict[str, torch.Tensor]) -> None:
        """Write the HxWxC float16 maps of an image of a shape (H,W,3)."""
        if not all(values.isfinite().all() for values in maps.values()):
            raise NotFiniteError(
                f"the features of {image} are not finite (NaN) in "
                f"{str(self.precision).removeprefix('torch.')}; use --precision float32, "
                "or another --checkpoint"
            )
        # By what this process has read: on another machine than the first it may be something else
        path, size = self._path_for(content_sha256(image)), f"{shape[0]}x{shape[1]}"
        with atomic_write(path) as temporary:
            metadata = {"size": size, "digest": _digest(path, size, maps)}
            # save_file would raise no OSError on a full disk
            temporary.write_bytes(save(maps, metadata))


def _map(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's HxWxC maps, left on the disk until they are used, and its metadata.

    Raises SafetensorError where it is cut off, or something else.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in FEATURES}, file.metadata() or {}


def _digest(path: Path, size: str, maps: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 of what a file holds, under the name that it has."""
    digest = hashlib.sha256(f"{path.stem} {size}".encode())
    for name in FEATURES:
        digest.update(maps[name].view(torch.uint8).numpy())
    return digest.hexdigest()


def _wait_for(futures: list[Future]) -> None:
    """Wait for all; raises what the first that failed has raised."""
    for future in futures:
        future.result()


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
