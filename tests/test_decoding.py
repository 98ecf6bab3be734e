"""Every image file is decoded upright, whole and at its own depth, or refused for what it is."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from PIL import Image, features

from finetuning.basics import image_decoding
from finetuning.basics.image_decoding import decode_image, orientation
from finetuning.basics.image_files import read_image, read_mask, read_values, require_equal_sizes
from finetuning.basics.tiff import tiff_directories

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 4000, (6, 8, 3), dtype=np.uint16)


def tiff(
    *pages: np.ndarray, tags: dict[int, int] | None = None, order: str = "<", is_big: bool = False
) -> bytes:
    """Write a TIFF of any dtype, number of channels and of pages; `tags` of the first page.

    Tag 284 (2: channels one after the other) changes the order of the values, too.
    """
    offset, room = ("Q", 8) if is_big else ("I", 4)
    version = (43, 8, 0) if is_big else (42,)
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "H" * len(version), *version)
    for number, page in enumerate(pages):
        samples = page.shape[2] if page.ndim == 3 else 1
        is_planar = (tags or {}).get(284) == 2
        planes = np.moveaxis(page, 2, 0) if is_planar else page
        data = planes.astype(page.dtype.newbyteorder(order)).tobytes()
        parts = samples if is_planar else 1
        data_at = len(content) + room  # behind the offset of this page's directory
        entries = {
            256: [page.shape[1]], 257: [page.shape[0]], 258: [8 * page.dtype.itemsize] * samples,
            259: [1], 262: [2 if samples in (3, 4) else 1],
            273: [data_at + len(data) // parts * part for part in range(parts)],
            277: [samples], 278: [page.shape[0]], 279: [len(data) // parts] * parts,
            339: [{"u": 1, "i": 2, "f": 3}[page.dtype.kind]] * samples,
            **{tag: [value] for tag, value in (tags or {}).items() if number == 0},
        }  # fmt: skip
        body = b""
        lists_at = data_at + len(data)
        for tag, values in sorted(entries.items()):
            kind, code = (3, "H") if tag in (258, 339, 274) else (4, "I")
            value = struct.pack(f"{order}{len(values)}{code}", *values)
            if len(value) > room:
                value, data = struct.pack(order + offset, lists_at), data + value
                lists_at = data_at + len(data)
            body += struct.pack(f"{order}HH{offset}", tag, kind, len(values)) + value.ljust(
                room, b"\0"
            )
        count = struct.pack(order + ("Q" if is_big else "H"), len(entries))
        content += struct.pack(order + offset, lists_at) + data + count + body
    return content + bytes(room)


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """Turn an array upright by an EXIF orientation, as Pillow does."""
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(turn)
    pixels = Image.fromarray(image)
    return np.asarray(pixels if method is None else pixels.transpose(method))


def saved(kind: str, image: np.ndarray, turn: int, **options: object) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = turn
    Image.fromarray(image).save(file, kind, exif=exif.tobytes(), **options)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def colours() -> np.ndarray:
    """Draw an image without symmetry, of areas that survive lossy compression."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :16], image[:16, 16:], image[16:, :32] = (230, 20, 20), (20, 200, 20), (20, 20, 220)
    return image


LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
FORMATS = {**LOSSLESS, "JPEG": {"quality": 95}}
if features.check("avif") and cv2.haveImageWriter("a.avif"):
    FORMATS["AVIF"] = {"quality": 95}
if "HEIF" in image_decoding.PILLOW_FORMATS:
    FORMATS["HEIF"] = {"quality": 95}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_image_and_mask_of_any_format_are_turned_upright_alike(tmp_path, kind, turn):
    content = saved(kind, colours(), turn, **FORMATS[kind])
    with Image.open(io.BytesIO(content)) as image:
        stored = 1 if kind == "HEIF" else turn  # Pillow turns it
        assert orientation(content) == stored == image.getexif().get(274, 1)
    tolerance = 0 if kind in LOSSLESS else 60
    path = write(tmp_path / "그림", content)
    for read in (read_image(path), read_values(path)[0]):
        assert read.shape == turned(colours(), turn).shape
        difference = np.abs(read.astype(int) - turned(colours(), turn))
        assert np.mean(difference.max(axis=2) > tolerance) < 0.1

    mask = ((colours()[..., 0] > 127) * 255).astype(np.uint8)
    upright = read_mask(write(tmp_path / "mask", saved(kind, mask, turn, **FORMATS[kind])))
    assert np.array_equal(upright, turned(mask, turn) > 127)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize(
    ("order", "is_big"), [("<", False), (">", False), ("<", True), (">", True)]
)
def test_a_tiff_of_any_values_is_decoded_as_stored_and_upright_once(dtype, channels, order, is_big):
    stored = RNG.integers(0, 100, (6, 8, *channels)).astype(dtype)
    for turn in (1, 3, 6, 7):
        content = tiff(stored, tags={274: turn}, order=order, is_big=is_big)
        values = decode_image(Path("a.tif"), content)
        expected = stored if turn < 5 else stored.swapaxes(0, 1)
        flip = {1: np.s_[:, :], 3: np.s_[::-1, ::-1], 6: np.s_[:, ::-1], 7: np.s_[::-1, ::-1]}
        assert values.dtype == stored.dtype and np.array_equal(values, expected[flip[turn]])
        colour = decode_image(Path("a.tif"), content, color=True)
        if colour.ndim == 3:
            assert np.array_equal(colour[..., 2], values if values.ndim == 2 else values[..., 2])


def damaged(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


def read_all(images: list[Path], printed: Path) -> None:
    """Read images, in a process whose output goes to a file, with that of OpenCV's C code."""
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for image in images:
        read_image(image)


def test_a_broken_orientation_is_none_and_nothing_is_printed(tmp_path, processes):
    jpeg = saved("JPEG", colours(), 6)
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01"
    broken = [
        damaged(jpeg, entry, b"\x01\x12\x00\x03\xff\xff\xff\xff"),  # too long
        damaged(jpeg, entry, b"\x01\x12\x00\x05\x00\x00\x00\x01"),  # a fraction
        damaged(jpeg, entry + b"\x00\x06", entry + b"\x00\x09"),
        damaged(jpeg, entry + b"\x00\x06", entry + b"\x00\x00"),
        damaged(jpeg, b"Exif\0\0MM", b"Exif\0\0XX"),
        damaged(jpeg, b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    ]
    for number, content in enumerate(broken):
        assert orientation(content) == 1
        assert read_image(write(tmp_path / f"{number}.jpg", content)).shape == (32, 48, 3)
    images = list(tmp_path.iterdir())
    reading = processes.Process(target=read_all, args=(images, tmp_path / "printed.txt"))
    reading.start()
    reading.join(300)
    assert reading.exitcode == 0 and (tmp_path / "printed.txt").read_text() == ""


@pytest.mark.skipif("HEIF" not in FORMATS, reason="pillow-heif is not installed")
def test_a_photo_that_is_too_large_is_not_decoded(tmp_path, monkeypatch):
    content = saved("HEIF", colours(), 6)
    with pytest.raises(UserError, match="damaged, cut off"):
        read_image(write(tmp_path / "a.heic", content[: len(content) // 2]))
    monkeypatch.setattr(image_decoding, "MAX_MEGAPIXELS", 0)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded in spite of its size"))
    with pytest.raises(UserError, match="has 32x48 pixels, more than 0 megapixels"):
        read_image(write(tmp_path / "사진.heic", content))


def test_what_opencv_cannot_read_pillow_may(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    for kind in {"GIF", "AVIF"} & {*ANIMATED}:
        read = read_image(write(tmp_path / "a", saved(kind, colours(), 1))).astype(int)
        assert np.mean(np.abs(read - colours()).max(axis=2) > 60) < 0.1
        assert read_image(tmp_path / "a").flags.writeable  # or torch warns
    with pytest.raises(UserError, match="not a readable image"):
        read_image(write(tmp_path / "a", saved("PNG", colours(), 1)))


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path):
    png = saved("PNG", colours(), 6)
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4], "big")
    iend = png.index(b"IEND") - 4
    content = png[:at] + png[end:iend] + png[at:end] + png[iend:]
    assert np.array_equal(read_image(write(tmp_path / "a.png", content)), turned(colours(), 6))


# Depth


def test_values_beyond_8_bits_are_stretched_between_their_percentiles(tmp_path):
    ramp = np.linspace(800, 5300, 10_000).reshape(100, 100)
    low, high = np.percentile(ramp, (0.5, 99.5))
    expected = ((ramp - low) / (high - low) * 255).clip(0, 255)
    for dtype in (np.uint16, np.int16, np.int32, np.float32, np.float64):
        image = read_image(write(tmp_path / "a.tif", tiff(ramp.astype(dtype))))
        assert image.dtype == np.uint8 and image.shape == (100, 100, 3)
        assert np.abs(image - expected[..., None]).max() <= 1
        assert image.min() == 0 and image.max() == 255


def test_all_channels_are_stretched_together(tmp_path):
    image = read_image(write(tmp_path / "a.tif", tiff(DEEP * np.uint16([1, 2, 4]))))
    red, green, blue = image.reshape(-1, 3).mean(axis=0)
    assert 1.5 * red < green < blue / 1.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([[3, 200, 255]]), [3, 200, 255]),
        (np.int16([[0, 7, 255]]), [0, 7, 255]),
        (np.int16([[-100, 0, 100]]), [0, 128, 255]),
        (np.float32([[0, 1.6, 254.7]]), [0, 2, 255]),
        (np.float32([[0, 0.5, 1]]), [0, 128, 255]),
        (np.float64([[-1, 0, 1]]), [0, 128, 255]),
        (np.float32([[0, 128, 256]]), [0, 128, 255]),
        (np.full((1, 3), 1000, np.uint16), [255, 255, 255]),  # constant
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
        (np.float32([[-3e38, 0, 3e38]]), [0, 128, 255]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_only_what_is_no_8_bit_picture_is_stretched(tmp_path, values, expected):
    image = read_image(write(tmp_path / "a.tif", tiff(values)))
    assert np.abs(image[0].astype(int) - np.array(expected)[:, None]).max() <= 2  # percentiles


def test_a_few_bright_spots_on_an_even_ground_are_seen(tmp_path):
    spots = np.full((100, 100), 300, np.uint16)
    spots[50, 50:54] = 4000
    image = read_image(write(tmp_path / "a.tif", tiff(spots)))
    assert (image[50, 50:54] == 255).all() and np.count_nonzero(image) == 12


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_a_value_range_goes_before_the_images_own_beyond_8_bits(tmp_path, dtype):
    path = write(tmp_path / "a.tif", tiff(np.array([[0, 50, 100, 150, 200]], dtype)))
    stretched = [0, 50, 100, 150, 200] if dtype == "u1" else [0, 0, 128, 255, 255]
    assert read_image(path, (50, 150))[0, :, 0].tolist() == stretched


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nan_and_infinity_are_named(tmp_path, value):
    path = write(tmp_path / "a.tif", tiff(np.float32([[0, value, 1]])))
    for value_range in (None, (0, 1)):
        with pytest.raises(UserError, match=r"a\.tif holds NaN or infinite values; "):
            read_image(path, value_range)


def test_8_bit_images_keep_the_pixels_that_opencv_reads(tmp_path):
    pixels = RNG.integers(0, 256, (16, 24, 4), dtype=np.uint8)
    for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "CMYK"):
        for kind in ("PNG", "TIFF", "JPEG", "BMP", "WEBP"):
            file = io.BytesIO()
            try:
                Image.fromarray(pixels[..., :3]).convert(mode).save(file, kind)
            except (OSError, KeyError):
                continue  # no such mode in this format
            path = write(tmp_path / "a", file.getvalue())
            expected = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
            assert np.array_equal(read_image(path), expected[..., ::-1]), (mode, kind)


def test_the_values_of_a_mask_file_come_in_rgb_and_say_whether_they_are_exact(tmp_path):
    for image in (colours(), np.dstack([colours(), colours()[..., 0]]), colours()[..., 0], DEEP):
        content = tiff(image)
        values, is_lossy = read_values(write(tmp_path / "a.tif", content))
        assert values.dtype == image.dtype and np.array_equal(values, image) and not is_lossy
    palette = Image.fromarray(colours()).quantize(4)
    palette.save(tmp_path / "a.png")
    assert np.array_equal(read_values(tmp_path / "a.png")[0], np.asarray(palette.convert("RGB")))
    for turn in (1, 6):  # with EXIF, a WebP is of another layout
        for kind, options in FORMATS.items():
            path = write(tmp_path / "a", saved(kind, colours(), turn, **options))
            assert read_values(path)[1] == (kind not in LOSSLESS)
        assert read_values(write(tmp_path / "a", saved("WEBP", colours(), turn)))[1]


# Pages and channels


def animation(kind: str, frames: int) -> bytes:
    images = [Image.fromarray(np.roll(colours(), 5 * i, axis=1)) for i in range(frames)]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:], duration=50)
    return file.getvalue()


ANIMATED = ["GIF", "PNG", "WEBP", "TIFF"] + (["AVIF"] if features.check("avif") else [])


@pytest.mark.parametrize("kind", ANIMATED)
def test_a_file_of_several_images_is_refused_with_their_number(tmp_path, kind):
    path = write(tmp_path / "a.stack", animation(kind, 3))
    for read in (read_image, read_mask, read_values):
        with pytest.raises(UserError, match=r"a\.stack holds 3 pages; save the one"):
            read(path)
    with Image.open(path) as image:
        assert image.n_frames == 3
    content = animation(kind, 1)
    if cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None:
        assert read_image(write(path, content)).shape == (32, 48, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_big", [False, True])
def test_the_pages_of_a_tiff_are_counted_without_its_thumbnails(tmp_path, order, is_big):
    small, large = np.zeros((2, 3), np.uint8), np.full((6, 8), 9, np.uint8)
    stack = write(tmp_path / "a.tif", tiff(large, large, small, order=order, is_big=is_big))
    with pytest.raises(UserError, match="holds 3 pages"):
        read_image(stack)
    for kind in (1, 4):  # a thumbnail, a transparency mask
        content = tiff(small, large, tags={254: kind}, order=order, is_big=is_big)
        image = read_image(write(tmp_path / "a.tif", content))
        assert image.shape == (6, 8, 3) and (image == 9).all()


def test_a_loop_of_directories_ends(tmp_path):
    content = tiff(DEEP, DEEP)
    (first,) = struct.unpack_from("<I", content, 4)
    looped = content[:-4] + struct.pack("<I", first)
    assert len(tiff_directories(looped)) == 2
    for broken in (content[: first + 9], content[:4] + b"\xff" * 4, content[:6]):
        assert tiff_directories(broken) == []
        with pytest.raises(UserError, match="not a readable image"):
            read_image(write(tmp_path / "a.tif", broken))


@pytest.mark.parametrize("count", [2, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_channels_that_make_no_picture_are_refused_with_their_number(tmp_path, count, dtype):
    path = write(tmp_path / "a.tif", tiff(np.zeros((6, 8, count), dtype)))
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=rf"a\.tif has {count} channels; save three"):
            read(path)


def test_channels_one_after_the_other_are_read_right_or_refused(tmp_path):
    shallow = colours()
    path = write(tmp_path / "a.tif", tiff(shallow, tags={284: 2}))
    assert np.array_equal(read_image(path), shallow)
    with pytest.raises(UserError, match="one after the other"):  # OpenCV mixes them up
        read_image(write(path, tiff(DEEP, tags={284: 2})))


# Messages


def jpeg_2000_in_cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(colours()).convert("CMYK").save(file, "JPEG2000")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tiff(DEEP.astype(np.float16)), "a TIFF of 16-bit float values, which OpenCV"),
        (tiff(DEEP, tags={339: 5}), "a TIFF of 16-bit complex values"),
        (tiff(colours(), tags={259: 50_000}), "a TIFF of compression 50000"),
        (b"GIF89a", "damaged, cut off"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (tiff(colours())[:60], "damaged, cut off"),
        (b"anything", "damaged, cut off"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_for_what_it_is(tmp_path, content, says):
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=rf"a\.tif is not a readable image \({says}.*; "):
            read(write(tmp_path / "a.tif", content))


def test_how_to_read_a_photo_is_said(tmp_path, without_heic):
    path = write(tmp_path / "a.jpg", b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UserError, match=r"a\.jpg is HEIC; pip install pillow-heif, or save it as"):
        read_image(path)


def test_jpeg_2000_in_cmyk_is_named(tmp_path):
    try:
        content = jpeg_2000_in_cmyk()
    except (OSError, ValueError):
        pytest.skip("Pillow writes none here")
    with pytest.raises(UserError, match="a CMYK JPEG 2000 image"):
        read_image(write(tmp_path / "a.jp2", content))


def test_a_bomb_is_refused_by_its_header_without_a_warning(tmp_path):
    bombs = [tiff(DEEP, tags={256: 20_000, 257: 20_000}), saved("PNG", colours(), 6)]
    size_at = bombs[1].index(b"IHDR") + 4
    bombs[1] = bombs[1][:size_at] + struct.pack(">II", 20_000, 20_000) + bombs[1][size_at + 8 :]
    crc = struct.pack(">I", zlib.crc32(bombs[1][size_at - 4 : size_at + 13]))
    bombs[1] = bombs[1][: size_at + 13] + crc + bombs[1][size_at + 17 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in bombs:
            for read in (read_image, read_mask):
                with pytest.raises(UserError, match="more than 100 megapixels"):
                    read(write(tmp_path / "a", content))


def test_a_transposed_mask_is_put_down_to_the_orientation():
    with pytest.raises(UserError, match=r"is 20x30 but .* is 30x20; .*EXIF orientation"):
        require_equal_sizes(Path("a.jpg"), (30, 20), Path("a.png"), (20, 30))
    with pytest.raises(UserError, match=r"must have its image's size$"):
        require_equal_sizes(Path("a.jpg"), (30, 20), Path("a.png"), (20, 31))
