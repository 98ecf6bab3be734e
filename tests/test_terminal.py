"""What is printed: no run needs somebody to read it, and no name takes the terminal over."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest
from conftest import write_data, zip_folder
from tqdm import tqdm

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper

PROJECT = Path(__file__).resolve().parents[1]
on_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, files, names")
# An escape sequence that clears the screen, C1's way to begin one, and writing turned round
CLEAR, LINE = "a\x1b[2J\x9b2J\u202eb\u2066", "a\nerror: all is lost"


def pipe_without_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def talk(argv) -> None:
    for _ in tqdm(range(3)):
        print("x" * 100_000)  # more than any buffer takes
        print("y", file=sys.stderr, flush=True)
    Path("done").touch()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("state", ["closed", "without a reader"])
def test_a_run_goes_on_where_nobody_reads_it(run_script, monkeypatch, stream, state):
    monkeypatch.setattr(sys, stream, None if state == "closed" else pipe_without_reader())
    assert run_script(talk).status == 0
    assert Path("done").exists()


def test_a_run_whose_output_no_disk_takes_says_so(run_script, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("only Linux has it")
    with full.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        outcome = run_script(lambda argv: print("x"))
    assert outcome.status == 2 and "No space left" in outcome.err


LONG_RUN = """
import contextlib, os, signal
from finetuning.basics.command_line import run

def main(argv):
    with open("result", "w") as file:
        os.kill(os.getpid(), signal.SIGHUP)  # the terminal is closed
        for number in (1, 2):
            with contextlib.suppress(BrokenPipeError):
                os.write(number, b"as C code does, which knows no streams")
        print("still there")
        file.write("whole")

run(main)
"""


@on_posix
@pytest.mark.parametrize("how", ["", " >&- 2>&-"], ids=["its reader gone", "closed before it"])
def test_a_run_outlives_its_terminal_and_keeps_its_files_whole(tmp_path, how):
    shell = ["sh", "-c", f'exec "$@"{how}', "sh", sys.executable, "-c", LONG_RUN]
    with pipe_without_reader() as gone:
        ended = subprocess.run(
            shell, stdout=gone, stderr=gone, cwd=tmp_path, timeout=300,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert ended.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"


def lines_of(outcome) -> list[str]:
    return re.split("[\n\r]", outcome.out + outcome.err)


@on_posix
def test_no_script_prints_a_name_raw(run_script, tmp_path, random_mini):
    folder, output = tmp_path / LINE / CLEAR, tmp_path / CLEAR / LINE
    data = write_data(folder, train=3, val=2)
    for path in [*data.rglob("pair_000.*"), *data.rglob("pair_003.*")]:
        path.rename(path.with_stem(CLEAR))
    for path in [*data.rglob("pair_001.*"), *data.rglob("pair_004.*")]:
        path.rename(path.with_stem(LINE))
    archive = zip_folder(data / "images", tmp_path / f"{CLEAR}.zip", inside=f"{CLEAR}/images")
    cpu, images, masks = ("--device", "cpu"), data / "images/train", data / "masks/train"
    checkpoint, best = output / "start.pt", output / "sam2_best.pt"
    output.mkdir(parents=True)
    checkpoint.write_bytes(random_mini.read_bytes())
    (images / "bad\x1b[2J.png").write_bytes(b"no image")  # of which there is no mask

    train, segment = train_sam2_proper.main, (test_my_image.main, *cpu, "--checkpoint", checkpoint)
    start = ("--data", data, "--output", output, "--checkpoint", checkpoint, *cpu)
    refused = [
        (train, *start),
        (download_dataset.main, "--images", images, "--masks", masks, "--data", output / "new"),
        (download_dataset.main, "--archive", archive, "--data", output / "new"),
        (*segment, "--image", images / "bad\x1b[2J.png", "--point=5,5"),
        (test_my_image.main, "--image", LINE, f"--point={CLEAR}"),
    ]
    whole = ("--auto", "whole", "--output", output / "whole")
    folder_run = (*segment, "--image", images, *whole)
    for command in (*refused, folder_run):
        outcome = run_script(*command)
        assert outcome.status == (1 if command is folder_run else 2), outcome
        assert all(map(str.isprintable, lines_of(outcome))), outcome
        assert sum(line.lstrip().startswith("error: ") for line in lines_of(outcome)) == 1

    (images / "bad\x1b[2J.png").unlink()
    for command in (
        (train, *start, "--model", "mini", "--epochs", 1, "--precision", "float32"),
        (compare_models.main, "--data", data, "--finetuned", best, "--output", output, *cpu),
        (*segment, "--image", images / f"{CLEAR}.jpg", "--point=60,40", "--output", output / "1"),
        (*segment, "--image", images / f"{LINE}.jpg", *whole),
        (download_dataset.main, "--images", images, "--masks", masks, "--skip-checkpoint",
         "--data", output / "new", "--copies", "ignore"),
    ):  # fmt: skip
        outcome = run_script(*command)
        assert outcome.status == 0, outcome
        assert all(map(str.isprintable, lines_of(outcome))), outcome
        assert not any(line.lstrip().startswith("error: ") for line in lines_of(outcome))
    new = [path.name for path in (output / "new").rglob("*.jpg")]
    assert len(new) == 3 and all(map(str.isprintable, new))
