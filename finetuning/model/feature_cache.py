"""Image-encoder features, computed once per image and cached on disk.

    cache = FeatureCache(folder, predictor, torch.bfloat16)
    cache.fill(images, predictor, "train")  # encodes the images that are missing
    features = cache.read(images[:4])       # float16

A frozen encoder always returns the same features for an image, and computing them takes over 90% of
a training step. So they are computed once. The folder holds one safetensors file per image, named
by a hash of everything that the features depend on: the encoder's weights, the image file's
content, what is done to the image first (ImageVariant), the input size, the precision, the device
type and the PyTorch version. An image that is moved, renamed or in several splits is encoded once,
several runs can share a folder, and stale features are never read. Files are written atomically,
and each contains a digest to detect damage.
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
from finetuning.basics.threads import in_threads
from finetuning.model.image_variants import CachedImage, file_of, read_variant
from finetuning.segmentation.predicting import Features, encode_images, feature_shapes

FORMAT_VERSION = 2  # part of each file's name, so that files of another version are never read
ENCODED_AT_ONCE = {"cuda": 8}  # images per batch; 1 on other devices
MAP_NAMES = ("image_embed", "high_res_feats_0", "high_res_feats_1")  # the tensors of a file


def hash_encoder(model: SAM2Base) -> str:
    """Return a SHA-256 of the weights that the features depend on.

    These are the weights that SAM2ImagePredictor.set_image uses: the image encoder, the mask
    decoder's two convolutions on high-resolution features, and no_mem_embed.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if name.startswith(("image_encoder.", "sam_mask_decoder.conv_s", "no_mem_embed")):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """A folder of image features, for one model and one precision.

    Each image file is hashed, and each feature file verified, only once per run.
    """

    def __init__(self, folder: Path, predictor: SAM2ImagePredictor, precision: torch.dtype) -> None:
        """Prepare the cache without reading or writing; the folder need not exist."""
        model, device = predictor.model, predictor.device.type
        self.folder, self.precision = folder, precision
        self._shapes = dict(zip(MAP_NAMES, feature_shapes(model), strict=True))
        versions = FORMAT_VERSION, torch.__version__
        self._source = [*versions, device, precision, model.image_size, hash_encoder(model)]
        self.held_on: torch.device | None = None
        self._held: dict[Path, dict[str, torch.Tensor]] = {}  # feature file -> maps, on held_on
        self._paths: dict[CachedImage, Path] = {}  # image -> feature file
        self._sizes: dict[Path, tuple[int, int] | None] = {}  # feature file -> (H,W); None: missing

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a data-loading process, which does not need the features held in memory."""
        return {**self.__dict__, "_held": {}}

    def __contains__(self, image: CachedImage) -> bool:
        return self.size(image) is not None

    def size(self, image: CachedImage) -> tuple[int, int] | None:
        """Return the (H,W) of an image whose features are cached, else None."""
        path = self._path(image)
        if path not in self._sizes:
            self._sizes[path] = self._size_in(path)
        return self._sizes[path]

    def look_up(self, images: list[CachedImage]) -> None:
        """Look up, in threads, which images have features; only the first process reads files."""

        def find() -> tuple[dict[CachedImage, Path], dict[Path, tuple[int, int] | None]]:
            hash_contents(file_of(image) for image in images if image not in self._paths)
            paths = {image: self._path(image) for image in images}
            new = [path for path in dict.fromkeys(paths.values()) if path not in self._sizes]
            sizes = in_threads(self._size_in, new, "Looking up features", "image")
            return paths, dict(zip(new, sizes, strict=True))

        paths, sizes = distributed.from_first(find)
        self._paths.update(paths)
        self._sizes.update(sizes)

    def missing(self, images: list[CachedImage]) -> list[CachedImage]:
        """Return the images to encode; of several images with the same content, only one."""
        return list({self._path(image): image for image in images if image not in self}.values())

    def size_in_bytes(self, count: int) -> int:
        """Return the size of the features of `count` images."""
        values = sum(height * width * depth for height, width, depth in self._shapes.values())
        return count * values * torch.float16.itemsize

    def hold(self, images: list[CachedImage], device: torch.device) -> None:
        """Load the features of images into the memory of a device; read then takes them from there.

        Raises UserError if the memory is too small.
        """
        self.held_on = device
        try:
            for image in tqdm(images, desc=f"Features to {device}", unit="image", leave=False):
                maps, _ = _open_file(self._path(image))
                self._held[self._path(image)] = {
                    name: values.to(device, copy=True) for name, values in maps.items()
                }
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            raise UserError(
                f"the memory of {device} is too small for all features; use --cache-in disk"
            ) from error

    def read(self, images: list[CachedImage]) -> Features:
        """Return the float16 features of B images, on the CPU or on the device that holds them.

        Files are memory-mapped only during the call, so memory does not grow with the number read.
        Raises UserError if features are missing or damaged.
        """
        paths = [self._path(image) for image in images]
        try:
            files = [self._held.get(path) or _open_file(path)[0] for path in paths]
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"features are missing from {self.folder}, or were damaged since the run began; "
                "start it again to encode what is missing"
            ) from error
        maps = [torch.stack([file[name] for file in files]) for name in MAP_NAMES]
        # A view: in memory the channels stay last, which decides the last digits in bfloat16
        image_embed, *high_res_feats = (values.permute(0, 3, 1, 2) for values in maps)
        return Features(image_embed, high_res_feats)

    def fill(
        self, images: list[CachedImage], predictor: SAM2ImagePredictor, description: str
    ) -> None:
        """Encode the images that are missing; each process encodes its share.

        description: the name of the images in the progress bar. Raises UserError for an unreadable
        image, and NotFiniteError for features that are NaN or exceed half precision.
        """
        self.look_up(images)
        missing = self.missing(images)
        if missing:
            self._encode(distributed.share(missing), predictor, description)
            distributed.wait_for_all()
            for image in missing:
                del self._sizes[self._path(image)]
            self.look_up(missing)
        # Only the first process has looked; another may run on a machine that sees other files
        is_first = distributed.rank() == 0
        if self.missing(missing) or not (is_first or self._are_files(images)):
            raise UserError(
                f"not all machines see {self.folder}; name a shared folder with --cache"
            )

    def _path(self, image: CachedImage) -> Path:
        """Return the path of an image's feature file, whether or not it exists."""
        if image not in self._paths:
            self._paths[image] = self._path_for(image)
        return self._paths[image]

    def _path_for(self, image: CachedImage) -> Path:
        """Return the path of the feature file of an image, by its content and its change."""
        source = [*self._source, content_sha256(file_of(image))]
        if not isinstance(image, Path):
            source.append(image.change)
        key = hashlib.sha256(repr(source).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _are_files(self, images: list[CachedImage]) -> bool:
        paths = [self._path(image) for image in images]
        return all(in_threads(Path.is_file, paths, "Looking for features", "image"))

    def _size_in(self, path: Path) -> tuple[int, int] | None:
        """Return the (H,W) of the image of a feature file; None if it is missing or damaged."""
        if not path.is_file():
            return None
        try:
            maps, metadata = _open_file(path)
        except SafetensorError:  # truncated, or not a safetensors file
            return None
        size = metadata.get("size", "")
        kinds = {name: (values.dtype, tuple(values.shape)) for name, values in maps.items()}
        if kinds != {name: (torch.float16, shape) for name, shape in self._shapes.items()}:
            return None
        if metadata.get("digest") != _digest(path, size, maps):
            return None
        return tuple(map(int, size.split("x")))

    def _encode(
        self, images: list[CachedImage], predictor: SAM2ImagePredictor, description: str
    ) -> None:
        """Encode images and write a file for each; if interrupted, the files written so far stay.

        While a batch is computed, threads write the previous batch and read the next images.
        """
        batch_size = ENCODED_AT_ONCE.get(predictor.device.type, 1)
        reading: list[tuple[CachedImage, Future[np.ndarray]]] = []
        writing: list[Future[None]] = []
        progress = tqdm(total=len(images), desc=f"Encoding {description}", unit="image")
        with progress, ThreadPoolExecutor(2) as threads:
            to_read = iter(images)
            while True:
                # Read one batch ahead: the disk then keeps up, and few decoded images are in memory
                ahead = itertools.islice(to_read, max(0, 2 * batch_size - len(reading)))
                reading += [(image, threads.submit(read_variant, image)) for image in ahead]
                batch = [(image, pixels.result()) for image, pixels in reading[:batch_size]]
                if not batch:
                    break
                try:
                    maps = self._compute([pixels for _, pixels in batch], predictor)
                except RuntimeError as error:
                    batch_size = _smaller_batch(batch_size, error)
                    continue  # the images are still in `reading`
                reading = reading[len(batch) :]
                _wait_for(writing)
                writing = [
                    threads.submit(self._write, image, pixels.shape, image_maps)
                    for (image, pixels), image_maps in zip(batch, maps, strict=True)
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
        by_image = zip(*maps, strict=True)
        return [dict(zip(MAP_NAMES, image_maps, strict=True)) for image_maps in by_image]

    def _write(
        self, image: CachedImage, shape: tuple[int, ...], maps: dict[str, torch.Tensor]
    ) -> None:
        """Write the HxWxC float16 maps of an image of shape (H,W,3)."""
        if not all(values.isfinite().all() for values in maps.values()):
            raise NotFiniteError(
                f"the features of {image} are not finite (NaN) in "
                f"{str(self.precision).removeprefix('torch.')}; use --precision float32, "
                "or another --checkpoint"
            )
        # Hash the file that this process has read: on another machine its content may differ
        path, size = self._path_for(image), f"{shape[0]}x{shape[1]}"
        with atomic_write(path) as temporary:
            metadata = {"size": size, "digest": _digest(path, size, maps)}
            # Not save_file: it raises no OSError when the disk is full
            temporary.write_bytes(save(maps, metadata))


def _open_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's memory-mapped HxWxC maps and its metadata.

    Raises SafetensorError if the file is truncated or not a safetensors file.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in MAP_NAMES}, file.metadata() or {}


def _digest(path: Path, size: str, maps: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 of a file's name and content."""
    digest = hashlib.sha256(f"{path.stem} {size}".encode())
    for name in MAP_NAMES:
        digest.update(maps[name].view(torch.uint8).numpy())
    return digest.hexdigest()


def _wait_for(futures: list[Future]) -> None:
    """Wait for all futures; raise the first one's error, if any."""
    for future in futures:
        future.result()


def _smaller_batch(batch_size: int, error: RuntimeError) -> int:
    """Return half the batch size after an out-of-memory error; raise any other error again.

    Raises UserError if the batch was a single image.
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
