"""Checkpoints: read those of this project and of other programs without running code; save."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import torch
from safetensors.torch import load_file

from finetuning.basics.command_line import brief, listed
from finetuning.basics.files import atomic_write, require_file
from finetuning.basics.run_outputs import BEST_FILE
from finetuning.model.weight_names import PATCH_EMBED, TRANSFORMERS_PATCH_EMBED

WEIGHT_KEYS = ("model", "state_dict")  # under which programs save a state_dict
TRANSFORMERS_FILE = "model.safetensors"  # in every folder that transformers saves
# Files that were saved again with the same weights, from old to new SHA-256: mini
RESAVED = {
    "3735e6442bce51fc9d27ea081d30a703d075b7601bc3aec4e7d75d3432596eda": (
        "f787582ce78e785e4931a64d3baea70c909973110168616899fda39cd4c85916"
    )
}
MODEL_CODE = ("torch.nn.modules.", "__torch__.")  # prefixes of class names in a pickled model
MAX_OPCODES = 100_000  # pickle opcodes to search for them


def checkpoint_path(text: str) -> Path:
    """Return the checkpoint that a path names (argparse type): the file, or the one in a folder.

    Of a training's output folder, that is its best model; of transformers' folders, its weights.
    """
    path = Path(text)
    if not path.is_dir():
        return path
    for name in (BEST_FILE, TRANSFORMERS_FILE):
        if (path / name).is_file():
            return path / name
    inside = [file.relative_to(path) for file in sorted(path.glob(f"*/{BEST_FILE}"))]
    there = f"; name one in it: {listed(map(str, inside))}" if inside else "; name a file"
    raise argparse.ArgumentTypeError(f"{path} is a folder without {BEST_FILE}{there}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as {"model": state_dict, ...} without running code from the file.

    In the file, the weights are under "model", "state_dict" or another name, or at the top level,
    as in .safetensors files. A prefix before SAM 2's names, like DDP's "module.", is removed.
    Raises UserError if the file is missing or is not a checkpoint with finite weights.
    """
    require_file(path, what="checkpoint")
    checkpoint = _unwrap(_read(path))
    if checkpoint is None:
        raise UserError(f'{path} holds no "model" weights; use a SAM 2.1 checkpoint')
    state_dict = _without_prefix(path, checkpoint["model"])
    if not all(torch.isfinite(weight.float()).all() for weight in state_dict.values()):
        raise UserError(f"{path} holds weights that are not finite (NaN); train or download again")
    if (started_from := setting(checkpoint, "checkpoint_sha256")) in RESAVED:
        checkpoint["settings"]["checkpoint_sha256"] = RESAVED[started_from]
    return {**checkpoint, "model": state_dict}


def setting(facts: dict[str, Any], name: str, kind: type = str) -> Any:
    """Return a setting of the run that wrote a checkpoint, or None if it has none of that type.

    facts: as load_predictor returns them. The type is checked because files of other programs may
    hold anything under that name.
    """
    settings = facts.get("settings")
    value = settings.get(name) if isinstance(settings, dict) else None
    return value if isinstance(value, kind) else None


def _read(path: Path) -> Any:
    """Return the content of a torch.save or safetensors file: tensors and plain values.

    Raises UserError for any other file.
    """
    try:
        if _is_safetensors(path):
            return load_file(path)
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle formats and TorchScript archives
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files raise errors of pickle, zip, struct and torch
        if _is_pickled_model(path):
            raise UserError(
                f"{path} is a whole pickled model, which is not loaded because that would run code "
                "from the file; save only the weights in the program that made it: "
                'torch.save({"model": model.state_dict()}, FILE)'
            ) from error
        if classes := _classes_in(path):
            raise UserError(
                f"{path} holds objects beside the weights ({listed(classes)}), which are not "
                "loaded because that would run code from the file; save only the weights in the "
                'program that made it: torch.save({"model": STATE_DICT}, FILE)'
            ) from error
        raise UserError(
            f"{path} is not a readable checkpoint (damaged, truncated, or another kind of file); "
            "download or train it again"
        ) from error


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a torch.save file fails its checksums, which torch does not verify."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts as safetensors do: the length of a JSON object, then `{`."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _is_pickled_model(path: Path) -> bool:
    """Return whether a torch.save file holds a pickled model object; runs nothing in it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as file:
                    return _names_model_code(file)
        with path.open("rb") as file:
            return _names_model_code(file)
    except Exception:  # a damaged file may raise anything
        return False


def _names_model_code(file: Any) -> bool:
    # Before torch 1.6, a torch.save file was several pickles in a row; the fourth is the object.
    opcodes = itertools.chain.from_iterable(pickletools.genops(file) for _ in range(4))
    texts = (value for _, value, _ in itertools.islice(opcodes, MAX_OPCODES))
    return any(isinstance(text, str) and text.startswith(MODEL_CODE) for text in texts)


def _classes_in(path: Path) -> list[str]:
    """Return the classes that a torch.save file names and torch does not load safely."""
    with contextlib.suppress(Exception):  # a damaged file may raise anything
        return [brief(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    return []


def _unwrap(contents: Any) -> dict[str, Any] | None:
    """Return a file's content as {"model": state_dict, ...}, or None if it holds no weights."""
    if not isinstance(contents, dict):
        return None
    for key in dict.fromkeys((*WEIGHT_KEYS, *contents)):
        weights = _weights_in(contents.get(key))
        if weights and (key in WEIGHT_KEYS or any(map(_is_first, weights))):
            facts = {name: value for name, value in contents.items() if name != key}
            return {**facts, "model": weights}
    weights = _weights_in(contents)
    return None if weights is None else {"model": weights}


def _weights_in(value: Any) -> dict[str, torch.Tensor] | None:
    """Return the weights in a dict; None if it has others than weights, and none of SAM 2.

    Beside SAM 2's weights, there may be others, such as a loss's or the counts of a metric.
    """
    if not isinstance(value, dict):
        return None
    weights = {name: weight for name, weight in value.items() if _is_weight(name, weight)}
    return weights if len(weights) == len(value) or any(map(_is_first, weights)) else None


def _is_weight(name: Any, value: Any) -> bool:
    """Return whether a state_dict entry is a plain floating-point tensor (not quantized)."""
    is_real = torch.is_tensor(value) and value.is_floating_point() and value.ndim > 0
    return is_real and value.layout == torch.strided and isinstance(name, str)


def _is_first(name: str) -> bool:
    """Return whether a weight, whatever its prefix, is the first of SAM 2's image encoder."""
    return name.endswith((PATCH_EMBED, TRANSFORMERS_PATCH_EMBED))


def _without_prefix(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights without the prefix that is before SAM 2's names."""
    prefixes = [
        name.removesuffix(PATCH_EMBED).removesuffix(TRANSFORMERS_PATCH_EMBED)
        for name in filter(_is_first, weights)
    ]
    if len(prefixes) > 1:
        raise UserError(
            f"{path} holds {len(prefixes)} models (with the prefixes {listed(map(repr, prefixes))}"
            "); save one of them alone"
        )
    if prefixes in ([], [""]):
        return weights
    own = {
        name.removeprefix(*prefixes): weight
        for name, weight in weights.items()
        if name.startswith(*prefixes)
    }
    return {
        name: weight for name, weight in weights.items() if not name.startswith(*prefixes)
    } | own


def save_checkpoint(
    path: Path, model: torch.nn.Module | dict[str, torch.Tensor], **plain_values: Any
) -> None:
    """Save a model or state_dict so that SAM 2's own build_sam2(config, path) loads it.

    plain_values (numbers, strings, lists, dicts, and tensors in them) are saved beside the weights.
    All tensors are saved from the CPU, so that computers without a GPU can load them.
    """
    weights = model if isinstance(model, dict) else model.state_dict()
    with atomic_write(path) as temporary:
        try:
            torch.save(_on_cpu({"model": weights, **plain_values}), temporary)
        except RuntimeError as error:  # torch raises no OSError when the disk is full
            raise OSError(errno.ENOSPC, "cannot be written (is the disk full?)") from error


def _on_cpu(value: Any) -> Any:
    """Return nested dicts and lists with all tensors moved to the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.cpu() if torch.is_tensor(value) else value
