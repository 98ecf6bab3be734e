"""Move an earlier run in the output folder aside, so that a new run does not overwrite it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sam2_utils import UserError

from finetuning.basics.command_line import quote_command, tell
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, lies_in, only_run_in
from finetuning.basics.run_outputs import (
    FOLDS_FILE,
    MEAN_FILE,
    RESULT_FILES,
    RUNS_FILE,
    STATE_FILE,
)

RUN_FILES = {*RESULT_FILES, STATE_FILE, RUNS_FILE, FOLDS_FILE, MEAN_FILE}
REPEAT_FOLDER = re.compile(r"(run|fold)_\d+")
EARLIER_FOLDER = re.compile(r"earlier_(\d+)")


def find_run(output: Path) -> list[Path]:
    """Return the files of a run in a folder, and the folders of its further runs and folds.

    The cache, comparisons and segmented images do not belong to it.
    """
    if not output.is_dir():
        return []
    return sorted(
        path
        for path in output.iterdir()
        if (path.name in RUN_FILES and path.is_file())
        or (REPEAT_FOLDER.fullmatch(path.name) and path.is_dir())
    )


def require_outside_run(checkpoint: Path, output: Path) -> None:
    """Raise UserError if the model to start from belongs to the earlier run in a folder."""
    if any(lies_in(checkpoint, path) for path in find_run(output)):
        raise UserError(
            f"{checkpoint} belongs to the earlier run in {output}, which a new run moves aside; "
            "use another --output"
        )


def set_aside(output: Path, data: Path, cache: Path | None) -> None:
    """Move an earlier run to the next free output/earlier_N, and tell how to continue it.

    The demo's own run is deleted, since anyone can repeat it. data, cache: folders of the new run.
    Raises UserError if a further run or a fold in the folder is still being written.
    """
    found = find_run(output)
    if not found:
        return
    for folder in filter(Path.is_dir, found):
        with only_run_in(folder):  # raises if another process is writing there
            pass
    if output == DEMO_OUTPUT and data == DEMO_DATA:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    matches = map(EARLIER_FOLDER.fullmatch, (path.name for path in output.iterdir()))
    number = 1 + max((int(match[1]) for match in matches if match), default=0)
    folder = output / f"earlier_{number}"
    folder.mkdir()
    # The state moves last: after an interruption, --resume finds it and says what is missing
    for path in sorted(found, key=lambda path: path.name == STATE_FILE):
        path.rename(folder / path.name)
    options = ["--resume", "--output", str(folder), *(["--cache", str(cache)] if cache else [])]
    added = quote_command(options)
    tell(f"the earlier run in {output} is now in {folder}; to continue it, add {added}")
