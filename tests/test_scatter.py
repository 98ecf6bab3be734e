"""The scatter chart shows every object where it is, and their mean."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from finetuning.basics.image_files import read_image
from finetuning.comparison.figures import SIZE_COLORS, draw_scatter, plot_scatter

IOUS = np.array([[0.5, 0.8], [0.0, 0.4], [0.9, 0.7], [1.0, 1.0]])
LABELS = ["small", "large", "small", "medium"]


def test_each_dot_is_at_its_ious_in_the_color_of_its_size():
    axes = Figure().subplots()
    plot_scatter(axes, IOUS, LABELS, "object")
    dots = axes.collections[0]
    drawn = {
        (*map(float, place), to_hex(color).upper())
        for place, color in zip(dots.get_offsets(), dots.get_facecolors(), strict=True)
    }
    expected = zip(IOUS.tolist(), LABELS, strict=True)
    assert drawn == {(*both, SIZE_COLORS[size]) for both, size in expected}


def test_the_mean_the_counts_and_the_legend_are_those_of_the_objects():
    axes = Figure().subplots()
    plot_scatter(axes, IOUS, LABELS, "object")
    handles, labels = axes.get_legend_handles_labels()
    of_label = dict(zip(labels, handles, strict=True))
    assert set(of_label) == {"small (2)", "medium (1)", "large (1)", "mean (0.6000, 0.7250)"}
    assert of_label["mean (0.6000, 0.7250)"].get_xydata()[0] == pytest.approx((0.6, 0.725))
    title = "4 objects: 2 above the diagonal (better), 1 on it, 1 below (worse)"
    assert axes.get_title() == title
    assert to_hex(of_label["large (1)"].get_facecolor()[0]).upper() == SIZE_COLORS["large"]


@pytest.mark.parametrize("count", [1, 5000])
def test_one_object_and_thousands_of_them_can_be_drawn(tmp_path, count):
    ious = np.random.default_rng(0).random((count, 2))
    draw_scatter(tmp_path / "scatter.png", ious, ["small"] * count, "image")
    height, width, _ = read_image(tmp_path / "scatter.png").shape
    assert height > 600 and width > 600
