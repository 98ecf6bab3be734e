"""The demo runs with what the repository ships, and its model is right where it should be."""

import hashlib
import re
from pathlib import Path

from sam2_utils import calculate_iou

import numpy as np
import pytest
from conftest import CPU, snapshot

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper
from benchmarks.pretraining_images import draw_pretraining_image
from finetuning.basics.image_files import read_image, read_mask
from finetuning.dataset.pairs import split_pairs
from finetuning.model.models import load_predictor
from finetuning.preparation.demo_images import draw_demo_pair, write_demo_dataset
from finetuning.segmentation.predicting import encode_images, predict_masks, segment_with_logits
from finetuning.segmentation.prompts import make_prompt, prompt_from_mask
from finetuning.training import run_files

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"


@pytest.fixture(scope="module")
def mini():
    return load_predictor("mini", MINI, CPU)[0]


@pytest.fixture(scope="module")
def drawings():
    """Draw images as those of the pretraining, which it has not seen."""
    rngs = [np.random.default_rng([77, i]) for i in range(12)]
    return [draw_pretraining_image(rng, 256, 0.0) for rng in rngs]


def mean_iou(predictor, drawings, make) -> float:
    """Return the mean IoU over all objects, prompted by make(mask)."""
    ious = []
    for image, masks, _ in drawings:
        features = encode_images(predictor, [image])
        for mask in masks:
            predicted, *_ = segment_with_logits(predictor, features, make(mask), mask.shape)
            ious.append(calculate_iou(predicted, mask))
    return float(np.mean(ious))


def test_the_pretrained_model_is_small_and_segments_what_is_clicked(mini, drawings):
    assert MINI.stat().st_size < 12_000_000
    clicked = mean_iou(mini, drawings, lambda mask: prompt_from_mask(mask, "center"))
    beside = mean_iou(mini, drawings, lambda mask: prompt_from_mask(~mask, "center"))
    boxed = mean_iou(mini, drawings, lambda mask: prompt_from_mask(mask, "box"))
    assert clicked > 0.6  # of blobs that touch, in crowds of up to twelve
    assert beside < 0.3
    assert boxed > 0.8


def test_the_pretrained_model_knows_where_no_object_is(mini, drawings):
    here, nowhere = [], []
    for image, masks, background in drawings:
        features = encode_images(mini, [image])
        for area, found in ((masks[0], here), (background, nowhere)):
            prompt = prompt_from_mask(area, "center")
            prediction = predict_masks(mini, features, [prompt], [area.shape])
            found.append(prediction.object_logits.item() > 0)
    assert np.mean(here) > 0.8 > 0.2 > np.mean(nowhere)


def test_a_right_click_scores_higher_than_a_wrong_one(mini, drawings):
    right, wrong = [], []
    for image, masks, background in drawings:
        features = encode_images(mini, [image])
        for mask in masks:
            inside = prompt_from_mask(mask, "center")
            contradiction = make_prompt(
                [tuple(prompt_from_mask(background, "center").point_coords[0])],
                [tuple(inside.point_coords[0])],
            )
            right.append(segment_with_logits(mini, features, inside, mask.shape)[1])
            wrong.append(segment_with_logits(mini, features, contradiction, mask.shape)[1])
    assert np.mean(right) > np.mean(wrong) + 0.1


def test_the_same_seed_draws_the_same_bytes_on_every_platform(tmp_path):
    for draw, seeds, expected in (
        (draw_demo_pair, [3], "1eb7023e667d9e20"),
        (lambda rng, size: draw_pretraining_image(rng, size, 0.5), range(12), "675817622e3559c9"),
    ):
        digest = hashlib.sha256()
        for array in (array for seed in seeds for array in draw(np.random.default_rng(seed), 64)):
            digest.update(array.tobytes())
        assert digest.hexdigest()[:16] == expected
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_dataset(tmp_path / name, seed=seed, train=2, val=1, size=32)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") != snapshot(tmp_path / "c")
    files = list(snapshot(tmp_path / "a").values())
    assert len(files) == len(set(files)) == 6  # no two alike: train and val never share one


def test_the_demo_learns_what_the_original_does_not_know(run_script, monkeypatch):
    monkeypatch.setattr(run_files, "ensure_checkpoint", lambda _: MINI)
    early = run_script(compare_models.main, "--demo")
    assert early.status == 2 and "python download_dataset.py --demo" in early.err
    early = run_script(test_my_image.main, "--demo")
    assert early.status == 2 and "python train_sam2_proper.py --demo" in early.err

    outcome = run_script(train_sam2_proper.main, "--demo", "--limit", 24, "--epochs", 3)
    assert outcome.status == 0, outcome.err
    assert len(split_pairs(Path("data/demo"), "train")) == 120
    assert len(split_pairs(Path("data/demo"), "val")) == 40
    assert "nothing to do" in run_script(download_dataset.main, "--demo", "--skip-checkpoint").out
    before, best = re.search(r"val IoU (\S+) before training, (\S+) at best", outcome.out).groups()
    assert float(best) > float(before) + 0.1

    outcome = run_script(compare_models.main, "--demo", "--limit", 24, "--figures", 1)
    assert re.search(rf"^  IoU +{before} +{best} ", outcome.out, re.MULTILINE), outcome.err
    outcome = run_script(test_my_image.main, "--demo")
    assert outcome.status == 0, outcome.err
    mask = read_mask(Path("output/demo/my_results/demo_000_001_mask.png"))
    assert calculate_iou(mask, read_mask(Path("data/demo/masks/val/demo_000.png"))) > 0.5
    assert (
        read_image(Path("output/demo/my_results/demo_000_001_overlay.png")).shape[:2] == mask.shape
    )
