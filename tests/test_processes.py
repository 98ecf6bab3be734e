"""Processes that load, and those of torchrun: as many as the machine can hold, clear errors."""

import sys

from sam2_utils import UserError

import pytest
import torch
from conftest import CPU, write_data

from finetuning.basics import distributed
from finetuning.basics.command_line import run
from finetuning.dataset.pairs import split_pairs
from finetuning.training_data import batches
from finetuning.training_data.batches import TrainingSet, count_workers, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler

MEGABYTE = 2**20


def memory_of(monkeypatch, megabytes: float, cores: int) -> None:
    disk = type("Usage", (), {"free": int(megabytes * MEGABYTE)})
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: disk)
    monkeypatch.setattr(batches.os, "cpu_count", lambda: cores)


@pytest.mark.parametrize(
    ("megabytes", "cores", "batch_megabytes", "expected"),
    [
        (64, 8, 34, 0),  # Docker's default, and 4 images of small
        (64, 8, 8.5, 2),
        (64, 8, 1, 4),
        (8192, 8, 34, 4),
        (8192, 2, 34, 2),
        (8192, 1, 34, 1),
    ],
)
def test_as_many_processes_load_as_shared_memory_and_cores_allow(
    monkeypatch, tmp_path, megabytes, cores, batch_megabytes, expected
):
    memory_of(monkeypatch, megabytes, cores)
    assert count_workers(int(batch_megabytes * MEGABYTE), tmp_path) == expected
    assert count_workers(int(batch_megabytes * MEGABYTE), tmp_path / "absent") == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_loading_processes_are_for_cuda_on_linux(monkeypatch, tmp_path):
    pairs = split_pairs(write_data(tmp_path / "data", train=2), "train")
    training, sampler = TrainingSet(pairs, None, 256, 0), EpochSampler({0: 1, 1: 1}, 2, 0)
    monkeypatch.setattr(batches, "count_workers", lambda size: 3 if size > 10000 else 0)
    for platform, device, expected in (
        ("linux", "cuda", 3),
        ("win32", "cuda", 0),
        ("linux", "cpu", 0),
    ):
        monkeypatch.setattr(batches.sys, "platform", platform)
        assert make_loader(training, sampler, torch.device(device)).num_workers == expected


@pytest.mark.filterwarnings("ignore:.*no accelerator is found:UserWarning")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.skipif(
    sys.platform != "linux", reason="loading processes are for Linux"))])  # fmt: skip
def test_an_unreadable_image_is_one_line_wherever_it_is_read(
    monkeypatch, tmp_path, capsys, workers
):
    pairs = split_pairs(write_data(tmp_path / "data", train=2), "train")
    sampler = EpochSampler({0: 1, 1: 1}, 1, 0)
    last = list(sampler)[-1].indices[0]
    pairs[last].image.write_bytes(b"no image")
    monkeypatch.setattr(batches, "count_workers", lambda _: workers)
    loader = make_loader(
        TrainingSet(pairs, None, 256, 0), sampler, torch.device("cuda" if workers else "cpu")
    )
    assert loader.num_workers == workers
    with pytest.raises(SystemExit) as stop:
        run(lambda _: list(loader))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {pairs[last].image}") and error.count("\n") == 1


# torchrun


def start_as(monkeypatch, local_rank: int, gpus: int = 2) -> None:
    """Let this be one of two processes of torchrun, on a machine with some GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_each_process_has_a_gpu_of_its_own_or_they_share_the_cpu(monkeypatch):
    assert distributed.local_device(torch.device("mps")) == torch.device("mps")  # no torchrun
    start_as(monkeypatch, local_rank=1)
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda:1")
    assert distributed.local_device(torch.device("mps")) == CPU
    assert distributed.local_device(CPU) == CPU
    start_as(monkeypatch, local_rank=1, gpus=1)
    with pytest.raises(UserError, match=r"there are 1.*--nproc_per_node=1"):
        distributed.local_device(torch.device("cuda"))


@pytest.mark.parametrize(("has_nccl", "expected"), [(True, "nccl"), (False, "gloo")])
def test_gpus_talk_through_gloo_where_there_is_no_nccl(monkeypatch, has_nccl, expected):
    start_as(monkeypatch, local_rank=0)
    groups = []
    dist = distributed.dist
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: groups.append((backend, options))
    )
    ends = []
    monkeypatch.setattr(dist, "barrier", lambda: ends.append("together"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("left"))
    for device in (torch.device("cuda:0"), CPU):
        with distributed.process_group(device):
            pass
    assert ends == ["together", "left"] * 2
    (of_gpu, options), (of_cpu, cpu_options) = groups
    assert (of_gpu, of_cpu) == (expected, "gloo")
    # Or the first barrier warns that it has to guess the GPU
    assert options.get("device_id") == (torch.device("cuda:0") if has_nccl else None)
    assert "device_id" not in cpu_options
