"""Fill data/ with pairs of images and masks, split into train and val, and fetch SAM 2.1.

    python download_dataset.py                                # Kvasir-SEG, from the network
    python download_dataset.py --archive kvasir-seg.zip       # from a file that you have
    python download_dataset.py --images photos --masks masks  # your own folders
    python download_dataset.py --demo                         # drawn images, no network

An image and its mask have the same name, whatever their suffixes. Files are copied, never
changed. Kvasir-SEG is for research and education only; cite Jha et al., MMM 2020.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from sam2_utils import UserError

from finetuning.archives import open_archive
from finetuning.command_line import ArgumentParser, number, run, seed
from finetuning.data_folder import (
    copy_pairs,
    count_pairs,
    draw_demo,
    is_kept,
    recover_if_killed,
)
from finetuning.models import MODELS, download_file, ensure_checkpoint, file_sha256
from finetuning.pairs import DEMO_DATA, find_pairs

DATASET_URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
DATASET_SHA256 = "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7"


@dataclass(frozen=True)
class Source:
    """Where the pairs come from: an archive, two folders, or drawings; else the network."""

    archive: Path | None = None
    images: Path | None = None
    masks: Path | None = None
    demo: bool = False

    @property
    def name(self) -> str | None:
        """What tells one source from another; None where the user has not chosen any."""
        if self.demo:
            return "demo"
        chosen = self.images or self.archive
        return str(chosen.resolve()) if chosen else None


def fill(data: Path, source: Source, val_fraction: float, seed: int) -> None:
    """Fill a data folder from its source, split by seed."""
    if source.demo:
        draw_demo(data)
        return
    split = {"source": source.name or DATASET_URL, "val_fraction": val_fraction, "seed": seed}
    if source.images:
        pairs = find_pairs(source.images, source.masks)
        for folder in (source.images, source.masks):
            if data.resolve() in folder.resolve().parents:
                raise UserError(f"{folder} lies inside {data}; use another --data folder")
        copy_pairs(pairs, data, **split)
        return
    with open_archive(source.archive or fetch_archive(data / "kvasir-seg.zip")) as pairs:
        copy_pairs(pairs, data, **split)


def fetch_archive(path: Path) -> Path:
    """Return the path of Kvasir-SEG's archive, downloading it if it is missing or damaged."""
    if not path.is_file() or file_sha256(path) != DATASET_SHA256:
        by_hand = "download it with a browser and run again with --archive FILE.zip"
        download_file(DATASET_URL, path, DATASET_SHA256, by_hand)
    return path


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
    source = Source(args.archive, args.images, args.masks, args.demo)
    recover_if_killed(args.data)
    if is_kept(args.data, source.name, args.force):
        print(f"{args.data} already holds this data set: nothing to do (--force splits it anew).")
    else:
        fill(args.data, source, args.val_fraction, args.seed)
    for split, count in count_pairs(args.data).items():
        print(f"{split:>6}: {count:5} pairs in {args.data / 'images' / split}")
    if not args.skip_checkpoint:
        print(f"checkpoint: {ensure_checkpoint(args.model, args.checkpoints)}")


if __name__ == "__main__":
    run(main)
