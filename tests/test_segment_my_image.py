"""One image is segmented by coordinates, and nothing is overwritten."""

import re
import shutil
from pathlib import Path

from sam2_utils import autocast, select_precision

import numpy as np
import pytest
from conftest import CPU, draw_pair

from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import encode_images, segment_with_logits
from finetuning.segmentation.prompts import make_prompt
from test_my_image import main


@pytest.fixture
def image_path(tmp_path, random_mini) -> Path:
    """Write an image, and random weights in the place of the fine-tuned ones."""
    (tmp_path / "output").mkdir()
    shutil.copy(random_mini, tmp_path / "output" / "sam2_best.pt")
    write_image(tmp_path / "내 사진.jpg", draw_pair(0)[0])
    return Path("내 사진.jpg")


def expected_mask(random_mini, image, **prompt) -> np.ndarray:
    predictor, _ = load_predictor("mini", random_mini, CPU)
    with autocast(CPU, select_precision("auto", CPU)):
        features = encode_images(predictor, [image])
        return segment_with_logits(predictor, features, make_prompt(**prompt), image.shape[:2])[0]


def test_points_and_a_box_give_an_overlay_a_mask_and_figures(run_script, image_path, random_mini):
    outcome = run_script(
        main, "--image", image_path, "--point", "60,40", "--point", "61.5, 42",
        "--negative-point", "3,3", "--box", "20,10,100,80",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    image = read_image(image_path)
    mask = read_mask(Path("output/my_results/내 사진_001_mask.png"))
    overlay = read_image(Path("output/my_results/내 사진_001_overlay.png"))
    prompt = {
        "foreground": [(60, 40), (61.5, 42)], "background": [(3, 3)], "box": (20, 10, 100, 80),
    }  # fmt: skip
    assert np.array_equal(mask, expected_mask(random_mini, image, **prompt))
    assert overlay.shape == image.shape and not np.array_equal(overlay, image)
    assert f"{mask.sum()} pixels" in outcome.out
    assert re.search(r"score: +0\.\d{3}", outcome.out)
    for name in ("내 사진_001_mask.png", "내 사진_001_overlay.png"):
        assert name in outcome.out


def test_a_second_run_does_not_overwrite_the_first(run_script, image_path):
    results = Path("output/my_results")
    run_script(main, "--image", image_path, "--point", "60,40")
    first = {path.name: path.read_bytes() for path in results.iterdir()}
    run_script(main, "--image", image_path, "--point", "5,5")
    assert len(list(results.iterdir())) == 4
    (results / "내 사진_001_mask.png").unlink()
    first.pop("내 사진_001_mask.png")
    run_script(main, "--image", image_path, "--box", "0,0,128,96")  # to the very edge
    assert len(list(results.iterdir())) == 5
    assert all((results / name).read_bytes() == content for name, content in first.items())


def test_without_a_finetuned_file_the_message_says_to_train_or_use_original(
    run_script, image_path, random_mini
):
    Path("output/sam2_best.pt").unlink()
    outcome = run_script(main, "--image", image_path, "--point", "5,5")
    assert outcome.status == 2
    assert "python train_sam2_proper.py" in outcome.err and "--original" in outcome.err
    Path("checkpoints").mkdir()
    shutil.copy(random_mini, "checkpoints/sam2_mini.pt")
    options = ("--original", "--model", "mini")
    outcome = run_script(main, "--image", image_path, "--point", "5,5", *options)
    assert outcome.status == 0 and "sam2_mini.pt" in outcome.out


def test_mistakes_end_with_one_clear_line(run_script, image_path):
    Path("broken.png").write_bytes(b"not an image")
    for options, message in (
        (("--point", "5"), '"5" is not like "320,200"'),
        (("--point", "a,b"), "320,200"),
        (("--point", "1,2,3"), "320,200"),
        (("--point", "nan,3"), "320,200"),
        (("--point", "500,10"), "500,10 lies outside the image, which is 128 pixels wide and 96"),
        (("--point=-1,10",), "-1,10 lies outside the image"),
        (("--point", "128,0"), "x goes from 0 to 127"),
        (("--negative-point", "0,96"), "outside"),
        (("--box", "0,0,129,96"), "outside"),
        (("--box", "1,2,3"), "40,30,600,460"),
        (("--box", "50,50,20,80"), "swapped corners"),
        (("--box", "50,50,50,80"), "empty"),
        (("--box", "50,50,90,180"), "outside"),
        (("--point", "5,5", "--image", "absent.jpg"), "no such file: absent.jpg"),
        (("--point", "5,5", "--image", "broken.png"), "not a readable image"),
        (("--point", "5,5", "--image", "output"), "for a folder, use --prompts FILE.csv"),
        (("--point", "5,5", "--prompts", "a.csv"), "choose one of them"),
        (("--point", "5,5", "--auto", "whole"), "choose one of them"),
        (("--prompts", "a.csv"), "are for a folder of images"),
        (("--point", "5,5", "--overwrite"), "are for a folder of images"),
        (("--point", "5,5", "--save", "masks,pictures"), "masks,overlays,cutouts,coco"),
        (("--point", "5,5", "--precision", "float16", "--device", "cpu"), "float16 needs CUDA"),
        (("--point", "5,5", "--checkpoint", "absent.pt"), "no such checkpoint"),
        (("--point", "5,5", "--checkpoint", "a.pt", "--original"), "give one of them"),
        (("--point", "5,5", "--model", "small"), "use --model mini"),
        (("--point", "5,5", "--device", "tpu"), "unknown"),
    ):
        outcome = run_script(main, "--image", image_path, *options)
        assert outcome.status == 2, options
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert message in outcome.err, outcome.err
    assert not Path("output/my_results").exists()
