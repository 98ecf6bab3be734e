"""What steps report stays on the device until it is read, and a loss that breaks down is found."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

from sam2_utils import NotFiniteError

import numpy as np
import pytest
import torch
from conftest import CPU, write_data
from pretended_device import device_of, pretend
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from finetuning.basics import distributed
from finetuning.basics.distributed import mean_over_all
from finetuning.dataset.pairs import split_pairs
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.models import load_predictor
from finetuning.training import training_log
from finetuning.training.learner import make_learner
from finetuning.training.recipe import DEFAULT
from finetuning.training.training_log import READ_EVERY, RECENT, EpochReport
from finetuning.training_data import batches
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler
from train_sam2_proper import train_one_epoch

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
NOT_CLIPPED = torch.tensor(0.0)
# Where a GPU must have done all before it that it was given to do
ANSWERS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal",
    "allclose", "is_nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__",
    "__contains__", "__repr__", "__format__",
}  # fmt: skip


class Readings(TorchFunctionMode):
    """Notes what is read from a pretended device, by the file of ours or of SAM 2 that does."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        if args and isinstance(args[0], torch.Tensor) and device_of(args[0]) != CPU:
            asked = [*args[1:], *kwargs.values()]
            comes_here = name == "to" and any(_is_cpu(value) for value in asked)
            is_selected = name in ("__getitem__", "__setitem__") and _has_mask(args[1])
            # That of clipped gradients groups them by the device that they are really on
            is_torchs = sys._getframe(1).f_code.co_filename == clip_grad.__file__
            if name in ANSWERS or (comes_here and not is_torchs) or is_selected:
                self.files.append(_who_asks())
        return function(*args, **kwargs)


def _is_cpu(value: object) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cpu"


def _has_mask(index: object) -> bool:
    """Say whether a bool mask is in an index, which then has as many places as it has ones."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _who_asks() -> str:
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if "sam2" in path.parts[:-1]:
            return "SAM 2"
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return path.relative_to(ROOT).as_posix()
        frame = frame.f_back
    return "?"


def on(device: torch.device, *values: float) -> torch.Tensor:
    return torch.tensor(values, device=device)


def test_every_way_to_read_a_tensor_is_noted():
    ways = (
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, float, int, str, np.asarray,
        lambda tensor: tensor.to("cpu"), lambda tensor: tensor.to(device=CPU),
        lambda tensor: tensor > 0 or None, lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor[tensor > 0], lambda tensor: f"{tensor:.3f}",
    )  # fmt: skip
    for way in ways:
        with pretend("cuda"), Readings() as readings:
            on_cpu, there = torch.tensor(1.0), torch.tensor(1.0, device=CUDA)
            way(on_cpu)
            there = (there + 1).clone().to(CUDA, torch.float32)
            assert readings.files == []
            try:
                way(there)
            except TypeError:  # NumPy cannot
                assert way is np.asarray
        assert set(readings.files) == {"tests/test_epoch_report.py"}, way


# What is kept, and when it is read


def test_values_stay_on_a_gpu_until_it_is_time_to_show_them():
    shown = {}
    with pretend("cuda"), Readings() as readings:
        report = EpochReport(1, CUDA)
        for step in range(1, 2 * READ_EVERY + 6):
            parts = [{"loss": on(CUDA, step)}, {"loss": on(CUDA, step)}]
            report.add(parts, torch.tensor(1.0, device=CUDA), counts=True)
            recent = report.recent("loss", "clipped")
            assert len(readings.files) == step // READ_EVERY
            if recent:
                shown[step] = recent
        values = report.read()
        assert report.read() == values
        assert readings.files == ["finetuning/training/training_log.py"] * 3
    steps = [step for step in range(1, 2 * READ_EVERY + 6) for _ in range(2)]
    assert values == {"loss": steps, "clipped": [1.0] * len(steps)}
    assert list(shown) == [READ_EVERY, 2 * READ_EVERY]
    for step, recent in shown.items():
        mean = np.mean(steps[: 2 * step][-RECENT:])
        assert recent == {"loss": f"{mean:.3f}", "clipped": "1.000"}


def test_on_a_cpu_every_step_is_shown():
    report, losses = EpochReport(1, CPU), []
    for step in range(READ_EVERY + RECENT):
        report.add([{"loss": on(CPU, step), "train_iou": on(CPU, 0.5)}], NOT_CLIPPED, counts=True)
        losses.append(step)
        mean = np.mean(losses[-RECENT:])
        assert report.recent("loss", "train_iou") == {"loss": f"{mean:.3f}", "train_iou": "0.500"}
    assert report.read()["loss"] == losses


def test_steps_may_have_different_numbers_of_objects():
    report = EpochReport(1, CPU)
    for losses in ((1.0, 2.0, 3.0), (4.0,), (5.0, 6.0)):
        clipped = torch.tensor(float(len(losses) == 2))
        report.add([{"loss": on(CPU, *losses)}], clipped, counts=True)
    assert report.read() == {"loss": [1, 2, 3, 4, 5, 6], "clipped": [0, 0, 0, 0, 1, 1]}


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_ends_the_epoch(loss):
    broken = {"loss": on(CPU, 1.0, float(loss)), "train_iou": on(CPU, 0.0, 0.0)}
    for act in (EpochReport.read, lambda report: report.recent("loss")):
        report = EpochReport(7, CPU)
        report.add([broken], NOT_CLIPPED, counts=True)
        with pytest.raises(NotFiniteError, match=f"the loss became {loss} in epoch 7;.* --lr"):
            act(report)
    with pretend("cuda"):
        report = EpochReport(7, CUDA)
        for step in range(1, READ_EVERY + 1):
            of_step = float(loss) if step == 2 else 1.0
            report.add([{"loss": on(CUDA, of_step)}], torch.tensor(0.0, device=CUDA), counts=True)
            if step < READ_EVERY:
                assert report.recent("loss") is None
        with pytest.raises(NotFiniteError, match=f"became {loss} in epoch 7"):
            report.recent("loss")


def test_a_stand_in_adds_nothing():
    report = EpochReport(1, CPU)
    for loss in (float("nan"), 5.0):
        report.add([{"loss": on(CPU, loss)}], torch.tensor(1.0), counts=False)
        assert not report.recent("loss", "clipped")
    assert report.read() == {"loss": [], "clipped": []}
    report.add([{"loss": on(CPU, 2.0)}], NOT_CLIPPED, counts=True)
    report.add([{"loss": on(CPU, 9.0)}], torch.tensor(1.0), counts=False)
    assert report.read() == {"loss": [2.0], "clipped": [0.0]}
    assert report.recent("loss") == {"loss": "2.000"}


def test_means_are_over_the_objects_of_all_processes(monkeypatch):
    ours = {"loss": [1.0, 2.0], "clipped": [0.0, 1.0]}
    assert mean_over_all(ours, CPU) == {"loss": 1.5, "clipped": 0.5}

    def add_another_process(values, device):
        """Add that of one with losses of 3, 4 and 5, none of them clipped."""
        assert device == CPU
        return [value + theirs for value, theirs in zip(values, (12.0, 0.0, 3), strict=True)]

    monkeypatch.setattr(distributed, "sum_over_all", add_another_process)
    assert mean_over_all(ours, CPU) == {"loss": 3.0, "clipped": 0.2}
    # And one that only stands in
    assert mean_over_all({"loss": [], "clipped": []}, CPU) == {"loss": 4.0, "clipped": 0.0}


# A step of training


@pytest.mark.parametrize("is_held", [True, False])
def test_a_step_of_training_reads_nothing_from_the_device(
    tmp_path, random_mini, monkeypatch, is_held
):
    """Neither do the parts of SAM 2 that it uses; what the optimizer of torch does is not noted."""
    monkeypatch.setattr(training_log, "READ_EVERY", 3)
    monkeypatch.setattr(batches, "count_workers", lambda *_: 0)
    pairs = split_pairs(write_data(tmp_path / "data", train=8, val=0), "train")
    recipe = dataclasses.replace(DEFAULT, prompts="inner", none_share=0.3, epochs=1, batch_size=1)
    with pretend("cuda"):
        predictor = load_predictor("mini", random_mini, CUDA)[0]
        cache = FeatureCache(tmp_path / "cache", predictor, torch.float32)
        cache.fill([pair.image for pair in pairs], predictor, "train")
        if is_held:
            cache.hold([pair.image for pair in pairs], predictor.device)
        training_set = TrainingSet(pairs, cache, 256, recipe.seed, recipe.prompt_mix)
        sampler = EpochSampler(dict.fromkeys(range(8), 1), 1, recipe.seed)
        kinds = {training_set[step].plan.kind for step in sampler}
        assert kinds == {"inner", "none"}
        learner = make_learner(predictor, recipe, torch.bfloat16)
        loader = make_loader(training_set, sampler, predictor.device)
        before = [weight.detach().clone() for weight in learner.weights.parameters()]
        with Readings() as readings:
            report = train_one_epoch(predictor, loader, learner, recipe, 1)
        # After steps 3 and 6, and in the end
        assert Counter(readings.files) == {"finetuning/training/training_log.py": 3}
        after = [weight.detach() for weight in learner.weights.parameters()]
        assert not all(map(torch.equal, before, after))
        assert {device_of(weight).type for weight in after} == {"cuda"}
    assert set(report) == {"loss", "seg_loss", "score_loss", "train_iou", "clipped"}
    assert all(np.isfinite(value) for value in report.values())
