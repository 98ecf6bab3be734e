"""Segmenting a folder of images: the files written, a second run, and failures."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, snapshot

import test_my_image
from finetuning.basics.files import content_sha256, write_csv
from finetuning.basics.image_files import read_image, read_mask, read_values, write_image
from finetuning.inference import folder_results, segmenting
from finetuning.inference.coco_files import to_polygons
from finetuning.inference.folder_results import (
    RULE_SETTING,
    FolderImage,
    FolderResults,
    image_time,
)
from finetuning.inference.window import Answer
from finetuning.model.model import Segmenter
from finetuning.model.models import load_predictor
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.prompts import make_prompt, mask_box

main = test_my_image.main
OUTPUT = Path("output/my_results/사진")
BOX = (30, 20, 100, 80)


@pytest.fixture
def folder(tmp_path, random_mini, monkeypatch) -> Path:
    """Write three images, and random weights in the place of the fine-tuned ones."""
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    shutil.copy(random_mini, "output/sam2_best.pt")
    for index, name in enumerate(("a.png", "b.jpg", "한글 이름.png")):
        write_image(Path("사진", name), draw_pair(index)[0])
    return Path("사진")


def write_table(text: str) -> Path:
    Path("prompts.csv").write_text(text, encoding="utf-8-sig")
    return Path("prompts.csv")


def boxes_for(*names: str) -> Path:
    """Write a table with the same box in each image."""
    rows = [",".join(map(str, (name, *BOX))) for name in names]
    return write_table("\n".join(["image,x1,y1,x2,y2", *rows]))


def read_rows(file: Path = OUTPUT / "results.csv") -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


def expected(random_mini: Path, image: Path, **prompt) -> tuple[np.ndarray, float]:
    segmenter = Segmenter(load_predictor("mini", random_mini, CPU)[0], torch.float32)
    segmenter.encode(read_image(image))
    return segmenter.segment(make_prompt(**prompt))[:2]


def segment(run_script, folder: Path, *options: object):
    return run_script(main, "--image", folder, "--precision", "float32", *options)


def all_boxes(run_script, folder: Path, *options: object):
    names = [path.name for path in folder.iterdir()]
    return segment(run_script, folder, "--prompts", boxes_for(*names), *options)


def test_each_image_gets_its_files_and_a_row_that_is_true(run_script, folder, random_mini):
    outcome = all_boxes(run_script, folder)
    assert outcome.status == 0, outcome.err
    assert "3 segmented" in outcome.out and str(OUTPUT / "results.csv") in outcome.out
    rows = read_rows()
    assert [row["image"] for row in rows] == ["a.png", "b.jpg", "한글 이름.png"]
    for row in rows:
        mask, score = expected(random_mini, folder / row["image"], box=BOX)
        stem = Path(row["image"]).stem
        assert row["files"] == f"{stem}_overlay.png;{stem}_mask.png"
        assert np.array_equal(read_mask(OUTPUT / f"{stem}_mask.png"), mask)
        assert int(row["area"]) == mask.sum() > 0
        assert tuple(map(int, row["box"].split())) == mask_box(mask)
        assert float(row["score"]) == pytest.approx(score, abs=1e-4)
        assert (row["object"], row["error"]) == ("1", "")
        assert read_image(OUTPUT / f"{stem}_overlay.png").shape == (*mask.shape, 3)


def test_points_labels_and_objects_of_a_table_become_prompts(run_script, folder, random_mini):
    table = write_table(
        "image;x;y;label;object;x1;y1;x2;y2\n"
        "a.png;60;40;1;cell;;;;\n"
        "a.png;;;;;30;20;100;80\n"
        "a.png;3;3;0;cell;;;;\n"
        "b.jpg;50;30;;;;;;\n"
        ";;;;;;;;\n"
        "b.jpg;52;31;;;;;;\n"
    )
    outcome = segment(run_script, folder, "--prompts", table)
    assert outcome.status == 0, outcome.err
    assert "2 segmented, 1 without a row" in outcome.out
    rows = read_rows()
    assert [(row["image"], row["object"]) for row in rows] == [
        ("a.png", "cell"), ("a.png", "1"), ("b.jpg", "1"),
    ]  # fmt: skip
    prompts = {"foreground": [(60, 40)], "background": [(3, 3)]}, {"box": BOX}
    found = [expected(random_mini, folder / "a.png", **prompt) for prompt in prompts]
    assert [int(row["area"]) for row in rows[:2]] == [mask.sum() for mask, _ in found]
    labels, winner = read_values(OUTPUT / "a_labels.png")[0], int(found[1][1] >= found[0][1])
    assert np.array_equal(labels == winner + 1, found[winner][0])
    assert np.array_equal(labels > 0, found[0][0] | found[1][0])
    mask, _ = expected(random_mini, folder / "b.jpg", foreground=[(50, 30), (52, 31)])
    assert np.array_equal(read_mask(OUTPUT / "b_mask.png"), mask)


def count_segmented(monkeypatch) -> list[str]:
    """Return a list that collects the names of the images whose results are added."""
    names, add = [], folder_results.FolderResults.add

    def counted(self, image, *others):
        names.append(image.name)
        add(self, image, *others)

    monkeypatch.setattr(folder_results.FolderResults, "add", counted)
    return names


def test_a_rerun_does_what_is_missing(run_script, folder, monkeypatch):
    all_boxes(run_script, folder)
    segmented = count_segmented(monkeypatch)
    before = snapshot(OUTPUT)
    outcome = all_boxes(run_script, folder)
    assert outcome.status == 0 and "0 segmented, 3 had results" in outcome.out
    assert segmented == [] and snapshot(OUTPUT) == before
    (OUTPUT / "b_overlay.png").unlink()
    all_boxes(run_script, folder)
    assert segmented == ["b.jpg"] and snapshot(OUTPUT) == before
    write_image(folder / "c.png", draw_pair(3)[0])
    all_boxes(run_script, folder)
    assert segmented == ["b.jpg", "c.png"]
    all_boxes(run_script, folder, "--save", "masks,overlays,cutouts")  # more is wanted
    assert segmented[2:] == ["a.png", "b.jpg", "c.png", "한글 이름.png"]
    assert (OUTPUT / "c_1_cutout.png").is_file()


def test_an_image_whose_prompt_has_changed_is_done_again(run_script, folder, monkeypatch):
    all_boxes(run_script, folder)
    segmented = count_segmented(monkeypatch)
    table = boxes_for("a.png", "b.jpg", "한글 이름.png")
    text = table.read_text(encoding="utf-8-sig").replace("b.jpg,30", "b.jpg,31", 1)
    outcome = segment(run_script, folder, "--prompts", write_table(text))
    assert outcome.status == 0 and segmented == ["b.jpg"], outcome.out
    segment(run_script, folder, "--auto", "whole")
    assert segmented[1:] == ["a.png", "b.jpg", "한글 이름.png"]


def test_rows_say_how_an_object_was_found_and_in_which_image(run_script, folder, random_mini):
    all_boxes(run_script, folder)
    digest = content_sha256(Path("output/sam2_best.pt"))
    for row in read_rows():
        height, width = read_image(folder / row["image"]).shape[:2]
        assert (row["status"], row["class"], row["error"]) == ("clicked", "", "")
        assert (row["image_size"], row["model_sha256"]) == (f"{width}x{height}", digest)
        assert row["image_time"] == image_time(folder / row["image"])
    segment(run_script, folder, "--auto", "whole")
    assert {row["status"] for row in read_rows()} == {"automatic"}


def test_a_replaced_image_is_segmented_again(run_script, folder, monkeypatch, random_mini):
    all_boxes(run_script, folder)
    segmented = count_segmented(monkeypatch)
    write_image(folder / "b.jpg", draw_pair(9)[0])
    os.utime(folder / "b.jpg", (1e9, 1e9))  # even an older one
    outcome = all_boxes(run_script, folder)
    assert segmented == ["b.jpg"] and "1 of 3 images with results have changed" in outcome.out
    mask, _ = expected(random_mini, folder / "b.jpg", box=BOX)
    assert np.array_equal(read_mask(OUTPUT / "b_mask.png"), mask)
    assert all_boxes(run_script, folder).out.count("3 had results") == 1 == len(segmented)


def test_results_of_images_that_are_gone_are_dropped_and_their_files_kept_aside(
    run_script, folder, monkeypatch
):
    pytest.importorskip("pycocotools")
    all_boxes(run_script, folder, "--save", "masks,overlays,coco")
    (folder / "b.jpg").unlink()
    (folder / "a.png").rename(folder / "c.png")
    outcome = all_boxes(run_script, folder)
    assert "2 of 3 images with results are gone: a.png, b.jpg" in outcome.out
    assert [row["image"] for row in read_rows()] == ["c.png", "한글 이름.png"]
    for name in ("coco.json", "coco_polygons.json"):  # up to date, though not asked for again
        document = json.loads((OUTPUT / name).read_text(encoding="utf-8"))
        names = [image["file_name"] for image in document["images"]]
        assert names == ["c.png", "한글 이름.png"] and len(document["annotations"]) == 2
    assert not [*OUTPUT.glob("a_*"), *OUTPUT.glob("b_*")]
    gone = {path.name for path in (OUTPUT / "gone").iterdir()}
    assert gone == {f"{stem}_{kind}.png" for stem in "ab" for kind in ("mask", "overlay")}
    (folder / "c.png").unlink()
    outcome = all_boxes(run_script, folder, "--value-range", "0,255", "--overwrite")
    assert "1 of 2 images with results are gone: c.png" in outcome.out
    assert not list(OUTPUT.glob("c_*"))


def test_an_image_that_loses_the_suffix_in_its_results_names_leaves_none_behind(run_script, folder):
    write_image(folder / "b.png", draw_pair(7)[0])
    all_boxes(run_script, folder)
    (folder / "b.png").unlink()
    all_boxes(run_script, folder)
    assert {path.name for path in OUTPUT.glob("b*")} == {"b_mask.png", "b_overlay.png"}


def test_results_of_an_earlier_version_are_continued(run_script, folder, monkeypatch):
    all_boxes(run_script, folder)
    columns = folder_results.EARLIER_COLUMNS
    rows = [[row[column] for column in columns] for row in read_rows()]
    write_csv(OUTPUT / "results.csv", columns, rows)
    segmented = count_segmented(monkeypatch)
    write_image(folder / "c.png", draw_pair(3)[0])
    assert all_boxes(run_script, folder).status == 0 and segmented == ["c.png"]
    times = {row["image"]: row["image_time"] for row in read_rows()}
    assert times["a.png"] == "" and times["c.png"] == image_time(folder / "c.png")
    assert {row["status"] for row in read_rows()} == {"clicked"}


def test_names_in_a_changed_table_move_no_other_file(run_script, folder):
    all_boxes(run_script, folder)
    (folder.parent / "mine_mask.png").write_bytes(b"mine")
    columns = folder_results.RESULT_COLUMNS
    gone = dict.fromkeys(columns, "") | {"image": "z.png", "files": "../../../mine_mask.png"}
    write_csv(OUTPUT / "results.csv", columns, [[gone[column] for column in columns]])
    assert "1 of 1 images with results are gone" in all_boxes(run_script, folder).out
    assert (folder.parent / "mine_mask.png").read_bytes() == b"mine"


def test_writing_the_tables_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(folder_results.time, "monotonic", lambda: now[0])
    results = FolderResults(tmp_path, {"masks"}, {"model": "m", RULE_SETTING: []}, False)
    slow, written = folder_results.write_csv, []

    def write_slowly(*arguments):
        written.append(now[0])
        now[0] += 6.0
        slow(*arguments)

    monkeypatch.setattr(folder_results, "write_csv", write_slowly)
    for number in range(1000):
        results.fail(FolderImage(tmp_path / "a.png", f"{number}.png", str(number)), "none")
        results.write(3.0)
        now[0] += 1.0
    assert len(written) * 6.0 < 0.06 * now[0]
    results.close()
    assert len(read_rows(tmp_path / "results.csv")) == 1000


def test_an_image_that_fails_now_keeps_no_results_of_before(run_script, folder):
    all_boxes(run_script, folder, "--save", "masks,overlays,coco")
    (folder / "b.jpg").write_bytes(b"broken")
    (OUTPUT / "b_overlay.png").unlink()  # so that it is done again
    outcome = all_boxes(run_script, folder, "--save", "masks,overlays,coco")
    assert outcome.status == 1 and not list(OUTPUT.glob("b_*"))
    coco = json.loads((OUTPUT / "coco.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "한글 이름.png"]


def test_a_run_that_was_killed_is_completed_by_the_next(run_script, folder, monkeypatch):
    write = segmenting.FolderResults.write
    monkeypatch.setattr(segmenting, "WRITE_SECONDS", 0)
    segment_prompts = segmenting.segment_prompts

    def killed(segmenter, image, prompts):
        if (OUTPUT / "a_mask.png").is_file():
            monkeypatch.setattr(segmenting.FolderResults, "write", lambda self, after=0: None)
            raise KeyboardInterrupt  # with nothing written any more, as by SIGKILL
        return segment_prompts(segmenter, image, prompts)

    monkeypatch.setattr(segmenting, "segment_prompts", killed)
    assert all_boxes(run_script, folder).status == 130
    assert [row["image"] for row in read_rows()] == ["a.png"]
    monkeypatch.setattr(segmenting.FolderResults, "write", write)
    monkeypatch.setattr(segmenting, "segment_prompts", segment_prompts)
    segmented = count_segmented(monkeypatch)
    assert all_boxes(run_script, folder).status == 0
    assert segmented == ["b.jpg", "한글 이름.png"]
    assert [row["image"] for row in read_rows()] == ["a.png", "b.jpg", "한글 이름.png"]


def test_an_interrupted_run_keeps_its_last_seconds(run_script, folder, monkeypatch):
    segment_prompts, calls = segmenting.segment_prompts, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment_prompts(*arguments)

    monkeypatch.setattr(segmenting, "WRITE_SECONDS", 1000)
    monkeypatch.setattr(segmenting, "segment_prompts", interrupted)
    assert all_boxes(run_script, folder).status == 130
    assert len(read_rows()) == 2


def test_overwrite_does_all_and_removes_what_is_no_longer_so(run_script, folder, monkeypatch):
    all_boxes(run_script, folder)
    segmented = count_segmented(monkeypatch)
    table = write_table("image,x1,y1,x2,y2\na.png,30,20,100,80\na.png,5,5,40,40\n")
    outcome = segment(run_script, folder, "--prompts", table, "--overwrite")
    assert outcome.status == 0 and segmented == ["a.png"]
    assert (OUTPUT / "a_labels.png").is_file() and not (OUTPUT / "a_mask.png").exists()
    assert [row["image"] for row in read_rows()] == ["a.png", "a.png", "b.jpg", "한글 이름.png"]


def test_results_of_another_model_are_not_mixed_in(run_script, folder, monkeypatch):
    all_boxes(run_script, folder)
    before = snapshot(OUTPUT)
    checkpoint = torch.load("output/sam2_best.pt", weights_only=True)
    torch.save({**checkpoint, "epoch": 2}, "output/sam2_best.pt")
    outcome = all_boxes(run_script, folder)
    assert outcome.status == 2 and "made with another model" in outcome.err
    assert snapshot(OUTPUT) == before
    segmented = count_segmented(monkeypatch)
    assert all_boxes(run_script, folder, "--overwrite").status == 0 and len(segmented) == 3
    assert all_boxes(run_script, folder).status == 0 and len(segmented) == 3


def test_what_cannot_be_read_is_named_and_the_others_are_done(run_script, folder, monkeypatch):
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    write_image(folder / "tiny.png", np.zeros((9, 9, 3), np.uint8))  # the box lies outside
    outcome = all_boxes(run_script, folder)
    assert outcome.status == 1
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: 3 image(s) failed: broken.png, phone.heic, tiny.png; ")
    rows = {row["image"]: row for row in read_rows()}
    assert "not a readable image" in rows["broken.png"]["error"]
    assert "lies outside the image" in rows["tiny.png"]["error"]
    assert not any(rows["broken.png"][column] for column in ("object", "score", "area", "files"))
    assert all(rows[name]["files"] for name in ("a.png", "b.jpg", "한글 이름.png"))
    segmented = count_segmented(monkeypatch)
    write_image(folder / "broken.png", draw_pair(5)[0])
    assert all_boxes(run_script, folder).status == 1  # those that failed are tried again
    assert segmented == ["broken.png"]


def test_the_same_stem_keeps_its_suffix_and_folders_below_are_not_read(run_script, tmp_path):
    names = ("a.png", "a.jpg", "a.jpg.png", "b.PNG", "c.jpg", "sub/d.png", ".hidden.png", "e.txt")
    for name in names:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    images = folder_results.list_images(tmp_path / "set")
    assert {image.name: image.stem for image in images} == {
        "a.png": "a.png", "a.jpg": "a.jpg", "a.jpg.png": "a.jpg.png", "b.PNG": "b", "c.jpg": "c",
    }  # fmt: skip


def test_two_images_of_one_stem_have_results_of_their_own(run_script, folder, random_mini):
    write_image(folder / "b.png", draw_pair(7)[0])
    assert all_boxes(run_script, folder).status == 0
    for name in ("b.jpg", "b.png"):
        mask, _ = expected(random_mini, folder / name, box=BOX)
        assert np.array_equal(read_mask(OUTPUT / f"{name}_mask.png"), mask)


def test_sixteen_bits_are_read_as_in_training(run_script, folder, random_mini):
    checkpoint = torch.load("output/sam2_best.pt", weights_only=True)
    torch.save({**checkpoint, "settings": {"value_range": [0, 4095]}}, "output/sam2_best.pt")
    image = draw_pair(0)[0].astype(np.uint16) * 20  # up to 4200
    cv2.imwrite(str(folder / "deep.png"), image[..., ::-1])
    for options, limits in (((), (0, 4095)), (("--value-range", "0,8000"), (0, 8000))):
        outcome = segment(
            run_script, folder, "--prompts", boxes_for("deep.png"), "--overwrite", *options
        )
        assert outcome.status == 0, outcome.err
        segmenter = Segmenter(load_predictor("mini", random_mini, CPU)[0], torch.float32)
        segmenter.encode(read_image(folder / "deep.png", limits))
        mask = segmenter.segment(make_prompt(box=BOX))[0]
        assert np.array_equal(read_mask(OUTPUT / "deep_mask.png"), mask)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,x,y\na.png,5,5\nabsent.png,5,5\n", 'row 3: there is no image "absent.png"'),
        ("image,x,y\na.png,5,\n", 'row 2: x "5", y "": give a number of pixels'),
        ("image,x,y\na.png,5,nan\n", "row 2: "),
        ("image,x,y\na.png,1_0,5\n", 'row 2: x "1_0", y "5": give a number of pixels'),
        ("image,x,y,label\na.png,5,5,2\n", 'row 2: label "2"'),
        ("image,x,y\na.png,5,5\n\nb.jpg,,\n", "row 4: neither a point nor a box"),
        ("image,x1,y1,x2,y2\na.png,50,50,20,80\n", "row 2: the box is empty or has swapped"),
        ("image,x1,y1,x2,y2,object\na.png,1,1,9,9,k\na.png,2,2,9,9,k\n", "row 3: a second box"),
        ("name,x,y\na.png,5,5\n", "row 1: no column image"),
        ("image,x,y\n", "no rows"),
        ("", "row 1: no column image"),
    ],
)
def test_mistakes_in_a_table_are_named_before_anything_is_computed(
    run_script, folder, monkeypatch, table, message
):
    monkeypatch.setattr(test_my_image, "load_segmenters", lambda *_: pytest.fail("computed"))
    outcome = segment(run_script, folder, "--prompts", write_table(table))
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ") and message in outcome.err, outcome.err
    assert not OUTPUT.exists()


def test_a_table_of_another_kind_is_not_overwritten(run_script, folder):
    for text in ("image,IoU\na.png,0.5\n", "anything", "\n".join(read_columns("comment"))):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "results.csv").write_text(text, encoding="utf-8")
        for options in ((), ("--overwrite",)):
            outcome = all_boxes(run_script, folder, *options)
            assert outcome.status == 2 and "choose another --output" in outcome.err
            assert outcome.err.count("\n") == 1
            assert (OUTPUT / "results.csv").read_text(encoding="utf-8") == text


def read_columns(more: str) -> list[str]:
    """Return the lines of a results table with one more column."""
    header = ",".join((*folder_results.EARLIER_COLUMNS, more))
    return [header, "a.png,1,p,0.5,10,1 1 2 2,a_mask.png,,mine"]


def test_names_that_a_spreadsheet_would_run_are_known_again(run_script, folder, monkeypatch):
    (folder / "a.png").rename(folder / "-1+2.png")
    all_boxes(run_script, folder)
    segmented = count_segmented(monkeypatch)
    assert "3 had results" in all_boxes(run_script, folder).out and segmented == []


def test_cutouts_show_the_object_alone(run_script, folder, random_mini):
    outcome = all_boxes(run_script, folder, "--save", "cutouts")
    assert outcome.status == 0, outcome.err
    cutout, _ = read_values(OUTPUT / "a_1_cutout.png")
    image = read_image(folder / "a.png")
    mask, _ = expected(random_mini, folder / "a.png", box=BOX)
    x1, y1, x2, y2 = mask_box(mask)
    inside = mask[y1 : y2 + 1, x1 : x2 + 1]
    assert np.array_equal(cutout[..., 3] == 255, inside)
    assert np.array_equal(cutout[..., 3] == 0, ~inside)
    assert np.array_equal(cutout[inside][:, :3], image[y1 : y2 + 1, x1 : x2 + 1][inside])
    assert not (OUTPUT / "a_mask.png").exists() and not (OUTPUT / "a_overlay.png").exists()


def test_coco_files_hold_the_masks(run_script, folder, random_mini):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    save = ("--save", "masks,coco")
    assert segment(run_script, folder, "--prompts", boxes_for("b.jpg"), *save).status == 0
    assert all_boxes(run_script, folder, *save).status == 0  # b.jpg is read from the file
    for name, least in (("coco.json", 1.0), ("coco_polygons.json", 0.93)):
        coco = COCO(OUTPUT / name)
        assert len(coco.imgs) == len(coco.anns) == 3
        for annotation in coco.anns.values():
            image = coco.imgs[annotation["image_id"]]
            mask, score = expected(random_mini, folder / image["file_name"], box=BOX)
            x1, y1, x2, y2 = mask_box(mask)
            drawn = coco.annToMask(annotation).astype(bool)
            assert (drawn & mask).sum() >= least * (drawn | mask).sum()
            assert annotation["score"] == pytest.approx(score, abs=1e-5)
            assert annotation["bbox"] == [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert (image["width"], image["height"]) == mask.shape[::-1]


def drawn_polygons(mask: np.ndarray) -> np.ndarray:
    """Return what annotation tools draw of a mask's polygons, each of three or more points."""
    coco_mask = pytest.importorskip("pycocotools.mask")
    polygons = to_polygons(mask)
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))) == 1


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def ellipse(size: int, scale: float) -> np.ndarray:
    axes, center = (int(0.4 * scale * size), int(0.3 * scale * size)), (size // 2, size // 2)
    return cv2.ellipse(np.zeros((size, size), np.uint8), center, axes, 30, 0, 360, 1, -1) == 1


def test_polygons_follow_the_edges_of_pixels():
    exact = np.zeros((12, 15), bool)
    exact[2:5, 3:9] = exact[7:9, 1:3] = exact[11, 14] = exact[5:11, 6:8] = True
    assert np.array_equal(drawn_polygons(exact), exact)
    large = ellipse(90, 1)
    assert overlap(drawn_polygons(large), large) >= 0.98
    assert len(to_polygons(large)) == 1 and len(to_polygons(large)[0]) < 100


def test_holes_are_cut_open_and_stay_holes():
    nested = np.zeros((60, 60), bool)
    for edge, value in ((5, True), (15, False), (20, True), (25, False)):
        nested[edge:-edge, edge:-edge] = value
    noise = np.random.default_rng(0).random((40, 50)) > 0.4
    for mask in (nested, noise):
        assert np.array_equal(drawn_polygons(mask), mask)
    ring = ellipse(400, 1) & ~ellipse(400, 0.5)
    ring[150:160, 100:110] = False
    assert overlap(drawn_polygons(ring), ring) >= 0.98
    assert abs(drawn_polygons(ring).sum() / ring.sum() - 1) < 0.005
    assert len(to_polygons(ring)) == 1 and len(to_polygons(ring)[0]) < 800


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("end", [(380, 231), (10, 390), (390, 30)])
def test_thin_parts_are_not_simplified_away(width, end):
    line = cv2.line(np.zeros((400, 400), np.uint8), (10, 10), end, 1, width) == 1
    assert np.array_equal(drawn_polygons(line), line)
    thin_ring = ellipse(300, 1) & ~cv2.erode(ellipse(300, 1).astype(np.uint8), None).astype(bool)
    assert np.array_equal(drawn_polygons(thin_ring), thin_ring)


def test_a_foreign_coco_file_is_not_overwritten(run_script, folder):
    pytest.importorskip("pycocotools")
    for text in ('{"images": [], "annotations": []}', "[]", "no JSON"):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "coco.json").write_text(text, encoding="utf-8")
        outcome = all_boxes(run_script, folder, "--save", "coco")
        assert outcome.status == 2 and "move it away" in outcome.err
        assert (OUTPUT / "coco.json").read_text(encoding="utf-8") == text


def test_a_missing_pycocotools_is_named_first(run_script, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    outcome = all_boxes(run_script, folder, "--save", "coco")
    assert outcome.status == 2 and "--save coco needs pycocotools; pip install" in outcome.err


def test_the_whole_mask_is_what_predict_finds_with_nothing(run_script, folder, random_mini):
    outcome = segment(run_script, folder, "--auto", "whole", "--save", "masks")
    assert outcome.status == 0, outcome.err
    predictor, _ = load_predictor("mini", random_mini, CPU)
    segmenter = Segmenter(load_predictor("mini", random_mini, CPU)[0], torch.float32)
    for row in read_rows():
        image = read_image(folder / row["image"])
        predictor.set_image(image)
        masks, scores, low_res = predictor.predict()
        best = scores.argmax()
        assert float(row["score"]) == pytest.approx(scores[best], abs=1e-4)
        mask = read_mask(OUTPUT / f"{Path(row['image']).stem}_mask.png")
        assert np.array_equal(mask, masks[best].astype(bool))
        segmenter.encode(image)
        logits = segmenter.segment(make_prompt())[2]
        assert np.allclose(logits[0, 0].numpy(), low_res[best], atol=1e-5)
    outcome = run_script(main, "--image", folder / "a.png", "--auto", "whole")  # and of one image
    assert outcome.status == 0 and Path("output/my_results/a_001_mask.png").is_file()


def answers(monkeypatch, *given: Answer) -> list[tuple[str, list[str]]]:
    """Give these answers instead of opening windows; return the list of windows asked for."""
    opened, left = [], list(given)

    def ask(image, title, segmenters, *start):
        opened.append((title, list(segmenters)))
        return left.pop(0)

    monkeypatch.setattr(segmenting, "ask_in_window", ask)
    return opened


def clicked(folder: Path, name: str) -> SegmentedObject:
    mask = np.zeros(read_image(folder / name).shape[:2], bool)
    mask[10:20, 30:50] = True
    return SegmentedObject(make_prompt([(40, 15)]), mask, 0.9)


def test_a_window_opens_for_each_image_until_one_is_left(run_script, folder, monkeypatch):
    of_a, of_korean = clicked(folder, "a.png"), clicked(folder, "한글 이름.png")
    opened = answers(monkeypatch, Answer([of_a, of_a], False), Answer([], False), Answer([], True))
    outcome = segment(run_script, folder)
    assert outcome.status == 0, outcome.err
    assert [title.split(" (")[0] for title, _ in opened] == ["a.png", "b.jpg", "한글 이름.png"]
    assert "1 segmented, 1 skipped" in outcome.out
    rows = read_rows()
    assert [(row["image"], row["object"]) for row in rows] == [("a.png", "1"), ("a.png", "2")]
    assert rows[0]["box"] == "30 10 49 19" and (OUTPUT / "a_labels.png").is_file()

    opened = answers(monkeypatch, Answer([], False), Answer([of_korean], False))
    assert segment(run_script, folder).status == 0
    assert [title.split(" (")[0] for title, _ in opened] == ["b.jpg", "한글 이름.png"]
    assert len(read_rows()) == 3


def test_what_was_clicked_is_written_before_the_next_window(run_script, folder, monkeypatch):
    found = [clicked(folder, "a.png")]

    def ask(image, title, segmenters, *start):
        if not title.startswith("a.png"):
            assert [row["image"] for row in read_rows()] == ["a.png"]
        return SimpleNamespace(objects=found, is_cancelled=not title.startswith("a.png"))

    monkeypatch.setattr(segmenting, "ask_in_window", ask)
    assert segment(run_script, folder).status == 0


def test_the_window_has_the_original_where_it_is_at_hand(
    run_script, folder, random_mini, monkeypatch
):
    image, found = folder / "a.png", clicked(folder, "a.png")
    opened = answers(monkeypatch, *[Answer([found], False)] * 3)
    assert segment(run_script, image).status == 0
    Path("checkpoints").mkdir()
    torch.save(
        {"model": load_predictor("mini", random_mini, CPU)[0].model.state_dict()},
        "checkpoints/sam2_mini.pt",
    )
    outcome = segment(run_script, image)
    assert outcome.status == 0 and "a_002_mask.png" in outcome.out
    assert segment(run_script, image, "--original", "--model", "mini").status == 0
    names = [names for _, names in opened]
    assert names == [["fine-tuned"], ["fine-tuned", "original"], ["original"]]


def test_a_single_image_in_which_nothing_was_clicked_says_so(run_script, folder, monkeypatch):
    answers(monkeypatch, Answer([], True))
    outcome = segment(run_script, folder / "a.png")
    assert outcome.status == 2 and "nothing was clicked" in outcome.err


def test_a_single_image_can_have_cutouts_and_coco_files_too(run_script, folder):
    pytest.importorskip("pycocotools")
    options = ("--box", "30,20,100,80", "--save", "cutouts,coco")
    for number in (1, 2):
        outcome = segment(run_script, folder / "a.png", *options)
        assert outcome.status == 0, outcome.err
        for ending in ("1_cutout.png", "coco.json", "coco_polygons.json"):
            path = Path(f"output/my_results/a_{number:03}_{ending}")
            assert path.is_file() and str(path) in outcome.out
    document = json.loads(Path("output/my_results/a_001_coco.json").read_text(encoding="utf-8"))
    assert document["images"][0]["file_name"] == "a.png" and len(document["annotations"]) == 1


def test_only_a_few_images_are_read_ahead():
    names, read = [str(number) for number in range(20)], []
    ahead = segmenting.read_ahead(names, lambda name: read.append(name) or name)
    for number, (name, future) in enumerate(ahead):
        assert future.result() == name == str(number)
        assert len(read) <= number + 1 + segmenting.READ_AHEAD


def test_results_do_not_go_among_the_images(run_script, folder):
    outcome = all_boxes(run_script, folder, "--output", folder)
    assert outcome.status == 2 and "choose another one for the results" in outcome.err
    outcome = segment(run_script, folder, "--point", "5,5")
    assert outcome.status == 2 and "use --prompts FILE.csv" in outcome.err
    Path("empty").mkdir()
    outcome = segment(run_script, Path("empty"), "--auto", "whole")
    assert outcome.status == 2 and "no images in empty" in outcome.err
