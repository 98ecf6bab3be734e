"""The metrics say what their definitions say, which are written out here once more, with SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from finetuning.basics.cropped_masks import CroppedMask, crop_mask, crop_together
from finetuning.evaluation.metrics import METRICS, PIXEL_METRICS
from finetuning.evaluation.metrics import METRICS as METRICS_OF_EVALUATION

SIZES = [(1, 1), (1, 9), (7, 2), (13, 17), (24, 31), (90, 120), (200, 150)]  # (H,W)
SYMMETRIC = ("IoU", "Dice", "Boundary IoU", "HD95")
many = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@st.composite
def masks(draw, size: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("empty", "full", "pixel", "box", "border", "noise", "blobs")))
    mask = np.full(size, kind == "full")
    rows, columns = (np.sort(rng.integers(0, length, 2)) for length in size)
    if kind == "pixel":
        mask[rows[0], columns[0]] = True
    if kind == "box":
        mask[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    if kind == "border":
        mask[rows[0] :, : columns[1] + 1] = True
    if kind == "noise":
        mask = rng.random(size) < rng.uniform(0.01, 0.99)
    if kind == "blobs":
        smooth = ndimage.gaussian_filter(rng.random(size), max(size) / 15)
        mask = smooth > np.quantile(smooth, rng.uniform(0.3, 0.95))
    return mask if draw(st.booleans()) else np.asfortranarray(mask)


pairs = st.sampled_from(SIZES).flatmap(lambda size: st.tuples(masks(size), masks(size)))


def reference_hd95(predicted: np.ndarray, true: np.ndarray) -> float:
    if not (predicted.any() and true.any()):
        height, width = true.shape
        return (height**2 + width**2) ** 0.5 if (predicted | true).any() else 0.0
    cross = ndimage.generate_binary_structure(2, 1)
    first, second = (
        mask & ~ndimage.binary_erosion(mask, cross, border_value=0) for mask in (predicted, true)
    )
    return max(
        np.percentile(ndimage.distance_transform_edt(~second)[first], 95),
        np.percentile(ndimage.distance_transform_edt(~first)[second], 95),
    )


def reference_boundary_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    height, width = true.shape
    d = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    square = np.ones((2 * d + 1, 2 * d + 1), bool)
    first, second = (
        mask & ~ndimage.binary_erosion(mask, square, border_value=0) for mask in (predicted, true)
    )
    return (first & second).sum() / max(1, (first | second).sum())


def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(y, x) for y, row in enumerate(mask.tolist()) for x, value in enumerate(row) if value}


@many
@given(pairs)
def test_overlap_is_that_of_sets_of_pixels(pair):
    first, second = (pixels(mask) for mask in pair)
    both = len(first & second)
    expected = {
        "IoU": both / max(1, len(first | second)),
        "Dice": 2 * both / max(1, len(first) + len(second)),
        "Precision": both / max(1, len(first)),
        "Recall": both / max(1, len(second)),
    }
    assert {name: METRICS[name](*pair) for name in expected} == pytest.approx(expected, abs=2e-6)


@many
@given(pairs)
def test_distances_are_those_of_scipy(pair):
    expected = {"HD95": reference_hd95(*pair), "Boundary IoU": reference_boundary_iou(*pair)}
    found = {name: METRICS[name](*pair) for name in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=2e-6)


@many
@given(pairs)
def test_swapping_the_masks_swaps_precision_and_recall_alone(pair):
    found = {name: metric(*pair) for name, metric in METRICS.items()}
    swapped = {name: metric(*pair[::-1]) for name, metric in METRICS.items()}
    for name in SYMMETRIC:
        assert found[name] == swapped[name]
    assert (found["Precision"], found["Recall"]) == (swapped["Recall"], swapped["Precision"])


@many
@given(pairs)
def test_equal_masks_are_perfect_and_no_metric_leaves_its_range(pair):
    for name, metric in METRICS.items():
        lowest, highest = (0, np.hypot(*pair[0].shape)) if name in PIXEL_METRICS else (0, 1)
        best = 0 if name in PIXEL_METRICS else 1
        assert lowest <= metric(*pair) <= highest
        if pair[0].any():
            assert metric(pair[0], pair[0].copy()) == pytest.approx(best, abs=2e-6)


@many
@given(pairs, st.integers(0, 40), st.integers(0, 40))
def test_it_does_not_matter_where_in_the_image_an_object_is(pair, top, left):
    margins = ((top, 40 - top), (left, 40 - left))
    here = [np.pad(mask, margins) for mask in pair]
    elsewhere = [np.pad(mask, ((40, 0), (0, 40))) for mask in pair]
    for metric in METRICS.values():
        assert metric(*here) == metric(*elsewhere)


def test_a_model_that_finds_nothing_is_as_far_off_as_can_be():
    empty, true = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    true[3:9, 5:20] = True
    assert METRICS["HD95"](empty, true) == METRICS["HD95"](true, empty) == 50
    assert METRICS["HD95"](empty, empty) == 0
    assert METRICS["Precision"](empty, true) == METRICS["Recall"](empty, true) == 0


def test_distances_are_in_pixels_and_five_percent_of_stray_pixels_are_forgiven():
    true, predicted = np.zeros((300, 300), bool), np.zeros((300, 300), bool)
    true[10, 10] = predicted[13, 14] = True
    assert METRICS["HD95"](predicted, true) == pytest.approx(5)
    true[100:140, 100:140] = True
    predicted = true.copy()
    predicted[102, 290] = True
    assert METRICS["HD95"](predicted, true) == 0


def test_beyond_the_image_is_background_for_boundary_iou():
    whole, half = np.ones((100, 100), bool), np.ones((100, 100), bool)
    half[:, 50:] = False
    # A boundary is 3 pixels wide here; that of the half lies in the other's but for its right side.
    of_whole, of_half, right_side = 100**2 - 94**2, 100 * 50 - 94 * 44, 94 * 3
    both = of_half - right_side
    expected = both / (of_whole + of_half - both)
    assert METRICS["Boundary IoU"](half, whole) == pytest.approx(expected)


@many
@given(pairs)
def test_the_metrics_in_the_box_of_both_masks_are_those_of_the_whole_image(pair):
    crops, x, y = crop_together(*map(crop_mask, pair))
    for crop, mask in zip(crops, pair, strict=True):
        assert np.array_equal(CroppedMask(crop, x, y, mask.shape).full(), mask)
    for metric in METRICS.values():
        assert metric(*crops, pair[0].shape) == metric(*pair)


def test_a_small_object_in_a_large_image_costs_only_its_own_size():
    predicted, true = np.zeros((2000, 1000), bool), np.zeros((2000, 1000), bool)
    true[900:920, 400:430] = predicted[905:925, 395:420] = True
    crops, x, y = crop_together(crop_mask(predicted), crop_mask(true))
    assert [mask.shape for mask in crops] == [(25, 35)] * 2 and (x, y) == (395, 900)
    assert [mask.sum() for mask in crops] == [500, 600]
    nothing = crop_mask(np.zeros((2000, 1000), bool))  # lies nowhere, so it makes no box larger
    assert crop_together(nothing, crop_mask(true))[0][1].shape == (20, 30)


def test_the_evaluation_measures_all_of_them():
    assert METRICS_OF_EVALUATION is METRICS
    assert set(METRICS) > PIXEL_METRICS
