"""Thin objects are learned on a finer grid, and the guide's recipe in the images' own pixels."""

import dataclasses
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_pair

from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import Pair
from finetuning.model.checkpoints import load_checkpoint
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import Prediction, encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training.losses import actual_ious, batch_loss
from finetuning.training.options import parse_args
from finetuning.training.recipe import DEFAULT, GUIDE
from finetuning.training_data.batches import TrainingSet
from finetuning.training_data.epoch_sampling import Step
from finetuning.training_data.prompt_sampling import PromptMix, add_click, draw_prompt
from finetuning.training_data.thin_objects import (
    choose_loss_grid,
    forgiven_cells,
    lost_share,
    object_cells,
)
from finetuning.training_data.training_masks import HALF, IMAGE, cell_coverage, mask_on_grid
from train_sam2_proper import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from guides_loop import guide_loss


def draw_lines(size: tuple[int, int], width: int) -> np.ndarray:
    """Draw a cross of two slanted lines, HxW bool."""
    mask, (height, side) = np.zeros(size, np.uint8), size
    cv2.line(mask, (side // 9, height // 7), (side - 9, height - 30), 1, width)
    cv2.line(mask, (side // 8, height - 40), (side - 50, height // 6), 1, width)
    return mask == 1


def write_masks(folder: Path, masks: list[np.ndarray]) -> list[Pair]:
    """Write masks, each with a bright image of it."""
    pairs = []
    for index, mask in enumerate(masks):
        pair = Pair(str(index), folder / f"image_{index}.png", folder / f"mask_{index}.png")
        write_image(pair.mask, mask * np.uint8(255))
        write_image(pair.image, np.repeat(mask[..., None] * np.uint8(200), 3, axis=2))
        pairs.append(pair)
    return pairs


def test_the_lost_share_is_that_of_the_pixels_in_cells_covered_by_less_than_half():
    mask = np.zeros((512, 512), bool)
    mask[10:12, 20:40] = True  # 10 cells of 2x2 pixels, covered whole
    assert lost_share(cell_coverage(mask, 256)) == 0
    mask[100, 20:30] = True  # half of each cell: not lost
    mask[201, 21:23] = True  # a quarter of each cell
    assert lost_share(cell_coverage(mask, 256)) == pytest.approx(2 / 52, abs=0.01)
    assert lost_share(np.zeros((4, 4), np.uint8)) == 0


def test_prompts_of_thick_objects_lie_in_cells_covered_by_half():
    coverage = mask_on_grid(draw_pair(0, (352, 352))[1], 256)
    assert np.array_equal(object_cells(coverage), coverage >= HALF)
    assert not forgiven_cells(coverage).any()


def test_prompts_of_thin_objects_lie_in_the_cells_that_hold_half_of_their_pixels():
    coverage = mask_on_grid(draw_lines((2048, 2048), 3), 128)
    coverage[60:64, 60:64] = 255  # a thick part
    assert 0 < coverage[coverage >= HALF].sum() < coverage.sum() / 2
    cells = object_cells(coverage)
    held, least = int(coverage[cells].sum()), coverage[cells].min()
    assert least < HALF and (coverage > 0)[cells].all()
    assert held >= coverage.sum() / 2 > int(coverage[coverage > least].sum())


def test_a_click_calls_nothing_too_much_that_a_thin_object_touches():
    coverage = mask_on_grid(draw_lines((2048, 2048), 3), 256)
    cells, forgiven = object_cells(coverage), forgiven_cells(coverage)
    assert forgiven.any() and not (cells & forgiven).any()
    start, size = make_prompt([(10, 10)]), (256, 256)
    touched = coverage > 0
    click = add_click(start, touched & ~forgiven, cells, size)
    assert click.point_labels[1] == 1  # nothing is wrong: it confirms
    too_much = touched.copy()
    too_much[5:12, 120:127] = True
    click = add_click(start, too_much & ~forgiven, cells, size)
    assert click.point_labels[1] == 0 and click.point_coords[1].tolist() == [123, 8]
    missing = touched.copy()
    missing[:, :128] = False
    click = add_click(start, missing & ~forgiven, cells, size)
    assert click.point_labels[1] == 1 and click.point_coords[1, 0] < 128


@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [(1100, 2, 1024), (1100, 5, 512), (600, 2, 512), (300, 1, 256), (1100, 40, 256)],
)
def test_the_grid_is_as_fine_as_thin_objects_need_but_not_finer_than_the_images(
    tmp_path, capsys, size, width, expected
):
    pairs = write_masks(tmp_path, [draw_lines((size, size), width)] * 2)
    assert choose_loss_grid(pairs) == expected
    assert choose_loss_grid(pairs, image_size=256) == 256  # nor than the model's input
    said = capsys.readouterr().out
    assert (f"the loss uses {expected}" in said) == (expected > 256)
    assert said.count("\n") == (expected > 256)


def test_masks_without_an_object_leave_the_grid_as_it_is(tmp_path, capsys):
    pairs = write_masks(tmp_path, [np.zeros((300, 300), bool)])
    assert choose_loss_grid(pairs) == 256 and capsys.readouterr().out == ""


def test_on_a_fine_grid_the_actual_iou_compares_the_covered_parts_of_cells():
    # A line as wide as a cell lies on two rows of them: each is covered by half
    covered = torch.zeros(1, 8, 8)
    covered[0, 2:4] = 0.5
    upper, both = torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    upper[0, 2], both[0, 2:4] = True, True
    for predicted, iou in ((upper, 1), (both, 0.5), (~both, 0)):
        assert actual_ious(predicted, covered, is_fine=True).item() == pytest.approx(iou)
    whole = torch.from_numpy(draw_pair(0)[1])[None]
    for is_fine in (True, False):
        assert actual_ious(whole, whole.float(), is_fine).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["random", "mixed"])
def test_on_the_images_pixels_masks_are_exact_and_prompts_lie_in_them(tmp_path, kind):
    masks = [draw_pair(index, size)[1] for index, size in enumerate([(96, 128), (150, 110)])]
    pairs = write_masks(tmp_path, masks)
    training_set = TrainingSet(pairs, None, 256, 0, PromptMix(kind), loss_grid=IMAGE)
    training_set.prepare()
    for number in range(6):
        batch = training_set[Step(1, [1, 0], 1.0, number)]
        assert batch.prompt_sizes(256) == [(150, 110), (96, 128)]
        for prompt, true, mask in zip(batch.prompts, batch.true_masks, masks[::-1], strict=True):
            assert np.array_equal(true.numpy(), mask * np.uint8(255))
            if batch.plan.kind != "box":
                ((x, y),) = prompt.point_coords.astype(int)
                assert mask[y, x]
        (last,) = list(batch.parts(1))[1:]
        assert last.prompt_sizes(256) == [(96, 128)]


def test_on_a_finer_grid_prompts_have_their_place_too(tmp_path):
    pairs = write_masks(tmp_path, [draw_lines((1100, 1100), 3)])
    batch = TrainingSet(pairs, None, 256, 0, loss_grid=1024)[Step(1, [0], 1.0)]
    assert batch.true_masks.shape == (1, 1024, 1024)
    (x, y) = ((batch.prompts[0].point_coords[0] + 0.5) * 4).astype(int)
    assert batch.true_masks[0, y, x] >= HALF


@pytest.mark.parametrize("recipe", [DEFAULT, GUIDE])
def test_objects_of_different_sizes_are_averaged(random_mini, recipe):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    generator = torch.Generator().manual_seed(0)
    sizes = [(96, 128), (150, 110), (96, 128)]
    masks = [
        torch.from_numpy(draw_pair(i, size)[1] * np.uint8(255)) for i, size in enumerate(sizes)
    ]
    shapes = ((3, 4, 64, 64), (3, 4), (3, 1))
    whole = Prediction(*(torch.randn(shape, generator=generator) for shape in shapes))
    each = [
        batch_loss(predictor, Prediction(*(one[i : i + 1] for one in whole)), [mask], recipe)
        for i, mask in enumerate(masks)
    ]
    loss, report = batch_loss(predictor, whole, masks, recipe)
    assert loss.item() == pytest.approx(np.mean([alone.item() for alone, _ in each]))
    for name, values in report.items():
        expected = [each[i][1][name].item() for i in (0, 2, 1)]  # those of a size come together
        assert values.tolist() == pytest.approx(expected)


def test_a_step_of_the_guides_recipe_is_that_of_the_guides_own_loop(tmp_path, random_mini):
    for index, size in enumerate([(96, 128), (352, 300)]):
        image, mask = draw_pair(index, size)
        pair = write_masks(tmp_path, [mask])[0]
        write_image(pair.image, image)
        shown = TrainingSet([pair], None, 256, index, GUIDE.prompt_mix, loss_grid=IMAGE)
        batch = shown[Step(1, [0], 1.0)]
        predictor, _ = load_predictor("mini", random_mini, CPU)
        gradients = []
        for is_guide in (True, False):
            predictor.model.zero_grad()
            if is_guide:
                predictor.set_image(image)
                point = tuple(batch.prompts[0].point_coords[0].tolist())
                loss = guide_loss(predictor, mask, point, GUIDE.score_weight)
                expected = loss.item()
            else:
                features, sizes = encode_images(predictor, batch.images), batch.prompt_sizes(256)
                prediction = predict_masks(predictor, features, batch.prompts, sizes)
                loss, _ = batch_loss(predictor, prediction, batch.true_masks, GUIDE)
                assert loss.item() == pytest.approx(expected, rel=1e-4)
            loss.backward()
            gradients.append(
                {
                    name: weight.grad.clone()
                    for name, weight in predictor.model.sam_mask_decoder.named_parameters()
                    if weight.grad is not None
                }
            )
        theirs, ours = gradients
        assert theirs.keys() <= ours.keys() and len(theirs) > 50
        for name, gradient in theirs.items():
            scale = gradient.abs().max().item()
            assert torch.allclose(ours[name], gradient, rtol=1e-2, atol=1e-3 * scale + 1e-7), name


def test_the_grid_is_found_once_kept_with_the_model_and_by_resume(
    run_script, random_mini, tmp_path, monkeypatch
):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        image = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
        write_image(tmp_path / f"data/images/{split}/{split}.png", image)
        mask = draw_lines((600, 600), 2) * np.uint8(255)
        write_image(tmp_path / f"data/masks/{split}/{split}.png", mask)
    train = main, "--model", "mini", "--checkpoint", random_mini, "--image-size", 512
    first = run_script(*train, "--epochs", 1)
    assert first.status == 0 and first.out.count("the loss uses 512") == 1, first.err
    assert load_checkpoint(Path("output/sam2_best.pt"))["settings"]["loss_grid"] == 512
    resumed = run_script(*train, "--epochs", 2, "--resume")
    assert resumed.status == 0 and "thin or small objects" not in resumed.out, resumed.err
    assert load_checkpoint(Path("output/sam2_final.pt"))["settings"]["loss_grid"] == 512
    other = run_script(*train, "--epochs", 3, "--resume", "--loss-grid", 256)
    assert other.status == 2 and "--loss-grid 512, not 256" in other.err


@pytest.mark.parametrize("options", [(), ("--no-cache",), ("--prompts", "mixed")])
def test_the_guides_recipe_trains_on_images_of_several_sizes(
    run_script, random_mini, tmp_path, options
):
    for split in ("train", "val"):
        write_pair(5, tmp_path / "data/images" / split, tmp_path / "data/masks" / split)
        labels = np.zeros((90, 70), np.uint8)
        labels[10:30, 10:50], labels[40:80, 5:60] = 255, 255
        write_image(tmp_path / f"data/images/{split}/a.png", np.repeat(labels[..., None], 3, 2))
        write_image(tmp_path / f"data/masks/{split}/a.png", labels)
    outcome = run_script(
        main, "--model", "mini", "--checkpoint", random_mini, "--device", "cpu",
        "--recipe", "guide", "--epochs", 1, "--batch-size", 2, *options,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    settings = load_checkpoint(Path("output/sam2_final.pt"))["settings"]
    assert settings["loss_grid"] == "image"


def test_the_grid_is_one_of_a_few(capsys):
    assert parse_args([]).recipe.loss_grid == "auto"
    assert parse_args(["--recipe", "guide"]).recipe == dataclasses.replace(GUIDE)
    assert parse_args(["--loss-grid", "512"]).recipe.loss_grid == 512
    with pytest.raises(SystemExit):
        parse_args(["--loss-grid", "300"])
    assert "loss-grid" in capsys.readouterr().err


def test_a_box_lies_on_its_object_in_a_wide_image():
    mask = np.zeros((200, 600), bool)
    mask[50:120, 450:560] = True
    for seed in range(5):
        x1, y1, x2, y2 = draw_prompt(mask, "box", np.random.default_rng(seed)).point_coords.ravel()
        assert 425 < x1 < 475 and 535 < x2 < 590 and y1 < 70 and y2 > 100
