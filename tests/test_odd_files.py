"""What is no file, is too large to read, or lies where it is read is refused before any harm."""

import importlib.util
import os
import runpy
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import sam2_utils
from sam2_utils import UserError

import pytest
from conftest import write_data, write_pairs

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper
from finetuning.annotations.reading import read_annotations
from finetuning.basics.csv_files import read_table
from finetuning.basics.files import MAX_FILE_BYTES, content_sha256, lies_in, read_file, require_file
from finetuning.basics.image_files import read_image, read_mask
from finetuning.basics.run_outputs import read_runs
from finetuning.dataset.pairs import files_by_stem
from finetuning.inference.folder_results import list_images
from finetuning.model.checkpoints import load_checkpoint
from finetuning.sources.archives import open_archive
from finetuning.sources.folder_layouts import read_folder

TRAIN, COMPARE = train_sam2_proper.main, compare_models.main
DOWNLOAD, SEGMENT = download_dataset.main, test_my_image.main
READERS = {
    "image": read_image,
    "mask": read_mask,
    "checkpoint": load_checkpoint,
    "content": content_sha256,
    "archive": lambda path: open_archive(path).__enter__(),
    "table": lambda path: list(read_table(path, ("image",))),
    "annotations": read_annotations,
    "runs": read_runs,
    "file of a data folder": lambda path: files_by_stem(path.parent),
}


def link(path: Path, to: object) -> Path:
    try:
        path.symlink_to(to)
    except OSError:
        pytest.skip("this system lets nobody make links")
    return path


def link_to_device(path: Path) -> Path:
    """Make a link to the one device that ends, so that a failing test ends, too."""
    if sys.platform == "win32":
        pytest.skip("devices are no files here")
    return link(path, os.devnull)


def sparse(path: Path, size: int) -> Path:
    if sys.platform == "win32":
        pytest.skip("it would fill the disk")
    path.touch()
    os.truncate(path, size)
    return path


@pytest.fixture
def refuse(run_script, tmp_path):
    """Assert that a script ends in one line with `says` in it, and that there is no new file."""

    def check(script: Callable, *options: object, says: str = "") -> None:
        before = files_in(tmp_path)
        outcome = run_script(script, *options)
        assert outcome.status == 2, outcome
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert says in outcome.err and "; " in outcome.err
        assert files_in(tmp_path) == before

    return check


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# Devices, pipes, links that lead nowhere


@pytest.mark.parametrize("kind", READERS)
def test_a_link_to_a_device_is_named_and_not_read(tmp_path, kind):
    with pytest.raises(UserError, match=r"device\.png is a device or a pipe, not a file; "):
        READERS[kind](link_to_device(tmp_path / "device.png"))
    (tmp_path / "device.png").unlink()
    with pytest.raises(UserError, match=r"no such [a-z ]+: .*device\.png; "):
        READERS[kind](link(tmp_path / "device.png", "nowhere"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a device or a pipe"):
        require_file(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_no_script_reads_or_copies_a_device_among_images_and_masks(refuse, tmp_path, kind):
    write_data(tmp_path / "data", train=2, val=1)
    for split in ("train", "val"):
        path = next((tmp_path / "data" / kind / split).iterdir())
        path.unlink()
        link_to_device(path)
    folders = [f"--{name}=data/{name}/train" for name in ("images", "masks")]
    for script, options in (
        (TRAIN, ("--model", "mini", "--device", "cpu")),
        (COMPARE, ("--device", "cpu")),
        (DOWNLOAD, ("--data", "new", *folders)),
    ):
        refuse(script, *options, says="is a device or a pipe")
    assert not (tmp_path / "new/images").exists()


def test_an_image_of_a_folder_that_is_no_file_fails_by_its_name(tmp_path):
    link_to_device(tmp_path / "a.png")
    link(tmp_path / "b.png", "nowhere")
    (tmp_path / "c.png").mkdir()
    assert [image.name for image in list_images(tmp_path)] == ["a.png", "b.png"]


# Sizes


@pytest.mark.parametrize("kind", ["image", "mask", "table", "annotations", "file of a data folder"])
def test_a_file_too_large_for_the_memory_is_not_read(tmp_path, kind):
    suffix = ".json" if kind == "annotations" else ".png"
    path = sparse(tmp_path / f"large{suffix}", MAX_FILE_BYTES + 1)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"has 1 GB, more than .* GB; .*SAM2_MAX_MEGAPIXELS to m"):
        READERS[kind](path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_a_mask_too_large_is_refused_before_any_pair_is_copied(refuse, tmp_path):
    write_pairs(tmp_path, 2)
    sparse(tmp_path / "masks/pair_001.png", MAX_FILE_BYTES + 1)
    refuse(DOWNLOAD, "--images=images", "--masks=masks", "--data=new", says="pair_001.png has 1 GB")


@pytest.mark.parametrize(
    ("text", "megapixels"), [("200", 200), ("", 100), ("2e3", 100), ("٣", 3), ("9" * 30, 10**6)]
)
def test_the_largest_image_may_be_set(monkeypatch, text, megapixels):
    for name in ("SAM2_MAX_MEGAPIXELS", "OPENCV_IO_MAX_IMAGE_PIXELS"):
        monkeypatch.setenv(name, text)
    spec = importlib.util.spec_from_file_location("reloaded", sam2_utils.__file__)
    reloaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reloaded)
    assert megapixels == reloaded.MAX_MEGAPIXELS
    assert os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == str(megapixels * 10**6)


def test_an_older_python_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(sam2_utils.__file__)
    assert capsys.readouterr().err.startswith("error: this is Python 3.10 or older; make a .venv")


def test_a_file_as_large_as_allowed_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(UserError, match="more than"):
        read_file(tmp_path / "a", max_bytes=4)


# Folders


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_around_it_is_refused(refuse, tmp_path, target):
    write_pairs(tmp_path / "some", 2)
    link(tmp_path / "some/images/loop", target)
    for options in (("--images=some/images", "--masks=some/masks"), ("--archive=some",)):
        refuse(DOWNLOAD, *options, "--data=new", says="loop is a link to a folder around it; ")


def test_links_that_lead_round_in_a_circle_are_refused(tmp_path):
    write_pairs(tmp_path, 1)
    link(tmp_path / "images/to_masks", "../masks")
    link(tmp_path / "masks/to_images", "../images")
    with pytest.raises(UserError, match="to_images is a link to a folder around it"):
        read_folder(tmp_path / "images")


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    write_pairs(tmp_path / "some", 2)
    link(tmp_path / "linked", "some")
    assert [len(child.files) for child in read_folder(tmp_path / "linked").folders] == [2, 2]


def test_a_link_to_itself_is_refused_wherever_a_folder_is_meant(refuse, tmp_path, random_mini):
    write_data(tmp_path / "data", train=2, val=1)
    link(tmp_path / "loop", "loop")
    folders = [f"--{name}=data/{name}/train" for name in ("images", "masks")]
    training = ("--model=mini", "--device=cpu", "--checkpoint", random_mini)
    image = ("--image=data/images/val/pair_002.jpg", "--point=5,5", "--checkpoint", random_mini)
    refuse(DOWNLOAD, *folders, "--data=loop")
    refuse(DOWNLOAD, "--images=loop", "--masks=loop", "--data=new")
    for option in ("--data=loop", "--output=loop", "--cache=loop"):
        refuse(TRAIN, *training, option)
    refuse(SEGMENT, *image, "--device=cpu", "--output=loop")


@pytest.mark.parametrize("folder", ["data", "data/images/train", "data/masks", "data/Masks/new"])
def test_nothing_is_written_where_images_and_masks_are(refuse, tmp_path, random_mini, folder):
    write_data(tmp_path / "data", train=2, val=1)
    training = ("--model=mini", "--device=cpu", "--checkpoint", random_mini)
    says = f"{Path(folder)} is where the images and masks of --data data are; "
    for script, option in ((TRAIN, "--output"), (TRAIN, "--cache"), (COMPARE, "--output")):
        options = training if script == TRAIN else ("--device=cpu", "--finetuned", random_mini)
        refuse(script, *options, option, folder, says=says)


def test_results_are_not_kept_in_the_cache_which_may_be_deleted(refuse, tmp_path):
    write_data(tmp_path / "data", train=2, val=1)
    for output in ("kept", "kept/results"):
        options = ("--output", output, "--cache", "kept")
        refuse(TRAIN, "--model=mini", "--device=cpu", *options, says="which may be deleted")


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (("--images=some/images", "--masks=some/masks"), "some"),
        (("--images=some/images", "--masks=some/masks"), "some/images"),
        (("--images=some/images", "--masks=some/masks"), "some/masks/new"),
        (("--archive=odd",), "odd"),
    ],
)
def test_a_folder_is_not_filled_from_itself(refuse, tmp_path, options, data):
    write_pairs(tmp_path / "some", 2)
    for kind in ("image", "mask"):
        write_pairs(tmp_path / "other", 2)
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / f"other/{kind}s").rename(tmp_path / "odd" / kind)
    refuse(DOWNLOAD, *options, "--data", data, says="use another --data folder")


def test_a_place_is_known_through_links_and_beside_its_namesakes(tmp_path):
    (tmp_path / "data/images").mkdir(parents=True)
    assert lies_in(tmp_path / "data/images/new/x", tmp_path / "data")
    assert not lies_in(tmp_path / "data/images_2", tmp_path / "data/images")
    assert not lies_in(tmp_path, tmp_path / "data")
    assert lies_in(link(tmp_path / "a", "data/images") / "x", tmp_path / "data/images")
