"""Masks find their images in folders as people have them; what could be either's is refused."""

import unicodedata
import zipfile
from pathlib import Path

from sam2_utils import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.sources.name_matching import match_names
from finetuning.sources.pair_tables import read_pairs_file
from finetuning.sources.pairing import find_examples, find_in_folder

every_time = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def touch(folder: Path, *names: str) -> Path:
    """Write empty files, with the folders they are in."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def two_folders(folder: Path, images: str, masks: str) -> tuple[Path, Path]:
    """Write the files named in two lines into images/ and masks/."""
    for kind, names in (("images", images), ("masks", masks)):
        (folder / kind).mkdir(exist_ok=True)
        touch(folder / kind, *names.split())
    return folder / "images", folder / "masks"


def described(found) -> list[str]:
    """Return a line for each example: its split, its name and its masks."""
    return [
        " ".join([*([e.split] if e.split else []), e.name, *(mask.name for mask in e.masks)])
        for e in found.examples
    ]


def refusal(find, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        find(*arguments, **options)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    assert "keep one" not in str(error.value) and "delete" not in str(error.value)
    return str(error.value)


# By name


@pytest.mark.parametrize(
    ("images", "masks", "partners", "note"),
    [
        ("a.jpg b.png", "b.png a.tif", "a a.tif, b b.png", ""),
        ("IMG_1.JPG IMG_2.JPG", "img_1.png img_2.png", "IMG_1 img_1.png, IMG_2 img_2.png", "case"),
        ("x1.jpg x2.jpg", "x1_mask.png x2_mask.png", "x1 x1_mask.png, x2 x2_mask.png", "NAME_mask"),
        ("1.jpg 11.jpg", "mask_11.png mask_1.png", "1 mask_1.png, 11 mask_11.png", "mask_NAME"),
        ("a.jpg b.jpg", "a.jpg.png b.jpg.png", "a a.jpg.png, b b.jpg.png", "NAME.jpg"),
        ("1.jpg 2.jpg", "m1_seg.png m2_seg.png", "1 m1_seg.png, 2 m2_seg.png", "mNAME_seg"),
        ("A_1.jpg A_2.jpg", "a_1_Mask.png a_2_mask.png", "A_1 a_1_Mask.png, A_2 a_2_mask.png", ""),
        ("x_sat.jpg y_sat.jpg", "x_mask.png y_mask.png", "x_sat x_mask.png, y_sat y_mask.png",
         "masks are called NAME_mask, images NAME_sat"),
        ("image_7.jpg image_17.jpg", "mask_7.png mask_17.png",
         "image_17 mask_17.png, image_7 mask_7.png", "mask_NAME"),
        ("b_1_8_leftImg8bit.png b_2_8_leftImg8bit.png",
         "b_1_8_gtFine_labelIds.png b_2_8_gtFine_labelIds.png",
         "b_1_8_leftImg8bit b_1_8_gtFine_labelIds.png, b_2_8_leftImg8bit b_2_8_gtFine_labelIds.png",
         "gtFine"),
        ("id1.png id2.png", "id1_0.png id1_10.png id1_9.png id2_0.png",
         "id1 id1_0.png id1_9.png id1_10.png, id2 id2_0.png", "1 to 3 masks per image"),
        ("a.png b.png", "a_mask.png a_mask_1.png a_mask_2.png b_mask.png",
         "a a_mask.png a_mask_1.png a_mask_2.png, b b_mask.png", "NAME_mask and a number"),
        ("p_1.png p_2.png", "m_1-0.png m_1-1.png m_2-0.png",
         "p_1 m_1-0.png m_1-1.png, p_2 m_2-0.png", "images p_NAME"),
        ("a.png a_1.png", "a.png a_1.png a_1_1.png", "a a.png, a_1 a_1.png a_1_1.png", ""),
        ("b.png b_.png", "b-0.png b_-0.png b_-1.png", "b b-0.png, b_ b_-0.png b_-1.png", "NAME"),
        ("사진1.jpg 사진2.jpg", "사진1_마스크.png 사진2_마스크.png",
         "사진1 사진1_마스크.png, 사진2 사진2_마스크.png", "NAME_마스크"),
    ],
)  # fmt: skip
def test_masks_find_their_images_by_name(tmp_path, images, masks, partners, note):
    found = find_examples(*two_folders(tmp_path, images, masks))
    assert described(found) == partners.split(", ")
    assert note in "; ".join(found.notes)
    assert found.notes or "_1" in masks or masks == "b.png a.tif"


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("scan0.png scan1.png scan2.png", "task-0-annotation-70-by-1-tag-polyp-0.png "
         "task-1-annotation-71-by-1-tag-polyp-0.png task-2-annotation-72-by-1-tag-polyp-0.png"),
        ("img10.jpg img11.jpg", "img20.png img21.png"),
        ("p1_s1.jpg p1_s2.jpg", "p2_s1.png p2_s2.png"),
        ("t5_1.jpg t5_2.jpg", "u6_1.png u6_2.png"),
        ("p1_s1.jpg p1_s2.jpg p1_s3.jpg p1_s9.jpg", "p2_s1.png p2_s2.png p2_s3.png"),
        ("1.jpg 2.jpg", "11.png 12.png"),
        ("1.jpg 2.jpg", "2_1.png 2_2.png"),
        ("cat.jpg cot.jpg", "bat.png bot.png"),
        ("a.jpg a_1.jpg", "a_0.png a_1.png a_1_0.png"),
        ("a.jpg a_1.jpg", "a_0.png a_1.png"),
        ("s_1.jpg s_2.jpg s_a1.jpg s_a2.jpg", "m_a1.png m_a2.png"),
        ("a.jpg b.jpg", "a.png b.png c.png"),
        ("a.jpg b.jpg", "a_mask.png b_mask.png thumb.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("skip_unlabelled", [False, True])
def test_what_may_be_luck_is_refused_with_names_and_advice(
    tmp_path, images, masks, skip_unlabelled
):
    error = refusal(find_examples, *two_folders(tmp_path, images, masks), skip_unlabelled)
    assert "--pairs FILE.csv (image,mask)" in error
    assert any(name.split(".")[0] in error for name in images.split())
    assert any(name.split(".")[0] in error for name in masks.split())


def test_a_stray_mask_among_many_is_named(tmp_path):
    numbers = range(40)
    images = " ".join(f"x{i}.jpg" for i in numbers)
    masks = " ".join(f"x{i}_mask.png" for i in numbers) + " overview.png"
    error = refusal(find_examples, *two_folders(tmp_path, images, masks))
    assert "belong to: overview.png; " in error


def test_images_without_masks_are_named_or_left_out(tmp_path):
    folders = two_folders(tmp_path, "a.jpg b.jpg c.jpg d.jpg", "a_mask.png b_mask.png c_mask.png")
    error = refusal(find_examples, *folders)
    assert "1 of 4 images have no mask: d.jpg" in error and "a_mask.png" in error
    assert "--skip-unlabelled" in error and "--pairs FILE.csv (image,mask)" in error
    found = find_examples(*folders, skip_unlabelled=True)
    assert [example.name for example in found.examples] == ["a", "b", "c"]
    assert "left out 1 image without a mask" in found.notes


numbers = st.integers(0, 200)
stems = st.one_of(
    st.text("ab1_", min_size=1, max_size=4),
    st.builds("{}{}".format, st.sampled_from(["", "img", "img_", "s"]), numbers),
    st.builds("p{}_s{}".format, st.integers(1, 2), st.integers(1, 12)),
    st.builds("{}{}".format, st.sampled_from(["가", "가나", "나_"]), st.sampled_from("12_")),
)
affixes = st.one_of(
    st.sampled_from(["", "_mask", "m_", "mask_", "_sat", "_0", "-1", "가", "2_", "_"]),
    st.text("a1_", max_size=2),
)
names = st.sets(stems, min_size=1, max_size=7).map(sorted)
others = st.sets(stems, max_size=3)


def is_right_or_refused(images: list[str], truth: dict[str, str]) -> bool:
    try:
        owners, _ = match_names(images, list(truth))
    except UserError as error:
        return "--pairs" in str(error)
    return owners in ({}, truth)


@every_time
@given(names, others, affixes, affixes, affixes, affixes)
def test_a_constant_affix_is_found_or_refused_and_never_mistaken(names, others, p, s, own_p, own_s):
    truth = {p + name + s: own_p + name + own_s for name in names}
    images = [own_p + name + own_s for name in sorted({*names, *others})]
    assert is_right_or_refused(images, truth)
    assert is_right_or_refused(list(truth.values()), truth)


@every_time
@given(names, others, affixes, st.sampled_from(["_", "-", "_mask_", " ("]), st.integers(1, 3))
def test_numbered_masks_are_found_or_refused_and_never_mistaken(names, others, p, s, most):
    end = ")" if "(" in s else ""
    counts = {name: 1 + index % most for index, name in enumerate(names)}
    truth = {f"{p}{name}{s}{i}{end}": name for name in names for i in range(counts[name])}
    assert is_right_or_refused(names, truth)
    if "mask" in s:
        assert is_right_or_refused(sorted({*names, *others}), truth)


@every_time
@given(names, others)
def test_equal_names_always_win(names, others):
    images = sorted({*names, *others})
    assert match_names(images, names)[0] == {name: name for name in names}


@pytest.mark.parametrize("prefix, suffix", [("", "_mask"), ("mask_", ""), ("m", "_seg")])
def test_the_usual_affixes_are_not_refused_for_any_numbers(prefix, suffix):
    names = [f"{number}" for number in (*range(12), 100, 101, 110)]
    truth = {prefix + name + suffix: name for name in names}
    assert match_names(names, list(truth))[0] == truth
    truth = {prefix + name + suffix: f"image_{name}" for name in names}
    assert match_names(list(truth.values()), list(truth))[0] == truth


# One folder for both


@pytest.mark.parametrize(
    ("files", "partners"),
    [
        ("a.jpg a.png b.JPG b.png", "a a.png, b b.png"),
        ("a.jpg a_mask.jpg b.png b_mask.png", "a a_mask.jpg, b b_mask.png"),
        ("1.png 1_mask_0.png 1_mask_1.png 2.png 2_mask_0.png",
         "1 1_mask_0.png 1_mask_1.png, 2 2_mask_0.png"),
        ("x_sat.jpg x_mask.png y_sat.jpg y_mask.png", "x_sat x_mask.png, y_sat y_mask.png"),
        ("0_img.png 0_masks.png 1_img.png 1_masks.png", "0_img 0_masks.png, 1_img 1_masks.png"),
        ("gt_1.tif gt_2.tif im_1.tif im_2.tif", "im_1 gt_1.tif, im_2 gt_2.tif"),
        ("image1.png image2.png label1.png label2.png", "image1 label1.png, image2 label2.png"),
    ],
)  # fmt: skip
def test_images_and_masks_in_one_folder_are_told_apart(tmp_path, files, partners):
    touch(tmp_path / "all", *files.split())
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / ".." / "all"  # spelled in another way
    assert described(find_examples(tmp_path / "all", same)) == partners.split(", ")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ("a.jpg a.png a.bmp b.jpg b.png", "a.bmp, a.jpg"),
        ("a.png a.bmp", "a.bmp, a.png"),
        ("a.jpg a.jpeg a.png", "a.jpeg, a.jpg"),
        ("a.jpg b.jpg c.jpg", "a.jpg, b.jpg, c.jpg"),
        ("x.png x_1.png y.png y_1.png", "x.png"),
        ("0_a.png 0_b.png 1_a.png 1_b.png", "0_a.png"),
        ("mask_1.png mask_2.png mask_3.png", "mask_1.png"),
    ],
)
def test_one_folder_that_does_not_tell_them_apart_is_refused(tmp_path, files, named):
    touch(tmp_path, *files.split())
    error = refusal(find_examples, tmp_path, tmp_path)
    assert named in error and "folder of" in error and "--pairs FILE.csv" in error


def test_two_images_of_one_stem_are_both_named(tmp_path):
    error = refusal(find_examples, *two_folders(tmp_path, "a.jpg a.png b.jpg", "a.png b.png"))
    assert "a.jpg, a.png" in error and "--pairs" in error


# Folders


def write_split(folder: Path, pattern: str, *splits: str) -> Path:
    for split in splits:
        for kind in ("images", "masks"):
            touch(folder, pattern.format(split=split, kind=kind) + "/a.png")
    return folder


@pytest.mark.parametrize("pattern", ["{kind}/{split}", "{split}/{kind}", "x/y/{split}/{kind}"])
def test_a_ready_split_is_kept(tmp_path, pattern):
    found = find_in_folder(write_split(tmp_path, pattern, "Train", "validation", "test"))
    assert described(found) == ["test a a.png", "train a a.png", "val a a.png"]
    assert "ready split: 1 train, 1 val, 1 test" in found.notes


def test_without_a_ready_val_only_test_stays_apart(tmp_path):
    write_split(tmp_path, "{kind}/{split}", "train", "test")
    found = find_examples(tmp_path / "images", tmp_path / "masks")
    assert described(found) == ["a a.png", "test a a.png"]
    assert "no val: it will be split off from train" in found.notes


def test_a_split_on_one_side_only_is_refused(tmp_path):
    write_split(tmp_path, "{kind}/{split}", "train")
    touch(tmp_path, "masks/test/a.png")
    assert "masks/test" in refusal(find_examples, tmp_path / "images", tmp_path / "masks")
    touch(tmp_path, "images/val/b.png", "images/test/a.png")
    assert "b.png" in refusal(find_examples, tmp_path / "images", tmp_path / "masks")
    touch(tmp_path, "flat/a.png")
    assert "train/" in refusal(find_examples, tmp_path / "images", tmp_path / "flat")


def test_a_folder_of_masks_for_each_image_holds_its_objects(tmp_path):
    touch(tmp_path / "images", "a.jpg", "b.jpg")
    touch(tmp_path / "masks", "a/cell.png", "a/Thumbs.db", "b/2.png", "b/10.png")
    found = find_examples(tmp_path / "images", tmp_path / "masks")
    assert described(found) == ["a cell.png", "b 2.png 10.png"]


@pytest.mark.parametrize(
    ("files", "partners"),
    [
        (["Images/a.jpg", "Labels/a.png", "labels.txt"], "a a.png"),
        (["d/Original/1.tif", "d/Ground Truth/1.tif", "readme.txt"], "1 1.tif"),
        (["I_Training_Input/a.jpg", "I_Training_Input/LICENSE.txt",
          "I_Training_GroundTruth/a_segmentation.png", "I_Validation_Input/b.jpg",
          "I_Validation_GroundTruth/b_segmentation.png"],
         "train a a_segmentation.png, val b b_segmentation.png"),
        (["s/i0/images/i0.png", "s/i0/masks/f1.png", "s/i0/masks/e2.png",
          "s/i1/images/i1.png", "s/i1/masks/07.png"], "i0 e2.png f1.png, i1 07.png"),
        (["id0/images/0001.png", "id0/masks/a.png", "id1/images/0001.png", "id1/masks/a.png"],
         "id0_0001 a.png, id1_0001 a.png"),
        (["d/images/p1/0.png", "d/images/p2/0.png", "d/masks/p1/0.png", "d/masks/p2/0.png",
          "d/images/p2/1.png", "d/masks/p2/1.png"],
         "1 1.png, p1_0 0.png, p2_0 0.png"),
        (["JPEGImages/480p/bear/00.jpg", "JPEGImages/480p/bear/01.jpg",
          "JPEGImages/480p/cow/00.jpg", "Annotations/480p/bear/00.png",
          "Annotations/480p/bear/01.png", "Annotations/480p/cow/00.png"],
         "01 01.png, bear_00 00.png, cow_00 00.png"),
        (["train/JPEGImages/v1/0.jpg", "train/Annotations/v1/0.png", "train/JPEGImages/v2/1.jpg",
          "train/Annotations/v2/1.png", "valid/JPEGImages/v3/2.jpg", "valid/Annotations/v3/2.png"],
         "train 0 0.png, train 1 1.png, val 2 2.png"),
        (["images/p1/scan.png", "images/p2/scan.png", "masks/p1/tumour.png", "masks/p2/bone.png"],
         "p1_scan tumour.png, p2_scan bone.png"),
        (["a/train/0_img.png", "a/train/0_mask.png", "a/train/1_img.png", "a/train/1_mask.png",
          "a/val/2_img.png", "a/val/2_mask.png", "a/val/3_img.png", "a/val/3_mask.png"],
         "train 0_img 0_mask.png, train 1_img 1_mask.png, val 2_img 2_mask.png, "
         "val 3_img 3_mask.png"),
        (["d/images/a.png", "d/masks/a.png", "__MACOSX/d/images/._a.png",
          "__MACOSX/d/masks/._a.png"], "a a.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_zipped", [False, True])
def test_the_usual_layouts_are_found(tmp_path, files, partners, is_zipped):
    root = touch(tmp_path / "root", *files)
    if not is_zipped:
        assert described(find_in_folder(root)) == partners.split(", ")
        return
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in files:
            archive.write(root / name, name)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        found = find_in_folder(zipfile.Path(archive))
        assert described(found) == partners.split(", ")
        assert found.examples[0].image.read_bytes() == b""


def test_a_folder_of_images_is_their_group(tmp_path):
    names = [
        f"{kind}/site/p{p}/{i}.png" for kind in ("images", "masks") for p in "12" for i in "ab"
    ]
    touch(tmp_path, *names)
    found = find_in_folder(tmp_path)
    assert [example.group for example in found.examples] == [*["site/p1"] * 2, *["site/p2"] * 2]
    (tmp_path / "masks/site/p2/b.png").unlink()
    assert "1 of 4 images have no mask" in refusal(find_in_folder, tmp_path)
    (tmp_path / "images/site/p2").rename(tmp_path / "images/site/p3")
    assert "p2 has no partner in" in refusal(find_in_folder, tmp_path)


def test_the_root_of_such_a_layout_may_be_given_for_both(tmp_path):
    write_split(tmp_path, "{split}/{kind}", "train", "val")
    assert described(find_examples(tmp_path, tmp_path)) == ["train a a.png", "val a a.png"]


def test_no_place_or_several_are_refused_by_name(tmp_path):
    touch(tmp_path, "photos/a.jpg", "more/a.jpg")
    assert "more/, photos/" in refusal(find_in_folder, tmp_path)
    touch(tmp_path, "PNG/images/a.png", "PNG/masks/a.png", "TIF/images/a.tif", "TIF/masks/a.tif")
    touch(tmp_path, "TIF/images/b.tif", "TIF/masks/b.tif")
    assert "PNG, TIF" in refusal(find_in_folder, tmp_path)
    touch(tmp_path, "PNG/labels/a.png", "PNG/gt/a.png")
    assert described(find_in_folder(tmp_path / "PNG")) == ["a a.png"]  # masks/ it is
    (tmp_path / "PNG/masks").rename(tmp_path / "PNG/mask")
    assert "gt" in refusal(find_in_folder, tmp_path / "PNG")


def test_folders_inside_are_said_where_files_are_expected(tmp_path):
    touch(tmp_path, "images/ward 1/a.jpg", "images/ward 2/b.jpg", "masks/a.png")
    error = refusal(find_examples, tmp_path / "images", tmp_path / "masks")
    assert "there are folders inside: ward 1/, ward 2/" in error
    touch(tmp_path, "images/a.jpg")
    found = find_examples(tmp_path / "images", tmp_path / "masks")
    assert found.notes == ["left out folders: ward 1/, ward 2/"]


def test_masks_in_a_folder_among_the_images_are_not_left_out(tmp_path):
    touch(tmp_path, "a.jpg", "masks/a.png")
    assert find_examples(tmp_path, tmp_path / "masks").notes == []


def test_files_of_other_kinds_are_counted_and_hidden_ones_are_not(tmp_path):
    folders = two_folders(tmp_path, "a.png b.npy .DS_Store Thumbs.db", "a.png b.npy desktop.ini")
    assert find_examples(*folders).notes == ["left out 2 files of other kinds: .npy"]
    touch(tmp_path, "images/IMG_1.HEIC")
    assert "have no mask: IMG_1.HEIC" in refusal(find_examples, *folders)


def test_missing_and_empty_folders_are_said(tmp_path):
    images, masks = two_folders(tmp_path, "a.png", "")
    assert "no masks in" in refusal(find_examples, images, masks)
    assert "no images in" in refusal(find_examples, masks, images)
    assert "no such folder" in refusal(find_examples, tmp_path / "missing", masks)
    assert "no such folder" in refusal(find_examples, images, tmp_path / "a\nb")


def test_names_are_composed_and_messages_stay_on_one_line(tmp_path):
    decomposed = unicodedata.normalize("NFD", "한글")
    two_folders(tmp_path, f"{decomposed}.jpg", "한글.png")
    (example,) = find_examples(tmp_path / "images", tmp_path / "masks").examples
    assert example.name == "한글" and example.image.name == f"{decomposed}.jpg"
    touch(tmp_path, "masks/new\nline.png")
    assert r"new\nline" in refusal(find_examples, tmp_path / "images", tmp_path / "masks")


# By a table


def write_table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    touch(folder, "images/a.jpg", "images/b.jpg", "images/한글.jpg", "masks/1.png", "masks/2.png")
    touch(folder, "masks/x.npy")
    table = folder / "pairs.csv"
    table.write_bytes(text.encode(encoding))
    return table


@pytest.mark.parametrize(
    ("text", "encoding", "partners"),
    [
        ("image,mask\nimages/a.jpg,masks/1.png\nimages/b.jpg,masks/2.png\n", "utf-8",
         "a 1.png, b 2.png"),
        ("Mask;who;IMAGE\r\n2.png;me;a.jpg\r\n1.png;me;a.jpg\r\n\r\n", "utf-8-sig",
         "a 2.png 1.png"),
        ("image\tmask\n한글.jpg\t1.png\n", "cp949", "한글 1.png"),
        ("image,mask,split\na.jpg,1.png,train\nb.jpg,2.png,Valid\n", "utf-8",
         "train a 1.png, val b 2.png"),
        ("image,mask\nimages\\a.jpg,masks\\1.png\n", "utf-8", "a 1.png"),
    ],
)  # fmt: skip
def test_a_table_pairs_what_names_do_not(tmp_path, text, encoding, partners):
    table = write_table(tmp_path, text, encoding)
    found = read_pairs_file(table, tmp_path / "images", tmp_path / "masks")
    assert described(found) == partners.split(", ")


def test_absolute_paths_and_images_of_the_same_name_get_along_in_a_table(tmp_path):
    paths = ("p1/a.jpg", "p2/a.jpg", "q/p2/a.jpg", "p1_a.jpg")
    touch(tmp_path, *paths, *(f"m/{number}.png" for number in range(4)))
    text = "".join(f"{tmp_path / name},m/{number}.png\n" for number, name in enumerate(paths))
    (tmp_path / "t.csv").write_text("image,mask\n" + text, encoding="utf-8")
    found = read_pairs_file(tmp_path / "t.csv", None, None)
    assert [example.name for example in found.examples] == ["p1_a", "p1_a_2", "p2_a", "p2_a_2"]
    assert found == read_pairs_file(tmp_path / "t.csv", None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1: no column image"),
        ("image,label\na.jpg,1.png\n", "row 1: no column mask"),
        ("image,mask\n", "no rows"),
        ("image,mask\na.jpg,1.png\n\na.jpg,3.png\n", "row 4: mask 3.png is not in"),
        ("image,mask\na.jpg\n", "row 2: mask is empty"),
        ("image,mask\na.jpg,x.npy\n", "row 2: mask is x.npy"),
        ("image,mask,split\na.jpg,1.png,dev\n", "row 2: split is dev"),
        ("image,mask,split\na.jpg,1.png,train\na.jpg,2.png,val\n", "row 3: a.jpg is in another"),
        ("image,mask,split\na.jpg,1.png,train\nb.jpg,2.png,\n", "some rows have a split"),
        ("image,mask\n" + "x" * 400 + ".jpg,1.png\n", "row 2: image"),
        ("image,mask\na\x00.jpg,1.png\n", "row 2"),
        ("image,mask\n" + "x" * 200000 + ",1.png\n", "row 2"),
        ("image,mask\n\"a\nb.jpg\",1.png\n", "row 2"),
    ],
)  # fmt: skip
def test_a_fault_in_a_table_is_said_with_its_row(tmp_path, text, said):
    table = write_table(tmp_path, text)
    assert said in refusal(read_pairs_file, table, tmp_path / "images", tmp_path / "masks")


def test_a_mask_belongs_to_one_image_unless_all_masks_are_shared_alike(tmp_path):
    touch(tmp_path, *(f"{name}.jpg" for name in "abcd"), "1.png", "2.png")
    for masks, said in (("1111", "the mask 1.png to 4 of 4"), ("1121", "the mask 1.png to 3 of 4")):
        rows = [f"{image}.jpg,{mask}.png" for image, mask in zip("abcd", masks, strict=True)]
        (tmp_path / "t.csv").write_text("\n".join(["image,mask", *rows]), encoding="utf-8")
        assert said in refusal(read_pairs_file, tmp_path / "t.csv", None, None)
    rows = [f"{image}.jpg,{mask}.png" for image, mask in zip("abcd", "1221", strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["image,mask", *rows]), encoding="utf-8")
    found = read_pairs_file(tmp_path / "t.csv", None, None)
    groups = [example.group for example in found.examples]
    assert groups[0] == groups[3] != groups[1] == groups[2]


def test_tables_of_no_use_are_refused(tmp_path):
    assert "no such file" in refusal(read_pairs_file, tmp_path / "missing.csv", None, None)
    table = write_table(tmp_path, "image,mask\na.jpg,1.png\n", "utf-16")
    assert "row 1" in refusal(read_pairs_file, table, None, None)
    table = write_table(tmp_path, "image,mask\nimages/a.jpg,masks/1.png\n" * 2)
    assert "row 3" in refusal(read_pairs_file, table, None, None)  # a second header
    table = write_table(tmp_path, "image,mask\n" + "images/a.jpg,masks/1.png\n" * 2)
    found = read_pairs_file(table, None, None)
    assert found.notes == ["left out row 3, which repeats an earlier one"]
