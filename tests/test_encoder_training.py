"""The image encoder learns, wholly or through adapters, and what is saved is plain SAM 2.1."""

import re
import sys
from pathlib import Path

from sam2_utils import autocast

import pytest
import torch
from conftest import CPU, draw_pair, write_data
from sam2.build_sam import build_sam2

import compare_models
import train_sam2_proper
from finetuning.basics import run_outputs
from finetuning.dataset.pairs import split_pairs
from finetuning.evaluation.measuring import Validation, mean_metrics, measure
from finetuning.evaluation.metrics import LOGGED
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import MODELS, load_predictor, make_predictor
from finetuning.model.trainable_encoder import (
    encode_with_gradients,
    let_encoder_learn,
    merged_state_dict,
)
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training.recipe import Recipe
from train_sam2_proper import main

KINDS = ("lora", "full")
# Stages of mini: blocks 0, 1-2, 3-5, 6. Adapters are in the last two.
ADAPTED = re.compile(r"image_encoder\.trunk\.blocks\.[3-6]\.attn\.(qkv|proj)\.weight")
DECODER = ("sam_prompt_encoder.", "sam_mask_decoder.")
IMAGES = [draw_pair(0)[0], draw_pair(1, (150, 90))[0]]
SIZES = [image.shape[:2] for image in IMAGES]
PROMPTS = [make_prompt([(40, 50)]), make_prompt([(60, 30)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with data, in which the runs of this file leave their output."""
    folder = tmp_path_factory.mktemp("encoder_training")
    write_data(folder / "data", train=2, val=1)
    return folder


@pytest.fixture(scope="module")
def options(folder, random_mini) -> list[str]:
    options = ["--model", "mini", "--checkpoint", random_mini, "--data", folder / "data"]
    options += ["--device", "cpu", "--precision", "float32", "--epochs", 2, "--lr", 1e-3]
    return [str(option) for option in options]


@pytest.fixture(scope="module", params=KINDS)
def whole(request, folder, options) -> Path:
    """Return the output of a run that nothing disturbed; its name says what learnt."""
    need(request.param)
    output = folder / request.param
    main([*options, "--train-encoder", request.param, "--output", str(output)])
    return output


@pytest.fixture
def predictor(random_mini):
    predictor, _ = load_predictor("mini", random_mini, CPU)
    predictor.model.requires_grad_(False)
    return predictor


def recipe_of(kind: str) -> Recipe:
    return Recipe(train_encoder=kind, lora_rank=4)


def need(kind: str) -> None:
    """Skip a test of adapters where peft is not installed."""
    if kind == "lora":
        pytest.importorskip("peft")


def weights_of(path: Path | str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def move_adapters(model: torch.nn.Module) -> None:
    """Give the adapters, which start from zero, an effect that cannot be overlooked."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def test_encoding_with_gradients_gives_the_features_of_encoding_without(predictor):
    predictor.model.image_encoder.requires_grad_(True)
    ours, theirs = encode_with_gradients(predictor, IMAGES), encode_images(predictor, IMAGES)
    maps = zip(
        (ours.image_embed, *ours.high_res_feats),
        (theirs.image_embed, *theirs.high_res_feats),
        strict=True,
    )
    for our_map, their_map in maps:
        assert our_map.requires_grad and not their_map.requires_grad
        assert torch.allclose(our_map, their_map, atol=1e-5)
    ours.image_embed.sum().backward()
    assert predictor.model.image_encoder.trunk.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_saved_file_is_plain_sam2_and_does_what_the_adapters_do(predictor, tmp_path):
    need("lora")
    model = predictor.model
    original_keys = list(model.state_dict())
    plain = encode_images(predictor, IMAGES)
    let_encoder_learn(model, "lora", 4)
    move_adapters(model)
    adapted = encode_images(predictor, IMAGES)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_checkpoint(tmp_path / "merged.pt", merged_state_dict(model))

    assert list(weights_of(tmp_path / "merged.pt")) == original_keys
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    spec = MODELS["mini"]
    loaded = make_predictor(
        build_sam2(
            spec.config,
            str(tmp_path / "merged.pt"),
            device="cpu",
            hydra_overrides_extra=list(spec.overrides),
        )
    )
    merged = encode_images(loaded, IMAGES)
    assert (adapted.image_embed - plain.image_embed).abs().max() > 0.01  # the adapters do something
    assert (adapted.image_embed - merged.image_embed).abs().max() < 1e-4
    answers = [
        predict_masks(of, features, PROMPTS, SIZES)
        for of, features in ((predictor, adapted), (loaded, merged))
    ]
    for ours, theirs in zip(*answers, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_only_what_is_meant_to_learn_changes_by_a_bit(whole, random_mini):
    original, trained = weights_of(random_mini), weights_of(whole / "sam2_final.pt")
    assert list(trained) == list(original)
    for name, weight in trained.items():
        moved = not torch.equal(weight, original[name])
        if name.startswith("image_encoder."):
            assert moved == (whole.name == "full" or bool(ADAPTED.fullmatch(name))), name
        else:
            assert not moved or name.startswith(DECODER), name
    assert not (whole / "cache").exists()


def test_a_resumed_run_ends_in_the_same_weights(whole, run_script, options, monkeypatch):
    train_one_epoch, calls = train_sam2_proper.train_one_epoch, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_one_epoch(*arguments)

    monkeypatch.setattr(train_sam2_proper, "train_one_epoch", interrupt)
    options = [*options, "--train-encoder", whole.name]
    outcome = run_script(main, *options)
    assert outcome.status == 130
    assert f"the image encoder learns too ({whole.name}, " in outcome.out
    outcome = run_script(main, *options, "--resume")
    assert outcome.status == 0 and "continuing after epoch 1" in outcome.out, outcome.err
    for name in ("sam2_best.pt", "sam2_final.pt"):
        ours, theirs = weights_of(Path("output") / name), weights_of(whole / name)
        assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_resuming_with_another_way_to_train_the_encoder_is_refused(whole, run_script, options):
    for changes, message in (
        (("--train-encoder", whole.name, "--encoder-lr", 1e-9), "--encoder-lr 0.00"),
        (("--train-encoder", "none"), f"--train-encoder {whole.name}, not none"),
    ):
        outcome = run_script(main, *options, "--output", whole, "--resume", *changes)
        assert outcome.status == 2 and message in outcome.err, outcome.err


def test_a_run_of_another_version_is_refused_in_one_line(whole, run_script, options):
    path = whole / run_outputs.STATE_FILE
    state = torch.load(path, weights_only=True)
    try:
        for name in ("train_encoder", "data_hash", "image_size"):
            settings = {key: value for key, value in state["settings"].items() if key != name}
            torch.save({**state, "settings": settings}, path)
            outcome = run_script(main, *options, "--output", whole, "--resume")
            assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
            assert f"does not say its {name}" in outcome.err
    finally:
        torch.save(state, path)


def gradients(predictor) -> dict[str, torch.Tensor]:
    """Return the encoder's gradients after a step's forward and backward pass."""
    features = encode_with_gradients(predictor, IMAGES)
    prediction = predict_masks(predictor, features, PROMPTS, SIZES)
    (prediction.mask_logits.sigmoid().mean() + prediction.iou_scores.mean()).backward()
    encoder = predictor.model.image_encoder
    return {
        name: weight.grad for name, weight in encoder.named_parameters() if weight.requires_grad
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, random_mini):
    need(kind)
    found = []
    for checkpointing in (False, True):
        predictor, _ = load_predictor("mini", random_mini, CPU)
        predictor.model.requires_grad_(False)
        torch.manual_seed(0)  # of the adapters
        let_encoder_learn(predictor.model, kind, 4, checkpointing)
        move_adapters(predictor.model)
        found.append(gradients(predictor))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], grad) for name, grad in found[0].items())
    assert any(grad.abs().sum() > 0 for grad in found[0].values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_validation_with_adapters_measures_the_model_that_is_saved(predictor, tmp_path, precision):
    need("lora")
    pairs = split_pairs(write_data(tmp_path, train=1, val=2), "val")
    let_encoder_learn(predictor.model, "lora", 4)
    move_adapters(predictor.model)
    before = {name: weight.clone() for name, weight in predictor.model.state_dict().items()}
    model = Model(predictor, FeatureSource(predictor, precision))
    with_adapters = mean_metrics(measure([model], pairs, metrics=LOGGED))["IoU"]
    found = Validation(pairs).measure(model)["val_iou"]
    for name, weight in predictor.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert mean_metrics(measure([model], pairs, metrics=LOGGED))["IoU"] == with_adapters

    save_checkpoint(tmp_path / "merged.pt", merged_state_dict(predictor.model))
    saved, _ = load_predictor("mini", tmp_path / "merged.pt", CPU)
    model = Model(saved, FeatureSource(saved, precision))
    assert found == mean_metrics(measure([model], pairs, metrics=LOGGED))["IoU"]


def test_stages_before_the_first_adapter_keep_no_graph(predictor):
    need("lora")
    weights = let_encoder_learn(predictor.model, "lora", 4, checkpointing=True)
    requires_grad, checkpointed = [], []
    for block in predictor.model.image_encoder.trunk.blocks:
        block.register_forward_hook(lambda *call: requires_grad.append(call[2].requires_grad))
        checkpointed.append("forward" in vars(block))
    encode_with_gradients(predictor, IMAGES)
    assert requires_grad == checkpointed == 3 * [False] + 4 * [True]
    assert len(weights) == 4 * 2 * 2  # blocks, layers of each, matrices of each
    assert not predictor.model.training


def test_adapters_stay_float32_under_bfloat16(predictor):
    need("lora")
    weights = let_encoder_learn(predictor.model, "lora", 4)
    move_adapters(predictor.model)
    with autocast(CPU, torch.bfloat16):
        found = gradients(predictor)
    for weight in weights:
        assert weight.dtype == weight.grad.dtype == torch.float32
    assert all(torch.isfinite(grad).all() for grad in found.values())


def test_two_encoders_are_compared_each_with_its_own_features(whole, run_script, folder):
    outcome = run_script(
        compare_models.main, "--finetuned", whole / "sam2_best.pt", "--data", folder / "data",
        "--device", "cpu", "--figures", 0,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    best_iou = torch.load(whole / "sam2_best.pt", weights_only=True)["val_iou"]
    assert re.search(rf"^  IoU +\S+ +{best_iou:.4f} ", outcome.out, re.MULTILINE)


def test_without_peft_one_line_says_how_to_get_it(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # makes its import fail
    outcome = run_script(main, "--model", "mini", "--train-encoder", "lora")
    assert outcome.status == 2
    assert outcome.err == "error: --train-encoder lora needs peft; pip install peft\n"
    assert not Path("output").exists()


def test_options_that_contradict_each_other_end_with_one_clear_line(run_script, monkeypatch):
    for options, message in (
        (("full", "--cache", "there"), "--cache does not work with --train-encoder"),
        (("full", "--compile", "on"), "--compile on is not for --train-encoder"),
        (("full", "--lora-rank", 4), "--lora-rank is for --train-encoder lora"),
        (("none", "--lora-rank", 4), "--lora-rank needs --train-encoder"),
        (("none", "--encoder-lr", 1e-5), "--encoder-lr needs --train-encoder"),
        (("lora", "--lora-rank", 0), "--lora-rank"),
    ):
        outcome = run_script(main, "--train-encoder", *options)
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert outcome.err.startswith("error: ") and message in outcome.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = run_script(main, "--train-encoder", "full")
    assert outcome.status == 2 and outcome.err.endswith("start it without torchrun\n")
