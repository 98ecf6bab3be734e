"""Whole exports of annotation tools: splits, holes, tables of run lengths, and what is left out."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from sam2_utils import UserError

import numpy as np
import pytest

import download_dataset
from finetuning.annotations.reading import Annotations, read_annotations
from finetuning.basics.image_files import write_image
from finetuning.sources.source import Source

pytest.importorskip("pycocotools.mask")
# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (40, 60)
OUTER = [5, 5, 35, 5, 35, 35, 5, 35]  # 900 pixels
INNER = [15, 15, 25, 15, 25, 25, 15, 25]  # 100 pixels
TRIANGLE = [5, 5, 35, 5, 20, 35]
RLE = {"size": list(SIZE), "counts": [400, 80, 1920]}
YOLO_TRIANGLE = "0 0.1 0.1 0.6 0.1 0.3 0.9\n"


def write_photos(folder: Path, *names: str) -> None:
    for name in names:
        write_image(folder / name, np.zeros((*SIZE, 3), np.uint8))


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def coco(*names: str, objects: tuple[dict, ...] = ({"segmentation": [TRIANGLE]},), **more) -> dict:
    """Return a COCO file of images that all have the same objects."""
    return {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "rest"}],
        "annotations": [
            {"id": len(objects) * n + k, "image_id": n, "category_id": 1} | one
            for n in range(len(names))
            for k, one in enumerate(objects)
        ],
    } | more


def read_objects(folder: Path, *objects: dict, **more) -> Annotations:
    """Read a COCO file of one image with these objects."""
    write_photos(folder, "a.png")
    return read_annotations(write(folder / "coco.json", coco("a.png", objects=objects, **more)))


def splits_of(found: Annotations, root: Path) -> dict[str, str | None]:
    return {item.image.relative_to(root).as_posix(): item.split for item in found.images}


def masks_of(found: Annotations) -> list[np.ndarray]:
    return [mask for item in found.images for mask in item.masks(SIZE)]


def roboflow(folder: Path) -> None:
    for split in ("train", "valid"):
        write(folder / split / "_annotations.coco.json", coco("0.jpg", "1.jpg"))
        write_photos(folder / split, "0.jpg", "1.jpg")


def coco_itself(folder: Path) -> None:
    for split in ("train", "val"):
        write(folder / f"annotations/instances_{split}2017.json", coco("0.jpg", "1.jpg"))
        write(folder / f"annotations/captions_{split}2017.json", coco("0.jpg", objects=({},)))
        write_photos(folder / f"{split}2017", "0.jpg", "1.jpg")


def json_above(folder: Path) -> None:
    for split in ("train", "val"):
        write(folder / f"{split}.json", coco("0.jpg", "1.jpg"))
        write_photos(folder / "images" / split, "0.jpg", "1.jpg")


def yolo(folder: Path) -> None:
    for split in ("train", "valid"):
        for name in ("0", "1"):
            write(folder / split / f"labels/{name}.txt", YOLO_TRIANGLE)
            write_photos(folder / split / "images", f"{name}.jpg")
        write(folder / f"{split}.txt", f"./{split}/images/0.jpg\n")
    write(folder / "cells.yaml", "train: ../train/images\nnames: [cell]")


def yolo_by_kind(folder: Path) -> None:
    for split in ("train", "val"):
        for name in ("0", "1"):
            write(folder / "labels" / split / f"{name}.txt", YOLO_TRIANGLE)
            write_photos(folder / "images" / split, f"{name}.jpg")
    write(folder / "obj.names", "cell\n")


EXPORTS = [roboflow, coco_itself, json_above, yolo, yolo_by_kind]


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("option", ["archive", "annotations"])
@pytest.mark.parametrize("export", EXPORTS)
def test_a_ready_split_with_equal_names_is_kept(
    tmp_path, export: Callable[[Path], None], option, is_zip
):
    place = tmp_path / "set"
    export(place)
    if is_zip:
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        place = tmp_path / "set.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(tmp_path).as_posix())
    with Source(**{option: place}).find(tmp_path / "data") as (examples, notes, _):
        found = [(example.split, example.name, example.image.is_file()) for example in examples]
    assert found == [(split, name, True) for split in ("train", "val") for name in "01"]
    assert "4 objects in 4 annotated images (cell 4)" in notes[0]
    assert "ready split: 2 train, 2 val" in notes


def test_files_of_splits_divide_images_of_one_folder(tmp_path):
    write_photos(tmp_path / "images", "a.jpg", "b.jpg")
    write(tmp_path / "train.json", coco("a.jpg"))
    write(tmp_path / "test.json", coco("b.jpg"))
    splits = splits_of(read_annotations(tmp_path), tmp_path / "images")
    assert splits == {"a.jpg": "train", "b.jpg": "test"}


def test_the_file_of_one_split_takes_the_images_of_that_split(tmp_path):
    coco_itself(tmp_path)
    found = read_annotations(tmp_path / "annotations/instances_val2017.json")
    assert splits_of(found, tmp_path / "val2017") == {"0.jpg": None, "1.jpg": None}
    assert not found.unlabelled


def test_an_image_of_another_split_is_not_taken_for_the_one_that_is_named(tmp_path):
    write_photos(tmp_path / "val", "a.jpg", "b.jpg")
    path = write(tmp_path / "coco.json", coco("train/a.jpg", "val/b.jpg"))
    with pytest.raises(UserError, match=r"1 of 2 .*: train/a\.jpg \(.*val/a\.jpg is of another sp"):
        read_annotations(path, tmp_path / "val")
    found = read_annotations(path, tmp_path / "val", skip_missing=True)
    assert splits_of(found, tmp_path) == {"val/b.jpg": None}
    assert not any("by their names alone" in note for note in found.notes)


@pytest.mark.parametrize("export", [roboflow, yolo])
def test_the_annotations_of_one_split_are_not_those_of_another(tmp_path, export):
    place = tmp_path / "test"  # the folder around all says nothing
    export(place)
    with pytest.raises(UserError, match=r"2 of 2 .*valid.* is of another split than .*train"):
        read_annotations(place / "train", place / "valid")
    assert len(read_annotations(place / "train", place / "train").images) == 2


def test_the_file_of_one_split_is_not_read_with_the_folder_of_another(tmp_path):
    coco_itself(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    with pytest.raises(
        UserError, match=r"2 of 2 .*val2017/0\.jpg is of another split than .*train"
    ):
        read_annotations(path, tmp_path / "val2017")


def test_a_text_beside_yolo_files_is_told_and_left_out(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"labels/{name}.txt", YOLO_TRIANGLE)
        write_photos(tmp_path / "images", f"{name}.jpg")
    write(tmp_path / "labels/notes on this.txt", "\nMade by me\n")
    found = read_annotations(tmp_path)
    assert found.notes[1].startswith("left out 1 of 3 .txt files, which are no annotations: notes")


def test_lists_of_images_are_a_ready_split(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.txt", YOLO_TRIANGLE)
        write_photos(tmp_path, f"{name}.jpg")
    write(tmp_path / "train.txt", "data/obj/a.jpg\n")
    write(tmp_path / "valid.txt", "data/obj/b.jpg\n")
    splits = splits_of(read_annotations(tmp_path), tmp_path)
    assert splits == {"a.jpg": "train", "b.jpg": "val"}


def test_images_that_are_found_by_their_names_alone_are_counted(tmp_path):
    write_photos(tmp_path / "photos", "a.jpg", "b.jpg")
    path = write(tmp_path / "coco.json", coco("frames/a.jpg", "b.jpg"))
    (note,) = read_annotations(path, tmp_path / "photos").notes[1:]
    assert note.startswith("1 of 2 images were found by their names alone")
    assert note.endswith("(frames/a.jpg)")


def test_the_file_of_another_split_than_the_images_is_a_warning(tmp_path):
    write_photos(tmp_path / "val", "a.jpg", "b.jpg")
    path = write(tmp_path / "train.json", coco("a.jpg", "b.jpg"))
    assert "warning: train.json is read" in read_annotations(path, tmp_path / "val").notes[1]


def test_labelme_files_in_folders_belong_to_the_images_beside_them(tmp_path):
    shapes = [{"label": "cell", "points": np.reshape(TRIANGLE, (-1, 2)).tolist()}]
    for folder in ("환자 1", "환자 2"):
        write(tmp_path / folder / "0.json", {"imagePath": "0.jpg", "shapes": shapes})
        write_photos(tmp_path / folder, "0.jpg")
    write(tmp_path / "meta.json", {"author": "me"})
    found = read_annotations(tmp_path)
    assert list(splits_of(found, tmp_path)) == ["환자 1/0.jpg", "환자 2/0.jpg"]
    assert "left out 1 of 3 .json files, which are no annotations: meta.json" in found.notes


@pytest.mark.parametrize("is_list", [False, True])
def test_a_json_per_image_is_read_as_sa1b_has_it(tmp_path, is_list):
    objects = [{"segmentation": RLE, "area": 80}, {"segmentation": [TRIANGLE]}]
    for name in ("a", "b"):
        image = {"file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
        write(
            tmp_path / f"{name}.json",
            objects if is_list else {"image": image, "annotations": objects},
        )
        write_photos(tmp_path, f"{name}.jpg")
    found = read_annotations(tmp_path)
    assert (found.format, found.counts) == ("SA-1B", {"object": 4})
    assert masks_of(found)[0].sum() == 80


def test_run_lengths_are_objects_if_all_are_crowds_as_cvat_writes_them(tmp_path):
    crowd = {"segmentation": RLE, "iscrowd": 1}
    triangle = {"segmentation": [TRIANGLE]}
    found = read_objects(tmp_path, crowd, crowd, triangle)
    assert found.counts == {"cell": 3} and found.left_out == {}
    assert found.notes[1].startswith("2 of 3 objects are run lengths with iscrowd 1")
    found = read_objects(tmp_path, crowd, {"segmentation": RLE}, triangle)
    assert found.left_out == {"crowd regions": 1}
    found = read_objects(tmp_path, crowd, triangle, info={"url": "http://cocodataset.org"})
    assert found.left_out == {"crowd regions": 1}


def test_a_part_of_two_points_is_left_out_beside_a_good_one(tmp_path):
    found = read_objects(tmp_path, {"segmentation": [[1, 1, 9, 9], TRIANGLE, []]})
    assert len(masks_of(found)) == 1
    assert "1 of 1 objects have parts of fewer than three points" in found.notes[1]


def test_the_first_ten_mistakes_are_named_at_once(tmp_path):
    bad = [{"segmentation": [[1, 1, 9, 9, n]], "id": n} for n in range(12)]
    with pytest.raises(UserError) as caught:
        read_objects(tmp_path, *bad, {"segmentation": [TRIANGLE]})
    message = str(caught.value)
    assert message.startswith(
        f"12 mistakes in {tmp_path / 'coco.json'}: annotation 0, annotation 1"
    )
    assert (
        "annotation 9: an outline has 5 coordinates" in message and "annotation 10" not in message
    )
    assert message.endswith("and 2 more; correct or delete these")


@pytest.mark.parametrize(
    ("area", "covered", "remark"),
    [
        (800, 800, "1 of 1 objects have holes, which are cut out"),
        (900, 900, None),
        (None, 900, "warning: 1 of 1 objects have an outline inside an outline"),
        (2000, 900, "warning: 1 of 1 objects have an outline inside an outline"),
    ],
)
@pytest.mark.parametrize("polygons", [[OUTER, INNER], [INNER, OUTER]])
def test_a_polygon_in_another_is_a_hole_if_the_stated_area_says_so(
    tmp_path, polygons, area, covered, remark
):
    found = read_objects(tmp_path, {"segmentation": polygons, "area": area})
    (mask,) = masks_of(found)
    assert mask.sum() == covered and mask[20, 20] == (covered == 900)
    assert [note for note in found.notes[1:] if remark is None or remark not in note] == []


@pytest.mark.parametrize(("area", "is_told"), [(450, False), (900, False), (0, False), (150, True)])
def test_a_stated_area_that_is_not_the_drawn_one_is_told(tmp_path, area, is_told):
    found = read_objects(tmp_path, {"segmentation": [TRIANGLE], "area": area})
    told = ['1 of 1 objects cover another area than their "area" states' in n for n in found.notes]
    assert any(told) == is_told  # 900 is the area of the box around it


def shape(points: list[int], label: str = "ring", **more) -> dict:
    return {"label": label, "points": np.reshape(points, (-1, 2)).tolist()} | more


def read_shapes(folder: Path, *shapes: dict) -> Annotations:
    write_photos(folder, "a.jpg")
    return read_annotations(write(folder / "a.json", {"imagePath": "a.jpg", "shapes": shapes}))


@pytest.mark.parametrize("word", ["_background_", "__ignore__"])
def test_labelmes_background_is_cut_out_of_what_is_drawn_before_it(tmp_path, word):
    shapes = [shape(OUTER), shape(INNER, word), shape(TRIANGLE, group_id=1)]
    found = read_shapes(tmp_path, *shapes, shape([50, 30, 59, 30, 59, 39], word))
    first, second = masks_of(found)
    assert first.sum() == 800 and not first[20, 20] and second[20, 20]
    assert found.counts == {"ring": 2} and "1 of 2 objects have holes" in found.notes[1]


def test_a_difficult_shape_of_a_group_is_a_hole_of_xanylabeling(tmp_path):
    hole = shape(INNER, group_id=1, difficult=True)
    (ring,) = masks_of(read_shapes(tmp_path, hole, shape(OUTER, group_id=1, difficult=False)))
    assert ring.sum() == 800
    alone = read_shapes(tmp_path, hole, shape(OUTER, group_id=2))
    assert sorted(mask.sum() for mask in masks_of(alone)) == [100, 900]


def test_outlines_that_are_all_boxes_are_a_warning(tmp_path):
    turned = [20, 5, 35, 20, 20, 35, 5, 20, 20, 5]
    warning = "warning: all 2 outlines are rectangles (boxes)"
    found = read_objects(tmp_path, {"segmentation": [OUTER]}, {"segmentation": [turned]})
    assert found.notes[1].startswith(warning)
    found = read_objects(tmp_path, {"segmentation": [OUTER]}, {"segmentation": [TRIANGLE]})
    assert not any("rectangles" in note for note in found.notes)


TABLES = {
    "Airbus": "ImageId,EncodedPixels\na.jpg,1 3 41 3\na.jpg,81 4\nb.jpg,\n",
    "Severstal": "ImageId,ClassId,EncodedPixels\na.jpg,1,1 3 41 3\na.jpg,2,81 4\nb.jpg,2,-1\n",
    "Severstal first": "ImageId_ClassId,EncodedPixels\na.jpg_1,1 3 41 3\na.jpg_2,81 4\nb.jpg_1,\n",
    "Carvana": "img;rle_mask\na;1 3 41 3\na;81 4\nb;\n",
}


@pytest.mark.parametrize("option", ["pairs", "annotations"])
@pytest.mark.parametrize("kind", TABLES)
def test_run_lengths_of_a_table_go_down_the_columns_from_pixel_1(tmp_path, kind, option):
    write_photos(tmp_path / "images", "a.jpg", "b.jpg")
    table = write(tmp_path / "train.csv", TABLES[kind])
    source = Source(images=tmp_path / "images", **{option: table})
    with pytest.raises(UserError, match=r"1 of 2 images have no object in .*: b\.jpg; .*-unlab"):
        source.find(tmp_path).__enter__()
    classes = ["1", "2"] if "Severstal" in kind else ["object"]
    found = read_annotations(table, tmp_path / "images", classes)
    first, second = masks_of(found)
    assert first.sum() == 6 and first[:3, :2].all() and second.sum() == 4 and second[:4, 2].all()


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("0 3", "row 2: a run starts at pixel 0; count the pixels from 1"),
        ("1 3 5", "row 2: expected pairs of whole numbers"),
        ("9 3 5 2", "row 2: the runs overlap, are out of order or empty"),
        ("1 x", "row 2: expected pairs of whole numbers"),
        ("2399 3", "its runs end at pixel 2401, but the image, 60x40, has 2400"),
        ("1" * 30 + " 1", "more than 12 digits"),
    ],
)
def test_run_lengths_that_cannot_be_right_are_refused(tmp_path, runs, reason):
    write_photos(tmp_path, "a.jpg")
    table = write(tmp_path / "train.csv", f"ImageId,EncodedPixels\na.jpg,{runs}\n")
    with pytest.raises(UserError, match=reason):
        masks_of(read_annotations(table))


def test_a_cell_of_run_lengths_may_be_long(tmp_path):
    write_photos(tmp_path, "a.jpg")
    runs = " ".join(f"{n} 1" for n in range(1, 2400, 2))
    table = write(tmp_path / "train.csv", f"ImageId,EncodedPixels\na.jpg,{' ' * 200_000}{runs}\n")
    assert masks_of(read_annotations(table))[0].sum() == 1200


def test_what_was_drawn_is_not_denied(tmp_path):
    objects = ({"segmentation": [TRIANGLE]}, {"segmentation": [], "category_id": 2})
    write_photos(tmp_path, "a.jpg")
    path = write(tmp_path / "coco.json", coco("a.jpg", objects=objects))
    with pytest.raises(UserError) as caught:
        read_annotations(path, classes=["rest"])
    assert "no outlines of class rest, but other classes (1), boxes without an" in str(caught.value)
    found = read_annotations(path, classes=["cell"])
    assert found.notes[:2] == [
        "COCO: 1 of 2 objects in 1 annotated images (cell 1)",
        "left out 1 of 2 objects: other classes",
    ]


def test_an_archive_of_masks_stays_one_and_has_no_classes(tmp_path):
    for folder in ("images", "masks"):
        write_photos(tmp_path / "set" / folder, "a.png")
    write(tmp_path / "set/boxes.json", {"a": {"bbox": []}})
    with Source(archive=tmp_path / "set").find(tmp_path) as (examples, *_):
        assert [len(example.masks) for example in examples] == [1]
    with pytest.raises(UserError, match="leave --class-name out"):
        Source(archive=tmp_path / "set", class_names=("a",)).find(tmp_path).__enter__()


def test_a_competitions_folder_is_read_as_it_is(tmp_path):
    write_photos(tmp_path / "train_images", "a.jpg", "b.jpg")
    write(tmp_path / "train.csv", "ImageId,EncodedPixels\na.jpg,1 3\nb.jpg,9 4\n")
    write(tmp_path / "README first.txt", "Read me")
    write(tmp_path / "terms.txt", "No")
    write(tmp_path / "sample_submission.csv", "ImageId,EncodedPixels\nc.jpg,1 1\n")
    with Source(archive=tmp_path).find(tmp_path) as (examples, notes, _):
        assert [example.name for example in examples] == ["a", "b"]
    assert notes[0] == "run lengths: 2 objects in 2 annotated images (object 2)"


def test_errors_about_a_zip_name_the_zip(tmp_path):
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/coco.json", json.dumps(coco("a.jpg")))
    with (
        pytest.raises(UserError, match=rf"not in {path}.*: a\.jpg"),
        Source(annotations=path).find(tmp_path),
    ):
        pass


def test_objects_outside_of_their_image_are_counted(tmp_path, capsys):
    outside, names = [-20, 5, -10, 5, -10, 15], ("a.png", "b.png", "c.png")
    write_photos(tmp_path / "images", *names)
    objects = ({"segmentation": [TRIANGLE]}, {"segmentation": [outside]})
    path = write(tmp_path / "coco.json", coco(*names, objects=objects))
    options = {"--images": tmp_path / "images", "--annotations": path, "--data": tmp_path / "data"}
    arguments = [str(part) for option in options.items() for part in option]
    download_dataset.main([*arguments, "--skip-checkpoint", "--copies", "ignore"])
    assert "left out 3 of 6 objects: no pixel of the image is inside" in capsys.readouterr().out


def test_options_of_masks_are_refused_for_outlines(tmp_path, run_script):
    write_photos(tmp_path / "set", "a.jpg", "b.jpg")
    write(tmp_path / "set/coco.json", coco("a.jpg", "b.jpg"))
    options = ("--archive", tmp_path / "set", "--skip-checkpoint", "--data", tmp_path / "data")
    refused = run_script(download_dataset.main, *options, "--mask-value", "1")
    assert refused.status == 2 and "leave the options of masks out" in refused.err


def test_a_broken_json_beside_masks_does_not_hide_what_is_wrong_with_them(tmp_path):
    write_photos(tmp_path / "set/images", "a.png", "b.png")
    write_photos(tmp_path / "set/masks", "a.png")
    write(tmp_path / "set/settings.json", "{")
    with (
        pytest.raises(UserError, match="1 of 2 images have no mask"),
        Source(archive=tmp_path / "set").find(tmp_path),
    ):
        pass
