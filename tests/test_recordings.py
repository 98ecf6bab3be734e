"""Frames of one recording are recognised, and split in time rather than at random."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import draw_pair, write_pairs
from hypothesis import given
from hypothesis import strategies as st

from download_dataset import main
from finetuning.basics.image_files import write_image
from finetuning.comparison.report_sentences import recordings_sentence
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.dataset.splitting import fold_groups, make_folds, split_in_time, time_order
from finetuning.evaluation.measuring import Result
from finetuning.preparation.copies import looks_consecutive, make_thumbnail, normalized
from finetuning.preparation.filling import Filled
from finetuning.preparation.groups import Grouping
from finetuning.preparation.recordings import arrange, find_recordings
from finetuning.sources.pairing import SourceExample

OPTIONS = ("--images", "images", "--masks", "masks", "--skip-checkpoint")


def frames(seed: int, count: int, speed: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw frames of a camera that moves over a ground, `speed` pixels per frame, with noise."""
    rng = np.random.default_rng(seed)
    side = int(speed * count) + 80
    ground = cv2.resize(
        rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8), (side, side)
    )
    for time in range(count):
        at = int(speed * time)
        image = np.clip(ground[at : at + 64, at : at + 80] + rng.normal(0, 4, (64, 80, 3)), 0, 255)
        mask = np.zeros((64, 80), np.uint8)
        cv2.circle(mask, (40 + time % 20, 32), 12, 1, -1)
        image[mask == 1] = (200, 60, 60)
        yield image.astype(np.uint8), mask == 1


def write_recording(name: str, seed: int = 0, count: int = 30, speed: float = 2) -> None:
    """Write frames and masks; name: with a place for the number."""
    for time, (image, mask) in enumerate(frames(seed, count, speed)):
        write_image(Path("images") / f"{name.format(time)}.png", image)
        write_image(Path("masks") / f"{name.format(time)}.png", mask.astype(np.uint8) * 255)


def in_split(split: str) -> list[str]:
    return sorted((path.stem for path in Path(f"data/images/{split}").iterdir()), key=time_order)


def facts() -> dict:
    return json.loads(Path("data/split.json").read_text(encoding="utf-8"))


# Recognition


def thumbnails_of(seed: int, count: int, speed: float) -> np.ndarray:
    return normalized(np.stack([make_thumbnail(image) for image, _ in frames(seed, count, speed)]))


@pytest.mark.parametrize("speed", [0.2, 1, 4])
@pytest.mark.parametrize("count", [30, 100])
def test_slow_and_quick_recordings_are_recognised_and_only_in_order(count, speed):
    for seed in range(3):
        rows = thumbnails_of(seed, count, speed)
        assert looks_consecutive(rows) and looks_consecutive(rows[::-1])
        assert not looks_consecutive(np.random.default_rng(seed).permutation(rows))


def test_unrelated_images_and_sorted_classes_are_no_recording():
    rng = np.random.default_rng(0)
    for count in (8, 12, 40, 200):
        rows = normalized(rng.integers(0, 255, (count, 8, 8), dtype=np.uint8))
        assert not looks_consecutive(rows)
        classes = np.repeat(rng.normal(0, 1, (4, 64)), count // 4, axis=0)
        assert not looks_consecutive(normalized(classes + rng.normal(0, 1, classes.shape)))
    assert not looks_consecutive(np.zeros((20, 64), np.float32))  # black images


@pytest.mark.parametrize(
    "names, found",
    [
        (["a/{:04}.jpg"], ["a"]),
        (["a/img{}.jpg"], ["img"]),
        (["a/video1_{}.jpg", "a/video2_{}.jpg"], ["video1", "video2"]),
        (["a/{:04}_left.jpg", "a/{:04}_right.jpg"], ["left", "right"]),
        (["a/{}.jpg", "b/{}.jpg"], ["a", "b"]),
        (["a/영상_{}.jpg", "b/영상_{}.jpg"], ["a/영상", "b/영상"]),
        (["a/clip_mp4-{}_jpg.rf.0f{:x}.jpg"], ["clip_mp4"]),
        (["a/shot-10h{0:02}m{0:02}s.jpg"], ["shot-10h_s"]),
        (["a/{2}.jpg"], []),  # without numbers, there is no order
    ],
)
def test_names_of_recordings(names, found):
    examples, thumbnails = [], []
    for seed, name in enumerate(names):
        for time, (image, _) in enumerate(frames(seed, 30, 2)):
            path = Path(name.format(time, time * 7, chr(97 + time)))
            examples.append(SourceExample(path.stem, path, ()))
            thumbnails.append(make_thumbnail(image))
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    shuffled = [examples[index] for index in order]
    recordings = find_recordings(
        shuffled, [thumbnails[index] for index in order], [], [None] * len(order)
    )
    assert sorted(recording.name for recording in recordings) == found
    for recording in recordings:
        paths = [shuffled[index].image for index in recording.frames]
        assert len(paths) == 30 and paths == sorted(paths, key=lambda path: time_order(str(path)))


# The split


@given(st.integers(1, 300), st.sampled_from([0.1, 0.2, 0.5]), st.sampled_from([0, 0.1, 0.3]))
def test_a_split_in_time_is_train_then_val_then_test(count, val_fraction, test_fraction):
    splits = split_in_time(count, val_fraction, test_fraction, lambda start: 3)
    assert len(splits) == count and splits[0] == "train"
    order = [split for split, _ in itertools.groupby(splits)]
    with_gaps = ["train", "left out", "val", "left out", "test"]
    possible = (with_gaps, with_gaps[::2]) if test_fraction else (with_gaps[:3], with_gaps[:3:2])
    assert order in (["train"], *possible)
    if count >= 50:  # else there may be too few for val, test and the gaps
        assert splits.count("val") == round(count * val_fraction)
        assert splits.count("test") == round(count * test_fraction)
        assert splits.count("left out") == (6 if test_fraction else 3)


def test_one_recording_is_split_in_time_and_its_gap_is_in_no_split(run_script, tmp_path):
    write_recording("frame_{}", count=40, speed=1)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    assert (
        "the 40 images look like consecutive frames of one recording: the last 20% become val, 2 "
        "frames are left out before, as a gap"
    ) in outcome.out
    assert in_split("train") == [f"frame_{time}" for time in range(30)]
    assert in_split("val") == [f"frame_{time}" for time in range(32, 40)]
    assert len(list(Path("data").rglob("*.png"))) == 2 * 38 + 1  # and the overview
    assert facts()["left out"] == ["frame_30", "frame_31"]
    # A comparison resamples blocks of consecutive frames
    train = sorted(split_pairs(Path("data"), "train"), key=lambda pair: time_order(pair.name))
    assert [pair.group for pair in train[:4]] == 2 * ["frame: frame_0 to frame_1"] + (
        2 * ["frame: frame_2 to frame_3"]
    )
    assert {pair.recording for pair in train} == {"frame"}

    outcome = run_script(main, *OPTIONS, "--test-fraction", "0.1", "--force")
    assert "the last 10% become test, the 20% before val, 4 frames are left out" in outcome.out
    assert in_split("test") == [f"frame_{time}" for time in range(36, 40)]
    assert in_split("val") == [f"frame_{time}" for time in range(26, 34)]


def test_frames_can_be_split_at_random(run_script, tmp_path):
    write_recording("frame_{}", count=10)
    outcome = run_script(main, *OPTIONS, "--frames", "random")
    assert outcome.status == 0 and "recording" not in outcome.out
    assert len(in_split("train")) == 8 and "recordings" not in facts()
    outcome = run_script(main, "--demo", "--frames", "time")
    assert outcome.status == 2 and "the demo's split is fixed" in outcome.err


def test_frames_that_all_are_copies_are_split_in_time_too(run_script, tmp_path):
    image, mask = draw_pair(0)
    for time in range(12):  # a still camera
        write_image(Path(f"images/{time:03}.png"), image)
        write_image(Path(f"masks/{time:03}.png"), mask.astype(np.uint8) * 255)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0 and "consecutive frames of one recording" in outcome.out
    assert "in different splits, which makes the results too optimistic" in outcome.out
    assert in_split("val") == ["010", "011"]

    outcome = run_script(main, *OPTIONS, "--frames", "random", "--force")
    assert outcome.status == 2 and "12 pairs in 1 group, which stay together" in outcome.err
    assert "--frames time" in outcome.err and "ignore" not in outcome.err


def test_two_recordings_are_each_split_in_time_beside_other_images(run_script, tmp_path):
    write_pairs(tmp_path, 10)
    for seed in (1, 2):
        write_recording(f"video{seed}_{{:04}}", seed, count=20)
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    assert (
        "40 of the 50 images look like consecutive frames of 2 recordings (video1, video2): the "
        "last 20% of each become val, 2 frames are left out before, as a gap"
    ) in outcome.out
    for seed in (1, 2):
        names = [name for name in in_split("val") if name.startswith(f"video{seed}")]
        assert names == [f"video{seed}_{time:04}" for time in range(16, 20)]
    assert sum(name.startswith("pair") for name in in_split("val")) == 2  # 20% of ten


def test_of_several_recordings_each_is_in_one_split(run_script, tmp_path):
    for seed in range(3):
        write_recording(f"video{seed}_{{}}", seed, count=8)
    write_recording("video9_{}", 9, count=3)  # too short to tell, but called like the others
    outcome = run_script(main, *OPTIONS)
    assert outcome.status == 0, outcome.err
    assert "4 recordings (video0, video1, video2 and 1 more): each recording stays" in outcome.out
    videos = [{name.partition("_")[0] for name in in_split(split)} for split in ("train", "val")]
    assert not videos[0] & videos[1] and len(videos[0] | videos[1]) == 4
    assert {pair.group for pair in split_pairs(Path("data"), "val")} == videos[1]

    outcome = run_script(main, *OPTIONS, "--frames", "time", "--force")
    assert "are consecutive frames of 4 recordings" in outcome.out
    assert {name.partition("_")[0] for name in in_split("val")} == videos[0] | videos[1]


def test_groups_that_the_user_names_win_over_recordings(run_script, tmp_path):
    write_recording("{:03}", count=20)
    regex = ("--group-regex", r"(\d\d)\d")
    outcome = run_script(main, *OPTIONS, *regex)
    assert outcome.status == 0 and "groups: 2, which stay together" in outcome.out
    assert "recording" not in outcome.out and in_split("train") in (
        [f"{time:03}" for time in range(10)], [f"{time:03}" for time in range(10, 20)],
    )  # fmt: skip
    outcome = run_script(main, *OPTIONS, *regex, "--frames", "time", "--force")
    assert outcome.status == 0 and "groups: 2, each split in time" in outcome.out
    assert in_split("val") == ["008", "009", "018", "019"]


def test_a_split_in_time_can_be_demanded_of_any_names(run_script, tmp_path):
    for index, name in enumerate("abcdefgh"):
        image, mask = draw_pair(index)
        write_image(Path(f"images/{name}.png"), image)
        write_image(Path(f"masks/{name}.png"), mask.astype(np.uint8) * 255)
    outcome = run_script(main, *OPTIONS, "--frames", "time")
    assert outcome.status == 0, outcome.err
    assert "the 8 images are consecutive frames of one recording" in outcome.out
    assert (in_split("train"), in_split("val")) == (list("abcde"), ["g", "h"])
    for name in "cdefgh":
        Path(f"images/{name}.png").unlink()
        Path(f"masks/{name}.png").unlink()
    outcome = run_script(main, *OPTIONS, "--frames", "time", "--test-fraction", "0.1", "--force")
    assert outcome.status == 2 and "too few to be split in time" in outcome.err
    assert in_split("val") == ["g", "h"]  # what there was is kept


@pytest.mark.parametrize("is_random", [True, False])
def test_a_ready_split_that_divides_a_recording_at_random_is_noticed(
    run_script, tmp_path, is_random
):
    order = np.random.default_rng(0).permutation(24) if is_random else range(24)
    folders = dict(zip(order, ["train"] * 16 + ["valid"] * 8, strict=True))
    for time, (image, mask) in enumerate(frames(0, 24, 2)):
        write_image(Path(f"set/{folders[time]}/images/f_{time}.png"), image)
        write_image(Path(f"set/{folders[time]}/masks/f_{time}.png"), mask.astype(np.uint8) * 255)
    outcome = run_script(main, "--archive", "set", "--skip-checkpoint")
    assert outcome.status == 0, outcome.err
    warning = "frames of one recording, which the given split divides at random, so the results"
    assert (warning in outcome.out) == is_random
    assert len(in_split("train")) == 16 and len(in_split("val")) == 8
    outcome = run_script(main, "--archive", "set", "--frames", "time", "--force")
    assert outcome.status == 2 and "are they split already?" in outcome.err


def test_folders_that_are_groups_stay_whole_if_there_are_enough(capsys):
    options = {"val_fraction": 0.2, "test_fraction": 0.0}
    for count, is_whole in ((1, False), (2, False), (4, True)):
        examples, filled, groups = [], [], []
        for seed in range(count):
            for time, (image, _) in enumerate(frames(seed, 20, 2)):
                path = Path(f"patient{seed}/{time:03}.png")
                examples.append(SourceExample(f"{seed}_{time:03}", path, ()))
                filled.append(
                    Filled(examples[-1].name, "", [], 1, False, "", make_thumbnail(image))
                )
                groups.append(f"patient{seed}")
        arranged = arrange(examples, filled, [], groups, Grouping(), options)
        out = capsys.readouterr().out
        if is_whole:
            assert arranged.groups == groups and not arranged.splits
            assert "groups: 4, which stay together: " in out
        else:
            assert list(arranged.splits.values()).count("val") == 4 * count
            assert ("patient0, patient1" if count == 2 else "one recording") in out


# Cross-validation and comparison


def test_folds_are_consecutive_parts_of_a_recording():
    pairs = {
        f"train/{time}": Pair(str(time), Path(f"{time}.png"), Path("m.png"), recording="video")
        for time in range(23)
    }
    pairs["train/photo"] = Pair("photo", Path("photo.png"), Path("m.png"))
    folds = make_folds(pairs, 4, 0, fold_groups(pairs, 4))
    for fold in folds:
        times = sorted(int(pairs[key].name) for key in fold if key != "train/photo")
        assert times == list(range(times[0], times[0] + len(times))) and 5 <= len(times) <= 6


def test_a_comparison_says_that_its_images_are_of_a_recording_of_train():
    pairs = [Pair(str(time), Path("i.png"), Path("m.png"), recording="v") for time in range(3)]
    results = [
        Result(index, 0, pair, "center", None, 0.1, [{"IoU": 0.5}] * 2)
        for index, pair in enumerate([*pairs, pairs[0]._replace(recording=None)])
    ]
    (sentence,) = recordings_sentence(results, "val")
    assert sentence.startswith("3 of these 4 images are frames of recordings that also have frames")
    assert recordings_sentence(results, "train") == []
    assert recordings_sentence(results[3:], "val") == []
