"""The benchmark of the recipes: it goes on where it was stopped, and asks about background."""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from conftest import CPU

import benchmarks.recipes
from benchmarks.recipes import (
    BACKGROUND_POINTS,
    COMPARED,
    MEASURES,
    RUN_COLUMNS,
    VAL,
    Bench,
    Run,
    key_of,
    measure_background,
    read_rows,
)
from finetuning.basics.files import write_csv
from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import Pair
from finetuning.model.model import Model
from finetuning.segmentation.predicting import Features, Prediction


def test_the_runs_of_its_table_are_known_again(tmp_path):
    bench = Bench("mini", Path("a.pt"), CPU, torch.float32, Path("=data"), None, tmp_path, 1, 1)
    keys = [Run(name, recipe, VAL).key(bench) for name, (recipe, _) in COMPARED.items()]
    reached = dict.fromkeys((*MEASURES, "seconds"), "0.5")
    rows = [list({**key, **reached}.values()) for key in keys]
    write_csv(tmp_path / "runs.csv", RUN_COLUMNS, rows)
    known = [key_of(row) for row in read_rows(tmp_path / "runs.csv")]
    assert known == [key_of(key) for key in keys]


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

    monkeypatch.setattr(benchmarks.recipes, "predict_masks", see_objects_on_the_right)
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
