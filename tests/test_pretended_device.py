"""The scripts run on CUDA and on MPS, as far as that shows without one; see pretended_device.py."""

from unittest.mock import Mock

from sam2_utils import copy_to

import pytest
import torch
from conftest import CPU, draw_pair, write_data
from pretended_device import device_of, pretend, tensors_in

import compare_models
import test_my_image
import train_sam2_proper
from finetuning.model import loading
from finetuning.model.models import build_predictor
from finetuning.segmentation.predicting import Features, encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt
from finetuning.training_data import prompt_sampling

PLATFORMS = [("cuda", "bfloat16"), ("cuda", "float16"), ("mps", "float32")]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a data folder; each step of a training on it has clicks."""
    monkeypatch.setattr(prompt_sampling, "CLICK_SHARE", 1.0)
    return write_data(tmp_path / "data", train=2, val=1)


@pytest.mark.parametrize(("device", "precision"), PLATFORMS)
def test_training_comparison_and_inference_run_on_a_gpu(
    run_script, random_mini, data, monkeypatch, device, precision
):
    pytest.importorskip("peft")
    machine = ("--device", device, "--precision", precision)
    train = (
        train_sam2_proper.main, "--model", "mini", "--checkpoint", random_mini, *machine,
        "--batch-size", 2,
    )  # fmt: skip
    image = data / "images/val/pair_002.jpg"
    saved_from = set()
    save = torch.save

    def record(checkpoint, path):
        saved_from.update(map(device_of, tensors_in(checkpoint)))
        save(checkpoint, path)

    commands = [
        (*train, "--epochs", 1),
        (*train, "--epochs", 2, "--resume", "--cache-in", "disk"),
        (*train, "--epochs", 1, "--no-cache", "--output", "no-cache"),
        (*train, "--epochs", 1, "--train-encoder", "lora", "--output", "lora"),
        (compare_models.main, *machine, "--clicks", 2, "--figures", 1),
        (test_my_image.main, "--device", device, "--image", image, "--point", "60,40"),
    ]
    if precision == "float16":
        del commands[2:]  # what is its own is how it learns
    monkeypatch.setattr(torch, "save", record)
    with pretend(device):
        for main, *options in commands:
            outcome = run_script(main, *options)
            assert outcome.status == 0, outcome.err
            if main is train_sam2_proper.main:
                assert f"on {device} in {precision}" in outcome.out
    assert torch.load("output/train_state.pt", weights_only=True)["log"][-1]["epoch"] == 2
    assert saved_from == {CPU}


def test_a_model_for_the_cpu_puts_nothing_on_the_gpu():
    with pretend("cuda"):
        model = build_predictor("mini", CPU).model
        held = [*model.state_dict().values()]
        for module in model.modules():
            held += getattr(module, "cache", {}).values()  # position encodings
            held += [value for value in vars(module).values() if torch.is_tensor(value)]
        assert {device_of(tensor) for tensor in held} == {CPU}
        on_gpu = build_predictor("mini", torch.device("cuda")).model
        assert {tensor.device.type for tensor in on_gpu.state_dict().values()} == {"cuda"}


def test_copies_wait_unless_they_go_from_pinned_memory_to_cuda():
    for kind, is_pinned, expected in (
        ("cuda", True, True), ("cuda", False, False), ("mps", True, False), ("cpu", True, False),
    ):  # fmt: skip
        tensor = Mock()
        tensor.is_pinned.return_value = is_pinned
        copy_to(torch.device(kind), tensor)
        tensor.to.assert_called_once_with(torch.device(kind), non_blocking=expected)


# What must fail


def faults(predictor, features):
    """Return the mistakes that the pretended device must find, with what it says."""
    size, point = (96, 128), make_prompt([(60, 40)])
    labels = torch.ones(1, 1, dtype=torch.int32)
    encoder, device = predictor.model.sam_prompt_encoder, predictor.device

    def embed(coords):
        return encoder(points=(coords, labels.to(device)), boxes=None, masks=None)

    on_cpu = torch.zeros(1, 1, 2)

    def drop_cpu():
        predict_masks(predictor, features, [point], [size]).iou_scores.detach().numpy()

    def do_not_wait():
        features.image_embed.to("cpu", non_blocking=True)

    return (
        (drop_cpu, TypeError, "to numpy"),
        (lambda: embed(on_cpu), RuntimeError, "on the same device"),
        (do_not_wait, AssertionError, "freed memory"),
    )


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_pretended_device_finds_mistakes(kind):
    device = torch.device(kind)
    with pretend(kind):
        predictor = build_predictor("mini", device)
        image = draw_pair(0)[0]
        features = encode_images(predictor, [image])
        assert features.image_embed.device.type == kind
        for act, error, words in faults(predictor, features):
            with pytest.raises(error, match=words):
                act()
        with pytest.raises(AssertionError, match="there is no"):
            torch.zeros(1).to("mps" if kind == "cuda" else "cuda")
    source = torch.zeros(3, dtype=torch.float64)
    with pretend("mps"):
        with pytest.raises(TypeError, match="float64"):
            source.to("mps")
        with pytest.raises(AssertionError, match="freed memory"):
            source.to("mps", torch.float32, non_blocking=True)


# Whether MPS can be trusted


def wrong_features(predictor, images):
    """Return zeros on MPS, as some systems do."""
    features = encode_images(predictor, images)
    if predictor.device.type != "mps":
        return features
    return Features(0 * features.image_embed, [0 * level for level in features.high_res_feats])


def test_an_mps_that_computes_as_the_cpu_does_is_used(random_mini, capsys):
    with pretend("mps"):
        predictor = build_predictor("mini", torch.device("mps"))
        differences = loading.differences_from_cpu(predictor)
        assert list(differences) == ["features", "mask logits", "gradients"]
        assert max(differences.values()) < 1e-5
        assert loading.trusted_device(predictor, torch.device("mps"), False).type == "mps"
        assert all(weight.grad is None for weight in predictor.model.parameters())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("insists", [False, True])
def test_an_mps_that_computes_wrongly_is_left_for_the_cpu_unless_insisted_on(
    run_script, random_mini, data, monkeypatch, insists
):
    monkeypatch.setattr(loading, "encode_images", wrong_features)
    options = ("--model", "mini", "--checkpoint", random_mini, "--epochs", 1)
    machine = ("--precision", "float32", *(("--device", "mps") if insists else ()))
    image = data / "images/val/pair_002.jpg"
    with pretend("mps"):
        for main, *more in (
            (train_sam2_proper.main, *options),
            (compare_models.main, "--figures", 0),
            (test_my_image.main, "--image", image, "--point", "60,40"),
        ):
            outcome = run_script(main, *more, *machine)
            assert outcome.status == 0, outcome.err
            assert "MPS computes SAM 2 wrongly" in outcome.out and "features 100%" in outcome.out
            assert ("because of --device mps" in outcome.out) == insists
            assert ("using the CPU instead" in outcome.out) == (not insists)
            if main is train_sam2_proper.main:
                assert f"on {'mps' if insists else 'cpu'} in float32" in outcome.out


def test_wrong_gradients_alone_are_found(monkeypatch):
    grad = torch.autograd.grad

    def half(loss, weights, **options):
        found = grad(loss, weights, **options)
        scale = 0.5 if weights[0].device.type == "mps" else 1.0
        return [gradient if gradient is None else scale * gradient for gradient in found]

    monkeypatch.setattr(torch.autograd, "grad", half)
    with pretend("mps"):
        predictor = build_predictor("mini", torch.device("mps"))
        differences = loading.differences_from_cpu(predictor)
    assert max(differences["features"], differences["mask logits"]) < 1e-5
    assert differences["gradients"] == pytest.approx(0.5)
