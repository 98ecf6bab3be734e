"""Fill data/ with pairs of images and masks, split into train and val, and download SAM 2.1.

    python download_dataset.py                                # Kvasir-SEG, from the network
    python download_dataset.py --archive kvasir-seg.zip       # from a zip or folder that you have
    python download_dataset.py --images photos --masks masks  # your own folders
    python download_dataset.py --images cells --masks labels --instances   # many objects per image
    python download_dataset.py --images photos --annotations coco.json      # COCO, YOLO, labelme
    python download_dataset.py --images scans --masks labels  # DICOM, NIfTI, TIFF stacks, too
    python download_dataset.py --demo                         # drawn images, no network

Images and masks are paired by their names, or by a table (--pairs). Your files are copied, never
changed. Look at data/overview.png before you train. Kvasir-SEG is for research and education only;
cite Jha et al., MMM 2020.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from finetuning.basics.command_line import ArgumentParser, number, run, seed, tell
from finetuning.basics.files import DATASET_URL, DEMO_DATA
from finetuning.dataset.data_folder import (
    count_pairs,
    draw_demo,
    fill_folder,
    is_kept,
    recover_if_killed,
)
from finetuning.dataset.groups import Grouping
from finetuning.dataset.overview import OVERVIEW_FILE, describe_dataset
from finetuning.dataset.pairs import split_pairs
from finetuning.model.models import MODELS, ensure_checkpoint
from finetuning.sources.mask_values import MaskRule, add_mask_options
from finetuning.sources.source import Source, add_source_options
from finetuning.sources.volume_pairs import VolumeOptions, add_volume_options


def fill(
    data: Path,
    source: Source,
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    grouping: Grouping,
    facts: dict[str, Any],
) -> None:
    """Fill a data folder from its source, split it, and print a report.

    facts: the values to store in split.json.
    """
    if source.demo:
        draw_demo(data)
        return
    source.check_apart(data)
    with source.find(data) as found:
        for note in found.notes:
            tell(note)
        if found.value_range:  # of volumes, whose slices have it already
            facts, value_range = {**facts, "value_range": list(found.value_range)}, None
        filled = fill_folder(data, found.examples, rule, value_range, grouping, facts)
    for line in describe_dataset(filled, split_pairs(data, "train")[0].per_object):
        print(line)
    tell(f"look at: {data / OVERVIEW_FILE}")


def add_split_options(parser: ArgumentParser) -> None:
    """Add the options of the data folder and its split."""
    split = parser.add_argument_group("the data folder and its split")
    split.add_argument("--data", type=Path, default=Path("data"), help="the folder to fill")
    split.add_argument(
        "--val-fraction",
        type=number(float, above=0, below=1),
        default=0.2,
        help="the share of pairs used for validation",
    )
    split.add_argument(
        "--test-fraction",
        type=number(float, at_least=0, below=1),
        default=0.0,
        help="the share kept for compare_models.py, which training never reads",
    )
    split.add_argument(
        "--groups", type=Path, help="a CSV table image,group: a group stays in one split"
    )
    split.add_argument(
        "--group-regex", help='finds the group in a file name: "(patient[0-9]+)_"; or --groups'
    )
    split.add_argument(
        "--copies",
        choices=("together", "ignore"),
        default="together",
        help="whether (nearly) identical images stay in one split",
    )
    split.add_argument("--seed", type=seed, default=42, help="random seed of the split")
    split.add_argument("--force", action="store_true", help="replace the data folder's content")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    add_source_options(parser)
    add_mask_options(parser)
    add_volume_options(parser)
    add_split_options(parser)
    model = parser.add_argument_group("the checkpoint of SAM 2.1")
    model.add_argument("--model", choices=MODELS, default="small", help="its size")
    model.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="the folder to put it in"
    )
    model.add_argument("--skip-checkpoint", action="store_true", help="do not download it")
    args = parser.parse_args_with_demo(argv, data=DEMO_DATA, model="mini")
    if not (args.annotations or args.pairs) and bool(args.images) != bool(args.masks):
        parser.error("--images and --masks go together")
    if args.annotations and args.masks:
        parser.error("--masks and --annotations are different sources; give one of them")
    if sum(map(bool, (args.images or args.pairs or args.annotations, args.archive, args.demo))) > 1:
        parser.error("--archive, --images and --demo are different sources; give one of them")
    rule_options = (args.mask_value, args.ignore_value, args.instances, args.classes, args.parts)
    if args.annotations and any(rule_options):
        parser.error("--annotations gives outlines, not masks; leave the options of masks out")
    if args.class_name and not args.annotations:
        parser.error("--class-name needs --annotations; for masks, use --mask-value")
    if args.pairs and args.annotations:
        parser.error("--pairs and --annotations are different sources; give one of them")
    if args.mask_value and (args.instances or args.classes):
        parser.error("--mask-value uses one value, --instances and --classes use all; choose one")
    if args.demo and (args.test_fraction or args.groups or args.group_regex):
        parser.error("the demo's split is fixed; leave the options of the split out")
    if args.groups and args.group_regex:
        parser.error("--groups and --group-regex both define groups; give one of them")
    if args.val_fraction + args.test_fraction >= 1:
        parser.error("--val-fraction and --test-fraction leave nothing to train on")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names = ("archive", "images", "masks", "annotations", "pairs", "demo", "skip_unlabelled")
    is_gray = args.mask_value and len(args.mask_value) == 1
    volumes = VolumeOptions(
        args.bands, args.value_range, args.empty_share, args.mask_value[0] if is_gray else None
    )
    source = Source(
        **{name: getattr(args, name) for name in names},
        class_names=tuple(args.class_name),
        volumes=volumes,
    )
    rule = MaskRule(
        args.mask_value,
        args.instances or args.classes,
        args.parts,
        args.smallest_part,
        args.ignore_value,
    )
    grouping = Grouping(args.group_regex, args.groups, args.copies == "together")
    recover_if_killed(args.data)
    options = {**source.options, **rule.options, **grouping.options}
    if args.value_range:
        options["value_range"] = list(args.value_range)
    if args.test_fraction:
        options["test_fraction"] = args.test_fraction
    options = json.loads(json.dumps(options))  # the types that split.json gives back
    if is_kept(args.data, source.name, options, args.force):
        tell(f"{args.data} already holds this data set: nothing to do (--force replaces it).")
    else:
        facts = {"source": source.name or DATASET_URL, "options": options}
        facts |= {name: getattr(args, name) for name in ("seed", "val_fraction", "test_fraction")}
        fill(args.data, source, rule, args.value_range, grouping, facts)
    for split, count in count_pairs(args.data).items():
        tell(f"{split:>6}: {count:5} pairs in {args.data / 'images' / split}")
    if not args.skip_checkpoint:
        tell(f"checkpoint: {ensure_checkpoint(args.model, args.checkpoints)}")


if __name__ == "__main__":
    run(main)
