"""The SAM 2.1 models: where they are downloaded, how they are built and loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from sam2_utils import UserError

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics.command_line import listed, number, tell
from finetuning.basics.files import content_sha256, download_file, read_file
from finetuning.model.checkpoints import TRANSFORMERS_FILE, load_checkpoint, setting
from finetuning.model.weight_names import (
    PATCH_EMBED,
    TRANSFORMERS_PATCH_EMBED,
    TRANSFORMERS_TRUNK,
    find_weights,
    is_for_images,
)

CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
SIZE_STEP = 64  # pixels; image sizes are multiples, as the encoder halves an image five times
NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.")  # weights that SAM 2.0 lacks
TRAIN_STATE_KEYS = {"optimizer", "scaler", "log", "settings"}  # keys of a run's train_state.pt


class ModelSpec(NamedTuple):
    """A SAM 2.1 model: its config and file, and the numbers that identify its weights."""

    config: str  # the full path inside the sam2 package, as Hydra needs it
    filename: str
    sha256: str | None  # None: not available for download
    embed_dim: int  # channels of the image encoder's first stage
    blocks: int  # number of blocks of the image encoder
    overrides: tuple[str, ...] = ()  # Hydra overrides of the config

    @property
    def url(self) -> str:
        return CHECKPOINT_URL + self.filename


MINI_SIZE = 256
# A small SAM 2.1 of the same classes, for tests, demos and machines without a network
MINI_OVERRIDES = (
    f"model.image_size={MINI_SIZE}",
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


def ensure_checkpoint(model_name: str, folder: Path = Path("checkpoints")) -> Path:
    """Return the path of a model's original checkpoint; download it if it is missing."""
    spec = MODELS[model_name]
    path = folder / spec.filename
    if path.is_file():
        return path
    if spec.sha256 is None:
        raise UserError(
            f"{path} is missing; it is part of this project: run the script from its folder"
        )
    download_file(spec.url, path, spec.sha256, by_hand=f"put that file at {path} by hand")
    return path


def is_published(checkpoint: Path, model_name: str) -> bool | None:
    """Return whether a file is Meta's checkpoint of that model; None if Meta published none."""
    sha256 = MODELS[model_name].sha256
    return None if sha256 is None else content_sha256(checkpoint) == sha256


def locate_original(facts: dict[str, Any]) -> Path | None:
    """Return the checkpoint that the training of a model started from, or None if it is missing.

    facts: as load_predictor returns them. The file is identified by the SHA-256 in the facts. If
    they have none, as in files of other programs, it is the file at the path that they name, or
    Meta's checkpoint.
    """
    sha256 = setting(facts, "checkpoint_sha256")
    started_from = Path(setting(facts, "checkpoint") or "")
    published = Path("checkpoints", MODELS[facts["model_name"]].filename)
    present = (path for path in (started_from, published) if path.is_file())
    return next((path for path in present if sha256 in (None, content_sha256(path))), None)


def find_original(facts: dict[str, Any]) -> Path:
    """Return the file that locate_original finds; download it if it is Meta's and missing.

    Raises UserError if it is missing or has changed.
    """
    if found := locate_original(facts):
        return found
    spec, sha256 = MODELS[facts["model_name"]], setting(facts, "checkpoint_sha256")
    if sha256 in (None, spec.sha256) and not Path("checkpoints", spec.filename).is_file():
        return ensure_checkpoint(facts["model_name"])
    started_from = Path(setting(facts, "checkpoint") or "")
    problem = "has changed since training started from it"
    if not started_from.is_file():
        problem = "is missing, but training started from it"
    raise UserError(
        f"{started_from} {problem}; put that file back, or name the original with --original FILE"
    )


def identify_model(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the model whose encoder has these weights' dimensions, or None."""
    names = ((PATCH_EMBED, "image_encoder.trunk"), (TRANSFORMERS_PATCH_EMBED, TRANSFORMERS_TRUNK))
    for first, trunk in names:
        blocks = {key.split(".")[3] for key in state_dict if key.startswith(f"{trunk}.blocks.")}
        for name, spec in MODELS.items():
            is_there = first in state_dict and len(blocks) == spec.blocks
            if is_there and len(state_dict[first]) == spec.embed_dim:
                return name
    return None


def parse_image_size(text: str) -> int:
    """Parse --image-size (argparse type): the size in pixels that images are resized to."""
    size = number(int, at_least=SIZE_STEP)(text)
    if not is_image_size(size):
        raise argparse.ArgumentTypeError(f"must be a multiple of 64 up to 2048, not {text}")
    return size


def own_image_size(model_name: str) -> int:
    """Return a model's default input size, in pixels per side."""
    return MINI_SIZE if model_name == "mini" else 1024


def is_image_size(size: Any) -> bool:
    """Return whether SAM 2's encoder accepts square images of this size in pixels."""
    return isinstance(size, int) and size in range(SIZE_STEP, 2048 + 1, SIZE_STEP)


def load_predictor(
    model_name: str | None,
    checkpoint: Path,
    device: torch.device,
    image_size: int | None = None,
) -> tuple[SAM2ImagePredictor, dict[str, Any]]:
    """Build a model with the weights of a checkpoint file, in eval mode on `device`.

    Arguments:
      model_name: a key of MODELS; None: identify the model by its weights.
      image_size: input size in pixels per side; None: that of training, else the model's default.

    Returns the predictor and the facts: the values that save_checkpoint stored beside the weights,
    and the "model_name". Raises UserError if the file is not a checkpoint of that model.
    """
    facts = load_checkpoint(checkpoint)
    state_dict = facts.pop("model")
    found = identify_model(state_dict)
    if found is None and facts.keys() >= TRAIN_STATE_KEYS:
        best = checkpoint.with_name("sam2_best.pt")
        raise UserError(f"{checkpoint} is the training state for --resume; use {best}")
    if found is None:
        raise UserError(f"{checkpoint} is not a SAM 2.1 checkpoint; use one of {', '.join(MODELS)}")
    if model_name not in (None, found):
        raise UserError(
            f"{checkpoint} is a SAM 2 {found} checkpoint, not {model_name}; use --model {found}"
        )
    trained_at = setting(facts, "image_size", int) or _configured_size(checkpoint)
    image_size = image_size or (trained_at if is_image_size(trained_at) else None)
    predictor = build_predictor(found, device, image_size)
    _load_weights(predictor.model, state_dict, checkpoint, found)
    return predictor, {**facts, "model_name": found}


def _configured_size(checkpoint: Path) -> Any:
    """Return the image size in the config.json that transformers saves beside its weights."""
    if checkpoint.name != TRANSFORMERS_FILE:
        return None
    try:
        config = json.loads(read_file(checkpoint.with_name("config.json")))
        return config["prompt_encoder_config"]["image_size"]
    except (UserError, ValueError, LookupError, TypeError):  # it may be missing or anything
        return None


def _load_weights(
    model: SAM2Base, state_dict: dict[str, torch.Tensor], checkpoint: Path, model_name: str
) -> None:
    """Set a model's weights to those of a file, as load_checkpoint reads them.

    Files for images alone lack the weights of SAM 2's video memory, which become 0. Names that are
    not SAM 2's are passed over. Raises UserError if the weights do not fit.
    """
    own = model.state_dict()
    parts = {name.split(".")[0] for name in own}
    weights, others = find_weights(state_dict, own)
    missing = own.keys() - weights.keys()
    video = {name for name in own if not is_for_images(name)}
    if missing == video:
        tell(f"note: {checkpoint} gives its weights for images alone, not those for video")
        weights |= {name: torch.zeros_like(own[name]) for name in video}
        missing = set()
        others = list(filter(is_for_images, others))  # transformers has other names for video
    unknown = [name for name in others if is_for_images(name) or name.split(".")[0] in parts]
    try:
        if missing or unknown:
            raise RuntimeError
        model.load_state_dict(weights)
    except RuntimeError as error:
        is_sam2_0 = bool(missing) and all(name.startswith(NEW_IN_2_1) for name in missing)
        advice = "it is one of SAM 2.0; use one of SAM 2.1" if is_sam2_0 else "use another file"
        examples = f", such as {listed(sorted(missing) + unknown, 2)}" if missing or unknown else ""
        raise UserError(
            f"{checkpoint} does not fit SAM 2.1 {model_name} ({len(missing)} weights missing, "
            f"{len(unknown)} unknown{examples or ', some of another shape'}); {advice}"
        ) from error
    if others:
        tell(f"note: {len(others)} weights of {checkpoint} are not SAM 2's: {listed(others)}")


def build_predictor(
    model_name: str, device: torch.device, image_size: int | None = None
) -> SAM2ImagePredictor:
    """Build a model with random weights, in eval mode on `device`.

    image_size: input size in pixels per side; None: the model's default.
    """
    spec = MODELS[model_name]
    overrides = [*spec.overrides, *([f"model.image_size={image_size}"] if image_size else [])]
    # If SAM 2 sees CUDA, it puts position encodings on the first GPU, whatever `device` is
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        model = build_sam2(spec.config, None, device=device, hydra_overrides_extra=overrides)
    return make_predictor(model)


def make_predictor(model: SAM2Base) -> SAM2ImagePredictor:
    """Make a predictor for a model of any image_size."""
    predictor = SAM2ImagePredictor(model)
    # SAM 2 hard-codes the feature sizes of 1024 pixels
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor
