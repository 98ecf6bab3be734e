"""Fill data/ with pairs of images and masks, split into train and val, and fetch SAM 2.1.

    python download_dataset.py                                # Kvasir-SEG, from the network
    python download_dataset.py --archive kvasir-seg.zip       # from a file that you have
    python download_dataset.py --images photos --masks masks  # your own folders
    python download_dataset.py --demo                         # drawn images, no network

An image and its mask have the same name, whatever their suffixes. Files are copied, never
changed. Kvasir-SEG is for research and education only; cite Jha et al., MMM 2020.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import stat
import unicodedata
import uuid
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from command_line import ArgumentParser, UserError, number, run, seed
from image_files import DEMO_DATA, IMAGE_SUFFIXES, Pair, find_pairs, only_run_in, read_pair
from sam2_utils import MODELS, download_file, ensure_checkpoint, file_sha256
from synthetic_images import write_demo_dataset

from tqdm import tqdm

DATASET_URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
DATASET_SHA256 = "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7"
SPLITS = ("train", "val")
SPLIT_FILE = "split.json"  # in every data folder that this script has filled
PARTIAL = ".partial-"  # how the names of its temporary folders in there start

# What an archive may hold. Images are checked one at a time, each as a whole in memory.
MAX_UNPACKED_BYTES = 50 * 10**9
MAX_MEMBER_BYTES = 2 * 10**9
MAX_DEPTH = 20  # folders within folders
MAX_PATH_LENGTH = 1000  # characters
MAX_NAME_BYTES = 255  # of a file or folder, on Linux
WINDOWS_REFUSES = re.compile(
    r"""[<>:"|?*\\\x00-\x1f] | [. ]$
    | ^(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) \ * (\.|$)""",
    re.IGNORECASE | re.VERBOSE,
)
BY_HAND = "unpack it, then use --images and --masks"


def split_names(names: list[str], val_fraction: float, seed: int) -> dict[str, list[str]]:
    """Split names into train and val, the same on every platform for the same seed.

    Both splits get at least one name. Raises UserError for fewer than two names.
    """
    if len(names) < 2:
        raise UserError(f"{len(names)} pair cannot be split into train and val; add more pairs")
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    val_count = min(max(round(len(names) * val_fraction), 1), len(names) - 1)
    return {"train": sorted(shuffled[val_count:]), "val": sorted(shuffled[:val_count])}


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[list[Pair]]:
    """Yield the pairs inside a zip archive, wherever in it images/ and masks/ lie side by side.

    Raises UserError, before anything is written, when the archive is damaged, has a member that
    check_member refuses, or does not pair up.
    """
    if not path.is_file():
        raise UserError(f"no such archive: {path}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            root = find_dataset_root(path, archive)
            yield find_pairs(root / "images", root / "masks")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole zip archive ({error}); download it again"
        ) from error


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError for an archive that is damaged, too large, or has an unfit member."""
    names = set()
    for member in archive.infolist():
        check_member(path, member)
        if member.filename in names:
            raise UserError(f"{path} has two members called {quoted(member.filename)}; {BY_HAND}")
        names.add(member.filename)

    # Read by parts, as here and in copy_pairs, no member unpacks to more than its stated size.
    size = sum(member.file_size for member in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path} unpacks to {size / 1e9:.3g} GB, more than {MAX_UNPACKED_BYTES / 1e9:.3g} GB; "
            f"if you trust it, {BY_HAND}"
        )
    try:
        damaged = archive.testzip()
    except Exception as error:  # damaged data raise errors of zlib and others
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    if damaged:
        raise UserError(f"{path} is damaged at {quoted(damaged)}; download it again")


def check_member(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise UserError for a member that no data set needs, or that not every computer can hold.

    Only members in images/ or masks/ become files, so only their names must do on Windows.
    """
    name = member.orig_filename  # as it stands in the archive, on Windows too
    shown = quoted(name)
    plain = PurePosixPath(name.replace("\\", "/"))
    is_used = not {"images", "masks"}.isdisjoint(plain.parts[:-1])
    file_type = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive does not say
    # Of LZMA and bzip2, zipfile unpacks more than the stated size before it stops.
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    size = member.file_size / 1e9
    for is_unfit, what in (
        (member.flag_bits & 1, f"is encrypted; {BY_HAND}"),
        (
            len(plain.parts) > MAX_DEPTH or len(name) > MAX_PATH_LENGTH,
            f"has folders nested too deep: {shown}; {BY_HAND}",
        ),
        (
            plain.is_absolute() or ".." in plain.parts or re.match("[A-Za-z]:", name),
            f"has a member outside its folder: {shown}; do not trust it",
        ),
        (
            name.rstrip("/") != str(plain) or "\0" in name,
            f"has a path that is not like folder/file: {shown}; {BY_HAND}",
        ),
        (
            file_type not in (0, stat.S_IFREG, stat.S_IFDIR),
            f"has a link or special file in it: {shown}; {BY_HAND}",
        ),
        (
            is_used and not all(map(is_portable, plain.parts)),
            f"has a name that not every computer can store: {shown}; "
            "unpack it, rename that, then use --images and --masks",
        ),
        (
            member.compress_type not in methods,
            f"is compressed in another way than zip's usual one; {BY_HAND}",
        ),
        (
            member.file_size > MAX_MEMBER_BYTES,
            f"has a member of {size:.3g} GB, more than {MAX_MEMBER_BYTES / 1e9:.3g} GB: {shown}; "
            f"if you trust it, {BY_HAND}",
        ),
    ):
        if is_unfit:
            raise UserError(f"{path} {what}")


def is_portable(name: str) -> bool:
    """Say whether Windows, macOS and Linux all allow this name of a file or folder."""
    return not WINDOWS_REFUSES.search(name) and len(name.encode()) <= MAX_NAME_BYTES


def quoted(name: str) -> str:
    """Return a member's name fit for one line of an error."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


def find_dataset_root(path: Path, archive: zipfile.ZipFile) -> zipfile.Path:
    """Return the one folder of the archive that has images/ and masks/ in it."""
    folders = {parent for name in archive.namelist() for parent in PurePosixPath(name).parents} | {
        PurePosixPath(name) for name in archive.namelist() if name.endswith("/")
    }
    folders = {folder for folder in folders if "__MACOSX" not in folder.parts}
    roots = [f.parent for f in folders if f.name == "images" and f.parent / "masks" in folders]
    if len(roots) != 1:
        raise UserError(
            f"{path} has {len(roots)} folders with images/ and masks/ in them, not one; {BY_HAND}"
        )
    prefix = "" if roots[0] == PurePosixPath(".") else f"{roots[0]}/"
    return zipfile.Path(archive, prefix)


@contextlib.contextmanager
def new_dataset(data: Path, **facts: Any) -> Iterator[Path]:
    """Yield an empty folder; the images/ and masks/ put there become those of `data`.

    They are moved into place when complete, with `facts` about them in SPLIT_FILE, which goes
    first and comes last: where it is, the data set is whole. On any error `data` is again as it
    was; after a kill, once the next run has called `recover`.
    """
    with only_run_in(data):
        recover(data)
        folder = data / (PARTIAL + uuid.uuid4().hex[:8])
        new, old = folder / "new", folder / "old"
        try:
            new.mkdir(parents=True)
            old.mkdir()
            yield new
            (new / SPLIT_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            for name in (SPLIT_FILE, "images", "masks"):
                if (data / name).exists():
                    (data / name).replace(old / name)
            for name in ("images", "masks", SPLIT_FILE):
                (new / name).replace(data / name)
        finally:
            settle(folder)


def settle(folder: Path) -> None:
    """Move everything back unless all has been moved into place; remove the temporary folder.

    Stopped at any point, it can be run again. Raises UserError, and removes nothing, where
    something cannot be moved back.
    """
    data, new, old = folder.parent, folder / "new", folder / "old"
    if (new / SPLIT_FILE).exists():  # written before the first move, moved by the last
        try:
            for name in ("images", "masks"):
                if (data / name).exists() and not (new / name).exists():
                    (data / name).replace(new / name)
            for name in ("images", "masks", SPLIT_FILE):
                if (old / name).exists():
                    (old / name).replace(data / name)
            (new / SPLIT_FILE).unlink()  # from here on, there is nothing to move back
        except OSError as error:
            raise UserError(
                f"{data} is half changed, and what it held may be in {old} ({error.strerror}: "
                f"{error.filename}); close the programs that use these files, then run this again"
            ) from error
    shutil.rmtree(folder, ignore_errors=True)  # the next run removes what is in use


def recover(data: Path) -> None:
    """Undo what killed runs have left half done in `data`, where no other run is writing."""
    for folder in list(data.glob(PARTIAL + "*")):
        was_moving = (folder / "new" / SPLIT_FILE).exists()
        settle(folder)
        if was_moving:
            print(f"an earlier run was killed while it filled {data}: all is back as it was before")


def check_cases(pairs: list[Pair]) -> None:
    """Raise UserError for names that Windows and macOS take for one and the same."""
    seen: dict[str, Pair] = {}
    for pair in pairs:
        key = unicodedata.normalize("NFC", pair.name.casefold())
        if key in seen:
            raise UserError(
                f"{seen[key].image} and {pair.image} differ in upper and lower case only, which is "
                "one name on Windows and macOS; rename one of them, and its mask"
            )
        seen[key] = pair


def copy_pairs(pairs: list[Pair], args: Namespace) -> None:
    """Check every pair and copy it into images/ and masks/ of args.data, in train/ and val/."""
    check_cases(pairs)
    splits = split_names([pair.name for pair in pairs], args.val_fraction, args.seed)
    split_of = {name: split for split, names in splits.items() for name in names}
    facts = {"source": source_name(args), "seed": args.seed, "val_fraction": args.val_fraction}
    with new_dataset(args.data, **facts, **splits) as folder:
        for pair in tqdm(pairs, desc="Checking and copying", unit="pair"):
            copies = []
            for kind, source in (("images", pair.image), ("masks", pair.mask)):
                suffix = PurePath(source.name).suffix
                copy = folder / kind / split_of[pair.name] / (pair.name + suffix)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with source.open("rb") as original, copy.open("wb") as file:
                    shutil.copyfileobj(original, file)  # by parts: see check_archive
                copies.append(copy)
            check_pair(pair, *copies)


def check_pair(pair: Pair, image_copy: Path, mask_copy: Path) -> None:
    """Raise UserError, in terms of the user's own files, for a pair that cannot be trained on."""
    try:
        read_pair(Pair(pair.name, image_copy, mask_copy))
    except UserError as error:
        message = str(error).replace(str(image_copy), str(pair.image))
        raise UserError(message.replace(str(mask_copy), str(pair.mask))) from error


def count_pairs(data: Path) -> dict[str, int]:
    """Return the number of image files of each split in a data folder."""
    return {
        split: len(find_pairs(data / "images" / split, data / "masks" / split)) for split in SPLITS
    }


def source_name(args: Namespace) -> str:
    """Return where the pairs of args.data come from, to tell one source from another."""
    if args.demo:
        return "demo"
    return str((args.images or args.archive).resolve()) if has_source(args) else DATASET_URL


def has_source(args: Namespace) -> bool:
    """Say whether the options name a source of the user's own."""
    return bool(args.images or args.archive)


def is_filled(data: Path) -> bool:
    """Say whether a data folder holds images and masks, whoever put them there."""
    return all(
        any(path.suffix.lower() in IMAGE_SUFFIXES for path in (data / kind).glob("*/*"))
        for kind in ("images", "masks")
    )


def holds_files(data: Path) -> bool:
    """Say whether images/ or masks/ of a data folder hold any files but hidden ones."""
    return any(
        path.is_file() and not path.name.startswith(".")
        for kind in ("images", "masks")
        for path in (data / kind).rglob("*")
    )


def is_kept(args: Namespace) -> bool:
    """Say whether args.data already holds what is asked for.

    Raises UserError where it holds something else, or what is not this script's to replace.
    """
    split_file = args.data / SPLIT_FILE
    if not split_file.is_file():
        if is_filled(args.data) and not (args.force or args.demo or has_source(args)):
            return True  # put there by hand, as the layout asks
        if holds_files(args.data):
            raise UserError(
                f"{args.data} holds images or masks that this script did not put there; "
                "move them away, or use another --data folder"
            )
        return False
    if args.force or not is_filled(args.data):
        return False
    try:
        made_from = json.loads(split_file.read_text(encoding="utf-8"))["source"]
    except (ValueError, LookupError):  # edited by hand
        made_from = "an unknown source"
    if (has_source(args) or args.demo) and made_from != source_name(args):
        raise UserError(
            f"{args.data} already holds the data set made from {made_from}; "
            "use another --data folder, or --force to replace it"
        )
    return True


def prepare_dataset(args: Namespace) -> None:
    """Fill args.data from the source that the options name, unless it is already filled."""
    if any(args.data.glob(PARTIAL + "*")):
        with only_run_in(args.data):
            recover(args.data)
    if is_kept(args):
        print(f"{args.data} already holds this data set: nothing to do (--force splits it anew).")
        return
    if args.demo:
        draw_demo(args.data)
        return
    if args.images:
        pairs = find_pairs(args.images, args.masks)
        for folder in (args.images, args.masks):
            if args.data.resolve() in folder.resolve().parents:
                raise UserError(f"{folder} lies inside {args.data}; use another --data folder")
        copy_pairs(pairs, args)
        return
    archive = args.archive
    if not archive:
        archive = args.data / "kvasir-seg.zip"
        by_hand = "download it with a browser and run again with --archive FILE.zip"
        if not archive.is_file() or file_sha256(archive) != DATASET_SHA256:
            download_file(DATASET_URL, archive, DATASET_SHA256, by_hand)
    with open_archive(archive) as pairs:
        copy_pairs(pairs, args)


def draw_demo(data: Path) -> None:
    """Draw the demo's images and masks into `data`."""
    print(f"drawing the demo's images into {data}")
    with new_dataset(data, source="demo") as folder:
        write_demo_dataset(folder)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    source = parser.add_argument_group("where the pairs come from")
    source.add_argument("--archive", type=Path, help="a zip with images/ and masks/ inside")
    source.add_argument("--images", type=Path, help="a folder of images")
    source.add_argument("--masks", type=Path, help="the folder of their masks")
    source.add_argument("--demo", action="store_true", help="draw the demo's, into data/demo")
    split = parser.add_argument_group("how they are split")
    split.add_argument("--data", type=Path, default=Path("data"), help="the folder to fill")
    split.add_argument(
        "--val-fraction",
        type=number(float, above=0, below=1),
        default=0.2,
        help="the share of pairs kept for validation",
    )
    split.add_argument("--seed", type=seed, default=42, help="of the split")
    split.add_argument("--force", action="store_true", help="make the data folder anew")
    model = parser.add_argument_group("the checkpoint of SAM 2.1")
    model.add_argument("--model", choices=MODELS, default="small", help="its size")
    model.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="the folder to put it in"
    )
    model.add_argument("--skip-checkpoint", action="store_true", help="do not fetch it")
    args = parser.parse_args_with_demo(argv, data=DEMO_DATA, model="mini")
    if bool(args.images) != bool(args.masks):
        parser.error("--images and --masks go together")
    if sum(map(bool, (args.images, args.archive, args.demo))) > 1:
        parser.error("--archive, --images and --demo are different sources; give one of them")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_dataset(args)
    for split, count in count_pairs(args.data).items():
        print(f"{split:>6}: {count:5} pairs in {args.data / 'images' / split}")
    if not args.skip_checkpoint:
        print(f"checkpoint: {ensure_checkpoint(args.model, args.checkpoints)}")


if __name__ == "__main__":
    run(main)
