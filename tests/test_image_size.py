"""--image-size: kept in the model's file, and used by whatever loads it."""

import contextlib
import io
import shutil
from pathlib import Path

from sam2_utils import autocast, select_precision

import numpy as np
import pytest
from conftest import CPU, draw_pair, write_data

import compare_models
import test_my_image as segmenting
import train_sam2_proper
from finetuning.basics.image_files import read_mask, write_image
from finetuning.model.checkpoints import load_checkpoint, save_checkpoint
from finetuning.model.models import is_image_size, load_predictor
from finetuning.segmentation.predicting import encode_images, feature_shapes, segment_with_logits
from finetuning.segmentation.prompts import make_prompt


@pytest.fixture(scope="module")
def training(tmp_path_factory, random_mini) -> Path:
    """Fine-tune mini at 128 pixels; return the folder with data/ and output/."""
    folder, printed = tmp_path_factory.mktemp("training"), io.StringIO()
    write_data(folder / "data")
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        train_sam2_proper.main([*map(str, options(random_mini)), "--image-size", "128"])
    assert "mini at 128x128 pixels" in printed.getvalue()
    return folder


@pytest.fixture
def trained(training, tmp_path) -> Path:
    """Copy that run into the test's folder; return its model."""
    shutil.copytree(training, tmp_path, dirs_exist_ok=True)
    return tmp_path / "output/sam2_final.pt"


def options(checkpoint: Path) -> tuple[object, ...]:
    return ("--model", "mini", "--checkpoint", checkpoint, "--epochs", 1)


def test_the_size_is_that_of_the_training_wherever_the_file_is_loaded(trained, random_mini):
    assert load_checkpoint(trained)["settings"]["image_size"] == 128
    predictor, _ = load_predictor(None, trained, CPU)
    assert predictor.model.image_size == 128
    features = encode_images(predictor, [draw_pair(0)[0]])
    assert features.image_embed.shape[1:] == (128, 8, 8)
    assert [tuple(one.shape[2:]) for one in features.high_res_feats] == [(32, 32), (16, 16)]
    assert feature_shapes(predictor.model)[1][:2] == (32, 32)
    assert load_predictor(None, random_mini, CPU)[0].model.image_size == 256


def test_features_of_another_size_are_not_taken_for_these(run_script, trained, random_mini):
    before = set(Path("output/cache").iterdir())
    outcome = run_script(train_sam2_proper.main, *options(random_mini))
    assert outcome.status == 0, outcome.err
    after = set(Path("output/cache").glob("*.safetensors"))
    assert len(after) == 2 * len(before & after)
    sizes = sorted(path.stat().st_size for path in after)
    assert sizes[-1] > 3.5 * sizes[0]


def test_resuming_with_another_size_is_refused(run_script, trained, random_mini):
    outcome = run_script(train_sam2_proper.main, *options(random_mini), "--resume")
    assert outcome.status == 2 and "--image-size 128, not 256" in outcome.err


def test_both_are_compared_at_that_size_and_it_is_said(run_script, trained, random_mini):
    outcome = run_script(
        compare_models.main, "--finetuned", trained, "--original", random_mini, "--figures", 0
    )
    assert outcome.status == 0, outcome.err
    assert "both models see images resized to 128x128 pixels" in outcome.out
    page = Path("output/comparison/report.html").read_text(encoding="utf-8")
    assert "SAM 2.1 mini, 128x128" in page


def test_new_images_are_segmented_at_that_size(run_script, trained):
    image = draw_pair(9)[0]
    write_image(Path("new.png"), image)
    outcome = run_script(
        segmenting.main,
        "--image",
        "new.png",
        "--point",
        "60,40",
        "--checkpoint",
        trained,
        "--clean",
        "off",
    )
    assert outcome.status == 0, outcome.err
    predictor, _ = load_predictor(None, trained, CPU)
    with autocast(CPU, select_precision("auto", CPU)):
        features = encode_images(predictor, [image])
        mask, *_ = segment_with_logits(
            predictor, features, make_prompt([(60, 40)]), image.shape[:2]
        )
    assert np.array_equal(read_mask(Path("output/my_results/new_001_mask.png")), mask)


@pytest.mark.parametrize("size", ["100", "0", "-64", "4096", "512.0", "big"])
def test_sizes_that_the_encoder_cannot_take_are_refused(run_script, size):
    outcome = run_script(train_sam2_proper.main, "--image-size", size)
    assert outcome.status == 2 and "--image-size" in outcome.err.splitlines()[-1]


def test_an_odd_size_in_a_file_is_not_taken(tmp_path, random_mini):
    weights = load_checkpoint(random_mini)["model"]
    for odd in ("512", 100, True, -64, 10**9, [128]):
        assert not is_image_size(odd)
        save_checkpoint(tmp_path / "odd.pt", weights, settings={"image_size": odd})
        assert load_predictor(None, tmp_path / "odd.pt", CPU)[0].model.image_size == 256
