"""An image with several objects: each is an example of its own, and the image is encoded once."""

import contextlib
import csv
import re
from collections import Counter
from pathlib import Path

from sam2_utils import UserError

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

import compare_models
import test_my_image
import train_sam2_proper
from finetuning.basics.cropped_masks import crop_mask, value_masks
from finetuning.basics.image_files import read_image, write_image
from finetuning.dataset.objects import count_objects, limit_objects, read_objects
from finetuning.dataset.pairs import Pair, facts_text, read_facts, split_pairs
from finetuning.evaluation.interval import bootstrap_interval
from finetuning.evaluation.measuring import measure
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.preparation.filling import write_objects
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.training_data.batches import TrainingSet
from finetuning.training_data.epoch_sampling import EpochSampler

SIZE = (96, 128)


def disk(x: int, y: int, radius: int = 9) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def draw_disks(count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw bright disks, beside each other, on a dark noisy ground."""
    image = np.random.default_rng(count).integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    masks = [disk(14 + 24 * (k % 5), 20 + 30 * (k // 5)) for k in range(count)]
    for k, mask in enumerate(masks):
        image[mask] += np.array([150 - 10 * k, 100, 60 + 10 * k], np.uint8)
    return image, masks


def write_disks(folder: Path, counts: dict[str, list[int]]) -> Path:
    """Write a data folder whose images have so many objects each."""
    for split, of_split in counts.items():
        for index, count in enumerate(of_split):
            image, masks = draw_disks(count)
            write_image(folder / "images" / split / f"{split}_{index}.png", image)
            write_objects(folder / "masks" / split / f"{split}_{index}", masks, SIZE)
    (folder / "split.json").write_text(facts_text({"masks": "objects"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


def test_each_value_of_a_label_map_is_an_object(tmp_path):
    labels = np.zeros(SIZE, np.uint16)
    labels[disk(30, 30)], labels[disk(60, 60)] = 300, 7
    write_image(tmp_path / "a.png", labels)
    objects = read_objects(Pair("a", tmp_path / "a.png", tmp_path / "a.png", per_object=True))
    assert objects.size == SIZE and len(objects) == 2
    assert np.array_equal(objects[0], disk(60, 60)) and np.array_equal(objects[1], disk(30, 30))


def test_a_binary_mask_is_one_object_or_none(tmp_path):
    for name, mask in (("a", disk(30, 30)), ("b", np.zeros(SIZE, bool))):
        write_image(tmp_path / f"{name}.png", mask.astype(np.uint8) * 255)
    pairs = [Pair(name, tmp_path / f"{name}.png", tmp_path / f"{name}.png") for name in "ab"]
    assert [len(read_objects(pair)) for pair in pairs] == [1, 0]
    assert count_objects(pairs) == {0: 1}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 95), st.integers(1, 20)), max_size=8))
def test_objects_are_read_as_they_were_written_overlapping_or_not(tmp_path_factory, disks):
    folder = tmp_path_factory.mktemp("objects")
    masks = [disk(*one) for one in disks]
    areas = write_objects(folder / "a", masks, SIZE)
    (written,) = folder.iterdir()
    overlap = sum(masks, np.zeros(SIZE, int)).max() > 1
    assert written.name == ("a.tif" if overlap else "a.png")
    objects = read_objects(Pair("a", written, written, per_object=True))
    assert len(objects) == len(masks)
    for found, mask, area in zip(objects, masks, areas, strict=True):
        assert np.array_equal(found, mask) and area == mask.mean()


def write_overlapping(folder: Path) -> tuple[Pair, list[np.ndarray]]:
    """Write 300 disks, many of which overlap, as the objects of an image."""
    rng = np.random.default_rng(0)
    masks = [disk(*rng.integers(SIZE[::-1]), 5) for _ in range(300)]
    write_objects(folder / "a", masks, SIZE)
    return Pair("a", folder / "a.tif", folder / "a.tif", per_object=True), masks


def test_overlapping_objects_are_one_file_that_other_programs_open(tmp_path):
    pair, masks = write_overlapping(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    assert pair.mask_files() == [pair.mask]
    with Image.open(pair.mask) as file:
        pages = [np.array(page) for page in ImageSequence.Iterator(file)]
    assert len(pages) > 2 and {page.dtype for page in pages} == {np.dtype(np.uint16)}
    for number, mask in enumerate(masks, start=1):
        (found,) = [page == number for page in pages if (page == number).any()]
        assert np.array_equal(found, mask)
    some = read_objects(pair._replace(chosen=(299, 7)))
    assert np.array_equal(some[0], masks[299]) and np.array_equal(some[1], masks[7])


def test_a_damaged_file_of_overlapping_objects_is_refused_not_read_in_part(tmp_path, capfd):
    pair, masks = write_overlapping(tmp_path)
    content, rng = pair.mask.read_bytes(), np.random.default_rng(1)
    damaged = [content[: len(content) * k // 20] for k in range(20)]
    for place in rng.integers(len(content), size=40):
        changed = bytearray(content)
        changed[place] ^= 255
        damaged.append(bytes(changed))
    for changed in damaged:
        pair.mask.write_bytes(changed)
        with contextlib.suppress(UserError):
            assert all(map(np.array_equal, read_objects(pair), masks))


def test_a_folder_with_a_file_for_each_object_is_read_as_earlier_versions_wrote_it(tmp_path):
    masks = [disk(30, 30), disk(35, 30), disk(90, 60)]
    for number, mask in enumerate(masks, start=1):
        write_image(tmp_path / "a" / f"{number:05}.png", mask.astype(np.uint8) * 255)
    objects = read_objects(Pair("a", tmp_path / "a", tmp_path / "a", per_object=True))
    assert objects.size == SIZE and len(objects) == 3
    assert all(map(np.array_equal, objects, masks))
    assert np.array_equal(objects.together()[0], np.logical_or.reduce(masks))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((np.uint8, np.uint16, np.int64)))
def test_the_masks_of_all_values_are_found_in_one_pass(seed, dtype):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, rng.integers(1, 256), rng.integers(1, 12, 2)).astype(dtype)
    expected = {value: values == value for value in np.unique(values).tolist() if value}
    found = dict(value_masks(values))
    assert list(found) == list(expected)  # in ascending order
    for value, mask in found.items():
        assert np.array_equal(mask.full(), expected[value])
        assert crop_mask(mask).box == mask.box and mask.area == expected[value].sum()
        assert all(mask.overlap(other) == 0 for other in found.values() if other is not mask)
        assert mask.overlap(crop_mask(values > 0)) == mask.area


def test_what_split_json_says_decides_how_masks_are_read(tmp_path):
    data = write_disks(tmp_path / "data", {"train": [3, 1]})
    assert [len(read_objects(pair)) for pair in split_pairs(data, "train")] == [3, 1]
    (data / "split.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(Exception, match="is damaged"):
        split_pairs(data, "train")


def test_split_json_is_refused_whatever_character_of_it_has_changed(tmp_path):
    data = write_disks(tmp_path / "data", {"train": [1]})
    facts = {"source": "demo", "groups": {"train": {"disks_0": "patient 7"}}, "val_fraction": 0.2}
    text = facts_text(facts)
    (data / "split.json").write_text(text, encoding="utf-8")
    assert read_facts(data) == facts
    for place, character in enumerate(text):
        for damaged in (chr(ord(character) ^ 1), chr(ord(character) ^ 16), ""):
            changed = text[:place] + damaged + text[place + 1 :]
            (data / "split.json").write_text(changed, encoding="utf-8")
            with contextlib.suppress(UserError):
                assert read_facts(data) == facts, changed


def test_an_epoch_has_so_many_objects_of_an_image_and_all_have_their_turn():
    objects = {0: 1, 1: 2, 2: 40}
    sampler = EpochSampler(objects, 2, seed=3, objects_per_image=4)
    seen: dict[int, Counter] = {index: Counter() for index in objects}
    for sampler.epoch in range(1, 11):
        steps = list(sampler)
        assert [steps] == [list(sampler)]
        assert sorted(index for step in steps for index in step.indices) == [0, 1, 2]
        for step in steps:
            for index, chosen in zip(step.indices, step.objects, strict=True):
                assert len(set(chosen)) == len(chosen) == min(4, objects[index])
                seen[index].update(chosen)
    assert {index: len(of_image) for index, of_image in seen.items()} == objects
    assert set(seen[2].values()) == {1}


def test_with_one_object_an_image_their_number_changes_nothing():
    one, many = (EpochSampler(dict.fromkeys(range(7), 1), 3, 0, count) for count in (1, 4))
    assert list(one) == list(many)


def test_processes_share_a_step_by_its_objects(monkeypatch):
    objects = {0: 1, 1: 3, 2: 2, 3: 4}
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        shares.append(list(EpochSampler(objects, 3, seed=0, objects_per_image=4)))
    for theirs, ours in zip(*shares, strict=True):
        counts = [sum(map(len, step.objects)) for step in (theirs, ours) if step.fraction]
        assert theirs.fraction + ours.fraction == pytest.approx(1)
        assert theirs.fraction == pytest.approx(counts[0] / sum(counts))


@pytest.mark.parametrize("is_cached", [True, False])
def test_objects_of_one_image_are_decoded_together_as_each_alone(tmp_path, predictor, is_cached):
    pairs = split_pairs(write_disks(tmp_path / "data", {"train": [5, 2]}), "train")
    cache = None
    if is_cached:
        cache = FeatureCache(tmp_path / "cache", predictor, torch.float32)
        cache.fill([pair.image for pair in pairs], predictor, "train")
    (step,) = EpochSampler({0: 5, 1: 2}, 2, seed=0, objects_per_image=3)
    batch = TrainingSet(pairs, cache, 256, seed=0)[step]
    assert len(batch.prompts) == len(batch.true_masks) == len(batch.image_of) == 5
    assert Counter(batch.image_of) == Counter({i: len(k) for i, k in enumerate(step.objects)})

    features = batch.features or encode_images(predictor, batch.images)
    features = features.to(CPU, torch.float32)
    assert len(features.image_embed) == 2  # images are encoded, or read, once
    with torch.no_grad():
        sizes = [(256, 256)] * 5
        together = predict_masks(predictor, features.of(batch.image_of), batch.prompts, sizes)
        for row, image in enumerate(batch.image_of):
            alone = predict_masks(
                predictor, features.of([image]), batch.prompts[row : row + 1], sizes[:1]
            )
            assert torch.allclose(alone.mask_logits[0], together.mask_logits[row], atol=1e-3)

    # Each prompt lies in its own object, each true mask is that object's
    examples = [(i, k) for i, chosen in enumerate(step.objects) for k in chosen]
    for (i, k), prompt, mask in zip(examples, batch.prompts, batch.true_masks, strict=True):
        true = read_objects(pairs[step.indices[i]])[k]
        x, y = prompt.point_coords[0] * [SIZE[1] / 256, SIZE[0] / 256]
        assert true[int(y), int(x)]
        assert mask.float().mean() / 255 == pytest.approx(true.mean(), rel=0.1)


def test_every_object_is_measured_and_an_image_without_any_left_out(tmp_path, predictor):
    pairs = split_pairs(write_disks(tmp_path / "data", {"val": [3, 0, 2]}), "val")
    model = Model(predictor, FeatureSource(predictor, torch.float32))
    results = measure([model], pairs)
    assert [(result.index, result.object) for result in results] == [
        (0, 0), (0, 1), (0, 2), (2, 0), (2, 1),
    ]  # fmt: skip
    for result in results:
        (x, y) = result.prompt.point_coords[0].astype(int)
        assert read_objects(result.pair)[result.object][y, x]
    chosen = measure([model], [pairs[0]._replace(chosen=(2,))])
    assert chosen[0].metrics == results[2].metrics


def test_images_are_resampled_not_their_objects():
    rng = np.random.default_rng(0)
    of_images = rng.normal(0.1, 0.2, 40)
    images = np.repeat(np.arange(40), 25)
    gains = of_images[images] + rng.normal(0, 0.01, len(images))
    low, high = bootstrap_interval(gains, 0, images)
    naive_low, naive_high = bootstrap_interval(gains, 0)
    assert high - low > 4 * (naive_high - naive_low)
    standard_error = of_images.std() / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_an_image_of_many_objects_counts_for_all_of_them_in_the_interval():
    # 20 images have nine objects that gain, 20 have one that does not: 9/10 of all objects gain
    counts = np.array([9] * 20 + [1] * 20)
    images = np.repeat(np.arange(40), counts)
    gains = (images < 20).astype(float)
    low, high = bootstrap_interval(gains, 0, images)
    assert 0.75 < low < 0.9 < high < 1


def test_validation_takes_some_of_very_many_objects(tmp_path, capsys):
    pairs = split_pairs(write_disks(tmp_path / "data", {"val": [8, 0, 9, 1]}), "val")
    assert limit_objects(pairs, most=18) == pairs
    assert capsys.readouterr().out == ""
    some = limit_objects(pairs, most=6)
    assert sum(len(read_objects(pair)) for pair in some) == 6
    assert some == limit_objects(pairs, most=6) != limit_objects(pairs, most=6, seed=1)
    assert "6 of the 18 val objects" in capsys.readouterr().out
    binary = split_pairs(write_data(tmp_path / "binary"), "val")
    assert limit_objects(binary, most=1) == binary


def test_training_and_comparison_count_the_same_objects(run_script, tmp_path, random_mini):
    data = write_disks(tmp_path / "data", {"train": [3, 1, 9], "val": [4, 2]})
    (data / "masks/val/val_1.png").unlink()
    write_objects(data / "masks/val/val_1", [disk(14, 20), disk(24, 20)], SIZE)  # they overlap
    assert (data / "masks/val/val_1.tif").is_file()
    options = "--model", "mini", "--checkpoint", random_mini
    outcome = run_script(
        train_sam2_proper.main, *options, "--epochs", 1, "--objects-per-image", 3, "--lr", 1e-3
    )
    assert outcome.status == 0, outcome.err
    before = re.search(r"before training: val IoU (\S+)", outcome.out)[1]

    outcome = run_script(compare_models.main, "--figures", 5, "--clicks", 2)
    assert outcome.status == 0, outcome.err
    assert re.search(rf"^  IoU +{before} ", outcome.out, re.MULTILINE)
    assert "6 objects in 2 images: " in outcome.out
    assert "bootstrap over 2 images" in outcome.out and "(6 objects;" in outcome.out
    folder = Path("output/comparison")
    for name, columns in (("results.csv", 1), ("clicks.csv", 2)):
        with (folder / name).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        counted = Counter(row["image"] for row in rows)
        assert counted == {"val_0.png": 4 * columns, "val_1.png": 2 * columns}
        assert {row["object"] for row in rows} == set("1234")
    assert len(list(folder.glob("comparison_*.png"))) == 2


def segment(run_script, tmp_path, random_mini, *options):
    write_image(tmp_path / "a.png", draw_pair(0)[0])
    return run_script(test_my_image.main, "--image", "a.png", "--checkpoint", random_mini, *options)


def test_several_boxes_give_several_objects_in_one_label_map(run_script, tmp_path, random_mini):
    boxes = ("--box", "5,5,40,40"), ("--box", "60,50,120,90")
    masks = []
    for box in boxes:
        assert segment(run_script, tmp_path, random_mini, *box).status == 0
        masks.append(
            read_image(Path(f"output/my_results/a_{len(masks) + 1:03}_mask.png"))[..., 0] > 0
        )
    outcome = segment(run_script, tmp_path, random_mini, *boxes[0], *boxes[1])
    assert outcome.status == 0, outcome.err
    labels = read_image(Path("output/my_results/a_003_labels.png"))[..., 0]
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert np.array_equal(labels > 0, masks[0] | masks[1])
    for number, (mask, other) in enumerate((masks, masks[::-1]), start=1):
        assert (labels[mask & ~other] == number).all()
    assert Path("output/my_results/a_003_overlay.png").is_file()
    assert not Path("output/my_results/a_003_mask.png").exists()
    assert "object 1" in outcome.out and "object 2" in outcome.out


def test_points_belong_to_the_object_begun_last():
    given = [
        ("--point", (1, 2)), ("--box", (0, 0, 9, 9)), ("--negative-point", (3, 4)),
        ("--box", (5, 5, 8, 8)), ("--next-object", []), ("--point", (6, 7)), ("--point", (7, 7)),
    ]  # fmt: skip
    prompts = test_my_image.make_prompts(given)
    assert [prompt.point_labels.tolist() for prompt in prompts] == [[2, 3, 1, 0], [2, 3], [1, 1]]


@pytest.mark.parametrize(
    "options",
    [
        ("--next-object", "--point", "3,3"),
        ("--point", "3,3", "--next-object"),
        ("--point", "3,3", "--next-object", "--next-object", "--point", "4,4"),
    ],
)
def test_an_object_without_points_is_refused(run_script, tmp_path, random_mini, options):
    outcome = segment(run_script, tmp_path, random_mini, *options)
    assert outcome.status == 2 and "--next-object goes between" in outcome.err
