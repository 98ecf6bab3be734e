"""Validation finds what compare_models.py measures, and reads its masks once."""

import copy
import re
from pathlib import Path

from sam2_utils import NotFiniteError, UserError

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair

from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import Pair
from finetuning.evaluation import measuring
from finetuning.evaluation.measuring import (
    AT_ONCE_ON_CPU,
    Validation,
    find_in_empty,
    mean_metrics,
    measure,
)
from finetuning.evaluation.metrics import LOGGED
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor

# (H,W), and how many objects: more images than are decoded at once, and more objects in one of them
IMAGES = [
    ((96, 128), 3), ((120, 80), 1), ((90, 90), 0), ((300, 352), 6), ((64, 64), 2), ((50, 170), 1),
    ((128, 96), 4),
]  # fmt: skip


def write_blocks(folder: Path, index: int, size: tuple[int, int], count: int) -> Pair:
    """Write an image of so many bright blocks beside each other, and its label map."""
    image, labels = draw_pair(index, size)[0], np.zeros(size, np.uint8)
    height, width = size
    for k in range(count):
        left, right = (width * (8 * k + edge) // (8 * count) for edge in (1, 6))
        top = height // 8 + k
        labels[top : top + height // 3, left:right] = k + 1
    image[labels > 0] += np.array([150, 100, 120], np.uint8)
    pair = Pair(str(index), folder / f"{index}.png", folder / f"{index}_m.png", per_object=True)
    write_image(pair.image, image)
    write_image(pair.mask, labels)
    return pair


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    return [write_blocks(tmp_path, index, *facts) for index, facts in enumerate(IMAGES)]


@pytest.fixture
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.fixture
def model(predictor) -> Model:
    return Model(predictor, FeatureSource(predictor, torch.float32))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_means_are_those_of_the_comparison_to_the_last_digit(pairs, predictor, tmp_path, precision):
    assert sum(count > 0 for _, count in IMAGES) > AT_ONCE_ON_CPU
    assert max(count for _, count in IMAGES) > AT_ONCE_ON_CPU
    cache = FeatureCache(tmp_path / "cache", predictor, precision)
    cache.fill([pair.image for pair in pairs[:4]], predictor, "val")  # the others are encoded
    model = Model(predictor, FeatureSource(predictor, precision, cache))
    expected = {}
    for kind in ("center", "none"):
        # Beside another model, as the comparison does
        results = measure([model, model], pairs, kind)
        assert len({result.metrics[0]["IoU"] for result in results}) > 3
        expected[kind] = mean_metrics(results)
    with_point = {"val_iou": expected["center"]["IoU"], "val_dice": expected["center"]["Dice"]}
    without = {"val_iou_no_prompt": expected["none"]["IoU"]}
    assert Validation(pairs).measure(model) == with_point
    both = Validation(pairs, without_prompt=True)
    for _ in range(2):
        assert both.measure(model) == with_point | without


def test_chosen_objects_are_measured_and_without_a_prompt_all_of_their_images(pairs, model):
    chosen = [pairs[0]._replace(chosen=(2,)), pairs[3]._replace(chosen=(1, 4))]
    found = Validation(chosen, without_prompt=True).measure(model)
    for kind, name in (("center", "val_iou"), ("none", "val_iou_no_prompt")):
        results = measure([model], chosen, kind, metrics=LOGGED)
        assert found[name] == mean_metrics(results)["IoU"]


@pytest.mark.parametrize("without_prompt", [True, False])
def test_masks_are_read_once_however_often_it_measures(pairs, model, monkeypatch, without_prompt):
    read, read_objects = [], measuring.read_objects

    def note_what_is_read(pair):
        read.append(pair.name)
        return read_objects(pair)

    monkeypatch.setattr(measuring, "read_objects", note_what_is_read)
    measured = Validation(pairs, without_prompt)
    assert read == []
    first = measured.measure(model)
    assert len(set(read)) == len(read) == len(pairs)
    # Nor are they needed any more
    for pair in pairs:
        pair.mask.unlink()
    assert measured.measure(model) == first
    assert len(read) == len(pairs)


def test_a_model_that_has_learnt_is_measured_as_it_is_now(pairs, predictor, model):
    measured = Validation(pairs)
    before = measured.measure(model)
    with torch.no_grad():
        for weight in predictor.model.sam_mask_decoder.parameters():
            weight.mul_(1.5)
    after = measured.measure(model)
    assert after != before
    expected = mean_metrics(measure([model], pairs, "center", metrics=LOGGED))
    assert after["val_iou"] == expected["IoU"]


def test_a_mask_of_another_size_than_its_image_is_refused(pairs, predictor, model, tmp_path):
    cache = FeatureCache(tmp_path / "cache", predictor, torch.float32)
    write_image(pairs[4].image, draw_pair(4, (96, 64))[0])
    cache.fill([pair.image for pair in pairs], predictor, "val")
    for source in (model.source, FeatureSource(predictor, torch.float32, cache)):
        with pytest.raises(UserError, match=r"4\.png is 64x96 .* is 64x64; a mask must have its"):
            Validation(pairs).measure(Model(predictor, source))


def test_without_any_object_there_is_nothing_to_measure(pairs, model):
    for without_prompt in (True, False):
        with pytest.raises(UserError, match="every validation mask is empty"):
            Validation([pairs[2]], without_prompt).measure(model)


def test_images_without_an_object_are_counted(pairs, model, capsys):
    Validation(pairs).measure(model)
    assert capsys.readouterr().out == ("skipped 1 of 7 validation images: their masks are empty\n")
    Validation(pairs[:2]).measure(model)
    assert capsys.readouterr().out == ""


def test_a_long_validation_of_many_objects_says_what_it_costs_once(
    pairs, model, capsys, monkeypatch
):
    monkeypatch.setattr(measuring, "SLOW", 0)
    measured = Validation(pairs[:2])
    measured.measure(model)
    line = r"validation takes \d+ s each time: 4 prompts in 2 images\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    measured.measure(model)
    Validation(pairs[1:2]).measure(model)  # one object in each image
    assert capsys.readouterr().out == ""


def test_the_bar_counts_objects_where_an_image_has_several(pairs, model, capsys):
    measure([model], pairs[:2])
    assert "/4 [" in capsys.readouterr().err
    measure([model], pairs[:2], "none")
    assert "/2 [" in capsys.readouterr().err


def test_what_is_found_where_nothing_is_is_counted(pairs, predictor, model):
    with torch.no_grad():  # masks of the first model are all empty, of the second all full
        empty, full = (load_and_shift(model, logit) for logit in (-1e4, 1e4))
    assert find_in_empty([empty, full, empty], [pairs[2], pairs[2]]) == [[0, 1, 0]] * 2


def load_and_shift(model: Model, logit: float) -> Model:
    """Return a copy of a model whose mask logits are all near `logit`."""
    predictor = copy.deepcopy(model.predictor)
    for mlp in predictor.model.sam_mask_decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight.zero_()
        mlp.layers[-1].bias.fill_(logit)
    upscaling = predictor.model.sam_mask_decoder.output_upscaling
    upscaling[3].weight.zero_()
    upscaling[3].bias.fill_(1.0)
    return Model(predictor, model.source)


def test_scores_that_are_not_finite_are_an_error(pairs, predictor, model):
    with torch.no_grad():
        for weight in predictor.model.sam_mask_decoder.iou_prediction_head.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="not finite"):
        Validation(pairs).measure(model)
