"""X-AnyLabeling, with a YAML file of samexporter's two: the outlines of the best of three masks.

It is much to install and needs a desktop's libraries: `pip install x-anylabeling-cvhub` first.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Segment, compare, mark

pytest.importorskip("anylabeling", reason="needs pip install x-anylabeling-cvhub")

from anylabeling import config
from anylabeling.services.auto_labeling.segment_anything_2 import SegmentAnything2
from PyQt6.QtGui import QImage


@pytest.fixture
def settings(tmp_path, monkeypatch) -> None:
    """Keep its settings out of the home folder; what it does not find there is its default."""
    monkeypatch.setattr(config, "_work_directory", str(tmp_path))
    monkeypatch.setattr(config, "current_config_file", "{}")


def open_model(files: tuple[str, str], folder: Path) -> Segment:
    encoder, decoder = files
    path = folder / "finetuned.yaml"
    facts = {"type": "segment_anything_2", "name": "finetuned", "display_name": "Fine-tuned"}
    facts |= {"encoder_model_path": encoder, "decoder_model_path": decoder}
    path.write_text(json.dumps(facts), encoding="utf-8")
    model = SegmentAnything2(str(path), print)

    def segment(image, places):
        # A name each, by which it keeps features
        file = str(folder / f"{len(list(folder.iterdir()))}.png")
        cv2.imwrite(file, image[..., ::-1])
        masks = []
        for place in places:
            model.set_auto_labeling_marks([mark(place)])
            shapes = model.predict_shapes(QImage(file), file).shapes
            masks.append(fill(shapes, image.shape[:2]))
        return masks

    return segment


def fill(shapes: list, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for shape in shapes:
        outline = [(point.x(), point.y()) for point in shape.points]
        cv2.fillPoly(mask, [np.array(outline, np.int32)], 1)
    return mask > 0


def test_it_gives_our_best_mask(tiny, exported, settings, tmp_path):
    # Its outlines leave out corners: on a smaller image they cost more
    tool = "x-anylabeling-cvhub"
    compare(tool, "best", tiny, lambda path: open_model(exported[path], tmp_path), at_least=0.97)
