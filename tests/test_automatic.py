"""All objects without a prompt: points on background in training, the rule, the masks, counts."""

import csv
import json
import math
from argparse import Namespace
from pathlib import Path

from sam2_utils import select_precision

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

import compare_models
import test_my_image as segmenting
import train_sam2_proper
from finetuning.basics.image_files import write_image
from finetuning.dataset.objects import Objects, read_objects
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation import object_matching
from finetuning.evaluation.object_matching import (
    Counts,
    best_score,
    iou_table,
    match,
    total,
    tune_rule,
)
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor, make_predictor
from finetuning.segmentation import automatic
from finetuning.segmentation.automatic import (
    ANY,
    RULE,
    Rule,
    SegmentedObject,
    find_objects,
    rule_of,
)
from finetuning.segmentation.predicting import Prediction
from finetuning.segmentation.prompts import make_prompt
from finetuning.training.losses import image_losses
from finetuning.training.recipe import DEFAULT
from finetuning.training_data.batches import TrainingSet
from finetuning.training_data.epoch_sampling import Step
from finetuning.training_data.prompt_sampling import PromptMix, plan_prompts

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"
OUTPUT = Path("output/my_results/folder")


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(automatic, "POINTS_PER_SIDE", 4)


@pytest.fixture
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


def square(x: int, y: int, side: int = 20, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def objects_of(*masks: np.ndarray) -> Objects:
    return Objects(masks[0].shape, masks, lambda mask: mask)


def found(mask: np.ndarray, score: float = 0.9) -> SegmentedObject:
    return SegmentedObject(make_prompt(), mask, score)


# Points on background


def test_only_steps_with_one_point_have_another_on_background():
    mix = PromptMix("mixed", background_share=0.5)
    plans = [plan_prompts(mix, np.random.default_rng(seed)) for seed in range(400)]
    of_point = [plan for plan in plans if plan.kind == "inner" and not plan.clicks]
    assert all(plan in of_point for plan in plans if plan.background)
    assert sum(plan.background for plan in plans) == pytest.approx(len(of_point) / 2, rel=0.2)
    without = [plan_prompts(PromptMix("mixed"), np.random.default_rng(seed)) for seed in range(400)]
    assert [plan._replace(background=False) for plan in plans] == without


def make_pair(folder: Path, labels: np.ndarray) -> Pair:
    pair = Pair("a", folder / "image.png", folder / "labels.png", per_object=True)
    write_image(pair.image, draw_pair(0, labels.shape)[0])
    write_image(pair.mask, labels)
    return pair


def test_a_point_on_background_lies_in_no_object_and_nothing_is_right_there(tmp_path):
    labels = np.ones((96, 128), np.uint8)
    labels[:, 64:] = 2
    labels[40:60, 50:70] = 0
    pair = make_pair(tmp_path, labels)
    training_set = TrainingSet([pair], None, 256, 0, PromptMix("inner", background_share=0.999))
    for epoch in range(1, 6):
        batch = training_set[Step(epoch, [0], 1.0, objects=[(0, 1)])]
        assert batch.image_of == [0, 0, 0] and batch.fraction == 1.0
        assert [bool(mask.any()) for mask in batch.true_masks] == [True, True, False]
        (x, y), label = batch.prompts[2].point_coords[0], batch.prompts[2].point_labels[0]
        assert label == 1 and labels[int(y * 96 / 256), int(x * 128 / 256)] == 0


def test_an_image_full_of_objects_has_no_such_point(tmp_path):
    pair = make_pair(tmp_path, np.ones((96, 128), np.uint8))
    training_set = TrainingSet([pair], None, 256, 0, PromptMix("inner", background_share=0.999))
    batch = training_set[Step(1, [0], 1.0)]
    assert batch.plan.background and batch.image_of == [0] and batch.true_masks[0].all()


def test_processes_share_a_step_with_such_points_by_all_of_its_prompts(tmp_path):
    pair = make_pair(tmp_path, square(20, 20).astype(np.uint8))
    training_set = TrainingSet([pair], None, 256, 0, PromptMix("inner", background_share=0.999))
    # Of a step of two images with four objects, this process has one image with one of them
    assert training_set[Step(1, [0], 0.25, image_fraction=0.5)].fraction == pytest.approx(2 / 6)
    assert training_set[Step(1, [0], 0.0, image_fraction=0.0)].fraction == 0


def test_on_background_only_the_scores_and_whether_there_is_an_object_learn():
    torch.manual_seed(0)
    answers = Prediction(torch.randn(1, 4, 8, 8), torch.rand(1, 4), torch.randn(1, 1))
    answers = Prediction(*(values.requires_grad_() for values in answers))
    loss, report = image_losses(answers, torch.zeros(1, 8, 8), DEFAULT, has_background=True)
    scores, logit = answers.iou_scores[0], answers.object_logits[0, 0]
    expected = 0.05 * (scores[1:].mean() + scores[0] + torch.nn.functional.softplus(logit))
    assert loss.item() == pytest.approx(expected.item())
    assert report["train_iou"].item() == float(scores[1:].max() < 0.5)
    loss.backward()
    assert not answers.mask_logits.grad.any() and (answers.iou_scores.grad > 0).all()
    assert answers.object_logits.grad.item() > 0


def test_the_object_score_learns_only_in_steps_that_show_objects_and_background():
    answers = Prediction(torch.randn(2, 4, 8, 8), torch.rand(2, 4), torch.tensor([[-2.0], [3.0]]))
    true = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    losses = [image_losses(answers, true, DEFAULT, shown)[0] for shown in (False, True)]
    learned = (losses[1] - losses[0]) / DEFAULT.score_weight
    assert learned.tolist() == pytest.approx([math.log1p(math.exp(2)), math.log1p(math.exp(3))])


# Which masks are objects


def test_each_object_counts_once_and_for_the_best_scored_mask():
    objects = objects_of(square(10, 10), square(60, 60))
    masks = [square(11, 10), square(10, 10), square(62, 60), square(10, 60)]
    assert match([found(mask) for mask in masks], objects).tolist() == [True, False, True, False]
    assert match([found(square(20, 20))], objects).tolist() == [False]  # IoU below a half
    assert match([], objects).tolist() == []
    nothing = Objects((100, 100), [], lambda mask: mask)
    assert match([found(square(1, 1))], nothing).tolist() == [False]


def test_a_mask_is_an_object_from_an_iou_of_a_half_on():
    half = square(10, 10)
    half[10:20, 10:30] = False
    less = half.copy()
    less[20, 10] = False
    objects = objects_of(square(10, 10))
    assert match([found(half)], objects).tolist() == [True]
    assert match([found(less)], objects).tolist() == [False]
    # Nor is a mask that has all of the object and much beside it
    assert match([found(square(0, 0, side=50))], objects).tolist() == [False]
    ious = iou_table([found(half), found(square(0, 0, side=40))], objects_of(half, square(10, 10)))
    assert ious == pytest.approx(np.array([[1, 0.5], [200 / 1600, 400 / 1600]]))


def test_a_rule_is_chosen_on_some_of_the_images_drawn_by_seed(monkeypatch):
    read = []

    def note(pair):
        read.append(pair)
        return None, objects_of(square(10, 10))

    monkeypatch.setattr(object_matching, "read_pair", note)
    monkeypatch.setattr(object_matching, "find_objects", lambda *_: [found(square(10, 10))])
    drawn = []
    for seed in (1, 1, 2):
        read.clear()
        tune_rule(Model(Namespace(), Namespace(precision=None)), list(range(60)), seed)
        drawn.append(list(read))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(pairs)) == object_matching.MOST_TUNED for pairs in drawn)


def test_each_model_finds_objects_by_its_own_rule(tmp_path, monkeypatch):
    pair = make_pair(tmp_path, square(10, 10).astype(np.uint8))
    masks = [found(square(10, 10), 0.9), found(square(60, 60), 0.5)]
    monkeypatch.setattr(
        object_matching,
        "find_objects",
        lambda _, __, ___, rule: [one for one in masks if one.score >= rule.min_score],
    )
    model = Model(Namespace(), Namespace(precision=torch.float32))
    rules = [Rule(min_score=0.4), Rule(min_score=0.8)]
    counts = object_matching.count_objects_found([model, model], rules, [pair])
    assert counts == [[Counts(objects=1, found=2, matched=1)], [Counts(1, 1, 1)]]


def test_precision_recall_and_f1():
    counts = Counts(objects=4, found=5, matched=3)
    assert (counts.precision, counts.recall) == (0.6, 0.75)
    assert counts.f1 == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert Counts(0, 0, 0).f1 == Counts(0, 0, 0).precision == Counts(0, 0, 0).recall == 1
    assert Counts(0, 3, 0).f1 == Counts(3, 0, 0).f1 == 0
    assert total([counts, Counts(1, 0, 0)]) == Counts(5, 5, 3)


def test_the_lowest_score_is_the_one_with_the_highest_f1():
    scores, are_objects = np.array([0.4, 0.9, 0.6, 0.8]), np.array([False, True, True, False])
    f1, score = best_score(scores, are_objects, count=2)
    assert f1 == pytest.approx(4 / 5) and 0.4 < score < 0.6
    assert best_score(scores, ~are_objects, count=2)[1] < 0.4
    assert best_score(np.array([]), np.array([], bool), 3) == (0.0, 1.0)


def test_a_rule_is_chosen_by_what_is_found_in_training_images(tmp_path, predictor, monkeypatch):
    labels = square(10, 10).astype(np.uint8) + 2 * square(60, 60)
    pairs = [make_pair(tmp_path, labels)] * 3
    specks = [found(square(x, 90, side=3), 0.7) for x in (0, 10, 20)]
    masks = [found(square(10, 10), 0.8), *specks, found(square(60, 60), 0.6)]
    monkeypatch.setattr(object_matching, "find_objects", lambda *given: masks)
    rule = tune_rule(Model(predictor, FeatureSource(predictor, torch.float32)), pairs, seed=0)
    assert rule == ANY._replace(min_score=pytest.approx(0.4), min_area=pytest.approx(0.01))


def test_masks_are_those_of_sam2s_own_generator(monkeypatch):
    monkeypatch.setattr(automatic, "POINTS_PER_SIDE", 8)
    image, rule = draw_pair(3)[0], Rule(0.5, 0.5, 0.01, multimask=True)
    predictor = load_predictor("mini", MINI, CPU)[0]
    ours = find_objects(predictor, torch.float32, image, rule)
    generator = SAM2AutomaticMaskGenerator(
        predictor.model, points_per_side=8, pred_iou_thresh=0.5, stability_score_thresh=0.5
    )
    generator.predictor = make_predictor(predictor.model)  # SAM 2 hard-codes sizes of 1024 pixels
    theirs = [one for one in generator.generate(image) if one["area"] >= 0.01 * 96 * 128]
    assert len(ours) == len(theirs) > 1
    theirs.sort(key=lambda one: -one["predicted_iou"])
    for one, other in zip(ours, theirs, strict=True):
        assert one.score == pytest.approx(other["predicted_iou"], abs=1e-6)
        assert np.array_equal(one.mask, other["segmentation"])
        assert one.prompt.point_coords.tolist() == other["point_coords"]


def test_masks_without_pixels_are_no_objects(predictor, monkeypatch):
    empty = {"area": 0, "predicted_iou": 0.9, "point_coords": [[1.0, 1.0]]}
    monkeypatch.setattr(SAM2AutomaticMaskGenerator, "generate", lambda self, image: [empty])
    assert find_objects(predictor, torch.float32, draw_pair(0)[0], ANY) == []


def test_a_file_may_hold_anything_where_its_rule_should_be():
    good = ANY._asdict()
    assert rule_of({RULE: good}) == ANY
    odd = (None, [], "0.5", {}, {**good, "more": 1.0}, {**good, "min_score": "0.5"})
    odd += ({**good, "min_area": float("nan")}, {**good, "min_score": 2.0})
    odd += ({**good, "multimask": 1},)
    assert not any(rule_of({RULE: values}) for values in odd)


# The scripts


def make_folder(folder: Path) -> Path:
    for index in (0, 1):
        write_image(folder / f"{index}.png", draw_pair(index)[0])
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def segment(run_script, checkpoint: Path, *options: object):
    return run_script(
        segmenting.main, "--image", "folder", "--checkpoint", checkpoint, "--auto", "objects",
        *options,
    )  # fmt: skip


def test_all_objects_of_a_folder_and_a_row_where_there_are_none(
    run_script, tmp_path, random_mini, predictor
):
    make_folder(tmp_path / "folder")
    outcome = segment(run_script, random_mini, "--min-score", 0.2, "--save", "masks,coco,cutouts")
    assert outcome.status == 0, outcome.err
    rows = read_rows(OUTPUT / "results.csv")
    rule = ANY._replace(min_score=0.2)
    for index in ("0", "1"):
        image, precision = draw_pair(int(index))[0], select_precision("auto", CPU)
        expected = find_objects(predictor, precision, image, rule)
        of_image = [row for row in rows if row["image"] == f"{index}.png"]
        assert [row["object"] for row in of_image] == [str(n + 1) for n in range(len(expected))]
        assert [row["score"] for row in of_image] == [f"{one.score:.4f}" for one in expected]
    again = segment(run_script, random_mini, "--min-score", 0.2, "--save", "masks,coco,cutouts")
    assert "2 had results already" in again.out

    another = segment(run_script, random_mini, "--min-score", 0.99)
    assert another.status == 2 and "another way of finding objects" in another.err
    outcome = segment(
        run_script, random_mini, "--min-score", 0.99, "--overwrite", "--save", "coco,masks"
    )
    assert outcome.status == 0, outcome.err
    rows = read_rows(OUTPUT / "results.csv")
    assert [(row["object"], row["area"]) for row in rows] == [("", "0")] * 2
    assert (OUTPUT / "0_mask.png").is_file() and not list(OUTPUT.glob("*cutout*"))
    coco = json.loads((OUTPUT / "coco.json").read_text(encoding="utf-8"))
    assert len(coco["images"]) == 2 and not coco["annotations"]


def test_a_model_without_a_rule_is_said_to_have_sam2s_own(run_script, tmp_path, random_mini):
    make_folder(tmp_path / "folder")
    outcome = segment(run_script, random_mini)
    assert (
        outcome.status == 0 and "warning: " in outcome.out and "--choose-thresholds" in outcome.out
    )
    assert "a score above 0.8 " in outcome.out


def test_the_rule_in_a_models_file_is_taken_and_options_change_it(
    run_script, tmp_path, random_mini
):
    make_folder(tmp_path / "folder")
    weights = load_checkpoint(random_mini)["model"]
    rule = ANY._replace(min_score=0.31, min_area=0.25)
    save_checkpoint(tmp_path / "own.pt", weights, **{RULE: rule._asdict()})
    outcome = segment(run_script, tmp_path / "own.pt")
    assert "a score above 0.31 and an area of 25.00%" in outcome.out
    assert "warning" not in outcome.out
    areas = [int(row["area"]) for row in read_rows(OUTPUT / "results.csv")]
    assert all(area >= 0.25 * 96 * 128 for area in areas if area)
    outcome = segment(run_script, tmp_path / "own.pt", "--min-area", 0.5, "--overwrite")
    assert "a score above 0.31 and an area of 50.00%" in outcome.out


def test_thresholds_are_of_that_way_only(run_script, tmp_path, random_mini):
    make_folder(tmp_path / "folder")
    outcome = run_script(
        segmenting.main, "--image", "folder", "--auto", "whole", "--min-score", 0.5
    )
    assert outcome.status == 2 and "--auto objects" in outcome.err


def test_a_rule_is_kept_in_the_best_model_where_asked_for_and_a_comparison_takes_it(
    run_script, tmp_path, random_mini
):
    data, best = write_data(tmp_path / "data", train=4, val=2), Path("output/sam2_best.pt")
    options = ("--model", "mini", "--checkpoint", random_mini, "--epochs", 1)
    options = (*options, "--background-share", 0.9)
    outcome = run_script(train_sam2_proper.main, *options)
    assert outcome.status == 0, outcome.err
    without = load_checkpoint(best)
    assert RULE not in without and "--auto objects keeps masks" not in outcome.out
    # It is no setting of the run, which may have ended before it is asked for
    outcome = run_script(train_sam2_proper.main, *options, "--choose-thresholds", "--resume")
    assert outcome.status == 0, outcome.err
    with_rule = load_checkpoint(best)
    assert with_rule["settings"] == without["settings"]
    assert with_rule["epoch"] == without["epoch"]
    rule = rule_of(with_rule)
    assert rule is not None and "--auto objects keeps masks" in outcome.out

    outcome = run_script(compare_models.main, "--auto", "--original", random_mini, "--figures", 0)
    assert outcome.status == 0, outcome.err
    predictor = load_predictor(None, best, CPU)[0]
    rows = read_rows(Path("output/comparison/auto.csv"))
    for row, pair in zip(rows[1::2], split_pairs(data, "val"), strict=True):
        image, precision = segmenting.read_image(pair.image), select_precision("auto", CPU)
        masks = find_objects(predictor, precision, image, rule)
        matched = int(match(masks, read_objects(pair)).sum())
        assert row["model"] == "finetuned" and row["image"] == pair.image.name
        assert (row["objects"], row["found"], row["matched"]) == (
            "1",
            str(len(masks)),
            str(matched),
        )
    assert (
        f"{rule.min_score:.3f}" in outcome.out
        and "objects found without a prompt (2 objects in 2 images)" in outcome.out
    )
    assert "Objects found without a prompt" in Path("output/comparison/report.html").read_text(
        encoding="utf-8"
    )


def test_folds_have_a_rule_each(run_script, tmp_path):
    outcome = run_script(compare_models.main, "--auto", "--folds", tmp_path)
    assert outcome.status == 2 and "--folds" in outcome.err
