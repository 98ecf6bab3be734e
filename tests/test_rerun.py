"""A rerun notices what changed in the sources; --add adds it, and every image keeps its split."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_pair, snapshot, write_pair, write_pairs, zip_folder
from hypothesis import given
from hypothesis import strategies as st

from download_dataset import main
from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.dataset.objects import read_objects
from finetuning.dataset.pairs import facts_text, read_facts, split_pairs
from finetuning.dataset.splitting import split_more
from finetuning.preparation.fingerprint import SOURCES_KEY

OPTIONS = ("--images", "images", "--masks", "masks", "--skip-checkpoint")
COUNT = 6


@pytest.fixture
def fill(run_script, tmp_path):
    """Return a function that runs download_dataset.py, after a first run over COUNT pairs."""
    write_pairs(tmp_path, COUNT)

    def run(*options):
        return run_script(main, *(options or OPTIONS))

    assert run().status == 0
    return run


def correct(name: str, folder: str = "masks") -> None:
    """Cut off a part of a mask."""
    mask = read_mask(Path(folder, name))
    mask[:, : mask.shape[1] // 2] = False
    write_image(Path(folder, name), mask.astype(np.uint8) * 255)


def places(data: str = "data") -> dict[str, str]:
    """Return the split of each image."""
    return {
        pair.name: split for split in ("train", "val") for pair in split_pairs(Path(data), split)
    }


def assert_refused(outcome, *texts: str) -> None:
    assert outcome.status == 2, outcome.out
    assert len(outcome.err.splitlines()) == 1
    for text in (*texts, "--force"):
        assert text in outcome.err


# What has changed is named


def test_corrected_masks_and_new_images_are_named(fill):
    before = snapshot(Path("data"))
    correct("pair_001.png")
    correct("pair_004.png")
    assert_refused(fill(), "the masks of 2 of 6 images changed (pair_001.png, pair_004.png); --add")
    write_pair(8, Path("images"), Path("masks"))
    assert_refused(fill(), "2 of 6 images changed", "1 image is new (pair_008.jpg)")
    shutil.copy("images/pair_008.jpg", "images/pair_000.jpg")
    assert_refused(fill(), "1 of 6 images changed (pair_000.jpg)")
    Path("images/pair_002.jpg").unlink()
    Path("masks/pair_002.png").unlink()
    outcome = fill()
    assert_refused(outcome, "1 image is gone (pair_002)")
    assert "--add" not in outcome.err
    assert snapshot(Path("data")) == before
    assert fill(*OPTIONS, "--force").status == 0
    assert "nothing to do" in fill().out


def test_a_change_that_keeps_the_size_of_a_file_is_noticed_by_its_time(fill):
    mask = Path("masks/pair_001.bmp")
    write_image(mask, read_mask(Path("masks/pair_001.png")).astype(np.uint8) * 255)
    Path("masks/pair_001.png").unlink()
    assert fill(*OPTIONS, "--force").status == 0
    size = mask.stat().st_size
    correct(mask.name)
    os.utime(mask, ns=(1, 1))
    assert mask.stat().st_size == size
    assert_refused(fill(), "the masks of 1 of 6 images changed (pair_001.bmp)")


@pytest.mark.parametrize("how", ["touched", "copied", "moved", "littered"])
def test_the_same_content_is_the_same_data_set(fill, tmp_path, how):
    options = OPTIONS
    if how == "touched":
        for path in Path("images").iterdir():
            os.utime(path, ns=(1, 1))
    elif how == "copied":
        shutil.copytree("masks", "copy")
        shutil.rmtree("masks")
        Path("copy").rename("masks")
    elif how == "moved":
        Path("elsewhere").mkdir()
        for name in ("images", "masks"):
            Path(name).rename(f"elsewhere/{name}")
        options = ("--images", "elsewhere/images", "--masks", "elsewhere/masks")
        options += ("--skip-checkpoint",)
    else:
        for name in ("images/.DS_Store", "masks/Thumbs.db", "images/notes.md", "masks/a.txt"):
            Path(name).write_text("x", encoding="utf-8")
    outcome = fill(*options)
    assert outcome.status == 0 and "nothing to do" in outcome.out, outcome.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--seed", "1"), "--seed is 1 (was 42)"),
        (("--val-fraction", "0.5"), "--val-fraction is 0.5 (was 0.2)"),
        (("--test-fraction", "0.2"), "--test-fraction is 0.2 (was 0)"),
        (("--mask-value", "255"), "--mask-value is 255 (was not given)"),
        (("--instances",), "--instances is given (was not given)"),
        (("--copies", "ignore"), "--copies is ignore (was not given)"),
        (("--value-range", "0,99"), "--value-range is 0,99 (was not given)"),
        (("--group-regex", "(환자[0-9]+)"), "--group-regex is (환자[0-9]+) (was not given)"),
    ],
)
def test_other_options_are_named_as_they_are_typed(fill, options, says):
    assert_refused(fill(*OPTIONS, *options), says)
    bare = fill("--skip-checkpoint")
    assert bare.status == 0 and "nothing to do" in bare.out
    assert_refused(fill("--skip-checkpoint", *options), says)


def test_names_in_korean_stay_readable(run_script, tmp_path):
    write_pairs(tmp_path / "바탕", 3)
    options = ("--images", "바탕/images", "--masks", "바탕/masks", "--skip-checkpoint")
    assert run_script(main, *options).status == 0
    write_pairs(tmp_path / "내 사진", 4)
    other = ("--images", "내 사진/images", "--masks", "내 사진/masks", "--skip-checkpoint")
    assert_refused(run_script(main, *other), "바탕", "--add")
    Path("바탕/masks/pair_000.png").rename("바탕/masks/용종.png")
    Path("바탕/images/pair_000.jpg").rename("바탕/images/용종.jpg")
    correct("용종.png", "바탕/masks")
    assert_refused(run_script(main, *options), "(용종.png)")


def test_an_edited_table_of_groups_is_noticed(fill):
    rows = [f"pair_{index:03}.jpg,g{index // 2}" for index in range(COUNT)]
    Path("groups.csv").write_text("\n".join(["image,group", *rows]), encoding="utf-8")
    options = (*OPTIONS, "--groups", "groups.csv")
    assert fill(*options, "--force").status == 0
    assert "nothing to do" in fill(*options).out
    rows[0] = "pair_000.jpg,g2"
    facts = Path("groups.csv").stat()
    Path("groups.csv").write_text("\n".join(["image,group", *rows]), encoding="utf-8")
    os.utime("groups.csv", ns=(facts.st_atime_ns, facts.st_mtime_ns))  # and of equal size
    assert_refused(fill(*options), "the table of --groups changed")
    split = places()
    outcome = fill(*options, "--add")
    assert outcome.status == 0 and "no image" in outcome.out and places() == split
    assert "nothing to do" in fill(*options).out


def test_an_archive_is_compared_by_its_members(run_script, tmp_path):
    source = write_pairs(tmp_path / "source", COUNT)
    options = ("--archive", zip_folder(source, tmp_path / "a.zip"), "--skip-checkpoint")
    assert run_script(main, *options).status == 0
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
        file.writestr("readme.txt", "hello")
    assert "nothing to do" in run_script(main, *options).out
    correct("pair_003.png", "source/masks")
    write_pair(7, source / "images", source / "masks")
    zip_folder(source, tmp_path / "a.zip")
    outcome = run_script(main, *options)
    assert_refused(outcome, "1 of 6 images changed (pair_003.png), 1 image is new (pair_007.jpg)")
    outcome = run_script(main, *options, "--add")
    assert outcome.status == 0 and "1 new image" in outcome.out and len(places()) == 7


def test_files_beside_a_table_are_compared_too(run_script, tmp_path):
    write_pairs(tmp_path / "set", COUNT)
    rows = [f"images/pair_{index:03}.jpg,masks/pair_{index:03}.png" for index in range(COUNT)]
    Path("set/pairs.csv").write_text("\n".join(["image,mask", *rows]), encoding="utf-8")
    options = ("--pairs", "set/pairs.csv", "--skip-checkpoint")
    assert run_script(main, *options).status == 0
    write_pair(9, Path("set/images"), Path("set/masks"))  # not in the table
    assert "nothing to do" in run_script(main, *options).out
    correct("pair_002.png", "set/masks")
    assert_refused(run_script(main, *options), "1 of 6 images changed (pair_002.png)")


def write_coco(moved: int | None = None, date: str = "") -> None:
    images = [{"id": i, "file_name": f"pair_{i:03}.jpg"} for i in range(COUNT)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0,
         "segmentation": [[10 + 5 * (i == moved), 10, 50, 10, 50, 50, 10, 50]]}
        for i in range(COUNT)
    ]  # fmt: skip
    document = {"images": images, "annotations": annotations, "info": {"date": date}}
    document["categories"] = [{"id": 1, "name": "용종"}]
    Path("coco.json").write_text(json.dumps(document), encoding="utf-8")


def test_a_new_export_is_compared_by_its_outlines(run_script, tmp_path):
    pytest.importorskip("pycocotools")
    write_pairs(tmp_path, COUNT)
    write_coco()
    options = ("--images", "images", "--annotations", "coco.json", "--skip-checkpoint")
    assert run_script(main, *options).status == 0
    write_coco(date="2026-12-01")
    assert "nothing to do" in run_script(main, *options).out
    write_coco(moved=3)
    assert_refused(run_script(main, *options), "the masks of 1 of 6 images changed (pair_003.jpg)")
    assert_refused(run_script(main, *options, "--class-name", "용종"), "--class-name is 용종")
    before, split = read_mask_of("pair_003"), places()
    outcome = run_script(main, *options, "--add")
    assert outcome.status == 0 and "1 replaced mask" in outcome.out
    assert places() == split and not np.array_equal(read_mask_of("pair_003"), before)


def read_mask_of(name: str) -> np.ndarray:
    split = places()[name]
    pair = next(pair for pair in split_pairs(Path("data"), split) if pair.name == name)
    return read_objects(pair).together()[0]


def test_a_source_that_is_gone_is_named_and_the_data_can_be_used_as_they_are(fill):
    shutil.rmtree("masks")
    outcome = fill()
    assert outcome.status == 2 and "--masks masks" in outcome.err and "is gone" in outcome.err
    assert "nothing to do" in fill("--skip-checkpoint").out


def test_an_unpaired_new_image_is_named(fill):
    write_image(Path("images/more.jpg"), draw_pair(9)[0])
    outcome = fill()
    assert outcome.status == 2 and "more.jpg" in outcome.err and "has changed" in outcome.err
    assert "nothing to do" not in outcome.out


# Folders of earlier versions


def test_a_folder_without_a_record_is_kept_with_a_warning(fill):
    facts = read_facts(Path("data"))
    del facts[SOURCES_KEY]
    paths = {name: str(Path(name).resolve()) for name in ("images", "masks")}
    Path("data/sources.json").unlink()
    Path("data/split.json").write_text(facts_text(facts | {"options": paths}), encoding="utf-8")
    outcome = fill()
    assert outcome.status == 0 and "not noticed" in outcome.out and "nothing to do" in outcome.out
    assert_refused(fill(*OPTIONS, "--seed", 1), "--seed is 1 (was 42)")
    assert_refused(fill(*OPTIONS, "--add"), "no record of its sources")
    assert_refused(fill(*OPTIONS[:-1], "--skip-checkpoint", "--parts"), "--parts is given")


def test_a_damaged_record_is_refused(fill):
    Path("data/sources.json").write_text("[]", encoding="utf-8")
    assert_refused(fill(), "sources.json is missing, damaged, or was edited")
    assert "nothing to do" in fill("--skip-checkpoint").out


# Adding


def test_new_images_are_added_and_corrected_masks_are_replaced(fill):
    before = places()
    untouched = {pair.name: pair.mask.read_bytes() for pair in split_pairs(Path("data"), "train")}
    for index in range(COUNT, 2 * COUNT):
        write_pair(index, Path("images"), Path("masks"))
    correct("pair_001.png")
    outcome = fill(*OPTIONS, "--add")
    assert outcome.status == 0, outcome.err
    assert "added: 6 new images (5 train, 1 val), 1 replaced mask" in outcome.out
    after = places()
    assert {name: after[name] for name in before} == before and len(after) == 2 * COUNT
    assert list(after.values()).count("val") == 2
    assert read_facts(Path("data"))["val"] == [name for name in after if after[name] == "val"]
    mask = Path(f"data/masks/{before['pair_001']}/pair_001.png")
    assert mask.read_bytes() == Path("masks/pair_001.png").read_bytes()
    for pair in split_pairs(Path("data"), "train"):
        if pair.name in untouched and pair.name != "pair_001":
            assert pair.mask.read_bytes() == untouched[pair.name]
    data = snapshot(Path("data"))
    assert "nothing to do" in fill(*OPTIONS, "--add").out
    assert "nothing to do" in fill().out
    assert snapshot(Path("data")) == data


def test_images_of_another_source_are_added_under_names_of_their_own(fill):
    before = places()
    for index in range(3):  # others of the same names
        image, mask = draw_pair(20 + index)
        write_image(Path(f"둘째 날/images/pair_{index:03}.jpg"), image)
        write_image(Path(f"둘째 날/masks/pair_{index:03}.png"), mask.astype(np.uint8) * 255)
    shutil.copy("images/pair_005.jpg", "둘째 날/images/known.jpg")  # with another mask
    shutil.copy("둘째 날/masks/pair_000.png", "둘째 날/masks/known.png")
    # Nearly the same as a known image, so it is for the same split
    write_image(Path("둘째 날/images/near.png"), read_image(Path("images/pair_004.jpg")))
    shutil.copy("masks/pair_004.png", "둘째 날/masks/near.png")
    options = ("--images", "둘째 날/images", "--masks", "둘째 날/masks", "--skip-checkpoint")
    outcome = fill(*options, "--add")
    assert outcome.status == 0 and "4 new images" in outcome.out, outcome.err
    assert "1 replaced mask" in outcome.out
    after = places()
    new = {"near", *(f"둘째 날_pair_{index:03}" for index in range(3))}
    assert after.keys() - before.keys() == new
    assert {name: after[name] for name in before} == before
    assert after["near"] == before["pair_004"]
    for each in (options, OPTIONS):
        assert "nothing to do" in fill(*each).out
        assert "nothing to do" in fill(*each, "--add").out


def test_images_of_a_known_group_go_to_its_split(run_script, tmp_path):
    for index in range(8):
        write_pair(index, Path("images"), Path("masks"))
    rows = [f"pair_{index:03}.jpg,g{index // 2}" for index in range(12)]
    Path("groups.csv").write_text("\n".join(["image,group", *rows[:8]]), encoding="utf-8")
    options = (*OPTIONS, "--groups", "groups.csv")
    assert run_script(main, *options).status == 0
    before = places()
    rows[8:] = [f"pair_{index:03}.jpg,{'g0' if index < 10 else 'g3'}" for index in range(8, 12)]
    Path("groups.csv").write_text("\n".join(["image,group", *rows]), encoding="utf-8")
    for index in range(8, 12):
        write_pair(index, Path("images"), Path("masks"))
    outcome = run_script(main, *options, "--add")
    assert outcome.status == 0, outcome.err
    after = places()
    assert after["pair_008"] == after["pair_009"] == before["pair_000"]
    assert after["pair_010"] == after["pair_011"] == before["pair_006"]


def test_a_split_that_the_source_changed_is_named_and_add_keeps_that_of_the_folder(
    run_script, tmp_path
):
    for split, indices in (("train", range(4)), ("val", range(4, 6))):
        for index in indices:
            write_pair(index, Path(f"set/{split}/images"), Path(f"set/{split}/masks"))
    options = ("--archive", "set", "--skip-checkpoint")
    assert run_script(main, *options).status == 0
    before = places()
    for kind, name in (("images", "pair_003.jpg"), ("masks", "pair_003.png")):
        Path(f"set/train/{kind}/{name}").rename(f"set/val/{kind}/{name}")
    assert_refused(
        run_script(main, *options), "1 of 6 images have another split now (pair_003.jpg)"
    )
    assert run_script(main, *options, "--add").status == 0 and places() == before
    assert "nothing to do" in run_script(main, *options).out


def test_a_first_run_with_add_fills_the_folder(run_script, tmp_path):
    write_pairs(tmp_path, 4)
    assert run_script(main, *OPTIONS, "--add").status == 0 and len(places()) == 4


def test_what_add_cannot_do_is_refused(fill):
    before = snapshot(Path("data"))
    assert_refused(fill(*OPTIONS, "--add", "--seed", "1"), "--seed is 1 (was 42)")
    assert_refused(fill(*OPTIONS, "--add", "--parts"), "--parts is given")
    outcome = fill("--add", "--skip-checkpoint")
    assert outcome.status == 2 and "--add needs a source" in outcome.err
    assert fill(*OPTIONS, "--add", "--force").status == 2
    Path("images/pair_002.jpg").unlink()
    Path("masks/pair_002.png").unlink()
    assert_refused(fill(*OPTIONS, "--add"), "1 of 6 images", "pair_002")
    assert snapshot(Path("data")) == before


def test_an_error_while_adding_leaves_the_folder_as_it_was(fill):
    before = snapshot(Path("data"))
    write_pair(7, Path("images"), Path("masks"))
    write_pair(8, Path("images"), Path("masks"))
    Path("images/pair_008.jpg").write_bytes(b"no image")
    outcome = fill(*OPTIONS, "--add")
    assert outcome.status == 2 and "pair_008.jpg" in outcome.err
    assert snapshot(Path("data")) == before


@pytest.mark.parametrize("objects_first", [True, False])
def test_masks_of_one_object_and_of_several_can_be_mixed(run_script, tmp_path, objects_first):
    write_pairs(tmp_path / "one", 4)
    for index in range(10, 14):
        image, mask = draw_pair(index)
        labels = mask.astype(np.uint8) * 2
        labels[:4, :4] = 1
        write_image(Path(f"several/images/b{index}.jpg"), image)
        write_image(Path(f"several/masks/b{index}.png"), labels)
    one = ("--images", "one/images", "--masks", "one/masks", "--skip-checkpoint")
    several = ("--images", "several/images", "--masks", "several/masks", "--skip-checkpoint")
    several += ("--instances",)
    for options in (several, one) if objects_first else (one, several):
        outcome = run_script(main, *options, "--add")
        assert outcome.status == 0, outcome.err
    pairs = [pair for split in ("train", "val") for pair in split_pairs(Path("data"), split)]
    counts = {pair.name: len(read_objects(pair)) for pair in pairs}
    assert counts == {f"pair_{i:03}": 1 for i in range(4)} | {f"b{i}": 2 for i in range(10, 14)}
    for options in (one, several):
        assert "nothing to do" in run_script(main, *options).out


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([None, "g", "h"])),
    st.lists(st.tuples(st.sampled_from(["train", "val"]), st.sampled_from([None, "g"]))),
    st.integers(0, 9),
)
def test_what_is_added_approaches_the_fractions(group_of, known, seed):
    split_of = split_more(group_of, 0.25, seed, 0.0, known)
    assert split_of.keys() == group_of.keys() and set(split_of.values()) <= {"train", "val"}
    assert split_of == split_more(dict(reversed(group_of.items())), 0.25, seed, 0.0, known)
    homes = [split for split, group in known if group == "g"]
    for group in ("g", "h"):
        splits = {split_of[name] for name in group_of if group_of[name] == group}
        assert len(splits) <= 1
        if group == "g" and homes and splits:
            assert homes.count(*splits) >= len(homes) / 2
    splits = [*(split for split, _ in known), *split_of.values()]
    before, after = ([*each].count("val") for each in ([split for split, _ in known], splits))
    if not any(group_of.values()) and before < after < before + len(group_of):
        assert abs(after - 0.25 * len(splits)) <= 1
