"""Data sets are split reproducibly, downloaded whole or not at all, and never overwritten."""

import hashlib
import itertools
import json
import shutil
import stat
import threading
import tracemalloc
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from conftest import snapshot, write_pairs, zip_folder

from download_dataset import main
from finetuning.basics import files as files_module
from finetuning.basics.files import only_run_in
from finetuning.basics.image_files import write_image
from finetuning.dataset.pairs import split_pairs
from finetuning.dataset.splitting import split_names
from finetuning.model import models
from finetuning.preparation.replacing import mark_of, recover
from finetuning.sources import archives
from finetuning.sources import source as source_module
from finetuning.sources.archives import is_portable

# Splitting


def test_a_thousand_names_split_800_to_200_without_overlap():
    names = [f"name_{i}" for i in range(1000)]
    splits = split_names(names, 0.2, seed=42)
    assert (len(splits["train"]), len(splits["val"])) == (800, 200)
    assert sorted(splits["train"] + splits["val"]) == sorted(names)


def test_the_same_seed_gives_the_same_split_in_any_order_and_on_any_platform():
    names = list("abcdefghij")
    assert split_names(names, 0.3, 7) == split_names(names[::-1], 0.3, 7)
    assert split_names(names, 0.3, 7)["val"] != split_names(names, 0.3, 8)["val"]
    assert split_names(names, 0.3, 42)["val"] == ["c", "d", "h"]  # fixed for ever


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_splits_get_at_least_one_pair(fraction):
    splits = split_names(["a", "b", "c"], fraction, 0)
    assert all(splits.values())
    with pytest.raises(UserError, match="cannot be split"):
        split_names(["a"], fraction, 0)


# From folders and archives


def prepare(run_script, *options):
    return run_script(main, "--skip-checkpoint", *options)


def test_own_folders_are_copied_into_splits_that_pair_up(run_script, tmp_path):
    source = write_pairs(tmp_path / "한글 데이터", 10)
    before = snapshot(source)
    outcome = prepare(run_script, "--images", source / "images", "--masks", source / "masks")
    assert outcome.status == 0
    assert "train:     8 pairs" in outcome.out and "val:     2 pairs" in outcome.out
    train, val = split_pairs(Path("data"), "train"), split_pairs(Path("data"), "val")
    assert len(train) == 8 and len(val) == 2
    assert len({pair.name for pair in train + val}) == 10
    for pair in train + val:
        assert pair.image.read_bytes() == before[f"images/{pair.image.name}"]
        assert pair.mask.read_bytes() == before[f"masks/{pair.mask.name}"]
    assert snapshot(source) == before


@pytest.mark.parametrize("inside", ["Kvasir-SEG", "a/b/c", "."])
def test_an_archive_is_read_wherever_its_two_folders_lie(run_script, tmp_path, inside):
    source = write_pairs(tmp_path / "source", 5)
    archive = zip_folder(source, tmp_path / "data set.zip", inside)
    with zipfile.ZipFile(archive, "a") as file:  # what macOS and others leave there
        file.writestr("__MACOSX/images/._pair_000.jpg", b"x")
        file.writestr("__MACOSX/masks/._pair_000.png", b"x")
        file.writestr("readme.txt", "hello")
        file.writestr("what is it? NUL: nothing.txt", "not used, so its name does not matter")
    assert prepare(run_script, "--archive", archive).status == 0
    assert len(split_pairs(Path("data"), "train")) == 4
    assert len(split_pairs(Path("data"), "val")) == 1


def test_folder_and_archive_with_the_same_seed_give_the_same_data(run_script, tmp_path):
    source = write_pairs(tmp_path / "source", 8)
    archive = zip_folder(source, tmp_path / "a.zip")
    options = ("--images", source / "images", "--masks", source / "masks", "--seed", 3)
    prepare(run_script, "--data", "one", *options)
    prepare(run_script, "--data", "two", "--archive", archive, "--seed", 3)
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    facts, other_facts = json.loads(one.pop("split.json")), json.loads(two.pop("split.json"))
    del one["sources.json"], two["sources.json"]
    assert one == two
    assert facts["val"] == other_facts["val"] and facts["source"] != other_facts["source"]


def test_run_again_it_changes_nothing_and_force_makes_it_anew(run_script, tmp_path):
    source = write_pairs(tmp_path / "source", 10)
    options = ("--images", source / "images", "--masks", source / "masks")
    prepare(run_script, *options)
    before = snapshot(tmp_path / "data")
    again = prepare(run_script, *options)
    assert again.status == 0 and "nothing to do" in again.out
    again = prepare(run_script, *options, "--seed", 1)
    assert again.status == 2 and "--seed is 1 (was 42)" in again.err
    assert snapshot(tmp_path / "data") == before
    assert prepare(run_script, *options, "--seed", 1, "--force").status == 0
    assert snapshot(tmp_path / "data") != before
    assert json.loads((tmp_path / "data/split.json").read_text(encoding="utf-8"))["seed"] == 1
    assert not [path for path in Path("data").iterdir() if "partial" in path.name]


def test_a_users_own_data_folder_is_kept_even_with_force(run_script, tmp_path):
    write_pairs(tmp_path / "source", 4)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            for path in (tmp_path / "source" / kind).iterdir():
                (tmp_path / "data" / kind / split / path.name).write_bytes(path.read_bytes())
    before = snapshot(tmp_path / "data")
    assert "nothing to do" in prepare(run_script).out
    for options in (
        ("--images", "source/images", "--masks", "source/masks"),
        ("--images", "source/images", "--masks", "source/masks", "--force"),
        ("--force",),
    ):
        outcome = prepare(run_script, *options)
        assert outcome.status == 2 and "move them away" in outcome.err
        assert snapshot(tmp_path / "data") == before


def test_empty_folders_and_a_split_file_edited_by_hand_are_no_obstacle(run_script, tmp_path):
    write_pairs(tmp_path / "source", 4)
    (tmp_path / "data/images/train").mkdir(parents=True)
    (tmp_path / "data/images/train/.DS_Store").write_bytes(b"x")
    options = ("--images", "source/images", "--masks", "source/masks")
    assert prepare(run_script, *options).status == 0
    (tmp_path / "data/split.json").write_text("{", encoding="utf-8")
    assert "nothing to do" in prepare(run_script).out
    outcome = prepare(run_script, *options)
    assert outcome.status == 2 and "an unknown source" in outcome.err
    assert prepare(run_script, *options, "--force").status == 0


def test_another_source_is_not_taken_for_the_one_that_is_there(run_script, tmp_path):
    for count, name in enumerate(("first", "second"), 4):
        write_pairs(tmp_path / name, count)
    prepare(run_script, "--images", "first/images", "--masks", "first/masks")
    before = snapshot(tmp_path / "data")
    options = ("--images", "second/images", "--masks", "second/masks")
    outcome = prepare(run_script, *options)
    assert outcome.status == 2 and "--data" in outcome.err and "first" in outcome.err
    assert snapshot(tmp_path / "data") == before
    assert "nothing to do" in prepare(run_script).out  # without a source: what is there will do
    assert prepare(run_script, *options, "--force").status == 0


def test_a_failure_while_moving_into_place_leaves_the_old_data_as_it_was(
    run_script, tmp_path, monkeypatch
):
    source = write_pairs(tmp_path / "source", 6)
    options = ("--images", source / "images", "--masks", source / "masks")
    prepare(run_script, *options)
    before = snapshot(tmp_path / "data")
    replace = Path.replace
    for failing in ("old/images", "old/masks", "new/split.json", "new/images", "new/masks"):

        def refuse(self, target, failing=failing):  # as Windows does for a file in use
            if (target if failing.startswith("old") else self).as_posix().endswith(failing):
                raise PermissionError(13, "Permission denied", str(self))
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", refuse)
        outcome = prepare(run_script, *options, "--force", "--seed", 1)
        monkeypatch.setattr(Path, "replace", replace)
        assert outcome.status == 2 and "Permission denied" in outcome.err
        assert snapshot(tmp_path / "data") == before, failing


class Killed(BaseException):
    """The end of a process, which leaves it no time to clean up."""


def survives(monkeypatch, steps: int, run) -> bool:
    """Call a function that is killed after that many steps; say whether it came to its end before.

    A step moves or removes a file, or removes a folder.
    """
    done, rmtree = [], shutil.rmtree

    def mortal(step):
        def take(*arguments, **options):
            if len(done) == steps:
                if step is rmtree:  # killed in the midst of it
                    rmtree(arguments[0] / "new/images", ignore_errors=True)
                raise Killed
            done.append(step)
            return step(*arguments, **options)

        return take

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            run()
        except Killed:
            return False
    return True


def data_files() -> dict[str, bytes]:
    """Return the files of the data folder, but for hidden ones."""
    return {name: file for name, file in snapshot(Path("data")).items() if name[0] != "."}


def put(folder: str) -> None:
    """Make the data folder a copy of another."""
    shutil.rmtree("data", ignore_errors=True)
    shutil.copytree(folder, "data")
    for mark in Path("data").glob(".partial-*/begun.json"):  # as if it had always been here
        mark.write_text(mark_of(mark.parent), encoding="utf-8")


@pytest.mark.parametrize(("is_filled", "moves"), [(False, 10), (True, 16)])
def test_a_run_killed_at_any_moment_leaves_the_old_data_or_the_new(
    run_script, tmp_path, monkeypatch, is_filled, moves
):
    write_pairs(tmp_path / "source", 2)
    options = ["--skip-checkpoint", "--images", "source/images", "--masks", "source/masks"]
    Path("data").mkdir()
    if is_filled:
        main(options)
    shutil.copytree("data", "before")
    before = data_files()
    options += ["--force", "--seed", "1"]
    main(options)
    after = data_files()
    assert before != after

    for steps in itertools.count():
        put("before")
        if survives(monkeypatch, steps, lambda: main(options)):
            break
        if Path("data/split.json").exists():
            assert data_files() in (before, after), steps
        shutil.copytree("data", f"killed_{steps}")
        for more_steps in itertools.count():  # the next run may be killed too
            put(f"killed_{steps}")
            is_over = survives(monkeypatch, more_steps, lambda: recover(Path("data")))
            recover(Path("data"))
            assert data_files() == (before if steps < moves else after), (steps, more_steps)
            assert not list(Path("data").glob(".partial*"))
            if is_over:
                break
    assert steps > moves


def test_what_a_killed_run_had_moved_away_is_put_back_by_the_next(
    run_script, tmp_path, monkeypatch
):
    write_pairs(tmp_path / "source", 4)
    options = ["--skip-checkpoint", "--images", "source/images", "--masks", "source/masks"]
    main(options)
    before = data_files()
    assert not survives(monkeypatch, 8, lambda: main([*options, "--force", "--seed", "1"]))
    assert not any(Path("data", name).exists() for name in ("images", "masks", "split.json"))
    outcome = run_script(main, *options)
    assert outcome.status == 0
    assert "its old content is restored" in outcome.out and "nothing to do" in outcome.out
    assert data_files() == before


def test_what_a_killed_run_was_copying_is_removed_but_not_while_another_run_is_at_it(
    run_script, tmp_path
):
    write_pairs(tmp_path / "source", 2)
    half_copied = tmp_path / "data/.partial-0123/new/images/train/a.jpg"
    half_copied.parent.mkdir(parents=True)
    half_copied.write_bytes(b"half")
    folder = tmp_path / "data/.partial-0123"
    (folder / "begun.json").write_text(mark_of(folder), encoding="utf-8")
    options = ("--images", "source/images", "--masks", "source/masks")
    with only_run_in(Path("data")):
        outcome = prepare(run_script, *options)
    assert outcome.status == 2 and "another run is writing to data" in outcome.err
    assert half_copied.read_bytes() == b"half"
    outcome = prepare(run_script, *options)
    assert outcome.status == 0 and "killed" not in outcome.out
    assert not list(Path("data").glob(".partial*"))


@pytest.mark.parametrize("kind", ["bare", "copied", "linked"])
def test_what_others_left_in_a_data_folder_is_not_taken_for_a_killed_run(
    run_script, tmp_path, kind
):
    source = write_pairs(tmp_path / "source", 4)
    options = ("--images", source / "images", "--masks", source / "masks")
    prepare(run_script, *options)
    before = data_files()
    theirs = tmp_path / ("elsewhere" if kind == "linked" else "data") / ".partial-x"
    (theirs / "old").mkdir(parents=True)
    (theirs / "new").mkdir()
    (theirs / "new/split.json").write_text("{}", encoding="utf-8")
    if kind == "copied":  # unzipped from a colleague's, killed there
        elsewhere = shutil.copytree(theirs, tmp_path / "elsewhere/.partial-x")
        (theirs / "begun.json").write_text(mark_of(elsewhere), encoding="utf-8")
    if kind == "linked":
        (theirs / "begun.json").write_text(mark_of(theirs), encoding="utf-8")
        try:
            (tmp_path / "data/.partial-x").symlink_to(theirs, target_is_directory=True)
        except OSError:
            pytest.skip("no links here")
    files = snapshot(theirs)
    outcome = prepare(run_script, *options)
    assert outcome.status == 0 and "is not removed" in outcome.out
    assert data_files() == before and snapshot(theirs) == files
    outcome = prepare(run_script, *options, "--force", "--seed", 1)
    assert outcome.status == 0 and snapshot(theirs) == files


def test_where_nothing_can_be_moved_back_nothing_is_lost(run_script, tmp_path, monkeypatch):
    write_pairs(tmp_path / "source", 4)
    options = ("--images", "source/images", "--masks", "source/masks")
    prepare(run_script, *options)
    before = data_files()
    replace, moved = Path.replace, []

    def refuse(self, target):  # as Windows does from when a program opens one of the files
        moved.append(self)
        if len(moved) > 4:
            raise PermissionError(13, "Permission denied", str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        for _ in range(2):  # as long as the program runs
            outcome = prepare(run_script, *options, "--force", "--seed", 1)
            assert outcome.status == 2
            last_line = outcome.err.splitlines()[-1]
            assert (
                last_line.startswith("error: data is only partly restored") and "old" in last_line
            )
    assert "its old content is restored" in prepare(run_script, *options).out
    assert data_files() == before


def test_folders_inside_the_data_folder_are_refused(run_script, tmp_path):
    write_pairs(tmp_path / "data" / "raw", 4)
    outside = write_pairs(tmp_path / "outside", 4)
    for images, masks in (
        ("data/raw/images", "data/raw/masks"),
        (outside / "images", "data/raw/masks"),
    ):
        outcome = prepare(run_script, "--images", images, "--masks", masks)
        assert outcome.status == 2 and "lies inside" in outcome.err


# Archives that are refused


def write_archive(path: Path, *members: tuple[str, bytes, dict]) -> Path:
    """Write a zip of three pairs and of these members: (name, content, facts in the directory)."""
    zip_folder(write_pairs(path.parent / "pairs", 3), path)
    with zipfile.ZipFile(path, "a") as file:
        for name, content, facts in members:
            member = zipfile.ZipInfo()
            member.filename = name  # as it is, on Windows too
            member.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(member, content)
            for fact, value in facts.items():
                setattr(member, fact, value)
    return path


def assert_refused(run_script, archive: Path, message: str) -> None:
    """Check that an archive is refused with one line, before anything is written."""
    before = snapshot(Path())
    outcome = prepare(run_script, "--archive", archive)
    assert outcome.status == 2, outcome.out
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1, outcome.err
    assert message in outcome.err and "; " in outcome.err
    assert snapshot(Path()) == before and not Path("data").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "not a whole zip archive"),
        (lambda whole: b"<html>404 Not Found</html>", "not a whole zip archive"),
        (lambda whole: whole[: len(whole) // 2], "not a whole zip archive"),
        (lambda whole: whole[:-1], "not a whole zip archive"),
        (lambda whole: whole[1000:], "is damaged"),
        (lambda whole: whole[:500] + bytes(100) + whole[600:], "is damaged"),
        (lambda whole: whole.replace("세".encode(), b"\xff\xff\xff"), "not a whole zip archive"),
    ],
    ids=["empty", "web page", "half", "cut off", "no start", "damaged", "damaged name"],
)
def test_a_damaged_archive_is_refused(run_script, tmp_path, damage, message):
    archive = write_archive(tmp_path / "a.zip", ("세.txt", b"", {}))
    archive.write_bytes(damage(archive.read_bytes()))
    assert_refused(run_script, archive, message)


def test_an_archive_that_is_not_there_is_refused(run_script, tmp_path):
    assert_refused(run_script, tmp_path / "none.zip", "no such archive")


BAD_NAMES = {
    "../evil.jpg": "outside its folder: '../evil.jpg'",
    "Kvasir-SEG/images/../../../evil.jpg": "outside its folder",
    "/evil.jpg": "outside its folder",
    "//server/share/evil.jpg": "outside its folder",
    "C:/evil.jpg": "outside its folder",
    "c:evil.jpg": "outside its folder",
    "C:\\evil.jpg": "outside its folder",
    "\\evil.jpg": "outside its folder",
    "images\\..\\..\\evil.jpg": "outside its folder",
    "a\n/../../evil.jpg": "outside its folder",
    "Kvasir-SEG\\images\\a.jpg": "not like folder/file",
    "./images/a.jpg": "not like folder/file",
    "images//a.jpg": "not like folder/file",
    "readme.txt\0.jpg": "not like folder/file",
    "a/" * 30 + "a.jpg": "nested too deep",
    "a/" * 30_000 + "a.jpg": "nested too deep",
    "a" * 2000: "nested too deep",
    "Kvasir-SEG/images/CON.jpg": "not every computer",
    "Kvasir-SEG/masks/prn": "not every computer",
    "Kvasir-SEG/images/Aux .tar.gz": "not every computer",
    "Kvasir-SEG/masks/nul/a.png": "not every computer",
    "Kvasir-SEG/masks/com1.png/": "not every computer",
    "lpt9/images/a.jpg": "not every computer",
    "Kvasir-SEG/images/a.jpg.": "not every computer",
    "Kvasir-SEG/images/b /a.jpg": "not every computer",
    "Kvasir-SEG/images/a?.jpg": "not every computer",
    "Kvasir-SEG/images/a:b.jpg": "not every computer",
    "Kvasir-SEG/images/a\nb.jpg": "not every computer",
    "Kvasir-SEG/images/a\x1b[2J.jpg": "not every computer",
    f"Kvasir-SEG/images/{'가' * 84}.jpg": "not every computer",
    "Kvasir-SEG/images/pair_000.jpg": "two members called 'Kvasir-SEG/images/pair_000.jpg'",
    "Kvasir-SEG/images/pair_000.png": "the same name but for the suffix",
    "Kvasir-SEG/images/lonely.jpg": "1 of 4 images have no mask: lonely.jpg",
    "Kvasir-SEG/masks/extra.png": "which images these masks belong to: extra.png",
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:40]))
def test_an_archive_with_a_bad_name_in_it_is_refused(run_script, tmp_path, name):
    archive = write_archive(tmp_path / "a.zip", (name, b"x", {}))
    assert_refused(run_script, archive, BAD_NAMES[name])


BAD_FACTS = {
    "encrypted": ({"flag_bits": 1}, "is encrypted"),
    "encrypted with AES": ({"flag_bits": 1, "compress_type": 99}, "is encrypted"),
    "link": ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "link or special file"),
    "device": ({"external_attr": (stat.S_IFCHR | 0o666) << 16}, "link or special file"),
    "pipe": ({"external_attr": (stat.S_IFIFO | 0o666) << 16}, "link or special file"),
    "bzip2": ({"compress_type": zipfile.ZIP_BZIP2}, "compressed in another way"),
    "LZMA": ({"compress_type": zipfile.ZIP_LZMA}, "compressed in another way"),
    "large": ({"file_size": 3 * 10**9}, "has a member of 3 GB, more than 2 GB"),
    "wrong CRC": ({"CRC": 1}, "is damaged at 'a.txt'"),
}


@pytest.mark.parametrize("case", BAD_FACTS)
def test_an_archive_with_an_unfit_member_is_refused(run_script, tmp_path, case):
    facts, message = BAD_FACTS[case]
    archive = write_archive(tmp_path / "a.zip", ("a.txt", b"x", facts))
    assert_refused(run_script, archive, message)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("MAX_UNPACKED_BYTES", "unpacks to 0.01 GB"), ("MAX_MEMBER_BYTES", "a member of 0.01 GB")],
)
def test_a_bomb_is_refused_before_any_of_it_is_unpacked(
    run_script, tmp_path, monkeypatch, limit, message
):
    archive = write_archive(tmp_path / "a.zip", ("zeros.bin", bytes(10**7), {}))
    assert archive.stat().st_size < 10**6
    monkeypatch.setattr(archives, limit, 10**6)
    for name in ("open", "testzip"):
        monkeypatch.setattr(zipfile.ZipFile, name, lambda *_: pytest.fail("unpacked"))
    assert_refused(run_script, archive, message)


def test_many_members_that_fit_one_by_one_are_a_bomb_together(run_script, tmp_path):
    facts = {"file_size": 19 * 10**8}
    members = [(f"{number}.bin", b"", facts) for number in range(27)]
    archive = write_archive(tmp_path / "a.zip", *members)
    assert_refused(run_script, archive, "unpacks to 51.3 GB, more than 50 GB")


def test_a_member_that_understates_its_size_is_unpacked_no_further(run_script, tmp_path):
    content, stated = bytes(30 * 10**6), 1000
    facts = {"file_size": stated, "CRC": zlib.crc32(content[:stated])}
    archive = write_archive(
        tmp_path / "a.zip",
        ("Kvasir-SEG/images/bomb.jpg", content, facts),
        ("Kvasir-SEG/masks/bomb.png", content, facts),
    )
    tracemalloc.start()
    outcome = prepare(run_script, "--archive", archive)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome.status == 2 and "bomb.jpg is not a readable image" in outcome.err
    assert peak < 10 * 10**6


def test_an_archive_without_one_pair_of_folders_is_refused(run_script, tmp_path):
    archive = write_archive(tmp_path / "a.zip", ("b/images/a", b"", {}), ("b/masks/a", b"", {}))
    assert_refused(run_script, archive, "has images and masks in several places: Kvasir-SEG, b")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    assert_refused(run_script, archive, "has no folders like images/")


@pytest.mark.parametrize("names", [("polyp", "Polyp"), ("ä", "Ä"), ("straße", "STRASSE")])
def test_names_that_are_one_name_on_windows_are_refused(run_script, tmp_path, names):
    members = [
        (f"{kind}/{name}{suffix}", b"x", {})
        for name in names
        for kind, suffix in (("Kvasir-SEG/images", ".jpg"), ("Kvasir-SEG/masks", ".png"))
    ]
    archive = write_archive(tmp_path / "a.zip", *members)
    assert_refused(run_script, archive, "only in upper and lower case")


def test_names_that_are_one_name_on_windows_are_refused_in_folders_too(run_script, tmp_path):
    for name in ("a", "A"):
        write_image(tmp_path / "images" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
        write_image(tmp_path / "masks" / f"{name}.png", np.full((8, 8), 255, np.uint8))
    if len(list((tmp_path / "images").iterdir())) == 1:
        pytest.skip("this file system has no such names")
    outcome = prepare(run_script, "--images", "images", "--masks", "masks")
    assert outcome.status == 2 and "only in upper and lower case" in outcome.err
    assert not Path("data").exists()


def test_harmless_names_are_not_taken_for_those_of_devices():
    for name in ("console", "com10.jpg", "aux_1.png", "lpt.png", "a con.jpg", "한글 1.jpg", ".a"):
        assert is_portable(name), name


def test_an_unusable_pair_stops_everything_and_is_named(run_script, tmp_path):
    source = write_pairs(tmp_path / "source", 4)
    mask = source / "masks" / "pair_002.png"
    options = ("--images", source / "images", "--masks", source / "masks")
    for content, message in (
        (np.arange(100, dtype=np.uint8).reshape(10, 10) % 5, "label map"),
        (np.zeros((10, 10), np.uint8), "must have its image's size"),
    ):
        mask.write_bytes(cv2.imencode(".png", content)[1].tobytes())
        outcome = prepare(run_script, *options)
        assert outcome.status == 2 and message in outcome.err and str(mask) in outcome.err
        assert {path.name for path in Path("data").iterdir()} <= {".lock"}


def test_options_that_contradict_each_other_are_refused(run_script):
    for options in (
        ("--images", "a"),
        ("--masks", "a"),
        ("--images", "a", "--masks", "b", "--archive", "c.zip"),
        ("--val-fraction", 1.5),
        ("--val-fraction", 0),
        ("--val-fraction", "nan"),
        ("--seed", -1),
        ("--model", "huge"),
    ):
        outcome = prepare(run_script, *options)
        assert outcome.status == 2
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1


# From the network


class Handler(BaseHTTPRequestHandler):
    """Serve the server's files; those called cut.* break off half-way."""

    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if "cut" in self.path else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files = {}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def publish(monkeypatch, server, archive: Path, name: str = "/data.zip") -> None:
    """Serve an archive in place of the official one."""
    content = archive.read_bytes()
    server.files[name] = content
    monkeypatch.setattr(source_module, "DATASET_URL", server.url + name)
    monkeypatch.setattr(source_module, "DATASET_SHA256", hashlib.sha256(content).hexdigest())


def test_data_set_and_checkpoint_are_downloaded_and_checked(
    run_script, tmp_path, monkeypatch, server
):
    publish(monkeypatch, server, zip_folder(write_pairs(tmp_path / "s", 5), tmp_path / "a.zip"))
    weights = b"weights" * 1000
    server.files["/sam2.1_hiera_tiny.pt"] = weights
    monkeypatch.setattr(models, "CHECKPOINT_URL", server.url + "/")
    spec = models.MODELS["tiny"]._replace(sha256=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(models.MODELS, "tiny", spec)
    outcome = run_script(main, "--model", "tiny")
    assert outcome.status == 0
    assert len(split_pairs(Path("data"), "train")) == 4
    assert Path("checkpoints/sam2.1_hiera_tiny.pt").read_bytes() == weights
    server.files.clear()  # run again, it needs no network
    again = run_script(main, "--model", "tiny")
    assert again.status == 0 and "Downloading" not in again.out


@pytest.mark.parametrize("case", ["cut off", "wrong bytes", "404", "unreachable", "silent"])
def test_a_failed_download_leaves_nothing_and_says_how_to_go_on(
    run_script, tmp_path, monkeypatch, server, case
):
    archive = zip_folder(write_pairs(tmp_path / "s", 5), tmp_path / "a.zip")
    publish(monkeypatch, server, archive, "/cut.zip" if case == "cut off" else "/data.zip")
    if case == "wrong bytes":
        server.files["/data.zip"] = b"something else"
    elif case == "404":
        server.files.clear()
    elif case == "unreachable":
        monkeypatch.setattr(source_module, "DATASET_URL", "http://127.0.0.1:9/data.zip")
    elif case == "silent":  # accepts the connection and never answers
        monkeypatch.setattr(files_module, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
        server.shutdown()
    outcome = prepare(run_script)
    assert outcome.status == 2
    last_line = outcome.err.splitlines()[-1]
    assert last_line.startswith("error: ") and "--archive" in last_line
    assert source_module.DATASET_URL in last_line
    assert not Path("data").exists() or not any(Path("data").iterdir())
    if case == "silent":
        threading.Thread(target=server.serve_forever, daemon=True).start()


def test_a_failed_checkpoint_download_keeps_the_data_and_names_the_place(
    run_script, tmp_path, monkeypatch, server
):
    source = write_pairs(tmp_path / "source", 4)
    monkeypatch.setattr(models, "CHECKPOINT_URL", server.url + "/")
    outcome = run_script(main, "--images", source / "images", "--masks", source / "masks")
    expected = str(Path("checkpoints/sam2.1_hiera_small.pt"))
    assert outcome.status == 2 and "404" in outcome.err and expected in outcome.err
    assert len(split_pairs(Path("data"), "train")) == 3
    assert list(Path("checkpoints").iterdir()) == []


def test_a_single_pair_is_not_enough(run_script, tmp_path):
    write_image(tmp_path / "i" / "a.png", np.zeros((8, 8, 3), np.uint8))
    write_image(tmp_path / "m" / "a.png", np.full((8, 8), 255, np.uint8))
    outcome = prepare(run_script, "--images", "i", "--masks", "m")
    assert outcome.status == 2 and "add more pairs" in outcome.err
