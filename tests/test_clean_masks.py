"""Masks are cleaned as the training masks allow, in training, comparison and use alike."""

import csv
import json
from pathlib import Path

from sam2_utils import calculate_iou

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data

import compare_models
import test_my_image
import train_sam2_proper
from finetuning.basics.cropped_masks import CroppedMask, crop_mask
from finetuning.basics.image_files import read_mask, write_image
from finetuning.basics.language import use_language
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation.measuring import Validation, mean_metrics, measure
from finetuning.evaluation.simulated_clicks import simulate_clicks
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.loading import cleaning_of, load_models, load_segmenters
from finetuning.model.model import FeatureSource, Model, Segmenter
from finetuning.model.models import load_predictor
from finetuning.segmentation.clean_masks import (
    CLEANING,
    NO_CLEANING,
    Cleaning,
    clean,
    cleaning_from,
    describe_cleaning,
    fill_holes,
    keep_parts,
)
from finetuning.segmentation.predicting import segment_with_logits
from finetuning.segmentation.prompts import deepest_point, make_prompt
from finetuning.training import auto_values
from finetuning.training.options import parse_args
from finetuning.training_data.cleaning_choice import choose_cleaning

STRONG = Cleaning(1.0, 0.1, 0.1, 0.1)
MODELS = "original", "finetuned"
BEST, FINAL = Path("output/sam2_best.pt"), Path("output/sam2_final.pt")


def drawn(text: str) -> np.ndarray:
    """Return a mask drawn with # in rows of text."""
    return np.array([[char == "#" for char in row] for row in text.split()])


TWO_PARTS = drawn("""
    ####....
    ####..##
    ####..#.
    ####....
""")
RING = drawn("""
    #######
    #.....#
    #.....#
    #######
    ##.####
    #######
""")


def neighbours(start: tuple[int, int], inside: np.ndarray, diagonal: bool) -> set[tuple[int, int]]:
    """Return the (Y,X) pixels that are connected with one, searched pixel by pixel."""
    found, todo = {start}, [start]
    while todo:
        y, x = todo.pop()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                there = y + dy, x + dx
                is_near = diagonal or 0 in (dy, dx)
                is_in = 0 <= there[0] < inside.shape[0] and 0 <= there[1] < inside.shape[1]
                if is_near and is_in and inside[there] and there not in found:
                    found.add(there)
                    todo.append(there)
    return found


def components(inside: np.ndarray, diagonal: bool) -> list[set[tuple[int, int]]]:
    left, found = set(zip(*map(list, np.nonzero(inside)), strict=True)), []
    while left:
        found.append(neighbours(min(left), inside, diagonal))
        left -= found[-1]
    return found


def clean_plainly(mask, foreground, background, min_part, max_hole) -> np.ndarray:
    """Return a mask cleaned as the docstring of Cleaning says, pixel by pixel; clicks: (Y,X)."""
    parts = components(mask, diagonal=True)
    largest = max(map(len, parts), default=0)
    kept = [
        part for part in parts
        if part & foreground or (len(part) >= min_part * largest and not part & background)
    ] or [part for part in parts if len(part) == largest][:1]  # fmt: skip
    cleaned = np.zeros_like(mask)
    for y, x in (pixel for part in kept for pixel in part):
        cleaned[y, x] = True
    area, (height, width) = cleaned.sum(), mask.shape
    for hole in components(~cleaned, diagonal=False):
        is_open = any(y in (0, height - 1) or x in (0, width - 1) for y, x in hole)
        if not is_open and not hole & background and len(hole) <= max_hole * area:
            for y, x in hole:
                cleaned[y, x] = True
    return cleaned


@pytest.mark.parametrize("seed", range(12))
def test_any_mask_is_cleaned_as_a_plain_search_does_it_in_its_crop_and_in_the_whole_image(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        height, width = rng.integers(1, 14, 2)
        mask = np.pad(rng.random((height, width)) < rng.uniform(0.2, 0.9), rng.integers(0, 3))
        pixels = [tuple(int(rng.integers(side)) for side in mask.shape) for _ in range(3)]
        foreground, background = pixels[:1], pixels[1 : rng.integers(1, 4)]
        sizes = float(rng.choice([0.1, 0.5, 1])), float(rng.choice([0.05, 0.3, 1]))
        prompt = make_prompt(*([(x, y) for y, x in clicks] for clicks in (foreground, background)))
        cleaning = Cleaning(*sizes)
        cropped = clean(crop_mask(mask), prompt, cleaning).full()
        whole = clean(CroppedMask(mask, 0, 0, mask.shape), prompt, cleaning).full()
        expected = clean_plainly(mask, set(foreground), set(background), *sizes)
        assert np.array_equal(cropped, whole)
        assert np.array_equal(cropped, expected), (mask, foreground, background, sizes)


def test_small_parts_go_unless_they_are_clicked_on():
    assert keep_parts(TWO_PARTS, 1.0).sum() == 16
    assert keep_parts(TWO_PARTS, 0.2).sum() == 16
    assert keep_parts(TWO_PARTS, 3 / 16).sum() == 19  # as large as that is not below it
    assert keep_parts(TWO_PARTS, 1.0, foreground=[(6, 1)]).sum() == 19
    assert keep_parts(TWO_PARTS, 0.01, background=[(6, 2)]).sum() == 16
    assert keep_parts(TWO_PARTS, 1.0, [(7, 1)], [(6, 2)]).sum() == 19
    assert keep_parts(TWO_PARTS, 1.0, [(6, 1)], [(0, 0)]).sum() == 3
    # A click on nothing, and one on the only part
    assert keep_parts(TWO_PARTS, 1.0, [(5, 0)]).sum() == 16
    assert keep_parts(TWO_PARTS[:, :4], 1.0, (), [(0, 0)]).sum() == 16
    assert keep_parts(TWO_PARTS, 1.0, (), [(0, 0), (6, 1)]).sum() == 16


def test_small_holes_are_filled_but_not_openings_or_clicked_ones():
    assert (fill_holes(RING, 1.0) ^ RING).sum() == 11
    assert (fill_holes(RING, 0.1) ^ RING).sum() == 1
    assert (fill_holes(RING, 1 / 31) ^ RING).sum() == 1
    assert fill_holes(RING, 0.01) is RING
    assert (fill_holes(RING, 1.0, [(2, 4)]) ^ RING).sum() == 10
    opened = RING.copy()
    opened[2, 0] = False
    assert (fill_holes(opened, 1.0) ^ opened).sum() == 1


def test_an_opening_at_the_images_border_is_no_hole():
    ring = CroppedMask(RING[1:], 3, 0, (5, 20))
    prompt = make_prompt([(3, 0)])
    assert clean(ring, prompt, Cleaning(0.0, 1.0)).area == ring.area + 1
    inside = ring._replace(crop=RING, size=(6, 20))
    assert clean(inside, prompt, Cleaning(0.0, 1.0)).area == inside.area + 11


def test_a_box_keeps_the_largest_part_and_no_prompt_has_sizes_of_its_own():
    mask = CroppedMask(TWO_PARTS, 10, 20, (40, 40))
    box = make_prompt(box=(10, 20, 18, 24))
    assert clean(mask, box, Cleaning(1.0)).area == 16
    assert clean(mask, make_prompt([(16, 21)]), Cleaning(1.0)).area == 19
    assert clean(mask, make_prompt([(16.9, 21.9)], box=(10, 20, 18, 24)), Cleaning(1.0)).area == 19
    nothing = make_prompt()
    assert clean(mask, nothing, Cleaning(1.0, 1.0)).area == 19
    assert clean(mask, nothing, Cleaning(whole_min_part=0.5)).area == 16
    assert clean(mask, box, Cleaning(whole_min_part=0.5)).area == 19


def test_an_empty_mask_stays_empty_and_nothing_else_becomes_so():
    empty = crop_mask(np.zeros((30, 40), bool))
    for prompt in (make_prompt(), make_prompt([(0, 0)], [(5, 5)])):
        assert not clean(empty, prompt, STRONG).crop.any()
    mask = crop_mask(TWO_PARTS)
    assert clean(mask, make_prompt([(0, 0)]), NO_CLEANING) is mask


# The choice


def write_masks(folder: Path, masks: list[np.ndarray]) -> list[Pair]:
    """Write label maps, or black-and-white masks, and return their pairs."""
    pairs = []
    for index, mask in enumerate(masks):
        pair = Pair(str(index), folder / "none.png", folder / f"{index}.png", mask.max() > 1)
        write_image(pair.mask, mask if pair.per_object else mask * np.uint8(255))
        pairs.append(pair)
    return pairs


def disk(radius: int, hole: int = 0, second: int = 0) -> np.ndarray:
    """Draw a disk with a hole and a second disk beside it, by their radii, 100x200 uint8."""
    mask = np.zeros((100, 200), np.uint8)
    cv2.circle(mask, (50, 50), radius, 1, -1)
    if hole:
        cv2.circle(mask, (50, 50), hole, 0, -1)
    if second:
        cv2.circle(mask, (140, 50), second, 1, -1)
    return mask


def test_objects_of_one_part_without_holes_allow_everything(tmp_path):
    pairs = write_masks(tmp_path, [disk(20 + k) for k in range(5)])
    assert choose_cleaning(pairs) == STRONG
    assert choose_cleaning([]) == NO_CLEANING
    assert choose_cleaning(write_masks(tmp_path / "empty", [disk(0) * 0])) == NO_CLEANING


def test_true_parts_and_holes_are_kept(tmp_path):
    plain = [disk(30) for _ in range(10)]
    two = choose_cleaning(write_masks(tmp_path / "two", [*plain, disk(30, second=16)]))
    assert two == STRONG._replace(min_part=0.2)  # its second part has 0.28 of the first
    equal = choose_cleaning(write_masks(tmp_path / "equal", [*plain, disk(30, second=30)]))
    assert equal == STRONG  # as large as the largest: nothing drops it
    ring = choose_cleaning(write_masks(tmp_path / "ring", [*plain, disk(30, hole=8)]))
    assert ring == STRONG._replace(max_hole=0.0, whole_max_hole=0.0)
    # A true part or hole below 1% of the area does not matter
    assert choose_cleaning(write_masks(tmp_path / "specks", [disk(40, 2, 2)] * 3)) == STRONG


def test_nothing_is_dropped_where_many_objects_have_several_parts(tmp_path):
    masks = [disk(30)] * 4 + [disk(30, second=16)]
    assert choose_cleaning(write_masks(tmp_path, masks)) == STRONG._replace(min_part=0.0)


def test_one_object_in_a_hundred_may_lose_a_part(tmp_path):
    plain = [disk(30)] * 99
    for odd, min_part in ((1, 1.0), (2, 0.2)):
        pairs = write_masks(tmp_path / str(odd), [*plain[odd - 1 :], *[disk(30, 0, 16)] * odd])
        assert choose_cleaning(pairs).min_part == min_part


def test_several_objects_of_an_image_do_not_make_one_of_several_parts(tmp_path):
    labels = disk(30)
    cv2.circle(labels, (140, 50), 6, 2, -1)
    cleaning = choose_cleaning(write_masks(tmp_path, [labels] * 3))
    assert cleaning == STRONG._replace(whole_min_part=0.0)


def test_the_choice_depends_on_the_masks_alone(tmp_path, monkeypatch):
    pairs = write_masks(tmp_path, [disk(30, second=k) for k in range(30)])
    monkeypatch.setattr("finetuning.training_data.cleaning_choice.MOST_IMAGES", 5)
    np.random.seed(0)
    first = choose_cleaning(pairs)
    np.random.seed(1)
    assert choose_cleaning(pairs) == first


# What a model's file says


@pytest.mark.parametrize(
    "values",
    [
        None, 7, "auto", [], {}, [1.0, 0.1, 0.1, 0.1], {"min_part": 1.0},
        {**STRONG._asdict(), "more": 0.1}, {**STRONG._asdict(), "min_part": -0.1},
        {**STRONG._asdict(), "max_hole": 1.1}, {**STRONG._asdict(), "max_hole": float("nan")},
        {**STRONG._asdict(), "max_hole": "0.1"}, {**STRONG._asdict(), "min_part": True},
        {**STRONG._asdict(), "min_part": 10**400}, {**STRONG._asdict(), "whole_min_part": [0.1]},
    ],
)  # fmt: skip
def test_a_hostile_file_cleans_nothing(values):
    assert cleaning_from(values) == NO_CLEANING
    assert cleaning_of({"settings": {CLEANING: values}}) == NO_CLEANING


def test_a_file_holds_plain_values():
    values = json.loads(json.dumps(STRONG._asdict()))
    assert cleaning_of({"settings": {CLEANING: values}}) == STRONG
    for facts in ({}, {"settings": None}, {"settings": {}}, {"settings": [CLEANING]}):
        assert cleaning_of(facts) == NO_CLEANING


def test_the_description_says_what_goes():
    assert describe_cleaning(Cleaning(1.0, 0.1, 1.0, 0.1)) == (
        "masks keep their largest part and those with a click, "
        "holes up to 10% of the mask are filled"
    )
    assert describe_cleaning(Cleaning(0.2, 0.005)) == (
        "parts without a click below 20% of the largest are dropped, holes up to 0.5% of the mask "
        "are filled; without a prompt, masks stay as they are"
    )
    assert describe_cleaning(NO_CLEANING) == "masks stay as they are"
    use_language("ko")
    assert "20%보다" in describe_cleaning(Cleaning(0.2))


# The models


@pytest.fixture
def ragged(random_mini):
    """Return mini with random weights, whose masks have many parts and holes."""
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_validation_equals_the_comparison_with_cleaned_masks(tmp_path, ragged, precision):
    pairs = split_pairs(write_data(tmp_path / "data", val=5), "val")
    plain = Model(ragged, FeatureSource(ragged, precision))
    cleaned = plain._replace(cleaning=STRONG)
    both = Validation(pairs, without_prompt=True).measure(cleaned)
    for kind, column in (("center", "val_iou"), ("none", "val_iou_no_prompt")):
        results = measure([plain, cleaned], pairs, kind)
        assert mean_metrics(results, 1)["IoU"] == both[column] != mean_metrics(results, 0)["IoU"]


def test_the_segmenter_cleans_its_masks_but_not_the_logits_for_the_next_click(ragged):
    image, prompt = draw_pair(1)[0], make_prompt([(60, 50)])
    plain = Segmenter(ragged, torch.float32)
    cleaned = Segmenter(ragged, torch.float32, cleaning=STRONG)
    for segmenter in (plain, cleaned):
        segmenter.encode(image)
    mask, score, logits = plain.segment(prompt)
    answer = cleaned.segment(prompt)
    expected = clean(crop_mask(mask), prompt, STRONG).full()
    assert np.array_equal(answer[0], expected) and not np.array_equal(mask, expected)
    assert answer[1] == score and torch.equal(answer[2], logits)


def test_each_simulated_click_corrects_the_cleaned_mask(ragged):
    image, true_mask = draw_pair(2)
    segmenter = Segmenter(ragged, torch.float32, cleaning=STRONG)
    segmenter.encode(image)
    features = segmenter.features
    ious = simulate_clicks(ragged, features, true_mask, 3, True, cleaning=STRONG)
    plain = simulate_clicks(ragged, features, true_mask, 3, True)
    center = make_prompt([deepest_point(true_mask)])
    mask, *_ = segment_with_logits(ragged, features, center, true_mask.shape)
    cleaned = clean(crop_mask(mask), center, STRONG).full()
    assert ious[0] == pytest.approx(calculate_iou(cleaned, true_mask))
    assert ious != plain


# The scripts


def train(run_script, random_mini: Path, *options: object):
    return run_script(
        train_sam2_proper.main, "--model", "mini", "--checkpoint", random_mini, "--epochs", 1,
        *options,
    )  # fmt: skip


def compare(run_script, random_mini: Path, *options: object):
    return run_script(
        compare_models.main, "--original", random_mini, "--figures", 0, "--language", "en", *options
    )


def read_ious() -> list[float]:
    """Return the mean IoU of each model in the comparison's table."""
    with Path("output/comparison/results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return [np.mean([float(row[f"{name}_iou"]) for row in rows]) for name in MODELS]


def test_training_keeps_its_choice_and_the_comparison_gives_it_to_both_models(
    run_script, random_mini, tmp_path
):
    write_data(tmp_path / "data")
    outcome = train(run_script, random_mini)
    assert outcome.status == 0, outcome.err
    line = "cleaning: masks keep their largest part and those with a click, holes up to 10% of the"
    assert line in outcome.out and outcome.out.count("--clean off") == 1
    for path in (BEST, FINAL):
        assert cleaning_of(load_checkpoint(path)) == STRONG
    models, _ = load_models([FINAL], None, None, CPU, False, "auto", None)
    assert [model.cleaning for model in models] == [STRONG] * 2

    # What training found before its first epoch and at its best is what the comparison finds
    with Path("output/train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        before, after = (float(row["val_iou"]) for row in csv.DictReader(file))
    outcome = compare(run_script, random_mini, "--finetuned", FINAL)
    assert "the masks of both models are cleaned: masks keep" in outcome.out
    cleaned = read_ious()
    assert cleaned == pytest.approx([before, after], abs=1e-5)
    assert "the masks of both models are cleaned" in Path(
        "output/comparison/report.html"
    ).read_text("utf-8")

    outcome = compare(run_script, random_mini, "--finetuned", FINAL, "--clean", "off")
    assert "cleaned" not in outcome.out
    assert all(one != other for one, other in zip(read_ious(), cleaned, strict=True))


def test_the_guides_recipe_and_clean_off_leave_masks_as_they_are(run_script, random_mini, tmp_path):
    assert parse_args([]).recipe.clean == "auto"
    assert parse_args(["--recipe", "guide"]).recipe.clean == "off"
    assert parse_args(["--recipe", "guide", "--clean", "auto"]).recipe.clean == "auto"
    write_data(tmp_path / "data")
    outcome = train(run_script, random_mini, "--clean", "off")
    assert outcome.status == 0 and "cleaning" not in outcome.out
    assert cleaning_of(load_checkpoint(FINAL)) == NO_CLEANING
    assert "cleaned" not in compare(run_script, random_mini, "--finetuned", FINAL).out


def test_a_resumed_run_cleans_as_it_began(run_script, random_mini, tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    train(run_script, random_mini)
    outcome = train(run_script, random_mini, "--resume", "--clean", "off", "--epochs", 2)
    assert outcome.status == 2 and "had --clean auto, not off" in outcome.err
    weak = Cleaning(0.5, 0.02, 0.0, 0.01)
    monkeypatch.setattr(auto_values, "choose_cleaning", lambda _: weak)  # a later version
    outcome = train(run_script, random_mini, "--resume", "--epochs", 2)
    assert outcome.status == 0 and "cleaning: masks keep their largest part" in outcome.out
    assert cleaning_of(load_checkpoint(FINAL)) == STRONG


@pytest.fixture
def cleaning_model(ragged, tmp_path, monkeypatch) -> Path:
    """Write a model whose file says how its masks are cleaned, and a folder of an image."""
    monkeypatch.chdir(tmp_path)
    settings = {CLEANING: STRONG._asdict()}
    save_checkpoint(BEST, ragged.model, model_name="mini", settings=settings)
    write_image(Path("new/a.png"), draw_pair(0)[0])
    return BEST


def test_new_images_get_cleaned_masks(cleaning_model, ragged, run_script):
    results = {}
    for clean_option in ("auto", "off"):
        for prompt in (("--point", "60,40"), ("--auto", "whole")):
            folder = Path(f"{clean_option}_{prompt[1]}".replace(",", "_"))
            outcome = run_script(
                test_my_image.main, "--image", "new/a.png", "--output", folder, *prompt,
                "--clean", clean_option, "--save", "masks", "--precision", "float32",
            )  # fmt: skip
            assert outcome.status == 0, outcome.err
            assert ("cleaned: masks keep" in outcome.out) == (clean_option == "auto")
            results[clean_option, prompt[0]] = read_mask(next(folder.glob("*.png")))
    for option, prompt in (("--point", make_prompt([(60, 40)])), ("--auto", make_prompt())):
        plain, cleaned = results["off", option], results["auto", option]
        assert np.array_equal(cleaned, clean(crop_mask(plain), prompt, STRONG).full())
        assert not np.array_equal(cleaned, plain)


def test_a_folders_results_are_not_mixed_of_cleaned_and_other_masks(cleaning_model, run_script):
    options = ("--image", "new", "--auto", "whole", "--save", "masks", "--output", "results")
    assert run_script(test_my_image.main, *options).status == 0
    outcome = run_script(test_my_image.main, *options, "--clean", "off")
    assert outcome.status == 2
    assert "was made with another way of cleaning masks (--clean); choose another" in outcome.err
    assert run_script(test_my_image.main, *options, "--clean", "off", "--overwrite").status == 0
    # A folder of an earlier version, which cleaned nothing
    file = Path("results/settings.json")
    settings = json.loads(file.read_text("utf-8"))
    del settings["way of cleaning masks (--clean)"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert run_script(test_my_image.main, *options, "--clean", "off").status == 0
    assert run_script(test_my_image.main, *options).status == 2


def test_the_window_offers_the_original_with_the_same_cleaning(
    cleaning_model, random_mini, monkeypatch
):
    monkeypatch.setattr("finetuning.model.loading.locate_original", lambda _: random_mini)
    segmenters, _ = load_segmenters(cleaning_model, None, CPU, False, "float32", True)
    assert [one.cleaning for one in segmenters.values()] == [STRONG] * 2
    segmenters, _ = load_segmenters(random_mini, "mini", CPU, False, "float32", False)
    assert [one.cleaning for one in segmenters.values()] == [NO_CLEANING]
