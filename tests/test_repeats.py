"""Several trainings: by further seeds, or without another part of the images each."""

import csv
import re
from argparse import Namespace
from pathlib import Path

from sam2_utils import UserError

import pytest
import torch
from conftest import CPU, snapshot, write_data

import compare_models
import train_sam2_proper
from finetuning.basics.csv_files import read_with_digest, write_with_digest
from finetuning.dataset.pairs import split_pairs
from finetuning.evaluation.measuring import Validation
from finetuning.model.checkpoints import load_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.training import repeats
from finetuning.training.recipe import Recipe
from finetuning.training.repeats import plan_trainings
from finetuning.training.weight_average import keep_mean
from train_sam2_proper import main


@pytest.fixture
def train(run_script, tmp_path, random_mini):
    """Train on four and three drawn pairs."""
    write_data(tmp_path / "data", train=4, val=3)
    options = (
        "--model", "mini", "--checkpoint", random_mini, "--lr", 1e-3, "--prompts", "inner",
        "--device", "cpu",  # where the same runs end in the same bits
    )  # fmt: skip
    return lambda *more: run_script(main, *options, *more)


def read(file: str) -> list[dict[str, str]]:
    with Path(file).open(encoding="utf-8-sig", newline="") as table:
        return list(csv.DictReader(table))


def weights(file: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(file))["model"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_runs_are_those_that_their_seeds_alone_would_give(train):
    outcome = train("--epochs", 2, "--runs", 2)
    assert outcome.status == 0, outcome.err
    rows = read("output/runs.csv")
    assert [(row["run"], row["seed"]) for row in rows] == [("1", "42"), ("2", "43")]
    for folder, row in zip(("output", "output/run_2"), rows, strict=True):
        log = [float(epoch["val_iou"]) for epoch in read(f"{folder}/train_log.csv")]
        assert float(row["best_val_iou"]) == max(log) and float(row["last_val_iou"]) == log[-1]
    mean, spread = re.search(r"2 runs: val IoU (\S+) ± (\S+) at best", outcome.out).groups()
    best = [float(row["best_val_iou"]) for row in rows]
    assert float(mean) == pytest.approx(sum(best) / 2, abs=1e-4)
    assert float(spread) == pytest.approx(abs(best[0] - best[1]) / 2**0.5, abs=1e-4)

    assert train("--epochs", 2, "--seed", 43, "--output", "alone").status == 0
    alone = weights("alone/sam2_final.pt")
    assert same(alone, weights("output/run_2/sam2_final.pt"))
    assert not same(alone, weights("output/sam2_final.pt"))

    # A plain run in the same place: what the others' spread was is not its own
    assert train("--epochs", 1).status == 0
    assert not Path("output/runs.csv").exists()


def test_runs_go_on_after_an_interruption(train):
    assert train("--epochs", 2, "--runs", 2).status == 0
    whole = weights("output/run_2/sam2_final.pt")
    for file in Path("output/run_2").iterdir():
        file.unlink()
    Path("output/runs.csv").unlink()
    first = weights("output/sam2_final.pt")
    outcome = train("--epochs", 2, "--runs", 2, "--resume")
    assert outcome.status == 0, outcome.err
    assert "all 2 epochs are done" in outcome.out and len(read("output/runs.csv")) == 2
    assert same(whole, weights("output/run_2/sam2_final.pt"))
    assert same(first, weights("output/sam2_final.pt"))
    assert train("--epochs", 2, "--runs", 2, "--resume", "--output", "none").status == 2


def test_a_new_command_is_not_resumed_with_the_runs_of_an_earlier_one(train, monkeypatch):
    assert train("--epochs", 1, "--runs", 2).status == 0
    with monkeypatch.context() as patch:  # stopped in its first run
        patch.setattr(train_sam2_proper, "fit", interrupt)
        assert train("--epochs", 1, "--runs", 2, "--weight-decay", 0.1).status == 130
    outcome = train("--epochs", 1, "--runs", 2, "--weight-decay", 0.1, "--resume")
    assert outcome.status == 0, outcome.err
    assert len(read("output/runs.csv")) == 2


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_mean_of_the_runs_is_saved_only_if_it_is_better_than_each(train):
    assert train("--epochs", 1, "--runs", 2).status == 0
    runs = [Path("output"), Path("output/run_2")]
    best = [load_checkpoint(folder / "sam2_best.pt") for folder in runs]
    highest = max(facts["val_iou"] for facts in best)
    Path("output/sam2_mean.pt").unlink(missing_ok=True)
    predictor, _ = load_predictor("mini", runs[0] / "sam2_best.pt", CPU)
    model = Model(predictor, FeatureSource(predictor, torch.float32))

    for reached in (highest + 0.01, highest):
        validation = Namespace(measure=lambda _, reached=reached: {"val_iou": reached})
        line = keep_mean(model, validation, Path("output"), runs)
        assert ("not kept" in line) == (reached == highest)
        assert Path("output/sam2_mean.pt").exists() == (reached > highest)
        if reached > highest:
            mean = load_checkpoint(Path("output/sam2_mean.pt"))
    first, second = (facts["model"] for facts in best)
    for name, weight in mean["model"].items():
        assert torch.allclose(weight, (first[name] + second[name]) / 2, atol=1e-6), name
    frozen = [name for name in first if torch.equal(first[name], second[name])]
    assert len(frozen) > 100 and all(torch.equal(mean["model"][x], first[x]) for x in frozen)
    assert mean["val_iou"] == highest + 0.01 and mean["model_name"] == "mini"
    assert mean["settings"] in [facts["settings"] for facts in best]  # with the seen images


def test_the_mean_of_the_runs_is_validated_as_they_are_also_after_an_interruption(
    train, run_script, monkeypatch
):
    """The mean's validation is pretended to be better than it is, so that it is always saved."""

    def measure_better(validation, model, measure=Validation.measure):
        wishful = 0.5 * state.is_averaging
        return {name: value + wishful for name, value in measure(validation, model).items()}

    def average(*arguments, average=train_sam2_proper.average_runs):
        state.is_averaging = True
        average(*arguments)
        state.is_averaging = False

    state = Namespace(is_averaging=False)
    monkeypatch.setattr(Validation, "measure", measure_better)
    monkeypatch.setattr(train_sam2_proper, "average_runs", average)
    outcome = train("--epochs", 1, "--runs", 2)
    assert outcome.status == 0, outcome.err
    mean = load_checkpoint(Path("output/sam2_mean.pt"))
    assert f"mean weights of the 2 runs: val IoU {mean['val_iou']:.4f}, above" in outcome.out
    assert "next: python compare_models.py --finetuned output/sam2_mean.pt" in outcome.out
    compared = run_script(compare_models.main, "--finetuned", "output/sam2_mean.pt")
    assert f"{mean['val_iou'] - 0.5:.2%}" in compared.out, compared

    with monkeypatch.context() as patch:  # stopped before the mean
        patch.setattr(train_sam2_proper, "average_runs", interrupt)
        assert train("--epochs", 1, "--runs", 2, "--resume").status == 130
    assert not Path("output/sam2_mean.pt").exists()
    assert train("--epochs", 1, "--runs", 2, "--resume").status == 0
    again = load_checkpoint(Path("output/sam2_mean.pt"))
    assert same(mean["model"], again["model"]) and mean["val_iou"] == again["val_iou"]

    # It belongs to the run: it is no start of another one in its place, and moves aside with it
    started = train("--epochs", 1, "--checkpoint", "output/sam2_mean.pt")
    assert started.status == 2 and "belongs to the earlier run" in started.err
    assert train("--epochs", 1).status == 0
    assert not Path("output/sam2_mean.pt").exists()
    assert same(mean["model"], weights("output/earlier_1/sam2_mean.pt"))


def test_each_image_is_the_val_of_one_fold_and_trained_on_in_the_others(tmp_path):
    write_data(tmp_path / "data", train=5, val=4)
    pairs = {split: split_pairs(tmp_path / "data", split) for split in ("train", "val")}
    pairs["train"][1:3] = [pair._replace(group="together") for pair in pairs["train"][1:3]]
    everything = {pair for of_split in pairs.values() for pair in of_split}
    trainings = plan_trainings(Recipe(seed=7), pairs, tmp_path, 1, 3)
    assert len({training.output for training in trainings}) == 3
    measured = [pair for training in trainings for pair in training.pairs["val"]]
    assert len(measured) == len(everything) and set(measured) == everything
    for training in trainings:
        train, val = (set(training.pairs[split]) for split in ("train", "val"))
        assert train | val == everything and not train & val
        assert sum(pair.group == "together" for pair in val) in (0, 2)
    assert trainings == plan_trainings(Recipe(seed=7), pairs, tmp_path, 1, 3)
    assert trainings != plan_trainings(Recipe(seed=8), pairs, tmp_path, 1, 3)


def test_folds_are_written_once_all_are_trained(train, monkeypatch):
    outcome = train("--epochs", 1, "--folds", 3)
    assert outcome.status == 0, outcome.err
    assert re.search(r"3 folds: val IoU \S+ ± \S+ before training, \S+ ± \S+ after", outcome.out)
    rows = read("output/folds.csv")
    assert sorted(row["image"] for row in rows) == [
        *(f"train/pair_{i:03}" for i in range(4)),
        *(f"val/pair_{i:03}" for i in range(4, 7)),
    ]
    assert sorted({row["fold"] for row in rows}) == ["1", "2", "3"]
    assert "next: python compare_models.py --folds output" in outcome.out
    assert train("--epochs", 1, "--folds", 8).status == 2
    assert train("--epochs", 1, "--folds", 3, "--runs", 2).status == 2


def test_thresholds_of_each_training_are_chosen_on_its_own_images_and_seed(train, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        repeats.object_matching,
        "keep_rule",
        lambda best, _device, _precision, pairs, seed: chosen.append((best, pairs, seed)),
    )
    assert train("--epochs", 1, "--runs", 2, "--background-share", 0.5).status == 0
    assert not chosen
    assert train("--epochs", 1, "--runs", 2, "--choose-thresholds").status == 0
    assert [(best.as_posix(), seed) for best, _, seed in chosen] == [
        ("output/sam2_best.pt", 42),
        ("output/run_2/sam2_best.pt", 43),
    ]
    chosen.clear()
    assert train("--epochs", 1, "--folds", 2, "--choose-thresholds").status == 0
    assert [best.as_posix() for best, *_ in chosen] == [
        f"output/fold_{number}/sam2_best.pt" for number in (1, 2)
    ]
    (_, first, _), (_, second, _) = chosen
    assert len(first) + len(second) == 7 and not set(first) & set(second)


def test_a_model_that_a_run_would_overwrite_is_no_start(train):
    assert train("--epochs", 1, "--runs", 2).status == 0
    before = snapshot(Path("output"))
    outcome = train("--epochs", 1, "--runs", 2, "--checkpoint", "output/run_2/sam2_best.pt")
    assert outcome.status == 2 and "would be overwritten" in outcome.err
    # Nor one that it would move aside
    outcome = train("--epochs", 1, "--checkpoint", "output/run_2/sam2_best.pt")
    assert outcome.status == 2 and "belongs to the earlier run in output" in outcome.err
    assert snapshot(Path("output")) == before


def test_a_table_that_is_read_again_is_noticed_to_be_damaged_wherever_it_is(tmp_path):
    table, columns = tmp_path / "folds.csv", ("fold", "image")
    rows = [["1", "train/가, 나"], ["2", "val/\udcff"]]  # the last one is no UTF-8
    write_with_digest(table, columns, rows)
    readable = [rows[0], ["2", "val/\\udcff"]]
    assert read_with_digest(table, columns) == readable
    content = table.read_bytes()
    for place in range(len(content)):
        bits = [content[:place] + bytes([content[place] ^ 1 << bit]) for bit in range(8)]
        damaged = [part + content[place + 1 :] for part in bits]
        for each in (content[:place], *damaged):
            table.write_bytes(each)
            try:
                assert read_with_digest(table, columns) == readable, each
            except UserError as error:
                assert "is damaged" in str(error)
    table.write_text("fold,image\n1,val/a\n", encoding="utf-8-sig")  # without its digests
    with pytest.raises(UserError, match="is damaged"):
        read_with_digest(table, columns)
