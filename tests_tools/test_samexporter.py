"""samexporter's ONNX encoder and decoder, in onnxruntime: the best of three masks."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROMPTS, Segment, compare, own_scores
from samexporter.sam2_onnx import SegmentAnything2ONNX


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> dict[Path, tuple[str, str]]:
    """Return the encoder and the decoder of each checkpoint."""
    folder, files = tmp_path_factory.mktemp("onnx"), {}
    for path in (tiny.original, tiny.finetuned):
        encoder, decoder = files[path] = tuple(
            str(folder / f"{path.stem}.{part}.onnx") for part in ("encoder", "decoder")
        )
        command = [sys.executable, "-m", "samexporter.export_sam2", "--checkpoint", path]
        options = ("--output_encoder", encoder, "--output_decoder", decoder)
        subprocess.run([*command, *options, "--model_type", "sam2.1_hiera_tiny"], check=True)
    return files


def open_onnx(files: tuple[str, str]) -> Segment:
    model = SegmentAnything2ONNX(*files, ["CPUExecutionProvider"])

    def segment(image, places):
        embedding = model.encode(image[..., ::-1].copy())
        return [model.predict_masks(embedding, [mark(place)])[0, 0] > 0 for place in places]

    return segment


def mark(place: tuple[float, ...]) -> dict[str, object]:
    if len(place) == 2:
        return {"type": "point", "data": list(place), "label": 1}
    return {"type": "rectangle", "data": list(place)}


def test_it_gives_our_best_mask(tiny, exported):
    compare("samexporter", "best", tiny, lambda path: open_onnx(exported[path]))


def test_it_hands_on_the_prompts(tiny, exported, monkeypatch):
    model = SegmentAnything2ONNX(*exported[tiny.finetuned], ["CPUExecutionProvider"])
    scores, decode = [], model.decoder.predict

    def keep_scores(*inputs):
        masks, of_masks = decode(*inputs)
        scores.append(float(of_masks.max()))
        return masks, of_masks

    monkeypatch.setattr(model.decoder, "predict", keep_scores)
    sample = tiny.samples["as_is"][0]
    embedding = model.encode(sample.image[..., ::-1].copy())
    for prompt in PROMPTS:
        model.predict_masks(embedding, [mark(sample.places(prompt)[0])])
    assert scores == pytest.approx(own_scores(tiny, "best"), abs=1e-4)
