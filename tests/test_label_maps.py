"""Label maps are read exactly, whatever their type and palette; soft edges are refused."""

from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from PIL import Image

from finetuning.basics.image_files import read_mask
from finetuning.sources.mask_values import MaskReader, MaskRule

SIZE = 128


def save(folder: Path, pixels: np.ndarray, name: str = "a.png") -> Path:
    folder.mkdir(exist_ok=True)
    pixels = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    (folder / name).write_bytes(cv2.imencode(Path(name).suffix, pixels)[1].tobytes())
    return folder / name


def read_all(paths: list[Path], **rule) -> list[np.ndarray]:
    """Read the objects of a data set's masks, as download_dataset.py does."""
    reader = MaskReader(MaskRule(**rule, smallest_part=1))
    masks = [mask.full() for path in paths for mask in reader.read(path, path)]
    reader.check_values()
    reader.check_edges()
    return masks


def refusal(paths: list[Path], **rule) -> str:
    with pytest.raises(UserError) as error:
        read_all(paths, **rule)
    assert str(error.value).isprintable()
    return str(error.value)


def discs(*values: int, radius: int = 11, size: int = SIZE) -> np.ndarray:
    """Draw a disc of each value; neighbours touch."""
    labels, step = np.zeros((size, size), np.uint8), 2 * radius
    for number, value in enumerate(values):
        row, column = divmod(number, size // step)
        center = column * step + radius, row * step + radius
        cv2.circle(labels, center, radius, value, -1)
    return labels


def resized(labels: np.ndarray, factor: float, how: int = cv2.INTER_LINEAR) -> np.ndarray:
    return cv2.resize(labels, None, fx=factor, fy=factor, interpolation=how)


def antialiased(*colors: tuple[int, int, int]) -> np.ndarray:
    canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
    for number, color in enumerate(colors):
        cv2.circle(canvas, (25 + 40 * number, 60), 18, color, -1, cv2.LINE_AA)
    return canvas


# Soft edges

SOFT = {
    "enlarged": resized(discs(1, 2, 7), 2),
    "enlarged much": resized(discs(1, 2, 7), 6),
    "with a cubic spline": resized(discs(1, 2, 7), 2, cv2.INTER_CUBIC),
    "made smaller": resized(discs(3, 8, 15, 20), 0.5, cv2.INTER_AREA),
    "no value is new": resized(discs(1, 2, 3, 3, 2, 3), 2),
    "many instances": resized(discs(*range(1, 26)), 1.5),
    "colours": antialiased((255, 0, 0), (0, 255, 0), (0, 0, 255)),
    "black and white": antialiased((255, 255, 255)),
}


@pytest.mark.parametrize("kind", SOFT)
def test_rings_between_areas_do_not_become_objects(tmp_path, kind):
    paths = [save(tmp_path, SOFT[kind], f"{number}.png") for number in range(2)]
    error = refusal(paths, each_value=True)
    assert error.startswith("2 of 2 masks have soft edges") and "nearest neighbour" in error


def test_soft_edges_are_the_reason_that_is_given_without_options_too(tmp_path):
    error = refusal([save(tmp_path, SOFT["enlarged"])])
    assert "a.png has areas of 1; 2; 7 and soft edges" in error
    # The ring of a class around another one would belong to the class
    assert "soft edges" in refusal([save(tmp_path, SOFT["enlarged"])], value=(2,))
    (mask,) = read_all([save(tmp_path, SOFT["enlarged"])], value=(7,))
    assert np.array_equal(mask, SOFT["enlarged"] == 7)


def dense_cells(side: int) -> np.ndarray:
    """Number squares in reading order, without background between them."""
    row = np.arange(SIZE) // side
    return (row[:, None] * (SIZE // side + 1) + row + 1).astype(np.uint16)


def tissue(count: int) -> np.ndarray:
    """Number the cells of a Voronoi diagram in reading order."""
    points = np.random.default_rng(0).integers(0, SIZE, (count, 2))
    points = points[np.lexsort((points[:, 1], points[:, 0] // 8))]
    grid = np.stack(np.mgrid[:SIZE, :SIZE], axis=-1)
    distances = ((grid[:, :, None] - points) ** 2).sum(axis=-1)
    return (distances.argmin(axis=-1) + 1).astype(np.uint16)


def vessels(width: int, ground: np.ndarray) -> np.ndarray:
    labels, rng = ground.copy(), np.random.default_rng(1)
    for value in range(1, 25):
        points = np.cumsum(rng.normal(0, 12, (10, 2)), axis=0) + rng.uniform(0, SIZE, 2)
        cv2.polylines(labels, [points.astype(np.int32)], False, value, width)
    return labels


def with_borders(interior: int, border: int) -> np.ndarray:
    inside = discs(*[1] * 25)
    labels = np.where(inside, border, 0).astype(np.uint8)
    labels[cv2.erode(inside, np.ones((3, 3), np.uint8)) > 0] = interior
    return labels


DRAWN = {
    "touching discs": discs(*range(1, 26)),
    "tiny cells": dense_cells(3),
    "cells of two pixels": dense_cells(2),
    "tissue": tissue(300),
    "thin vessels": vessels(1, np.zeros((SIZE, SIZE), np.uint8)),
    "vessels across cells": vessels(2, discs(*range(1, 26))),
    "border below the interior": with_borders(2, 1),
    "border above the interior": with_borders(1, 2),
    "void around objects": with_borders(15, 255),
    "made smaller with nearest neighbour": resized(discs(*range(1, 26)), 0.4, cv2.INTER_NEAREST),
    "enlarged with nearest neighbour": resized(discs(1, 2, 7), 2, cv2.INTER_NEAREST),
    "colours": np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)], np.uint8)[
        discs(*[1, 2, 3] * 8)
    ],
}


@pytest.mark.parametrize("kind", DRAWN)
def test_thin_tiny_and_touching_objects_are_no_soft_edges(tmp_path, kind):
    pixels = DRAWN[kind]
    values = np.unique(pixels.reshape(pixels.shape[0] * pixels.shape[1], -1), axis=0)
    objects = read_all([save(tmp_path, pixels)], each_value=True)
    assert len(objects) == values.any(axis=1).sum()


def test_a_few_files_that_look_soft_are_named_and_the_others_go_on(tmp_path, capsys):
    paths = [save(tmp_path, discs(1, 2, 7), f"{number}.png") for number in range(20)]
    paths.append(save(tmp_path, SOFT["enlarged"], "soft.png"))
    assert len(read_all(paths, each_value=True)) > 60
    assert "warning: 1 of 21 masks have soft edges" in capsys.readouterr().out


# Palettes

COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]


def save_palette(path: Path, indices: np.ndarray, colors: list[tuple[int, ...]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(indices)
    image.putpalette([channel for color in colors for channel in color])
    image.save(path)
    return path


def voc_palette() -> list[tuple[int, ...]]:
    return [*COLORS, *[(i, 255 - i, 7) for i in range(3, 255)], (224, 224, 192)]


def voc_labels() -> np.ndarray:
    labels = discs(1, 2)
    labels[:3] = 255
    return labels


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif"])
def test_a_number_means_an_index_of_the_palette(tmp_path, suffix):
    labels = voc_labels()
    if suffix == ".gif":  # its writer renumbers the indices unless all occur
        labels[-1] = np.arange(128)
        labels[-2] = np.arange(128, 256)
    path = save_palette(tmp_path / f"a{suffix}", labels, voc_palette())
    for value in ((1,), (128, 0, 0)):
        (mask,) = read_all([path], value=value)
        assert np.array_equal(mask, labels == 1)
    (void,) = read_all([path], value=(255,))
    assert np.array_equal(void, labels == 255)
    if suffix != ".gif":
        objects = read_all([path], each_value=True, ignored=(255,))
        assert [np.unique(labels[mask]).tolist() for mask in objects] == [[1], [2]]
        assert "3 values or colours besides black (a label map, or classes?): 1; 2; 255" in refusal(
            [path]
        )


def test_one_colour_of_a_palette_is_a_binary_mask(tmp_path):
    path = save_palette(tmp_path / "a.png", discs(2), COLORS)
    other = save_palette(tmp_path / "b.png", discs(1), COLORS)
    (mask,) = read_all([path])
    assert np.array_equal(mask, discs(2) == 2)
    assert "b.png has 128,0,0 besides black" in refusal([path, other])


def test_a_palette_of_black_and_white_is_a_black_and_white_mask(tmp_path):
    for colors, white in (([(0,) * 3, (255,) * 3], 1), ([(255,) * 3, (0,) * 3], 0)):
        path = save_palette(tmp_path / "a.png", discs(1), colors)
        for rule in ({}, {"value": (255,)}):
            (mask,) = read_all([path], **rule)
            assert np.array_equal(mask, discs(1) == white)
    path = save_palette(tmp_path / "a.png", discs(1), [(0,) * 3, (255,) * 3])
    assert np.array_equal(read_all([path], value=(1,))[0], discs(1) == 1)


def test_black_is_the_background_where_a_program_has_sorted_the_palette(tmp_path):
    path = save_palette(tmp_path / "a.png", discs(1, 2), [(0, 0, 255), (255, 0, 0), (0, 0, 0)])
    assert len(read_all([path], each_value=True)) == 2  # blue and red


def test_an_index_without_a_colour_is_a_value_too(tmp_path):
    path = save_palette(tmp_path / "a.bmp", voc_labels(), COLORS)
    assert len(read_all([path], each_value=True)) == 3
    assert len(read_all([path], each_value=True, ignored=(255,))) == 2


# Values


@pytest.mark.parametrize("rule", [{"value": (9,)}, {"ignored": (9,), "each_value": True}])
def test_a_value_that_no_mask_has_is_refused_with_those_that_there_are(tmp_path, rule):
    paths = [save(tmp_path, discs(1, 2), "a.png"), save(tmp_path, discs(7), "b.png")]
    error = refusal(paths, **rule)
    assert "none of the 2 masks has the value of --" in error and "they have 1; 2; 7" in error
    assert read_all([*paths, save(tmp_path, discs(9), "c.png")], **rule)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    labels = discs(1, 2).astype(dtype) * 300
    path = save(tmp_path, labels, "a.tif")
    assert [mask.sum() for mask in read_all([path], each_value=True)] == [
        (labels == 300).sum(), (labels == 600).sum()
    ]  # fmt: skip
    assert "300; 600" in refusal([path])
    assert np.array_equal(read_all([path], value=(600,))[0], labels == 600)


@pytest.mark.parametrize("value", [0.5, -1, 70_000, np.nan])
def test_what_is_no_label_is_named(tmp_path, value):
    path = save(tmp_path, np.where(discs(1), value, 3).astype(np.float32), "a.tif")
    error = refusal([path], each_value=True)
    assert f"a.tif holds values like {value:g}; a label map holds whole numbers" in error


def test_a_photo_is_no_label_map(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert "a photo, or a mask that was once a JPEG" in refusal(
        [save(tmp_path, photo)], each_value=True
    )


# Black and white masks

AREAS = {"in the ground": (2, 2), "in the object": (60, 60), "at its edge": (60, 88)}


@pytest.mark.parametrize("where", AREAS)
@pytest.mark.parametrize("value", [60, 128, 200])
@pytest.mark.parametrize("is_soft", [False, True])
def test_a_small_area_of_a_third_value_is_refused(tmp_path, where, value, is_soft):
    line = cv2.LINE_AA if is_soft else cv2.LINE_8
    mask = cv2.circle(np.zeros((SIZE, SIZE), np.uint8), (62, 62), 28, 255, -1, line)
    assert read_mask(save(tmp_path, mask)).any()
    row, column = AREAS[where]
    mask[row : row + 4, column : column + 4] = value
    with pytest.raises(UserError, match="not black and white"):
        read_mask(save(tmp_path, mask))
    assert f"{value}" in refusal([tmp_path / "a.png"])


@pytest.mark.parametrize("blur", [3, 9, 21])
def test_smooth_edges_of_a_black_and_white_mask_are_cut_in_the_middle(tmp_path, blur):
    mask = cv2.circle(np.zeros((SIZE, SIZE), np.uint8), (62, 62), 28, 255, -1, cv2.LINE_AA)
    for soft in (cv2.GaussianBlur(mask, (blur, blur), 0), resized(mask, blur / 2)):
        (read,) = read_all([save(tmp_path, soft)])
        assert np.array_equal(read, soft > 127)
