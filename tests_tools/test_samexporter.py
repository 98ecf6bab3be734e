"""samexporter's ONNX encoder and decoder, in onnxruntime: the best of three masks."""

import pytest
from conftest import PROMPTS, Segment, compare, mark, own_scores
from samexporter.sam2_onnx import SegmentAnything2ONNX


def open_onnx(files: tuple[str, str]) -> Segment:
    model = SegmentAnything2ONNX(*files, ["CPUExecutionProvider"])

    def segment(image, places):
        embedding = model.encode(image[..., ::-1].copy())
        return [model.predict_masks(embedding, [mark(place)])[0, 0] > 0 for place in places]

    return segment


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
