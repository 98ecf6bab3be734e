"""The learning rate fits the model, is found where that is asked for, and never makes it worse."""

import copy
import csv
import dataclasses
import math
from argparse import Namespace
from pathlib import Path

from sam2_utils import UserError

import pytest
import torch
from conftest import CPU, write_data

import compare_models
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.measuring import Validation
from finetuning.model.model import Model
from finetuning.training import learning_rate_trial, run_files
from finetuning.training.learning_rate_trial import RATES, choose_rate, split_for_trials
from finetuning.training.options import parse_args
from finetuning.training.recipe import GUIDE, Recipe
from finetuning.training.training_log import best_of
from train_sam2_proper import main


@pytest.fixture
def train(run_script, tmp_path, random_mini):
    """Return a function that trains mini on drawn images with some options."""
    write_data(tmp_path / "data", train=8, val=2)

    def run(*options):
        model = ("--model", "mini", "--checkpoint", random_mini)
        machine = ("--precision", "float32", "--device", "cpu")  # the same runs, the same bits
        return run_script(main, *model, *machine, *options)

    return run


def read_log(output: Path = Path("output")) -> list[dict[str, str]]:
    with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def equal(ours: dict, theirs: dict) -> bool:
    return all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_models_that_know_much_learn_more_slowly_than_mini():
    rates = {
        model: parse_args(["--model", model]).lr for model in ("tiny", "small", "large", "mini")
    }
    assert rates == {"tiny": 1e-4, "small": 1e-4, "large": 1e-4, "mini": 3e-4}
    assert parse_args(["--model", "mini", "--lr", "2e-5"]).lr == 2e-5
    assert parse_args(["--model", "mini", "--recipe", "guide"]).lr == 1e-5
    assert parse_args(["--demo"]).lr == 1e-3
    assert parse_args(["--demo", "--model", "small"]).lr == 1e-4
    assert parse_args(["--demo", "--recipe", "guide"]).recipe == dataclasses.replace(
        GUIDE, epochs=8
    )
    assert parse_args(["--demo", "--lr", "2e-5", "--epochs", "3"]).recipe.epochs == 3


# Never worse


def measure(monkeypatch, *ious: float) -> None:
    """Let these be what validation finds, epoch by epoch."""
    left = list(ious)
    monkeypatch.setattr(Validation, "measure", lambda *_: {"val_iou": left.pop(0)})


def test_where_no_epoch_is_better_the_best_is_the_original(
    train, run_script, random_mini, monkeypatch
):
    measure(monkeypatch, 0.6, 0.5, 0.6)
    outcome = train("--epochs", 2)
    assert outcome.status == 0, outcome.err
    log = read_log()
    assert [row["epoch"] for row in log] == ["0", "1", "2"] and log[0]["loss"] == ""
    best = load("output/sam2_best.pt")
    assert equal(best["model"], load(random_mini)["model"])
    assert best["epoch"] == 0 and best["val_iou"] == float(log[0]["val_iou"])
    last_words = outcome.out[outcome.out.index("fine-tuning did not help") :]
    assert "sam2_best.pt is the original" in last_words and "--lr auto" in last_words
    assert "best\n" not in outcome.out and "at best" not in outcome.out

    outcome = run_script(compare_models.main, "--figures", 0)
    assert "identical to the original: no epoch of the training was better" in outcome.out
    assert "improvement:       +0.0%p" in outcome.out


def test_best_is_said_of_the_epochs_that_are_better_than_all_before(train, monkeypatch):
    measure(monkeypatch, 0.5, 0.4, 0.5, 0.7, 0.7, 0.6)
    outcome = train("--epochs", 5)
    lines = [line for line in outcome.out.splitlines() if line.startswith("epoch")]
    assert [line.endswith("best") for line in lines] == [False, False, True, False, False]
    assert "val IoU 0.5000 before training, 0.7000 at best (epoch 3)" in outcome.out
    assert load("output/sam2_best.pt")["epoch"] == 3
    assert load("output/sam2_final.pt")["epoch"] == 5


def test_of_epochs_that_are_equally_good_the_earliest_is_the_best():
    log = [{"epoch": epoch, "val_iou": iou} for epoch, iou in enumerate((0.5, 0.7, 0.6, 0.7))]
    assert best_of(log)["epoch"] == 1
    assert best_of(log[:1])["epoch"] == 0


def test_the_best_model_is_replaced_by_a_better_one_only(tmp_path, monkeypatch):
    saved, to_go_on_from = [], []
    monkeypatch.setattr(run_files, "save_model", lambda path, _, row, __: saved.append((path, row)))
    monkeypatch.setattr(
        run_files, "save_state", lambda _, __, log, ___: to_go_on_from.append(log[-1]["epoch"])
    )
    monkeypatch.setattr(run_files, "write_log", lambda *_: None)
    log = [{"epoch": 0, "val_iou": 0.5}]
    for epoch, iou in enumerate((0.5, 0.6, 0.6, 0.4, 0.7), start=1):
        log.append({"epoch": epoch, "val_iou": iou, "loss": 1.0, "train_iou": 0.5, "seconds": 1.0})
        run_files.save_epoch(tmp_path, None, None, log, {})
    assert [(path.name, row["epoch"]) for path, row in saved] == [
        ("sam2_best.pt", 2),
        ("sam2_best.pt", 5),
    ]
    assert to_go_on_from == [1, 2, 3, 4, 5]


# --lr auto


def test_trials_learn_from_some_training_images_and_are_measured_on_others():
    for count in (8, 40, 1000):
        indices = list(range(100, 100 + count))
        learn_from, held_out, epochs = split_for_trials(indices, seed=1)
        assert set(learn_from) | set(held_out) <= set(indices)
        assert not set(learn_from) & set(held_out)
        assert 2 <= len(held_out) <= learning_rate_trial.MOST_HELD_OUT
        assert epochs * len(learn_from) >= learning_rate_trial.TRIAL_IMAGES
        assert (epochs - 1) * len(learn_from) < learning_rate_trial.TRIAL_IMAGES
        assert split_for_trials(indices, seed=1) == (learn_from, held_out, epochs)
        assert split_for_trials(indices, seed=2) != (learn_from, held_out, epochs)
    with pytest.raises(UserError, match="needs 8 training images"):
        split_for_trials(list(range(7)), seed=1)


def test_trials_start_from_the_original_and_are_measured_on_images_they_did_not_learn_from(
    monkeypatch,
):
    network = torch.nn.Module()
    network.image_size = 256
    network.sam_prompt_encoder = torch.nn.Linear(2, 3)
    network.sam_mask_decoder = torch.nn.Linear(3, 4)
    original = copy.deepcopy(network.state_dict())
    model = Model(Namespace(model=network, device=CPU), Namespace(precision=torch.float32))
    pairs = [Pair(str(index), Path(), Path()) for index in range(12)]
    learnt, rates, measured = set(), [], []

    def train_one_epoch(_predictor, loader, learner, trial, epoch):
        if epoch == 1:
            assert equal(network.state_dict(), original)
            rates.append(trial.lr)
        assert learner.optimizer.param_groups[0]["lr"] == trial.lr and epoch <= trial.epochs
        learnt.update(pairs[index].name for step in loader.sampler for index in step.indices)
        with torch.no_grad():
            for weight in learner.weights.parameters():
                weight += 1

    def measure_made_up(validation, measured_model):
        assert measured_model is model
        measured.append({pair.name for pair in validation.pairs})
        return {"val_iou": 0.9 if rates and rates[-1] == 1e-4 else 0.5}

    monkeypatch.setattr(Validation, "measure", measure_made_up)
    objects, recipe = dict.fromkeys(range(12), 1), Recipe(lr="auto")
    found = learning_rate_trial.try_learning_rates(
        model, Namespace(pairs=pairs), objects, recipe, train_one_epoch
    )
    assert found == 1e-4 and tuple(rates) == RATES
    assert len(learnt) == 9 and len(measured[0]) == 3
    assert len(measured) == 1 + len(RATES)
    assert all(on == measured[0] and not on & learnt for on in measured)
    assert equal(network.state_dict(), original)


def test_of_rates_that_are_alike_the_lowest_is_chosen():
    assert choose_rate({1e-5: 0.50, 1e-4: 0.60, 1e-3: 0.604}) == 1e-4
    assert choose_rate({1e-5: 0.50, 1e-4: 0.60, 1e-3: 0.65}) == 1e-3
    assert choose_rate({1e-5: 0.50, 1e-4: math.nan, 1e-3: math.nan}) == 1e-5
    assert choose_rate({1e-5: math.nan, 1e-4: math.nan}) == 1e-5


def test_where_no_rate_is_clearly_better_than_no_training_it_says_so(capsys):
    for gain, doubts in ((0.1, False), (0.001, True), (math.nan, True)):
        assert learning_rate_trial.find_learning_rate(lambda _, gain=gain: 0.5 + gain, 0.5) == min(
            RATES
        )
        assert ("no rate was clearly better" in capsys.readouterr().out) == doubts


def test_auto_finds_a_rate_and_trains_as_with_that_rate(train, monkeypatch):
    monkeypatch.setattr(learning_rate_trial, "TRIAL_IMAGES", 12)
    monkeypatch.setattr(learning_rate_trial, "RATES", RATES[1:4])
    outcome = train("--epochs", 2, "--lr", "auto", "--output", "auto")
    assert outcome.status == 0, outcome.err
    for rate in RATES[1:4]:
        assert f"  --lr {rate:<6g}  IoU 0." in outcome.out
    found = load("auto/sam2_final.pt")["settings"]["lr"]
    assert f"chose --lr {found:g} in " in outcome.out
    assert train("--epochs", 2, "--lr", found).status == 0
    for name in ("sam2_best.pt", "sam2_final.pt"):
        assert equal(load(f"auto/{name}")["model"], load(f"output/{name}")["model"])

    # The same command goes on with the rate that was found, without a search
    outcome = train("--epochs", 3, "--lr", "auto", "--output", "auto", "--resume")
    assert outcome.status == 0 and "chose" not in outcome.out, outcome.err
    assert load("auto/sam2_final.pt")["settings"]["lr"] == found
    assert train("--epochs", 3, "--lr", found, "--resume").status == 0
    assert equal(load("auto/sam2_final.pt")["model"], load("output/sam2_final.pt")["model"])


def test_a_rate_at_which_training_breaks_down_is_passed_over(train, monkeypatch):
    monkeypatch.setattr(learning_rate_trial, "TRIAL_IMAGES", 6)
    monkeypatch.setattr(learning_rate_trial, "RATES", (1e-4, 1e6))
    outcome = train("--epochs", 1, "--lr", "auto")
    assert outcome.status == 0, outcome.err
    assert "chose --lr 0.0001" in outcome.out


def test_where_auto_is_of_no_use_one_line_says_so(train, monkeypatch):
    outcome = train("--lr", "auto", "--train-encoder", "full")
    assert outcome.status == 2 and "--lr auto is not for --train-encoder" in outcome.err
    outcome = train("--lr", "auto", "--limit", 3)
    assert outcome.status == 2 and "needs 8 training images" in outcome.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = train("--lr", "auto")
    assert outcome.status == 2 and "one process" in outcome.err
    assert outcome.err.count("\n") == 1


def test_trials_do_not_measure_what_is_in_a_group_with_what_they_learnt_from():
    group_of = {index: f"video {index // 5}" for index in range(30)} | {30: None, 31: None}
    for seed_ in range(5):
        learn_from, held_out, _ = split_for_trials(list(range(32)), seed_, group_of)
        assert sorted(learn_from + held_out) == list(range(32))
        groups = [{group_of[i] for i in part if group_of[i]} for part in (learn_from, held_out)]
        assert not groups[0] & groups[1] and 8 <= len(held_out) <= 12
    alone = dict.fromkeys(range(32))
    assert split_for_trials(list(range(32)), 1, alone) == split_for_trials(list(range(32)), 1)
