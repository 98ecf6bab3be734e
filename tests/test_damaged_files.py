"""A run's files that were damaged, lost or changed are noticed before they are trained on."""

import shutil
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
import torch
from conftest import snapshot, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

import compare_models
import test_my_image
import train_sam2_proper
from finetuning.basics.image_files import write_image
from finetuning.model.checkpoints import load_checkpoint

OPTIONS = ("--model", "mini", "--device", "cpu", "--lr", "1e-3")
SAVED = ("train_state.pt", "sam2_best.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, random_mini) -> Path:
    """Return a folder with data/, and with output/ of a run of one epoch that was better."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_sam2_proper.main([*OPTIONS, "--checkpoint", str(random_mini), "--epochs", "1"])
    assert (folder / "output/sam2_best.pt").is_file()
    return folder


@pytest.fixture
def run(run_script, trained, tmp_path, random_mini):
    """Return what resumes a copy of that run, in the test's folder, for another epoch."""
    for name in ("data", "output"):
        shutil.copytree(trained / name, tmp_path / name)

    def resume():
        options = (*OPTIONS, "--checkpoint", random_mini, "--epochs", 2, "--resume")
        return run_script(train_sam2_proper.main, *options)

    return resume


def flip(path: Path, place: float, bit: int = 6) -> None:
    """Turn one bit of a file round, at a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", SAVED)
def test_a_flipped_bit_in_the_weights_is_noticed(run, name):
    flip(Path("output", name), 0.5)
    before = snapshot(Path("output"))
    outcome = run()
    assert outcome.status == 2 and f"{name} is not a readable checkpoint (damaged" in outcome.err
    after = snapshot(Path("output"))
    assert all(after[file] == content for file, content in before.items())


# The first part holds the pickle, where one bit is not as another; the rest is weights.
@pytest.mark.parametrize(("until", "trials"), [(0.02, 30), (1.0, 10)])
def test_whatever_bit_of_a_checkpoint_changes_it_is_refused_or_read_as_it_was(
    trained, tmp_path_factory, until, trials
):
    checkpoint = trained / "output/sam2_best.pt"
    copy = tmp_path_factory.mktemp("flipped") / "a.pt"
    expected = load_checkpoint(checkpoint)

    @settings(max_examples=trials, deadline=None)
    @given(st.floats(0, until), st.integers(0, 7))
    def try_place(place: float, bit: int) -> None:
        shutil.copy(checkpoint, copy)
        flip(copy, place, bit)
        try:
            found = load_checkpoint(copy)
        except UserError as error:
            assert "\n" not in str(error)
            return
        assert found["settings"] == expected["settings"]
        for key, weight in expected["model"].items():
            assert np.array_equal(found["model"][key].numpy(), weight.numpy()), key

    try_place()


def test_a_run_without_its_best_model_is_not_resumed(run):
    Path("output/sam2_best.pt").unlink()
    outcome = run()
    assert outcome.status == 2 and "sam2_best.pt is missing" in outcome.err


def test_masks_that_have_changed_are_other_data_though_their_files_are_as_large(run):
    for path in Path("data/masks/train").iterdir():
        size = path.stat().st_size
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        write_image(path, mask[::-1])
        content = path.read_bytes()
        path.write_bytes(content + bytes(max(0, size - len(content))))
    outcome = run()
    assert outcome.status == 2 and "had other images or masks" in outcome.err


def test_an_undamaged_run_goes_on(run):
    outcome = run()
    assert outcome.status == 0, outcome.err
    assert "continuing after epoch 1" in outcome.out


def test_a_damaged_model_is_not_compared(run_script, trained, tmp_path, random_mini):
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "output", tmp_path / "output")
    flip(Path("output/sam2_best.pt"), 0.7)
    outcome = run_script(compare_models.main, "--original", random_mini)
    assert outcome.status == 2 and "damaged" in outcome.err


def test_without_its_features_a_model_is_compared_with_the_same_numbers(
    run_script, trained, tmp_path, random_mini
):
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "output", tmp_path / "output")
    found = []
    for _ in range(2):
        outcome = run_script(compare_models.main, "--original", random_mini, "--figures", 0)
        assert outcome.status == 0, outcome.err
        found.append(Path("output/comparison/results.csv").read_bytes())
        shutil.rmtree("output/cache", ignore_errors=True)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "crafted",
    [
        {"checkpoint": 5}, {"precision": "load"}, {"precision": 5}, {"cache": 5}, {"cache": ["a"]},
        {"value_range": [1]}, {"value_range": ["a", "b"]}, {"value_range": [9, 1]}, [1, 2], "text",
    ],
)  # fmt: skip
def test_settings_that_somebody_made_up_end_in_no_traceback(
    run_script, trained, tmp_path, random_mini, crafted
):
    shutil.copytree(trained / "data", tmp_path / "data")
    checkpoint = torch.load(trained / "output/sam2_best.pt", weights_only=True)
    is_dict = isinstance(crafted, dict)
    checkpoint["settings"] = {**checkpoint["settings"], **crafted} if is_dict else crafted
    torch.save(checkpoint, tmp_path / "c.pt")
    options = ("--finetuned", "c.pt", "--original", random_mini, "--figures", 0, "--limit", 1)
    outcome = run_script(compare_models.main, *options)
    assert outcome.status == 0, outcome.err
    image = next(Path("data/images/val").iterdir())
    options = ("--checkpoint", "c.pt", "--image", image, "--point", "60,40")
    outcome = run_script(test_my_image.main, *options)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    "odd",
    [
        {"log": "none"},
        {"log": []},
        {"log": [{"epoch": 0}]},
        {"log": [{"epoch": 1, "val_iou": 0.5}]},
        {"log": [{"epoch": 0, "val_iou": "high"}]},
        {"log": [{"epoch": 0, "val_iou": float("nan")}]},
        {"log": [{"epoch": 0, "val_iou": 10**400}]},
        {"log": [0.5]},
        {"optimizer": None},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"settings": ["lr"]},
        {"settings": {}},
        {"settings": {"lr": 1e-4}},
        {"settings": {"prompts": torch.ones(2)}},
        {"settings": {"lr": "high"}},
    ],
    ids=str,
)
def test_a_state_that_holds_something_else_is_refused_in_one_line(run, odd):
    state = load_checkpoint(Path("output/train_state.pt"))
    torch.save({**state, **odd}, "output/train_state.pt")
    before = snapshot(Path("output"))
    outcome = run()
    assert outcome.status == 2 and outcome.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in outcome.err
    after = snapshot(Path("output"))
    assert all(after[file] == content for file, content in before.items())


def test_an_optimizer_of_other_weights_is_refused(run):
    state = load_checkpoint(Path("output/train_state.pt"))
    moments = state["optimizer"]["state"]
    moments[0] = {name: value.flatten()[:1] for name, value in moments[0].items()}
    torch.save(state, "output/train_state.pt")
    outcome = run()
    assert outcome.status == 2 and "train_state.pt is damaged, or not the state" in outcome.err
