"""Shared by the tests: a small model, small data sets, and a way to run the scripts."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs one process per core

import sam2_utils  # first: it sets variables that torch and OpenCV read on import

import cv2
import numpy as np
import pytest
import torch
from sam2 import sam2_image_predictor
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base

from finetuning.basics import command_line, image_decoding, language
from finetuning.basics.files import content_sha256
from finetuning.basics.image_files import write_image
from finetuning.comparison import figures
from finetuning.model import checkpoints, models
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.models import MODELS, build_predictor
from finetuning.training import training_log
from finetuning.training_data import augmentation

CPU = torch.device("cpu")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "auto"), default="cpu",
        help="cpu, or auto: the device that the scripts choose, such as a GPU",
    )  # fmt: skip
    parser.addoption(
        "--precision", choices=("auto", "float32", "bfloat16", "other"), default="auto",
        help="what --precision auto means on the CPU; other: the one it would not choose here",
    )  # fmt: skip


def pytest_configure(config) -> None:
    """Hide GPUs unless --device auto is given, and set the CPU's precision in this process.

    A hosted Mac has a GPU that cannot be used. bfloat16 is emulated where it is not native.
    """
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.backends.mps.is_available = lambda: False
    native, name = sam2_utils.cpu_has_bfloat16(), config.getoption("--precision")
    has_bfloat16 = {"auto": native, "float32": False, "bfloat16": True, "other": not native}[name]
    sam2_utils.cpu_has_bfloat16 = lambda: has_bfloat16


class Outcome(NamedTuple):
    """How a script ended and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Replace slow parts that few tests check.

    The mini model is built once and copied, a checkpoint is read once and copied, and the
    transforms are scripted once. Augmentation makes two variants of an image, not eight. Charts are
    empty. fsync does nothing, as no test's file has to survive a power cut.
    """

    @functools.cache
    def build_once(config: str, overrides: tuple[str, ...]) -> SAM2Base:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_sam2(config, None, device="cpu", hydra_overrides_extra=list(overrides))

    def build(
        config: str, _: None, device: torch.device, hydra_overrides_extra: list[str]
    ) -> SAM2Base:
        if not set(MODELS["mini"].overrides) <= set(hydra_overrides_extra):
            return build_sam2(
                config, None, device=device, hydra_overrides_extra=hydra_overrides_extra
            )
        return copy.deepcopy(build_once(config, tuple(hydra_overrides_extra))).to(device)

    transforms, read = functools.cache(sam2_image_predictor.SAM2Transforms), checkpoints._read

    @functools.lru_cache(maxsize=4)
    def read_once(path: Path, sha256: str) -> Any:
        return read(path)

    with (
        mock.patch.object(models, "build_sam2", build),
        mock.patch.object(sam2_image_predictor, "SAM2Transforms", transforms),
        mock.patch.object(
            checkpoints, "_read", lambda path: copy.deepcopy(read_once(path, content_sha256(path)))
        ),
        mock.patch.object(augmentation, "AUTO_MOST", 2),
        mock.patch.object(training_log, "draw_learning_curve", lambda path, log: path.touch()),
        mock.patch.object(figures, "draw_scatter", lambda path, *_: write_blank(path)),
        mock.patch.object(os, "fsync"),
    ):
        yield


@pytest.fixture(autouse=True)
def english() -> None:
    """Let what is said be in English, whatever language an earlier test used."""
    language.use_language("en")


@pytest.fixture
def processes(monkeypatch) -> BaseContext:
    """Return a multiprocessing context for functions that can be pickled.

    If the system can fork, one process imports everything and the others are forked from it.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    return context


@pytest.fixture
def without_heic(monkeypatch) -> None:
    """Make HEIC photos unreadable, as if pillow-heif were not installed."""
    known = [name for name in image_decoding.PILLOW_FORMATS if name != "HEIF"]
    monkeypatch.setattr(image_decoding, "PILLOW_FORMATS", known)


@pytest.fixture
def run_script(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Return a function that runs a script's main in the test's folder, as the shell would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language, "system_language", lambda: "en")

    def run(main, *options: object) -> Outcome:
        status = 0
        try:
            command_line.run(main, [str(option) for option in options])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def random_mini(tmp_path_factory) -> Path:
    """Return a checkpoint of mini with random weights."""
    path = tmp_path_factory.mktemp("checkpoints") / "random_mini.pt"
    save_checkpoint(path, build_predictor("mini", CPU).model)
    return path


def write_blank(path: Path) -> None:
    """Write a small black picture in place of a chart that no test checks."""
    write_image(path, np.zeros((2, 2, 3), np.uint8))


def draw_pair(index: int, size: tuple[int, int] = (96, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bright ellipse on a dark noisy ground; return the RGB image and the bool mask."""
    rng = np.random.default_rng(index)
    height, width = size
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    center = (
        int(rng.integers(width // 3, 2 * width // 3)),
        int(rng.integers(height // 3, height // 2)),
    )
    cv2.ellipse(mask, center, (width // 5, height // 6), float(rng.integers(180)), 0, 360, 1, -1)
    image[mask == 1] += np.array([150, 100, 120], np.uint8)
    return image, mask == 1


def write_pair(index: int, image_dir: Path, mask_dir: Path) -> None:
    """Write one drawn pair, the image as JPEG and the mask as PNG."""
    image, mask = draw_pair(index)
    write_image(image_dir / f"pair_{index:03}.jpg", image)
    write_image(mask_dir / f"pair_{index:03}.png", mask.astype(np.uint8) * 255)


def write_pairs(folder: Path, count: int) -> Path:
    """Write images/ and masks/ of drawn pairs into a folder."""
    for index in range(count):
        write_pair(index, folder / "images", folder / "masks")
    return folder


def write_data(folder: Path, train: int = 4, val: int = 2) -> Path:
    """Write a data folder of drawn pairs, as download_dataset.py leaves it."""
    for split, indices in (("train", range(train)), ("val", range(train, train + val))):
        for index in indices:
            write_pair(index, folder / "images" / split, folder / "masks" / split)
    return folder


def zip_folder(folder: Path, archive: Path, inside: str = "Kvasir-SEG") -> Path:
    """Zip a folder's files into the archive's folder `inside`."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"{inside}/{path.relative_to(folder).as_posix()}")
    return archive


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, to check that nothing has changed."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
