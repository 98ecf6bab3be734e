"""Whatever the numbers, texts, files and shapes: the promises hold, and errors are UserErrors."""

import argparse
import contextlib
import dataclasses
import unicodedata
from pathlib import Path

from sam2_utils import UserError, calculate_dice, calculate_iou

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from finetuning.basics.image_files import IMAGE_SUFFIXES, read_image, read_mask, write_image
from finetuning.dataset.pairs import find_pairs
from finetuning.dataset.splitting import split_names
from finetuning.inference.given_prompts import check_inside, parse_box, parse_point
from finetuning.model.models import load_predictor
from finetuning.segmentation.drawing import draw_object
from finetuning.segmentation.predicting import (
    Prediction,
    encode_images,
    segment_with_logits,
    upscale_masks,
)
from finetuning.segmentation.prompts import (
    deepest_point,
    make_prompt,
    mask_box,
    prompt_from_mask,
    random_point,
)
from finetuning.training.losses import image_losses
from finetuning.training.recipe import GUIDE
from finetuning.training_data.training_masks import HALF, mask_on_grid

settings.register_profile("same every time", derandomize=True, deadline=None, database=None)
settings.load_profile("same every time")

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # they would reach the user

sides = st.integers(1, 60)
masks = hnp.arrays(bool, st.tuples(sides, sides))
objects = masks.filter(np.any)
seeds = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Splits and measures


@given(st.sets(st.text(), min_size=2), st.floats(1e-9, 1 - 1e-9), seeds, st.randoms())
def test_a_split_is_a_partition_that_no_order_changes(names, fraction, seed, shuffler):
    names = list(names)
    splits = split_names(names, fraction, seed)
    assert splits["train"] and splits["val"]
    assert sorted(splits["train"] + splits["val"]) == sorted(names)
    shuffler.shuffle(names)
    assert split_names(names, fraction, seed) == splits


@given(st.data(), masks)
def test_iou_and_dice_are_symmetric_and_between_0_and_1(data, first):
    second = data.draw(hnp.arrays(bool, first.shape))
    for measure in (calculate_iou, calculate_dice):
        value = measure(first, second)
        assert 0 <= value <= 1 and value == measure(second, first)
        assert measure(first, first) == pytest.approx(float(first.any()), abs=1e-5)
        tensors = torch.from_numpy(first), torch.from_numpy(second)
        assert measure(*tensors).item() == pytest.approx(value, abs=1e-6)
    assert calculate_iou(first, second) <= calculate_dice(first, second) + 1e-9


def literal_loss(logits, scores, true, score_weight):
    """Return the guide's loss, word for word, of one image in float64."""
    probability = 1 / (1 + np.exp(-logits[0]))
    seg_loss = (-true * np.log(probability) - (1 - true) * np.log(1 - probability)).mean()
    errors = []
    for mask, score in zip(logits > 0, scores, strict=True):
        intersection = np.sum(mask & (true > 0.5))
        union = np.sum(mask | (true > 0.5))
        errors.append(abs(score - intersection / (union + 1e-6)))
    return seg_loss + score_weight * np.mean(errors)


@given(st.integers(1, 3), sides, sides, seeds, st.floats(0, 10), st.floats(0.01, 20))
def test_the_loss_is_the_guides_formula_at_every_shape(
    batch, height, width, seed, score_weight, spread
):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (batch, 3, height, width)).clip(-15, 15)
    scores, true = rng.random((batch, 3)), rng.random((batch, height, width))
    # The single mask, whatever it is, is not part of the guide's loss
    all_logits = np.concatenate([rng.normal(0, 1, (batch, 1, height, width)), logits], axis=1)
    all_scores = np.concatenate([rng.random((batch, 1)), scores], axis=1)
    answers = all_logits, all_scores, rng.normal(0, 1, (batch, 1))
    prediction = Prediction(*map(torch.from_numpy, answers))
    recipe = dataclasses.replace(GUIDE, score_weight=score_weight)
    losses, report = image_losses(prediction, torch.from_numpy(true), recipe)
    for i in range(batch):
        expected = literal_loss(logits[i], scores[i], true[i], score_weight)
        assert losses[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert 0 <= report["train_iou"][i] <= 1


# Prompts


@given(objects, seeds)
def test_points_lie_in_the_mask_and_its_box_bounds_it(mask, seed):
    for x, y in (deepest_point(mask), random_point(mask, np.random.default_rng(seed))):
        assert mask[y, x]
    x1, y1, x2, y2 = mask_box(mask)
    assert mask[y1 : y2 + 1, x1 : x2 + 1].sum() == mask.sum()
    assert mask[y1].any() and mask[y2].any() and mask[:, x1].any() and mask[:, x2].any()
    for kind in ("center", "random", "box"):
        prompt = prompt_from_mask(mask, kind, np.random.default_rng(seed))
        check_inside(prompt, mask.shape[1], mask.shape[0])


@given(objects, st.sampled_from([16, 64, 256]), seeds)
def test_a_point_of_the_grid_is_on_the_object_in_the_image(mask, size, seed):
    grid = mask_on_grid(mask, size)
    cell = np.array(random_point(grid, np.random.default_rng(seed)))
    scale = np.array(mask.shape[::-1]) / size
    x1, y1 = np.floor(cell * scale - 0.5).astype(int).clip(0)  # or half a pixel beside it
    x2, y2 = np.ceil((cell + 1) * scale + 0.5).astype(int)
    assert mask[y1:y2, x1:x2].any()


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_cell_of_the_grid_is_the_object_where_half_of_it_is(height, width, data):
    mask = data.draw(hnp.arrays(bool, (8 * height, 8 * width)))
    covered = mask.reshape(8, height, 8, width).mean((1, 3))
    assume((covered >= 0.5).any())
    grid = mask_on_grid(mask, 8)
    assert np.array_equal(grid >= HALF, covered >= 0.5)
    assert abs(grid / 255 - covered).max() <= 0.501 / 255


PIXELS = st.floats(0, 1, exclude_max=True, width=32)


@given(st.integers(1, 5000), st.integers(1, 5000), PIXELS, PIXELS)
def test_prompts_and_masks_keep_their_place_at_every_aspect_ratio(
    predictor, width, height, right, down
):
    point = torch.tensor([[right * width, down * height]])
    size = predictor.model.image_size
    moved = predictor._transforms.transform_coords(point, True, (height, width))
    assert moved[0].tolist() == pytest.approx([right * size, down * size], rel=1e-5)

    assume(width * height < 100_000)  # to be quick
    cells = size // 4
    x, y = int(right * cells), int(down * cells)
    rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    cone = -((rows - y).abs() + (columns - x).abs()).float()
    peak = upscale_masks(predictor, cone[None, None], (height, width))[0, 0].argmax().item()
    peak_y, peak_x = divmod(peak, width)
    assert abs((peak_x + 0.5) * cells / width - (x + 0.5)) <= 1 + cells / width
    assert abs((peak_y + 0.5) * cells / height - (y + 0.5)) <= 1 + cells / height


@settings(max_examples=12)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), seeds)
def test_a_mask_has_its_images_shape(predictor, width, height, is_line, seed):
    shape = (1, width) if is_line else (height, width)
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    prompt = make_prompt([(width // 2, shape[0] // 2)], [(0, 0)])
    features = encode_images(predictor, [image])
    mask, score, _ = segment_with_logits(predictor, features, prompt, shape)
    assert mask.shape == shape and mask.dtype == bool and np.isfinite(score)
    draw_object(image, mask, prompt, ~mask)  # without an error, whatever the shapes


integers, floats = st.integers(-9, 99).map(str), st.floats().map(str)
number_lists = st.one_of(
    st.lists(floats, min_size=2, max_size=2),
    st.lists(integers, min_size=4, max_size=4),
    st.lists(integers | floats | st.text(max_size=2), max_size=5),
)


@given(st.text() | number_lists.map(",".join))
def test_a_text_is_a_prompt_or_a_clear_error(text):
    for parse, count in ((parse_point, 2), (parse_box, 4)):
        try:
            values = parse(text)
        except argparse.ArgumentTypeError as error:
            assert f'"{text}" is' in str(error)
        else:
            assert len(values) == count and np.isfinite(np.array(values, np.float32)).all()
            assert count == 2 or (values[0] < values[2] and values[1] < values[3])


coordinates = st.integers(-2, 62).map(float) | st.floats(-2, 62, width=32)


@given(st.tuples(coordinates, coordinates), sides, sides)
def test_a_point_outside_the_image_is_refused_and_no_other(point, width, height):
    is_inside = 0 <= point[0] < width and 0 <= point[1] < height
    with contextlib.nullcontext() if is_inside else pytest.raises(UserError, match="outside"):
        check_inside(make_prompt([point]), width, height)


# Files


@given(
    hnp.arrays(np.uint8, st.tuples(sides, sides, st.just(3))),
    st.sampled_from([".png", ".bmp", ".tif", ".ppm"]),
)
def test_an_image_written_without_loss_comes_back(folder, image, suffix):
    path = folder / f"그림{suffix}"
    write_image(path, image)
    assert np.array_equal(read_image(path), image)


@given(masks, st.sampled_from([".png", ".bmp", ".tif", ".pgm"]), st.sampled_from([1, 128, 255]))
def test_a_mask_written_without_loss_comes_back(folder, mask, suffix, white):
    path = folder / f"마스크{suffix}"
    write_image(path, mask * np.uint8(white))
    assert np.array_equal(read_mask(path), mask)


def assert_read_or_refused(path: Path) -> None:
    with contextlib.suppress(UserError):
        image = read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    with contextlib.suppress(UserError):
        mask = read_mask(path)
        assert mask.dtype == bool and mask.ndim == 2


HEADERS = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"GIF89a", b"P5 2 2 9 "]


@given(st.sampled_from(HEADERS), st.binary())
def test_any_bytes_are_read_or_refused(folder, header, rest):
    path = folder / "bytes.png"
    path.write_bytes(header + rest)
    assert_read_or_refused(path)


@given(st.sampled_from([".jpg", ".png", ".tif", ".bmp", ".webp"]), st.data())
def test_damaged_files_are_read_or_refused(folder, suffix, data):
    content = cv2.imencode(suffix, np.eye(24, dtype=np.uint8) * 255)[1]
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))].tobytes())
    assert_read_or_refused(path)


DTYPES = {
    ".png": [np.uint8, np.uint16],
    ".tif": [np.int8, np.int16, np.int32, np.float32, np.float64],
}


@given(st.data(), st.sampled_from(list(DTYPES)), sides, sides, st.sampled_from([(), (3,), (4,)]))
def test_any_array_is_read_as_a_mask_or_refused(folder, data, suffix, height, width, channels):
    dtype = data.draw(st.sampled_from(DTYPES[suffix]))
    array = data.draw(hnp.arrays(dtype, (height, width, *channels)))
    path = folder / f"array{suffix}"
    path.write_bytes(cv2.imencode(suffix, array)[1].tobytes())
    assert_read_or_refused(path)
    with contextlib.suppress(UserError):
        assert read_mask(path).shape == (height, width)


NAMES = ["a", "b", "한", "\u1112\u1161\u11ab", " a.b"]  # one composed, one decomposed
image_suffixes = st.sampled_from([".png", ".JPG", ".tif"])
more_files = st.sets(st.sampled_from([".a.png", "a.png", "b.tif", "c.JPG", "c.txt", "d.heic"]))


@given(
    st.dictionaries(st.sampled_from(NAMES), st.tuples(image_suffixes, image_suffixes)), st.data()
)
def test_files_pair_up_one_to_one_by_their_stems_or_are_refused(tmp_path_factory, suffixes, data):
    folders = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("masks")
    for i, folder in enumerate(folders):
        names = {name + suffixes[name][i] for name in suffixes}
        for name in names | (data.draw(more_files) if data.draw(st.booleans()) else set()):
            (folder / name).touch()
    with contextlib.suppress(UserError):
        pairs = find_pairs(*folders)
        names = [pair.name for pair in pairs]
        assert names == sorted(set(names))
        for i, folder in enumerate(folders, start=1):
            visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
            images = {path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES}
            assert {pair[i] for pair in pairs} == images
            assert [unicodedata.normalize("NFC", pair[i].stem) for pair in pairs] == names
