"""Data sets are split reproducibly, downloaded whole or not at all, and never overwritten."""

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download_dataset
import sam2_utils
from command_line import UserError
from download_dataset import main, split_names
from image_files import split_pairs, write_image

import cv2
import numpy as np
import pytest
from conftest import snapshot, write_pairs, zip_folder

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
    assert one == two
    assert facts["val"] == other_facts["val"] and facts["source"] != other_facts["source"]


def test_run_again_it_changes_nothing_and_force_makes_it_anew(run_script, tmp_path):
    source = write_pairs(tmp_path / "source", 10)
    options = ("--images", source / "images", "--masks", source / "masks")
    prepare(run_script, *options)
    before = snapshot(tmp_path / "data")
    again = prepare(run_script, *options, "--seed", 1)
    assert again.status == 0 and "nothing to do" in again.out
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
    for name in ("first", "second"):
        write_pairs(tmp_path / name, 4)
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


def test_folders_inside_the_data_folder_are_refused(run_script, tmp_path):
    write_pairs(tmp_path / "data" / "raw", 4)
    outside = write_pairs(tmp_path / "outside", 4)
    for images, masks in (
        ("data/raw/images", "data/raw/masks"),
        (outside / "images", "data/raw/masks"),
    ):
        outcome = prepare(run_script, "--images", images, "--masks", masks)
        assert outcome.status == 2 and "lies inside" in outcome.err


def bad_archives(folder: Path) -> dict[str, Path]:
    """Make archives that must be refused, each with what its error must say."""
    source = write_pairs(folder / "source", 3)
    whole = zip_folder(source, folder / "whole.zip").read_bytes()
    archives = {
        "no such archive": b"",
        "not a whole zip archive": whole[: len(whole) // 2],
        "is damaged": whole[:500] + bytes(100) + whole[600:],
    }
    paths = {}
    for number, (message, content) in enumerate(archives.items()):
        paths[message] = folder / f"bad_{number}.zip"
        if content:
            paths[message].write_bytes(content)
    for number, (message, extra) in enumerate(
        {
            "outside its folder: ../evil.jpg": "../evil.jpg",
            "outside its folder: /evil.jpg": "/evil.jpg",
            "outside its folder: C:/evil.jpg": "C:\\evil.jpg",
            "outside its folder: images/../../evil.jpg": "images\\..\\..\\evil.jpg",
            "lonely.jpg: no mask": "Kvasir-SEG/images/lonely.jpg",
            "extra.png: no image": "Kvasir-SEG/masks/extra.png",
            "has 2 folders with images/": "other/images/a.jpg",
        }.items()
    ):
        paths[message] = folder / f"member_{number}.zip"
        paths[message].write_bytes(whole)
        with zipfile.ZipFile(paths[message], "a") as file:
            file.writestr(zipfile.ZipInfo(extra), b"x")
            if extra.startswith("other"):
                file.writestr("other/masks/a.jpg", b"x")
    with zipfile.ZipFile(folder / "nothing.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    paths["has 0 folders with images/"] = folder / "nothing.zip"
    return paths


def test_a_bad_archive_is_refused_before_anything_is_written(run_script, tmp_path):
    paths = bad_archives(tmp_path / "archives")
    for message, path in paths.items():
        outcome = prepare(run_script, "--archive", path)
        assert outcome.status == 2, message
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert message in outcome.err
        assert not Path("data").exists() or not any(Path("data").iterdir()), message
    assert not (tmp_path / "evil.jpg").exists()


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
        assert list(Path("data").iterdir()) == []


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
    monkeypatch.setattr(download_dataset, "DATASET_URL", server.url + name)
    monkeypatch.setattr(download_dataset, "DATASET_SHA256", hashlib.sha256(content).hexdigest())


def test_data_set_and_checkpoint_are_downloaded_and_checked(
    run_script, tmp_path, monkeypatch, server
):
    publish(monkeypatch, server, zip_folder(write_pairs(tmp_path / "s", 5), tmp_path / "a.zip"))
    weights = b"weights" * 1000
    server.files["/sam2.1_hiera_tiny.pt"] = weights
    monkeypatch.setattr(sam2_utils, "CHECKPOINT_URL", server.url + "/")
    spec = sam2_utils.MODELS["tiny"]._replace(sha256=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(sam2_utils.MODELS, "tiny", spec)
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
        monkeypatch.setattr(download_dataset, "DATASET_URL", "http://127.0.0.1:9/data.zip")
    elif case == "silent":  # accepts the connection and never answers
        monkeypatch.setattr(sam2_utils, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
        server.shutdown()
    outcome = prepare(run_script)
    assert outcome.status == 2
    last_line = outcome.err.splitlines()[-1]
    assert last_line.startswith("error: ") and "--archive" in last_line
    assert download_dataset.DATASET_URL in last_line
    assert not Path("data").exists() or not any(Path("data").iterdir())
    if case == "silent":
        threading.Thread(target=server.serve_forever, daemon=True).start()


def test_a_failed_checkpoint_download_keeps_the_data_and_names_the_place(
    run_script, tmp_path, monkeypatch, server
):
    source = write_pairs(tmp_path / "source", 4)
    monkeypatch.setattr(sam2_utils, "CHECKPOINT_URL", server.url + "/")
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
