"""Checkpoints: read those of this project and of other programs without running code; save."""

from __future__ import annotations

import errno
import itertools
import pickletools
import warnings
import zipfile
from itertools import starmap
from pathlib import Path
from typing import Any

from sam2_utils import UserError

import torch
from safetensors.torch import load_file

from finetuning.basics.files import atomic_write, require_file

A_SAM2_NAME = "image_encoder.trunk.patch_embed.proj.weight"  # in every SAM 2 checkpoint, once
MODEL_CODE = ("torch.nn.modules.", "__torch__.")  # prefixes of class names in a pickled model
MAX_OPCODES = 100_000  # pickle opcodes to search for them


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as {"model": state_dict, ...} without running code from the file.

    In the file, the weights are under "model" or "state_dict", or at the top level, as in
    .safetensors files. A prefix before all names, like DDP's "module.", is removed. Raises
    UserError if the file is missing or is not a checkpoint with finite weights.
    """
    require_file(path, what="checkpoint")
    checkpoint = _unwrap(_read(path))
    if checkpoint is None:
        raise UserError(f'{path} holds no "model" weights; use a SAM 2.1 checkpoint')
    state_dict = _without_prefix(checkpoint["model"])
    if not all(torch.isfinite(weight.float()).all() for weight in state_dict.values()):
        raise UserError(f"{path} holds weights that are not finite (NaN); train or download again")
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


def _unwrap(contents: Any) -> dict[str, Any] | None:
    """Return a file's content as {"model": state_dict, ...}, or None if it holds no weights."""
    if not isinstance(contents, dict):
        return None
    for key in ("model", "state_dict"):
        if _are_weights(contents.get(key)):
            facts = {name: value for name, value in contents.items() if name != key}
            return {**facts, "model": contents[key]}
    return {"model": contents} if _are_weights(contents) else None


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(starmap(_is_weight, value.items()))


def _is_weight(name: Any, value: Any) -> bool:
    """Return whether a state_dict entry is a plain floating-point tensor (not quantized)."""
    is_real = torch.is_tensor(value) and value.is_floating_point() and value.ndim > 0
    return is_real and value.layout == torch.strided and isinstance(name, str)


def _without_prefix(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights without the prefix that all their names share before SAM 2's names."""
    prefixes = [name.removesuffix(A_SAM2_NAME) for name in state_dict if A_SAM2_NAME in name]
    if len(prefixes) != 1 or not all(name.startswith(prefixes[0]) for name in state_dict):
        return state_dict
    return {name.removeprefix(prefixes[0]): weight for name, weight in state_dict.items()}


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
