"""All four scripts on real Kvasir-SEG images, where the archive is at hand."""

import csv
import os
from pathlib import Path

import pytest

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper
from finetuning.basics.image_files import read_mask
from finetuning.dataset.pairs import split_pairs

ARCHIVE = os.environ.get("KVASIR_SEG_ZIP")


@pytest.mark.skipif(not ARCHIVE, reason="no real data")
def test_the_four_scripts_work_on_kvasir_seg(run_script, random_mini):
    outcome = run_script(
        download_dataset.main, "--archive", ARCHIVE, "--skip-checkpoint", "--data", "data"
    )
    assert outcome.status == 0, outcome.err
    train, val = split_pairs(Path("data"), "train"), split_pairs(Path("data"), "val")
    total = len(train) + len(val)
    assert len(val) == round(0.2 * total)
    assert not {pair.name for pair in train} & {pair.name for pair in val}
    areas = [read_mask(pair.mask).mean() for pair in val]
    assert all(0 < area < 0.95 for area in areas)  # polyps, not noise around the edges

    model = ("--model", "mini", "--checkpoint", random_mini)
    outcome = run_script(train_sam2_proper.main, *model, "--epochs", 1, "--limit", 8, "--lr", 1e-3)
    assert outcome.status == 0, outcome.err
    outcome = run_script(
        compare_models.main, "--original", random_mini, "--limit", 8, "--figures", 2
    )
    assert outcome.status == 0, outcome.err
    with Path("output/comparison/results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [pair.image.name for pair in val[:8]]
    outcome = run_script(test_my_image.main, "--image", val[0].image, "--box", "20,20,200,200")
    assert outcome.status == 0, outcome.err
    assert "score:" in outcome.out
