"""The report as one self-contained HTML file: numbers, pictures and how to reproduce them."""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
import torch

from finetuning.basics.command_line import brief, quote_command
from finetuning.basics.files import DATASET_URL, atomic_write, content_sha256
from finetuning.basics.image_files import read_image
from finetuning.basics.language import current_language, say
from finetuning.comparison.figures import Picture
from finetuning.comparison.report import Summary
from finetuning.comparison.tables import Table
from finetuning.dataset.pairs import read_facts
from finetuning.evaluation.seen_images import SEEN, Overlap
from finetuning.model.loading import Files
from finetuning.model.model import Model

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PICTURES = 5  # of the largest gains, and of the largest losses
LONGEST_SIDE = 1200  # of a picture, in pixels
# Per JPEG: ten of them, a third longer in base64, leave room for the charts within 10 MB
MOST_BYTES = 600_000
QUALITIES = (85, 70, 50, 30, 15)  # of JPEG; the first that fits is used
LONGEST_VALUE = 300  # characters of a file name or a setting


class Setup(NamedTuple):
    """The images and the kind of comparison."""

    data: Path
    split: str
    prompt_kind: str  # center, random, box or none
    mask_kind: str  # best or single
    seed: int
    command: Sequence[str]  # the script and its options


class Embedded(NamedTuple):
    """A picture embedded in the page."""

    source: str  # a data: URL
    width: int
    height: int
    name: str = ""
    ious: str = ""
    gain: str = ""


def write_page(
    output: Path,
    summary: Summary,
    files: Files,
    model: Model,
    setup: Setup,
    clicks: Table | None,
    pictures: Sequence[Picture],
    automatic: Table | None = None,
) -> None:
    """Write report.html into the output folder, which already holds the charts.

    Arguments:
      model: any of the measured models, for its device and precision.
      clicks, automatic: the tables of simulated clicks and of objects found without a prompt, if
        requested.
      pictures: from the largest gain to the largest loss.
    """
    # autoescape: names of files and settings are foreign text
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The first half of the pictures are gains; from the end, the largest losses come first
    gains = len(pictures) - len(pictures) // 2
    best, worst = pictures[:gains][:MOST_PICTURES], pictures[gains:][::-1][:MOST_PICTURES]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        say=say,
        language=current_language(),
        summary=summary,
        size=files.model_name,
        setup=setup,
        clicks=clicks,
        automatic=automatic,
        scatter_chart=embed_chart(output / "scatter.png"),
        clicks_chart=embed_chart(output / "clicks.png") if clicks else None,
        best=[embed_picture(picture) for picture in best],
        worst=[embed_picture(picture) for picture in worst],
        compared=describe_models(files, setup, summary.overlap),
        versions=describe_machine(files, model),
        settings=training_settings(files.facts[0]),
        command=quote_command(["python", *setup.command]),
        is_kvasir=read_facts(setup.data).get("source") == DATASET_URL,
    )
    with atomic_write(output / "report.html") as temporary:
        # File names may not be valid UTF-8
        temporary.write_bytes(page.lstrip().encode("utf-8", "backslashreplace"))


def embed_picture(picture: Picture) -> Embedded:
    """Embed a picture as a JPEG of at most LONGEST_SIDE pixels and MOST_BYTES."""
    image = cv2.cvtColor(read_image(picture.path), cv2.COLOR_RGB2BGR)
    scale = min(1.0, LONGEST_SIDE / max(image.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    before, after = picture.ious
    return Embedded(
        _data_url("jpeg", _encode(image)),
        width,
        height,
        short(picture.name),
        f"IoU {before:.2f} → {after:.2f}",
        f"{100 * (after - before):+.1f}%p",
    )


def _encode(image: np.ndarray) -> bytes:
    for quality in QUALITIES:
        content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(content) <= MOST_BYTES:
            break
    return content


def embed_chart(path: Path) -> Embedded:
    """Embed a chart as the PNG file that it is."""
    height, width = read_image(path).shape[:2]
    return Embedded(_data_url("png", path.read_bytes()), width, height)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def short(value: Any) -> str:
    """Return a value as one printable line of limited length."""
    return brief(value if isinstance(value, Path) else str(value), LONGEST_VALUE)


def describe_models(files: Files, setup: Setup, overlap: Overlap) -> dict[str, str]:
    """Return the compared models, the images, and how they were prompted."""
    epoch = files.facts[0].get("epoch")
    finetuned = short(files.finetuned_name)
    if isinstance(epoch, int):
        finetuned = say("{file} (epoch {epoch})", file=finetuned, epoch=epoch)
    prompts = {
        "center": say("one point, the deepest inside the object"),
        "random": say("a random point in the object"),
        "box": say("the object's box"),
        "none": say("none: all objects in the image"),
    }
    masks = {
        "best": say("the one of three masks that the model scores highest"),
        "single": say("the single mask"),
    }
    trained_on, changed = (
        say("{count} of {images} images", count=count, images=overlap.images)
        for count in (overlap.trained_on, overlap.changed_masks)
    )
    return {
        say("Model"): f"SAM 2.1 {files.model_name}, {files.image_size}x{files.image_size}",
        say("Original"): short(files.original),
        say("Fine-tuned"): finetuned,
        say("Data"): short(setup.data),
        say("Split"): setup.split,
        say("Trained on"): trained_on if overlap.is_known else say("unknown"),
        say("Masks changed since training"): changed if overlap.is_known else say("unknown"),
        say("Prompt"): prompts[setup.prompt_kind],
        say("Mask"): masks[setup.mask_kind],
    }


def describe_machine(files: Files, model: Model) -> dict[str, str]:
    """Return what reproduces the numbers: versions, device, precision and hashes of the files."""
    return {
        say("Date"): datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "sam2": version_of("sam2"),
        "OpenCV": cv2.__version__,
        "NumPy": np.__version__,
        say("System"): platform.platform(),
        say("Device"): str(model.predictor.device),
        say("Precision"): str(model.source.precision).removeprefix("torch."),
        say("SHA-256, original"): content_sha256(files.original),
        say("SHA-256, fine-tuned"): " ".join(map(content_sha256, files.finetuned)),
    }


def version_of(package: str) -> str:
    """Return the version of a package, or "-" if it has no metadata."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def training_settings(facts: dict[str, Any]) -> dict[str, str]:
    """Return the training settings recorded in a fine-tuned file, which may hold anything."""
    settings = facts.get("settings")
    if not isinstance(settings, dict):
        return {}
    return {
        short(name): "-" if value is None else short(value)
        for name, value in settings.items()
        if name != SEEN
    }
