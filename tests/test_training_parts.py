"""The parts that a training and a measurement are put together from do what they are asked to."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair

import train_sam2_proper
from finetuning.basics.image_files import write_image
from finetuning.basics.run_outputs import STATE_FILE
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation import measuring
from finetuning.evaluation.measuring import Validation, mean_metrics, measure
from finetuning.model import model as model_module
from finetuning.model.checkpoints import load_checkpoint
from finetuning.model.model import Model
from finetuning.segmentation.predicting import Features
from finetuning.segmentation.prompts import prompt_from_mask
from finetuning.training import run_files
from finetuning.training.learner import Learner, make_learner, take_step
from finetuning.training.options import Machine
from finetuning.training.recipe import DEFAULT, Recipe
from finetuning.training.repeats import Training
from finetuning.training.run_files import Start, restore, run_settings


def write_pair_of_three(folder: Path, name: str) -> Pair:
    """Write an image with three objects, each 20 pixels high and 60 wide, and their label map."""
    labels = np.zeros((96, 128), np.uint8)
    for value in range(3):
        labels[10 + 25 * value : 30 + 25 * value, 20:80] = value + 1
    pair = Pair(name, folder / f"{name}.png", folder / f"{name}_mask.png", per_object=True)
    write_image(pair.image, draw_pair(0)[0])
    write_image(pair.mask, labels)
    return pair


# Measuring


@pytest.fixture
def models(monkeypatch) -> list[Model]:
    """Return two models: of an object, one finds the left half, and one the whole of its row."""
    asked = []

    def segment_together(predictor, _features, prompts, sizes, kind):
        masks = []
        for prompt, size in zip(prompts, sizes, strict=True):
            asked.append(kind)
            y = int(prompt.point_coords[0][1])
            top = y - (y - 10) % 25
            mask = np.zeros(size, bool)
            mask[top : top + 20, slice(20, 50) if predictor.finds == "half" else slice(None)] = True
            masks.append(mask)
        return masks

    nothing = Features(torch.zeros(2, 1), [])
    monkeypatch.setattr(measuring, "features_for", lambda models, _: [nothing] * len(models))
    monkeypatch.setattr(model_module, "segment_together", segment_together)
    return [
        Model(Namespace(finds=finds, device=CPU, asked=asked), Namespace(precision=torch.float32))
        for finds in ("half", "row")
    ]


def test_each_models_mask_is_measured_against_the_true_one(tmp_path, models):
    pairs = [write_pair_of_three(tmp_path, name) for name in "ab"]
    results = measure(models, pairs, "random", "single", first_index=5)
    assert [(result.index, result.object) for result in results] == [
        (index, k) for index in (5, 6) for k in range(3)
    ]
    assert models[0].predictor.asked == ["single"] * 12
    assert {result.area_fraction for result in results} == {20 * 60 / (96 * 128)}
    expected = (
        {"IoU": 1 / 2, "Precision": 1, "Recall": 1 / 2},
        {"IoU": 60 / 128, "Precision": 60 / 128, "Recall": 1},
    )
    for model, values in enumerate(expected):
        means = mean_metrics(results, model)
        assert {name: means[name] for name in values} == pytest.approx(values, abs=1e-6)
    assert all(result.gain == pytest.approx(60 / 128 - 1 / 2, abs=1e-6) for result in results)


def test_random_prompts_follow_the_seed_the_image_and_the_object(tmp_path, models):
    pairs = [write_pair_of_three(tmp_path, name) for name in "ab"]

    def points(seed: int) -> list[tuple[float, ...]]:
        results = measure(models[:1], pairs, "random", seed=seed, metrics={})
        return [tuple(result.prompt.point_coords[0]) for result in results]

    assert points(1) == points(1) != points(2)
    # The same object in another image, and objects of one image: each has a point of its own
    relative = [(x, (y - 10) % 25) for x, y in points(1)]
    assert len(set(relative)) > 3


def test_validation_asks_for_the_deepest_point_and_where_wanted_for_all_objects(
    tmp_path, monkeypatch
):
    pairs = [write_pair_of_three(tmp_path, name) for name in "ab"]
    asked = []

    def segment_made_up(_predictor, _features, prompts, sizes, _kind):
        """Find the left half of the object at a point; without one, the left third of all."""
        asked.extend(prompt.point_coords.tolist() for prompt in prompts)
        masks = []
        for prompt, size in zip(prompts, sizes, strict=True):
            mask = np.zeros(size, bool)
            tops = [10, 35, 60]
            if len(prompt.point_coords):
                assert prompt.point_labels.tolist() == [1]
                y = int(prompt.point_coords[0][1])
                tops = [y - (y - 10) % 25]
            for top in tops:
                mask[top : top + 20, slice(20, 50 if len(tops) == 1 else 40)] = True
            masks.append(mask)
        return masks

    nothing = Features(torch.zeros(2, 1), [])
    monkeypatch.setattr(model_module, "segment_together", segment_made_up)
    monkeypatch.setattr(measuring, "features_for", lambda *_: [nothing])
    fake = Namespace(device=CPU, model=torch.nn.Module())
    model = Model(fake, Namespace(precision=torch.float32))
    means = {"val_iou": pytest.approx(1 / 2), "val_dice": pytest.approx(2 / 3)}
    assert Validation(pairs).measure(model) == means
    deepest = [
        prompt_from_mask(mask, "center").point_coords.tolist()
        for pair in pairs
        for mask in read_objects(pair)
    ]
    assert asked == deepest
    asked.clear()
    found = Validation(pairs, without_prompt=True).measure(model)
    assert found == {**means, "val_iou_no_prompt": pytest.approx(1 / 3)}
    assert sorted(asked) == sorted([[], [], *deepest])


# Training


def test_steps_show_what_the_recipe_says(tmp_path, monkeypatch):
    pairs = {
        split: [write_pair_of_three(tmp_path, f"{split}_{index}") for index in range(count)]
        for split, count in (("train", 3), ("val", 1))
    }
    recipe = Recipe(
        epochs=1, batch_size=2, objects_per_image=2, prompts="inner", background_share=0.999
    )
    recipe = dataclasses.replace(recipe, none_share=0.0)
    found = []

    def note_what_is_shown(_learner, _model, loader, validation, *_):
        found.append((list(loader), validation))

    for name in ("make_learner", "speed_up"):
        monkeypatch.setattr(train_sam2_proper, name, lambda *_: None)
    monkeypatch.setattr(run_files, "start_or_resume", lambda *_: None)
    monkeypatch.setattr(Validation, "measure", lambda *_: {"val_iou": 0.5})
    monkeypatch.setattr(train_sam2_proper, "fit", note_what_is_shown)
    predictor = Namespace(model=Namespace(image_size=64), device=CPU)
    training = Training("", recipe, pairs, tmp_path)
    train_sam2_proper.train(predictor, training, Machine(torch.float32), {}, False)
    ((batches, measured_on),) = found
    assert measured_on.pairs == pairs["val"] and measured_on.kinds == ("center",)
    # Of each image two objects, and the background
    assert [batch.image_of for batch in batches] == [[0, 0, 0, 1, 1, 1], [0, 0, 0]]
    assert all(batch.plan.kind == "inner" and batch.plan.background for batch in batches)
    assert [bool(mask.any()) for mask in batches[1].true_masks] == [True, True, False]


# Going on


def small_learner(seed: int, lr: float) -> Learner:
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.sam_prompt_encoder, model.sam_mask_decoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    model.image_size = 256
    recipe = dataclasses.replace(DEFAULT, lr=lr)
    return make_learner(Namespace(model=model, device=CPU), recipe, torch.float32)


def test_a_restored_learner_takes_the_steps_that_the_saved_one_would_have_taken(tmp_path):
    def step(learner: Learner, factor: float) -> None:
        loss = sum((factor * weight - 1).square().sum() for weight in learner.weights.parameters())
        learner.optimizer.zero_grad()
        loss.backward()
        take_step(learner, 1.0)

    first, second = small_learner(0, 1e-3), small_learner(1, 1e-3)
    for factor in (1.0, -2.0, 3.0):
        step(first, factor)
    run_files.save_state(tmp_path, first, [{"epoch": 1}], {})
    path = tmp_path / STATE_FILE
    state = load_checkpoint(path)
    restore(second, state, path)
    for factor in (-1.0, 0.5):
        step(first, factor)
        step(second, factor)
    for one, other in zip(first.weights.parameters(), second.weights.parameters(), strict=True):
        assert torch.equal(one, other)
    assert second.optimizer.param_groups[0]["initial_lr"] == 1e-3
    assert state["log"] == [{"epoch": 1}]


def test_going_on_keeps_the_best_model_unless_it_is_the_original(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(run_files, "save_model", lambda path, _, row, __: saved.append(row))
    monkeypatch.setattr(run_files, "save_state", lambda *_: saved.append("state"))
    learner, recipe = small_learner(0, 1e-3), Recipe(epochs=20)
    original = {"epoch": 0, "val_iou": 0.5}
    run_files.start_or_resume(tmp_path, None, learner, recipe, None, [original], {})
    assert saved == ["state", original]
    state = {
        "model": learner.weights.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "settings": {},
    }
    for iou, kept in ((0.6, []), (0.4, [original])):
        saved.clear()
        log = [original, {"epoch": 1, "val_iou": iou}]
        run_files.start_or_resume(tmp_path, None, learner, recipe, state, log, {})
        assert saved == kept


@pytest.mark.parametrize(
    ("schedule", "done", "before", "now", "says"),
    [
        ("cosine", 20, 20, 40, "jumps from 0% to 54% of its highest"),
        ("cosine", 10, 20, 40, "jumps from 54% to 89% of its highest"),
        ("cosine", 10, 20, 15, "jumps from 54% to 27% of its highest"),
        ("cosine", 10, 20, 20, None),
        ("cosine", 0, 20, 40, None),
        ("cosine", 20, 20, 20, None),
        ("cosine", 20, 20, 10, None),  # all are done
        ("constant", 20, 20, 40, None),
        ("cosine", 20, None, 40, None),  # as damaged files say
        ("cosine", 20, "20", 40, None),
        ("cosine", 20, 10**400, 40, None),
        ("cosine", 20, -1, 40, None),
    ],
)
def test_a_learning_rate_that_jumps_as_a_run_goes_on_is_said_to(
    tmp_path, monkeypatch, capsys, schedule, done, before, now, says
):
    monkeypatch.setattr(run_files, "restore", lambda *_: None)
    recipe = Recipe(epochs=now, schedule=schedule)
    log = [{"epoch": epoch, "val_iou": float(epoch)} for epoch in range(done + 1)]
    state = {"settings": {"epochs": before}}
    monkeypatch.setattr(run_files, "save_model", lambda *_: None)
    run_files.start_or_resume(tmp_path, None, small_learner(0, 1e-3), recipe, state, log, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]
    assert len(lines) == bool(says)
    assert not says or (says in lines[0] and f"{now} epochs, not {before}" in lines[0])


def test_a_run_knows_its_data_by_every_image_and_mask_of_both_splits(tmp_path):
    pairs = {}
    for split in ("train", "val"):
        pair = Pair("a", tmp_path / f"images/{split}/a.png", tmp_path / f"masks/{split}/a.png")
        pairs[split] = [pair]
        for path in (pair.image, pair.mask):
            path.parent.mkdir(parents=True)
            path.write_bytes(b"as it was")
    checkpoint = tmp_path / "start.pt"
    checkpoint.write_bytes(b"weights")
    start = Start("mini", checkpoint, tmp_path, None, None, torch.float32, 256, [])
    before = run_settings(DEFAULT, start, pairs)
    assert before == run_settings(DEFAULT, start, pairs)
    for of_split in pairs.values():
        for path in (of_split[0].image, of_split[0].mask):
            path.write_bytes(b"changed")
            after = run_settings(DEFAULT, start, pairs)
            assert {name for name in before if before[name] != after[name]} == {"data_hash", "seen"}
            path.write_bytes(b"as it was")
    checkpoint.write_bytes(b"other weights")
    after = run_settings(DEFAULT, start, pairs)
    assert {name for name in before if before[name] != after[name]} == {"checkpoint_sha256"}
