"""Devices, models, prompts, and masks that equal SAM2ImagePredictor's own."""

import contextlib
import pickle
from argparse import Namespace
from pathlib import Path

import sam2_utils
from sam2_utils import UserError, calculate_dice, calculate_iou, select_device, select_precision

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair
from sam2.utils.transforms import SAM2Transforms

import compare_models
from finetuning.basics import pictures
from finetuning.basics.cropped_masks import crop_mask
from finetuning.model import models
from finetuning.model.models import MODELS, build_predictor, ensure_checkpoint, load_predictor
from finetuning.segmentation import predicting
from finetuning.segmentation.drawing import draw_object
from finetuning.segmentation.predicting import (
    Prediction,
    encode_images,
    predict_masks,
    segment_with_logits,
    upscale_masks,
    upscale_to_mask,
)
from finetuning.segmentation.prompts import (
    corrective_click,
    deepest_point,
    distance_inside,
    make_prompt,
    mask_box,
    prompt_from_mask,
    random_point,
)


@pytest.fixture(scope="module")
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


# Devices


@pytest.mark.parametrize(
    ("mps", "cuda", "expected"),
    [(True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")],
)
def test_auto_takes_mps_then_cuda_then_cpu(monkeypatch, mps, cuda, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    assert select_device("auto").type == expected
    assert select_device("cpu").type == "cpu"


def test_an_absent_or_unknown_device_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    assert select_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="mps is not available here; use one of: auto, cuda, cpu"):
        select_device("mps")
    with pytest.raises(UserError, match="cuda:1 is not available"):
        select_device("cuda:1")
    for name in ("gpu", "xpu", ""):
        with pytest.raises(UserError, match="unknown"):
            select_device(name)


CUDA_13 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((6, 1), CUDA_13, False),  # GTX 10xx
        ((7, 0), CUDA_13, False),  # V100
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # as 8.6, of the same major
        ((10, 3), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((11, 0), CUDA_13, False),  # no PTX of so early a card
        ((13, 0), CUDA_13, True),  # by PTX
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100f compute_75", True),
        ((12, 0), "sm_80 sm_90", False),
        ((9, 0), "gfx90a gfx1100", True),  # ROCm
        ((6, 1), "", True),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_passed_over_and_refused_by_name(
    monkeypatch, capsys, capability, built_for, runs
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", built_for.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GTX 1080")
    assert select_device("cpu") == CPU
    assert select_device("auto").type == ("cuda" if runs else "cpu")
    out = capsys.readouterr().out
    if runs:
        assert select_device("cuda:0") == torch.device("cuda:0") and not out
        return
    assert out.startswith("warning: ") and out.count("\n") == 1
    assert "GTX 1080" in out and "install a build for that card" in out
    with pytest.raises(UserError, match=r"--device cuda: .* GTX 1080 .* or use --device cpu"):
        select_device("cuda")


def test_threads_are_as_many_as_asked_for(run_script):
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        select_device("cpu", 3)
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
        select_device("cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    outcome = run_script(compare_models.main, "--threads", "0")
    assert outcome.status == 2 and "--threads" in outcome.err


def test_precision_follows_the_device(monkeypatch):
    cuda, mps = torch.device("cuda"), torch.device("mps")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert select_precision("auto", cuda) == torch.bfloat16
    # An older card, which can only emulate it, slowly
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 2070")
    assert select_precision("auto", cuda) == torch.float16
    # These give NaN in float16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1660 Ti")
    assert select_precision("auto", cuda) == torch.float32
    assert select_precision("float16", cuda) == torch.float16
    assert select_precision("auto", mps) == torch.float32
    for in_hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sam2_utils, "cpu_has_bfloat16", lambda answer=in_hardware: answer)
        assert select_precision("auto", CPU) == expected
    assert select_precision("bfloat16", CPU) == torch.bfloat16
    for name, device in (("bfloat16", mps), ("float16", mps), ("float16", CPU)):
        with pytest.raises(UserError, match="precision"):
            select_precision(name, device)


# Measures


def test_iou_and_dice_of_masks_worked_out_by_hand():
    first, second = np.zeros((2, 4, 5), bool)
    first[:2], second[1:3] = True, True  # 10 pixels each, 5 in common, 15 together
    assert calculate_iou(first, second) == pytest.approx(5 / 15)
    assert calculate_dice(first, second) == pytest.approx(10 / 20)
    assert calculate_iou(first, first) == pytest.approx(1)
    assert calculate_iou(first, ~first) == calculate_iou(first & False, first & False) == 0
    stacked = torch.from_numpy(np.stack([first, second, ~first]))
    expected = torch.tensor([1, 1 / 3, 0])
    assert torch.allclose(calculate_iou(stacked, torch.from_numpy(first)), expected)


# Models


def test_every_model_of_the_table_builds_and_is_recognised():
    for name, spec in MODELS.items():
        if name in ("base_plus", "large"):  # the same code with more blocks
            continue
        state_dict = build_predictor(name, CPU).model.state_dict()
        assert models.identify_model(state_dict) == name
        assert spec.config.startswith("configs/sam2.1/")


def test_mini_features_have_the_sizes_of_its_input(predictor):
    features = encode_images(predictor, [draw_pair(0)[0]])
    assert features.image_embed.shape == (1, 128, 16, 16)
    assert [tuple(feat.shape) for feat in features.high_res_feats] == [
        (1, 16, 64, 64),
        (1, 32, 32, 32),
    ]


def save(path: Path, contents: object) -> Path:
    torch.save(contents, path)
    return path


def test_a_file_that_is_no_checkpoint_of_the_model_is_refused(tmp_path, random_mini):
    weights = torch.load(random_mini, weights_only=True)["model"]
    cut_off = tmp_path / "cut.pt"
    cut_off.write_bytes(random_mini.read_bytes()[:100_000])
    text = tmp_path / "text.pt"
    text.write_text("no weights here", encoding="utf-8")
    fewer = dict(list(weights.items())[:-3])
    with_nan = {**weights, "no_mem_embed": torch.full((1, 1, 128), float("nan"))}
    cases = [
        ("mini", tmp_path / "absent.pt", "no such checkpoint"),
        ("mini", tmp_path, "no such checkpoint"),
        ("mini", cut_off, "not a readable checkpoint"),
        ("mini", text, "not a readable checkpoint"),
        ("mini", save(tmp_path / "list.pt", [1, 2]), 'no "model" weights'),
        ("mini", save(tmp_path / "other.pt", {"model": {"a": torch.zeros(1)}}), "not a SAM 2.1"),
        ("mini", save(tmp_path / "fewer.pt", {"model": fewer}), "3 weights missing"),
        ("mini", save(tmp_path / "nan.pt", {"model": with_nan}), "not finite"),
        ("small", random_mini, r"is a SAM 2 mini checkpoint, not small; use --model mini"),
    ]
    for name, path, message in cases:
        with pytest.raises(UserError, match=message):
            load_predictor(name, path, CPU)


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


def test_code_inside_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"model": RunsCode()}))
    save(tmp_path / "evil2.pt", {"model": RunsCode()})
    for name, says in (("evil.pt", "not a readable checkpoint"), ("evil2.pt", "would run code")):
        with pytest.raises(UserError, match=says):
            load_predictor("mini", tmp_path / name, CPU)
    assert not Path("code_was_run").exists()


def test_a_missing_mini_is_not_looked_for_on_the_network(tmp_path):
    with pytest.raises(UserError, match="is part of this project"):
        ensure_checkpoint("mini", tmp_path)


# Prompts


def test_the_deepest_point_is_farthest_from_outline_and_border():
    mask = np.zeros((50, 80), bool)
    mask[10:31, 20:61] = True  # the middle row is 20; every column 30..50 is as deep
    x, y = deepest_point(mask)
    assert y == 20 and 30 <= x <= 50
    assert deepest_point(np.ones((9, 9), bool)) == (4, 4)
    single = np.zeros((5, 7), bool)
    single[4, 6] = True
    assert deepest_point(single) == random_point(single, np.random.default_rng(0)) == (6, 4)
    assert mask_box(single) == (6, 4, 6, 4)
    assert mask_box(mask) == (20, 10, 60, 30)


def test_random_points_lie_inside_cover_the_mask_and_follow_the_seed():
    mask = draw_pair(3)[1]
    rng = np.random.default_rng(5)
    points = [random_point(mask, rng) for _ in range(200)]
    assert all(mask[y, x] for x, y in points)
    assert len(set(points)) > 100
    rng = np.random.default_rng(5)
    assert points == [random_point(mask, rng) for _ in range(200)]


def test_the_next_click_goes_deepest_into_what_is_missing_or_too_much():
    true_mask = np.zeros((40, 60), bool)
    true_mask[10:31, 10:31] = True
    missing = true_mask.copy()
    missing[15:26, 15:26] = False
    assert corrective_click(missing, true_mask) == (20, 20, 1)
    too_much = missing.copy()
    too_much[12:29, 36:53] = True  # larger than what is missing
    assert corrective_click(too_much, true_mask) == (44, 20, 0)
    at_the_border = true_mask.copy()
    at_the_border[0, 59] = True
    assert corrective_click(at_the_border, true_mask) == (59, 0, 0)
    assert corrective_click(np.zeros_like(true_mask), true_mask) == (20, 20, 1)
    assert corrective_click(true_mask, true_mask) is None
    with_more = true_mask.copy()
    with_more[30, :] = True  # 60 pixels or so are missing, but they are nowhere deep
    too_much = true_mask.copy()
    too_much[2:7, 50:55] = True
    assert corrective_click(too_much, with_more) == (52, 4, 0)


def click_of_whole_images(predicted: np.ndarray, true_mask: np.ndarray) -> tuple[int, int, int]:
    """Return the click by the distances in whole images, as RITM computes them."""
    depths = distance_inside(predicted & ~true_mask), distance_inside(true_mask & ~predicted)
    label = int(depths[1].max() >= depths[0].max())
    y, x = np.unravel_index(depths[label].argmax(), true_mask.shape)
    return int(x), int(y), label


def test_the_next_click_looks_no_farther_than_what_is_wrong(monkeypatch):
    rng, looked_at = np.random.default_rng(0), []

    def look(mask):
        looked_at.append(mask.shape)
        return distance_inside(mask)

    monkeypatch.setattr("finetuning.segmentation.prompts.distance_inside", look)
    for _ in range(200):  # of squares, many pixels are equally deep
        masks = np.zeros((2, *rng.integers(1, 40, 2)), bool)
        for mask in (masks[0], masks[1]) * 3:
            (top, bottom), (left, right) = np.sort(rng.integers(0, 40, (2, 2)))
            mask[top:bottom, left:right] = True
        masks ^= rng.random(masks.shape) < rng.choice([0, 0.02, 0.5])
        if (masks[0] != masks[1]).any():
            assert corrective_click(*masks) == click_of_whole_images(*masks)
    looked_at.clear()
    true_mask = np.zeros((300, 400), bool)
    true_mask[100:150, 200:220] = True
    missing = true_mask.copy()
    missing[110:130, 205:210] = False
    assert corrective_click(missing, true_mask) == (207, 112, 1)
    assert looked_at == [(20, 5)]


def test_a_pixel_that_was_clicked_is_not_clicked_again():
    true_mask, nothing = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    true_mask[10:15, 20:25] = True
    assert corrective_click(nothing, true_mask) == (22, 12, 1)
    # The region stays as deep as it is: the next one lies beside, not in a corner of what is left
    assert corrective_click(nothing, true_mask, [(22, 12)]) == (21, 11, 1)
    assert corrective_click(nothing, true_mask, [(22, 12), (0, 0), (59, 39)]) == (21, 11, 1)
    predicted = true_mask.copy()
    predicted[12, 22], predicted[30, 50] = False, True
    assert corrective_click(predicted, true_mask, [(22, 12)]) == (50, 30, 0)
    assert corrective_click(predicted, true_mask, [(22, 12), (50, 30)]) is None


@pytest.mark.parametrize("kind", ["center", "random", "inner", "box", "none"])
def test_a_prompt_made_in_a_masks_box_is_that_of_the_whole_mask(kind):
    for index in range(5):
        mask = draw_pair(index)[1]
        cropped = crop_mask(mask)
        expected = prompt_from_mask(mask, kind, np.random.default_rng(index))
        prompt = prompt_from_mask(cropped.crop, kind, np.random.default_rng(index))
        prompt = prompt.moved(cropped.x, cropped.y)
        assert prompt.point_coords.tolist() == expected.point_coords.tolist()
        assert prompt.point_labels.tolist() == expected.point_labels.tolist()


def test_a_prompt_lists_the_box_first_then_foreground_then_background():
    prompt = make_prompt([(1, 2)], [(3, 4)], (5, 6, 7, 8))
    assert prompt.point_coords.tolist() == [[5, 6], [7, 8], [1, 2], [3, 4]]
    assert prompt.point_labels.tolist() == [2, 3, 1, 0]


# From features and prompt to masks and scores

PROMPTS = {
    "point": {"foreground": [(60, 40)]},
    "points": {"foreground": [(60, 40), (10.5, 70)], "background": [(3, 5)]},
    "box": {"box": (20, 15, 90, 80)},
    "box and points": {"box": (20, 15, 90, 80), "foreground": [(50, 50)], "background": [(88, 16)]},
}


@pytest.mark.parametrize("size", [(96, 128), (300, 100), (97, 411)])
@pytest.mark.parametrize("kind", PROMPTS)
def test_masks_and_scores_equal_those_of_sam2_image_predictor(predictor, size, kind):
    image = draw_pair(1, size)[0]
    options = PROMPTS[kind]
    points = options.get("foreground", []) + options.get("background", [])
    labels = [1] * len(options.get("foreground", [])) + [0] * len(options.get("background", []))
    predictor.set_image(image)
    expected_masks, expected_scores, _ = predictor.predict(
        np.array(points) if points else None,
        np.array(labels) if points else None,
        np.array(options["box"]) if "box" in options else None,
        return_logits=True,
    )

    features = encode_images(predictor, [image])
    prompt = make_prompt(**options)
    prediction = predict_masks(predictor, features, [prompt], [size])
    masks = upscale_masks(predictor, prediction.mask_logits[:, 1:], size)[0].detach().numpy()
    assert masks.shape == (3, *size)
    assert np.abs(masks - expected_masks).max() < 1e-5
    assert np.abs(prediction.iou_scores[0, 1:].detach().numpy() - expected_scores).max() < 1e-5

    mask, score, _ = segment_with_logits(predictor, features, prompt, size)
    assert np.array_equal(mask, expected_masks[expected_scores.argmax()] > 0)
    assert score == pytest.approx(expected_scores.max(), abs=1e-5)


def test_a_mask_is_upscaled_to_the_last_digit_alike_inside_its_box_and_as_a_whole(predictor):
    rng = np.random.default_rng(0)
    for _ in range(60):
        side = int(rng.choice([32, 64, 256]))
        size = tuple(map(int, rng.integers(1, 700, 2)))
        ys, xs = np.mgrid[:side, :side] - rng.uniform(0, side, 2)[:, None, None]
        blob = rng.uniform(1, side / 3) - np.hypot(xs, ys) + rng.normal(0, 0.5, (side, side))
        logits = torch.from_numpy(blob).float()[None, None]
        found = upscale_to_mask(predictor, logits, size)
        expected = upscale_masks(predictor, logits, size)[0, 0].numpy() > 0
        assert found.size == size and np.array_equal(found.full(), expected)
        assert found.crop.shape == crop_mask(expected).crop.shape
    nothing = upscale_to_mask(predictor, torch.full((1, 1, 64, 64), -1.0), (300, 400))
    assert not nothing.full().any() and nothing.full().shape == (300, 400)


def test_upscaling_a_small_object_takes_time_for_its_box_only(predictor, monkeypatch):
    asked, upscale = [], predicting.upscale_masks

    def note_pixels(predictor, logits, size):
        asked.append(size[0] * size[1])
        return upscale(predictor, logits, size)

    monkeypatch.setattr(predicting, "upscale_masks", note_pixels)
    logits = torch.full((1, 1, 64, 64), -1.0)
    logits[..., 30:32, 40:42] = 1.0
    upscale_to_mask(predictor, logits, (4000, 4000))
    assert sum(asked) < 0.1 * 4000 * 4000


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("kind", PROMPTS)
def test_the_single_mask_equals_that_of_sam2_image_predictor(random_mini, kind, stable):
    """With SAM 2's own fallback to the best of three where the single mask is not stable."""
    predictor = load_predictor("mini", random_mini, CPU)[0]
    predictor.model.sam_mask_decoder.dynamic_multimask_stability_thresh = 0.0 if stable else 1.1
    size = (96, 128)
    image, options = draw_pair(1, size)[0], PROMPTS[kind]
    prompt = make_prompt(**options)
    is_point = prompt.point_labels < 2
    predictor.set_image(image)
    (expected,), (expected_score,), _ = predictor.predict(
        prompt.point_coords[is_point] if is_point.any() else None,
        prompt.point_labels[is_point] if is_point.any() else None,
        np.array(options["box"]) if "box" in options else None,
        multimask_output=False,
    )
    features = encode_images(predictor, [image])
    mask, score, _ = segment_with_logits(predictor, features, prompt, size, kind="single")
    assert np.array_equal(mask, expected > 0) and score == pytest.approx(expected_score, abs=1e-5)
    best_score = segment_with_logits(predictor, features, prompt, size)[1]
    assert (score == pytest.approx(best_score, abs=1e-5)) == (not stable)


def test_a_click_after_a_mask_equals_that_of_sam2_image_predictor(predictor):
    image, size = draw_pair(1)[0], (96, 128)
    predictor.set_image(image)
    _, scores, logits = predictor.predict(np.array([(60, 40)]), np.array([1]))
    points, labels = np.array([(60, 40), (10, 70)]), np.array([1, 0])
    best = logits[scores.argmax()][None]
    expected_masks, expected_scores, _ = predictor.predict(points, labels, mask_input=best)

    features = encode_images(predictor, [image])
    _, _, first = segment_with_logits(predictor, features, make_prompt([(60, 40)]), size)
    assert np.abs(first[0].numpy() - best).max() < 1e-5
    prompt = make_prompt([(60, 40)], [(10, 70)])
    mask, score, _ = segment_with_logits(predictor, features, prompt, size, first)
    assert np.array_equal(mask, expected_masks[expected_scores.argmax()] > 0)
    assert score == pytest.approx(expected_scores.max(), abs=1e-5)


def test_logits_for_the_next_click_are_clamped_as_sam2_does_it(monkeypatch):
    logits = torch.tensor([-100.0, 33.0, 5.0, -7.0]).repeat(1, 4, 4, 1)
    answer = Prediction(logits, torch.ones(1, 4), torch.ones(1, 1))
    monkeypatch.setattr(predicting, "predict_masks", lambda *_, **__: answer)
    predictor = Namespace(_transforms=SAM2Transforms(resolution=16, mask_threshold=0.0))
    mask, _, given = segment_with_logits(predictor, None, make_prompt([(1, 1)]), (4, 4))
    assert given.tolist() == [[[[-32.0, 32.0, 5.0, -7.0]] * 4]]
    assert mask.tolist() == [[False, True, True, False]] * 4


def test_a_batch_of_different_sizes_equals_its_images_one_by_one(predictor):
    examples = [draw_pair(index, size) for index, size in enumerate([(96, 128), (200, 120)])]
    images = [image for image, _ in examples]
    sizes = [mask.shape for _, mask in examples]
    prompts = [prompt_from_mask(mask, "center") for _, mask in examples]
    together = predict_masks(predictor, encode_images(predictor, images), prompts, sizes)
    for i in range(2):
        alone = predict_masks(
            predictor, encode_images(predictor, [images[i]]), [prompts[i]], [sizes[i]]
        )
        for batched, single in zip(together, alone, strict=True):
            assert torch.allclose(batched[i], single[0], atol=1e-5)


def test_scores_that_are_not_finite_stop_with_an_error(predictor, random_mini):
    broken = load_predictor("mini", random_mini, CPU)[0]
    torch.nn.init.constant_(broken.model.sam_mask_decoder.iou_token.weight, float("nan"))
    image = draw_pair(0)[0]
    with pytest.raises(UserError, match="not finite"):
        features = encode_images(broken, [image])
        segment_with_logits(broken, features, make_prompt([(5, 5)]), image.shape[:2])


# Drawing


def test_a_drawing_shows_mask_points_and_box_and_leaves_the_rest_alone():
    canvas = np.full((200, 300, 3), 100, np.uint8)
    mask = np.zeros((200, 300), bool)
    mask[50:150, 100:200] = True
    prompt = make_prompt([(120, 80)], [(20, 20)], (90, 40, 210, 160))
    cropped = canvas.copy()
    draw_object(cropped, crop_mask(mask), prompt)
    draw_object(canvas, mask, prompt)
    assert np.array_equal(cropped, canvas)
    assert tuple(canvas[120, 150]) == (65, 122, 177)  # half gray, half blue
    assert tuple(canvas[80, 120]) == pictures.GREEN
    assert tuple(canvas[20, 20]) == pictures.RED
    assert np.allclose(canvas[40, 150], pictures.GREEN, atol=30)  # a smoothed line
    assert tuple(canvas[190, 290]) == (100, 100, 100)
