"""The names of a training run's files, and the table of repeated runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetuning.basics.csv_files import read_with_digest

STATE_FILE, BEST_FILE = "train_state.pt", "sam2_best.pt"

FINAL_FILE, MEAN_FILE = "sam2_final.pt", "sam2_mean.pt"  # the mean: of --runs
LOG_FILES = ("train_log.csv", "learning_curve.png")
AUGMENTATION_FILE = "augmentation.png"  # of a run that augments
MODEL_FILES = (BEST_FILE, FINAL_FILE)
RESULT_FILES = (*MODEL_FILES, *LOG_FILES, AUGMENTATION_FILE)  # all but the training state

RUNS_FILE, FOLDS_FILE = "runs.csv", "folds.csv"
MAX_RUNS = 10_000  # a table with more rows is not one of runs
RUN_COLUMNS = ("run", "seed", "best_val_iou", "last_val_iou")


def read_runs(path: Path) -> np.ndarray:
    """Return the best and last validation IoU of R >= 2 runs, Rx2.

    Raises ValueError or UserError for any other content.
    """
    rows = read_with_digest(path, RUN_COLUMNS)
    ious = np.array([[float(iou) for iou in row[2:]] for row in rows])
    if not 2 <= len(ious) <= MAX_RUNS or not ((ious >= 0) & (ious <= 1)).all():  # nor NaN
        raise ValueError("no IoUs")
    return ious
