"""What training shows the model: points, rough boxes, and clicks that correct its own masks."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_pair
from sam2.utils.transforms import SAM2Transforms

from finetuning.basics.image_files import read_mask
from finetuning.dataset.pairs import Pair
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import Features, PromptedDecoder, encode_images
from finetuning.segmentation.prompts import (
    distance_inside,
    make_prompt,
    mask_box,
    random_inner_point,
    random_point,
)
from finetuning.training_data.batches import Batch, TrainingSet
from finetuning.training_data.epoch_sampling import Step
from finetuning.training_data.prompt_sampling import (
    MAX_TRAINING_CLICKS,
    PromptMix,
    PromptPlan,
    add_click,
    add_clicks,
    draw_prompt,
    plan_prompts,
)
from finetuning.training_data.training_masks import HALF, LOSS_GRID, mask_on_grid

SIZES = [(256, 256)] * 2  # in whose pixels the prompts are: the model's input


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    for index in range(2):
        write_pair(index, tmp_path, tmp_path)
    return [
        Pair(str(index), tmp_path / f"pair_00{index}.jpg", tmp_path / f"pair_00{index}.png")
        for index in range(2)
    ]


def test_inner_points_lie_in_the_mask_mostly_far_from_its_outline():
    mask = draw_pair(3)[1]
    depth = distance_inside(mask)
    mean_depths = []
    for draw in (random_point, random_inner_point):
        rng = np.random.default_rng(0)
        points = [draw(mask, rng) for _ in range(300)]
        assert all(mask[y, x] for x, y in points) and len(set(points)) > 100
        mean_depths.append(np.mean([depth[y, x] for x, y in points]))
    # By the definition of either: the mean of the depth, and of its square over that
    inside = depth[mask]
    assert mean_depths[0] == pytest.approx(inside.mean(), rel=0.1)
    assert mean_depths[1] == pytest.approx((inside**2).mean() / inside.mean(), rel=0.1)
    single = np.zeros((5, 7), bool)
    single[4, 6] = True
    assert random_inner_point(single, np.random.default_rng(0)) == (6, 4)


def test_the_guides_plan_is_one_random_point_and_mixed_plans_have_everything():
    for points in ("random", "inner"):
        plan = plan_prompts(PromptMix(points), np.random.default_rng(0))
        assert plan == PromptPlan(points, 0, gives_mask=False, background=False)
    plans = [plan_prompts(PromptMix("mixed"), np.random.default_rng(seed)) for seed in range(400)]
    assert {plan.kind for plan in plans} == {"inner", "box"}
    assert {plan.clicks for plan in plans} == set(range(MAX_TRAINING_CLICKS + 1))
    for kind in ("inner", "box"):
        of_kind = [plan for plan in plans if plan.kind == kind and plan.clicks]
        assert {plan.gives_mask for plan in of_kind} == {True, False}


def test_a_quarter_of_mixed_plans_are_boxes_a_third_have_clicks_half_of_these_a_mask():
    plans = [plan_prompts(PromptMix("mixed"), np.random.default_rng(seed)) for seed in range(1500)]
    with_clicks = [plan for plan in plans if plan.clicks]
    assert np.mean([plan.kind == "box" for plan in plans]) == pytest.approx(0.25, abs=0.04)
    assert len(with_clicks) / len(plans) == pytest.approx(0.35, abs=0.04)
    assert np.mean([plan.gives_mask for plan in with_clicks]) == pytest.approx(0.5, abs=0.06)
    for clicks in (1, 2, 3):
        share = np.mean([plan.clicks == clicks for plan in with_clicks])
        assert share == pytest.approx(1 / 3, abs=0.06)


def test_the_edges_of_a_box_move_by_a_part_of_the_side_that_they_are_apart():
    mask = np.zeros((256, 256), bool)
    mask[100:121, 50:251] = True  # 200 wide and 20 high, from corner to corner
    rng = np.random.default_rng(0)
    boxes = np.array([draw_prompt(mask, "box", rng).point_coords.ravel() for _ in range(300)])
    moved = boxes[:, [0, 1, 3]] - [50, 100, 120]  # the right edge is held by the image's border
    assert np.abs(moved).max(axis=0) == pytest.approx([40, 4, 4], rel=0.01)  # twice a tenth
    assert moved.std(axis=0) == pytest.approx([20, 2, 2], rel=0.2)


def test_a_box_is_drawn_roughly_but_around_the_object_and_inside_the_image():
    mask = mask_on_grid(draw_pair(0)[1], 256) >= HALF
    rng = np.random.default_rng(0)
    x1, y1, x2, y2 = exact = mask_box(mask)
    boxes = np.array([draw_prompt(mask, "box", rng).point_coords.ravel() for _ in range(200)])
    margin = 0.21 * max(x2 - x1, y2 - y1)
    assert (np.abs(boxes - exact) <= margin).all()
    assert len(np.unique(boxes, axis=0)) == 200
    assert np.abs(boxes.mean(axis=0) - exact).max() < margin / 5
    whole = np.ones((256, 256), bool)
    corners = np.array([draw_prompt(whole, "box", rng).point_coords for _ in range(50)])
    assert corners.min() >= 0 and corners.max() <= 255
    assert draw_prompt(whole, "box", rng).point_labels.tolist() == [2, 3]


def test_a_click_is_added_in_pixels_of_the_input():
    true_mask = np.zeros((64, 128), bool)
    true_mask[20:41, 60:81] = True
    nothing = np.zeros_like(true_mask)
    start, size = make_prompt([(10, 10)]), (256, 256)
    prompt = add_click(start, nothing, true_mask, size)
    # The middle of cell (70, 30) of 128x64, in pixels of 256x256
    assert prompt.point_coords.tolist() == [[10, 10], [140.5, 121.5]]
    assert prompt.point_labels.tolist() == [1, 1]
    too_much = true_mask.copy()
    too_much[0:15, 0:15] = True
    assert add_click(prompt, too_much, true_mask, size).point_labels.tolist() == [1, 1, 0]
    confirmed = add_click(prompt, true_mask, true_mask, size)
    assert confirmed.point_coords[2].tolist() == [140.5, 121.5] and confirmed.point_labels[2] == 1
    assert add_click(prompt, nothing, nothing, size).point_labels[2] == -1  # nothing to click
    assert start.point_labels.tolist() == [1]


def test_prompts_have_their_place_in_inputs_of_every_size(pairs):
    for kind in ("inner", "mixed"):
        for number in range(8):  # points and boxes
            step = Step(1, [0, 1], 1.0, number)
            batches = {
                size: TrainingSet(pairs, None, size, seed=0, mix=PromptMix(kind))[step]
                for size in (LOSS_GRID, 128, 512, 1024)
            }
            for size, batch in batches.items():
                for prompt, on_grid, mask in zip(
                    batch.prompts, batches[LOSS_GRID].prompts, batch.true_masks, strict=True
                ):
                    cells = (prompt.point_coords + 0.5) * LOSS_GRID / size - 0.5
                    assert np.allclose(cells, on_grid.point_coords, atol=1e-4)
                    assert prompt.point_labels.tolist() == on_grid.point_labels.tolist()
                    if batch.plan.kind == "inner":
                        ((x, y),) = cells.round().astype(int)
                        assert mask[y, x] >= HALF


@pytest.mark.parametrize("gives_mask", [True, False])
def test_clicks_correct_the_mask_that_the_model_would_choose(pairs, random_mini, gives_mask):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    batch = TrainingSet(pairs, None, 256, seed=0)[Step(1, [0, 1], 1.0)]
    batch = batch._replace(plan=PromptPlan("random", 2, gives_mask))
    features, decoder = encode_images(predictor, batch.images), PromptedDecoder(predictor.model)
    prompts, mask_inputs = add_clicks(
        predictor, features, batch.prompts, batch.true_masks, batch.plan, decoder, SIZES
    )
    assert [len(prompt.point_labels) for prompt in prompts] == [3, 3]
    assert (mask_inputs is not None) == gives_mask
    if gives_mask:
        assert mask_inputs.shape == (2, 1, 64, 64) and not mask_inputs.requires_grad
    for i, prompt in enumerate(prompts):
        assert np.array_equal(prompt.point_coords[0], batch.prompts[i].point_coords[0])
        alone = batch._replace(
            prompts=[batch.prompts[i]],
            true_masks=batch.true_masks[i : i + 1],
            images=[batch.images[i]],
        )
        one = Features(features.image_embed[i : i + 1], [f[i : i + 1] for f in features[1]])
        (expected,), _ = add_clicks(
            predictor, one, alone.prompts, alone.true_masks, alone.plan, decoder, SIZES[:1]
        )
        assert np.allclose(prompt.point_coords, expected.point_coords)
        # What is clicked as foreground is foreground
        grid = mask_on_grid(read_mask(pairs[i].mask), LOSS_GRID) >= HALF
        for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
            column, row = (int((part + 0.5) * LOSS_GRID / 256) for part in (x, y))
            assert grid[row, column] == label


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_clicks_correct_the_mask_of_three_with_the_highest_score(chosen):
    predictor = Namespace(
        model=Namespace(image_size=256, device=CPU),
        _transforms=SAM2Transforms(resolution=256, mask_threshold=0.0),
    )
    true_mask = torch.zeros(64, 64, dtype=torch.uint8)
    true_mask[10:31, 10:31] = 255
    # Each mask finds the object and has a square of its own that is too much
    logits = torch.where(true_mask > 0, 50.0, -50.0).repeat(1, 4, 1, 1)
    for mask in range(4):
        logits[0, mask, 40:51, 1 + 15 * mask : 12 + 15 * mask] = 60.0
    scores = torch.tensor([[1.0, 0.2, 0.2, 0.2]])  # the single mask is not one of the three
    scores[0, chosen] = 0.3
    asked = []

    def decode(_features, coords, labels, mask_inputs):
        asked.append((coords, labels, mask_inputs))
        return logits, scores, torch.zeros(1, 1)

    plan, start = PromptPlan("random", 2, gives_mask=True), make_prompt([(80, 80)])
    batch = Batch(None, [], [0], [start], plan, true_mask[None], 1.0)
    (prompt,), mask_inputs = add_clicks(
        predictor, None, batch.prompts, batch.true_masks, batch.plan, decode, SIZES[:1]
    )
    middle = [4 * (6 + 15 * chosen) + 1.5, 4 * 45 + 1.5]  # of its square, in pixels of the input
    assert prompt.point_coords.tolist() == [[80, 80], middle, middle]
    assert prompt.point_labels.tolist() == [1, 0, 0]
    # The second click is made of what the model answers to the first, and to its mask
    assert [labels.tolist() for _, labels, _ in asked] == [[[1]], [[1, 0]]]
    assert asked[0][2] is None
    expected = logits[:, chosen : chosen + 1].clamp(-32, 32)  # as SAM2ImagePredictor gives them
    assert torch.equal(asked[1][2], expected) and torch.equal(mask_inputs, expected)


def test_without_clicks_the_prompts_stay_as_they_are(pairs):
    batch = TrainingSet(pairs, None, 256, seed=0)[Step(1, [0], 1.0)]
    unused = Namespace(model=Namespace(image_size=256))
    shown = (batch.prompts, batch.true_masks, batch.plan)
    assert add_clicks(unused, None, *shown, None, SIZES[:1]) == (batch.prompts, None)


def test_the_same_step_has_the_same_plan_whoever_does_it(pairs):
    mixed = TrainingSet(pairs, None, 256, seed=0, mix=PromptMix("mixed"))
    plans = []
    for number in range(20):
        shares = [mixed[Step(1, indices, 0.5, number)].plan for indices in ([0], [1], [0, 1])]
        assert len(set(shares)) == 1
        plans.append(shares[0])
    assert len(set(plans)) > 3
    assert plans != [mixed[Step(2, [0], 1.0, number)].plan for number in range(20)]
    torch.manual_seed(1)
    assert plans == [mixed[Step(1, [0], 1.0, number)].plan for number in range(20)]
