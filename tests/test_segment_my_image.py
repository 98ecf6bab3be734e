"""One image is segmented by coordinates or by real mouse events, and nothing is overwritten."""

import re
import shutil
from pathlib import Path

from sam2_utils import autocast, select_precision

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import CPU, draw_pair
from matplotlib.backend_bases import CloseEvent, MouseEvent, NavigationToolbar2

from finetuning.image_files import read_image, read_mask, write_image
from finetuning.models import load_predictor
from finetuning.prompts import make_prompt
from finetuning.segmentation import encode_images, segment
from finetuning.window import ClickWindow
from test_my_image import main


@pytest.fixture
def image_path(tmp_path, random_mini) -> Path:
    """Write an image, and random weights where the fine-tuned ones are looked for."""
    (tmp_path / "output").mkdir()
    shutil.copy(random_mini, tmp_path / "output" / "sam2_best.pt")
    write_image(tmp_path / "내 사진.jpg", draw_pair(0)[0])
    return Path("내 사진.jpg")


def expected_mask(random_mini, image, **prompt) -> np.ndarray:
    predictor, _ = load_predictor("mini", random_mini, CPU)
    with autocast(CPU, select_precision("auto", CPU)):
        features = encode_images(predictor, [image])
        return segment(predictor, features, make_prompt(**prompt), image.shape[:2])[0]


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


def click(figure, button: int, x: float, y: float) -> None:
    """Press a mouse button at pixel (x,y) of the image that the figure shows."""
    axes = figure.axes[0]
    where = axes.transData.transform((x, y))
    canvas = figure.canvas
    canvas.callbacks.process(
        "button_press_event", MouseEvent("button_press_event", canvas, *where, button)
    )


def test_mouse_clicks_become_the_prompt_and_are_drawn_at_once(
    run_script, image_path, random_mini, monkeypatch
):
    shown = []

    def user(block):  # what a person does in the window
        figure = plt.gcf()
        axes = figure.axes[0]
        before = len(axes.lines)
        click(figure, 1, 60.3, 39.8)
        assert len(axes.lines) == before + 1
        click(figure, 3, 4, 5)
        assert len(axes.lines) == before + 2
        click(figure, 2, 10, 10)  # the middle button
        click(figure, 1, 500, 10)  # outside the image
        assert len(axes.lines) == before + 2
        figure.canvas.callbacks.process("close_event", CloseEvent("close_event", figure.canvas))
        plt.close(figure)
        shown.append(block)

    monkeypatch.setattr(plt, "show", user)
    plt.switch_backend("agg")
    monkeypatch.setattr(type(plt.figure().canvas), "required_interactive_framework", "test")
    plt.close("all")
    outcome = run_script(main, "--image", image_path)
    assert outcome.status == 0, outcome.err
    assert shown == [True]
    mask = read_mask(Path("output/my_results/내 사진_001_mask.png"))
    prompt = {"foreground": [(60, 40)], "background": [(4, 5)]}
    assert np.array_equal(mask, expected_mask(random_mini, read_image(image_path), **prompt))


def test_a_window_closed_without_a_click_says_so(run_script, image_path, monkeypatch):
    plt.switch_backend("agg")
    monkeypatch.setattr(type(plt.figure().canvas), "required_interactive_framework", "test")
    monkeypatch.setattr(plt, "show", lambda block: plt.close("all"))
    outcome = run_script(main, "--image", image_path)
    assert outcome.status == 2 and "nothing was clicked" in outcome.err


def test_clicks_beside_a_moved_image_are_not_points():
    plt.switch_backend("agg")
    figure = plt.figure()
    window = ClickWindow(figure, np.zeros((50, 50, 3), np.uint8))
    window.axes.set_xlim(-60, 40)
    click(figure, 1, -30, 25)
    click(figure, 3, -30, 25)
    click(figure, 1, 30, 25)
    assert window.foreground == [(30, 25)] and window.background == []


def test_clicks_while_zooming_are_not_points():
    plt.switch_backend("agg")
    figure = plt.figure()
    window = ClickWindow(figure, np.zeros((50, 50, 3), np.uint8))
    figure.canvas.toolbar = NavigationToolbar2(figure.canvas)
    figure.canvas.toolbar.zoom()
    click(figure, 1, 10, 10)
    assert window.foreground == []
    figure.canvas.toolbar.zoom()
    click(figure, 1, 10, 10)
    assert window.foreground == [(10, 10)]


def test_without_a_display_the_message_names_point(run_script, image_path):
    plt.switch_backend("agg")
    outcome = run_script(main, "--image", image_path)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and "--point" in outcome.err


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
        (("--box", "50,50,20,80"), "turned round"),
        (("--box", "50,50,50,80"), "empty"),
        (("--box", "50,50,90,180"), "outside"),
        (("--point", "5,5", "--image", "absent.jpg"), "no such file: absent.jpg"),
        (("--point", "5,5", "--image", "broken.png"), "not a readable image"),
        (("--point", "5,5", "--image", "output"), "no such file"),
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
