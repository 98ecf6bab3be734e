"""Without a prompt: the model is asked for all objects at once, in training and when measured."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data

import compare_models
from finetuning.basics import distributed
from finetuning.basics.image_files import write_image
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.measuring import measure
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training_data.batches import TrainingSet
from finetuning.training_data.epoch_sampling import EpochSampler, Step
from finetuning.training_data.prompt_sampling import PromptMix, plan_prompts
from finetuning.training_data.training_masks import ALL_OBJECTS, LOSS_GRID, mask_on_grid
from train_sam2_proper import main


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    """Write two images of three and one objects, as label maps."""
    found = []
    for index, count in enumerate((3, 1)):
        image = draw_pair(index)[0]
        labels = np.zeros(image.shape[:2], np.uint8)
        for value in range(count):
            labels[10 + 25 * value : 30 + 25 * value, 20:90] = value + 1
        pair = Pair(str(index), tmp_path / f"{index}.png", tmp_path / f"{index}_m.png", True)
        write_image(pair.image, image)
        write_image(pair.mask, labels)
        found.append(pair)
    return found


@pytest.fixture
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


def test_other_steps_are_as_they_are_without_such_steps():
    def plans(share: float) -> list:
        return [
            plan_prompts(PromptMix("mixed", share), np.random.default_rng(seed))
            for seed in range(400)
        ]

    without, with_some = plans(0.0), plans(0.3)
    assert not any(plan.kind == "none" for plan in without)
    differ = [plan for plan, other in zip(with_some, without, strict=True) if plan != other]
    assert all(plan.kind == "none" and not plan.clicks for plan in differ)
    assert len(differ) == pytest.approx(120, abs=30)


def test_such_a_step_asks_for_all_objects_of_each_image(pairs):
    training_set = TrainingSet(pairs, None, 256, 0, PromptMix("mixed", none_share=1.0))
    batch = training_set[Step(1, [0, 1], 1.0, objects=[(1,), (0,)])]
    assert batch.image_of == [0, 1] and batch.plan.kind == "none"
    assert all(len(prompt.point_coords) == 0 for prompt in batch.prompts)
    for mask, pair in zip(batch.true_masks, pairs, strict=True):
        whole = np.logical_or.reduce(list(read_objects(pair)))
        grid = mask_on_grid(whole, LOSS_GRID)
        assert grid.any() and np.array_equal(mask, grid)
    assert ALL_OBJECTS > 65535  # of a label map's values


def test_images_of_a_batch_are_answered_as_each_by_itself(predictor):
    images = [draw_pair(index)[0] for index in range(3)]
    sizes = [(256, 256)] * 3
    features = encode_images(predictor, images)
    together = predict_masks(predictor, features, [make_prompt()] * 3, sizes)
    for index in range(3):
        alone = predict_masks(predictor, features.of([index]), [make_prompt()], sizes[:1])
        for one, all_of in zip(alone, together, strict=True):
            assert torch.allclose(one[0], all_of[index], atol=1e-4)


def test_all_objects_count_as_one_when_measured_without_a_prompt(pairs, predictor):
    model = Model(predictor, FeatureSource(predictor, torch.float32))
    results = measure([model], pairs, "none")
    assert [(result.index, result.object) for result in results] == [(0, 0), (1, 0)]
    whole = np.logical_or.reduce(list(read_objects(pairs[0])))
    assert results[0].area_fraction == pytest.approx(whole.mean())
    assert len(read_objects(results[0].pair)) == 1  # for pictures and clicks, too
    assert len(measure([model], pairs, "center")) == 4


def test_all_objects_are_meant_though_some_are_chosen(pairs):
    chosen = pairs[0]._replace(chosen=(1,), as_one=True)
    whole = np.logical_or.reduce(list(read_objects(pairs[0])))
    assert np.array_equal(read_objects(chosen)[0], whole)


def test_processes_share_such_a_step_by_its_images(pairs, monkeypatch):
    monkeypatch.setattr(distributed, "share", lambda items: items[:1])
    training_set = TrainingSet(pairs, None, 256, 0, PromptMix("mixed", none_share=1.0))
    (step,) = EpochSampler({0: 3, 1: 1}, 2, seed=0, objects_per_image=4)
    assert step.fraction in (0.75, 0.25)
    assert training_set[step].fraction == 0.5


def test_training_logs_what_is_reached_without_a_prompt(run_script, tmp_path, random_mini):
    write_data(tmp_path / "data", train=4, val=2)
    options = ("--model", "mini", "--checkpoint", random_mini, "--epochs", 2, "--lr", 1e-3)
    outcome = run_script(main, *options, "--none-share", 0.5)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("  without prompt 0.") == 2
    with Path("output/train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        log = list(csv.DictReader(file))
    outcome = run_script(
        compare_models.main, "--finetuned", "output/sam2_final.pt", "--prompt", "none",
        "--original", random_mini, "--figures", 1, "--clicks", 2,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    before, last = (float(log[row]["val_iou_no_prompt"]) for row in (0, -1))
    assert f"IoU             {before:.4f}      {last:.4f}" in outcome.out
