"""Training on several GPUs or machines with torchrun; without torchrun, in one process.

torchrun --nproc_per_node=2 train_sam2_proper.py --batch-size 8
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sam2_utils import UserError

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=6)  # processes wait while rank 0 validates or the slowest one encodes

T = TypeVar("T")


def rank() -> int:
    """Return this process's number; process 0 validates, saves and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, which share each batch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: torch.device) -> torch.device:
    """Return this process's device: its own GPU, or the shared CPU.

    Processes cannot share a Mac's GPU, and no backend sums tensors across processes on it.
    Raises UserError if there are more processes than GPUs.
    """
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type == "mps":
        return torch.device("cpu")
    local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank + 1} has no GPU, there are {count}; start torchrun with "
            f"--nproc_per_node={count}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun started, if any; only rank 0 prints."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cuda" and dist.is_nccl_available():  # not on Windows
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    printed = sys.stdout
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            sys.stdout = printed if rank() == 0 else nowhere
            yield
            wait_for_all()  # in torch 2.6, a process that leaves early may hang
    finally:
        sys.stdout = printed
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process has reached this call."""
    if world_size() > 1:
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process only, and return its result in all of them.

    All processes must call this, and the result must be picklable. A UserError or OSError in the
    first process is raised in all, so that none waits forever.
    """
    if world_size() == 1:
        return make()
    value = error = None
    if rank() == 0:
        try:
            value = make()
        except (UserError, OSError) as raised:
            error = raised
    shared = [value, error]
    dist.broadcast_object_list(shared, src=0)
    value, error = shared
    if error is not None:
        raise error
    return value


def share(items: list) -> list:
    """Return this process's share of `items`."""
    return items[rank() :: world_size()]


def sum_over_all(values: list[float], device: torch.device) -> list[float]:
    """Return each value's sum over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    total = total.to(device if dist.get_backend() == "nccl" else "cpu")  # nccl sums on GPUs only
    dist.all_reduce(total)
    return total.tolist()


def mean_over_all(values: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Return the mean of each list of values over all processes; a process's may be empty."""
    sums = [float(sum(numbers)) for numbers in values.values()]
    # One communication for all sums and the count
    *totals, count = sum_over_all([*sums, len(next(iter(values.values())))], device)
    return {name: total / count for name, total in zip(values, totals, strict=True)}
