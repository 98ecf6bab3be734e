"""A comparison knows which images the fine-tuned model has seen, and what it started from."""

import shutil
from pathlib import Path

import pytest
from conftest import draw_pair, write_data, write_pair

import compare_models
import train_sam2_proper
from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import facts_text, split_pairs
from finetuning.evaluation.seen_images import (
    SEEN,
    Overlap,
    add_overlaps,
    count_overlap,
    hash_files,
    record_seen,
    seen_before,
)
from finetuning.model.checkpoints import load_checkpoint
from finetuning.model.models import MODELS


@pytest.fixture
def train(run_script, tmp_path, random_mini):
    """Train on three drawn pairs, from a file of the user's own."""
    write_data(tmp_path / "data", train=3, val=2)
    shutil.copy(random_mini, tmp_path / "base.pt")

    def run(*more):
        options = "--model", "mini", "--checkpoint", "base.pt", "--epochs", 1, "--none-share", 0
        outcome = run_script(train_sam2_proper.main, *options, *more)
        assert outcome.status == 0, outcome.err

    return run


@pytest.fixture
def compare(run_script):
    return lambda *more: run_script(compare_models.main, "--figures", 0, *more)


def move(names: list[str], source: str, target: str) -> None:
    """Move pairs to another split, under other names."""
    for name in names:
        for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
            there = Path("data", folder, target)
            there.mkdir(parents=True, exist_ok=True)
            shutil.move(Path("data", folder, source, name + suffix), there / f"new_{name}{suffix}")


def test_a_test_split_that_was_trained_on_is_refused_unless_asked_for(train, compare):
    train()
    move(["pair_001"], "train", "test")
    write_pair(50, Path("data/images/test"), Path("data/masks/test"))
    outcome = compare()
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1
    assert "sam2_best.pt was trained on 1 of these 2 test images" in outcome.err
    assert "--allow-seen" in outcome.err

    outcome = compare("--allow-seen")
    assert outcome.status == 0, outcome.err
    assert "│  trained on:        1 of 2 images" in outcome.out
    assert "warning: the model was trained on 1 of these 2 images" in outcome.out
    assert "no training has read" not in outcome.out
    page = Path("output/comparison/report.html").read_text(encoding="utf-8")
    assert page.count("1 of 2 images") == 1 and "was trained on 1 of these 2 images" in page


def test_that_no_training_has_read_a_test_split_is_said_where_it_is_true(train, compare):
    train()
    write_pair(50, Path("data/images/test"), Path("data/masks/test"))
    outcome = compare()
    assert "test: no training has read these images, and no epoch was chosen" in outcome.out
    move(["pair_003"], "val", "test")
    outcome = compare()
    assert "no training has read these images" not in outcome.out
    assert "the best epoch was chosen on 1 of these 2 images" in outcome.out


def test_another_split_and_changed_masks_are_said_of_val_too(train, compare):
    train()
    move(["pair_000", "pair_002"], "train", "val")
    write_image(Path("data/masks/val/pair_004.png"), draw_pair(7)[1].astype("uint8") * 255)
    outcome = compare()
    assert outcome.status == 0, outcome.err
    assert "│  trained on:        2 of 4 images" in outcome.out
    assert "│  masks changed:     1 of 4 images" in outcome.out
    assert "slightly optimistic" not in outcome.out
    assert "the masks of 1 of these 4 images have changed since training" in outcome.out


def test_what_an_earlier_training_has_learnt_counts_too(train, compare, tmp_path):
    train("--output", "first")
    (tmp_path / "data").rename(tmp_path / "old")
    for index in (60, 61, 62):
        split = "val" if index == 62 else "train"
        write_pair(index, Path("data/images", split), Path("data/masks", split))
    train("--checkpoint", "first/sam2_final.pt")
    for folder in ("images", "masks"):
        shutil.copytree(Path("old", folder, "train"), Path("data", folder, "test"))
    assert "was trained on 3 of these 3 test images" in compare().err


def test_a_file_that_does_not_say_what_it_has_seen_proves_nothing(tmp_path, random_mini):
    pairs = split_pairs(write_data(tmp_path), "train")
    mini = {"model_name": "mini"}
    nothing = Overlap(4, is_known=False)
    assert count_overlap(pairs, mini) == nothing
    for crafted in (5, {}, {"train": 5, "val": [], "before": []}, {"train": [["a"]]}, {"val": [5]}):
        assert count_overlap(pairs, {**mini, "settings": {SEEN: crafted}}) == nothing
    record = record_seen({"train": pairs[:1], "val": pairs[1:2]}, hash_files(pairs), before=None)
    known = {**mini, "settings": {SEEN: record}}
    assert count_overlap(pairs, known) == Overlap(4, 1, 1, 0, is_known=False)
    assert seen_before(known, random_mini) is None
    # mini is drawn images' only; of SAM 2.1's other sizes the published file alone is known
    assert seen_before(mini, random_mini) == []
    assert seen_before({"model_name": "small"}, random_mini) is None
    total = add_overlaps([Overlap(4, 1), Overlap(3, 2, 1, 1, is_known=False)])
    assert total == Overlap(7, 3, 1, 1, is_known=False)


def test_masks_of_several_objects_are_known_by_all_their_files(tmp_path):
    write_pair(0, tmp_path / "images/train", tmp_path)
    folder = tmp_path / "masks/train/pair_000"
    for k in range(2):
        write_image(folder / f"{k}.png", draw_pair(k)[1].astype("uint8") * 255)
    (tmp_path / "split.json").write_text(facts_text({"masks": "objects"}), encoding="utf-8")
    pairs = split_pairs(tmp_path, "train")
    settings = {SEEN: record_seen({"train": pairs, "val": []}, hash_files(pairs), before=[])}
    facts = {"model_name": "mini", "settings": settings}
    (folder / ".DS_Store").write_bytes(b"of the system, no mask")
    assert count_overlap(pairs, facts) == Overlap(1, 1)
    write_image(folder / "1.png", draw_pair(5)[1].astype("uint8") * 255)
    assert count_overlap(pairs, facts) == Overlap(1, 1, changed_masks=1)


def test_the_original_must_be_what_training_started_from(train, compare, random_mini):
    train()
    assert compare().status == 0
    # Another model at its place
    trained = Path("output/sam2_final.pt")
    shutil.copy(trained, "base.pt")
    outcome = compare()
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1
    assert "base.pt has changed since training started from it" in outcome.err
    assert "--original FILE" in outcome.err
    outcome = compare("--original", "base.pt")
    assert outcome.status == 0
    assert "not the file that training started from" in outcome.out
    outcome = compare("--original", random_mini)
    assert outcome.status == 0 and "not the file that training" not in outcome.out
    # None at all: not the published model either, where that is another file
    Path("base.pt").unlink()
    Path("checkpoints").mkdir()
    shutil.copy(trained, Path("checkpoints", MODELS["mini"].filename))
    outcome = compare()
    assert outcome.status == 2
    assert "base.pt is missing, but training started from it" in outcome.err
    # Where the published file is what training started from, it serves
    shutil.copy(random_mini, Path("checkpoints", MODELS["mini"].filename))
    assert compare().status == 0


def test_folds_are_matched_by_content(train, compare):
    train("--folds", 2)
    assert load_checkpoint(Path("output/fold_1/sam2_final.pt"))["settings"][SEEN]["train"]
    first = compare("--folds")
    assert first.status == 0, first.err
    assert "each image was measured by the model that had not seen it" in first.out
    move(["pair_000", "pair_002"], "train", "val")
    again = compare("--folds")
    assert again.status == 0, again.err
    assert again.out.split("└")[0] == first.out.split("└")[0]
    # A new image under a known name is in no fold
    write_pair(70, Path("data/images/train"), Path("data/masks/train"))
    assert "in no fold, which are not measured: 1\n" in compare("--folds").out
    image = Path("data/images/train/pair_001.jpg")
    image.write_bytes(Path("data/images/train/pair_070.jpg").read_bytes())
    outcome = compare("--folds")
    assert outcome.status == 2 and "train/pair_001, which is not in this --data" in outcome.err
