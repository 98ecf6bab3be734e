"""Medical and scientific files: DICOM, NIfTI and TIFF stacks become slices, and masks volumes."""

import csv
import itertools
import sys
from pathlib import Path

from sam2_utils import UserError

import cv2
import numpy as np
import pytest
from conftest import Outcome

import download_dataset
import test_my_image
from finetuning.basics.files import content_sha256
from finetuning.basics.image_files import read_image, read_mask, read_values
from finetuning.dataset.pairs import read_facts
from finetuning.volumes.dicom import read_dicom, split_series
from finetuning.volumes.files import find_volumes, read_label, read_volume, write_masks

SHAPE = (5, 48, 64)  # slices, rows, columns
# RAS+: columns go to the patient's left, rows to the back, slices to the head; in mm, and turned
TURN = cv2.Rodrigues(np.radians([5.0, -10.0, 15.0]))[0]
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([-0.8, -0.9, 4.0])
AFFINE[:3, 3] = (50.5, 20.25, -300)
IDENTITY = np.eye(4)


def draw_scan(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Draw an organ in a body, in HU; the first slice has none. Return int16, and uint8 labels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for image in labels[1:]:
        center = int(rng.integers(16, 30)), int(rng.integers(15, 30))
        cv2.ellipse(image, center, (9, 7), 0, 0, 360, 1, -1)
    values = rng.normal(-950, 20, shape)
    values[:, 5:43, 4:60] += 1000
    values[labels > 0] += 300
    return np.rint(values).astype(np.int16), labels


def write_nifti(
    path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, code: str = ""
) -> Path:
    """Write slices x rows x columns; code: the order and direction of the axes in the file."""
    nibabel = pytest.importorskip("nibabel", reason="no nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.moveaxis(values, (0, 1, 2), (2, 1, 0)), affine)
    if code:
        orientations = nibabel.orientations
        start, end = orientations.io_orientation(affine), orientations.axcodes2ornt(code)
        image = image.as_reoriented(orientations.ornt_transform(start, end))
    nibabel.save(image, path)
    return path


def write_dicom(path: Path, values: np.ndarray, place: np.ndarray | None = AFFINE, **tags) -> Path:
    """Write an image or, of more than 2 axes, frames; place: 4x4, from (column, row, 0) to RAS."""
    pydicom = pytest.importorskip("pydicom", reason="no pydicom")
    frames = values.reshape(-1, *values.shape[-2:]) if values.dtype != np.uint8 else values[None]
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    is_color = values.dtype == np.uint8
    data.SamplesPerPixel = 3 if is_color else 1
    data.PhotometricInterpretation = "RGB" if is_color else "MONOCHROME2"
    data.Rows, data.Columns = frames.shape[1:3]
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(values.dtype.kind == "i")
    if is_color:
        data.PlanarConfiguration = 0
    if len(frames) > 1:
        data.NumberOfFrames = len(frames)
    if place is not None:
        directions = np.diag([-1, -1, 1]) @ place[:3, :3]
        spacing = np.linalg.norm(directions, axis=0)
        axes = (directions / spacing)[:, :2].T.ravel()
        data.ImageOrientationPatient = [round(float(each), 12) for each in axes]
        data.ImagePositionPatient = [round(float(x), 9) for x in place[:3, 3] * (-1, -1, 1)]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def write_series(folder: Path, values: np.ndarray, affine: np.ndarray = AFFINE, **tags) -> Path:
    """Write a file for each slice; the order of their names is not that of the slices."""
    for name, k in zip("cadeb", range(len(values)), strict=True):
        place = affine.copy()
        place[:3, 3] = affine[:3, :3] @ (0, 0, k) + affine[:3, 3]
        numbers = {"SeriesInstanceUID": f"1.2.{len(folder.name)}", "InstanceNumber": 9 - k}
        write_dicom(folder / f"{name}.dcm", values[k], place, **numbers, **tags)
    return folder


def write_stack(path: Path, values: np.ndarray, **options) -> Path:
    tifffile = pytest.importorskip("tifffile", reason="no tifffile")
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, photometric="minisblack", **options)
    return path


def read_one(path: Path, bands: tuple[int, ...] = ()) -> np.ndarray:
    return read_volume(*find_volumes([path], (), bands), bands).values


# Reading


@pytest.mark.parametrize("code", ["LPS", "RAS", "RPI", "PSL", "SAR"])
def test_nifti_is_shown_upright_and_masks_lie_on_its_grid(tmp_path, code):
    values, labels = draw_scan(0)
    scan = write_nifti(tmp_path / "scan.nii.gz", values, code=code)
    (volume,) = find_volumes([scan])
    read = read_volume(volume)
    if "S" in code:  # slices keep the order that they have in the file
        assert np.array_equal(read.values, values)
        assert np.allclose(read.affine, AFFINE, atol=1e-5)
    else:
        assert np.array_equal(read.values, values[::-1])

    label = write_nifti(tmp_path / "label.nii", labels.astype(np.float64), code=code)
    (label_volume,) = find_volumes([label])
    on_grid = read_label(label_volume, volume, read)
    written = write_masks(tmp_path, volume, on_grid)
    import nibabel

    one, other, truth = (nibabel.load(path) for path in (scan, written, label))
    assert np.array_equal(one.affine, other.affine) and other.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(other.dataobj), truth.get_fdata())


@pytest.mark.parametrize("codes", list(itertools.permutations(["LPS", "RAI", "SAR"], 2)))
def test_labels_in_another_order_of_axes_lie_on_their_scan(tmp_path, codes):
    values, labels = draw_scan(1)
    (image,) = find_volumes([write_nifti(tmp_path / "a.nii.gz", values, code=codes[0])])
    (label,) = find_volumes([write_nifti(tmp_path / "b.nii.gz", labels, code=codes[1])])
    scan = read_volume(image)
    assert (scan.values[read_label(label, image, scan) > 0] > 200).all()


def test_labels_without_a_place_have_the_order_of_their_scan(tmp_path):
    values, labels = draw_scan(2)
    (image,) = find_volumes([write_nifti(tmp_path / "a.nii.gz", values)])
    (label,) = find_volumes([write_nifti(tmp_path / "b.nii.gz", labels, IDENTITY)])
    assert np.array_equal(read_label(label, image, read_volume(image)), labels)


def test_labels_elsewhere_are_refused(tmp_path):
    values, labels = draw_scan(2)
    (image,) = find_volumes([write_nifti(tmp_path / "a.nii.gz", values)])
    scan, moved = read_volume(image), AFFINE.copy()
    moved[0, 3] += 8
    for affine, wrong, why in (
        (moved, labels, "lies elsewhere in the body: its place differs from"),
        (AFFINE, labels[:4], "differs in size or axes from"),
        (AFFINE, labels + 0.5, "labels are whole numbers"),
    ):
        (label,) = find_volumes([write_nifti(tmp_path / "b.nii.gz", wrong, affine)])
        with pytest.raises(UserError, match=f"b.nii.gz .*{why}"):
            read_label(label, image, scan)


def test_a_dicom_series_is_sorted_by_position_and_has_the_place_of_its_slices(tmp_path):
    values, labels = draw_scan(3)
    write_series(tmp_path / "환자", values + 1024, RescaleSlope=1, RescaleIntercept=-1024)
    write_dicom(tmp_path / "환자/scout.dcm", values[0, :20], SeriesInstanceUID="1.9")
    scout, series = find_volumes([], [tmp_path])
    assert series.name == "환자" and len(series.files) == 5 and scout.name == "scout"
    read = read_volume(series)
    assert read.values.dtype == np.int16 and np.array_equal(read.values, values)
    assert np.allclose(read.affine, AFFINE, atol=1e-6)

    import nibabel

    written = nibabel.load(write_masks(tmp_path, series, labels))
    assert np.allclose(written.affine, AFFINE, atol=1e-5)
    assert np.array_equal(np.asarray(written.dataobj).T, labels)


def test_a_prone_patient_is_turned_and_masks_are_turned_back(tmp_path):
    values, labels = draw_scan(3)
    turned = AFFINE @ np.diag([-1.0, -1.0, 1.0, 1.0])
    turned[:3, 3] = AFFINE @ (63, 47, 0, 1) @ np.eye(4)[:, :3]
    (series,) = find_volumes(
        [], [write_series(tmp_path / "a", values[:, ::-1, ::-1].copy(), turned)]
    )
    assert np.array_equal(read_volume(series).values, values)
    assert np.array_equal(read_volume(series, upright=False).values, values[:, ::-1, ::-1])

    import nibabel

    written = nibabel.load(write_masks(tmp_path, series, labels))
    assert np.allclose(written.affine, turned, atol=1e-5)
    assert np.array_equal(np.asarray(written.dataobj).T, labels[:, ::-1, ::-1])


def test_dicom_frames_colours_and_inverted_grays(tmp_path):
    values = draw_scan(4)[0]
    cine = write_dicom(tmp_path / "IM0001", values, None)  # without a suffix
    assert np.array_equal(read_one(cine), values)
    inverted = write_dicom(
        tmp_path / "x.dcm",
        np.uint16([[0, 4095], [100, 1]]),
        None,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        HighBit=11,
    )
    assert read_one(inverted).tolist() == [[[4095, 0], [3995, 4094]]]
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(read_one(write_dicom(tmp_path / "c.dcm", colours, None))[0], colours)
    scaled = write_dicom(
        tmp_path / "p.dcm", np.uint16([[0, 2], [4, 6]]), None, RescaleSlope=0.5, RescaleIntercept=1
    )
    assert read_one(scaled).tolist() == [[[1, 2], [3, 4]]]
    tags = {"SeriesInstanceUID": "1.5"}
    uneven = [
        write_dicom(tmp_path / f"{k}.dcm", values[0], InstanceNumber=k, **tags) for k in range(3)
    ]
    assert read_dicom(split_series(uneven)[0]).affine is None  # all in one place


def test_the_frames_of_an_enhanced_file_have_their_own_places_and_scales(tmp_path):
    values = draw_scan(6)[0]
    pydicom = pytest.importorskip("pydicom", reason="no pydicom")

    def group(**sequences: dict) -> "pydicom.Dataset":
        data = pydicom.Dataset()
        for name, tags in sequences.items():
            item = pydicom.Dataset()
            for tag, value in tags.items():
                setattr(item, tag, value)
            setattr(data, name, [item])
        return data

    directions = np.diag([-1, -1, 1]) @ AFFINE[:3, :3]
    axes = (directions / np.linalg.norm(directions, axis=0))[:, :2].T.ravel().tolist()
    order, frames = [3, 0, 4, 1, 2], []
    for k in order:
        place = (AFFINE @ (0, 0, k, 1))[:3] * (-1, -1, 1)
        scale = {"RescaleSlope": 1, "RescaleIntercept": 10 * k, "RescaleType": "US"}
        frames.append(
            group(
                PlanePositionSequence={
                    "ImagePositionPatient": [round(x, 9) for x in place.tolist()]
                },
                PixelValueTransformationSequence=scale,
            )
        )
    shared = group(
        PlaneOrientationSequence={"ImageOrientationPatient": [round(x, 12) for x in axes]},
        PixelMeasuresSequence={"PixelSpacing": [0.9, 0.8], "SliceThickness": 4},
    )
    stored = np.stack([values[k] - 10 * k for k in order])
    tags = {"PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": [shared]}
    (volume,) = find_volumes([write_dicom(tmp_path / "e.dcm", stored, None, **tags)])
    read = read_volume(volume)
    assert np.array_equal(read.values, values) and np.allclose(read.affine, AFFINE, atol=1e-6)


def test_segmentations_and_damaged_files_say_what_to_do(tmp_path):
    values = draw_scan(5)[0][0]
    seg = "1.2.840.10008.5.1.4.1.1.66.4"
    with pytest.raises(UserError, match=r"s\.dcm is a DICOM segmentation .*convert it to NIfTI"):
        read_one(write_dicom(tmp_path / "s.dcm", values, SOPClassUID=seg))
    cut = write_dicom(tmp_path / "t.dcm", values)
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"t\.dcm is a DICOM file without a readable image"):
        read_one(cut)
    cut = write_nifti(tmp_path / "n.nii.gz", draw_scan(5)[0])
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"n\.nii\.gz is damaged or cut off"):
        read_one(cut)
    (tmp_path / "m.nii").write_bytes(b"no NIfTI")
    with pytest.raises(UserError, match=r"m\.nii is no readable NIfTI file"):
        read_one(tmp_path / "m.nii")
    cut = write_stack(tmp_path / "u.tif", draw_scan(5)[0], compression="zlib")
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"u\.tif is not a readable TIFF"):
        read_one(cut)


def test_axes_and_bands_of_tiffs(tmp_path):
    stack = np.arange(2 * 3 * 4 * 6, dtype=np.uint16).reshape(2, 3, 4, 6)
    path = write_stack(tmp_path / "zc.ome.tif", stack, metadata={"axes": "ZCYX"}, ome=True)
    assert np.array_equal(read_one(path, (2,)), stack[:, 1])
    assert np.array_equal(read_one(path, (3, 2, 1)), np.moveaxis(stack[:, ::-1], 1, 3))
    path = write_stack(tmp_path / "tz.tif", stack, metadata={"axes": "TZYX"}, imagej=True)
    assert np.array_equal(read_one(path), stack.reshape(6, 4, 6))
    geo = np.arange(6 * 4 * 5, dtype=np.uint16).reshape(4, 6, 5)
    for planar, values in (("contig", geo), ("separate", np.moveaxis(geo, 2, 0))):
        path = write_stack(tmp_path / "geo.tif", values, planarconfig=planar)
        assert np.array_equal(read_one(path, (4, 3, 2))[0], geo[..., [3, 2, 1]])
        with pytest.raises(UserError, match=r"geo\.tif has 5 channels; .*--bands 1"):
            read_one(path)
        with pytest.raises(UserError, match=r"geo\.tif has 5 channels, so --bands has no 6"):
            read_one(path, (6,))
    assert find_volumes([write_stack(tmp_path / "plain.tif", stack[0, 0])]) == []


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        ("nibabel", "a.nii.gz", "a NIfTI file"),
        ("pydicom", "a.dcm", "a DICOM file"),
        ("tifffile", "a.tif", "a TIFF of several pages or many channels"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name, kind):
    path = tmp_path / name
    path.write_bytes(b"x")
    if module == "tifffile":
        cv2.imwritemulti(str(path), [np.zeros((4, 4), np.uint8)] * 2)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} is {kind}; pip install {module}"):
        read_one(path)


# Data folders


def fill(run_script, *options: object) -> Outcome:
    return run_script(download_dataset.main, "--skip-checkpoint", "--images", "images", *options)


def test_a_data_folder_of_nifti_pairs(run_script, tmp_path):
    for index in range(4):
        values, labels = draw_scan(index)
        values[0, :2] = np.nan if index == 5 else -1024
        write_nifti(tmp_path / f"images/case{index}_0000.nii.gz", values, code="RAS")
        write_nifti(tmp_path / f"labels/case{index}.nii.gz", labels.astype(float), code="RAS")
    done = fill(run_script, "--masks", "labels", "--empty-share", "0.5")
    assert done.status == 0, done.err
    assert "volumes: 4; slices: 18, 16 with an object and 2 of the 4 without" in done.out
    facts = read_facts(Path("data"))
    assert facts["groups"]["val"] == {name: "case" + name[4] for name in facts["val"]}
    assert {name[:5] for name in facts["val"]}.isdisjoint(name[:5] for name in facts["train"])
    assert len(facts["train"] + facts["val"]) == 18 and facts["train"][0][5:] in ("_001", "_002")
    low, high = facts["value_range"]
    assert -1030 < low < -980 and 330 < high < 420
    name = facts["val"][-1]
    image, mask = (
        read_image(Path(f"data/images/val/{name}.png")),
        Path(f"data/masks/val/{name}.png"),
    )
    assert image[..., 0][read_mask(mask)].min() > 200 > image[..., 0][~read_mask(mask)].mean()

    refused = fill(run_script, "--masks", "labels", "--data", "other", "--mask-value", "2")
    assert "none of the 20 slices has an object" in refused.err and refused.status == 2
    assert not Path("other/images").exists()


def test_volumes_without_labels_are_named_or_left_out(run_script, tmp_path):
    for index in range(3):
        values, labels = draw_scan(index)
        write_nifti(tmp_path / f"images/case{index}.nii.gz", values)
        if index:
            write_nifti(tmp_path / f"labels/case{index}_seg.nii.gz", labels)
    failed = fill(run_script, "--masks", "labels")
    assert failed.status == 2 and "1 of 3 volumes have no label volume: case0" in failed.err
    done = fill(run_script, "--masks", "labels", "--skip-unlabelled")
    assert done.status == 0 and "left out 1 of 3 volumes without labels" in done.out
    cv2.imwrite("images/photo.png", np.zeros((4, 4)))
    mixed = fill(run_script, "--masks", "labels", "--skip-unlabelled", "--data", "b")
    assert mixed.status == 2 and "photo.png: 1 ordinary images beside volumes" in mixed.err


def test_another_volume_changes_nothing_in_those_that_are_there(run_script, tmp_path):
    def add_scan(name: str) -> None:
        values, labels = draw_scan(int(name[-1]), (18, *SHAPE[1:]))
        labels[:14] = 0
        write_nifti(tmp_path / f"images/{name}.nii.gz", values)
        write_nifti(tmp_path / f"labels/{name}.nii.gz", labels)

    for name in ("case1", "case3"):
        add_scan(name)
    assert fill(run_script, "--masks", "labels").status == 0
    before = read_facts(Path("data"))
    add_scan("case2")  # between the others in the order of names
    added = fill(run_script, "--masks", "labels", "--add")
    assert added.status == 0, added.err
    facts = read_facts(Path("data"))
    for split in ("train", "val"):
        assert [name for name in facts[split] if "case2" not in name] == before[split]
    assert "nothing to do" in fill(run_script, "--masks", "labels").out


def test_slices_of_void_alone_have_no_object(run_script, tmp_path):
    for index in range(2):
        values, labels = draw_scan(index)
        labels[0] = labels[1, :3] = 255
        write_nifti(tmp_path / f"images/case{index}.nii.gz", values)
        write_nifti(tmp_path / f"labels/case{index}.nii.gz", labels)
    options = ("--masks", "labels", "--ignore-value", "255", "--empty-share", "0")
    done = fill(run_script, *options)
    assert done.status == 0, done.err
    assert "slices: 8, 8 with an object and 0 of the 2" in done.out


def test_a_dicom_series_without_a_usable_place_is_read_as_it_is_stored(tmp_path):
    values, _ = draw_scan(0)
    folder = write_series(tmp_path / "series", values, PixelSpacing=[0, 0])
    volume = read_dicom(sorted(folder.iterdir()))
    assert volume.affine is None and volume.values.shape == values.shape


def test_two_volumes_of_one_name_are_refused(run_script, tmp_path):
    values, labels = draw_scan(0)
    for name in ("scan.nii", "scan.nii.gz"):
        write_nifti(tmp_path / "images" / name, values)
        write_nifti(tmp_path / "labels" / name, labels)
    refused = fill(run_script, "--masks", "labels")
    assert refused.status == 2 and "same names; rename one of them" in refused.err


def test_a_dicom_series_with_a_nifti_label_and_with_masks_of_its_files(run_script, tmp_path):
    for index in range(2):
        values, labels = draw_scan(index)
        folder = write_series(tmp_path / "images" / ("a" * (index + 1)), values)
        write_nifti(tmp_path / f"labels/{folder.name}.nii.gz", labels, code="LAS")
        (tmp_path / "one").mkdir(exist_ok=True)
        if not index:
            write_series(tmp_path / "one", values)
            (tmp_path / "png").mkdir()
            for name, label in zip("cadeb", labels, strict=True):
                cv2.imwrite(f"png/{name}.png", label * 255)
    done = fill(run_script, "--masks", "labels", "--empty-share", "0")
    assert done.status == 0, done.err
    assert "slices: 8, 8 with an object and 0 of the 2" in done.out
    for path in sorted(Path("data/images").rglob("*.png")):
        mask = read_mask(Path("data/masks", *path.parts[2:]))
        assert read_image(path)[..., 0][mask].min() > 200
    done = fill(run_script, "--images", "one", "--masks", "png", "--data", "b")
    assert done.status == 0, done.err
    facts = read_facts(Path("b"))
    # Neighbouring slices are alike, so a single volume is split in order
    assert "the last 20% become val" in done.out
    assert sorted(facts["train"] + facts["left out"] + facts["val"]) == list("abcde")
    assert facts["train"] == list("abc") and facts["val"] == ["e"]


def test_stacks_keep_their_objects_and_single_files_are_taken(run_script, tmp_path):
    for index in range(3):
        values, labels = draw_scan(index)
        labels[3] *= 7
        write_stack(tmp_path / f"images/셀{index}.tif", (values + 1000).astype(np.uint8))
        write_stack(tmp_path / f"masks/셀{index}.tif", labels.astype(np.uint16) * 100)
    done = fill(run_script, "--masks", "masks", "--instances")
    assert done.status == 0 and "objects: 12, one per image" in done.out
    assert "value range" not in done.out and "value_range" not in read_facts(Path("data"))
    single = ("--images", "images/셀0.tif", "--masks", "masks/셀1.tif", "--data", "b")
    done = fill(run_script, *single, "--instances")
    assert done.status == 0 and "groups" not in done.out
    failed = fill(run_script, "--masks", "masks", "--data", "c")
    assert failed.status == 2
    assert "error: masks/셀0_004.png has 700 besides black, but masks/셀0_002.png" in failed.err


def test_bands_of_satellite_images(run_script, tmp_path):
    for index in range(3):
        values, labels = draw_scan(index)
        bands = np.stack([values[index] + 1000 * k for k in range(1, 7)], axis=-1)
        write_stack(tmp_path / f"images/t{index}.tif", bands.astype("u2"), planarconfig="contig")
        (tmp_path / "masks").mkdir(exist_ok=True)
        cv2.imwrite(f"masks/t{index}.png", labels[3] * 255)
    failed = fill(run_script, "--masks", "masks")
    assert failed.status == 2 and "t0.tif has 6 channels; choose one or three" in failed.err
    done = fill(run_script, "--masks", "masks", "--bands", "4,3,2")
    assert done.status == 0, done.err
    image = read_image(next(Path("data/images").rglob("t0.png")))
    assert (image[..., 0] > image[..., 2]).mean() > 0.9 and "groups" not in done.out


def test_a_table_pairs_volumes(run_script, tmp_path):
    rows = ["image,mask"]
    for index in range(2):
        values, labels = draw_scan(index)
        write_nifti(tmp_path / f"p{index}/ct.nii.gz", values)
        write_nifti(tmp_path / f"p{index}/liver.nii.gz", labels)
        rows.append(f"p{index}/ct.nii.gz,p{index}/liver.nii.gz")
    Path("pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    done = run_script(download_dataset.main, "--skip-checkpoint", "--pairs", "pairs.csv")
    assert done.status == 0, done.err
    assert sum(map(len, read_facts(Path("data"))["groups"].values())) == 8


# New volumes


@pytest.fixture
def segment(run_script, random_mini):
    """Return a function that segments with random weights."""

    def run(*options: object) -> Outcome:
        return run_script(test_my_image.main, "--checkpoint", random_mini, *options)

    return run


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_scan_is_segmented_and_its_mask_lies_on_its_grid(segment, tmp_path):
    values = draw_scan(0)[0]
    scan = write_nifti(tmp_path / "스캔.nii.gz", values, code="SAR")
    done = segment("--image", scan.name, "--auto", "whole", "--value-range", "-1000,400")
    assert done.status == 0, done.err
    output = Path("output/my_results/스캔")
    assert f"masks:   {output / '스캔_masks.nii.gz'} (5 of 5 slices)" in done.out
    import nibabel

    one, other = nibabel.load(scan), nibabel.load(output / "스캔_masks.nii.gz")
    assert one.shape == other.shape and np.array_equal(one.affine, other.affine)
    (volume,) = find_volumes([scan])
    masks = read_label(*find_volumes([output / "스캔_masks.nii.gz"]), volume, read_volume(volume))
    for index in range(5):
        file = output / f"스캔_{index + 1:03}_mask.png"
        assert np.array_equal(masks[index] > 0, read_mask(file))
    again = segment("--image", scan.name, "--auto", "whole", "--value-range=-1000,400")
    assert "5 had results already" in again.out


def test_one_slice_is_prompted_by_a_point_or_a_table(segment, tmp_path):
    write_stack(tmp_path / "a.tif", draw_scan(0)[0] - -1024)
    failed = segment("--image", "a.tif", "--point", "20,20")
    assert failed.status == 2 and "there are 5; add --slice N" in failed.err
    failed = segment("--image", "a.tif", "--point", "20,20", "--slice", "6")
    assert failed.status == 2 and "a.tif has 5 slices, no 6" in failed.err
    done = segment("--image", "a.tif", "--point", "20,20", "--slice", "3")
    assert done.status == 0, done.err
    (row,) = read_rows(Path("output/my_results/a"))
    assert row["image"] == "a_003"
    import tifffile

    masks = tifffile.imread("output/my_results/a/a_masks.tif")
    assert masks.shape == SHAPE and not masks[[0, 1, 3, 4]].any()
    assert np.array_equal(masks[2], read_values(Path("output/my_results/a/a_003_mask.png"))[0])
    rows = ["image,x,y,object", "a_002,20,20,liver", "a_004,20,20,spleen", "a_004,30,30,liver"]
    Path("p.csv").write_text("\n".join(rows), encoding="utf-8")
    done = segment("--image", "a.tif", "--prompts", "p.csv", "--output", "b")
    assert done.status == 0, done.err
    assert "(2 of 5 slices)\nvalues:  1 liver, 2 spleen\n" in done.out
    masks, labels = tifffile.imread("b/a_masks.tif"), read_values(Path("b/a_004_labels.png"))[0]
    assert masks[1].max() == 1 and np.array_equal(masks[3], np.uint8([0, 2, 1])[labels])


def test_a_folder_of_volumes_and_images_with_the_range_of_training(segment, tmp_path, random_mini):
    import torch

    values = draw_scan(0)[0]
    write_series(tmp_path / "in/a", values)
    write_dicom(tmp_path / "in/b.dcm", values[1], None)
    checkpoint = torch.load(random_mini, weights_only=True)
    torch.save({**checkpoint, "settings": {"value_range": [-1000, 400]}}, "m.pt")
    done = segment("--image", "in", "--auto", "whole", "--checkpoint", "m.pt")
    assert done.status == 0, done.err
    output = Path("output/my_results/in")
    assert len(read_rows(output)) == 6 and (output / "a_masks.nii.gz").is_file()
    assert "b does not say where it lies: each slice has a PNG mask" in done.out
    assert "--value-range" not in done.out
    assert content_sha256(random_mini)
