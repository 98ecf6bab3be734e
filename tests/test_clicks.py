"""Simulated clicks go where a user would click, and their numbers are what they say."""

import csv
from argparse import Namespace
from pathlib import Path

from sam2_utils import calculate_iou

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data

from compare_models import main
from finetuning.basics.image_files import read_image
from finetuning.comparison.clicks import clicks_table, number_of_clicks, write_clicks
from finetuning.dataset.objects import Objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation import simulated_clicks
from finetuning.evaluation.measuring import Comparison, Result
from finetuning.evaluation.simulated_clicks import measure_clicks, simulate_clicks
from finetuning.model import loading
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.segmentation import predicting
from finetuning.segmentation.predicting import Prediction, encode_images
from finetuning.segmentation.prompts import corrective_click, make_prompt

FOLDER = Path("output/comparison")


@pytest.fixture
def trained(tmp_path, random_mini):
    """Write three val images and, as if trained, a model whose decoder alone is another one."""
    write_data(tmp_path / "data", train=1, val=3)
    model = load_predictor("mini", random_mini, CPU)[0].model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.sam_mask_decoder.output_hypernetworks_mlps.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    save_checkpoint(tmp_path / "output/sam2_best.pt", model)


def read_rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_noc_is_the_mean_click_that_first_reaches_the_target():
    ious = np.array(
        [
            [0.90, 0.95, 0.95, 0.95],  # at once
            [0.10, 0.20, 0.85, 0.10],  # at the third; that it gets worse again does not count
            [0.10, 0.20, 0.30, 0.84],  # never: counts as 4
            [0.10, 0.10, 0.10, 0.99],  # at the last
        ]
    )
    assert number_of_clicks(ious, 0.85) == ((1 + 3 + 4 + 4) / 4, 1)
    assert number_of_clicks(ious, 0.95) == ((2 + 4 + 4 + 4) / 4, 2)
    assert number_of_clicks(ious, 1.0) == (4, 4)
    assert number_of_clicks(ious[:, :1], 0.85) == (1, 3)


def test_the_table_shows_both_models_after_each_click():
    ious = np.array([[[0.2, 0.4], [0.4, 0.8]], [[0.6, 0.88], [0.8, 0.92]]])
    table = clicks_table(ious, True)
    assert table.header == ["clicks", "original", "fine-tuned"]
    assert table.rows == [
        ["1", "0.3000", "0.7000"],
        ["2", "0.6000", "0.9000"],
        ["NoC@85", "2.00", "2.00"],
        ["not reached", "2", "0"],
        ["NoC@90", "2.00", "2.00"],
        ["not reached", "2", "1"],
    ]
    assert "(2 images; not reached counts as 2)" in table.note
    assert "(2 objects;" in clicks_table(ious, True, "object").note
    assert table.title != clicks_table(ious, False).title


def test_the_file_has_a_row_an_object_and_click(tmp_path):
    ious = np.arange(12).reshape(2, 2, 3) / 100  # model, image, click
    write_clicks(tmp_path / "clicks.csv", [("a.png", 1), ("b.png", 2)], ious)
    assert (tmp_path / "clicks.csv").read_text(encoding="utf-8-sig").splitlines() == [
        "image,object,click,original_iou,finetuned_iou",
        "a.png,1,1,0.000000,0.060000",
        "a.png,1,2,0.010000,0.070000",
        "a.png,1,3,0.020000,0.080000",
        "b.png,2,1,0.030000,0.090000",
        "b.png,2,2,0.040000,0.100000",
        "b.png,2,3,0.050000,0.110000",
    ]


@pytest.mark.parametrize("use_mask_prompt", [True, False])
def test_the_clicks_give_what_sam2s_own_predict_gives(random_mini, use_mask_prompt):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    image, true_mask = draw_pair(3)
    features = encode_images(predictor, [image])
    simulated = simulate_clicks(predictor, features, true_mask, 4, use_mask_prompt)

    predictor.set_image(image)
    mask, logits, points, labels, ious = np.zeros_like(true_mask), None, [], [], []
    for _ in range(4):
        x, y, label = corrective_click(mask, true_mask, points)
        points, labels = [*points, (x, y)], [*labels, label]
        masks, scores, low_res_logits = predictor.predict(
            np.array(points), np.array(labels), mask_input=logits if use_mask_prompt else None
        )
        best = scores.argmax()
        mask, logits = masks[best] > 0, low_res_logits[best : best + 1]
        ious.append(calculate_iou(mask, true_mask))
    assert simulated == pytest.approx(ious, abs=1e-3)
    assert len(set(simulated)) > 1  # else the clicks would have made no difference


def test_the_mask_that_is_given_with_the_next_click_is_clamped_as_sam2_does_it(
    random_mini, monkeypatch
):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    logits = torch.linspace(-99, 99, 4 * 64 * 64).reshape(1, 4, 64, 64)
    logits[:, 2] = 99 * logits[:, 2].sin()
    answer = Prediction(logits, torch.tensor([[0.5, 0.1, 0.4, 0.2]]), torch.zeros(1, 1))
    monkeypatch.setattr(predicting, "predict_masks", lambda *_, **__: answer)
    prompt = make_prompt([(1, 1)])
    mask, score, given = predicting.segment_with_logits(predictor, None, prompt, (64, 64))
    assert torch.equal(given, logits[:, 2:3].clamp(-32, 32)) and (given.abs() == 32).any()
    assert np.array_equal(mask, logits[0, 2] > 0) and score == pytest.approx(0.4)


@pytest.mark.parametrize("use_mask_prompt", [True, False])
def test_a_perfect_mask_is_clicked_no_more(monkeypatch, use_mask_prompt):
    true_mask = draw_pair(0)[1]
    answers = [(~true_mask, 0.5, "first"), (true_mask, 0.9, "second")]
    asked = []

    def answer(_predictor, _features, prompt, size, mask_input, _kind):
        asked.append((prompt.point_labels.tolist(), size, mask_input))
        return answers[len(asked) - 1]

    monkeypatch.setattr(simulated_clicks, "segment_with_logits", answer)
    ious = simulate_clicks(None, None, true_mask, 5, use_mask_prompt)
    assert ious == pytest.approx([0, 1, 1, 1, 1])
    # All of the image is wrong after the first click: the background is the deeper of the two.
    previous = "first" if use_mask_prompt else None
    assert asked == [([1], (96, 128), None), ([1, 0], (96, 128), previous)]


def test_a_model_that_ignores_clicks_is_asked_elsewhere_until_nothing_is_left(monkeypatch):
    true_mask = np.zeros((9, 9), bool)
    true_mask[4, 2:6] = True
    asked = []

    def find_nothing(_predictor, _features, prompt, *_):
        asked.append(prompt.point_coords.tolist())
        return np.zeros_like(true_mask), 0.5, None

    monkeypatch.setattr(simulated_clicks, "segment_with_logits", find_nothing)
    assert simulate_clicks(None, None, true_mask, 20, False) == [0.0] * 20
    pixels = [[2, 4], [3, 4], [4, 4], [5, 4]]
    assert asked == [pixels[: click + 1] for click in range(4)]


def test_each_object_has_the_clicks_on_its_own_mask_by_each_model(monkeypatch):
    """The first model finds the left half of each object, the second all that it is asked for."""
    pair = Pair("a", Path("a.png"), Path("a.png"))
    sides = {0: (20, 40), 1: (60,)}  # of the objects of two images
    objects = {}
    for index, of_image in sides.items():
        masks = [np.zeros((100, 100), bool) for _ in of_image]
        for mask, side in zip(masks, of_image, strict=True):
            mask[:side, :side] = True
        objects[pair._replace(name=str(index))] = Objects((100, 100), masks, lambda mask: mask)
    asked = []

    def answer(predictor, features, prompt, size, mask_input, kind):
        side = 2 * int(prompt.point_coords[0][0] + 1)  # the first click is in its middle
        mask = np.zeros(size, bool)
        mask[:side, : side // 2 if predictor.name == "half" else side] = True
        asked.append((predictor.name, features, kind))
        return mask, 0.9, None

    models = [
        Model(Namespace(name=name, device=CPU), Namespace(precision=torch.float32))
        for name in ("half", "whole")
    ]
    results = [
        Result(index, k, of_pair, "center", None, 0.1, [])
        for index, (of_pair, masks) in enumerate(objects.items())
        for k in range(len(masks))
    ]
    monkeypatch.setattr(simulated_clicks, "read_objects", objects.get)
    monkeypatch.setattr(simulated_clicks, "features_for", lambda *_: ["of half", "of whole"])
    monkeypatch.setattr(simulated_clicks, "segment_with_logits", answer)
    ious = measure_clicks(Comparison(models, list(objects), results), 2, True, "single")
    assert ious == pytest.approx(np.array([[[0.5, 0.5]] * 3, [[1, 1]] * 3]), abs=1e-6)
    assert set(asked) == {("half", "of half", "single"), ("whole", "of whole", "single")}


def test_one_click_is_the_center_prompt_whatever_the_prompt_of_the_box(
    run_script, trained, random_mini
):
    options = ("--original", random_mini, "--figures", 0)
    assert run_script(main, *options, "--prompt", "center").status == 0
    center = read_rows("results.csv")
    outcome = run_script(main, *options, "--prompt", "box", "--clicks", 3)
    assert outcome.status == 0, outcome.err
    rows = read_rows("clicks.csv")
    expected = [(row["image"], str(click)) for row in center for click in (1, 2, 3)]
    assert [(row["image"], row["click"]) for row in rows] == expected
    for first, row in zip(rows[::3], center, strict=True):
        assert first["original_iou"] == row["original_iou"]
        assert first["finetuned_iou"] == row["finetuned_iou"]
    assert any(row["original_iou"] != row["finetuned_iou"] for row in rows)
    assert [row["prompt"] for row in read_rows("results.csv")] != [row["prompt"] for row in center]

    for click in "123":
        means = [
            np.mean([float(row[column]) for row in rows if row["click"] == click])
            for column in ("original_iou", "finetuned_iou")
        ]
        assert [click, *(f"{mean:.4f}" for mean in means)] in map(
            str.split, outcome.out.split("\n")
        )
    assert read_image(FOLDER / "clicks.png").std() > 10
    assert "clicks.csv, clicks.png" in outcome.out

    assert run_script(main, *options, "--clicks", 3, "--no-mask-prompt").status == 0
    alone = read_rows("clicks.csv")
    assert alone[::3] == rows[::3]  # the first click has no mask before it
    assert alone != rows


def test_clicks_of_an_earlier_comparison_do_not_pass_for_this_ones(
    run_script, trained, random_mini
):
    options = ("--original", random_mini, "--figures", 0)
    run_script(main, *options, "--clicks", 1)
    (FOLDER / "clicks_of_mine.csv").write_bytes(b"the user's own")
    assert run_script(main, "--finetuned", "absent.pt").status == 2
    assert {path.name for path in FOLDER.iterdir()} == {
        "report.html", "results.csv", "scatter.png", "clicks.csv", "clicks.png",
        "clicks_of_mine.csv",
    }  # fmt: skip
    outcome = run_script(main, *options)
    assert "clicks" not in outcome.out
    assert "mean IoU by simulated clicks" not in (FOLDER / "report.html").read_text("utf-8")
    assert {path.name for path in FOLDER.iterdir()} == {
        "report.html", "results.csv", "scatter.png", "clicks_of_mine.csv",
    }  # fmt: skip


def test_the_features_of_an_image_serve_all_its_clicks(
    run_script, trained, random_mini, monkeypatch
):
    loaded = []
    features = FeatureSource.features

    def count(source, image, *rest):
        loaded.append(image.stem)
        return features(source, image, *rest)

    monkeypatch.setattr(FeatureSource, "features", count)
    options = ("--original", random_mini, "--figures", 0, "--clicks", 4)
    together = run_script(main, *options)
    names = ["pair_001", "pair_002", "pair_003"]
    assert loaded == names * 2  # for the prompts, then for the clicks
    rows = read_rows("clicks.csv")

    loaded.clear()
    hashes = iter(["one", "another"])  # as if the encoders were different
    monkeypatch.setattr(loading, "hash_encoder", lambda _: next(hashes))
    assert run_script(main, *options).out == together.out
    assert sorted(loaded) == sorted(names * 4)  # twice as often
    assert read_rows("clicks.csv") == rows


def test_wrong_numbers_of_clicks_end_with_one_clear_line(run_script):
    for options, message in (
        (("--clicks", 0), "--clicks"),
        (("--clicks", 21), "below 21"),
        (("--clicks", "many"), "--clicks"),
        (("--no-mask-prompt",), "add --clicks 10"),
    ):
        outcome = run_script(main, *options)
        assert outcome.status == 2, options
        assert outcome.err.startswith("error: ") and message in outcome.err
        assert outcome.err.count("\n") == 1
