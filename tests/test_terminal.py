"""What is printed: no run needs somebody to read it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parents[1]
on_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, files, names")


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
from finetuning.command_line import run

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
