"""The basis of all scripts: environment, errors, devices, precision, IoU and Dice.

Import it before torch, OpenCV, matplotlib and tqdm: they read the environment on import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036, else hashlib.file_digest fails much later
    print("error: this is Python 3.10 or older; make a .venv with 3.11 or newer", file=sys.stderr)
    sys.exit(2)
# Operators that MPS lacks run on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
# A file of a few bytes can claim any size, so OpenCV refuses headers with more pixels than this.
# OpenCV crashes if the limit does not fit in 64 bits.
if not os.environ.get("SAM2_MAX_MEGAPIXELS", "").isdecimal():
    os.environ["SAM2_MAX_MEGAPIXELS"] = "100"  # needs 4 GB in all: fits a computer with 8 GB
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(
    min(int(os.environ["SAM2_MAX_MEGAPIXELS"]), 10**6) * 10**6
)
# The scripts report unreadable files themselves.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
# Notebooks set their own drawing backend, which matplotlib may not find outside of them.
if os.environ.get("MPLBACKEND", "").startswith("module://"):
    del os.environ["MPLBACKEND"]
# With torchrun, only the first process shows progress bars.
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"

PACKAGES = (
    "numpy", "cv2", "torch", "torchvision", "sam2", "PIL", "matplotlib", "tqdm", "safetensors",
    "jinja2",
)  # fmt: skip


def _how_to_install() -> str:
    """Return what to do if packages are missing: activate the project's .venv, or install them."""
    folder = Path(__file__).resolve().parent
    if (folder / ".venv").is_dir() and Path(sys.prefix).resolve() != folder / ".venv":
        script = r".venv\Scripts\Activate.ps1" if os.name == "nt" else "source .venv/bin/activate"
        return f"activate the project's environment first: {script}"
    return f"run: {sys.executable} -m pip install -r requirements.txt (README: Install)"


try:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"not installed in {sys.executable}: {', '.join(missing)}")
    import cv2
    import torch
except (ImportError, OSError) as error:  # an OSError for a missing DLL on Windows
    remedy = _how_to_install()
    if ".so" in str(error):  # OpenCV's windows need libraries that servers and containers lack
        remedy = (
            "run: pip uninstall -y opencv-python && pip install opencv-python-headless, "
            "or: sudo apt-get install libgl1 libglib2.0-0"
        )
    print("error:", str(error).splitlines()[0] + f"; {remedy}", file=sys.stderr)
    sys.exit(2)

# SAM 2 compiles its image transform with torch.jit.script, which newer torch versions deprecate.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")

MAX_MEGAPIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]) // 10**6  # of an image


class UserError(Exception):
    """A mistake that the user can fix: one line that says what is wrong and what to do."""


class NotFiniteError(UserError):
    """The model computes NaN or infinity: its weights are broken, or the precision is too low."""


def select_device(name: str = "auto", threads: int | None = None) -> torch.device:
    """Return the device called `name`: auto (MPS, else CUDA, else CPU), mps, cuda, cuda:N, cpu.

    threads: the number of CPU threads of torch and OpenCV; None: unchanged. auto skips a CUDA GPU
    that this PyTorch was not built for, with a warning. Raises UserError if a named device is
    unknown, absent, or such a GPU.
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
                print(f"warning: {problem}; until then the CPU is used, which is slower")
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
        torch.cuda.set_device(device)  # else calls without a device use memory of the first GPU
    if problem := _lack_of_kernels(device):
        raise UserError(f"--device {name}: {problem}, or use --device cpu")
    return device


def _lack_of_kernels(device: torch.device) -> str | None:
    """Return why this PyTorch cannot compute on a CUDA GPU, and what to do; None if it can.

    Kernels for sm_XY run on GPUs of capability X.Y and later with the same X. compute_XY is PTX,
    which the driver compiles for X.Y and everything later.
    """
    if device.type != "cuda":
        return None
    names = [
        re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in torch.cuda.get_arch_list()
    ]
    built_for = [(name[1], (int(name[2]), int(name[3]))) for name in names if name]
    if not built_for:  # ROCm, for example, names its architectures differently
        return None
    with warnings.catch_warnings(action="ignore"):  # torch warns of the same, in many lines
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

    auto is bfloat16 if the GPU or CPU multiplies it in hardware; otherwise float16 on CUDA, and
    float32 on MPS, other CPUs and GTX 16xx cards, whose float16 gives NaN (pytorch issue 77955).
    Raises UserError for a precision that the device cannot train in.
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
    """Return whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # missing in some versions
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which SAM 2's components compute in `precision`.

    Weights are cast at each use. Torch caches casts by default; a forward pass under no_grad
    caches them without gradients, so until torch 2.10 later passes in the same context learn next
    to nothing (pytorch issue 112583).
    """
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision, cache_enabled=False)


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to a device, asynchronously where that is safe: from pinned memory to CUDA.

    MPS may read the source after it has been freed (pytorch issue 139550).
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
