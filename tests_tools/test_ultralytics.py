"""Ultralytics' SAM takes the exported file; to a prompt it answers with the single mask."""

from pathlib import Path

import numpy as np
import pytest
from conftest import PROMPTS, Segment, compare, own_scores
from ultralytics import SAM

from finetuning import export


def open_sam(checkpoint: Path, folder: Path):
    """Return a function that gives Ultralytics' results for points or for boxes."""
    output = folder / checkpoint.stem
    options = ("--finetuned", str(checkpoint), "--output", str(output))
    export.main(["--to", "ultralytics", *options])
    model = SAM(str(output / "sam2.1_t.pt"))

    def predict(image, places):
        points = [list(place) for place in places if len(place) == 2]
        prompts = {"points": points, "labels": [1] * len(points)}
        if not points:
            prompts = {"bboxes": [list(place) for place in places]}
        # conf: masks of low scores, too, but for those of 0
        return model(image[..., ::-1], **prompts, conf=0.0, verbose=False, device="cpu")[0]

    return predict


def masks_of(checkpoint: Path, folder: Path) -> Segment:
    predict = open_sam(checkpoint, folder)

    def segment(image, places):
        found = predict(image, places).masks
        if found is None:
            return [np.zeros(image.shape[:2], bool) for _ in places]
        return list(found.data.numpy() > 0)

    return segment


def test_it_gives_our_single_mask(tiny, tmp_path):
    # It keeps the proportions of an image and adds a margin, where SAM 2 makes the image square
    compare("ultralytics", "single", tiny, lambda path: masks_of(path, tmp_path), at_least=0.9)


def test_it_hands_on_the_prompts(tiny, tmp_path):
    predict, sample = open_sam(tiny.finetuned, tmp_path), tiny.samples["as_is"][0]
    results = [predict(sample.image, sample.places(prompt)) for prompt in PROMPTS]
    scores = [float(result.boxes.conf[0]) for result in results]
    assert scores == pytest.approx(own_scores(tiny, "single"), abs=1e-4)
