"""Going on with an interrupted run: its state is read, checked, and put back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sam2_utils import UserError

from finetuning.basics.command_line import tell
from finetuning.basics.run_outputs import BEST_FILE, STATE_FILE
from finetuning.learner import Learner
from finetuning.model.checkpoints import load_checkpoint
from finetuning.model.models import own_image_size
from finetuning.recipe import GUIDE

# What a resumed run may have otherwise than the run that it goes on with.
FREE_SETTINGS = (
    "epochs", "checkpoint", "checkpoint_sha256", "data", "data_hash", "cache", "value_range",
    "seen",
)  # fmt: skip

LARGEST = 1e300  # of a number in a log; whole ones may be beyond all floats

Log = list[dict[str, float]]  # a row an epoch; epoch 0 is the original, with its val metrics only


def load_state(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read what save_state saved; its settings must be these, but an lr that is auto may be any.

    Raises UserError if there is no such run, or its settings, its data or its model differ.
    """
    path = output / STATE_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {output}; run without --resume")
    state = load_checkpoint(path)
    log = read_log(state)
    if log is None or not are_settings(state.get("settings", {})):
        raise UserError(_not_a_state(path))
    # Files from before there were recipes, --train-encoder or --image-size do not say these.
    before = {**asdict(GUIDE), "image_size": own_image_size(settings["model"])}
    before |= state.get("settings", {})
    if before["prompts"] == "point":  # as it was called
        before["prompts"] = "random"
    for name in [name for name in settings if name not in FREE_SETTINGS]:
        is_found = name == "lr" and settings["lr"] == "auto"
        if before.get(name) != settings[name] and not is_found:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"the run in {output} had {option} {before.get(name)}, not {settings[name]}; "
                "resume with the same, or use another --output"
            )
    if "data_hash" not in before:
        tell(f"warning: whether {settings['data']} is still as it was, an earlier version's run "
              "does not say")  # fmt: skip
        before["data_hash"] = settings["data_hash"]
    for name, what in (
        ("checkpoint_sha256", f"started from another --checkpoint than {settings['checkpoint']}"),
        ("data_hash", f"had other images or masks than {settings['data']} has now"),
    ):
        if before.get(name) != settings[name]:
            raise UserError(f"the run in {output} {what}; resume with the same, or start anew")
    require_best(output, log)
    return {**state, "log": log, "settings": before}


def read_log(state: dict[str, Any]) -> Log | None:
    """Return the log of a state, a row an epoch from 0 on; None where it holds something else."""
    rows = state.get("log")
    if "original_iou" in state and isinstance(rows, list):  # from before epoch 0 had a row
        rows = [{"epoch": 0, "val_iou": state["original_iou"]}, *rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    numbers = [value for row in rows for value in row.values()]
    are_numbers = all(_is_number(value) for value in numbers)
    are_complete = all(row.keys() >= {"epoch", "val_iou"} for row in rows)
    if not (rows and are_numbers and are_complete):
        return None
    return rows if [row["epoch"] for row in rows] == list(range(len(rows))) else None


def are_settings(values: Any) -> bool:
    """Say whether a value is settings: plain values by name, with a learning rate that is one."""
    plain = str | int | float | list | dict | None
    are_plain = isinstance(values, dict) and all(isinstance(v, plain) for v in values.values())
    return are_plain and _is_number(values.get("lr", 0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # nor NaN


def _not_a_state(path: Path) -> str:
    return (
        f"{path} is damaged, or not the state of a training; put the right one back, or start anew "
        "without --resume"
    )


def require_best(output: Path, log: Log) -> None:
    """Raise UserError where the best model of a run, as its log has it, is missing or damaged."""
    best = output / BEST_FILE
    if any("loss" in row for row in log) and not best.is_file():
        raise UserError(
            f"{best} is missing, the best model of the run so far; put it back, or start anew "
            "without --resume"
        )
    if best.is_file():
        load_checkpoint(best)


def restore(learner: Learner, state: dict[str, Any], path: Path) -> None:
    """Put the learner back to where an interrupted run was; path: of the file that says it."""
    rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    try:
        learner.weights.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.scaler.load_state_dict(state["scaler"])
        steps = [of_weight["exp_avg"].shape for of_weight in learner.optimizer.state.values()]
        weights = [weight.shape for weight in learner.optimizer.state]
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(_not_a_state(path)) from error
    if steps != weights:  # which torch does not look at before the next step
        raise UserError(_not_a_state(path))
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        group["initial_lr"] = rate  # files of earlier versions do not have it
