"""The SAM 2.1 models: where they come from, and how they are built with their weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from sam2_utils import UserError

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics.command_line import number
from finetuning.basics.files import content_sha256, download_file
from finetuning.model.checkpoints import load_checkpoint, setting

CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
SIZE_STEP = 64  # pixels: the encoder halves an image five times
TRAIN_STATE_KEYS = {"optimizer", "scaler", "log", "settings"}  # of a run's train_state.pt


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


MINI_SIZE = 256
# SAM 2.1 at small size: the same classes, for tests, demos and machines without a network.
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
    """Return the path of the original checkpoint of `model_name`, downloading it if missing."""
    spec = MODELS[model_name]
    path = folder / spec.filename
    if path.is_file():
        return path
    if spec.sha256 is None:
        raise UserError(f"{path} is missing; it comes with this project: run from its folder")
    download_file(spec.url, path, spec.sha256, by_hand=f"put that file at {path} by hand")
    return path


def is_published(checkpoint: Path, model_name: str) -> bool | None:
    """Say whether a file is SAM 2.1's own of that size; None where there is none to download."""
    sha256 = MODELS[model_name].sha256
    return None if sha256 is None else content_sha256(checkpoint) == sha256


def locate_original(facts: dict[str, Any]) -> Path | None:
    """Return the file that the training of a model started from, if it is there.

    facts: what load_predictor returns beside the predictor. The file is recognised by its SHA-256;
    where the facts have none, as those of other programs, it is the one at the path that they
    name, or SAM 2.1's own.
    """
    sha256 = setting(facts, "checkpoint_sha256")
    started_from = Path(setting(facts, "checkpoint") or "")
    published = Path("checkpoints", MODELS[facts["model_name"]].filename)
    present = (path for path in (started_from, published) if path.is_file())
    return next((path for path in present if sha256 in (None, content_sha256(path))), None)


def find_original(facts: dict[str, Any]) -> Path:
    """Return the file that locate_original finds; download it where it is SAM 2.1's own.

    Raises UserError where it is missing, or another file is in its place.
    """
    if found := locate_original(facts):
        return found
    spec, sha256 = MODELS[facts["model_name"]], setting(facts, "checkpoint_sha256")
    if sha256 in (None, spec.sha256) and not Path("checkpoints", spec.filename).is_file():
        return ensure_checkpoint(facts["model_name"])
    started_from = Path(setting(facts, "checkpoint") or "")
    problem = "has changed since training started from it"
    if not started_from.is_file():
        problem = "is missing, which training started from"
    raise UserError(
        f"{started_from} {problem}; put that file back, or name the original with --original FILE"
    )


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


def parse_image_size(text: str) -> int:
    """Parse --image-size, as an argparse type: what the model resizes each image to, in pixels."""
    size = number(int, at_least=SIZE_STEP)(text)
    if not is_image_size(size):
        raise argparse.ArgumentTypeError(f"must be a multiple of 64 up to 2048, not {text}")
    return size


def own_image_size(model_name: str) -> int:
    """Return what a model resizes images to as it is published, in pixels a side."""
    return MINI_SIZE if model_name == "mini" else 1024


def is_image_size(size: Any) -> bool:
    """Say whether SAM 2's encoder takes images of so many pixels a side."""
    return isinstance(size, int) and size in range(SIZE_STEP, 2048 + 1, SIZE_STEP)


def load_predictor(
    model_name: str | None,
    checkpoint: Path,
    device: torch.device,
    image_size: int | None = None,
) -> tuple[SAM2ImagePredictor, dict[str, Any]]:
    """Build SAM 2.1 `model_name` with the weights of a checkpoint file, in eval mode on `device`.

    Without a name, the weights tell which model it is; without an image_size, it is that of the
    training, else the model's own. Returns the predictor, and the model_name with whatever else
    save_checkpoint kept beside the weights.
    Raises UserError when the file is not a checkpoint of that model.
    """
    facts = load_checkpoint(checkpoint)
    state_dict = facts.pop("model")
    found = identify_model(state_dict)
    if found is None and facts.keys() >= TRAIN_STATE_KEYS:
        best = checkpoint.with_name("sam2_best.pt")
        raise UserError(f"{checkpoint} is the state of a training, for --resume; use {best}")
    if found is None:
        raise UserError(f"{checkpoint} is not a SAM 2.1 checkpoint; use one of {', '.join(MODELS)}")
    if model_name not in (None, found):
        raise UserError(
            f"{checkpoint} is a SAM 2 {found} checkpoint, not {model_name}; use --model {found}"
        )
    trained_at = setting(facts, "image_size", int)
    image_size = image_size or (trained_at if is_image_size(trained_at) else None)
    predictor = build_predictor(found, device, image_size)
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


def build_predictor(
    model_name: str, device: torch.device, image_size: int | None = None
) -> SAM2ImagePredictor:
    """Build SAM 2.1 `model_name` with random weights, in eval mode on `device`.

    image_size: what it resizes images to, in pixels a side; None: its own.
    """
    spec = MODELS[model_name]
    overrides = [*spec.overrides, *([f"model.image_size={image_size}"] if image_size else [])]
    # Where SAM 2 sees CUDA it puts position encodings on the first GPU, whatever `device` is.
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        model = build_sam2(spec.config, None, device=device, hydra_overrides_extra=overrides)
    return make_predictor(model)


def make_predictor(model: SAM2Base) -> SAM2ImagePredictor:
    """Make a predictor for a model of any image_size; SAM 2 hard-codes the sizes of 1024 pixels."""
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor
