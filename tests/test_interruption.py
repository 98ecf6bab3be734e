"""A run that is killed, at any moment, loses at most the epoch in progress."""

import csv
import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import write_data

import train_sam2_proper
from finetuning.basics import command_line, files
from finetuning.basics.files import only_run_in
from finetuning.model import feature_cache
from finetuning.training import run_files
from train_sam2_proper import main

OPTIONS = ("--model", "mini", "--device", "cpu", "--epochs", "3", "--lr", "1e-3")
OPTIONS += ("--batch-size", "2", "--precision", "float32", "--augment", "2")

# Each is a function of the scripts, and which of its calls the process does not survive.
MOMENTS = {
    "while features are written": (Path, "write_bytes", 3),
    "in the middle of the first epoch": (train_sam2_proper, "batch_loss", 2),
    "between the best file and the state": (run_files, "save_state", 3),
    "between the state and the log": (run_files, "write_log", 2),
    "while a file takes its name": (Path, "replace", 17),
}


def run_until(moment: str, options: list[str]) -> None:
    """Train, and kill this process at a moment."""
    owner, name, fatal = MOMENTS[moment]
    survived, calls = getattr(owner, name), []

    def kill(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fatal:
            os.kill(os.getpid(), 9) if hasattr(os, "fork") else os._exit(9)
        return survived(*arguments, **options)

    setattr(owner, name, kill)
    command_line.run(main, options)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def read_log(output: Path) -> list[dict[str, str]]:
    with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def options(folder, random_mini) -> list[str]:
    write_data(folder / "data", train=4, val=2)
    return [*OPTIONS, "--checkpoint", str(random_mini), "--data", str(folder / "data")]


@pytest.fixture(scope="module")
def whole(folder, options) -> Path:
    """Return the output of a run that nothing disturbed."""
    main([*options, "--output", str(folder / "whole")])
    return folder / "whole"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(moment, folder, options, whole, processes):
    output = folder / moment
    killed = processes.Process(target=run_until, args=(moment, [*options, "--output", str(output)]))
    killed.start()
    killed.join(300)
    assert killed.exitcode in (-9, 9)
    assert not (output / "sam2_final.pt").exists()

    resume = ["--resume"] if (output / "train_state.pt").exists() else []  # as it tells the user
    main([*options, "--output", str(output), *resume])
    for name in ("sam2_best.pt", "sam2_final.pt"):
        resumed = weights_of(output / name)
        for key, weight in weights_of(whole / name).items():
            assert torch.equal(weight, resumed[key]), (name, key)
    assert read_log(output) == read_log(whole)
    assert not list(output.rglob("*.partial"))


def test_a_second_run_in_the_same_output_is_refused_and_harms_nothing(
    run_script, tmp_path, random_mini
):
    write_data(tmp_path / "data", train=2, val=1)
    options = (*OPTIONS[:4], "--checkpoint", random_mini, "--epochs", 1)
    assert run_script(main, *options).status == 0
    best = Path("output/sam2_best.pt").read_bytes()
    with only_run_in(Path("output")):
        outcome = run_script(main, *options)
    assert outcome.status == 2
    assert "error: another run is writing to output" in outcome.err
    assert Path("output/sam2_best.pt").read_bytes() == best
    with only_run_in(Path("shared")):  # features may be shared: each file is written whole
        assert run_script(main, *options, "--cache", "shared").status == 0
    assert run_script(main, *options).status == 0  # the lock ended with its holder


def test_a_folder_that_cannot_be_locked_is_no_other_run(tmp_path, monkeypatch, capsys):
    def refuse(number):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_lock", refuse)
        with only_run_in(tmp_path):  # some network drives have none
            assert "cannot be locked (No locks available)" in capsys.readouterr().out
    (tmp_path / "not to write in/.lock").mkdir(parents=True)
    with pytest.raises(OSError, match="lock"), only_run_in(tmp_path / "not to write in"):
        pass


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path):
    leftover, own = tmp_path / ".0123.partial", tmp_path / "mine.partial"
    leftover.write_bytes(b"half")
    own.write_bytes(b"the user's own")
    with only_run_in(tmp_path):
        assert not leftover.exists()
    assert own.exists()


def test_ctrl_c_while_images_are_encoded_keeps_those_that_are(
    run_script, tmp_path, random_mini, monkeypatch
):
    write_data(tmp_path / "data", train=4, val=1)
    options = (*OPTIONS[:4], "--checkpoint", random_mini, "--epochs", 1, "--augment", "off")
    encode_images, encoded = feature_cache.encode_images, []

    def interrupt(*arguments):
        encoded.append(arguments)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode_images(*arguments)

    monkeypatch.setattr(feature_cache, "encode_images", interrupt)
    outcome = run_script(main, *options)
    assert outcome.status == 130 and "run the same command again" in outcome.out
    outcome = run_script(main, *options)
    assert outcome.status == 0, outcome.err
    assert len(encoded) == 3 + 3  # two of five were kept


def test_a_full_disk_is_one_line_and_keeps_what_was_there(
    run_script, tmp_path, random_mini, monkeypatch
):
    write_data(tmp_path / "data", train=2, val=1)
    options = (*OPTIONS[:4], "--checkpoint", random_mini, "--epochs", 1)
    assert run_script(main, *options).status == 0
    before = {path: path.read_bytes() for path in Path("output").glob("sam2_*.pt")}

    def full(*_, **__):  # as torch reports it
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(train_sam2_proper.torch, "save", full)
    outcome = run_script(main, *options)
    assert outcome.status == 2
    last_line = outcome.err.splitlines()[-1]
    assert last_line.startswith("error: cannot be written (is the disk full?): output")
    assert {
        Path("output", path.name): path.read_bytes()
        for path in Path("output/earlier_1").glob("sam2_*.pt")
    } == before
    assert not list(Path("output").glob(".*.partial"))
