"""Training on several GPUs or machines with torchrun; without torchrun, one process does it all.

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

TIMEOUT = timedelta(hours=6)  # others wait while rank 0 validates, or the slowest encodes

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process; 0 is the one that validates, saves and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, which share each batch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: a GPU of its own, or the CPU, which all share.

    A Mac's GPU cannot be shared by processes, nor do they have a way to add up what is on it.
    Raises UserError where there are more processes than GPUs.
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
    """Join the other processes, if torchrun has started any; only rank 0 prints."""
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
            wait_for_all()  # with torch 2.6 one that leaves before the others may wait forever
    finally:
        sys.stdout = printed
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns in the first process, in all of them; the others do not call it.

    All processes must come here, and the value must be one that can be pickled. A UserError or
    OSError of the first is raised in all, so that none waits for it.
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
    """Return what this process has to do of `items`."""
    return items[rank() :: world_size()]


def sum_over_all(values: list[float], device: torch.device) -> list[float]:
    """Return each value's sum over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    total = total.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def mean_over_all(values: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Return the mean of each list of values over all processes; one may have none to add."""
    sums = [float(sum(of_name)) for of_name in values.values()]
    *totals, count = sum_over_all([*sums, len(next(iter(values.values())))], device)
    return {name: total / count for name, total in zip(values, totals, strict=True)}
