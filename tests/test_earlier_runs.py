"""A new run overwrites nothing of an earlier one in its output folder."""

from pathlib import Path

from sam2_utils import UserError

import pytest
from conftest import snapshot, write_data

from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, only_run_in
from finetuning.training.earlier_runs import set_aside
from train_sam2_proper import main

FOLDERS = (Path("data"), None)  # of the data and of the cache


@pytest.fixture
def train(run_script, tmp_path, random_mini):
    write_data(tmp_path / "data", train=2, val=1)
    options = (
        "--model", "mini", "--checkpoint", random_mini, "--prompts", "inner", "--none-share", 0,
        "--epochs", 1,
    )  # fmt: skip
    return lambda *more: run_script(main, *options, *more)


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def test_an_earlier_run_is_moved_aside_whole_and_can_go_on_there(train):
    assert train().status == 0
    kept = "comparison/report.html", "my_results/a.png", "notes.txt", "run_1.txt"
    write_files(Path("output"), *kept)
    first = snapshot(Path("output"))

    outcome = train("--seed", 1)
    assert outcome.status == 0, outcome.err
    assert (
        "the earlier run in output is now in output/earlier_1; to continue it, add "
        "--resume --output output/earlier_1 --cache output/cache\n"
    ) in outcome.out.replace("\\", "/")
    moved = snapshot(Path("output/earlier_1"))
    assert moved == {name: content for name, content in first.items() if name in moved}
    assert set(moved) == {
        "sam2_best.pt", "sam2_final.pt", "train_log.csv", "learning_curve.png", "train_state.pt",
        "augmentation.png",
    }  # fmt: skip
    second = snapshot(Path("output"))
    stays = [name for name in first if name not in moved]
    assert {"notes.txt", "run_1.txt", "comparison/report.html"} <= set(stays)
    assert all(second[name] == first[name] for name in stays)

    outcome = train("--epochs", 2, "--resume", "--output", "output/earlier_1",
                    "--cache", "output/cache")  # fmt: skip
    assert outcome.status == 0 and "continuing after epoch 1" in outcome.out
    assert "is now in" not in outcome.out
    assert not Path("output/earlier_1/earlier_1").exists()


def test_each_earlier_run_gets_the_next_free_number_with_all_its_runs_and_folds(tmp_path, capsys):
    write_files(tmp_path, "earlier_7/sam2_best.pt", "earlier_x/a", "fold_12/a", "fold_a/a")
    write_files(tmp_path, "sam2_final.pt", "runs.csv", "folds.csv", "run_2/sam2_best.pt")
    set_aside(tmp_path, *FOLDERS)
    assert set(snapshot(tmp_path / "earlier_8")) == {
        "sam2_final.pt", "runs.csv", "folds.csv", "run_2/.lock", "run_2/sam2_best.pt",
        "fold_12/.lock", "fold_12/a",
    }  # fmt: skip
    assert capsys.readouterr().out.endswith(f"add --resume --output {tmp_path / 'earlier_8'}\n")
    before = snapshot(tmp_path)
    set_aside(tmp_path, *FOLDERS)
    set_aside(tmp_path / "not there", *FOLDERS)
    assert snapshot(tmp_path) == before and capsys.readouterr().out == ""


def test_a_run_that_is_still_writing_is_not_moved(tmp_path):
    write_files(tmp_path, "sam2_final.pt", "run_2/sam2_best.pt")
    with only_run_in(tmp_path / "run_2"):
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match="another run is writing to"):
            set_aside(tmp_path, *FOLDERS)
        assert snapshot(tmp_path) == before


def test_a_run_that_fails_before_it_writes_moves_nothing(train):
    write_files(Path("output"), "sam2_best.pt")
    for wrong in (("--epochs", 0), ("--data", "nowhere"), ("--checkpoint", "nowhere.pt")):
        assert train(*wrong).status == 2
    min(Path("data/images/train").iterdir()).write_bytes(b"no image")
    assert train().status == 2
    assert set(snapshot(Path("output"))) == {".lock", "sam2_best.pt"}


def test_the_demo_replaces_its_own_run_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "sam2_best.pt", "run_2/sam2_best.pt", "cache/a", "my_results/a.png"
    write_files(DEMO_OUTPUT, *names)
    set_aside(DEMO_OUTPUT, *FOLDERS)  # another data set's
    assert "earlier_1/sam2_best.pt" in snapshot(DEMO_OUTPUT)
    write_files(DEMO_OUTPUT, *names)
    set_aside(DEMO_OUTPUT, DEMO_DATA, None)
    assert set(snapshot(DEMO_OUTPUT)) == {
        "cache/a", "my_results/a.png", "earlier_1/sam2_best.pt", "earlier_1/run_2/sam2_best.pt",
        "earlier_1/run_2/.lock",
    }  # fmt: skip
