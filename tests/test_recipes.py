"""The benchmark of the recipes: it goes on where it was stopped, and asks about background."""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, write_data

from benchmarks import recipe_measures, recipe_runs
from benchmarks.recipe_measures import BACKGROUND_POINTS, MEASURES, measure_background
from benchmarks.recipe_runs import (
    BEST,
    COSTS,
    HELD_OUT,
    LAST,
    RUN_COLUMNS,
    TUNING,
    VAL,
    Bench,
    Run,
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
from finetuning.training.recipe import GUIDE


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
