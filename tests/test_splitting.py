"""Splits keep what belongs together on one side, and come near to their fractions."""

import csv
import itertools
import json
import random
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from conftest import draw_pair, write_pair, write_pairs
from hypothesis import given
from hypothesis import strategies as st

import train_sam2_proper
from compare_models import choose_pairs
from download_dataset import main
from finetuning.basics.image_files import read_image, write_image
from finetuning.dataset.pairs import split_pairs
from finetuning.dataset.splitting import make_folds, split_names
from finetuning.preparation import copies
from finetuning.preparation.copies import find_copies, make_thumbnail
from finetuning.preparation.groups import join_groups

OPTIONS = ("--images", "images", "--masks", "masks", "--skip-checkpoint")

grouped = st.lists(st.integers(1, 6), min_size=3, max_size=9).map(
    lambda sizes: {f"{g}_{i}": f"g{g}" for g, size in enumerate(sizes) for i in range(size)}
)
fractions = st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.4])


# Properties of a split


@given(grouped, fractions, st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 99))
def test_no_group_is_on_two_sides(group_of, val_fraction, test_fraction, seed):
    splits = split_names(group_of, val_fraction, seed, test_fraction, group_of)
    assert sorted(splits) == sorted(["train", "val", *["test"] * bool(test_fraction)])
    assert all(splits.values())
    assert sorted(itertools.chain(*splits.values())) == sorted(group_of)
    sides = {(group_of[name], split) for split, names in splits.items() for name in names}
    assert len(sides) == len(set(group_of.values()))
    assert splits == split_names(list(group_of)[::-1], val_fraction, seed, test_fraction, group_of)


@given(grouped, fractions, st.integers(0, 99))
def test_fractions_are_met_as_nearly_as_groups_allow(group_of, fraction, seed):
    sizes = [list(group_of.values()).count(group) for group in set(group_of.values())]
    totals = [sum(some) for k in range(1, len(sizes)) for some in itertools.combinations(sizes, k)]
    wanted = round(len(group_of) * fraction)
    val = split_names(group_of, fraction, seed, 0.0, group_of)["val"]
    assert abs(len(val) - wanted) == min(abs(total - wanted) for total in totals)


@given(st.sets(st.text(max_size=4), min_size=2), fractions, st.integers(0, 99))
def test_without_groups_a_split_is_what_it_always_was(names, fraction, seed):
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    count = min(max(round(len(names) * fraction), 1), len(names) - 1)
    assert split_names(names, fraction, seed) == {
        "train": sorted(shuffled[count:]),
        "val": sorted(shuffled[:count]),
    }


@given(st.sets(st.text(max_size=4), min_size=20, max_size=60), fractions, st.integers(0, 99))
def test_val_is_the_same_with_a_test_split_and_without(names, fraction, seed):
    with_test = split_names(names, fraction, seed, 0.1)
    assert with_test["val"] == split_names(names, fraction, seed)["val"]
    assert len(with_test["test"]) == max(round(len(names) * 0.1), 1)


@given(grouped, st.integers(2, 3), st.integers(0, 99))
def test_folds_have_each_name_once_and_each_group_whole(group_of, count, seed):
    folds = make_folds(group_of, count, seed, group_of)
    assert len(folds) == count and all(folds)
    assert sorted(itertools.chain(*folds)) == sorted(group_of)
    assert sum(len({group_of[name] for name in fold}) for fold in folds) == len(
        set(group_of.values())
    )
    largest = max(list(group_of.values()).count(group) for group in group_of.values())
    assert max(map(len, folds)) - min(map(len, folds)) <= largest


@pytest.mark.parametrize("seed", range(5))
def test_a_large_group_is_for_training(seed):
    group_of = {f"{g}{i}": g for g, size in (("a", 60), ("b", 5), ("c", 5)) for i in range(size)}
    splits = split_names(group_of, 0.2, seed, 0.1, group_of)
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 60, "val": 5, "test": 5,
    }  # fmt: skip


def test_too_few_groups_are_refused():
    group_of = {"a1": "a", "a2": "a", "a3": "a"}
    with pytest.raises(UserError, match=r"3 pairs in 1 group, which stay together, cannot be"):
        split_names(group_of, 0.2, 0, 0.0, group_of)
    with pytest.raises(UserError, match="2 pairs cannot be split into train, val and test"):
        split_names("ab", 0.2, 0, 0.1)
    with pytest.raises(UserError, match="--folds 3 needs as many groups of images; there are 2"):
        make_folds("ab", 3, 0, {})


# Copies


def thumbnails_of(images: list[np.ndarray]) -> list[np.ndarray]:
    return [make_thumbnail(image) for image in images]


def framed_scene(index: int) -> np.ndarray:
    """Draw blobs in a round picture on black: unlike others but for the frame."""
    rng = np.random.default_rng(index)
    image = cv2.resize(rng.integers(90, 250, (7, 7, 3), dtype=np.uint8), (160, 160))
    circle = np.zeros((160, 160), np.uint8)
    cv2.circle(circle, (80, 80), 70, 1, -1)
    return image * circle[..., None]


def test_copies_are_found_though_brighter_smaller_or_compressed():
    images = [framed_scene(index) for index in range(12)]
    brighter = np.clip(images[3] * 0.8 + 20, 0, 255).astype(np.uint8)
    smaller = cv2.resize(images[7], (90, 80), interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", images[5], [cv2.IMWRITE_JPEG_QUALITY, 30])
    images += [brighter, smaller, cv2.imdecode(jpeg, cv2.IMREAD_COLOR)]
    copies = find_copies(thumbnails_of(images), list(map(str, range(15))))
    assert [copy[:2] for copy in copies] == [(3, 12), (5, 14), (7, 13)]
    assert all(0.96 <= copy.correlation <= 1 for copy in copies)


def test_what_all_images_share_makes_no_copies():
    rng = np.random.default_rng(0)
    room = cv2.resize(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8), (160, 160))
    images = []
    for x in range(10, 150, 12):  # a fixed camera, and somebody who walks through its picture
        images.append(room.copy())
        cv2.circle(images[-1], (x, 80), 5, (255, 255, 255), -1)
    thumbnails = thumbnails_of(images)
    flat = np.stack(thumbnails).reshape(len(images), -1)
    assert np.corrcoef(flat).min() > 0.9  # as they are, they look alike
    assert find_copies(thumbnails, list(map(str, range(len(images))))) == []


def test_fixed_cameras_make_no_copies():
    rng = np.random.default_rng(0)
    rooms = [
        cv2.resize(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8), (160, 160)) for _ in range(3)
    ]
    images = []
    for index in range(60):
        images.append(rooms[index % 3].copy())
        for x, y in rng.integers(10, 150, (5, 2)).tolist():
            cv2.circle(images[-1], (x, y), 4, rng.integers(0, 255, 3).tolist(), -1)
    images.append(cv2.GaussianBlur(images[7], (3, 3), 0))  # and one that is a copy
    copies = find_copies(thumbnails_of(images), list(map(str, range(61))))
    assert [copy[:2] for copy in copies] == [(7, 60)]


def test_upper_bounds_of_correlations_lose_no_copy(monkeypatch):
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 255, (60, 8, 8), np.uint8)
    thumbnails = [cv2.resize(scene, (copies.SIDE, copies.SIDE)) for scene in scenes]
    for index in range(20):  # noisy copies; ten of one scene
        original = thumbnails[max(index - 10, 0)].astype(int)
        noisy = np.clip(original + rng.normal(0, 2 + index, original.shape), 0, 255)
        thumbnails.append(noisy.astype(np.uint8))
    contents = list(map(str, range(len(thumbnails))))
    found = [copy[:2] for copy in find_copies(thumbnails, contents)]
    monkeypatch.setattr(copies, "COMPONENTS", 8)
    for few in (0, 10**6):
        monkeypatch.setattr(copies, "FEW_PAIRS", few)
        assert [copy[:2] for copy in find_copies(thumbnails, contents)] == found
    assert found


def test_equal_files_are_copies_whatever_they_show():
    black = np.zeros((8, 8, 3), np.uint8)
    copies = find_copies(thumbnails_of([black, black, black]), ["a", "b", "a"])
    assert copies == [(0, 2, 1.0)]


def test_groups_that_share_a_copy_become_one():
    groups = join_groups(["p", "p", "q", None, None, None], [(1, 2), (3, 4)], list("abcdef"))
    assert groups == ["p", "p", "p", "copies of d", "copies of d", None]


# As the user types it


def read_groups() -> dict[str, dict[str, str]]:
    return json.loads(Path("data/split.json").read_text(encoding="utf-8"))["groups"]


def test_copies_stay_on_one_side_and_are_listed(run_script, tmp_path):
    write_pairs(tmp_path, 12)
    for copy, original in (("z", "pair_002"), ("y", "pair_007")):
        Path(f"masks/{copy}.png").write_bytes(Path(f"masks/{original}.png").read_bytes())
        write_image(Path(f"images/{copy}.png"), read_image(Path(f"images/{original}.jpg")))
    for seed in range(4):
        outcome = run_script(main, *OPTIONS, "--seed", seed, "--force")
        assert outcome.status == 0, outcome.err
        assert (
            "copies: 2 pairs of (nearly) identical images, each kept in one split: " in outcome.out
        )
        val = {pair.name: pair.group for pair in split_pairs(Path("data"), "val")}
        assert ("z" in val) == ("pair_002" in val) and ("y" in val) == ("pair_007" in val)
        for split in ("train", "val"):
            for pair in split_pairs(Path("data"), split):
                is_copy = pair.name in ("z", "y", "pair_002", "pair_007")
                assert (pair.group is not None) == is_copy
    with Path("data/copies.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["image"], row["copy"]) for row in rows} == {("pair_002", "z"), ("pair_007", "y")}
    assert all(row["split"] == row["split_of_copy"] for row in rows)

    outcome = run_script(main, *OPTIONS, "--copies", "ignore")
    assert outcome.status == 2 and "with other options" in outcome.err
    torn = False
    for seed in range(4):
        outcome = run_script(main, *OPTIONS, "--copies", "ignore", "--seed", seed, "--force")
        torn |= "of them in different splits" in outcome.out
        assert read_groups() == {}
    assert torn


def test_a_data_set_of_before_is_split_as_before(run_script, tmp_path):
    write_pairs(tmp_path, 10)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0 and "copies" not in outcome.out and "warning" not in outcome.out
    facts = json.loads(Path("data/split.json").read_text(encoding="utf-8"))
    assert facts["val"] == split_names([f"pair_{i:03}" for i in range(10)], 0.2, 42)["val"]
    assert not Path("data/images/test").exists() and not list(Path("data").rglob("*unsplit*"))
    with Path("data/copies.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.DictReader(file)) == []


def write_videos() -> None:
    """Write 12 frames of 4 videos, one of them in Korean."""
    for index in range(12):
        image, mask = draw_pair(index)
        name = f"{('video1', 'video2', 'b-3', '영상')[index // 3]}_{index:06}"
        write_image(Path(f"images/{name}.png"), image)
        write_image(Path(f"masks/{name}.png"), mask.astype(np.uint8) * 255)


def test_frames_of_videos_are_noticed_and_can_be_kept_together(run_script, tmp_path):
    write_videos()
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0 and "look like frames of 4 videos" in outcome.out
    option = outcome.out.partition('--group-regex "')[2].partition('"')[0]

    outcome = run_script(main, *OPTIONS, "--group-regex", option, "--test-fraction", "0.25")
    assert outcome.status == 2 and "--force" in outcome.err  # it holds another split
    options = ("--group-regex", option, "--test-fraction", "0.25", "--val-fraction", 0.25)
    outcome = run_script(main, *OPTIONS, *options, "--force")
    assert outcome.status == 0, outcome.err
    assert "groups: 4, which stay together" in outcome.out and "warning" not in outcome.out
    found = {
        split: {pair.group for pair in split_pairs(Path("data"), split)}
        for split in ("train", "val", "test")
    }
    assert {split: len(groups) for split, groups in found.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    assert set.union(*found.values()) == {"video1", "video2", "b-3", "영상"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp949"])
def test_groups_of_a_table(run_script, tmp_path, encoding):
    write_videos()
    names = sorted(path.name for path in Path("images").iterdir())
    rows = [f"{name},{'환자' if index % 2 else 'other'}" for index, name in enumerate(names)]
    Path("groups.csv").write_text("\n".join(["image,group", *rows]), encoding=encoding)
    outcome = run_script(main, *OPTIONS, "--groups", "groups.csv")
    assert outcome.status == 0, outcome.err
    assert {pair.group for pair in split_pairs(Path("data"), "val")} in ({"환자"}, {"other"})

    Path("groups.csv").write_text("\n".join(["image,group", *rows[1:]]), encoding=encoding)
    outcome = run_script(main, *OPTIONS, "--groups", "groups.csv", "--force")
    assert outcome.status == 2 and "has no group for 1 of 12 images: b-3_0" in outcome.err
    assert {pair.group for pair in split_pairs(Path("data"), "val")}  # what there was is kept


def test_images_whose_names_do_not_match_are_on_their_own(run_script, tmp_path):
    write_pairs(tmp_path, 6)
    for kind in ("images", "masks"):
        for index in (0, 1, 2):
            path = next(Path(kind).glob(f"pair_00{index}.*"))
            path.rename(path.with_stem(f"scan{index}"))
    outcome = run_script(main, *OPTIONS, "--group-regex", "(.+)[_-]")
    assert outcome.status == 0, outcome.err
    assert "groups: 1, which stay together; 3 images are in none: scan0" in outcome.out
    pairs = [pair for split in ("train", "val") for pair in split_pairs(Path("data"), split)]
    assert {pair.name: pair.group for pair in pairs if pair.group} == dict.fromkeys(
        ("pair_003", "pair_004", "pair_005"), "pair"
    )


def test_a_table_with_two_groups_for_one_name_is_refused(run_script, tmp_path):
    write_pairs(tmp_path, 3)
    rows = [f"{site}/images/pair_00{i}.jpg,{site}" for site in "ab" for i in range(3)]
    Path("groups.csv").write_text("\n".join(["image,group", *rows]), encoding="utf-8")
    outcome = run_script(main, *OPTIONS, "--groups", "groups.csv")
    assert outcome.status == 2 and "row 5: images/pair_000.jpg is in two groups" in outcome.err


@pytest.mark.parametrize(
    "options, says",
    [
        (("--group-regex", "(patient"), "is not a valid pattern"),
        (("--group-regex", "patient"), "is in no image's name"),
        (("--groups", "none.csv"), "no such file: none.csv"),
        (("--groups", "none.csv", "--group-regex", "a"), "give one of them"),
        (("--test-fraction", "0.9"), "leave nothing to train on"),
        (("--test-fraction", "1"), "below 1"),
    ],
)
def test_what_does_not_fit_is_refused(run_script, tmp_path, options, says):
    write_pairs(tmp_path, 4)
    outcome = run_script(main, *OPTIONS, *options)
    assert outcome.status == 2 and says in outcome.err
    assert not Path("data/images").exists()


def test_a_ready_split_is_kept_and_its_divided_groups_are_named(run_script, tmp_path):
    for index in range(6):
        image, mask = draw_pair(index)
        split = ("train", "val", "test")[index % 3]
        name = f"p{index // 3}_{index}.png"
        write_image(Path(f"set/images/{split}/{name}"), image)
        write_image(Path(f"set/masks/{split}/{name}"), mask.astype(np.uint8) * 255)
    options = ("--archive", "set", "--skip-checkpoint", "--group-regex", r"(p\d)_")
    outcome = run_script(main, *options)
    assert outcome.status == 0, outcome.err
    assert "warning: the given split divides 2 groups: p0, p1" in outcome.out
    assert [pair.group for pair in split_pairs(Path("data"), "test")] == ["p0", "p1"]
    outcome = run_script(main, *options, "--test-fraction", "0.1", "--force")
    assert outcome.status == 2 and "split already" in outcome.err


@pytest.mark.parametrize("split", ["test", "val"])
def test_images_to_measure_alone_make_a_data_folder_that_is_not_trained_on(
    run_script, tmp_path, split
):
    for index in range(3):
        write_pair(index, Path(f"set/{split}/images"), Path(f"set/{split}/masks"))
    outcome = run_script(main, "--archive", "set", "--skip-checkpoint")
    assert outcome.status == 0, outcome.err
    assert f"ready split: 3 {split}; to measure with compare_models.py" in outcome.out
    assert len(split_pairs(Path("data"), split)) == 3 and Path("data/overview.png").is_file()
    assert choose_pairs(Path("data"), None, None, Path("a.pt"), None)[0] == split
    assert "nothing to do" in run_script(main, "--archive", "set", "--skip-checkpoint").out
    outcome = run_script(train_sam2_proper.main, "--model", "mini")
    assert outcome.status == 2
    assert f"data has no train images, only {split}: there is nothing to train on" in outcome.err


def test_the_folder_of_an_image_is_its_group(run_script, tmp_path):
    for index in range(8):
        folder = f"p{index // 2}"
        write_pair(index, Path(f"images/{folder}"), Path(f"masks/{folder}"))
    outcome = run_script(main, *OPTIONS, "--val-fraction", 0.25)
    assert outcome.status == 0, outcome.err
    assert "groups: 4, which stay together: p0, p1, p2 and 1 more" in outcome.out
    for split, count in (("train", 3), ("val", 1)):
        groups = [pair.group for pair in split_pairs(Path("data"), split)]
        assert len(set(groups)) == count and len(groups) == 2 * count and all(groups)
    outcome = run_script(main, *OPTIONS, "--group-regex", "(pair)", "--force")
    assert outcome.status == 2 and "1 group" in outcome.err  # the user's groups win
