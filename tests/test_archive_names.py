"""Korean names in zip archives come out as they were meant, whichever program packed them."""

import unicodedata
import zipfile
from pathlib import Path

import pytest
from conftest import snapshot, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from download_dataset import main
from finetuning.sources.archives import NAME_IS_UTF8, decode_name, path_problem

NFC, NFD = "용종", unicodedata.normalize("NFD", "용종")


class RawName(zipfile.ZipInfo):
    """A member whose name is stored as these bytes, with or without the flag for UTF-8."""

    def __init__(self, content: bytes, flags: int = 0):
        super().__init__(content.decode("latin-1"))
        self.content, self.flags = content, flags

    def _encodeFilenameFlags(self):
        return self.content, self.flags


def archive_of(path: Path, members: dict[bytes, bytes], flags: int = 0) -> Path:
    """Zip members by the bytes of their paths."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(RawName(name, flags), content)
    return path


def pairs_called(folder: Path, image_stem: bytes, mask_stem: bytes) -> dict[bytes, bytes]:
    """Return five pairs as members data/images/STEM_0.jpg and data/masks/STEM_0.png, and on."""
    files = snapshot(write_pairs(folder / "pairs", 5))
    stems = {"images": image_stem, "masks": mask_stem}
    return {
        b"data/%s/%s_%d%s" % (kind.encode(), stem, index, suffix.encode()): files[
            f"{kind}/pair_{index:03}{suffix}"
        ]
        for index in range(5)
        for (kind, stem), suffix in zip(stems.items(), (".jpg", ".png"), strict=True)
    }


def prepare(run_script, archive: Path):
    return run_script(main, "--skip-checkpoint", "--archive", archive)


def assert_pairs(run_script, archive: Path, stem: str) -> None:
    """Check that an archive's five pairs are copied under their names and with their content."""
    outcome = prepare(run_script, archive)
    assert outcome.status == 0, outcome.err
    written = {Path(name).name: content for name, content in snapshot(Path("data")).items()}
    expected = snapshot(Path("pairs"))
    for index in range(5):
        assert written[f"{stem}_{index}.jpg"] == expected[f"images/pair_{index:03}.jpg"]
        assert written[f"{stem}_{index}.png"] == expected[f"masks/pair_{index:03}.png"]


STORED = {
    "Windows": ("cp949", NFC, 0),
    "macOS": ("utf-8", NFD, 0),
    "Linux": ("utf-8", NFC, 0),
    "macOS, flagged": ("utf-8", NFD, NAME_IS_UTF8),
    "flagged": ("utf-8", NFC, NAME_IS_UTF8),
}


@pytest.mark.parametrize("system", STORED)
def test_a_korean_name_comes_out_composed_whatever_stored_it(run_script, tmp_path, system):
    encoding, text, flags = STORED[system]
    members = pairs_called(tmp_path, text.encode(encoding), text.encode(encoding))
    assert_pairs(run_script, archive_of(tmp_path / "a.zip", members, flags), NFC)


@pytest.mark.parametrize(
    ("image_stem", "mask_stem"),
    [
        (NFD.encode(), NFC.encode("cp949")),
        (NFC.encode("cp949"), NFD.encode()),
        (NFD.encode(), NFC.encode()),
    ],
    ids=["Mac, Windows", "Windows, Mac", "Mac, Linux"],
)
def test_images_of_one_system_pair_up_with_masks_of_another(
    run_script, tmp_path, image_stem, mask_stem
):
    members = pairs_called(tmp_path, image_stem, mask_stem)
    assert_pairs(run_script, archive_of(tmp_path / "a.zip", members), NFC)


def test_the_folders_around_images_and_masks_may_be_korean_too(run_script, tmp_path):
    members = pairs_called(tmp_path, b"a", b"a")
    folder = "내 자료".encode("cp949")
    members = {name.replace(b"data", folder, 1): content for name, content in members.items()}
    assert_pairs(run_script, archive_of(tmp_path / "a.zip", members), "a")


@pytest.mark.parametrize("flags", [0, NAME_IS_UTF8])
def test_a_name_that_is_too_long_only_decomposed_is_taken(run_script, tmp_path, flags):
    stem = "서울" * 40  # 240 bytes composed, 600 decomposed
    stored = unicodedata.normalize("NFD", stem).encode()
    members = pairs_called(tmp_path, stored, stored)
    assert_pairs(run_script, archive_of(tmp_path / "a.zip", members, flags), stem)


def test_a_name_that_is_too_long_composed_is_refused(run_script, tmp_path):
    stem = ("가" * 84).encode("cp949")  # 168 bytes there, 258 with its number and suffix as UTF-8
    members = pairs_called(tmp_path, stem, stem)
    outcome = prepare(run_script, archive_of(tmp_path / "a.zip", members))
    assert outcome.status == 2 and "has a name that not every computer can store" in outcome.err


def test_what_could_be_either_encoding_is_taken_for_utf_8():
    content = "Müller.jpg".encode()
    assert content.decode("cp949") != "Müller.jpg"  # but is a name, too
    assert decode_name(zipfile.ZipInfo(content.decode("cp437"))) == "Müller.jpg"


def test_a_name_of_no_such_encoding_stays_as_the_zip_standard_has_it():
    for name in ("café.jpg", "½.png", "plain.png"):
        member = zipfile.ZipInfo(name)
        assert decode_name(member) == name


@given(
    st.lists(st.sampled_from([*b"aC./\\:\0", *"용".encode("cp949"), *NFD.encode()])).map(bytes),
    st.sampled_from([0, NAME_IS_UTF8]),
)
@settings(max_examples=1000, deadline=None)
def test_no_encoding_hides_a_bad_path(content, flags):
    name = content.decode("utf-8", "replace") if flags else content.decode("cp437")
    member = zipfile.ZipInfo(name)
    member.flag_bits = flags
    assert path_problem(decode_name(member)) or not path_problem(name)


BAD_MEMBERS = {
    "data/images/용종/../../../../a.jpg": "has a member outside its folder: 'data/images/용종/..",
    "/용종.jpg": "has a member outside its folder: '/용종.jpg'",
    "C:용종.jpg": "has a member outside its folder: 'C:용종.jpg'",
    "data\\용종.jpg": "has a path that is not like folder/file: 'data\\\\용종.jpg'",
    "용종\0.jpg": "has a path that is not like folder/file: '용종\\x00.jpg'",
    "용/" * 21 + "종.jpg": "has folders nested too deep: '용/",
    "data/images/용종\n.jpg": "not every computer can store: 'data/images/용종\\n.jpg'",
    "data/images/용종?.jpg": "not every computer can store: 'data/images/용종?.jpg'",
}


@pytest.mark.parametrize("encoding", ["utf-8", "cp949"])
@pytest.mark.parametrize("name", BAD_MEMBERS, ids=ascii)
def test_a_bad_path_is_refused_and_shown_as_it_was_meant(run_script, tmp_path, name, encoding):
    members = pairs_called(tmp_path, b"a", b"a") | {name.encode(encoding): b"x"}
    outcome = prepare(run_script, archive_of(tmp_path / "a.zip", members))
    assert outcome.status == 2 and BAD_MEMBERS[name] in outcome.err
    assert not Path("data").exists()


@pytest.mark.parametrize("character", ["\x85", "\x9b", "\x7f", "\u2028"], ids=ascii)
@pytest.mark.parametrize("flags", [0, NAME_IS_UTF8])
def test_a_control_character_that_only_decoding_shows_is_refused(
    run_script, tmp_path, character, flags
):
    stem = f"용{character}종".encode()
    members = pairs_called(tmp_path, stem, stem)
    outcome = prepare(run_script, archive_of(tmp_path / "a.zip", members, flags))
    assert outcome.status == 2 and "not every computer can store" in outcome.err
    assert ascii(character)[1:-1] in outcome.err and len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\x85", "\x9b"], ids=ascii)
def test_no_character_that_turns_or_breaks_a_line_reaches_the_screen(
    run_script, tmp_path, character
):
    members = pairs_called(tmp_path, b"a", b"a") | {f"../용{character}gpj.exe".encode(): b"x"}
    outcome = prepare(run_script, archive_of(tmp_path / "a.zip", members))
    assert outcome.status == 2 and "outside its folder" in outcome.err
    assert character not in outcome.err and ascii(character)[1:-1] in outcome.err


@pytest.mark.parametrize("other", [NFD.encode(), NFC.encode("cp949")], ids=["macOS", "Windows"])
def test_two_members_of_one_decoded_name_are_refused(run_script, tmp_path, other):
    members = pairs_called(tmp_path, NFC.encode(), NFC.encode())
    members[b"data/images/%s_3.jpg" % other] = b"another"
    outcome = prepare(run_script, archive_of(tmp_path / "a.zip", members))
    assert outcome.status == 2
    assert f"has two members called 'data/images/{NFC}_3.jpg'" in outcome.err
    assert not Path("data").exists()


def test_damage_below_a_korean_name_is_told_by_that_name(run_script, tmp_path):
    members = pairs_called(tmp_path, NFC.encode("cp949"), NFC.encode("cp949"))
    archive = archive_of(tmp_path / "a.zip", members)
    content = members[b"data/images/%s_2.jpg" % NFC.encode("cp949")]
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(content, content[:-1] + b"x"))
    outcome = prepare(run_script, archive)
    assert outcome.status == 2 and f"is damaged at 'data/images/{NFC}_2.jpg'" in outcome.err


def test_a_name_that_differs_between_directory_and_member_is_refused(run_script, tmp_path):
    stored = NFC.encode("cp949")
    archive = archive_of(tmp_path / "a.zip", pairs_called(tmp_path, stored, stored))
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(stored, NFC[::-1].encode("cp949"), 1))
    outcome = prepare(run_script, archive)
    assert outcome.status == 2 and "is damaged" in outcome.err
