"""SAM 2 for the scripts: devices, models, prompts, features to masks, IoU, drawing."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import http.client
import socket
import ssl
import urllib.error
import warnings
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from command_line import UserError
from image_files import atomic_write

import cv2
import numpy as np
import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.nn.attention import SDPBackend, sdpa_kernel

# SAM 2 scripts its image transform, which newer versions of torch advise against.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")

CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
DOWNLOAD_TIMEOUT_SECONDS = 30.0
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    ValueError,  # an answer that makes no sense, of a proxy perhaps
)


class NotFiniteError(UserError):
    """The model computes NaN or infinity: it has been spoilt, or the precision is too low."""


# ----------------------------------------------------------------------------------------------
# Devices
# ----------------------------------------------------------------------------------------------


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add --device, for select_device."""
    parser.add_argument("--device", default="auto", help="auto, mps, cuda, cuda:N or cpu")


def add_precision_option(parser: argparse._ActionsContainer, auto: str) -> None:
    """Add --precision, for select_precision; `auto` says what its default means."""
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=choices, default="auto", help=auto)


def select_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: auto (MPS, else CUDA, else CPU), mps, cuda, cuda:N, cpu.

    Raises UserError when that device is unknown or absent.
    """
    available = {
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, present in available.items() if present))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise UserError(f"--device {name} is unknown; use auto, mps, cuda, cuda:N or cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available[device.type] or (device.index or 0) >= count:
        present = ", ".join(kind for kind, is_present in available.items() if is_present)
        raise UserError(f"--device {name} is not available here; use one of: auto, {present}")
    if device.index:
        torch.cuda.set_device(device)  # or what names no GPU takes memory of the first one
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: `name` is auto, float32, bfloat16 or float16.

    auto is bfloat16 where the hardware multiplies it (GPUs and CPUs), else float16 on CUDA, and
    float32 on MPS, on other CPUs, and on GTX 16xx cards, whose float16 gives NaN (pytorch issue
    77955). Raises UserError for one that the device cannot train in.
    """
    if name == "auto":
        if device.type == "cpu" and cpu_has_bfloat16():
            return torch.bfloat16
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if native:
            return torch.bfloat16
        return torch.float32 if "GTX 16" in torch.cuda.get_device_name(device) else torch.float16
    if device.type == "mps" and name != "float32":
        raise UserError(f"--precision {name} is not supported on MPS; use --precision float32")
    if device.type == "cpu" and name == "float16":
        raise UserError("--precision float16 needs CUDA; use float32 or bfloat16 on a CPU")
    return getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every PyTorch
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which SAM 2's components compute in `precision`.

    Weights are cast anew at each use. Kept casts, torch's default, would be without gradients once
    a forward under no_grad has made them: until torch 2.10 what follows it in the same context
    then learns next to nothing (pytorch issue 112583).
    """
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision, cache_enabled=False)


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to a device, without waiting where that is safe: from pinned memory to CUDA.

    MPS would read a source that may be freed by then (pytorch issue 139550).
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


# ----------------------------------------------------------------------------------------------
# Models and checkpoints
# ----------------------------------------------------------------------------------------------


class ModelSpec(NamedTuple):
    """Where a SAM 2.1 model comes from, and how its weights are recognised."""

    config: str  # the full path inside the sam2 package, as Hydra needs it
    filename: str
    sha256: str | None  # None: not for download
    embed_dim: int  # channels of the image encoder's first stage
    blocks: int  # blocks of the image encoder
    overrides: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return CHECKPOINT_URL + self.filename


# SAM 2.1 at small size: the same classes, for tests, demos and machines without a network.
MINI_OVERRIDES = (
    "model.image_size=256",
    "model.image_encoder.trunk.embed_dim=32",
    "model.image_encoder.trunk.stages=[1,2,3,1]",
    "model.image_encoder.trunk.global_att_blocks=[4]",
    "model.image_encoder.neck.d_model=128",
    "model.image_encoder.neck.backbone_channel_list=[256,128,64,32]",
    "model.image_encoder.neck.position_encoding.num_pos_feats=128",
    "model.memory_attention.d_model=128",
    "model.memory_attention.num_layers=1",
    "model.memory_attention.layer.d_model=128",
    "model.memory_attention.layer.dim_feedforward=256",
    "model.memory_attention.layer.self_attention.embedding_dim=128",
    "model.memory_attention.layer.self_attention.feat_sizes=[16,16]",
    "model.memory_attention.layer.cross_attention.embedding_dim=128",
    "model.memory_attention.layer.cross_attention.feat_sizes=[16,16]",
    "+model.memory_encoder.in_dim=128",
    "+model.memory_encoder.mask_downsampler.embed_dim=128",
    "model.memory_encoder.fuser.layer.dim=128",
)

MODELS = {
    "tiny": ModelSpec(
        config="configs/sam2.1/sam2.1_hiera_t.yaml",
        filename="sam2.1_hiera_tiny.pt",
        sha256="7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        embed_dim=96,
        blocks=12,
    ),
    "small": ModelSpec(
        config="configs/sam2.1/sam2.1_hiera_s.yaml",
        filename="sam2.1_hiera_small.pt",
        sha256="6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        embed_dim=96,
        blocks=16,
    ),
    "base_plus": ModelSpec(
        config="configs/sam2.1/sam2.1_hiera_b+.yaml",
        filename="sam2.1_hiera_base_plus.pt",
        sha256="a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        embed_dim=112,
        blocks=24,
    ),
    "large": ModelSpec(
        config="configs/sam2.1/sam2.1_hiera_l.yaml",
        filename="sam2.1_hiera_large.pt",
        sha256="2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        embed_dim=144,
        blocks=48,
    ),
    "mini": ModelSpec(
        config="configs/sam2.1/sam2.1_hiera_t.yaml",
        filename="sam2_mini.pt",
        sha256=None,
        embed_dim=32,
        blocks=7,
        overrides=MINI_OVERRIDES,
    ),
}


def download_file(url: str, destination: Path, sha256: str, by_hand: str) -> None:
    """Download `url` to `destination` with a progress bar; nothing half-written stays there.

    `by_hand` tells the user how to go on without this download.
    Raises UserError when the network fails or the file's SHA-256 is not `sha256`.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {url}")
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        torch.hub.download_url_to_file(url, str(destination), hash_prefix=sha256)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answered {error.code} {error.reason}; {by_hand}") from error
    except RuntimeError as error:  # the hash differs
        raise UserError(
            f"the download of {url} was cut off or is not the published file; "
            f"try again, or {by_hand}"
        ) from error
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise UserError(f"{url} cannot be reached ({reason}); {by_hand}") from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def ensure_checkpoint(model_name: str, folder: Path = Path("checkpoints")) -> Path:
    """Return the path of the original checkpoint of `model_name`, downloading it if missing."""
    spec = MODELS[model_name]
    path = folder / spec.filename
    if path.is_file():
        return path
    if spec.sha256 is None:
        raise UserError(f"{path} is missing; it comes with this project: run from its folder")
    download_file(spec.url, path, spec.sha256, by_hand=f"put that file at {path} by hand")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint {"model": state_dict, ...}, running no code that it may contain.

    Raises UserError when the file is missing or is not a checkpoint with finite weights.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other kinds of pickles and archives
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files raise errors of pickle, zip, struct and torch
        raise UserError(
            f"{path} is not a readable checkpoint (damaged, cut off, or another kind of file); "
            "download or train it again"
        ) from error
    state_dict = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(starmap(_is_weight, state_dict.items())):
        raise UserError(f'{path} holds no "model" weights; use a SAM 2.1 checkpoint')
    if not all(torch.isfinite(weight.float()).all() for weight in state_dict.values()):
        raise UserError(f"{path} holds weights that are not finite (NaN); train or download again")
    return checkpoint


def _is_weight(name: Any, value: Any) -> bool:
    """Say whether an entry of a state_dict is one of a model that computes with real numbers."""
    is_real = torch.is_tensor(value) and value.is_floating_point() and value.ndim > 0
    return is_real and value.layout == torch.strided and isinstance(name, str)


def identify_model(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the model that these weights seem to belong to, or None."""
    patch_embed = state_dict.get("image_encoder.trunk.patch_embed.proj.weight")
    prefix = "image_encoder.trunk.blocks."
    blocks = {key.split(".")[3] for key in state_dict if key.startswith(prefix)}
    for name, spec in MODELS.items():
        if patch_embed is not None and (len(patch_embed), len(blocks)) == (
            spec.embed_dim,
            spec.blocks,
        ):
            return name
    return None


def load_predictor(
    model_name: str | None, checkpoint: Path, device: torch.device
) -> tuple[SAM2ImagePredictor, dict[str, Any]]:
    """Build SAM 2.1 `model_name` with the weights of a checkpoint file, in eval mode on `device`.

    Without a name, the weights tell which model it is. Returns the predictor, and the model_name
    with whatever else save_checkpoint kept beside the weights.
    Raises UserError when the file is not a checkpoint of that model.
    """
    facts = load_checkpoint(checkpoint)
    state_dict = facts.pop("model")
    found = identify_model(state_dict)
    if found is None:
        raise UserError(f"{checkpoint} is not a SAM 2.1 checkpoint; use one of {', '.join(MODELS)}")
    if model_name not in (None, found):
        raise UserError(
            f"{checkpoint} is a SAM 2 {found} checkpoint, not {model_name}; use --model {found}"
        )
    predictor = build_predictor(found, device)
    try:
        predictor.model.load_state_dict(state_dict)
    except RuntimeError as error:
        expected = predictor.model.state_dict().keys()
        missing, unknown = len(expected - state_dict.keys()), len(state_dict.keys() - expected)
        raise UserError(
            f"{checkpoint} does not fit SAM 2.1 {found} ({missing} weights missing, {unknown} "
            "unknown, or of another shape); use a SAM 2.1 checkpoint, not one of SAM 2.0"
        ) from error
    return predictor, {**facts, "model_name": found}


def build_predictor(model_name: str, device: torch.device) -> SAM2ImagePredictor:
    """Build SAM 2.1 `model_name` with random weights, in eval mode on `device`."""
    spec = MODELS[model_name]
    # Where SAM 2 sees CUDA it puts position encodings on the first GPU, whatever `device` is.
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        model = build_sam2(
            spec.config, None, device=device, hydra_overrides_extra=list(spec.overrides)
        )
    return make_predictor(model)


def make_predictor(model: SAM2Base) -> SAM2ImagePredictor:
    """Make a predictor for a model of any image_size; SAM 2 hard-codes the sizes of 1024 pixels."""
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


def save_checkpoint(
    path: Path, model: torch.nn.Module | dict[str, torch.Tensor], **plain_values: Any
) -> None:
    """Save the weights so that SAM 2's own build_sam2(config, path) loads them.

    The weights are a model's, or a state_dict. `plain_values` (numbers, strings, lists, dicts, and
    tensors in them) are kept beside them. Tensors are saved as those of the CPU: any computer
    can load them.
    """
    weights = model if isinstance(model, dict) else model.state_dict()
    with atomic_write(path) as temporary:
        try:
            torch.save(_on_cpu({"model": weights, **plain_values}), temporary)
        except RuntimeError as error:  # what torch makes of a disk that is full
            raise OSError(errno.ENOSPC, "cannot be written (is the disk full?)") from error


def _on_cpu(value: Any) -> Any:
    """Return nested dicts and lists with their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.cpu() if torch.is_tensor(value) else value


# ----------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What the user points at: N points, of which two may be the corners of a box.

    point_coords: Nx2 float32, (X,Y) in pixels of the image.
    point_labels: N int32; 1 foreground, 0 background, 2 and 3 a box's top left and bottom right.
    """

    point_coords: np.ndarray
    point_labels: np.ndarray


def make_prompt(
    foreground: list[tuple[float, float]] = (),
    background: list[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
) -> Prompt:
    """Make a prompt of (X,Y) points and an (X1,Y1,X2,Y2) box, all in pixels of the image.

    The box comes first, as SAM2ImagePredictor orders it.
    """
    corners = [box[:2], box[2:]] if box is not None else []
    coords = [*corners, *foreground, *background]
    labels = [2, 3][: len(corners)] + [1] * len(foreground) + [0] * len(background)
    return Prompt(np.array(coords, np.float32).reshape(-1, 2), np.array(labels, np.int32))


def distance_inside(mask: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the outline of an HxW bool mask, HxW float32.

    It is the Euclidean distance transform; the image's border counts as an outline.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return the (X,Y) pixel farthest from the outline of an HxW bool mask that is not empty."""
    distance = distance_inside(mask)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x), int(y)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel drawn uniformly from an HxW bool mask that is not empty."""
    y, x = divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])
    return x, y


def random_inner_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return an (X,Y) pixel of an HxW bool mask that is not empty: the deeper, the likelier.

    A pixel's probability is proportional to its distance from the outline, much as people click.
    """
    x1, y1, x2, y2 = mask_box(mask)  # nothing is outside of it, and it is soon gone through
    depth = distance_inside(mask[y1 : y2 + 1, x1 : x2 + 1])
    up_to = np.cumsum(depth, dtype=np.float64)
    drawn = int(np.searchsorted(up_to, rng.random() * up_to[-1], side="right"))
    y, x = divmod(drawn, depth.shape[1])
    return x1 + x, y1 + y


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the (X1,Y1,X2,Y2) pixels that bound an HxW bool mask that is not empty."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(x[0]), int(y[0]), int(x[-1]), int(y[-1])


def corrective_click(predicted: np.ndarray, true_mask: np.ndarray) -> tuple[int, int, int] | None:
    """Return the (X,Y) pixel to click next, and its label; None where the masks are equal.

    Of all pixels that two HxW bool masks do not share, it is the one deepest inside a region that
    is missing (label 1) or too much (label 0), as interactive segmentation is commonly measured
    (Sofiiuk et al., Reviving Iterative Training with Mask Guidance, 2021).
    """
    if not (predicted ^ true_mask).any():
        return None
    too_much, missing = predicted & ~true_mask, true_mask & ~predicted
    depths = distance_inside(too_much), distance_inside(missing)
    label = int(depths[1].max() >= depths[0].max())
    y, x = np.unravel_index(depths[label].argmax(), true_mask.shape)
    return int(x), int(y), label


def prompt_from_mask(mask: np.ndarray, kind: str, rng: np.random.Generator | None = None) -> Prompt:
    """Make a prompt from an HxW bool mask that is not empty.

    kind: center (the deepest point), random (a point drawn with `rng`) or box.
    """
    if kind == "box":
        return make_prompt(box=mask_box(mask))
    return make_prompt([deepest_point(mask) if kind == "center" else random_point(mask, rng)])


# ----------------------------------------------------------------------------------------------
# From an image and a prompt to masks and scores
# ----------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What SAM2ImagePredictor.set_image computes, for B images of a model of input size S.

    image_embed: BxCx(S/16)x(S/16); high_res_feats: Bx(C/8)x(S/4)x(S/4), Bx(C/4)x(S/8)x(S/8).
    """

    image_embed: torch.Tensor
    high_res_feats: list[torch.Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> Features:
        """Move to a device, and convert there: half precision is half as much to copy."""
        maps = (self.image_embed, *self.high_res_feats)
        moved = [copy_to(device, feature_map).to(dtype) for feature_map in maps]
        return Features(moved[0], moved[1:])


class Prediction(NamedTuple):
    """What the mask decoder answers to B prompts.

    mask_logits: Bx4x(S/4)x(S/4) float32, for upscale_masks: the single mask, then the three that
      are for prompts of several meanings.
    iou_scores: Bx4 float32, the model's own estimate of each mask's IoU.
    object_logits: Bx1 float32, whether there is an object at all.
    """

    mask_logits: torch.Tensor
    iou_scores: torch.Tensor
    object_logits: torch.Tensor


def feature_shapes(model: SAM2Base) -> list[tuple[int, int, int]]:
    """Return HxWxC of an image's maps in Features: image_embed, then high_res_feats."""
    size, channels = model.image_size, model.sam_prompt_embed_dim
    levels = ((16, channels), (4, channels // 8), (8, channels // 4))
    return [(size // stride, size // stride, depth) for stride, depth in levels]


class PromptedDecoder(torch.nn.Module):
    """The parts of SAM 2 that learn: the prompt encoder and the mask decoder."""

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.prompt_encoder = model.sam_prompt_encoder
        self.mask_decoder = model.sam_mask_decoder

    def forward(
        self,
        features: Features,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do what predict_masks does, with BxNx2 points in pixels of the input and BxN labels."""
        prompt_embeddings = self.embed_prompts(point_coords, point_labels, mask_inputs)
        return self.decode_masks(features, *prompt_embeddings)

    def embed_prompts(
        self,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sparse embeddings, BxTxC of T tokens, and the dense ones, BxCxhxw."""
        return self.prompt_encoder(
            points=(point_coords, point_labels), boxes=None, masks=mask_inputs
        )

    def decode_masks(
        self, features: Features, sparse_embeddings: torch.Tensor, dense_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what a Prediction holds, of embedded prompts."""
        # On a CPU, plain attention between few tokens and many is faster than the flash kernel.
        on_cpu = features.image_embed.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
            # What the decoder's forward chooses from: three masks, or the single one
            mask_logits, iou_scores, _, object_logits = self.mask_decoder.predict_masks(
                image_embeddings=features.image_embed,
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse_embeddings,
                dense_prompt_embeddings=dense_embeddings,
                repeat_image=False,
                high_res_features=features.high_res_feats,
            )
        return mask_logits.float(), iou_scores.float(), object_logits.float()


def encode_images(predictor: SAM2ImagePredictor, images: list[np.ndarray]) -> Features:
    """Run the frozen image encoder, without gradients, on HxWx3 uint8 RGB images of any sizes."""
    predictor.set_image_batch(images)
    return Features(**predictor._features)


def predict_masks(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompts: list[Prompt],
    image_sizes: list[tuple[int, int]],
    decoder: torch.nn.Module | None = None,
    mask_inputs: torch.Tensor | None = None,
) -> Prediction:
    """Turn features and prompts into masks and scores; gradients flow, unlike in predict().

    Arguments:
      features: of B images.
      prompts: one an image, all with the same number N of points.
      image_sizes: (H,W) of the original images, in whose pixels the prompts are given.
      decoder: the predictor's PromptedDecoder, where it is wrapped to be faster or distributed.
      mask_inputs: Bx1x(S/4)x(S/4) logits of the masks that the prompts are to correct, if any.
    """
    model, transforms = predictor.model, predictor._transforms

    # The prompts, from pixels of each image to pixels of the model's square input
    coords = [
        transforms.transform_coords(torch.from_numpy(prompt.point_coords), True, size)
        for prompt, size in zip(prompts, image_sizes, strict=True)
    ]
    labels = [torch.from_numpy(prompt.point_labels) for prompt in prompts]
    points = torch.stack(coords).to(model.device), torch.stack(labels).to(model.device)

    # Prompt encoder and mask decoder
    return Prediction(*(decoder or PromptedDecoder(model))(features, *points, mask_inputs))


def choose_masks(
    predictor: SAM2ImagePredictor, prediction: Prediction, kind: str = "best"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one mask an image; return Bx1x(S/4)x(S/4) logits and Bx1 scores.

    kind: best (of the three, the one with the highest score) or single (what other tools take: the
    single mask, or the best of three where it is not stable, as SAM 2 decides it).
    """
    if kind == "single":
        return predictor.model.sam_mask_decoder._dynamic_multimask_via_stability(
            prediction.mask_logits, prediction.iou_scores
        )
    mask_logits, iou_scores = prediction.mask_logits[:, 1:], prediction.iou_scores[:, 1:]
    best = iou_scores.argmax(-1, keepdim=True)
    return mask_logits.take_along_dim(best[..., None, None], 1), iou_scores.gather(-1, best)


def upscale_masks(
    predictor: SAM2ImagePredictor, mask_logits: torch.Tensor, image_size: tuple[int, int]
) -> torch.Tensor:
    """Upscale BxCxhxw mask logits to BxCxHxW, the (H,W) of the original image."""
    return predictor._transforms.postprocess_masks(mask_logits, image_size)


@torch.no_grad()
def segment_with_logits(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompt: Prompt,
    image_size: tuple[int, int],
    mask_input: torch.Tensor | None = None,
    kind: str = "best",
) -> tuple[np.ndarray, float, torch.Tensor]:
    """Do what segment does, after `mask_input`, the logits that an earlier prompt led to.

    Returns the HxW bool mask, its score, and its logits for the next call, 1x1x(S/4)x(S/4) and
    clamped as SAM2ImagePredictor does.
    """
    prediction = predict_masks(predictor, features, [prompt], [image_size], mask_inputs=mask_input)
    if not torch.isfinite(prediction.iou_scores).all():
        raise NotFiniteError("the model's scores are not finite (NaN); lower --lr, or use float32")
    mask_logits, scores = choose_masks(predictor, prediction, kind)
    mask = upscale_masks(predictor, mask_logits, image_size)[0, 0] > 0
    return mask.cpu().numpy(), float(scores), mask_logits.clamp(-32, 32)


def segment(
    predictor: SAM2ImagePredictor,
    features: Features,
    prompt: Prompt,
    image_size: tuple[int, int],
    kind: str = "best",
) -> tuple[np.ndarray, float]:
    """Segment one image; `kind` says which mask, as in choose_masks.

    Returns the HxW bool mask and its score. Raises NotFiniteError where the scores are not finite.
    """
    return segment_with_logits(predictor, features, prompt, image_size, kind=kind)[:2]


def calculate_iou(predicted, true):
    """Return |predicted AND true| / (|predicted OR true| + 1e-6), over the last two dimensions.

    Takes ...xHxW bool masks, NumPy arrays or torch tensors, and returns the same kind.
    """
    return (predicted & true).sum((-2, -1)) / ((predicted | true).sum((-2, -1)) + 1e-6)


def calculate_dice(predicted, true):
    """Return 2 |predicted AND true| / (|predicted| + |true| + 1e-6), like calculate_iou."""
    total = predicted.sum((-2, -1)) + true.sum((-2, -1))
    return 2 * (predicted & true).sum((-2, -1)) / (total + 1e-6)


# ----------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------

GREEN, RED, YELLOW, BLUE, WHITE = (
    (0, 200, 0),
    (230, 0, 0),
    (255, 220, 0),
    (30, 144, 255),
    (255,) * 3,
)


def draw_overlay(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    prompt: Prompt | None = None,
    true_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Draw on a copy of an HxWx3 uint8 RGB image, and return it.

    The mask (HxW bool) is tinted blue with a white outline, the true mask outlined in yellow;
    foreground points are green, background points red, a box green.
    """
    canvas = image.copy()
    line = max(1, round(max(image.shape[:2]) / 300))
    if mask is not None:
        canvas[mask] = (0.5 * canvas[mask] + 0.5 * np.array(BLUE)).astype(np.uint8)
        _draw_outline(canvas, mask, WHITE, line)
    if true_mask is not None:
        _draw_outline(canvas, true_mask, YELLOW, line)
    if prompt is not None:
        _draw_prompt(canvas, prompt, line)
    return canvas


def _draw_outline(canvas: np.ndarray, mask: np.ndarray, color: tuple, line: int) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)


def _draw_prompt(canvas: np.ndarray, prompt: Prompt, line: int) -> None:
    points = [tuple(round(float(value)) for value in point) for point in prompt.point_coords]
    corners = [
        point for point, label in zip(points, prompt.point_labels, strict=True) if label in (2, 3)
    ]
    if corners:
        cv2.rectangle(canvas, *corners, GREEN, line, cv2.LINE_AA)
    for point, label in zip(points, prompt.point_labels, strict=True):
        if label in (0, 1):
            cv2.circle(canvas, point, 4 * line, WHITE, -1, cv2.LINE_AA)
            cv2.circle(canvas, point, 3 * line, GREEN if label else RED, -1, cv2.LINE_AA)
