"""The small model is pretrained on what it will be asked, and each of its answers learns."""

import numpy as np
import pytest
import torch
from conftest import CPU

from benchmarks import pretrain_mini
from benchmarks.pretrain_mini import Phase, augment, calculate_loss, draw, draw_prompts
from finetuning.model.models import build_predictor
from finetuning.segmentation.predicting import Prediction


@pytest.fixture(scope="module")
def drawings():
    return [draw(7, index, 64, 0.5) for index in range(40)]


def test_images_have_large_blobs_crowds_and_background(drawings):
    counts = [len(drawing.masks) for drawing in drawings]
    assert min(counts) >= 1 and 8 <= max(counts) <= 12
    assert max(drawing.masks.mean((1, 2)).max() for drawing in drawings) > 0.3
    for drawing in drawings:
        assert not (drawing.masks.sum(axis=0) + drawing.background > 1).any()
    assert np.mean([drawing.background.any() for drawing in drawings]) > 0.9


def test_prompts_fit_the_masks_they_ask_for(drawings):
    kinds, on_nothing, total = set(), 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        turned = [augment(drawing, rng) for drawing in drawings[:8]]
        prompts, masks = draw_prompts(turned, rng)
        kinds |= {tuple(prompt.point_labels) for prompt in prompts}
        total += len(prompts)
        images = [drawing for drawing in turned for _ in range(pretrain_mini.PROMPTS_PER_IMAGE)]
        for prompt, mask, drawing in zip(prompts, masks, images, strict=True):
            on_nothing += not mask.any()
            points = zip(prompt.point_coords.astype(int), prompt.point_labels, strict=True)
            for (x, y), label in points:
                if not mask.any():
                    assert len(prompt.point_labels) == 1 and drawing.background[y, x]
                elif label in (0, 1):
                    assert mask[y, x] == label
    several = {(1, 1), (1, 0), (1, 1, 1), (1, 1, 0), (1, 1, 1, 1), (1, 1, 1, 0)}
    assert kinds == {(1,), (2, 3), (2, 3, 1)} | several
    assert 0.05 < on_nothing / total < 0.15


def test_every_answer_of_the_decoder_learns(drawings):
    torch.manual_seed(0)
    model = build_predictor("mini", CPU).model
    predictor = pretrain_mini.predictor_of_size(model, 64)
    pretrain_mini.training_step(predictor, drawings[:2], np.random.default_rng(0)).backward()
    for name, weight in model.sam_mask_decoder.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


def test_where_nothing_is_only_the_scores_and_the_object_learn():
    logits, scores = torch.zeros(1, 4, 8, 8), torch.full((1, 4), 0.5)
    prediction = Prediction(logits, scores, torch.zeros(1, 1))
    for answer in prediction:
        answer.requires_grad_()
    calculate_loss(prediction, torch.zeros(1, 1, 8, 8)).backward()
    assert not logits.grad.any()
    assert (scores.grad > 0).all()  # towards 0
    assert (prediction.object_logits.grad > 0).all()  # towards "no object"


def test_a_resumed_pretraining_ends_in_the_same_weights(run_script, tmp_path, monkeypatch):
    phases = (Phase(64, 0.0, pool=4, steps=2, batch_size=2), Phase(128, 0.5, 4, 1, 2))
    monkeypatch.setattr(pretrain_mini, "PHASES", phases)
    monkeypatch.setattr(pretrain_mini, "HELD_OUT", 2)
    monkeypatch.setattr(pretrain_mini, "WARMUP_STEPS", 1)

    def pretrained(name: str, *options: str) -> tuple[int, dict[str, torch.Tensor]]:
        files = ("--output", tmp_path / f"{name}.pt", "--state", tmp_path / f"{name}_state.pt")
        shared = ("--every", 1, "--workers", 1, "--device", "cpu")
        status = run_script(pretrain_mini.main, *files, *shared, *options).status
        return status, torch.load(files[1], weights_only=True)["model"]

    _, at_once = pretrained("a")

    take_step, steps = pretrain_mini.training_step, []

    def stop_at_the_second(*arguments):
        steps.append(len(steps))
        if len(steps) == 2:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(pretrain_mini, "training_step", stop_at_the_second)
    assert pretrained("b")[0] == 130
    status, resumed = pretrained("b", "--resume")
    assert status == 0 and len(steps) == 4
    assert all(torch.equal(at_once[name], weight) for name, weight in resumed.items())
