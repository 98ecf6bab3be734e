"""A run's files, damaged at any place: the same bits come out, or one line says what is wrong.

FUZZ_EXAMPLES=300 tries so many damages with each command, others each time.
"""

import contextlib
import csv
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Outcome, write_pairs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper
from finetuning.basics import command_line, language
from finetuning.basics.image_files import read_mask
from finetuning.model.checkpoints import load_checkpoint

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
CPU = ("--device", "cpu")
DOWNLOAD = ("--images", "from/images", "--masks", "from/masks", "--groups", "groups.csv")
TRAIN = ("--model", "mini", "--checkpoint", "mini.pt", "--image-size", 64, "--lr", "1e-3", *CPU)
COMPARE = ("--original", "mini.pt", "--figures", 0, *CPU)
SEGMENT = ("--image", "from/images/pair_000.jpg", "--point", "60,40", *CPU)


class Damage(NamedTuple):
    """What happens to a file, at a place from 0 to 1."""

    kind: str  # cut: what follows is gone; zeros, so many; flip: a bit is turned round
    place: float
    count: int
    bit: int

    def of(self, content: bytes) -> bytes:
        damaged, start = bytearray(content), int(self.place * (len(content) - 1))
        if self.kind == "cut":
            del damaged[start:]
        elif self.kind == "zeros":
            damaged[start : start + self.count] = bytes(min(self.count, len(damaged) - start))
        else:
            damaged[start] ^= 1 << self.bit
        return bytes(damaged)


places = st.floats(0, 1) | st.floats(0, 0.02) | st.floats(0.98, 1)  # more where headers are
kinds = st.sampled_from(["cut", "zeros", "flip"])
damages = st.builds(Damage, kinds, places, st.sampled_from([1, 16, 4096]), st.integers(0, 7))


def run(main: Callable, *options: object) -> Outcome:
    """Run a script's main as run_script does, which is for one test's folder."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run(main, [str(option) for option in options])
        except SystemExit as stop:
            status = stop.code
    return Outcome(status, out.getvalue(), err.getvalue())


def rows_of(table: str) -> list[dict[str, str]]:
    with Path(table).open(encoding="utf-8-sig", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def weights_of(model: str) -> list[np.ndarray]:
    return [weight.numpy() for weight in load_checkpoint(Path(model))["model"].values()]


def resumed(_: str) -> list[Any]:
    weights = weights_of("output/sam2_best.pt"), weights_of("output/sam2_final.pt")
    return [rows_of("output/train_log.csv"), *itertools.chain(*weights)]


def compared(printed: str) -> list[Any]:
    return [printed, rows_of("output/comparison/results.csv")]


def segmented(printed: str) -> list[Any]:
    return [printed, read_mask(Path("output/my_results/pair_000_001_mask.png"))]


# Of each command: what is run, the places of files that it may go by, and what comes out. What
# images and masks were, only a resumed run knows.
COMMANDS = {
    "resume": (
        train_sam2_proper.main,
        (*TRAIN, "--epochs", 2, "--resume"),
        ("output/*.pt", "output/*", "output/cache/*", "data/*", "data/*/*/*"),
        resumed,
    ),
    "compare": (
        compare_models.main,
        (*COMPARE, "--finetuned", "runs/sam2_best.pt"),
        ("runs/sam2_best.pt", "runs/runs.csv", "runs/cache/*", "runs/*", "data/*"),
        compared,
    ),
    "folds": (
        compare_models.main,
        (*COMPARE, "--folds", "folds"),
        ("folds/folds.csv", "folds/*/sam2_final.pt", "folds/*/*"),
        compared,
    ),
    "segment": (test_my_image.main, SEGMENT, ("output/sam2_best.pt", "output/*"), segmented),
}


@pytest.fixture(scope="module", autouse=True)
def in_english() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "system_language", lambda: "en")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, random_mini) -> Path:
    """Return a folder with a run of one epoch, which was better than the original; and repeats."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "from", 4)
    groups = "image,group\npair_000,a\npair_001,b\npair_002,c\npair_003,c\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(random_mini, "mini.pt")
        Path("groups.csv").write_text(groups, encoding="utf-8")
        assert run(download_dataset.main, *DOWNLOAD, "--skip-checkpoint").status == 0
        outcome = run(train_sam2_proper.main, *TRAIN, "--epochs", 1)
        assert outcome.status == 0 and "epoch 1)" in outcome.out
        for name in ("runs", "folds"):
            options = ("--epochs", 1, "--output", name, f"--{name}", 2)
            assert run(train_sam2_proper.main, *TRAIN, *options).status == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_damage_anywhere_changes_nothing_or_is_said(trained, tmp_path_factory, command):
    main, options, places, result = COMMANDS[command]
    copies = (tmp_path_factory.mktemp(command) / str(number) for number in itertools.count())

    def run_with(file: Path | None = None, damage: Damage | None = None) -> Outcome:
        folder = next(copies)
        shutil.copytree(trained, folder, copy_function=os.link)
        patch.chdir(folder)
        if file and (content := file.read_bytes()):
            file.unlink()  # a link to the one that stays whole
            file.write_bytes(damage.of(content))
        return run(main, *options)

    with pytest.MonkeyPatch.context() as patch:
        outcome = run_with()
        assert outcome.status == 0, outcome.err
        expected = result(outcome.out)

        @settings(
            max_examples=EXAMPLES or 5,
            derandomize=not EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # a smaller damage is no clearer, and takes minutes to find
        )
        @given(files_in(trained, places), damages)
        def try_damage(file: Path, damage: Damage) -> None:
            outcome = run_with(file, damage)
            if outcome.status == 0 and "it is ignored" not in outcome.out:
                assert all(map(np.array_equal, result(outcome.out), expected)), outcome
            elif outcome.status:
                assert outcome.status == 2 and outcome.err.startswith("error: "), outcome
                assert outcome.err.count("\n") == 1 and outcome.err[:-1].isprintable()
            folder = Path.cwd()
            patch.chdir(trained)
            shutil.rmtree(folder)

        try_damage()


def files_in(folder: Path, places: Iterable[str]) -> st.SearchStrategy[Path]:
    """Return a strategy of the files at places in a folder, all places as likely."""
    found = [sorted(path for path in folder.glob(place) if path.is_file()) for place in places]
    return st.one_of(map(st.sampled_from, found)).map(lambda path: path.relative_to(folder))
