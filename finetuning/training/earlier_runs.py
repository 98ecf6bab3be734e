"""An earlier run in the output folder: moved aside, so that a new run overwrites nothing of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import tell
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, lies_in, only_run_in
from finetuning.basics.run_outputs import FOLDS_FILE, RESULT_FILES, RUNS_FILE, STATE_FILE

RUN_FILES = {*RESULT_FILES, STATE_FILE, RUNS_FILE, FOLDS_FILE}
REPEAT_FOLDER = re.compile(r"(run|fold)_\d+")
EARLIER_FOLDER = re.compile(r"earlier_(\d+)")


def find_run(output: Path) -> list[Path]:
    """Return what runs have left in a folder: files, and the folders of further runs and folds.

    The cache, comparisons and segmented images are not among them.
    """
    if not output.is_dir():
        return []
    return sorted(
        path
        for path in output.iterdir()
        if (path.name in RUN_FILES and path.is_file())
        or (REPEAT_FOLDER.fullmatch(path.name) and path.is_dir())
    )


def require_elsewhere(checkpoint: Path, output: Path) -> None:
    """Raise UserError where the model to start from belongs to the earlier run of a folder."""
    if any(lies_in(checkpoint, path) for path in find_run(output)):
        raise UserError(
            f"{checkpoint} belongs to the earlier run in {output}, which a new run moves aside; "
            "use another --output"
        )


def set_aside(output: Path, settings: dict[str, Any]) -> None:
    """Move an earlier run to the next free output/earlier_N, and say how to go on with it.

    The demo's own run is removed, since anybody can repeat it. settings: of the new run. Raises
    UserError where a further run in the folder is still writing.
    """
    found = find_run(output)
    if not found:
        return
    for folder in filter(Path.is_dir, found):
        with only_run_in(folder):  # nobody else is
            pass
    if output == DEMO_OUTPUT and settings["data"] == str(DEMO_DATA):
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    matches = map(EARLIER_FOLDER.fullmatch, (path.name for path in output.iterdir()))
    number = 1 + max((int(match[1]) for match in matches if match), default=0)
    folder = output / f"earlier_{number}"
    folder.mkdir()
    # The state goes last: where this is stopped halfway, --resume finds it and names what is gone
    for path in sorted(found, key=lambda path: path.name == STATE_FILE):
        path.rename(folder / path.name)
    cache = f" --cache {settings['cache']}" if settings["cache"] else ""
    go_on = f"--resume --output {folder}{cache}"
    tell(f"the earlier run in {output} is now in {folder}; to go on with it, add {go_on}")
