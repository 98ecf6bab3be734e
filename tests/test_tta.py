"""With --tta, the masks of mirrored views of an image are averaged, everywhere in the same way."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data

import compare_models
import test_my_image
from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.dataset.pairs import split_pairs
from finetuning.evaluation.measuring import Comparison, measure, prompts_at_once
from finetuning.evaluation.simulated_clicks import measure_clicks
from finetuning.inference import segmenting
from finetuning.inference.clicked_object import Click, ClickedObject
from finetuning.inference.folder_results import SETTINGS_FILE
from finetuning.inference.window import Answer
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.image_variants import ImageVariant
from finetuning.model.model import FeatureSource, Model, Segmenter, features_for
from finetuning.model.models import load_predictor
from finetuning.segmentation.averaging import MOST_CERTAIN, ViewFeatures, average_views, with_views
from finetuning.segmentation.features import Features
from finetuning.segmentation.predicting import segment_with_logits
from finetuning.segmentation.prompts import make_prompt
from finetuning.segmentation.views import ALL_VIEWS, MIRRORS, UPRIGHT

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"
IMAGE = draw_pair(0)[0]  # 96x128
SIZE = IMAGE.shape[:2]


@pytest.fixture(scope="module")
def mini():
    return load_predictor("mini", MINI, CPU)[0]


@pytest.fixture(scope="module")
def changed_mini(tmp_path_factory) -> Path:
    """Return a checkpoint of mini with slightly changed weights of the mask decoder."""
    model = load_predictor("mini", MINI, CPU)[0].model
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weights in model.sam_mask_decoder.transformer.parameters():
            weights += 0.02 * torch.randn_like(weights)
    path = tmp_path_factory.mktemp("changed") / "sam2_best.pt"
    save_checkpoint(path, model, model_name="mini")
    return path


# The average


def decode_evenly(features, prompts, image_sizes, mask_inputs):
    """Predict as a decoder would that treats all directions alike."""
    cells = features.image_embed[:, :1]
    rows, columns = (np.arange(side) for side in cells.shape[-2:])
    logits, scores = [], []
    for maps, prompt, (height, width) in zip(cells, prompts, image_sizes, strict=True):
        y, x = (rows + 0.5) * height / len(rows), (columns + 0.5) * width / len(columns)
        (left, top), (right, bottom), *points = prompt.point_coords + 0.5
        inside = ((x > left) & (x < right)) * ((y > top) & (y < bottom))[:, None]
        for label, point in zip(prompt.point_labels[2:], points, strict=True):
            distance = np.hypot(x - point[0], (y - point[1])[:, None])
            inside = inside + (2 * label - 1) / (1 + distance)
        logits.append(maps + torch.from_numpy(inside).float())
        scores.append(logits[-1].mean()[None])
    mask_inputs = 0 if mask_inputs is None else mask_inputs
    return torch.stack(logits) + mask_inputs, torch.stack(scores)


@pytest.mark.parametrize("views", [MIRRORS, ALL_VIEWS])
def test_a_decoder_that_treats_all_directions_alike_answers_as_without_views(views):
    maps, earlier = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    upright, sizes = Features(maps, []), [(24, 40), (30, 16)]
    prompts = [
        make_prompt([(30, 4)], [(3, 20)], (5, 2, 33, 17)),
        make_prompt([(2, 9)], [(14, 1)], (1, 7, 9, 28)),
    ]
    features = ViewFeatures(views, [Features(view.of_maps(maps), []) for view in views])
    for mask_inputs in (None, earlier):
        expected = decode_evenly(upright, prompts, sizes, mask_inputs)
        averaged = average_views(decode_evenly, features, prompts, sizes, mask_inputs)
        for found, wanted in zip(averaged, expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)


def test_a_view_that_is_all_but_certain_does_not_outvote_the_others():
    answers = iter([1e4, -1.0 - MOST_CERTAIN, -3.0, -5.0])

    def predict(*_):
        return torch.full((1, 1, 2, 2), next(answers)), torch.zeros(1, 1)

    nothing = ViewFeatures(MIRRORS, [Features(torch.zeros(1, 1, 2, 2), [])] * 4)
    logits, _ = average_views(predict, nothing, [make_prompt()], [(2, 2)])
    assert torch.equal(logits, torch.full((1, 1, 2, 2), -2.0))


def by_hand(mini, axes, points, labels, box, mask_input):
    """Predict from an image that is flipped along axes (1: x, 2: y), with SAM 2's own predictor.

    Returns the logits, flipped back, and the score.
    """
    flipped = [number for number, bit in ((1, 1), (0, 2)) if axes & bit]  # numpy's axes
    x1, y1, x2, y2 = box
    points = np.array(points)
    if axes & 1:
        points[:, 0], (x1, x2) = 127 - points[:, 0], (127 - x2, 127 - x1)
    if axes & 2:
        points[:, 1], (y1, y2) = 95 - points[:, 1], (95 - y2, 95 - y1)
    if mask_input is not None:
        mask_input = np.flip(mask_input, [axis + 1 for axis in flipped]).copy()
    mini.set_image(np.flip(IMAGE, flipped).copy())
    box = np.array([x1, y1, x2, y2])
    _, scores, logits = mini.predict(points, np.array(labels), box, mask_input)
    return np.flip(logits[scores.argmax()], flipped), scores.max()


def test_the_average_is_that_of_sam2_image_predictor_on_flipped_images(mini):
    segmenter = Segmenter(mini, torch.float32, MIRRORS)
    box, earlier, given = (30, 20, 100, 80), None, None
    for clicks, labels in (([(60, 40)], [1]), ([(60, 40), (97, 11)], [1, 0])):
        views = [by_hand(mini, axes, clicks, labels, box, earlier) for axes in range(4)]
        expected = np.mean(
            [logits.clip(-MOST_CERTAIN, MOST_CERTAIN) for logits, _ in views], axis=0
        )
        assert np.abs(expected - views[0][0]).max() > 0.1  # else the views would make no difference

        segmenter.encode(IMAGE)
        foreground, background = clicks[:1], clicks[1:]
        prompt = make_prompt(foreground, background, box)
        mask, score, given = segmenter.segment(prompt, given)
        assert np.abs(given[0, 0].numpy() - expected).max() < 1e-3
        assert score == pytest.approx(np.mean([score for _, score in views]), abs=1e-4)
        upscaled = mini._transforms.postprocess_masks(torch.from_numpy(expected)[None, None], SIZE)
        assert (mask != (upscaled[0, 0].numpy() > 0)).mean() < 1e-3
        earlier = expected[None].astype(np.float32)


def test_one_view_is_computed_as_before(mini):
    source = FeatureSource(mini, torch.float32)
    segmenter = Segmenter(mini, torch.float32)
    segmenter.encode(IMAGE)
    assert isinstance(segmenter.features, Features) and Model(mini, source).views == (UPRIGHT,)
    features = segmenter.features
    assert with_views((UPRIGHT,), [features]) is features
    assert isinstance(with_views(MIRRORS, [features] * 4), ViewFeatures)


def test_no_prompt_and_several_images_in_a_batch_are_averaged(mini, tmp_path):
    images = [draw_pair(0)[0], draw_pair(1, (90, 70))[0]]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, images, strict=True):
        write_image(path, image)
    sizes = [image.shape[:2] for image in images]
    model = Model(mini, FeatureSource(mini, torch.float32), ALL_VIEWS)
    (features,) = features_for([model], list(zip(paths, sizes, strict=True)))
    for row, (image, size) in enumerate(zip(images, sizes, strict=True)):
        segmenter = Segmenter(mini, torch.float32, ALL_VIEWS)
        segmenter.encode(image)
        for prompt in (make_prompt(), make_prompt([(30, 40)])):
            expected, score, _ = segmenter.segment(prompt)
            mask, same, _ = segment_with_logits(mini, features.of([row]), prompt, size)
            assert (mask != expected).mean() < 1e-3 and same == pytest.approx(score, abs=1e-4)


def test_cached_views_are_read_and_give_the_same_features(mini, tmp_path):
    path = tmp_path / "image.png"
    write_image(path, IMAGE)
    cache = FeatureCache(tmp_path / "cache", mini, torch.float32)
    source = FeatureSource(mini, torch.float32, cache)
    computed = source.features(path, SIZE, MIRRORS)
    cache.fill([path, ImageVariant(path, MIRRORS[2])], mini, "views")
    assert ImageVariant(path, MIRRORS[2]) in cache and ImageVariant(path, MIRRORS[1]) not in cache
    cached = source.features(path, SIZE, MIRRORS)
    for one, other in zip(computed.of_views, cached.of_views, strict=True):
        assert torch.equal(one.image_embed, other.image_embed)
        for maps, others in zip(one.high_res_feats, other.high_res_feats, strict=True):
            assert torch.equal(maps, others)


def test_features_of_several_views_take_no_more_memory_at_a_time(mini):
    source = FeatureSource(mini, torch.float32)
    at_once = [prompts_at_once([Model(mini, source, views)]) for views in ((UPRIGHT,), MIRRORS)]
    assert at_once == [4, 1]


# The comparison


def read_rows(name: str) -> list[dict[str, str]]:
    with Path("output/comparison", name).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_both_models_of_a_comparison_average_and_the_report_says_so(
    run_script, tmp_path, changed_mini
):
    write_data(tmp_path / "data", train=0, val=3)
    options = ("--original", MINI, "--finetuned", changed_mini, "--figures", 1, "--clicks", 2)
    options += ("--precision", "float32", "--seed", 5)
    outcome = run_script(compare_models.main, *options)
    assert outcome.status == 0 and "views" not in outcome.out, outcome.err
    without = read_rows("results.csv")
    outcome = run_script(compare_models.main, *options, "--tta")
    assert outcome.status == 0, outcome.err
    assert "averaging 4 views of each image: encoding takes 4 times as long" in outcome.out
    sentence = "both models: each mask is the average for 4 mirrored views of the image"
    assert sentence in " ".join(outcome.out.split())
    assert sentence in Path("output/comparison/report.html").read_text(encoding="utf-8")

    pairs = split_pairs(tmp_path / "data", "val")
    averaged, clicked = read_rows("results.csv"), read_rows("clicks.csv")
    for name, path in (("original_iou", MINI), ("finetuned_iou", changed_mini)):
        predictor, _ = load_predictor("mini", path, CPU)
        model = Model(predictor, FeatureSource(predictor, torch.float32), MIRRORS)
        results = measure([model], pairs, seed=5)
        ious = [f"{result.metrics[0]['IoU']:.6f}" for result in results]
        assert [row[name] for row in averaged] == ious != [row[name] for row in without]
        (by_click,) = measure_clicks(Comparison([model], pairs, results), 2, True, "best")
        assert [row[name] for row in clicked] == [f"{iou:.6f}" for iou in by_click.flatten()]


def test_the_report_says_it_in_korean(run_script, tmp_path, changed_mini):
    write_data(tmp_path / "data", train=0, val=1)
    options = ("--original", MINI, "--finetuned", changed_mini, "--figures", 0, "--tta")
    outcome = run_script(compare_models.main, *options, "--language", "ko", "--prompt", "none")
    assert outcome.status == 0, outcome.err
    assert "인코딩 시간이 4배" in outcome.out
    page = Path("output/comparison/report.html").read_text(encoding="utf-8")
    assert "4가지 뷰의 마스크를 평균" in page


# New images


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Write two images, and mini in the place of the fine-tuned model."""
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    shutil.copy(MINI, "output/sam2_best.pt")
    for index, name in enumerate(("a.png", "b.png")):
        write_image(Path("images", name), draw_pair(index)[0])
    return Path("images")


def expected_mask(mini, path: Path, **prompt) -> np.ndarray:
    segmenter = Segmenter(mini, torch.float32, MIRRORS)
    segmenter.encode(read_image(path))
    return segmenter.segment(make_prompt(**prompt))[0]


def segment(run_script, image: Path, *options: object):
    return run_script(test_my_image.main, "--image", image, "--precision", "float32", *options)


def test_a_single_image_and_a_folder_are_averaged(run_script, folder, mini):
    outcome = segment(run_script, folder / "a.png", "--box", "30,20,100,80", "--tta")
    assert outcome.status == 0, outcome.err
    assert "averaging 4 views of each image" in outcome.out
    mask = read_mask(Path("output/my_results/a_001_mask.png"))
    assert np.array_equal(mask, expected_mask(mini, folder / "a.png", box=(30, 20, 100, 80)))

    outcome = segment(run_script, folder, "--auto", "whole", "--tta")
    assert outcome.status == 0, outcome.err
    for name in ("a", "b"):
        mask = read_mask(Path(f"output/my_results/images/{name}_mask.png"))
        assert np.array_equal(mask, expected_mask(mini, folder / f"{name}.png"))


def test_a_folder_never_mixes_averaged_masks_with_others(run_script, folder):
    whole = ("--auto", "whole")
    assert segment(run_script, folder, *whole).status == 0
    settings = Path("output/my_results/images") / SETTINGS_FILE
    earlier = json.loads(settings.read_text(encoding="utf-8"))
    del earlier["number of averaged views"]  # as an earlier version wrote it
    for content in (None, json.dumps(earlier)):
        if content:
            settings.write_text(content, encoding="utf-8")
        again = segment(run_script, folder, *whole)
        assert again.status == 0 and "2 had results already" in again.out
        outcome = segment(run_script, folder, *whole, "--tta")
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert "was made with another number of averaged views" in outcome.err
    outcome = segment(run_script, folder, *whole, "--tta", "--overwrite")
    assert outcome.status == 0 and "2 segmented" in outcome.out, outcome.err
    assert "2 had results already" in segment(run_script, folder, *whole, "--tta").out
    assert segment(run_script, folder, *whole).status == 2


def test_the_window_averages_with_each_model(run_script, folder, mini, monkeypatch):
    seen = []

    def ask(image, _title, segmenters):
        assert all(segmenter.views == MIRRORS for segmenter in segmenters.values())
        segmenter = next(iter(segmenters.values()))
        segmenter.encode(image)
        clicked = ClickedObject()
        clicked.steps.append(Click(60, 40, 1))
        seen.append(clicked.segment("fine-tuned", segmenter))
        return Answer([seen[-1]], False)

    monkeypatch.setattr(segmenting, "ask_in_window", ask)
    assert segment(run_script, folder / "a.png", "--tta").status == 0
    expected = expected_mask(mini, folder / "a.png", foreground=[(60, 40)])
    assert np.array_equal(seen[0].mask, expected)
    assert np.array_equal(read_mask(Path("output/my_results/a_001_mask.png")), expected)


def test_sam2s_own_generator_averages_nothing(run_script, folder, tmp_path):
    outcome = segment(run_script, folder, "--auto", "objects", "--tta")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "--auto objects cannot average views" in outcome.err
    outcome = run_script(compare_models.main, "--auto", "--tta")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "--auto cannot average views" in outcome.err
