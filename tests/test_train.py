"""Training follows the guide, learns, saves what SAM 2 itself loads, and can be resumed."""

import csv
import dataclasses
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, write_data
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.build_sam import build_sam2, build_sam2_video_predictor

import train_sam2_proper
from finetuning.basics.image_files import read_image, write_image
from finetuning.dataset.pairs import split_pairs
from finetuning.evaluation.measuring import Validation
from finetuning.model.models import MODELS, load_predictor
from finetuning.segmentation.predicting import Features, Prediction
from finetuning.segmentation.prompts import make_prompt
from finetuning.training import training_log
from finetuning.training.learner import Learner, learning_rate_factor, make_learner
from finetuning.training.losses import batch_loss, image_losses
from finetuning.training.options import parse_args
from finetuning.training.recipe import GUIDE, Recipe
from finetuning.training.training_log import draw_learning_curve
from finetuning.training_data.batches import Batch, TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler
from finetuning.training_data.prompt_sampling import PromptMix, PromptPlan
from train_sam2_proper import main, train_one_epoch

# Points in objects and on background reach all of the prompt encoder and mask decoder but these:
# other kinds of prompt, the convolutions that set_image applies without gradients, and what makes
# the masks beside the single one and the first of the three.
UNUSED = (
    "sam_prompt_encoder.point_embeddings.0",
    "sam_prompt_encoder.point_embeddings.2",
    "sam_prompt_encoder.point_embeddings.3",
    "sam_prompt_encoder.mask_downscaling",
    "sam_prompt_encoder.pe_layer",
    "sam_mask_decoder.conv_s",
    "sam_mask_decoder.output_hypernetworks_mlps.2",
    "sam_mask_decoder.output_hypernetworks_mlps.3",
)
# Points in objects alone do not reach the object score, the guide's recipe not the single mask.
UNUSED_BY_OBJECTS = (*UNUSED, "sam_mask_decoder.pred_obj_score_head")
UNUSED_BY_THE_GUIDE = (*UNUSED_BY_OBJECTS, "sam_mask_decoder.output_hypernetworks_mlps.0")
TRAINED = ("sam_prompt_encoder.", "sam_mask_decoder.")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def guide(**changes) -> Recipe:
    """Return the guide's recipe for an epoch, with changes."""
    return dataclasses.replace(GUIDE, epochs=1, seed=0, **changes)


def run_training(run_script, random_mini, *options):
    return run_script(
        main, "--model", "mini", "--checkpoint", random_mini, "--device", "cpu", *options
    )


def loss_of(mask_logits, iou_scores, true_mask, recipe, single=None):
    """Return image_losses of the three masks, beside a single mask that is 0 unless given."""
    single = torch.zeros_like(mask_logits[:1]) if single is None else single[None]
    prediction = Prediction(
        torch.cat([single, mask_logits]),
        torch.cat([torch.zeros(1), iou_scores]),
        torch.zeros(1),
    )
    return image_losses(prediction, true_mask, recipe)


def read_log(output: Path = Path("output")) -> list[dict[str, str]]:
    with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_the_loss_is_the_guides_literal_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 30, generator=generator, requires_grad=True)
    scores = torch.rand(3, generator=generator, requires_grad=True)
    true = torch.rand(40, 30, generator=generator) > 0.5
    loss, report = loss_of(logits, scores, true.float(), GUIDE)

    probability, truth = torch.sigmoid(logits[0]), true.float()
    seg_loss = -(truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
    predicted = (logits > 0).float()
    intersection = (predicted * truth).sum((1, 2))
    union = predicted.sum((1, 2)) + truth.sum() - intersection
    iou = intersection / (union + 1e-6)
    score_loss = (scores - iou).abs().mean()
    expected = seg_loss + 0.05 * score_loss
    assert torch.allclose(loss, expected, atol=1e-6)
    assert report["seg_loss"].item() == pytest.approx(seg_loss.item(), abs=1e-6)
    assert report["score_loss"].item() == pytest.approx(score_loss.item(), abs=1e-6)
    assert report["train_iou"].item() == pytest.approx(iou[scores.argmax()].item())

    gradients = torch.autograd.grad(loss, [logits, scores], retain_graph=True)
    literal_gradients = torch.autograd.grad(expected, [logits, scores])
    for ours, literal in zip(gradients, literal_gradients, strict=True):
        assert torch.allclose(ours, literal, atol=1e-7)


def test_the_guides_recipe_is_the_guides():
    args = parse_args(["--recipe", "guide"])
    assert (args.batch_size, args.lr, args.weight_decay, args.epochs) == (1, 1e-5, 4e-5, 20)
    assert (args.prompts, args.mask_loss, args.dice_weight) == ("random", "first", 0)
    assert args.none_share == args.background_share == 0
    assert [learning_rate_factor(step, 100, args.schedule) for step in (0, 50, 99)] == [1] * 3
    assert parse_args(["--recipe", "guide", "--dice-weight", "1"]).dice_weight == 1


def test_the_learning_rate_warms_up_and_falls_to_zero_along_a_cosine():
    rates = [learning_rate_factor(step, 1000, "cosine") for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1, abs=0.02) and 40 <= peak <= 60
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:])[::-1]
    assert rates[525] == pytest.approx(0.5, abs=0.01)
    assert 0 <= rates[-1] < 1e-5
    assert 0 < learning_rate_factor(0, 1, "cosine") <= 1


class MadeUpLoader:
    """Three steps an epoch, each on one image whose features are given."""

    def __init__(self, fractions: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        self.sampler, self.fractions = Namespace(epoch=0), fractions

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        features = Features(torch.zeros(1, 1), [])
        prompts, masks = [make_prompt([(1, 1)])], torch.full((1, 4, 4), 255, dtype=torch.uint8)
        for fraction in self.fractions:
            yield Batch(features, [], [0], prompts, PromptPlan(), masks, fraction)


def made_up_epoch(monkeypatch, loader: MadeUpLoader, take_step, epoch: int) -> dict[str, float]:
    """Train for one of four epochs on losses of 1, 2 and 3; return what is reported."""
    losses, weight = iter((1.0, 2.0, 3.0)), torch.nn.Parameter(torch.ones(1))

    def batch_loss(*_):
        of_object = next(losses) * weight
        report = of_object.detach()
        return of_object.mean(), {"loss": report, "train_iou": report / 10}

    monkeypatch.setattr(train_sam2_proper, "take_step", take_step)
    monkeypatch.setattr(train_sam2_proper, "predict_masks", lambda *_: None)
    monkeypatch.setattr(train_sam2_proper, "batch_loss", batch_loss)
    optimizer = torch.optim.SGD([{"params": [weight], "initial_lr": 0.5}], lr=0.5)
    predictor = Namespace(model=Namespace(image_size=256), device=CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learner = Learner(None, optimizer, scaler, torch.float32, None)
    return train_one_epoch(predictor, loader, learner, Recipe(epochs=4), epoch)


def test_a_process_counts_by_its_share_of_a_step_and_not_at_all_where_it_stands_in(monkeypatch):
    taken = []

    def note_the_gradient(learner, max_norm) -> torch.Tensor:
        (weight,) = learner.optimizer.param_groups[0]["params"]
        taken.append((weight.grad.item(), max_norm))
        return torch.tensor(float(len(taken) == 3))

    loader = MadeUpLoader((0.25, 0.0, 1.0))
    report = made_up_epoch(monkeypatch, loader, note_the_gradient, epoch=2)
    assert taken == [(0.25, 1.0), (0.0, 1.0), (3.0, 1.0)] and loader.sampler.epoch == 2
    assert report == {"loss": 2.0, "train_iou": pytest.approx(0.2), "clipped": 0.5}


def test_the_cosine_goes_on_from_epoch_to_epoch(monkeypatch):
    rates = []

    def note_the_rate(learner, *_) -> torch.Tensor:
        rates.append(learner.optimizer.param_groups[0]["lr"])
        return torch.tensor(0.0)

    for epoch in range(1, 5):
        made_up_epoch(monkeypatch, MadeUpLoader(), note_the_rate, epoch)
    # Of 12 steps, 0.6 warm up
    expected = [1 / 1.6, *((1 + math.cos(math.pi * (s - 0.6) / 11.4)) / 2 for s in range(1, 12))]
    assert rates == pytest.approx([0.5 * factor for factor in expected])


def test_the_dice_loss_weighs_small_objects_as_large_ones():
    """Leaving out an object of 2% or of 50% of the image costs about as much."""
    recipe = guide(dice_weight=1.0, score_weight=0.0)
    nothing, scores = torch.full((3, 100, 100), -20.0), torch.zeros(3)
    small, large = torch.zeros(2, 100, 100)
    small[:2], large[:50] = 1, 1
    losses = [loss_of(nothing, scores, true, recipe)[0].item() for true in (small, large)]
    without = [
        loss_of(nothing, scores, true, guide(score_weight=0.0))[0].item() for true in (small, large)
    ]
    dice = np.subtract(losses, without)
    assert dice == pytest.approx([1, 1], abs=0.01)
    perfect = torch.where(large > 0, 20.0, -20.0).expand(3, -1, -1)
    assert loss_of(perfect, scores, large, recipe)[0].item() == pytest.approx(0, abs=1e-4)


def test_the_dice_loss_counts_as_often_as_its_weight_says():
    true = torch.zeros(10, 10)
    true[:5, :5] = 1
    unsure, scores = torch.zeros(3, 10, 10), torch.zeros(3)  # a probability of 1/2 everywhere
    dice = 1 - (2 * 12.5 + 1) / (50 + 25 + 1)
    for weight in (0.0, 0.5, 1.0, 3.0):
        recipe = guide(dice_weight=weight, score_weight=0.0)
        expected = math.log(2) + weight * dice
        assert loss_of(unsure, scores, true, recipe)[0].item() == pytest.approx(expected)
        recipe = dataclasses.replace(recipe, single_weight=1.0)
        assert loss_of(unsure, scores, true, recipe)[0].item() == pytest.approx(2 * expected)


def test_the_score_loss_is_the_mean_error_of_the_three_scores_by_its_weight():
    true = torch.zeros(10, 10)
    true[:5, :5] = 1
    right, half = torch.where(true > 0, 50.0, -50.0), torch.full((10, 10), -50.0)
    half[:5, :10] = 50.0
    logits, scores = torch.stack([right, half, -right]), torch.tensor([0.9, 0.9, 0.3])
    mean_error = (0.1 + 0.4 + 0.3) / 3  # their IoUs are 1, 1/2 and 0
    loss, report = loss_of(logits, scores, true, guide(score_weight=2.0))
    assert report["score_loss"].item() == pytest.approx(mean_error, abs=1e-6)
    assert loss.item() == pytest.approx(2 * mean_error, abs=1e-6)


def test_a_cell_that_is_covered_by_half_or_less_is_no_part_of_the_true_mask():
    true = torch.zeros(10, 10)
    true[:, :4], true[:, 4], true[:, 5] = 1.0, 0.6, 0.5
    logits = torch.where(true > 0.55, 50.0, -50.0).expand(3, -1, -1)
    report = loss_of(logits, torch.ones(3), true, guide())[1]
    assert report["train_iou"].item() == pytest.approx(1, abs=1e-6)
    assert report["score_loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_iou_in_the_log_is_that_of_the_mask_with_the_highest_score():
    true = torch.zeros(10, 10)
    true[:5, :5] = 1
    quarter, half = torch.full((10, 10), -1.0), torch.full((10, 10), -1.0)
    quarter[:], half[:5] = 1.0, 1.0
    logits = torch.stack([2 * true - 1, quarter, half])
    for scores, iou in (([0.1, 0.2, 0.3], 0.5), ([0.2, 0.3, 0.1], 0.25), ([0.9, 0.3, 0.1], 1.0)):
        report = loss_of(logits, torch.tensor(scores), true, guide())[1]
        assert report["train_iou"].item() == pytest.approx(iou, abs=1e-6)


def loss_of_batch(true_masks: torch.Tensor, logits: tuple[float, ...] = (-1.0, 0.0, 2.0)):
    """Return batch_loss of objects whose masks are 8 cells a side, each of one logit throughout."""
    prediction = Prediction(
        torch.stack([torch.full((4, 8, 8), logit) for logit in logits]),
        torch.tensor([[float(logit > 0)] * 4 for logit in logits]),
        torch.zeros(len(logits), 1),
    )
    transforms = Namespace(
        postprocess_masks=lambda logits, size: torch.nn.functional.interpolate(logits, size)
    )
    return batch_loss(
        Namespace(_transforms=transforms), prediction, true_masks, guide(score_weight=0.0)
    )


@pytest.mark.parametrize("size", [8, 4, 16])  # of the true masks: the model's, smaller, larger
def test_the_loss_of_a_batch_is_the_mean_of_its_objects(size):
    loss, report = loss_of_batch(torch.full((3, size, size), 255, dtype=torch.uint8))
    each = [math.log(1 + math.exp(-logit)) for logit in (-1.0, 0.0, 2.0)]
    assert report["loss"].tolist() == pytest.approx(each)
    assert report["train_iou"].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert loss.item() == pytest.approx(sum(each) / 3)


def test_a_cell_counts_by_the_part_of_it_that_is_covered():
    covered = torch.tensor([51, 127, 128], dtype=torch.uint8)  # of 255
    loss, report = loss_of_batch(covered[:, None, None].expand(3, 8, 8), (2.0, 2.0, 2.0))
    each = [math.log(1 + math.exp(2)) - 2 * part / 255 for part in (51, 127, 128)]
    assert report["loss"].tolist() == pytest.approx(each)
    assert loss.item() == pytest.approx(sum(each) / 3)
    # For the IoU, it is the object's from a half on
    assert report["train_iou"].tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_the_mask_loss_is_of_the_first_the_best_or_all_masks():
    true = torch.zeros(20, 20)
    true[5:15, 5:15] = 1
    right = torch.where(true > 0, 4.0, -4.0)
    logits, scores = torch.stack([-right, right, 0 * right]), torch.zeros(3)
    losses = {
        name: loss_of(logits, scores, true, guide(mask_loss=name, score_weight=0.0))[0]
        for name in ("first", "best", "all")
    }
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    each = torch.stack([bce(of_mask, true) for of_mask in logits])
    assert torch.allclose(losses["first"], each[0])
    assert torch.allclose(losses["best"], each[1])
    assert torch.allclose(losses["all"], each.mean())


def test_the_single_mask_learns_its_mask_and_its_score():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 20, generator=generator)
    single = torch.randn(20, 20, generator=generator)
    true, scores = torch.zeros(20, 20), torch.zeros(3)
    true[5:15, 5:15] = 1
    without = loss_of(logits, scores, true, guide(), single)[0]
    recipe = guide(single_weight=2.0, dice_weight=1.0)
    three = loss_of(logits, scores, true, guide(dice_weight=1.0), single)[0]
    loss, report = loss_of(logits, scores, true, recipe, single)

    bce = torch.nn.functional.binary_cross_entropy_with_logits
    probability, predicted = single.sigmoid(), single > 0
    overlap = (probability * true).sum()
    dice = 1 - (2 * overlap + 1) / (probability.sum() + true.sum() + 1)
    iou = (predicted & (true > 0)).sum() / ((predicted | (true > 0)).sum() + 1e-6)
    expected = three + 2.0 * (bce(single, true) + dice + 0.05 * iou)
    assert torch.allclose(loss, expected, atol=1e-6)
    # What is reported of the three stays theirs
    assert torch.allclose(report["seg_loss"] + 0.05 * report["score_loss"], three, atol=1e-6)
    assert without < three


@pytest.mark.parametrize(
    ("single_weight", "background_share", "unused"),
    [(0.0, 0.0, UNUSED_BY_THE_GUIDE), (1.0, 0.0, UNUSED_BY_OBJECTS), (1.0, 0.999, UNUSED)],
)
def test_a_step_moves_all_that_the_prompt_uses_and_nothing_else_by_a_bit(
    data, random_mini, single_weight, background_share, unused
):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    before = {name: weight.clone() for name, weight in predictor.model.state_dict().items()}
    # At this rate and decay, what gets a zero gradient decays by less than float32 can hold.
    recipe = guide(lr=1e-5, weight_decay=4e-5, single_weight=single_weight)
    learner = make_learner(predictor, recipe, torch.float32)
    mix = PromptMix(background_share=background_share)
    training_set = TrainingSet(split_pairs(data, "train", 1), None, 256, 0, mix)
    loader = make_loader(training_set, EpochSampler({0: 1}, 1, seed=0), CPU)
    train_one_epoch(predictor, loader, learner, recipe, 1)

    assert not predictor.model.training
    for name, weight in predictor.model.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == (name.startswith(TRAINED) and not name.startswith(unused)), name


def test_training_raises_the_iou_far_above_where_it_started(run_script, data, random_mini):
    outcome = run_training(run_script, random_mini, "--epochs", 15, "--lr", 2e-3)
    assert outcome.status == 0
    log = read_log()
    first, last = log[1], log[-1]
    assert float(last["train_iou"]) > float(first["train_iou"]) + 0.3
    assert float(last["seg_loss"]) < 0.5 * float(first["seg_loss"])
    assert [int(row["epoch"]) for row in log] == list(range(16))


def test_the_learning_curve_has_a_line_of_its_own_color_for_each_column(tmp_path):
    log = [{"epoch": n, "loss": 0.5, "train_iou": 0.6, "val_iou": 0.5 + n / 10} for n in range(3)]
    orange, green = (255, 127, 14), (44, 160, 44)
    for column, expected in (("loss", [True, False]), ("val_iou_no_prompt", [True, True])):
        draw_learning_curve(tmp_path / "curve.png", [{column: 0.3, **row} for row in log])
        curve = read_image(tmp_path / "curve.png")
        assert curve.shape == (400, 1000, 3)
        assert [bool((curve == color).all(axis=2).any()) for color in (orange, green)] == expected


def test_results_are_written_and_load_in_sam2s_own_builders(run_script, data, random_mini):
    outcome = run_training(run_script, random_mini, "--epochs", 2, "--lr", 1e-3)
    assert outcome.status == 0, outcome.err
    assert {path.name for path in Path("output").iterdir()} - {".lock"} == {
        "sam2_best.pt", "sam2_final.pt", "train_log.csv", "learning_curve.png", "train_state.pt",
        "augmentation.png", "cache",
    }  # fmt: skip
    spec = MODELS["mini"]
    options = {"device": "cpu", "hydra_overrides_extra": list(spec.overrides)}
    model = build_sam2(spec.config, "output/sam2_best.pt", **options)
    build_sam2_video_predictor(spec.config, "output/sam2_best.pt", **options)
    SAM2AutomaticMaskGenerator(model)
    saved = weights_of(Path("output/sam2_best.pt"))
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    original = weights_of(random_mini)
    for name, weight in saved.items():
        assert name.startswith(TRAINED) or torch.equal(weight, original[name]), name

    best = torch.load("output/sam2_best.pt", weights_only=True)
    log = read_log()
    assert best["model_name"] == "mini"
    assert best["val_iou"] == max(float(row["val_iou"]) for row in log)
    assert f"{best['val_iou']:.4f} at best" in outcome.out


def test_a_batch_trains_on_images_of_different_sizes(run_script, data, random_mini):
    write_image(data / "images/train/wide.png", np.full((50, 170, 3), 90, np.uint8))
    mask = np.zeros((50, 170), np.uint8)
    mask[10:40, 20:100] = 255
    write_image(data / "masks/train/wide.png", mask)
    outcome = run_training(run_script, random_mini, "--epochs", 1, "--batch-size", 3)
    assert outcome.status == 0, outcome.err
    assert len(read_log()) == 2  # with epoch 0, before training


def test_empty_masks_are_skipped_and_counted(run_script, data, random_mini):
    for split in ("train", "val"):
        mask = next((data / "masks" / split).iterdir())
        write_image(mask, np.zeros((96, 128), np.uint8))
    outcome = run_training(run_script, random_mini, "--epochs", 1)
    assert outcome.status == 0
    assert "skipped 1 of 4 training images" in outcome.out
    for mask in (data / "masks" / "val").iterdir():
        write_image(mask, np.zeros((96, 128), np.uint8))
    outcome = run_training(run_script, random_mini, "--epochs", 1)
    assert outcome.status == 2 and "every validation mask is empty" in outcome.err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_file(
    run_script, data, random_mini, monkeypatch
):
    assert run_training(run_script, random_mini, "--epochs", 1).status == 0
    best = Path("output/sam2_best.pt").read_bytes()
    whole_loss = train_sam2_proper.batch_loss

    def broken_loss(*arguments):
        loss, report = whole_loss(*arguments)
        return loss * float("nan"), {**report, "loss": report["loss"] * float("nan")}

    monkeypatch.setattr(train_sam2_proper, "batch_loss", broken_loss)
    outcome = run_training(run_script, random_mini, "--epochs", 2, "--resume")
    assert outcome.status == 2
    assert "the loss became nan in epoch 2" in outcome.err and "--lr" in outcome.err
    assert Path("output/sam2_best.pt").read_bytes() == best
    state = torch.load("output/train_state.pt", weights_only=True)
    assert state["log"][-1]["epoch"] == 1
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_a_resumed_run_ends_in_the_same_weights_as_an_uninterrupted_one(
    run_script, data, random_mini, monkeypatch
):
    options = ("--lr", 1e-3, "--batch-size", 2)
    run_training(run_script, random_mini, *options, "--epochs", 3, "--output", "whole")

    measure = Validation.measure
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # after the second epoch's training, before it is saved
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(Validation, "measure", interrupt)
    outcome = run_training(run_script, random_mini, *options, "--epochs", 3)
    assert outcome.status == 130 and "add --resume" in outcome.out
    assert len(read_log()) == 2  # with epoch 0, before training
    assert not Path("output/sam2_final.pt").exists()
    monkeypatch.setattr(Validation, "measure", measure)
    outcome = run_training(run_script, random_mini, *options, "--epochs", 3, "--resume")
    assert outcome.status == 0 and "continuing after epoch 1" in outcome.out

    for name in ("sam2_best.pt", "sam2_final.pt"):
        whole, resumed = weights_of(Path("whole") / name), weights_of(Path("output") / name)
        assert all(torch.equal(weight, resumed[key]) for key, weight in whole.items())
    timeless = [
        [{key: row[key] for key in row if key != "seconds"} for row in read_log(Path(output))]
        for output in ("whole", "output")
    ]
    assert timeless[0] == timeless[1]


def test_a_run_stopped_in_its_first_epoch_can_be_resumed(
    run_script, data, random_mini, monkeypatch
):
    run_training(run_script, random_mini, "--epochs", 1, "--lr", 1e-3)  # an older run
    monkeypatch.setattr(
        train_sam2_proper, "train_one_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    outcome = run_training(run_script, random_mini, "--epochs", 1)
    assert outcome.status == 130 and "add --resume" in outcome.out
    monkeypatch.undo()
    monkeypatch.chdir(data.parent)
    outcome = run_training(run_script, random_mini, "--epochs", 1, "--resume")
    assert outcome.status == 0 and "continuing after epoch 0" in outcome.out
    assert len(read_log()) == 2  # with epoch 0, before training


def test_a_log_that_is_open_elsewhere_does_not_stop_the_training(
    run_script, data, random_mini, monkeypatch
):
    def locked(path, *_):  # as Excel does on Windows
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(training_log, "write_csv", locked)
    outcome = run_training(run_script, random_mini, "--epochs", 1)
    assert outcome.status == 0 and "train_log.csv cannot be written" in outcome.out
    assert Path("output/sam2_final.pt").is_file()


def test_the_command_to_go_on_with_names_this_runs_files(run_script, data, random_mini):
    outcome = run_training(run_script, random_mini, "--epochs", 1, "--output", "runs/a")
    expected = f"python compare_models.py --finetuned {Path('runs/a/sam2_best.pt')}"
    assert f"next: {expected}" in outcome.out


def test_a_run_does_not_overwrite_what_it_starts_from(run_script, data, random_mini):
    assert run_training(run_script, random_mini, "--epochs", 1).status == 0
    best = Path("output/sam2_best.pt")
    content = best.read_bytes()
    outcome = run_training(run_script, best, "--epochs", 1)
    assert outcome.status == 2 and "would be overwritten; use another --output" in outcome.err
    assert best.read_bytes() == content
    assert run_training(run_script, best, "--epochs", 1, "--output", "more").status == 0


def test_resuming_another_kind_of_run_is_refused_with_the_difference(run_script, data, random_mini):
    outcome = run_training(run_script, random_mini, "--resume")
    assert outcome.status == 2 and "nothing to resume" in outcome.err
    run_training(run_script, random_mini, "--epochs", 1)
    other = shutil.copy(Path("output/sam2_best.pt"), "other.pt")
    for options, message in (
        (("--lr", 1e-4), "--lr 0.0003, not 0.0001"),
        (("--seed", 1), "--seed 42, not 1"),
        (("--batch-size", 2), "--batch-size 4, not 2"),
        (("--recipe", "guide"), "--batch-size 4, not 1"),
        (("--checkpoint", other), "--checkpoint"),
    ):
        outcome = run_training(run_script, random_mini, "--resume", *options)
        assert outcome.status == 2 and message in outcome.err
    image = next((data / "images/train").iterdir())
    content = image.read_bytes()
    image.write_bytes(content + b" ")
    outcome = run_training(run_script, random_mini, "--resume")
    assert outcome.status == 2 and "other images or masks than data has now" in outcome.err
    image.write_bytes(content)
    outcome = run_training(run_script, random_mini, "--resume", "--epochs", 1)
    assert outcome.status == 0 and "for more, raise --epochs" in outcome.out


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run_script, data, random_mini):
    for output, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_training(run_script, random_mini, "--epochs", 1, "--seed", seed, "--output", output)
    a, b, c = (weights_of(Path(output) / "sam2_final.pt") for output in "abc")
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    assert not all(torch.equal(weight, c[name]) for name, weight in a.items())


def test_mistakes_end_with_one_clear_line(run_script, data, random_mini, tmp_path):
    for options, message in (
        (("--epochs", 0), "--epochs"),
        (("--lr", -1), "--lr"),
        (("--lr", "nan"), "--lr"),
        (("--seed", 10**30), "--seed"),
        (("--batch-size", "two"), "--batch-size"),
        (("--weight-decay", -1), "--weight-decay"),
        (("--model", "huge"), "--model"),
        (("--device", "abacus"), "--device abacus is unknown"),
        (("--precision", "float16"), "--precision float16 needs CUDA"),
        (("--checkpoint", "absent.pt"), "no such checkpoint"),
        (("--data", "nowhere"), "python download_dataset.py --data nowhere"),
    ):
        outcome = run_training(run_script, random_mini, *options)
        assert outcome.status == 2, options
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert message in outcome.err
    assert not Path("output").exists()


def test_bfloat16_trains_on_a_cpu(run_script, data, random_mini):
    outcome = run_training(
        run_script, random_mini, "--epochs", 1, "--precision", "bfloat16", "--limit", 2
    )
    assert outcome.status == 0 and "in bfloat16" in outcome.out
    assert np.isfinite(float(read_log()[1]["loss"]))
