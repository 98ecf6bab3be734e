"""Files of annotation tools give the outlines that were drawn, or one line that says why not."""

import base64
import copy
import json
import os
import sys
import unicodedata
from pathlib import Path

from sam2_utils import UserError, calculate_iou

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.annotations.outlines import AnnotatedImage, Outline
from finetuning.annotations.reading import Annotations, read_annotations
from finetuning.basics.command_line import brief
from finetuning.basics.image_files import write_image

coco_mask = pytest.importorskip("pycocotools.mask")
# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (40, 60)
SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]
TRIANGLE = [[35, 5], [55, 5], [45, 25]]
OUTSIDE = [[50, 30], [70, 30], [70, 50], [50, 50]]  # partly


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        write_image(folder / name, np.zeros((*SIZE, 3), np.uint8))
    return folder


def flat(points: list[list[float]]) -> list[float]:
    return [value for point in points for value in point]


def annotation(number: int, segmentation, image_id=1, category_id=1, **more) -> dict:
    return {
        "id": number, "image_id": image_id, "category_id": category_id,
        "segmentation": segmentation, **more,
    }  # fmt: skip


def coco(*annotations: dict) -> dict:
    """Return a COCO file of the images a.jpg and b.jpg and the classes cat and dog."""
    return {
        "images": [
            {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for number, name in ((1, "a.jpg"), (2, "b.jpg"))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": list(annotations),
    }


def write_coco(folder: Path, content: object) -> Path:
    write_images(folder, "a.jpg", "b.jpg")
    return write_json(folder / "coco.json", content)


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def shape(points: list, label: str = "cat", kind: str = "polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(*shapes: dict, name: str = "a.jpg") -> dict:
    return {
        "shapes": list(shapes), "imagePath": name, "imageData": None,
        "imageHeight": SIZE[0], "imageWidth": SIZE[1],
    }  # fmt: skip


def write_labelme(folder: Path, *shapes: dict) -> Path:
    return write_json(write_images(folder, "a.jpg") / "a.json", labelme(*shapes))


def line(points: list[list[float]], class_number: int = 0) -> str:
    return " ".join(map(str, [class_number, *(np.array(points) / SIZE[::-1]).ravel()]))


def write_yolo(folder: Path, *lines: str, names: str = "names: [cat, dog]") -> Path:
    write_images(folder / "images", "a.jpg")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/a.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "data.yaml").write_text(names, encoding="utf-8")
    return folder


def masks_of(found: Annotations) -> list[np.ndarray]:
    return [mask for item in found.images for mask in item.masks(SIZE)]


def filled(points: list[list[float]]) -> np.ndarray:
    canvas = np.zeros(SIZE, np.uint8)
    return cv2.fillPoly(canvas, [np.array(points, np.int32)], 1) == 1


def test_the_three_formats_give_the_same_objects(tmp_path):
    outlines = (SQUARE, TRIANGLE, OUTSIDE)
    polygons = [annotation(n, [flat(points)]) for n, points in enumerate(outlines)]
    paths = {
        "COCO": write_coco(tmp_path / "coco", coco(*polygons)),
        "labelme": write_labelme(tmp_path / "labelme", *map(shape, outlines)),
        "YOLO": write_yolo(tmp_path / "yolo", *map(line, outlines)),
    }
    for kind, path in paths.items():
        found = read_annotations(path)
        masks = masks_of(found)
        assert (found.format, found.counts, found.left_out) == (kind, {"cat": 3}, {})
        assert found.images[0].image.name == "a.jpg"
        assert all(mask.shape == SIZE and mask.dtype == bool for mask in masks)
        for mask, points in zip(masks, outlines, strict=True):
            assert calculate_iou(mask, filled(points)) > 0.85  # OpenCV draws the border as well
        if kind != "COCO":
            pairs = zip(masks, masks_of(read_annotations(paths["COCO"])), strict=True)
            assert all(calculate_iou(*pair) > 0.95 for pair in pairs)


def ring() -> np.ndarray:
    mask = filled(SQUARE)
    mask[15:25, 15:25] = False
    return mask


@pytest.mark.parametrize("is_compressed", [True, False])
def test_an_rle_keeps_its_hole(tmp_path, is_compressed):
    columns = ring().ravel(order="F")
    ends = np.flatnonzero(np.diff(columns, append=~columns[-1])) + 1
    rle = {"size": list(SIZE), "counts": np.diff(ends, prepend=0).tolist()}
    if is_compressed:
        rle["counts"] = coco_mask.encode(np.asfortranarray(ring(), np.uint8))["counts"].decode()
    (mask,) = masks_of(read_annotations(write_coco(tmp_path, coco(annotation(1, rle)))))
    assert np.array_equal(mask, ring())


def test_every_compressed_rle_that_pycocotools_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    drawn = [rng.random(SIZE) < share for share in np.linspace(0, 1, 60)]
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in drawn]
    texts = [{"size": list(SIZE), "counts": rle["counts"].decode()} for rle in rles]
    path = write_coco(tmp_path, coco(*(annotation(n, rle) for n, rle in enumerate(texts))))
    for mask, expected in zip(masks_of(read_annotations(path)), drawn, strict=True):
        assert np.array_equal(mask, expected)


def test_the_polygons_of_one_annotation_are_united(tmp_path):
    both = annotation(1, [flat(SQUARE), flat(TRIANGLE)])
    path = write_coco(tmp_path, coco(both, annotation(2, [flat(SQUARE)])))
    united, square = masks_of(read_annotations(path))
    assert united[square].all() and united[8, 45] and not square[8, 45]


def test_classes_are_filtered_by_name(tmp_path):
    dog = annotation(2, [flat(TRIANGLE)], image_id=2, category_id=2)
    path = write_coco(tmp_path, coco(annotation(1, [flat(SQUARE)]), dog))
    found = read_annotations(path, classes=["dog"])
    assert [item.image.name for item in found.images] == ["b.jpg"]
    assert found.counts == {"dog": 1} and found.left_out == {"other classes": 1}
    assert found.unlabelled == []  # a.jpg shows a cat
    with pytest.raises(UserError, match=r"no class bird in .*: cat, dog$"):
        read_annotations(path, classes=["bird"])


def test_what_has_no_outline_is_counted_and_images_without_objects_are_listed(tmp_path):
    path = write_coco(
        tmp_path,
        coco(
            annotation(1, [flat(SQUARE)]),
            annotation(2, []),
            annotation(3, {"size": [1, 1], "counts": [1]}, iscrowd=1),
            annotation(4, {"size": list(SIZE), "counts": [400, 80, 1920]}),
            annotation(5, [flat(SQUARE[:2])]),
        ),
    )
    found = read_annotations(path)
    assert found.left_out == {
        "boxes without an outline": 1,
        "crowd regions": 1,
        "outlines of fewer than three points": 1,
    }
    assert found.unlabelled == [tmp_path / "b.jpg"]
    assert found.notes[:2] == [
        "COCO: 2 of 5 objects in 1 annotated images (cat 2)",
        "left out 1 of 5 objects: boxes without an outline",
    ]


def test_shapes_of_one_label_and_group_are_one_object(tmp_path):
    path = write_labelme(
        tmp_path,
        shape(SQUARE, group_id=3),
        shape(SQUARE, group_id=None),
        shape(TRIANGLE, group_id=3),
        shape(TRIANGLE, label="dog", group_id=3),
    )
    found = read_annotations(path)
    first, *others = masks_of(found)
    assert found.counts == {"cat": 2, "dog": 1} and len(others) == 2
    assert np.array_equal(first, others[0] | others[1])


def test_every_kind_of_labelme_shape_is_drawn_or_counted(tmp_path):
    png = cv2.imencode(".png", ring()[10:31, 10:31].astype(np.uint8))[1].tobytes()
    text = base64.b64encode(png).decode()
    path = write_labelme(
        tmp_path,
        shape([[30, 30], [10, 10]], kind="rectangle"),
        shape([[20, 20], [26, 28]], kind="circle"),
        shape([[10, 10], [30, 30]], kind="mask", mask=text),
        shape([[-10, 25], [10, 45]], kind="mask", mask=text),
        shape([[1, 1]], kind="point"),
        shape([[1, 1], [5, 5]], kind="linestrip"),
    )
    found = read_annotations(path)
    rectangle, circle, mask, cut = masks_of(found)
    disc = cv2.circle(np.zeros(SIZE, np.uint8), (20, 20), 10, 1, -1)
    assert np.count_nonzero(rectangle) == 400 and rectangle[10:30, 10:30].all()
    assert calculate_iou(circle, disc == 1) > 0.9
    assert np.array_equal(mask, ring())
    assert np.array_equal(cut[25:, :11], ring()[10:25, 20:31]) and not cut[:, 11:].any()
    assert found.left_out == {"points and lines": 2}


def test_korean_names_are_found_however_they_are_composed(tmp_path):
    name, label = "대장 용종.jpg", "용종"
    content = coco(annotation(1, [flat(SQUARE)]))
    content["images"][0]["file_name"] = unicodedata.normalize("NFC", name)
    content["categories"][0]["name"] = unicodedata.normalize("NFD", label)
    write_images(tmp_path, unicodedata.normalize("NFD", name))
    found = read_annotations(write_json(tmp_path / "주석.json", content), classes=[label])
    assert found.counts == {label: 1} and len(masks_of(found)) == 1


@pytest.mark.parametrize(
    "written",
    [
        "train/a.jpg",
        "photos/train/a.jpg",
        r"C:\photos\train\a.jpg",
        "../../label-studio/data/media/upload/1/a.jpg",
        "../../label-studio/data/media/upload/1/0123abcd-a.jpg",
        "/data/local-files/?d=photos%2Ftrain/a.jpg",
        "https://host/train%2Fa.jpg?token=1",
    ],
)
def test_images_are_found_by_the_names_that_tools_write(tmp_path, written):
    content = coco(annotation(1, [flat(SQUARE)]))
    content["images"][0]["file_name"] = written
    image = write_images(tmp_path / "pictures", "train/a.jpg") / "train/a.jpg"
    found = read_annotations(write_json(tmp_path / "coco.json", content), tmp_path / "pictures")
    assert [item.image for item in found.images] == [image]


@pytest.mark.parametrize("written", ["../a.jpg", "{folder}/a.jpg", "x/../../a.jpg"])
def test_no_name_leads_out_of_the_image_folder(tmp_path, written):
    content = coco(annotation(1, [flat(SQUARE)]))
    content["images"][0]["file_name"] = written.format(folder=tmp_path)
    write_images(tmp_path, "a.jpg", "pictures/b.jpg")
    with pytest.raises(UserError, match=r"1 of 1 annotated images are not in .*pictures: .*a\.jpg"):
        read_annotations(write_json(tmp_path / "coco.json", content), tmp_path / "pictures")


def test_two_images_of_the_same_name_are_told_apart_or_refused(tmp_path):
    write_images(tmp_path, "train/a.jpg", "val/a.jpg")
    content = coco(annotation(1, [flat(SQUARE)]))
    content["images"][0]["file_name"] = "val/a.jpg"
    found = read_annotations(write_json(tmp_path / "coco.json", content))
    assert found.images[0].image == tmp_path / "val/a.jpg"
    content["images"][0]["file_name"] = "a.jpg"
    with pytest.raises(UserError, match=r"train/a\.jpg and val/a\.jpg .* could both be a\.jpg"):
        read_annotations(write_json(tmp_path / "coco.json", content))


def test_missing_images_are_named_and_counted(tmp_path):
    for number in range(5):
        write_json(tmp_path / f"{number}.json", labelme(shape(SQUARE), name=f"{number}.jpg"))
    with pytest.raises(UserError, match=r"^5 of 5 annotated images .*: 0\.jpg, 1\.jpg, .*4\.jpg;"):
        read_annotations(tmp_path, skip_missing=True)
    write_images(tmp_path, "3.jpg")
    with pytest.raises(UserError, match=r"^4 of 5 annotated images .*--skip-missing$"):
        read_annotations(tmp_path)
    found = read_annotations(tmp_path, skip_missing=True)
    assert [item.image.name for item in found.images] == ["3.jpg"]
    assert found.left_out == {"their image is not there": 4}
    assert f"left out 4 of 5 annotated images, which are not in {tmp_path}" in found.notes


@pytest.mark.parametrize("written", ["a.heic", "photos/a.heic", None])
def test_an_annotated_photo_is_found_and_so_is_what_it_was_saved_as(tmp_path, written):
    (tmp_path / "a.heic").write_bytes(b"ftypheic")
    path = write_json(tmp_path / "a.json", labelme(shape(SQUARE), name=written))
    assert read_annotations(path).images[0].image == tmp_path / "a.heic"
    (tmp_path / "a.heic").unlink()
    write_images(tmp_path, "a.jpg")
    assert read_annotations(path).images[0].image == tmp_path / "a.jpg"


def test_an_image_that_is_annotated_twice_is_refused(tmp_path):
    write_json(tmp_path / "b.json", labelme(shape(TRIANGLE)))
    path = write_labelme(tmp_path, shape(SQUARE))
    with pytest.raises(UserError, match=r"a\.jpg is annotated twice, in .*a\.json and .*b\.json"):
        read_annotations(path.parent)


def test_a_labelme_file_whose_image_was_renamed_is_paired_by_its_own_name(tmp_path):
    write_images(tmp_path, "a.png")
    path = write_json(tmp_path / "a.json", labelme(shape(SQUARE), name="IMG_1234.jpg"))
    assert read_annotations(path).images[0].image == tmp_path / "a.png"


@pytest.mark.parametrize("names", ["names: [cat, dog]", "names:\n  0: cat\n  1: dog", ""])
@pytest.mark.parametrize("start", ["", "labels", "labels/train"])
def test_yolo_folders_are_read_from_any_of_their_levels(tmp_path, names, start):
    for split in ("train", "val"):  # in which the names may be the same
        write_images(tmp_path / "images" / split, "a.jpg", "b.jpg")
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "a.txt").write_text(line(SQUARE, 1) + "\n\n")
        (tmp_path / "labels" / split / ".hidden.txt").write_text("?")
        (tmp_path / "labels" / split / "b.txt").write_text("")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "notes.json").write_text("{}")
    if names:
        (tmp_path / "data.yaml").write_text(names)
    found = read_annotations(tmp_path / start)
    splits = ["train"] if "train" in start else ["train", "val"]
    folder = tmp_path / "images"
    assert [item.image for item in found.images] == [folder / split / "a.jpg" for split in splits]
    assert found.unlabelled == [folder / split / "b.jpg" for split in splits]
    assert found.counts == {"dog": len(splits)}


def test_classes_without_names_are_called_by_their_numbers(tmp_path):
    found = read_annotations(write_yolo(tmp_path, line(SQUARE, 7), names="names: [cat]"))
    assert found.counts == {"7": 1}


def test_coco_is_found_in_the_folder_that_cvat_exports(tmp_path):
    write_images(tmp_path / "images", "a.jpg")
    write_json(tmp_path / "annotations/instances.json", coco(annotation(1, [flat(SQUARE)])))
    for path in (tmp_path, tmp_path / "annotations", tmp_path / "annotations/instances.json"):
        assert read_annotations(path).images[0].image == tmp_path / "images/a.jpg"


def test_a_size_that_is_not_the_images_is_refused(tmp_path):
    (item,) = read_annotations(write_labelme(tmp_path, shape(SQUARE))).images
    with pytest.raises(UserError, match=r"a\.jpg is 50x40 but .*a\.json states 60x40; annotate"):
        list(item.masks((40, 50)))
    with pytest.raises(UserError, match="EXIF orientation"):
        list(item.masks(SIZE[::-1]))


@pytest.mark.parametrize(("width", "size"), [(60.0, SIZE), (0, None), (None, None)])
def test_a_stated_width_is_taken_as_it_is_meant(tmp_path, width, size):
    path = write_coco(tmp_path, changed("images/0/width", width))
    assert read_annotations(path).images[0].size == size


def test_masks_are_drawn_one_at_a_time():
    outlines = [Outline([np.array(SQUARE, float)])] * 10**6
    masks = AnnotatedImage(Path("a.jpg"), outlines, None, Path("a.json")).masks((3000, 3000))
    assert next(masks).sum() == 400


def test_a_missing_pycocotools_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match="--annotations needs pycocotools; pip install"):
        read_annotations(tmp_path)


def changed(path: str, value: object) -> dict:
    """Return a COCO file of one object in which one value, named as in a/0/b, is another."""
    content = coco(annotation(1, [flat(SQUARE)]))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    target = content
    for key in parents:
        target = target[key]
    target[last] = value
    return content


SEGMENTATION = "annotations/0/segmentation"
BAD_COCO = {
    "images is a number": changed("images", 3),
    "an image is a number": changed("images/0", 3),
    "no file name": changed("images/0/file_name", None),
    "ids that are lists": changed("images/0/id", []),
    "two images of one id": changed("images/1/id", 1),
    "the same file twice": changed("images/1/file_name", "a.jpg")
    | {"annotations": [annotation(n, [flat(SQUARE)], image_id=n) for n in (1, 2)]},
    "negative size": changed("images/0/width", -60),
    "half a pixel": changed("images/0/width", 60.5),
    "endless size": changed("images/0/width", 10**3000),
    "size of the RLE": changed(SEGMENTATION, {"size": [2, 2], "counts": [4]}),
    "annotations is a text": changed("annotations", "none"),
    "no image_id": changed("annotations/0/image_id", None),
    "unknown image": changed("annotations/0/image_id", 9),
    "unknown category": changed("annotations/0/category_id", 9),
    "a name over two lines": changed("images/0/file_name", "a\nb.jpg"),
    "half a character": changed("images/0/file_name", "\ud800.jpg"),
    "segmentation is a number": changed(SEGMENTATION, 3),
    "odd": changed(SEGMENTATION, [[1, 1, 9, 9, 1, 9, 5]]),
    "two points": changed(SEGMENTATION, [[1, 1, 9, 9]]),
    "NaN": changed(SEGMENTATION, [[1, 1, 9, 9, 1, float("nan")]]),
    "an empty text": changed(SEGMENTATION, [""]),
    "texts": changed(SEGMENTATION, [[1, 1, 9, 9, 1, "2"]]),
    "huge": changed(SEGMENTATION, [[1, 1, 9, 9, 1, 10**400]]),
    "far outside": changed(SEGMENTATION, [[1, 1, 900, 9, 1, 9]]),
    "endless": changed(SEGMENTATION, [[-60, 0, 120, 9] * 9000]),
    "negative runs": changed(SEGMENTATION, {"size": list(SIZE), "counts": [2401, -1]}),
    "too few runs": changed(SEGMENTATION, {"size": list(SIZE), "counts": [5]}),
    "runs that are texts": changed(SEGMENTATION, {"size": list(SIZE), "counts": ["2400"]}),
    "no counts": changed(SEGMENTATION, {"size": list(SIZE)}),
    "size is a number": changed(SEGMENTATION, {"size": 3, "counts": [5]}),
    "size of zero": changed(SEGMENTATION, {"size": [0, 0], "counts": []}),
    # pycocotools itself writes past its memory here, and the process dies
    "a crafted RLE": changed(SEGMENTATION, {"size": list(SIZE), "counts": "0" * 5000 + "o"}),
    "a RLE of Korean": changed(SEGMENTATION, {"size": list(SIZE), "counts": "용종"}),
    "only boxes": changed(SEGMENTATION, []),
    "no objects": changed("annotations", []),
}
BAD_TEXT = {
    "cut off": b'{"images": [',
    "UTF-16": '{"images": []}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "a huge number": b"[" + b"1" * 10_000 + b"]",
    "another kind": b'{"type": "FeatureCollection"}',
    "a list": b"[]",
    "empty": b"",
}
BAD_SHAPES = {
    "no label": {"points": SQUARE},
    "points is a number": shape(3),
    "a point is a number": shape([3, 4, 5]),
    "points of three": shape([[1, 2, 3]] * 3),
    "two points": shape(SQUARE[:2]),
    "a rectangle of one point": shape(SQUARE[:1], kind="rectangle"),
    "a circle of texts": shape([["1", 1], [2, 2]], kind="circle"),
    "a huge circle": shape([[0, 0], [1e300, 1e300]], kind="circle"),
    "a mask without a mask": shape(SQUARE[:2], kind="mask"),
    "a mask that is no PNG": shape(SQUARE[:2], kind="mask", mask="abc"),
    "a group that is a list": shape(SQUARE, group_id=[1]),
    "only points": shape([[1, 1]], kind="point"),
    "a number": 3,
}
BAD_LINES = {
    "underscores": "0 0.1 0.1 0_0.5 0.1 0.5 0.5",
    "boxes": "0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.1 0.1",
    "odd": "0 0.1 0.1 0.5 0.1 0.3 0.5 0.2",
    "two points": "0 0.1 0.1",
    "words": "This data set holds cats",
    "NaN": "0 0.1 0.1 0.5 0.1 0.3 nan",
    "pixels": "0 10 10 30 10 20 30",
    "a class of nan": "nan 0.1 0.1 0.5 0.1 0.3 0.5",
    "a class of inf": "inf 0.1 0.1 0.5 0.1 0.3 0.5",
    "a class of a half": "0.5 0.1 0.1 0.5 0.1 0.3 0.5",
    "empty": "",
}


def assert_refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        masks_of(read_annotations(path))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500 and str(path) in message
    return message


@pytest.mark.parametrize("kind", BAD_COCO)
def test_bad_coco_is_refused_in_one_line(tmp_path, kind):
    message = assert_refused(write_coco(tmp_path, BAD_COCO[kind]).parent)
    assert ("holds boxes (detection)" in message) == (kind == "only boxes")


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_what_is_no_annotation_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "coco.json"
    path.write_bytes(BAD_TEXT[kind])
    assert_refused(path)


@pytest.mark.parametrize("kind", BAD_SHAPES)
def test_bad_labelme_is_refused_in_one_line(tmp_path, kind):
    assert_refused(write_labelme(tmp_path, BAD_SHAPES[kind]))


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_yolo_is_refused_in_one_line(tmp_path, kind):
    message = assert_refused(write_yolo(tmp_path, BAD_LINES[kind]))
    assert kind in ("boxes", "two points", "empty") or "a.txt, line 1" in message
    assert kind != "boxes" or "holds boxes (detection), not outlines" in message


@pytest.mark.parametrize("names", ["names: [", "a: " + "[" * 600, "\0"])
def test_a_broken_data_yaml_is_refused_in_one_line(tmp_path, names):
    assert "data.yaml" in assert_refused(write_yolo(tmp_path, line(SQUARE), names=names))


def test_other_formats_are_told_how_to_be_exported(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<annotation/>")
    for given_path in (path, tmp_path):
        assert "Pascal VOC XML" in assert_refused(given_path)
    assert "no such file or folder" in assert_refused(tmp_path / "absent")
    write_coco(tmp_path, coco(annotation(1, [flat(SQUARE)])))
    write_json(tmp_path / "b.json", labelme(shape(SQUARE), name="b.jpg"))
    assert "files of labelme (b.json) and COCO (coco.json)" in assert_refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("용종 1.jpg", "용종 1.jpg"),
        (Path("a/b.jpg"), "a/b.jpg".replace("/", os.sep)),
        (7, "7"),
        ("a\nb", r"'a\nb'"),
        ("a\u202eb", r"'a\u202eb'"),  # turns the writing round
        ("a\x85b", r"'a\x85b'"),  # a control character of C1
        ("\ud800", r"'\ud800'"),
        ("a" * 100, "a" * 100),
        ("a" * 101, "a" * 100 + "..."),
    ],
)
def test_a_name_is_quoted_in_one_line(name, text):
    assert brief(name) == text and text.isprintable()


RING = coco_mask.encode(np.asfortranarray(ring(), np.uint8))["counts"].decode()
VALID = coco(
    annotation(1, [flat(SQUARE), flat(TRIANGLE)]),
    annotation(2, {"size": list(SIZE), "counts": [400, 80, 1920]}, image_id=2),
    annotation(3, {"size": list(SIZE), "counts": RING}, image_id=2, category_id=2),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 10**30, 1e308, "a.jpg", "o", "0o", "..", "\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


def mutate(data, content: object) -> None:
    """Delete or replace a value somewhere in a JSON document."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = data.draw(st.sampled_from(keys))
        inner = content[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 9)):
            content = inner
            continue
        if data.draw(st.booleans()):
            del content[key]
        else:
            content[key] = data.draw(values)
        return


def assert_read_or_refused(path: Path) -> None:
    try:
        found = read_annotations(path)
        masks = masks_of(found)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert len(masks) == sum(found.counts.values()) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of the fuzz tests, of which each example overwrites the last."""
    return tmp_path_factory.mktemp("fuzz")


fuzz = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@fuzz
@given(st.data(), st.integers(1, 3))
def test_whatever_is_changed_in_coco_it_is_read_or_refused(folder, data, count):
    content = copy.deepcopy(VALID)
    for _ in range(count):
        mutate(data, content)
    path = folder / "coco.json"
    if not path.exists():
        write_coco(folder, VALID)
        assert len(masks_of(read_annotations(path))) == 3
    path.write_text(json.dumps(content))
    assert_read_or_refused(path)


numbers = st.floats(-0.2, 1.2).map(str) | st.sampled_from(["0", "1", "nan", "-1e400", "9" * 400])
yolo_lines = st.lists(numbers, max_size=9).map(" ".join).map(str.encode)


@fuzz
@given(st.lists(yolo_lines | st.just(line(SQUARE).encode()) | st.binary(max_size=20), max_size=4))
def test_whatever_is_in_yolo_it_is_read_or_refused(folder, lines):
    path = folder / "yolo"
    if not path.exists():
        write_yolo(path, line(SQUARE))
        assert len(masks_of(read_annotations(path))) == 1
    (path / "labels/a.txt").write_bytes(b"\n".join(lines))
    assert_read_or_refused(path)


@fuzz
@given(st.text(st.characters(min_codepoint=48, max_codepoint=112), max_size=40))
def test_no_compressed_rle_brings_the_process_down(folder, counts):
    path = folder / "rle/coco.json"
    if not path.exists():
        write_coco(path.parent, VALID)
    content = coco(annotation(1, {"size": list(SIZE), "counts": RING + counts}))
    path.write_text(json.dumps(content))
    assert_read_or_refused(path)
