"""What the tests against other tools share: fine-tuned models, images, and a table at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import sam2_utils  # noqa: F401, which sets what torch and OpenCV read when they are imported

import cv2
import numpy as np
import pytest
import torch

import train_sam2_proper
from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import SPLIT_FILE, facts_text
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.models import build_predictor, load_predictor
from finetuning.preparation.demo_images import draw_demo_pair
from finetuning.segmentation.predicting import encode_images, segment_with_logits
from finetuning.segmentation.prompts import Prompt, deepest_point, make_prompt, mask_box

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"
CPU = torch.device("cpu")
SAME = 0.98  # the IoU of two masks that count as the same
PROMPTS = ("point", "box")

# How a tool that has loaded a checkpoint segments: an RGB image, of each object the (X,Y) of a
# point or the (X1,Y1,X2,Y2) of a box; a mask of each
Segment = Callable[[np.ndarray, list[tuple[float, ...]]], list[np.ndarray]]


class Sample(NamedTuple):
    """An HxWx3 uint8 RGB image, and HxW bool masks of its objects."""

    image: np.ndarray
    masks: list[np.ndarray]

    def places(self, prompt: str) -> list[tuple[float, ...]]:
        """Return a point or a box of each object."""
        place = {"point": deepest_point, "box": mask_box}[prompt]
        return [tuple(float(value) for value in place(mask)) for mask in self.masks]


class Trained(NamedTuple):
    """A model before and after fine-tuning, and images to try it on, which it has not seen.

    samples: as_is, of the model's own size, and resized, wider than high.
    """

    original: Path
    finetuned: Path
    samples: dict[str, list[Sample]]


def pytest_configure(config) -> None:
    """Keep to the CPU, where all compute in float32, and Ultralytics to itself."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = os.environ["YOLO_OFFLINE"] = "1"
    os.environ["YOLO_AUTOINSTALL"] = "0"
    os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()
    torch.backends.mps.is_available = lambda: False


def fine_tune(folder: Path, train: list[Sample], val: list[Sample], *options: object) -> Path:
    """Fine-tune on a data folder of label maps, as a user would; return the checkpoint."""
    data, output = folder / "data", folder / "output"
    for split, samples in (("train", train), ("val", val)):
        for index, (image, masks) in enumerate(samples):
            labels = sum(mask.astype(np.uint8) * value for value, mask in enumerate(masks, 1))
            write_image(data / "images" / split / f"{split}_{index}.png", image)
            write_image(data / "masks" / split / f"{split}_{index}.png", labels)
    (data / SPLIT_FILE).write_text(facts_text({"masks": "objects"}), encoding="utf-8")
    where = ("--data", data, "--output", output, "--device", "cpu", "--precision", "float32")
    train_sam2_proper.main([str(option) for option in (*where, *options)])
    return output / "sam2_best.pt"


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Trained:
    """Return mini, fine-tuned on drawn polyps with a stalk, alone and two side by side."""
    train, val = (
        [draw_polyps(1 + index % 2, [split, index]) for index in range(count)]
        for split, count in ((0, 48), (1, 6))
    )
    options = ("--model", "mini", "--checkpoint", MINI, "--epochs", 5, "--lr", 1e-3)
    finetuned = fine_tune(tmp_path_factory.mktemp("mini"), train, val, *options, "--batch-size", 2)
    samples = {
        name: [draw_polyps(count, [2, index]) for index in range(6)]
        for name, count in (("as_is", 1), ("resized", 2))
    }
    return Trained(MINI, finetuned, samples)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Trained:
    """Return tiny with random weights, fine-tuned on drawn ellipses: for tools without mini."""
    folder = tmp_path_factory.mktemp("tiny")
    original = folder / "original.pt"
    torch.manual_seed(0)
    save_checkpoint(original, build_predictor("tiny", CPU).model)
    train, val = ([draw_ellipse(i, 1024, 1024) for i in which] for which in (range(4), [4]))
    options = ("--model", "tiny", "--checkpoint", original, "--epochs", 5, "--batch-size", 1)
    finetuned = fine_tune(folder, train, val, *options)
    samples = {"as_is": [draw_ellipse(5, 1024, 1024)], "resized": [draw_ellipse(6, 600, 900)]}
    return Trained(original, finetuned, samples)


@pytest.fixture(scope="session")
def exported(tiny, tmp_path_factory) -> dict[Path, tuple[str, str]]:
    """Return samexporter's ONNX encoder and decoder of each of tiny's checkpoints."""
    folder, files = tmp_path_factory.mktemp("onnx"), {}
    for path in (tiny.original, tiny.finetuned):
        encoder, decoder = files[path] = tuple(
            str(folder / f"{path.stem}.{part}.onnx") for part in ("encoder", "decoder")
        )
        command = [sys.executable, "-m", "samexporter.export_sam2", "--checkpoint", path]
        options = ("--output_encoder", encoder, "--output_decoder", decoder)
        subprocess.run([*command, *options, "--model_type", "sam2.1_hiera_tiny"], check=True)
    return files


def mark(place: tuple[float, ...]) -> dict[str, object]:
    """Return a point or a box as the tools take it that run these files."""
    if len(place) == 2:
        return {"type": "point", "data": list(place), "label": 1}
    return {"type": "rectangle", "data": list(place)}


def draw_polyps(count: int, seed: list[int]) -> Sample:
    """Draw the demo's polyps side by side, each on 256x256 pixels."""
    rng = np.random.default_rng(seed)
    images, masks = zip(*(draw_demo_pair(rng, 256) for _ in range(count)), strict=True)
    spread = np.zeros((count, 256, count, 256), bool)
    for index, mask in enumerate(masks):
        spread[index, :, index] = mask
    return Sample(np.hstack(images), list(spread.reshape(count, 256, count * 256)))


def draw_ellipse(index: int, height: int, width: int) -> Sample:
    """Draw a bright ellipse on dark noise."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    center = [int(rng.integers(side // 3, 2 * side // 3)) for side in (width, height)]
    cv2.ellipse(mask, center, (width // 5, height // 6), float(rng.integers(180)), 0, 360, 1, -1)
    image[mask == 1] += np.array([150, 100, 120], np.uint8)
    return Sample(image, [mask == 1])


def as_prompt(place: tuple[float, ...]) -> Prompt:
    return make_prompt([place]) if len(place) == 2 else make_prompt(box=place)


def open_ours(checkpoint: Path, kind: str) -> Callable[..., list[tuple[np.ndarray, float]]]:
    """Segment as this project does it, as Segment but with scores.

    kind: the best of three masks, or the single one.
    """
    predictor, _ = load_predictor(None, checkpoint, CPU)

    def segment_objects(image, places):
        features, size = encode_images(predictor, [image]), image.shape[:2]
        prompts = [as_prompt(place) for place in places]
        return [
            segment_with_logits(predictor, features, prompt, size, kind=kind)[:2]
            for prompt in prompts
        ]

    return segment_objects


def own_masks(checkpoint: Path, kind: str) -> Segment:
    segment_objects = open_ours(checkpoint, kind)
    return lambda image, places: [mask for mask, _ in segment_objects(image, places)]


def own_scores(trained: Trained, kind: str) -> list[float]:
    """Return the fine-tuned model's scores of one object, for a point and for a box."""
    sample = trained.samples["as_is"][0]
    places = [sample.places(prompt)[0] for prompt in PROMPTS]
    scores = [score for _, score in open_ours(trained.finetuned, kind)(sample.image, places)]
    assert abs(scores[0] - scores[1]) > 1e-3  # else they would not tell prompts apart
    return scores


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Return the IoU of two bool masks; that of empty ones is 1."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def ious(some: list[np.ndarray], others: list[np.ndarray]) -> list[float]:
    return [iou(one, other) for one, other in zip(some, others, strict=True)]


def compare(
    tool: str,
    kind: str,
    trained: Trained,
    open_tool: Callable[[Path], Segment],
    prompts: tuple[str, ...] = PROMPTS,
    at_least: float = SAME,
    answer: Segment | None = None,
) -> None:
    """Assert that a tool gives our masks, and that in it the fine-tuned model is the better one.

    tool: its package, and which part of it. kind: the mask that it takes, best or single.
    at_least: the IoU with ours of resized images, where the tool resizes them in another way.
    answer: how the fine-tuned model segments here, where that is more than one answer of that kind.
    """
    answer = answer or own_masks(trained.finetuned, kind)
    ours = segment_all(answer, trained.samples, prompts)
    original = segment_all(open_tool(trained.original), trained.samples, prompts)
    finetuned = segment_all(open_tool(trained.finetuned), trained.samples, prompts)
    failures = []
    for (size, prompt), own in ours.items():
        masks, masks_before = finetuned[size, prompt], original[size, prompt]
        true = [mask for sample in trained.samples[size] for mask in sample.masks]
        row = add_row(
            tool, kind, prompt, size, ious(masks, own), ious(masks_before, true), ious(masks, true)
        )
        enough = at_least if size == "resized" else SAME
        told_apart = np.mean(ious(masks_before, own)) < enough
        if not (row.ours >= enough and told_apart and row.finetuned > row.original):
            failures.append(str(row))
    assert not failures, "\n".join(failures)


def segment_all(
    segment_objects: Segment, samples: dict[str, list[Sample]], prompts: tuple[str, ...]
) -> dict[tuple[str, str], list[np.ndarray]]:
    """Return the masks of all objects, by the images' size and the kind of prompt."""
    return {
        (size, prompt): [
            mask
            for sample in of_size
            for mask in segment_objects(sample.image, sample.places(prompt))
        ]
        for size, of_size in samples.items()
        for prompt in prompts
    }


class Row(NamedTuple):
    """A line of the table: mean IoU with our mask, then of both models with the true mask."""

    tool: str
    mask: str
    prompt: str
    images: str
    ours: float
    original: float
    finetuned: float


ROWS: list[Row] = []


def add_row(tool: str, mask: str, prompt: str, images: str, *ious_of: list[float]) -> Row:
    """Add a line to the table; ious_of: with our masks, then of both models with the true masks."""
    package, *part = tool.split()
    name = " ".join([package, version(package), *part])
    ROWS.append(Row(name, mask, prompt, images, *(float(np.mean(each)) for each in ious_of)))
    return ROWS[-1]


def pytest_terminal_summary(terminalreporter) -> None:
    if ROWS:
        terminalreporter.section("IoU with our mask; with the true mask, original and fine-tuned")
        line = "{:28} {:7} {:7} {:8} {:>8} {:>9} {:>10}"
        terminalreporter.line(line.format(*Row._fields))
        for *words, ours, original, finetuned in ROWS:
            figures = f"{ours:.4f}", f"{original:.4f}", f"{finetuned:.4f}"
            terminalreporter.line(line.format(*words, *figures))
