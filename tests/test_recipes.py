"""The benchmark of the recipes goes on where it was stopped."""

from pathlib import Path

import torch
from conftest import CPU

from benchmarks.recipes import COMPARED, MEASURES, RUN_COLUMNS, VAL, Bench, Run, key_of, read_rows
from finetuning.files import write_csv


def test_the_runs_of_its_table_are_known_again(tmp_path):
    bench = Bench("mini", Path("a.pt"), CPU, torch.float32, Path("=data"), None, tmp_path, 1, 1)
    keys = [Run(name, recipe, VAL).key(bench) for name, (recipe, _) in COMPARED.items()]
    reached = dict.fromkeys((*MEASURES, "seconds"), "0.5")
    rows = [list({**key, **reached}.values()) for key in keys]
    write_csv(tmp_path / "runs.csv", RUN_COLUMNS, rows)
    known = [key_of(row) for row in read_rows(tmp_path / "runs.csv")]
    assert known == [key_of(key) for key in keys]
