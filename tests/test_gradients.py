"""Gradients arrive at every weight that learns, in every precision, and at a bearable length."""

import csv
import dataclasses
from argparse import Namespace
from pathlib import Path

from sam2_utils import autocast

import pytest
import torch
from conftest import CPU, write_data

import train_sam2_proper
from finetuning.dataset.pairs import split_pairs
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.training.learner import (
    Learner,
    learning_rate_factor,
    make_learner,
    objects_at_once,
    set_learning_rate,
    take_step,
)
from finetuning.training.losses import batch_loss
from finetuning.training.options import parse_args
from finetuning.training.recipe import DEFAULT
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler, Step
from finetuning.training_data.prompt_sampling import PromptPlan, add_clicks

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def gradients_of_a_step(checkpoint, batch, plan, precision) -> dict[str, torch.Tensor]:
    """Return the gradient of each weight after a step as train_one_epoch does it, or zero."""
    predictor, _ = load_predictor("mini", checkpoint, CPU)
    learner = make_learner(predictor, DEFAULT, precision)
    batch = batch._replace(plan=plan)
    with autocast(CPU, precision):
        features = encode_images(predictor, batch.images).to(CPU, torch.float32)
        shown = (batch.prompts, batch.true_masks, batch.plan)
        prompts, mask_inputs = add_clicks(
            predictor, features, *shown, learner.decoder, batch.prompt_sizes(256)
        )
        prediction = predict_masks(
            predictor, features, prompts, [(256, 256)] * 2, learner.decoder, mask_inputs
        )
    # As in a step with points on background, where the object score learns, too
    loss, _ = batch_loss(predictor, prediction, batch.true_masks, DEFAULT, has_background=True)
    loss.backward()
    return {
        name: torch.zeros(1) if weight.grad is None else weight.grad
        for name, weight in learner.weights.named_parameters()
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_reach_the_same_weights_with_clicks_and_without(tmp_path, random_mini, precision):
    pairs = split_pairs(write_data(tmp_path / "data", train=2), "train")
    batch = TrainingSet(pairs, None, 256, 0)[Step(1, [0, 1], 1.0)]
    reached = []
    for clicks in (0, 2):
        plan = PromptPlan("inner", clicks)
        gradients = gradients_of_a_step(random_mini, batch, plan, precision)
        reached.append({name for name, gradient in gradients.items() if gradient.any()})
    without, with_clicks = reached
    # Clicks may be in the background, too
    assert with_clicks - without <= {"prompt_encoder.point_embeddings.0.weight"}
    assert without <= with_clicks
    assert len(without) > 0.8 * len(gradients)
    # And the single mask, which other tools take, and the object score are among them
    for name in (
        "output_hypernetworks_mlps.0.layers.0.weight",
        "pred_obj_score_head.layers.0.weight",
    ):
        assert f"mask_decoder.{name}" in without


def test_long_gradients_are_scaled_down_and_short_ones_are_not(random_mini):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    learner = make_learner(predictor, dataclasses.replace(DEFAULT, lr=0.0), torch.float32)
    weights = list(learner.weights.parameters())
    directions = [torch.ones_like(weight) for weight in weights]
    before = torch.cat([direction.flatten() for direction in directions])
    for scale, max_norm, clipped in ((1.0, 2.0, 1.0), (0.001, 2.0, 0.0), (1.0, 0.0, 0.0)):
        loss = sum(
            (scale * direction * weight).sum()
            for direction, weight in zip(directions, weights, strict=True)
        )
        learner.optimizer.zero_grad()
        loss.backward()
        assert take_step(learner, max_norm) == clipped
        after = torch.cat([weight.grad.flatten() for weight in weights])
        expected = before * (max_norm / before.norm()) if clipped else scale * before
        assert torch.allclose(after, expected, rtol=1e-4)


def small_learner(**changes) -> Learner:
    """Return what learns of a model of two layers, with changes to the default recipe."""
    model = torch.nn.Module()
    model.sam_prompt_encoder, model.sam_mask_decoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    model.image_size = 256
    recipe = dataclasses.replace(DEFAULT, **changes)
    return make_learner(Namespace(model=model, device=CPU), recipe, torch.float32)


def test_without_gradients_weights_decay_by_the_rate_times_the_recipes_weight_decay():
    learner = small_learner(lr=0.1, weight_decay=0.5)
    weights = list(learner.weights.parameters())
    before = [weight.detach().clone() for weight in weights]
    sum(0 * weight.sum() for weight in weights).backward()
    take_step(learner, 1.0)
    for weight, was in zip(weights, before, strict=True):
        assert torch.allclose(weight, 0.95 * was)


def test_each_group_of_weights_follows_the_schedule_from_its_own_highest_rate():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": [weight], "initial_lr": rate}
        for weight, rate in zip(weights, (0.4, 0.1), strict=True)
    ]
    learner = Learner(None, torch.optim.SGD(groups, lr=1.0), None, torch.float32, None)
    for step in (0, 50, 99):
        set_learning_rate(learner, step, 100, "cosine")
        factor = learning_rate_factor(step, 100, "cosine")
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.1 * factor])


def test_the_share_of_clipped_steps_is_in_the_log(run_script, tmp_path, random_mini):
    write_data(tmp_path / "data")
    shares = []
    for max_norm in (1e-6, 1e6):
        outcome = run_script(
            train_sam2_proper.main, "--model", "mini", "--checkpoint", random_mini, "--epochs", 1,
            "--max-grad-norm", max_norm,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        with Path("output/train_log.csv").open(encoding="utf-8-sig", newline="") as file:
            shares.append(float(list(csv.DictReader(file))[1]["clipped"]))
    assert shares == [1.0, 0.0]


def test_the_guides_gradients_are_not_clipped():
    assert parse_args(["--recipe", "guide"]).max_grad_norm == 0
    assert parse_args([]).max_grad_norm > 0


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_in_parts_has_the_gradients_of_the_whole(tmp_path, random_mini, at_once):
    pairs = split_pairs(write_data(tmp_path / "data", train=3), "train")
    recipe = dataclasses.replace(DEFAULT, lr=0.0, epochs=1, max_grad_norm=0.0, none_share=0.0)
    gradients, reports = [], []
    for most in (at_once, 100):
        predictor, _ = load_predictor("mini", random_mini, CPU)
        training_set = TrainingSet(pairs, None, 256, 0)
        loader = make_loader(training_set, EpochSampler(dict.fromkeys(range(3), 1), 3, 0), CPU)
        learner = make_learner(predictor, recipe, torch.float32)._replace(at_once=most)
        reports.append(train_sam2_proper.train_one_epoch(predictor, loader, learner, recipe, 1))
        of_weights = [w.grad for w in learner.weights.parameters() if w.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for gradient in of_weights]))
    in_parts, whole = gradients
    assert len(whole) == len(in_parts) and (in_parts - whole).norm() < 1e-4 * whole.norm()
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)


def test_a_cpu_computes_full_size_objects_one_by_one_and_a_gpu_all_at_once(monkeypatch):
    def asked(size: int, device: str = "cpu", **changes) -> int:
        predictor = Namespace(device=torch.device(device), model=Namespace(image_size=size))
        return objects_at_once(predictor, dataclasses.replace(DEFAULT, **changes))

    assert [asked(size) for size in (2048, 1024, 768, 512, 256)] == [1, 1, 1, 4, 16]
    # A loss on a fine grid needs memory for each
    assert [asked(256, loss_grid=grid) for grid in (256, 512, 1024, "image")] == [16, 4, 1, 1]
    assert asked(1024, "cuda") == asked(1024, "mps") == asked(1024, train_encoder="full") > 10**6
    monkeypatch.setenv("WORLD_SIZE", "2")  # as many parts as the other process has
    assert asked(1024) > 10**6
