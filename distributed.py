"""Training on several GPUs or machines with torchrun; without torchrun, one process does it all.

torchrun --nproc_per_node=2 train_sam2_proper.py --batch-size 8
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import command_line  # noqa: F401, which sets what torch and tqdm read when first imported

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=6)  # others wait while rank 0 validates, or the slowest encodes


def rank() -> int:
    """Return the number of this process; 0 is the one that validates, saves and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, which share each batch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, where each has one of its own."""
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, if torchrun has started any; only rank 0 prints."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    printed = sys.stdout
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            sys.stdout = printed if rank() == 0 else nowhere
            yield
    finally:
        sys.stdout = printed
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def share(items: list) -> list:
    """Return what this process has to do of `items`."""
    return items[rank() :: world_size()]


def sum_over_all(values: list[float], device: torch.device) -> list[float]:
    """Return each value's sum over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64)
    total = total.to(device)
    dist.all_reduce(total)
    return total.tolist()
