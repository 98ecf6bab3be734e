"""The benchmark of the recipes: it goes on where it was stopped, and asks about background."""

import csv
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, write_data

from benchmarks import masks_needed, recipe_measures, recipe_runs
from benchmarks.masks_needed import find_needed
from benchmarks.recipe_measures import BACKGROUND_POINTS, MEASURES, measure_background
from benchmarks.recipe_runs import (
    BEST,
    COSTS,
    HELD_OUT,
    LAST,
    RUN_COLUMNS,
    TUNING,
    USES,
    VAL,
    Bench,
    Run,
    encode,
    key_of,
    read_rows,
    split_images,
    train_and_measure,
)
from benchmarks.recipes import COMPARED, main
from finetuning.basics.files import write_csv
from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.model import Model
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import Features, Prediction
from finetuning.training.recipe import DEFAULT, GUIDE


def make_bench(folder: Path, checkpoint: Path = Path("a.pt")) -> Bench:
    data, cache = folder / "data", folder / "cache"
    return Bench("mini", checkpoint, CPU, torch.float32, data, None, folder, cache, 1, 1)


def test_the_runs_of_its_table_are_known_again(tmp_path):
    bench = make_bench(tmp_path)._replace(data=Path("=data"))
    keys = [Run(name, recipe).key(bench) for name, (recipe, _) in COMPARED.items()]
    reached = dict.fromkeys((*MEASURES, *COSTS), "0.5")
    rows = [list({**key, **reached}.values()) for key in keys]
    write_csv(tmp_path / "runs.csv", RUN_COLUMNS, rows)
    known = [key_of(row) for row in read_rows(tmp_path / "runs.csv")]
    assert known == [key_of(key) for key in keys]


def test_what_is_measured_does_not_depend_on_the_number_of_training_images(tmp_path):
    write_data(tmp_path / "data", train=8, val=2)
    bench = make_bench(tmp_path)
    for measured_on, most in ((VAL, 8), (HELD_OUT, 6), (TUNING, 6)):
        planned = Run("", GUIDE, measured_on=measured_on)
        train, measured = split_images(planned, bench)
        fewer, same = split_images(planned._replace(images=3), bench)
        assert len(train) == most and fewer == train[:3] and same == measured
        assert len(measured) == 2 and not {*train} & {*measured}


def test_runs_that_share_a_training_are_trained_once_and_the_mean_of_weights_is_measured(
    tmp_path, random_mini, monkeypatch
):
    write_data(tmp_path / "data", train=3, val=2)
    bench = make_bench(tmp_path, random_mini)
    recipe = replace(GUIDE, epochs=2, lr=1e-3)
    fill_cache(bench)
    last = Run("guide", recipe, images=2)
    monkeypatch.setattr(recipe_runs, "measure_all", recipe_measures.measure_point)
    rows = train_and_measure([last, last._replace(weights=BEST)], bench)
    assert [row["weights"] for row in rows] == [LAST, BEST]
    assert float(rows[0]["one point"]) <= float(rows[1]["one point"])
    assert rows[0]["encoded images"] == rows[0]["training images"] == "2"
    (other,) = train_and_measure([last._replace(seeds=(1,))], bench)

    def no_training(*_):
        raise AssertionError

    monkeypatch.setattr(recipe_runs, "train_recipe", no_training)
    assert key_of(train_and_measure([last], bench)[0]) == key_of(rows[0])
    (mean,) = train_and_measure([last._replace(seeds=(0, 1))], bench)
    assert mean["seed"] == "0 1"
    both = float(rows[0]["training s"]) + float(other["training s"])
    assert float(mean["training s"]) == pytest.approx(both, abs=0.11)


def fill_cache(bench: Bench) -> None:
    predictor, _ = load_predictor("mini", bench.checkpoint, CPU)
    images = [pair.image for split in ("train", "val") for pair in split_pairs(bench.data, split)]
    FeatureCache(bench.cache, predictor, bench.precision).fill(images, predictor, "all")


def test_more_training_images_than_there_are_end_with_a_message(run_script, tmp_path, random_mini):
    write_data(tmp_path / "data", train=3, val=2)
    options = "--model", "mini", "--checkpoint", random_mini, "--device", "cpu"
    outcome = run_script(main, *options, "--train-images", 2, 4)
    assert outcome.status == 2 and "there are 3 training images" in outcome.err


def test_variants_of_images_are_encoded_once_and_counted(tmp_path, random_mini, monkeypatch):
    write_data(tmp_path / "data", train=2, val=1)
    bench = make_bench(tmp_path, random_mini)
    recipe = replace(DEFAULT, epochs=1, lr=1e-3, augment=3)
    runs = [Run("3 variants", recipe, (0,), use=use) for use in USES]
    encode(runs, bench)
    files = {*bench.cache.glob("*.safetensors")}
    assert len(files) == 2 * 3 + 1 + 3  # variants; the val image, and its other views
    monkeypatch.setattr(recipe_runs, "measure_all", recipe_measures.measure_point)
    rows = train_and_measure(runs, bench)
    assert {*bench.cache.glob("*.safetensors")} == files
    assert [(row["use"], row["encoded images"]) for row in rows] == [(use, "6") for use in USES]


def test_masks_needed_are_the_fewest_from_which_on_the_goal_is_reached():
    assert find_needed({45: 0.6, 90: 0.65, 180: 0.7}, 0.65) == 90
    assert find_needed({45: 0.7, 90: 0.6, 180: 0.7}, 0.65) == 180  # 45 was luck
    assert find_needed({45: 0.6}, 0.65) is None


def test_masks_needed_says_how_many_and_how_long(run_script, tmp_path, random_mini, monkeypatch):
    write_data(tmp_path / "data", train=4, val=2)
    reached = {"all": 0.6, "2": 0.5, "3": 0.7}

    def pretend(runs, bench, _):
        keys = [planned.key(bench) for planned in runs]
        return [
            {**key, "one point": reached[key["training images"]], "encoded images": "8"}
            for key in keys
        ]

    monkeypatch.setattr(masks_needed, "do_runs", pretend)
    options = "--model", "mini", "--checkpoint", random_mini, "--device", "cpu", "--epochs", 10
    seconds = "--guide-step", 5, "--encode", 3, "--step", 0.2
    outcome = run_script(masks_needed.main, *options, *seconds, "--train-images", 2, 3)
    assert outcome.status == 0, outcome.err
    assert "reaches 0.6000 with 4 masks; the default needs 3 of them" in outcome.out
    rows = read_table(Path("output/recipes/masks_needed.csv"))
    guide, default = rows[0], rows[-1]
    assert float(guide["hours"]) == pytest.approx(4 * 20 * 5 / 3600)
    assert float(default["hours"]) == pytest.approx((8 * 3 + 3 * 10 * 0.2) / 3600)
    assert float(default["times faster"]) == pytest.approx(400 / 30)
    outcome = run_script(masks_needed.main, *options, 20, "--train-images", 2, 3, 4)
    assert outcome.status == 2 and "--epochs: give one number" in outcome.err


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


class NoFeatures:
    """A source of empty features for images of 48x64 pixels."""

    precision = torch.float32

    def features(self, image: Path, mask_size: tuple[int, int], _views: tuple) -> Features:
        assert image.suffix == ".jpg" and mask_size == (48, 64)
        return Features(torch.zeros(1, 1, 1, 1), [])


def test_it_asks_on_background_alone_and_counts_the_answer_no_object(tmp_path, monkeypatch):
    asked = []

    def see_objects_on_the_right(_predictor, features, points, sizes):
        assert len(features.image_embed) == len(points) == len(sizes) == BACKGROUND_POINTS
        asked.append(np.concatenate([point.point_coords for point in points]))
        logits = np.where(asked[-1][:, :1] < 32, 0.0, 1.0)
        return Prediction(None, None, torch.from_numpy(logits))

    def make_pair(name: str, mask: np.ndarray) -> Pair:
        pair = Pair(name, tmp_path / f"{name}.jpg", tmp_path / f"{name}.png")
        write_image(pair.mask, mask.astype(np.uint8) * 255)
        return pair

    monkeypatch.setattr(recipe_measures, "predict_masks", see_objects_on_the_right)
    model = Model(Namespace(device=CPU), NoFeatures())
    is_left = np.indices((48, 64))[1] < 32
    on_right, on_left = make_pair("right", ~is_left), make_pair("left", is_left)
    full, empty = make_pair("full", is_left >= 0), make_pair("empty", is_left < 0)
    assert measure_background(model, [on_right]) == 1.0
    assert measure_background(model, [full, on_left]) == 0.0
    assert measure_background(model, [on_right, on_left, full]) == 0.5
    assert 0 <= measure_background(model, [empty]) <= 1
    assert math.isnan(measure_background(model, [full]))
    assert (asked[0] == asked[2]).all()  # the same points again
