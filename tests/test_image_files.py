"""Images and masks are read as they are meant, paired by name, and never half written."""

from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest

from finetuning.basics.files import atomic_write
from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.dataset.objects import read_pair
from finetuning.dataset.pairs import Pair, find_pairs, split_pairs


def write_raw(path: Path, array: np.ndarray, *parameters: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, array, list(parameters))[1].tobytes())
    return path


def with_exif_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Insert an EXIF segment that holds nothing but an orientation."""
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01"
    tiff += orientation.to_bytes(2, "big") + b"\x00\x00\x00\x00\x00\x00"
    segment = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]


def gradient_image() -> np.ndarray:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = (200, 30, 10)
    image[20:, 30:] = (10, 40, 220)
    return image


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
def test_an_image_comes_back_in_rgb_from_every_format(tmp_path, suffix):
    path = tmp_path / f"그림 {suffix}"
    write_image(path.with_suffix(suffix), gradient_image())
    image = read_image(path.with_suffix(suffix))
    tolerance = 0 if suffix in (".png", ".bmp", ".tif") else 40
    assert image.shape == (40, 60, 3)
    assert np.abs(image[5, 5].astype(int) - (200, 30, 10)).max() <= tolerance
    assert np.abs(image[35, 50].astype(int) - (10, 40, 220)).max() <= tolerance


def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path):
    jpeg = cv2.imencode(".jpg", gradient_image()[..., ::-1])[1].tobytes()
    path = tmp_path / "phone.jpg"
    path.write_bytes(with_exif_orientation(jpeg, 6))  # to be turned a quarter clockwise
    image = read_image(path)
    assert image.shape == (60, 40, 3)
    assert image[5, 35, 0] > 150  # red was on the left, so it is now at the top


def test_gray_and_transparent_images_become_rgb(tmp_path):
    gray = write_raw(tmp_path / "gray.png", np.full((10, 12), 77, np.uint8))
    alpha = write_raw(tmp_path / "alpha.png", np.full((10, 12, 4), 99, np.uint8))
    assert (read_image(gray) == 77).all() and read_image(gray).shape == (10, 12, 3)
    assert (read_image(alpha) == 99).all() and read_image(alpha).shape == (10, 12, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_not_an_image_is_named_in_the_error(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jpg is not a readable image"):
        read_image(path)
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "absent.jpg")


def half_mask(value: int, dtype=np.uint8) -> np.ndarray:
    mask = np.zeros((20, 30), dtype)
    mask[:, :15] = value
    return mask


@pytest.mark.parametrize(
    "stored",
    [
        half_mask(255),
        half_mask(128),
        half_mask(1),
        half_mask(65535, np.uint16),
        half_mask(255, np.uint16),
        half_mask(1, np.uint16),
        cv2.merge([half_mask(255)] * 3),
        cv2.merge([half_mask(255)] * 3 + [half_mask(255) | 255]),
    ],
    ids=["255", "128", "0-and-1", "16-bit", "16-bit-255", "16-bit-1", "rgb", "rgba"],
)
def test_a_binary_mask_is_read_whatever_its_encoding(tmp_path, stored):
    path = write_raw(tmp_path / "mask.png", stored)
    assert np.array_equal(read_mask(path), half_mask(1) == 1)


def test_a_jpeg_mask_is_cut_at_127_not_at_0(tmp_path):
    disc = cv2.circle(np.zeros((64, 64), np.uint8), (32, 32), 20, 255, -1)
    path = write_raw(tmp_path / "mask.jpg", disc, cv2.IMWRITE_JPEG_QUALITY, 60)
    stored = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert np.count_nonzero(stored) > 1.05 * np.count_nonzero(disc)  # noise around the edge
    assert np.array_equal(read_mask(path), stored > 127)


def test_an_antialiased_mask_is_cut_in_the_middle_of_its_edge(tmp_path):
    soft = cv2.GaussianBlur(half_mask(255), (5, 5), 0)
    path = write_raw(tmp_path / "mask.png", soft)
    assert np.array_equal(read_mask(path), soft > 127)


def test_an_empty_mask_is_empty_not_an_error(tmp_path):
    for suffix in (".png", ".jpg"):
        assert not read_mask(write_raw(tmp_path / f"empty{suffix}", half_mask(0))).any()


LABEL_MAPS = {
    "0-1-2-3": np.repeat(np.arange(4, dtype=np.uint8), 30).reshape(10, 12),
    "one dark value": half_mask(38),
    "16-bit": half_mask(3, np.uint16),
    "16-bit ids": (np.arange(600, dtype=np.uint16) // 2).reshape(20, 30),
    "255 to ignore, smaller": np.where(np.arange(30) < 3, 255, half_mask(7)).astype(np.uint8),
    "255 to ignore, larger": np.where(np.arange(30) < 20, 255, 7 + half_mask(0)).astype(np.uint8),
    "instances": np.repeat(np.arange(0, 251, 50, dtype=np.uint8), 100).reshape(20, 30),
}


@pytest.mark.parametrize("kind", LABEL_MAPS)
def test_a_label_map_is_refused_instead_of_misread(tmp_path, kind):
    path = write_raw(tmp_path / "labels.png", LABEL_MAPS[kind])
    with pytest.raises(UserError, match=r"labels\.png is not black and white.*binary"):
        read_mask(path)


@pytest.mark.parametrize("value", [1, 20, 100])
def test_a_dark_jpeg_mask_is_refused_instead_of_read_as_empty(tmp_path, value):
    path = write_raw(tmp_path / "dark.jpg", half_mask(value), cv2.IMWRITE_JPEG_QUALITY, 95)
    with pytest.raises(UserError, match="not black and white"):
        read_mask(path)


def test_a_small_object_survives_lossy_compression(tmp_path):
    disc = cv2.circle(np.zeros((200, 200), np.uint8), (99, 99), 6, 255, -1)
    for name, quality in (
        ("a.webp", cv2.IMWRITE_WEBP_QUALITY),
        ("a.jpg", cv2.IMWRITE_JPEG_QUALITY),
    ):
        mask = read_mask(write_raw(tmp_path / name, disc, quality, 50))
        assert np.count_nonzero(mask != (disc > 0)) < 0.15 * np.count_nonzero(disc)


def test_a_float_mask_is_cut_in_the_middle(tmp_path):
    soft = cv2.GaussianBlur(half_mask(1).astype(np.float32), (5, 5), 0)
    path = write_raw(tmp_path / "mask.tif", soft)
    assert np.array_equal(read_mask(path), soft * 255 > 127.99)


def test_a_mask_in_the_alpha_channel_is_refused(tmp_path):
    for color in (0, 255):
        path = write_raw(
            tmp_path / "alpha.png", cv2.merge([half_mask(color) | color] * 3 + [half_mask(255)])
        )
        with pytest.raises(UserError, match="transparent"):
            read_mask(path)


@pytest.mark.parametrize("red", [64, 128, 255])
def test_a_coloured_mask_is_refused(tmp_path, red):
    path = write_raw(tmp_path / "red.png", cv2.merge([half_mask(0), half_mask(0), half_mask(red)]))
    with pytest.raises(UserError, match="colour"):
        read_mask(path)


def test_a_photo_that_cannot_be_read_is_said_not_skipped(tmp_path, without_heic):
    images = touch(tmp_path / "images", "a.jpg", "b.HEIC")
    with pytest.raises(UserError, match=r"b\.HEIC is HEIC; pip install pillow-heif, or save it"):
        find_pairs(images, touch(tmp_path / "masks", "a.png", "b.png"))


def test_a_mask_must_have_the_size_of_its_image(tmp_path):
    image = write_raw(tmp_path / "a.png", np.zeros((20, 31, 3), np.uint8))
    mask = write_raw(tmp_path / "m.png", half_mask(255))
    with pytest.raises(UserError, match=r"31x20.*30x20"):
        read_pair(Pair("a", image, mask))


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_pairs_match_by_stem_in_sorted_order(tmp_path):
    images = touch(tmp_path / "images", "b.JPG", "a.png", "한글.jpeg", "Thumbs.db", "._a.png")
    masks = touch(tmp_path / "masks", "a.bmp", "b.png", "한글.tif", ".DS_Store")
    pairs = find_pairs(images, masks)
    assert [pair.name for pair in pairs] == ["a", "b", "한글"]
    assert [pair.mask.name for pair in pairs] == ["a.bmp", "b.png", "한글.tif"]


def test_decomposed_and_composed_hangul_names_pair_up(tmp_path):
    images = touch(tmp_path / "images", "\u1112\u1161\u11ab.jpg")  # 한, as macOS stores it
    masks = touch(tmp_path / "masks", "\ud55c.png")
    assert [pair.name for pair in find_pairs(images, masks)] == ["\ud55c"]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ([], ["a.png"], "no images"),
        (["a.jpg", "b.jpg"], ["a.png"], r"b\.jpg: no mask"),
        (["a.jpg"], ["a.png", "c.png"], r"c\.png: no image"),
        (["a.jpg", "a.png"], ["a.png"], "same name, except for the suffix"),
        (list("abcde"), [], "no images"),
        ([f"{n}.jpg" for n in "abcde"], ["a.png"], r"b\.jpg, c\.jpg, d\.jpg and 1 more"),
    ],
)
def test_what_does_not_pair_up_is_named(tmp_path, images, masks, message):
    with pytest.raises(UserError, match=message):
        find_pairs(touch(tmp_path / "images", *images), touch(tmp_path / "masks", *masks))


def test_missing_data_says_which_command_to_run(tmp_path):
    with pytest.raises(UserError, match=r"python download_dataset\.py"):
        split_pairs(tmp_path / "data", "train")


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
