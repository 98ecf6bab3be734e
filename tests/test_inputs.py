"""Data sets as annotation tools write them become data folders that train as they are."""

import json
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from conftest import draw_pair, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import test_my_image
import train_sam2_proper
from download_dataset import main
from finetuning.basics.files import atomic_write
from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import read_facts, split_pairs
from finetuning.inference.segmenting import read_like_training
from finetuning.sources.mask_values import MaskReader, MaskRule, parse_value

COUNT = 4
OPTIONS = ("--images", "images", "--masks", "masks", "--data", "data", "--skip-checkpoint")


def true_mask(index: int) -> np.ndarray:
    return draw_pair(index)[1]


def write_set(make_mask, suffix: str = ".png") -> None:
    """Write images, and masks that make_mask(index, bool mask) returns."""
    for index in range(COUNT):
        image, mask = draw_pair(index)
        write_image(Path(f"images/a{index}.jpg"), image)
        write_image(Path(f"masks/a{index}{suffix}"), make_mask(index, mask))


def painted(mask: np.ndarray, *colors: tuple[int, ...]) -> np.ndarray:
    """Paint a mask, or its left and right half, on black; a colour has as many channels."""
    canvas = np.zeros((*mask.shape, len(colors[0])), np.uint8)
    halves = np.cumsum(mask.sum(axis=0)) > mask.sum() / 2
    for number, color in enumerate(colors):
        canvas[mask & (halves == bool(number)) if len(colors) > 1 else mask] = color
    return canvas


def all_pairs(data: str = "data") -> dict:
    return {
        pair.name: pair for split in ("train", "val") for pair in split_pairs(Path(data), split)
    }


def write_rgba(path: Path, mask: np.ndarray) -> None:
    pixels = painted(mask, (30, 60, 200, 255))
    with atomic_write(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


@pytest.mark.parametrize(
    "make",
    [
        lambda _, mask: painted(mask, (128, 0, 0)),  # of VOC's palette
        lambda _, mask: mask.astype(np.uint8) * 3,
        lambda _, mask: mask.astype(np.uint8) * 90,
        lambda _, mask: mask.astype(np.uint16) * 700,
        lambda index, mask: painted(mask & (index > 0), (0, 0, 9)),  # one of them is empty
    ],
)
def test_black_and_one_other_value_is_a_binary_mask(run_script, tmp_path, make):
    write_set(make)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    assert "masks" not in read_facts(Path("data"))
    for name, pair in all_pairs().items():
        mask = true_mask(int(name[1:]))
        assert np.array_equal(read_mask(pair.mask), mask) or not read_mask(pair.mask).any()


def test_an_alpha_channel_that_agrees_with_the_colour_does_no_harm(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8))
    for index in range(COUNT):
        write_rgba(Path(f"masks/a{index}.png"), true_mask(index))
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    for name, pair in all_pairs().items():
        assert np.array_equal(read_mask(pair.mask), true_mask(int(name[1:])))


def test_a_black_and_white_mask_is_copied_byte_for_byte(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    assert run_script(main, *OPTIONS).status == 0
    for name, pair in all_pairs().items():
        assert pair.mask.read_bytes() == Path(f"masks/{name}.png").read_bytes()


def test_one_value_means_one_thing_in_a_data_set(run_script, tmp_path):
    write_set(lambda index, mask: mask.astype(np.uint8) * (3 if index < 2 else 5))
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 2 and not Path("data/images").exists()
    assert "a2.png has 5 besides black" in outcome.err and "a0.png has 3" in outcome.err
    assert ".partial" not in outcome.err
    outcome = run_script(main, *OPTIONS, "--mask-value", 5)
    assert outcome.status == 0, outcome.err
    assert "2 of 4 images have no object" in outcome.out


@pytest.mark.parametrize("values", [(1, 2), (255, 100), (3, 1)])
def test_classes_are_not_mixed_where_each_image_has_one(run_script, tmp_path, values):
    write_set(lambda index, mask: mask.astype(np.uint8) * values[index % 2])
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 2 and "--classes" in outcome.err


def test_other_options_are_not_taken_for_the_same_data_set(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    for index in range(COUNT):
        write_image(Path(f"others/a{index}.png"), (~true_mask(index)).astype(np.uint8) * 255)
    assert run_script(main, *OPTIONS).status == 0
    assert "nothing to do" in run_script(main, *OPTIONS).out
    others = ("--images", "images", "--masks", "others", "--skip-checkpoint")
    for options in (others, (*OPTIONS, "--value-range", "0,99"), (*OPTIONS, "--skip-unlabelled")):
        outcome = run_script(main, *options)
        assert outcome.status == 2 and "--force" in outcome.err


def test_of_several_colours_one_is_chosen(run_script, tmp_path):
    colors = (48, 112, 32), (200, 10, 10)
    write_set(lambda _, mask: painted(mask, *colors))
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 2
    assert (
        "2 values or colours besides black (a label map, or classes?): 48,112,32; 200,10,10;"
        in outcome.err
    )
    assert '--mask-value "48,112,32"' in outcome.err
    assert run_script(main, *OPTIONS, "--mask-value", "48,112,32").status == 0
    for name, pair in all_pairs().items():
        expected = (painted(true_mask(int(name[1:])), *colors) == colors[0]).all(axis=2)
        assert np.array_equal(read_mask(pair.mask), expected)


def test_a_value_that_is_advised_is_one_that_can_be_typed(run_script, tmp_path):
    values = np.where(np.arange(96) < 48, 255, 700).astype(np.uint16)[:, None]
    write_set(lambda _, mask: mask * values)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 2 and outcome.err.endswith('--mask-value "255"\n')
    assert run_script(main, *OPTIONS, "--mask-value", "255").status == 0


@pytest.mark.parametrize("option", ["--instances", "--classes"])
def test_each_value_can_be_an_object(run_script, tmp_path, option):
    colors = (48, 112, 32), (200, 10, 10)
    write_set(lambda _, mask: painted(mask, *colors))
    outcome = run_script(main, *OPTIONS, option)
    assert outcome.status == 0, outcome.err
    assert "objects: 8, 2 per image; " in outcome.out
    for name, pair in all_pairs().items():
        of_colors = painted(true_mask(int(name[1:])), *colors)
        for found, color in zip(read_objects(pair), colors, strict=True):
            assert np.array_equal(found, (of_colors == color).all(axis=2))


def test_a_label_map_of_16_bits_keeps_all_its_objects(run_script, tmp_path):
    grid = np.arange(96 * 128).reshape(96, 128)
    labels = ((grid // 128 // 4) * 32 + grid % 128 // 4 + 1).astype(np.uint16)  # 768 squares
    write_set(lambda _, mask: labels, ".tif")
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 2 and "--instances" in outcome.err
    assert run_script(main, *OPTIONS, "--instances").status == 0
    objects = read_objects(all_pairs()["a0"])
    assert len(objects) == 768
    assert all(objects[k].sum() == 16 for k in (0, 300, 767))


def test_void_counts_as_background_where_it_is_said(run_script, tmp_path):
    def make(_, mask):
        labels = mask.astype(np.uint8) * 15
        labels[:3] = 255
        return labels

    write_set(make)
    assert run_script(main, *OPTIONS).status == 2
    outcome = run_script(main, *OPTIONS, "--ignore-value", 255)
    assert outcome.status == 0, outcome.err
    for name, pair in all_pairs().items():
        expected = true_mask(int(name[1:]))
        expected[:3] = False
        assert np.array_equal(read_mask(pair.mask), expected)


def test_black_can_be_the_object(run_script, tmp_path):
    write_set(lambda _, mask: 255 * (~mask).astype(np.uint8))
    assert run_script(main, *OPTIONS, "--mask-value", 0).status == 0
    for name, pair in all_pairs().items():
        assert np.array_equal(read_mask(pair.mask), true_mask(int(name[1:])))


def test_each_part_of_a_mask_can_be_an_object(run_script, tmp_path):
    def make(_, mask):
        parts = np.zeros(mask.shape, np.uint8)
        for x in range(5, 120, 20):
            parts[10:20, x : x + 10] = 255
        parts[50:52, 50:52] = 255  # dust
        return parts

    write_set(make)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0
    assert "7 separate parts on average" in outcome.out and "--parts" in outcome.out
    outcome = run_script(main, *OPTIONS, "--parts")
    assert outcome.status == 2 and "--force" in outcome.err  # another data set than before
    outcome = run_script(main, *OPTIONS, "--parts", "--force")
    assert outcome.status == 0, outcome.err
    assert "left out 4 parts of fewer than 20 pixels" in outcome.out
    assert "objects: 24, 6 per image; " in outcome.out
    assert read_facts(Path("data"))["masks"] == "objects"
    assert [len(read_objects(pair)) for pair in all_pairs().values()] == [6] * COUNT


def test_several_masks_of_an_image_are_its_objects(run_script, tmp_path):
    squares = np.zeros((2, 96, 128), np.uint8)
    squares[0, 10:40, 10:40], squares[1, 30:60, 30:60] = 255, 255  # they overlap
    for index in range(COUNT):
        write_image(Path(f"images/a{index}.jpg"), draw_pair(index)[0])
        for number, square in enumerate(squares, start=1):
            write_image(Path(f"masks/a{index}_mask_{number}.png"), square)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    for pair in all_pairs().values():
        assert np.array_equal(np.stack(list(read_objects(pair))), squares > 0)
    assert "nothing to do" in run_script(main, *OPTIONS).out


def test_outlines_of_an_annotation_tool_are_drawn(run_script, tmp_path):
    pytest.importorskip("pycocotools")
    write_set(lambda _, mask: mask.astype(np.uint8))
    images = [{"id": i, "file_name": f"a{i}.jpg", "width": 128, "height": 96} for i in range(COUNT)]
    squares = [10, 10, 50, 10, 50, 50, 10, 50], [60, 20, 90, 20, 90, 80, 60, 80]
    annotations = [
        {"id": 2 * i + k, "image_id": i, "category_id": k, "segmentation": [square], "iscrowd": 0}
        for i in range(COUNT)
        for k, square in enumerate(squares)
    ]
    categories = [{"id": 0, "name": "고양이"}, {"id": 1, "name": "dog"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    Path("coco.json").write_text(json.dumps(document), encoding="utf-8")
    options = ("--images", "images", "--annotations", "coco.json", "--skip-checkpoint")
    outcome = run_script(main, *options)
    assert outcome.status == 0, outcome.err
    assert "COCO: 8 objects in 4 annotated images (dog 4, 고양이 4)" in outcome.out
    first, second = read_objects(all_pairs()["a0"])
    assert first[30, 30] and first.mean() == pytest.approx(1600 / first.size, rel=0.05)
    assert second[50, 70] and not (first & second).any()
    outcome = run_script(main, *options, "--data", "dogs", "--class-name", "dog")
    assert outcome.status == 0, outcome.err
    assert [len(read_objects(pair)) for pair in all_pairs("dogs").values()] == [1] * COUNT
    write_image(Path("images/more.jpg"), draw_pair(9)[0])
    outcome = run_script(main, *options, "--data", "more")
    assert outcome.status == 2 and "1 of 5 images have no object" in outcome.err
    outcome = run_script(main, *options, "--data", "more", "--skip-unlabelled")
    assert outcome.status == 0 and "left out 1 of 5 images: without an object" in outcome.out


def test_splits_of_an_annotated_set_are_kept(run_script, tmp_path):
    pytest.importorskip("pycocotools")
    for split, indices in (("train", range(4)), ("valid", range(4, 6)), ("test", range(6, 8))):
        for index in indices:
            write_image(Path(f"set/{split}/images/a{index}.jpg"), draw_pair(index)[0])
            labels = Path(f"set/{split}/labels/a{index}.txt")
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5", encoding="utf-8")
    Path("set/README.dataset.txt").write_text("from Roboflow", encoding="utf-8")
    outcome = run_script(main, "--annotations", "set", "--images", "set", "--skip-checkpoint")
    assert outcome.status == 0, outcome.err
    assert "ready split: 4 train, 2 val, 2 test" in outcome.out
    assert [pair.name for pair in split_pairs(Path("data"), "test")] == ["a6", "a7"]


def test_a_range_of_values_is_that_of_the_whole_set(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    for index in range(COUNT):
        Path(f"images/a{index}.jpg").unlink()
        ramp = np.tile(np.linspace(0, 1000 * (index + 1), 128).astype(np.uint16), (96, 1))
        write_image(Path(f"images/a{index}.png"), ramp)
    outcome = run_script(main, *OPTIONS, "--value-range", "0,4000")
    assert outcome.status == 0, outcome.err
    assert read_facts(Path("data"))["value_range"] == [0, 4000]
    brightest = {name: int(read_image(pair.image).max()) for name, pair in all_pairs().items()}
    assert brightest == {f"a{i}": pytest.approx(255 * (i + 1) / 4, abs=1) for i in range(COUNT)}


def test_images_of_8_bits_have_no_range_of_values(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    Path("images/a0.jpg").unlink()
    write_image(Path("images/a0.png"), draw_pair(0)[0].astype(np.uint16) * 16)
    outcome = run_script(main, *OPTIONS, "--value-range", "0,4080")
    assert outcome.status == 0, outcome.err
    assert "3 of 4 images have 8 bits and stay as they are" in outcome.out
    pairs = all_pairs()
    assert pairs["a1"].image.read_bytes() == Path("images/a1.jpg").read_bytes()
    assert np.array_equal(read_image(pairs["a0"].image), draw_pair(0)[0])
    # In use, as in training
    for path in (Path("images/a0.png"), Path("images/a1.jpg")):
        used = read_like_training(path, None, (0, 4080))
        assert np.array_equal(used, read_image(pairs[path.stem].image))


def test_a_data_set_without_an_object_is_refused(run_script, tmp_path):
    write_set(lambda _, mask: np.zeros_like(mask, np.uint8))
    for options in ((), ("--instances",)):
        outcome = run_script(main, *OPTIONS, *options)
        assert outcome.status == 2 and "none of the 4 masks has an object" in outcome.err
        assert not Path("data/images").exists()


def test_the_range_of_values_goes_with_the_model(run_script, tmp_path, random_mini):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    for index in range(COUNT):
        Path(f"images/a{index}.jpg").unlink()
        write_image(Path(f"images/a{index}.png"), draw_pair(index)[0].astype(np.uint16) * 8)
    assert run_script(main, *OPTIONS, "--value-range", "0,4000").status == 0
    options = ("--model", "mini", "--checkpoint", random_mini, "--epochs", 1, "--device", "cpu")
    outcome = run_script(train_sam2_proper.main, *options)
    assert outcome.status == 0, outcome.err

    scripts_options = ("--image", "images/a0.png", "--point", "60,40")
    drawn = []
    for options in ((), ("--value-range", "0,4000"), ("--value-range", "0,9000")):
        outcome = run_script(test_my_image.main, *scripts_options, *options)
        assert outcome.status == 0, outcome.err
        drawn.append(read_image(Path(f"output/my_results/a0_{len(drawn) + 1:03}_overlay.png")))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])

    image = next(Path("data/images/val").iterdir())  # of 8 bits, stretched already
    assert run_script(test_my_image.main, "--image", image, "--point", "60,40").status == 0
    (overlay,) = Path("output/my_results").glob(f"{image.stem}_*_overlay.png")
    assert read_image(overlay).max() > 200


def test_files_of_an_annotation_tool_are_not_taken_for_masks(run_script, tmp_path):
    for index in range(COUNT):
        write_image(Path(f"all/a{index}.jpg"), draw_pair(index)[0])
        Path(f"all/a{index}.json").write_text("{}", encoding="utf-8")
    outcome = run_script(main, "--images", "all", "--masks", "all", "--skip-checkpoint")
    assert outcome.status == 2 and "--annotations" in outcome.err


@pytest.mark.parametrize(
    "make, warning",
    [
        (lambda _, mask: np.full(mask.shape, 255, np.uint8), "exported all white"),
        (lambda _, mask: 255 * (~mask).astype(np.uint8), "is black the object?"),
        (lambda index, mask: 255 * (mask & (index != 1)).astype(np.uint8), "1 of 4 images have no"),
    ],
)
def test_what_looks_wrong_is_said_before_an_hour_is_spent(run_script, tmp_path, make, warning):
    write_set(make)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    assert f"{warning}" in outcome.out and "warning: " in outcome.out
    assert read_image(Path("data/overview.png")).std() > 10


def test_images_that_are_copies_of_others_are_named(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    Path("images/a3.jpg").write_bytes(Path("images/a1.jpg").read_bytes())
    outcome = run_script(main, *OPTIONS)
    assert (
        outcome.status == 0
        and "(nearly) identical images, each kept in one split: a1 = a3" in outcome.out
    )


def test_classes_that_cover_everything_are_no_mistake(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) + 1)
    outcome = run_script(main, *OPTIONS, "--classes")
    assert outcome.status == 0 and "warning" not in outcome.out


def test_usual_masks_give_no_warning(run_script, tmp_path):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    outcome = run_script(main, *OPTIONS)
    assert "objects: 4, one per image; median area" in outcome.out
    assert "warning" not in outcome.out and "data/overview.png" in outcome.out.replace("\\", "/")


@pytest.mark.parametrize(
    "options, says",
    [
        (("--mask-value", "300,1,1"), "is not like 3"),
        (("--mask-value", "red"), "is not like 3"),
        (("--mask-value", "1,2"), "is not like 3"),
        (("--value-range", "9,1"), "low<high"),
        (("--mask-value", "3", "--classes"), "uses one value"),
        (("--annotations", "coco.json"), "different sources"),
        (("--class-name", "cat"), "--class-name needs --annotations"),
        (("--pairs", "absent.csv"), "absent.csv"),
        (("--smallest-part", "0"), "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(run_script, tmp_path, options, says):
    write_set(lambda _, mask: mask.astype(np.uint8) * 255)
    before = snapshot(tmp_path)
    outcome = run_script(main, *OPTIONS, *options)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert says in outcome.err
    after = {name: content for name, content in snapshot(tmp_path).items() if ".lock" not in name}
    assert after == before


def test_a_gray_value_and_the_colour_of_it_are_one():
    assert parse_value("7") == parse_value("7,7,7") == (7,)
    assert parse_value("700") == (700,) and parse_value("1,2,3") == (1, 2, 3)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(5, 7), (5, 7, 3), (5, 7, 4)]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    values=st.lists(st.integers(0, 65535), min_size=1, max_size=6),
    chosen=st.sampled_from([{}, {"each_value": True}, {"parts": True}, {"value": (9,)}]),
    seed=st.integers(0, 99),
)
def test_any_pixels_give_masks_or_one_line(tmp_path_factory, shape, dtype, values, chosen, seed):
    path = tmp_path_factory.mktemp("pixels") / "a.png"
    pixels = np.random.default_rng(seed).choice(np.array(values).astype(dtype), shape)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    try:
        masks = list(MaskReader(MaskRule(**chosen, smallest_part=1)).read(path, path))
    except UserError as error:
        assert "\n" not in str(error) and "; " in str(error)
        return
    masks = [mask.full() for mask in masks]
    assert all(mask.shape == shape[:2] and mask.dtype == bool for mask in masks)
    if chosen.get("each_value"):  # objects of one image do not overlap
        assert sum(masks, np.zeros(shape[:2], int)).max(initial=0) <= 1
