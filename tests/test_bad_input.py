"""Bad input ends every script in one clear line and changes nothing, or is read as it is meant."""

import csv
import io
import os
import pickle
import re
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_pair, snapshot, write_data
from PIL import Image

import compare_models
import download_dataset
import test_my_image
import train_sam2_proper
from finetuning.basics.files import write_csv
from finetuning.basics.image_files import read_image, read_mask, write_image

TRAIN, COMPARE = train_sam2_proper.main, compare_models.main
DOWNLOAD, SEGMENT = download_dataset.main, test_my_image.main
IMAGE, MASK = draw_pair(0)
PROGRESS_BAR = re.compile(r"\d+%\|")


@pytest.fixture
def start(run_script, tmp_path, random_mini):
    """Run a script on good input, but for what the options change."""
    write_data(tmp_path / "data", train=2, val=1)
    write_image(tmp_path / "image.png", IMAGE)
    defaults = {
        TRAIN: ("--model", "mini", "--checkpoint", random_mini, "--epochs", 1, "--device", "cpu"),
        COMPARE: ("--finetuned", random_mini, "--original", random_mini, "--device", "cpu"),
        DOWNLOAD: ("--images", "data/images/train", "--masks", "data/masks/train", "--data", "new",
                   "--skip-checkpoint"),
        SEGMENT: ("--image", "image.png", "--checkpoint", random_mini, "--device", "cpu"),
    }  # fmt: skip
    return lambda script, *options: run_script(script, *defaults[script], *options)


@pytest.fixture
def refuse(start, tmp_path, recwarn):
    """Assert that a script ends in one line with `says` in it, and leaves every file as it was."""

    def check(script: Callable, *options: object, says: str) -> None:
        before = files_but_progress(tmp_path)
        outcome = start(script, *options)
        lines = [line for line in outcome.err.splitlines() if line.strip()]
        lines = [line for line in lines if not PROGRESS_BAR.search(line)]
        assert outcome.status == 2, outcome
        assert len(lines) == 1 and re.fullmatch(r"error: .+; .+", lines[0]), outcome.err
        assert says in lines[0]
        assert not [str(w.message) for w in recwarn if w.category in (RuntimeWarning, UserWarning)]
        assert files_but_progress(tmp_path) == before

    return check


def files_but_progress(folder: Path) -> dict[str, bytes]:
    """Return all files but those that a training keeps from its first second, to go on with."""
    progress = (".lock", ".safetensors", "train_state.pt")
    files = snapshot(folder).items()
    return {name: content for name, content in files if not name.endswith(progress)}


def scripts_and_cases(cases: list[tuple]) -> pytest.MarkDecorator:
    """Parametrize by (script, options, says), each with a readable name."""
    names = [f"{case[0].__module__} {' '.join(map(str, case[1]))[:40]}" for case in cases]
    return pytest.mark.parametrize(("script", "options", "says"), cases, ids=names)


# Options


@scripts_and_cases(
    [
        (TRAIN, ("--epochs", "2.5"), "a whole number of at least 1"),
        (TRAIN, ("--epochs", "열"), "a whole number of at least 1"),
        (TRAIN, ("--epochs",), "expected one argument"),
        (TRAIN, ("--epoch", 5), "unknown option --epoch; did you mean --epochs?"),
        (TRAIN, ("--batch_size", 2), "unknown option --batch_size; did you mean --batch-size?"),
        (TRAIN, ("--zzz",), "unknown option --zzz; see --help"),
        (SEGMENT, ("--image", "my", "photos/a.jpg"), 'put it in quotes: "my photos/a.jpg"'),
        (SEGMENT, ("--image", "a.jpg", "--checkpoint", "data"), "a folder without sam2_best.pt"),
        (TRAIN, ("--batch-size", 0), "--batch-size: must be a whole number of at least 1"),
        (TRAIN, ("--limit", 0), "--limit"),
        (TRAIN, ("--seed", -1), "--seed"),
        (TRAIN, ("--seed", 2**63), "--seed"),
        (TRAIN, ("--lr", 0), "--lr: must be a number above 0, not 0"),
        (TRAIN, ("--lr", "inf"), "--lr"),
        (TRAIN, ("--lr", "1e-5x"), "--lr"),
        (TRAIN, ("--lr", "1_0"), "--lr: must be a number above 0, not 1_0"),
        (TRAIN, ("--epochs", "1_0"), "--epochs: must be a whole number of at least 1, not 1_0"),
        (TRAIN, ("--weight-decay", "nan"), "--weight-decay"),
        (TRAIN, ("--score-weight", -1), "--score-weight"),
        (TRAIN, ("--precision", "int8"), "--precision"),
        (TRAIN, ("--device", "cuda:99"), "cuda:99 is not available"),
        (TRAIN, ("--device", "cuda:-1"), "unknown"),
        (TRAIN, ("--device", "한글"), "unknown"),
        (TRAIN, ("--cache", "c", "--no-cache"), "not allowed with"),
        (COMPARE, ("--seed", -1), "--seed"),
        (COMPARE, ("--seed", "x"), "--seed"),
        (COMPARE, ("--limit", "1.5"), "--limit"),
        (COMPARE, ("--figures", "1e3"), "--figures"),
        (COMPARE, ("--precision", "half"), "--precision"),
        (COMPARE, ("--precision", "float16"), "needs CUDA"),
        (COMPARE, ("--model", "huge"), "--model"),
        (COMPARE, ("--device", ""), "unknown"),
        (SEGMENT, ("--model", "huge"), "--model"),
        (SEGMENT, ("--device", "cuda:99"), "not available"),
        (DOWNLOAD, ("--val-fraction", 1), "--val-fraction"),
        (DOWNLOAD, ("--seed", "1.0"), "--seed"),
        (DOWNLOAD, ("--images", "data"), "no images in data"),
    ]
)
def test_an_option_out_of_range_is_named(refuse, script, options, says):
    refuse(script, *options, says=says)


def test_a_number_beyond_all_floats_is_out_of_range(refuse):
    refuse(TRAIN, "--epochs", 10**400, says="--epochs")


BAD_POINTS = [
    "inf,5", "-inf,5", "1e400,5", "5,-1e300", "5;6", "(5,6)", "", ",", "5,", "5,6,", "삼,이",
    "0x10,5", "5 6", "５，６", "5,6.5.4", "1_0,5",
]  # fmt: skip
BAD_BOXES = ["nan,0,5,5", "0,0,inf,9", "0,0,5", "0,0,5,5,5", "0;0;5;5", "0,0,오,5", ""]


@pytest.mark.parametrize("text", BAD_POINTS)
def test_what_is_no_point_is_shown_with_an_example(refuse, text):
    refuse(SEGMENT, f"--point={text}", says=f'"{text}" is not like "320,200"')


@pytest.mark.parametrize("text", BAD_BOXES)
def test_what_is_no_box_is_shown_with_an_example(refuse, text):
    refuse(SEGMENT, f"--box={text}", says=f'"{text}" is not like "40,30,600,460"')


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--point=999999999,5",), "outside the image"),
        (("--point=127.9,96",), "outside the image"),
        (("--point=-0.5,5",), "-0.5,5 lies outside"),
        (("--point", "-5,5"), "-5,5 lies outside"),  # not taken for an option
        (("--point=5,5", "--negative-point=5,1e6"), "outside the image"),
        (("--box=-5,0,20,20",), "-5,0 lies outside"),
        (("--box=0,0,128,96.5",), "128,96.5 lies outside"),
        (("--box=0,50,20,20",), "swapped corners"),
        (("--box=0,0,0,0",), "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_prompt_outside_the_image_is_refused(refuse, options, says):
    refuse(SEGMENT, *options, says=says)


def test_points_are_read_however_they_are_typed(start):
    texts = ["60,40", " 60 , 40.0 ", "６０,４０", "+6e1,40"]
    for text in texts:
        assert start(SEGMENT, "--point", text).status == 0
    masks = [read_mask(Path(f"output/my_results/image_{n:03}_mask.png")) for n in (1, 2, 3, 4)]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


# Images


def encode(suffix: str, image: np.ndarray = IMAGE, *parameters: int) -> bytes:
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(suffix, image, list(parameters))[1].tobytes()


def save_with_pillow(image: Image.Image, suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF"}[suffix], **options)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(1000)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def jpeg_that_claims(width: int, height: int) -> bytes:
    jpeg = encode(".jpg")
    size_at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:size_at] + struct.pack(">HH", height, width) + jpeg[size_at + 4 :]


def with_thumbnail(jpeg: bytes) -> bytes:
    """Insert an EXIF segment that ends in a small whole JPEG, as cameras do."""
    segment = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08" + bytes(6) + encode(".jpg", IMAGE[::8, ::8])
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


JPEG, PNG = encode(".jpg"), encode(".png")
PROGRESSIVE = encode(".jpg", IMAGE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTING = encode(".jpg", IMAGE, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
UNREADABLE = {
    "empty.jpg": b"",
    "text.png": "그림이 아닙니다".encode(),
    "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "header only.jpg": JPEG[:2],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "without its last byte.jpg": JPEG[:-1],
    "half with thumbnail.jpg": with_thumbnail(JPEG)[: -len(JPEG) // 2],
    "cut in its thumbnail.jpg": with_thumbnail(JPEG)[:300],
    "half progressive.jpg": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "half with restart markers.jpg": RESTARTING[: len(RESTARTING) // 2],
    "zeros after its half.jpg": JPEG[: len(JPEG) // 2].ljust(len(JPEG), b"\0"),
    "half.png": PNG[: len(PNG) // 2],
    "without its end.png": PNG[:-12],
    "overwritten.png": PNG[:2000] + bytes(500) + PNG[2500:],
    "half.webp": encode(".webp")[:-2000],
    "half.tif": encode(".tif")[:-2000],
    "half.bmp": encode(".bmp")[:-2000],
    "no width.png": png_that_claims(0, 9),
}
TOO_LARGE = {
    "bomb.png": png_that_claims(20_000, 20_000),
    "bomb.jpg": jpeg_that_claims(65_000, 65_000),
    "wide.png": png_that_claims(10**9, 1),
}
SIZES = {"bomb.png": "20000x20000", "bomb.jpg": "65000x65000", "wide.png": "1000000000x1"}
NOT_8_BIT = {
    "12 of 16 bits.png": encode(".png", IMAGE.astype(np.uint16) << 4),
    "float.tif": encode(".tif", np.float32(IMAGE) / 255, cv2.IMWRITE_TIFF_COMPRESSION, 1),
    "gray float.tif": encode(".tif", IMAGE[..., 0].astype(np.float32) / 255),
    "signed.tif": encode(".tif", IMAGE[..., 0].astype(np.int16) - 128),
}
REFUSED = {
    **{name: (content, "is not a readable image") for name, content in UNREADABLE.items()},
    **{
        name: (content, f"has {SIZES[name]} pixels, more than 100 megapixels")
        for name, content in TOO_LARGE.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_cannot_be_read_is_refused_by_name(refuse, tmp_path, name):
    content, says = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    refuse(SEGMENT, "--image", name, "--point", "5,5", says=f"{name} {says}")


def test_a_jpeg_that_is_cut_off_is_not_even_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: IMAGE)  # some versions fill up with gray
    for name in UNREADABLE:
        if re.search("(half|header|without|cut|zeros).*jpg", name):
            (tmp_path / name).write_bytes(UNREADABLE[name])
            with pytest.raises(UserError, match="is not a readable image"):
                read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data", "points and boxes are for a single image"),
        ("a" * 300, "aaaa"),
    ],
)
def test_a_path_that_leads_to_no_image_is_refused(refuse, name, says):
    refuse(SEGMENT, "--image", name, "--point", "5,5", says=says)


PILLOW = Image.fromarray(IMAGE)
ODD_IMAGES = {
    "trailing bytes.jpg": JPEG + b"\0appended by a camera" * 9,
    "thumbnail.jpg": with_thumbnail(JPEG),
    "progressive.jpg": PROGRESSIVE,
    "restart markers.jpg": RESTARTING,
    "filled up.jpg": JPEG[:2] + b"\xff" * 20 + JPEG[2:],
    "gray.jpg": save_with_pillow(PILLOW.convert("L"), ".jpg"),
    "cmyk.jpg": save_with_pillow(PILLOW.convert("CMYK"), ".jpg"),
    "cmyk.tif": save_with_pillow(PILLOW.convert("CMYK"), ".tif"),
    "one bit.png": save_with_pillow(PILLOW.convert("1"), ".png"),
    "palette.png": save_with_pillow(PILLOW.quantize(32), ".png"),
    "palette with a hole.png": save_with_pillow(PILLOW.quantize(32), ".png", transparency=0),
    "gray and alpha.png": save_with_pillow(PILLOW.convert("LA"), ".png"),
    "alpha.png": encode(".png", np.dstack([IMAGE[..., ::-1], MASK * np.uint8(200)])),
    "a png in truth.JPG": PNG,
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_has_the_colours_that_pillow_reads(start, tmp_path, name):
    (tmp_path / name).write_bytes(ODD_IMAGES[name])
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"), np.int16)
    assert np.abs(read_image(tmp_path / name) - expected).max() <= 1  # rounded otherwise
    assert start(SEGMENT, "--image", name, "--point", "5,5").status == 0


@pytest.mark.parametrize("name", NOT_8_BIT)
def test_an_image_of_other_values_than_8_bits_is_stretched_to_them(start, tmp_path, name):
    (tmp_path / name).write_bytes(NOT_8_BIT[name])
    original = IMAGE[..., :1] if "gray" in name or "signed" in name else IMAGE
    low, high = np.percentile(original, (0.5, 99.5))
    expected = ((original - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(read_image(tmp_path / name) - expected).max() <= 0.51
    assert start(SEGMENT, "--image", name, "--point", "5,5").status == 0


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_stretched_to_8(tmp_path, suffix):
    for image in (IMAGE, IMAGE[..., 0]):
        path, deep = tmp_path / f"deep{suffix}", image.astype(np.uint16) * 256 + 255
        path.write_bytes(encode(suffix, deep))
        low, high = np.percentile(deep, (0.5, 99.5))
        expected = ((deep - low) / (high - low) * 255).clip(0, 255)
        expected = expected if image.ndim == 3 else np.dstack([expected] * 3)
        assert np.abs(read_image(path) - expected).max() <= 0.51


@pytest.mark.parametrize("values", [(0, np.nan), (0, 300), (-1, 1), (300, 70_000)])
def test_a_mask_with_values_beyond_8_and_16_bits_is_refused(tmp_path, values):
    (tmp_path / "mask.tif").write_bytes(encode(".tif", np.array([values] * 9, np.float32)))
    with pytest.raises(UserError, match=r"mask\.tif holds values outside 0 to 255"):
        read_mask(tmp_path / "mask.tif")


# Data folders

LABELS = (np.arange(96 * 128).reshape(96, 128) // 64 % 8 * 9).astype(np.uint8)
BAD_PAIRS = {
    "image is cut off": ("images", ".jpg", JPEG[:-9], "pair_000.jpg is not a readable image"),
    "image is empty": ("images", ".jpg", b"", "pair_000.jpg is not a readable image"),
    "image too small": ("images", ".jpg", encode(".jpg", IMAGE[1:]), "pair_000.jpg is 128x95 but"),
    "mask is cut off": ("masks", ".png", PNG[:-20], "pair_000.png is not a readable image"),
    "mask is the image": ("masks", ".png", PNG, "pair_000.png is a mask in colour"),
    "mask turned": ("masks", ".png", encode(".png", MASK.T * 255), "is 96x128; a mask must"),
    "label map": ("masks", ".png", encode(".png", LABELS), "pair_000.png is not black and white"),
    "mask is huge": ("masks", ".png", TOO_LARGE["bomb.png"], "more than 100 megapixels"),
    "mask is a folder": ("masks", ".png", None, "pair_000.png"),
}  # fmt: skip


# Where download_dataset.py, which could do more with such files, says more
SAID_BEFORE_COPYING = {
    "label map": "pair_000.png has 7 values or colours besides black (a label map",
    "mask is a folder": "1 of 2 images have no mask: pair_000.jpg",
    "heic": "1 of 3 images have no mask: a.heic",
    "no mask": "1 of 2 images have no mask: pair_000.jpg",
    "no image": "which images these masks belong to: pair_000.png",
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_a_bad_pair_is_named_by_every_script_that_reads_it(refuse, tmp_path, kind):
    folder, suffix, content, says = BAD_PAIRS[kind]
    path = tmp_path / "data" / folder / "train" / f"pair_000{suffix}"
    path.unlink()
    path.write_bytes(content) if content is not None else path.mkdir()
    refuse(DOWNLOAD, says=SAID_BEFORE_COPYING.get(kind, says))
    refuse(TRAIN, says=says)
    if kind in ("image is cut off", "mask turned"):
        refuse(COMPARE, "--split", "train", says=says)


PAIR = ("images/train/pair_000.jpg", "masks/train/pair_000.png")


def copy(source: Path, name: str) -> None:
    shutil.copy(source, source.with_name(name))


BAD_FOLDERS = {
    "no mask": (lambda image, mask: mask.unlink(), "pair_000.jpg: no mask"),
    "no image": (lambda image, mask: image.unlink(), "pair_000.png: no image"),
    "two of a name": (lambda image, _: copy(image, "pair_000.bmp"), "the same name"),
    "heic": (lambda image, _: copy(image, "a.heic"), "a.heic is HEIC; pip install pillow-heif, or"),
    "no images": (
        lambda image, _: shutil.rmtree(image.parent) or image.parent.mkdir(),
        "no images",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_folders_that_do_not_pair_up_are_refused_by_every_script(
    refuse, tmp_path, without_heic, kind
):
    spoil, says = BAD_FOLDERS[kind]
    spoil(*(tmp_path / f"data/{name}" for name in PAIR))
    refuse(TRAIN, says=says)
    refuse(COMPARE, "--split", "train", says=says)
    refuse(DOWNLOAD, says=SAID_BEFORE_COPYING.get(kind, says))


def test_two_ways_to_store_one_hangul_name_are_one_name(refuse, tmp_path):
    image = tmp_path / f"data/{PAIR[0]}"
    for form in ("NFC", "NFD"):
        copy(image, unicodedata.normalize(form, "한글.jpg"))
    if len(list(image.parent.iterdir())) < 4:
        pytest.skip("this file system makes one file of them")
    refuse(TRAIN, says="have the same name")


def test_half_a_data_folder_is_refused_before_anything_slow(refuse, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    for script in (TRAIN, COMPARE):
        refuse(script, "--data", "file", says="no data in")
    shutil.rmtree(tmp_path / "data/masks/val")
    for script in (TRAIN, COMPARE):
        refuse(script, says=f"no data in {Path('data/masks/val')}")
    shutil.rmtree(tmp_path / "data/images/val")
    for script in (TRAIN, COMPARE):
        refuse(script, says="data has no val images, only train")
    refuse(DOWNLOAD, "--images", "image.png", says="no such folder: image.png")


def test_a_folder_of_photos_is_no_data_folder_and_is_not_filled(refuse, run_script, tmp_path):
    write_image(Path("my photos/2026/a.jpg"), IMAGE)
    for script in (TRAIN, COMPARE):
        refuse(script, "--data", "my photos", says="--masks YOUR_MASKS --data ")
    for options in ((), ("--demo",), ("--force",)):
        outcome = run_script(DOWNLOAD, "--data", "my photos", "--skip-checkpoint", *options)
        assert outcome.status == 2 and "holds images of yours (a.jpg)" in outcome.err
    assert [path.name for path in Path("my photos").rglob("*.*")] == ["a.jpg"]


def write_odd_data(folder: Path) -> None:
    """Write pairs of extreme sizes and of extreme masks, the same for train and val."""
    one_pixel = np.zeros((96, 128), bool)
    one_pixel[95, 127] = True
    masks = {
        "1x1": np.ones((1, 1), bool),
        "20000x20": np.arange(20 * 20_000).reshape(20, 20_000) % 20_000 > 15_000,
        "1x300": np.arange(300).reshape(300, 1) < 100,
        "full": np.ones((96, 128), bool),
        "one pixel": one_pixel,
        "empty": np.zeros((96, 128), bool),
    }
    for split in ("train", "val"):
        for name, mask in masks.items():
            image = np.dstack([np.where(mask, 200, 40).astype(np.uint8)] * 3)
            write_image(folder / "images" / split / f"{name}.png", image)
            write_image(folder / "masks" / split / f"{name}.png", mask.astype(np.uint8) * 255)


def test_images_and_masks_of_extreme_shapes_are_trained_on_and_compared(start, tmp_path):
    write_odd_data(tmp_path / "odd")
    for options in ((), ("--no-cache", "--batch-size", 5)):
        outcome = start(TRAIN, "--data", "odd", *options)
        assert outcome.status == 0, outcome.err
        assert "skipped 1 of 6 training images" in outcome.out
    outcome = start(COMPARE, "--data", "odd", "--prompt", "box", "--figures", 2, "--clicks", 2)
    assert outcome.status == 0, outcome.err
    assert "5 images: 0 better, 5 equal" in outcome.out  # all but the empty mask
    drawn = {path.name[14:] for path in Path("output/comparison").glob("comparison_*.png")}
    assert drawn == {"+0p_1x1.png", "+0p_one pixel.png"}


@pytest.mark.parametrize("name", ["1x1", "20000x20", "1x300"])
def test_images_of_extreme_shapes_are_segmented_at_their_own_size(start, tmp_path, name):
    write_odd_data(tmp_path / "odd")
    path = Path("odd/images/val") / f"{name}.png"
    for prompt in ("--point=0,0", "--box=0,0,1,1"):
        assert start(SEGMENT, "--image", path, prompt).status == 0
    mask = read_mask(Path(f"output/my_results/{name}_002_mask.png"))
    assert mask.shape == read_image(path).shape[:2]


def test_a_linked_and_read_only_data_folder_is_read_and_not_written_to(start, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    try:
        (tmp_path / "data").symlink_to("elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system lets nobody make links")
    before = snapshot(tmp_path / "elsewhere")
    folders = [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    for script in (TRAIN, COMPARE):
        outcome = start(script)
        assert outcome.status == 0, outcome.err
    for folder in folders:
        folder.chmod(0o755)
    assert snapshot(tmp_path / "elsewhere") == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do all")
def test_what_may_not_be_read_or_written_is_named(start, tmp_path):
    image = tmp_path / "data/images/train/pair_000.jpg"
    (tmp_path / "locked").mkdir(mode=0o555)
    image.chmod(0)
    for script, options in (
        (TRAIN, ()),
        (COMPARE, ("--split", "train")),
        (DOWNLOAD, ()),
        (SEGMENT, ("--image", image)),
        (SEGMENT, ("--point", "5,5", "--output", "locked/results")),
    ):
        outcome = start(script, *options)
        assert outcome.status == 2 and "error: Permission denied: " in outcome.err
        assert ("locked" if "locked" in str(options) else image.name) in outcome.err


# Checkpoints, and other files where none or another kind is meant


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


@pytest.fixture(scope="module")
def bad_checkpoints(tmp_path_factory, random_mini) -> Path:
    """Write files that are no checkpoints of mini into a folder."""
    folder = tmp_path_factory.mktemp("bad checkpoints")
    weights = torch.load(random_mini, weights_only=True)["model"]
    name = "sam_mask_decoder.iou_token.weight"
    first = weights["image_encoder.trunk.patch_embed.proj.weight"]
    (folder / "folder.pt").mkdir()
    for file, content in {
        "empty": b"",
        "text": b"weights",
        "image": PNG,
        "cut": random_mini.read_bytes()[:5_000_000],
        "code": pickle.dumps({"model": RunsCode()}, protocol=2),
    }.items():
        (folder / f"{file}.pt").write_bytes(content)
    for file, model in {
        "code beside weights": {**weights, name: RunsCode()},
        "list": [first],
        "names only": dict.fromkeys(weights),
        "no weights": {},
        "fewer": {key: weight for key, weight in weights.items() if key != name},
        "more": {**weights, "sam_mask_decoder.extra": first},
        "other shape": {**weights, name: weights[name][:, :-1]},
        "nan": {**weights, name: weights[name] * float("nan")},
        "inf": {**weights, name: weights[name] / 0},
        "tiny": {f"image_encoder.trunk.blocks.{i}.x": first for i in range(12)}
        | {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(96, 3, 7, 7)},
        "numbered": {5: first},
        "without dimensions": {"image_encoder.trunk.patch_embed.proj.weight": first.sum()},
        "sparse": {**weights, name: weights[name].to_sparse()},
        "whole numbers": {key: weight.to(torch.int8) for key, weight in weights.items()},
    }.items():
        torch.save({"model": model}, folder / f"{file}.pt")
    torch.save({"model": first}, folder / "small.pt")
    (folder / "cut small.pt").write_bytes((folder / "small.pt").read_bytes()[:-1000])
    torch.save(weights, folder / "bare.pt")
    return folder


BAD_CHECKPOINTS = {
    "absent": "no such checkpoint",
    "folder": "is a folder without sam2_best.pt",
    "empty": "not a readable checkpoint",
    "text": "not a readable checkpoint",
    "image": "not a readable checkpoint",
    "cut": "not a readable checkpoint",
    "code": "not a readable checkpoint",
    "code beside weights": "holds objects beside the weights",
    "list": 'no "model" weights',
    "names only": 'no "model" weights',
    "no weights": 'no "model" weights',
    "fewer": "1 weights missing, 0 unknown",
    "more": "0 weights missing, 1 unknown",
    "other shape": "0 unknown, some of another shape",
    "nan": "not finite",
    "inf": "not finite",
    "cut small": "not a readable checkpoint",
    "numbered": 'no "model" weights',
    "without dimensions": 'no "model" weights',
    "sparse": "1 weights missing, 0 unknown, such as sam_mask_decoder.iou_token.weight",
    "whole numbers": 'no "model" weights',
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_what_is_no_checkpoint_of_the_model_is_refused(refuse, bad_checkpoints, kind):
    path, says = bad_checkpoints / f"{kind}.pt", BAD_CHECKPOINTS[kind]
    refuse(TRAIN, "--checkpoint", path, says=says)
    refuse(SEGMENT, "--checkpoint", path, "--point", "5,5", says=says)
    refuse(COMPARE, "--original", path, says=says)
    if path.is_file():
        refuse(COMPARE, "--finetuned", path, says=says)


def test_a_checkpoint_of_another_size_is_refused(refuse, bad_checkpoints):
    tiny = bad_checkpoints / "tiny.pt"
    refuse(TRAIN, "--checkpoint", tiny, says="is a SAM 2 tiny checkpoint, not mini")
    refuse(COMPARE, "--original", tiny, says="is a SAM 2 tiny checkpoint, not mini")
    options = ("--checkpoint", tiny, "--model", "mini")
    refuse(SEGMENT, *options, says="is a SAM 2 tiny checkpoint, not mini")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read(start, tmp_path, random_mini, dtype):
    weights = torch.load(random_mini, weights_only=True)["model"]
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    torch.save({"model": weights}, tmp_path / "other.pt")
    assert start(SEGMENT, "--checkpoint", "other.pt", "--point", "60,40").status == 0


def test_a_file_in_the_way_of_a_folder_is_named(refuse, tmp_path):
    (tmp_path / "obstacle").write_text("in the way", encoding="utf-8")
    for script, options in (
        (TRAIN, ("--output", "obstacle")),
        (TRAIN, ("--output", "obstacle", "--no-cache")),
        (TRAIN, ("--cache", "obstacle")),
        (COMPARE, ("--output", "obstacle", "--figures", 0)),
        (SEGMENT, ("--output", "obstacle", "--point", "5,5")),
        (DOWNLOAD, ("--data", "obstacle")),
    ):
        refuse(script, *options, says="obstacle")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.pt", "not a readable checkpoint"),
        ("nan.pt", "not finite"),
        ("more.pt", "not the state"),
    ],
)
def test_a_state_that_is_none_is_not_resumed_and_kept(
    refuse, tmp_path, bad_checkpoints, name, says
):
    state = tmp_path / "output/train_state.pt"
    state.parent.mkdir()
    shutil.copy(bad_checkpoints / name, state)
    refuse(TRAIN, "--resume", says=says)
    assert state.read_bytes() == (bad_checkpoints / name).read_bytes()


def test_settings_of_another_kind_beside_the_weights_are_no_obstacle(start, tmp_path, random_mini):
    checkpoint = torch.load(random_mini, weights_only=True)
    torch.save({**checkpoint, "settings": "those of another program"}, tmp_path / "other.pt")
    assert start(COMPARE, "--finetuned", "other.pt", "--figures", 0).status == 0


def test_a_name_with_control_characters_prints_no_line_of_its_own(start, tmp_path):
    for name in ("\x1b[2J", "a\nerror: all is lost", "a\u202eb"):
        outcome = start(SEGMENT, "--image", f"{name}.png", "--point", "5,5")
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1 and outcome.err[:-1].isprintable()


def test_names_that_a_spreadsheet_would_run_are_texts(tmp_path):
    rows = [("=1+1.png", "-0.5"), ("@a", -1), ("+b", "+2e-3"), ("용종.png", "1,2:1")]
    write_csv(tmp_path / "a.csv", ("image", "value"), rows)
    with (tmp_path / "a.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file))[1:] == [
            ["'=1+1.png", "-0.5"], ["'@a", "-1"], ["'+b", "+2e-3"], ["용종.png", "1,2:1"],
        ]  # fmt: skip


def test_where_memory_runs_out_one_line_names_what_takes_less(run_script):
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    outcome = run_script(main)
    ways = ("--batch-size", "--objects-per-image", "--model", "--cache-in disk", "--device cpu")
    assert outcome.status == 2 and outcome.err.startswith("error: the memory is full; ")
    assert outcome.err.count("\n") == 1 and all(way in outcome.err for way in ways)
