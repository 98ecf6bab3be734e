"""Export a fine-tuned model for Ultralytics or Hugging Face's transformers.

    python -m finetuning.export --to ultralytics     # output/export/sam2.1_s.pt, for small
    python -m finetuning.export --to transformers    # a folder for Sam2Model and Sam2Processor

Neither package has to be installed. At the end, it prints the Python code that loads the model.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import torch
from safetensors.torch import save
from sam2.modeling.sam2_base import SAM2Base

from finetuning.basics.command_line import ArgumentParser, run, tell
from finetuning.basics.files import atomic_write
from finetuning.model.checkpoints import checkpoint_path, save_checkpoint
from finetuning.model.models import load_predictor
from finetuning.model.weight_names import transformers_weights

# Ultralytics' loader recognises a model by its file name; it has no name for mini
ULTRALYTICS_NAMES = {
    "tiny": "sam2.1_t.pt",
    "small": "sam2.1_s.pt",
    "base_plus": "sam2.1_b.pt",
    "large": "sam2.1_l.pt",
}
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


def transformers_config(model: SAM2Base) -> dict[str, Any]:
    """Return the config.json of a Sam2Model with the dimensions of `model`."""
    trunk, neck, size = model.image_encoder.trunk, model.image_encoder.neck, model.image_size
    last_blocks = [trunk.blocks[end] for end in trunk.stage_ends]
    starts = [0, *(end + 1 for end in trunk.stage_ends)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "image_size": [size, size],
        "hidden_size": trunk.pos_embed.shape[1],
        "num_attention_heads": last_blocks[0].attn.num_heads,
        "blocks_per_stage": [end - start for start, end in itertools.pairwise(starts)],
        "embed_dim_per_stage": [block.dim_out for block in last_blocks],
        "num_attention_heads_per_stage": [block.attn.num_heads for block in last_blocks],
        "window_size_per_stage": list(trunk.window_spec),
        "window_positional_embedding_background_size": list(trunk.pos_embed.shape[2:]),
        "global_attention_blocks": list(trunk.global_att_blocks),
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": list(trunk.channel_list),
        "backbone_feature_sizes": [[size // stride, size // stride] for stride in (4, 8, 16)],
        "fpn_hidden_size": neck.d_model,
        "fpn_top_down_levels": list(neck.fpn_top_down_levels),
    }
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": neck.d_model, "image_size": size},
        "mask_decoder_config": {"hidden_size": neck.d_model},
    }


def processor_config(image_size: int) -> dict[str, Any]:
    """Return the preprocessor_config.json of a Sam2Processor for a model's image_size."""
    return {
        "processor_class": "Sam2Processor",
        "image_processor_type": "Sam2ImageProcessorFast",
        "size": {"height": image_size, "width": image_size},
        "mask_size": {"height": image_size // 4, "width": image_size // 4},
    }


def export_ultralytics(
    output: Path, model: SAM2Base, model_name: str, settings: dict[str, Any] | None
) -> list[str]:
    """Write a file for ultralytics.SAM; return the Python code that loads it."""
    if model_name not in ULTRALYTICS_NAMES:
        raise UserError(
            f"Ultralytics has no SAM 2.1 {model_name}; fine-tune {', '.join(ULTRALYTICS_NAMES)}"
        )
    path = output / ULTRALYTICS_NAMES[model_name]
    _require_new(path)
    save_checkpoint(path, model, model_name=model_name, settings=settings)
    tell(f"wrote {path}")
    size = "" if model.image_size == 1024 else f", imgsz={model.image_size}"
    return [
        "from ultralytics import SAM",
        f"model = SAM({path.as_posix()!r})",
        f'results = model("image.jpg", points=[320, 200], labels=[1]{size})',
    ]


def export_transformers(output: Path, model: SAM2Base) -> list[str]:
    """Write a folder for Sam2Model.from_pretrained; return the Python code that loads it."""
    configs = {CONFIG: transformers_config(model), PROCESSOR: processor_config(model.image_size)}
    contents = {
        name: (json.dumps(config, indent=2) + "\n").encode() for name, config in configs.items()
    }
    _require_new(output / WEIGHTS)
    for name, content in contents.items():
        _require_new(output / name, content)
    for name, content in contents.items():
        _write(output / name, content)
    weights = transformers_weights(model.state_dict())
    # The weights last: if they exist, the folder is complete. Not save_file, which raises no
    # OSError when the disk is full.
    _write(output / WEIGHTS, save(weights, {"format": "pt"}))
    tell(f"wrote {', '.join((WEIGHTS, *configs))} to {output}")
    return [
        "from transformers import Sam2Model, Sam2Processor",
        f"model = Sam2Model.from_pretrained({output.as_posix()!r})",
        f"processor = Sam2Processor.from_pretrained({output.as_posix()!r})",
    ]


def _require_new(path: Path, content: bytes = b"") -> None:
    """Raise UserError if a file exists, unless it has this content from an interrupted export."""
    is_same = path.is_file() and path.stat().st_size == len(content) > 0
    if path.exists() and not (is_same and path.read_bytes() == content):
        raise UserError(f"{path} exists already; remove it, or give another --output")


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    choices = ("ultralytics", "transformers")
    parser.add_argument("--to", choices=choices, required=True, help="the package that loads it")
    parser.add_argument(
        "--finetuned",
        type=checkpoint_path,
        default=Path("output/sam2_best.pt"),
        help="the fine-tuned file, or its folder",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/export"), help="the folder to write to"
    )
    args = parser.parse_args(argv)
    predictor, facts = load_predictor(None, args.finetuned, torch.device("cpu"))
    if args.to == "ultralytics":
        model_name, settings = facts["model_name"], facts.get("settings")
        lines = export_ultralytics(args.output, predictor.model, model_name, settings)
    else:
        lines = export_transformers(args.output, predictor.model)
    print("\nin Python:\n")
    for line in lines:
        tell(f"    {line}")


if __name__ == "__main__":
    run(main)
