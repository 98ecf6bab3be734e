"""What everything here stands on: the environment, errors, devices, precision, IoU and Dice.

It is imported before torch, OpenCV, matplotlib and tqdm, which read the environment when they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings

if sys.version_info < (3, 11):  # noqa: UP036, or hashlib.file_digest is missed late
    print("error: this is Python 3.10 or older; make a .venv with 3.11 or newer", file=sys.stderr)
    sys.exit(2)
# Operators that MPS lacks run on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
# A file of a few bytes may claim any size: OpenCV refuses what has more pixels, by its header. It
# crashes at a limit that is no number of 64 bits.
if not os.environ.get("SAM2_MAX_MEGAPIXELS", "").isdecimal():
    os.environ["SAM2_MAX_MEGAPIXELS"] = "100"  # 4 GB in all, which a computer of 8 GB has
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(
    min(int(os.environ["SAM2_MAX_MEGAPIXELS"]), 10**6) * 10**6
)
# These scripts say themselves what is wrong with a file.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
# Notebooks name a drawing backend of their own, which matplotlib may not find from here.
if os.environ.get("MPLBACKEND", "").startswith("module://"):
    del os.environ["MPLBACKEND"]
# Of the processes that torchrun starts, only the first shows progress.
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"

import cv2
import torch

# SAM 2 scripts its image transform, which newer versions of torch advise against.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")

MAX_MEGAPIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]) // 10**6  # of an image


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


class NotFiniteError(UserError):
    """The model computes NaN or infinity: it has been spoilt, or the precision is too low."""


def select_device(name: str = "auto", threads: int | None = None) -> torch.device:
    """Return the device called `name`: auto (MPS, else CUDA, else CPU), mps, cuda, cuda:N, cpu.

    threads: of the CPU, for all that torch and OpenCV compute there from now on; None: as they are.
    auto passes over a CUDA GPU that this PyTorch was not built for, and says so. Raises UserError
    when a device that is named is unknown, absent, or such a GPU.
    """
    if threads:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    available = {
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if name == "auto":
        device = torch.device(next(kind for kind, present in available.items() if present))
        if problem := _lack_of_kernels(device):
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {problem}; until then the CPU computes, only slower")
            return torch.device("cpu")
        return device
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
    if problem := _lack_of_kernels(device):
        raise UserError(f"--device {name}: {problem}, or use --device cpu")
    return device


def _lack_of_kernels(device: torch.device) -> str | None:
    """Say that this PyTorch cannot compute on a CUDA GPU, and what to do; None where it can.

    Kernels for sm_XY run on GPUs of capability X.Y and later ones of the same X. compute_XY is PTX,
    which the driver compiles for X.Y and all later ones.
    """
    if device.type != "cuda":
        return None
    names = [
        re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in torch.cuda.get_arch_list()
    ]
    built_for = [(name[1], (int(name[2]), int(name[3]))) for name in names if name]
    if not built_for:  # as for ROCm, whose names are others
        return None
    with warnings.catch_warnings(action="ignore"):  # torch says it as well, in many lines
        capability = torch.cuda.get_device_capability(device)
    for kind, first in built_for:
        if first <= capability and (kind == "compute" or first[0] == capability[0]):
            return None
    return (
        f"PyTorch {torch.__version__} cannot compute on the {torch.cuda.get_device_name(device)} "
        f"(capability {capability[0]}.{capability[1]}); install a build for that card "
        "(https://pytorch.org/get-started; for CUDA 12.6 where it is older than the RTX 20 series)"
    )


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
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--precision {name} is unknown; use auto, float32, bfloat16 or float16")
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


def calculate_iou(predicted, true):
    """Return |predicted AND true| / (|predicted OR true| + 1e-6), over the last two dimensions.

    Takes ...xHxW bool masks, NumPy arrays or torch tensors, and returns the same kind.
    """
    return (predicted & true).sum((-2, -1)) / ((predicted | true).sum((-2, -1)) + 1e-6)


def calculate_dice(predicted, true):
    """Return 2 |predicted AND true| / (|predicted| + |true| + 1e-6), like calculate_iou."""
    total = predicted.sum((-2, -1)) + true.sum((-2, -1))
    return 2 * (predicted & true).sum((-2, -1)) / (total + 1e-6)
