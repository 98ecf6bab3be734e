"""Weights of SAM 2.1 are taken in every form that people save them in, and no code is run."""

import argparse
import copy
import pickle
import re
from collections import OrderedDict
from pathlib import Path

from sam2_utils import UserError

import pytest
import torch
from conftest import CPU, write_data
from safetensors.torch import save_file

import test_my_image
import train_sam2_proper
from finetuning.basics.files import content_sha256
from finetuning.model import checkpoints, models
from finetuning.model.checkpoints import (
    RESAVED,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from finetuning.model.models import build_predictor, load_predictor
from finetuning.model.weight_names import is_for_images, transformers_weights

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"


@pytest.fixture(scope="module")
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.fixture(scope="module")
def weights(predictor) -> OrderedDict:
    """Return mini's state_dict as model.state_dict() gives it."""
    return predictor.model.state_dict()


@pytest.fixture(scope="module")
def empty_predictor():
    return build_predictor("mini", CPU)


@pytest.fixture(autouse=True)
def build_once(monkeypatch, empty_predictor):
    """Build mini but once, for the time that it takes; each time, it has no weights but zeros."""

    def build(name: str, device: torch.device, image_size: int | None):
        assert (name, device, image_size) in (("mini", CPU, None), ("mini", CPU, 256))
        for weight in empty_predictor.model.state_dict().values():
            weight.zero_()
        return empty_predictor

    monkeypatch.setattr(models, "build_predictor", build)


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: weight for name, weight in weights.items()}


def assert_same_weights(path: Path, weights: dict) -> dict:
    """Check that a file gives a predictor these very weights; return the facts beside them."""
    predictor, facts = load_predictor(None, path, CPU)
    loaded = predictor.model.state_dict()
    assert loaded.keys() == weights.keys() and facts["model_name"] == "mini"
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    return facts


def as_kijai(weights: dict) -> dict:
    return {name.replace(".gamma", ".weight"): weight for name, weight in weights.items()}


FORMS = {
    "model": lambda weights: {"model": weights},
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights},
    "ddp": lambda weights: {"model": prefixed(weights, "module.")},
    "bare ddp": lambda weights: prefixed(weights, "module."),
    "lightning": lambda weights: {"state_dict": prefixed(weights, "model."), "epoch": 3},
    "compiled ddp": lambda weights: {"model": prefixed(weights, "module._orig_mod.")},
    "beside a loss": lambda weights: {
        "state_dict": {**prefixed(weights, "model."), "loss.weight": torch.ones(1)}
    },
    "beside counts": lambda weights: {
        "state_dict": {**weights, "steps": torch.tensor(5), "iou.total": torch.tensor(0.5)}
    },
    "beside a part of another": lambda weights: {
        "model": {**prefixed(weights, "model."), "ema.image_encoder.x": torch.ones(1)}
    },
    "tutorial": lambda weights: {"epoch": 3, "model_state_dict": weights, "loss": 0.5},
    "beside a number": lambda weights: {**weights, "epoch": 3},
    "gamma": as_kijai,
    "named": lambda weights: {"model": "sam2", "state_dict": weights},
    "parameters": lambda weights: {
        name: torch.nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_wrapped_in_any_way_are_the_same_weights(tmp_path, weights, form):
    torch.save(FORMS[form](weights), tmp_path / "other.pth")
    assert_same_weights(tmp_path / "other.pth", weights)


@pytest.mark.parametrize("form", ["bare", "ddp"])
def test_files_from_before_torch_1_6_are_read(tmp_path, weights, form):
    path = tmp_path / "old.pth"
    torch.save(FORMS[form](weights), path, _use_new_zipfile_serialization=False)
    assert_same_weights(path, weights)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_safetensors_file_is_read_whatever_its_suffix(tmp_path, weights, name, prefix):
    save_file(prefixed(weights, prefix), tmp_path / name, metadata={"format": "pt"})
    assert_same_weights(tmp_path / name, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision_becomes_float32_of_the_same_values(tmp_path, weights, dtype, suffix):
    halved = {name: weight.to(dtype) for name, weight in weights.items()}
    path = tmp_path / f"half{suffix}"
    save_file(halved, path) if suffix == ".safetensors" else torch.save(halved, path)
    assert_same_weights(path, {name: weight.float() for name, weight in halved.items()})


def test_plain_values_beside_the_weights_are_kept(tmp_path, weights):
    for key in ("model", "state_dict"):
        torch.save({key: weights, "epoch": 7, "settings": {"lr": 0.5}}, tmp_path / "other.pt")
        facts = assert_same_weights(tmp_path / "other.pt", weights)
        assert facts == {"epoch": 7, "settings": {"lr": 0.5}, "model_name": "mini"}


def test_a_script_takes_foreign_weights(run_script, tmp_path, weights):
    write_data(tmp_path / "data", train=1, val=1)
    torch.save(prefixed(weights, "module."), tmp_path / "ddp.pt")
    options = ("--image", "data/images/train/pair_000.jpg", "--point", "60,40", "--device", "cpu")
    outcome = run_script(test_my_image.main, *options, "--checkpoint", "ddp.pt")
    assert outcome.status == 0, outcome.err


# Names of transformers


def of_images(weights: dict) -> dict:
    return {name: weight for name, weight in weights.items() if is_for_images(name)}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_export_for_transformers_is_loaded_with_the_same_bits(tmp_path, weights, prefix, capsys):
    theirs = prefixed(transformers_weights(weights), prefix)
    theirs[f"{prefix}memory_encoder.projection.weight"] = torch.ones(1)  # of Sam2VideoModel
    if prefix:  # tied weights may be saved once
        del theirs[f"{prefix}prompt_encoder.shared_embedding.positional_embedding"]
    save_file(theirs, tmp_path / "hf.safetensors")
    loaded = load_predictor(None, tmp_path / "hf.safetensors", CPU)[0].model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in of_images(weights).items())
    assert not any(loaded[name].any() for name in weights.keys() - of_images(weights).keys())
    assert "gives its weights for images alone" in capsys.readouterr().out


@pytest.mark.parametrize("dropped", ["vision_encoder.neck.convs.0.bias", "no_memory_embedding"])
def test_an_export_for_transformers_that_lacks_a_weight_is_refused(tmp_path, weights, dropped):
    theirs = transformers_weights(weights)
    del theirs[dropped]
    save_file(theirs, tmp_path / "hf.safetensors")
    assert "weights missing" in error_of(tmp_path / "hf.safetensors")


# What is still refused


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_predictor("mini", path, CPU)
    assert len(str(caught.value).splitlines()) == 1 and "; " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("strange", "part"),
    [
        ("image_encoder.trunk.blocks.0.attn.qkv.lora_A", "0 weights missing, 1 unknown"),
        ("sam_mask_decoder.hf_token.weight", "such as sam_mask_decoder.hf_token.weight"),
        ("memory_encoder.gate.weight", "1 unknown"),
    ],
)
def test_a_model_with_more_than_sam2_has_in_its_parts_is_refused(tmp_path, weights, strange, part):
    torch.save({"model": {**weights, strange: torch.ones(1)}}, tmp_path / "other.pt")
    assert part in error_of(tmp_path / "other.pt")


def test_weights_of_two_models_in_one_file_are_refused(tmp_path, weights):
    both = {**prefixed(weights, "model."), **prefixed(weights, "model.ema.")}
    torch.save({"state_dict": both}, tmp_path / "both.pt")
    assert "holds 2 models (with the prefixes 'model.', 'model.ema.')" in error_of(
        tmp_path / "both.pt"
    )


def test_a_file_of_sam_2_0_and_another_model_are_called_what_they_are(tmp_path, weights):
    new = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
    torch.save({n: w for n, w in weights.items() if n not in new}, tmp_path / "2.0.pt")
    assert "3 weights missing" in (error := error_of(tmp_path / "2.0.pt"))
    assert error.endswith("it is one of SAM 2.0; use one of SAM 2.1")
    torch.save({**weights, "no_obj_ptr": torch.ones(1, 5)}, tmp_path / "shape.pt")
    assert error_of(tmp_path / "shape.pt").endswith("some of another shape); use another file")
    torch.save({"conv1.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "resnet.pt")
    assert "is not a SAM 2.1 checkpoint" in error_of(tmp_path / "resnet.pt")


def test_objects_beside_the_weights_are_named_and_not_built(tmp_path, weights):
    torch.save({"state_dict": weights, "hyper_parameters": Box()}, tmp_path / "last.ckpt")
    error = error_of(tmp_path / "last.ckpt")
    assert "holds objects beside the weights" in error and ".Box" in error
    assert not Path("code_was_run").exists()


class Box:
    """What a Lightning file may hold beside the weights; building it leaves a trace."""

    def __setstate__(self, state):
        Path("code_was_run").touch()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_foreign_weights_that_lack_one_or_are_not_finite_are_refused(tmp_path, weights, prefix):
    fewer = dict(list(prefixed(weights, prefix).items())[:-1])
    torch.save(fewer, tmp_path / "fewer.pt")
    assert "1 weights missing, 0 unknown" in error_of(tmp_path / "fewer.pt")
    name = f"{prefix}sam_mask_decoder.iou_token.weight"
    save_file({**fewer, name: fewer[name] * float("nan")}, tmp_path / "nan.safetensors")
    assert "not finite" in error_of(tmp_path / "nan.safetensors")


def test_a_damaged_safetensors_file_is_refused(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    whole = path.read_bytes()
    for content in (
        whole[:-1],
        whole[:1000],
        whole[:9],
        whole[:8] + b"{" + b"\xff" * 500 + whole[509:],
        (2**63).to_bytes(8, "little") + whole[8:],
        (2).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(content)
        assert "is not a" in error_of(path)


def test_numbers_and_whole_number_weights_are_no_state_dict(tmp_path):
    for contents in ({}, {"epoch": 3}, {"state_dict": {"a": 1}}, {"state_dict": None}, [1], 5):
        torch.save(contents, tmp_path / "other.pt")
        assert "checkpoint" in error_of(tmp_path / "other.pt")
    save_file({"a": torch.ones(3, dtype=torch.int64)}, tmp_path / "other.safetensors")
    assert 'no "model" weights' in error_of(tmp_path / "other.safetensors")


# Whole models


class Wrapper(torch.nn.Module):
    """A model as DDP wraps one; building it again from a file leaves a trace."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __setstate__(self, state):
        Path("code_was_run").touch()
        super().__setstate__(state)


WHOLE = {
    "model": lambda model: model,
    "wrapped": Wrapper,
    "in a dict": lambda model: {"epoch": 3, "model": model},
    "beside weights": lambda model: {"model": model.state_dict(), "ema": model},
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "before torch 1.6", "protocol 4"],
)
def test_a_whole_model_is_told_and_its_code_not_run(
    tmp_path, monkeypatch, predictor, form, options
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "whole.pt"
    torch.save(WHOLE[form](predictor.model), path, **options)
    error = error_of(path)
    assert "is a whole pickled model, which is not loaded because that would run code" in error
    assert error.endswith('torch.save({"model": model.state_dict()}, FILE)')
    assert not Path("code_was_run").exists()


def test_what_the_error_of_a_whole_model_says_to_do_works(tmp_path, predictor, weights):
    torch.save({"model": copy.deepcopy(predictor.model).state_dict()}, tmp_path / "saved.pt")
    assert_same_weights(tmp_path / "saved.pt", weights)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_and_a_merely_pickled_model_are_told_too(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps(model))
    for name in ("scripted.pt", "pickled.pt"):
        assert "is a whole pickled model" in error_of(tmp_path / name)


def test_a_damaged_whole_model_is_a_damaged_file(tmp_path, predictor):
    torch.save(predictor.model, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (whole[:-1000], whole[: len(whole) // 2], whole[:100]):
        (tmp_path / "whole.pt").write_bytes(content)
        assert "is not a readable checkpoint" in error_of(tmp_path / "whole.pt")


def test_the_search_for_a_models_classes_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_OPCODES", 50)
    content = b"\x80\x02" + b"N0" * 100 + b"ctorch.nn.modules.linear\nLinear\n."
    (tmp_path / "long.pt").write_bytes(content)
    assert "is not a readable checkpoint" in error_of(tmp_path / "long.pt")


# A run's own state


def test_the_state_of_a_run_is_resumed_and_nowhere_else_taken_for_a_model(
    run_script, tmp_path, random_mini
):
    write_data(tmp_path / "data", train=2, val=1)
    options = ("--model", "mini", "--checkpoint", random_mini, "--device", "cpu")
    train = train_sam2_proper.main
    assert run_script(train, *options, "--epochs", 1).status == 0
    state = Path("output/train_state.pt")
    assert load_checkpoint(state).keys() >= {"model", "optimizer", "scaler", "log", "settings"}

    best = Path("output/sam2_best.pt")
    assert error_of(state) == f"{state} is the training state for --resume; use {best}"
    assert_same_weights(best, torch.load(best, weights_only=True)["model"])
    outcome = run_script(train, *options, "--epochs", 1, "--resume")
    assert outcome.status == 0 and "all 1 epochs are done" in outcome.out


def test_what_this_project_saves_loads_as_saved(tmp_path):
    model = build_predictor("mini", CPU).model
    save_checkpoint(tmp_path / "own.pt", model, epoch=2)
    assert assert_same_weights(tmp_path / "own.pt", model.state_dict())["epoch"] == 2


# Files of this project


def test_mini_is_saved_for_computers_without_a_gpu_and_known_by_its_earlier_hash(tmp_path):
    saved = torch.load(MINI, weights_only=True)  # no map_location
    assert {weight.device.type for weight in saved["model"].values()} == {"cpu"}
    for earlier, now in RESAVED.items():
        settings = {"checkpoint_sha256": earlier}
        torch.save({"model": saved["model"], "settings": settings}, tmp_path / "best.pt")
        facts = load_checkpoint(tmp_path / "best.pt")
        assert facts["settings"]["checkpoint_sha256"] == now == content_sha256(MINI)


def test_a_folder_stands_for_the_best_model_in_it(tmp_path):
    for folder, name in (("run", "sam2_best.pt"), ("hf", "model.safetensors")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
        assert checkpoint_path(str(tmp_path / folder)) == tmp_path / folder / name
    assert checkpoint_path(str(tmp_path / "absent.pt")) == tmp_path / "absent.pt"
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path, str(Path("run/sam2_best.pt"))), (tmp_path / "empty", "a file")):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(says)):
            checkpoint_path(str(folder))
