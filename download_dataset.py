"""Fill data/ with pairs of images and masks, split into train and val, and download SAM 2.1.

    python download_dataset.py                                # Kvasir-SEG, from the network
    python download_dataset.py --archive kvasir-seg.zip       # from a zip or folder that you have
    python download_dataset.py --images photos --masks masks  # your own folders
    python download_dataset.py --images cells --masks labels --instances   # many objects per image
    python download_dataset.py --images photos --annotations coco.json      # COCO, YOLO, labelme
    python download_dataset.py --images scans --masks labels  # DICOM, NIfTI, TIFF stacks, too
    python download_dataset.py --images photos --masks masks --add   # add new and corrected ones
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

from sam2_utils import UserError

from finetuning.basics.command_line import ArgumentParser, number, run, seed, tell
from finetuning.basics.files import DATASET_URL, DEMO_DATA
from finetuning.dataset.pairs import count_pairs, is_filled, read_facts
from finetuning.model.models import MODELS, ensure_checkpoint
from finetuning.preparation.adding import add_to_folder
from finetuning.preparation.data_folder import draw_demo, fill_folder
from finetuning.preparation.fingerprint import folders_beside, take_record
from finetuning.preparation.groups import Grouping, is_one_group
from finetuning.preparation.overview import OVERVIEW_FILE, describe_dataset
from finetuning.preparation.replacing import recover_if_killed
from finetuning.preparation.unchanged import SPLIT_DEFAULTS, is_kept, kept_value_range
from finetuning.sources.mask_values import MaskRule, add_mask_options
from finetuning.sources.source import Source, add_source_options
from finetuning.sources.volume_pairs import VolumeOptions, add_volume_options


def fill(
    data: Path,
    source: Source,
    paths: dict[str, Path],
    rule: MaskRule,
    value_range: tuple[float, float] | None,
    grouping: Grouping,
    facts: dict[str, Any],
    is_addition: bool,
) -> bool:
    """Fill a data folder from its source, or add to it, and print a report.

    Returns False if there was nothing to do.

    Arguments:
      paths: of the source and the table of groups, by option.
      facts: the values to store in split.json.
    """
    if source.demo:
        draw_demo(data)
        return True
    source.check_apart(data)
    with source.find(data) as found:
        for note in found.notes:
            tell(note)
        if found.value_range:  # of volumes, whose slices have it already
            facts, value_range = {**facts, "value_range": list(found.value_range)}, None
            if grouping.frames == "auto" and is_one_group(found.examples):  # neighbours are alike
                grouping = grouping._replace(frames="time")
        if rule.is_chosen and any(example.annotated for example in found.examples):
            raise UserError("annotations give outlines, not masks; leave the options of masks out")
        folders = folders_beside(paths, found.examples)
        record = take_record(paths, folders, facts["options"], data)
        fill_or_add = add_to_folder if is_addition else fill_folder
        filled = fill_or_add(data, found.examples, rule, value_range, grouping, facts, record)
    if filled is None:
        return False
    kept = {image.name for image in filled}
    outlines = [len(example.annotated.outlines) for example in found.examples
                if example.annotated and example.name in kept]  # fmt: skip
    if lost := not is_addition and outlines and sum(outlines) - sum(len(i.areas) for i in filled):
        tell(
            f"left out {lost} of {sum(outlines)} objects: no pixel of the image is inside their "
            "outline"
        )
    for line in describe_dataset(filled, read_facts(data).get("masks") == "objects"):
        print(line)
    tell(f"look at: {data / OVERVIEW_FILE}")
    return True


def add_split_options(parser: ArgumentParser) -> None:
    """Add the options of the data folder and its split."""
    split = parser.add_argument_group("the data folder and its split")
    split.add_argument("--data", type=Path, default=Path("data"), help="the folder to fill")
    split.add_argument(
        "--val-fraction",
        type=number(float, above=0, below=1),
        default=SPLIT_DEFAULTS["val_fraction"],
        help="the share of pairs used for validation",
    )
    split.add_argument(
        "--test-fraction",
        type=number(float, at_least=0, below=1),
        default=SPLIT_DEFAULTS["test_fraction"],
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
    split.add_argument(
        "--frames",
        choices=("auto", "time", "random"),
        default="auto",
        help="consecutive frames of a recording. auto: recognised by numbered names and looks; of "
        "three or more recordings each stays in one split, one or two are split in time, val at "
        "the end; time: every recording, group or folder is split in the order of its names; "
        "random: frames are split like other images",
    )
    split.add_argument(
        "--seed", type=seed, default=SPLIT_DEFAULTS["seed"], help="random seed of the split"
    )
    split.add_argument(
        "--add",
        action="store_true",
        help="add the new images of this or another source to a filled folder, and replace those "
        "whose image or mask has changed; every image stays in its split (refused if images are "
        "gone from the same source)",
    )
    split.add_argument(
        "--force", action="store_true", help="fill the folder again: replace its content and split"
    )


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
    if args.class_name and not (args.annotations or args.archive or args.pairs):
        parser.error("--class-name needs --annotations or --archive; for masks, use --mask-value")
    if args.pairs and args.annotations:
        parser.error("--pairs and --annotations are different sources; give one of them")
    if args.mask_value and (args.instances or args.classes):
        parser.error("--mask-value uses one value, --instances and --classes use all; choose one")
    if args.add and args.force:
        parser.error("--add keeps the data folder's content, --force replaces it; choose one")
    if args.add and not (args.images or args.pairs or args.annotations or args.archive):
        parser.error(
            "--add needs a source: --images and --masks, --pairs, --annotations or --archive"
        )
    has_split_options = args.test_fraction or args.groups or args.group_regex
    if args.demo and (has_split_options or args.frames != "auto"):
        parser.error("the demo's split is fixed; leave the options of the split out")
    if args.groups and args.group_regex:
        parser.error("--groups and --group-regex both define groups; give one of them")
    if args.val_fraction + args.test_fraction >= 1:
        parser.error("--val-fraction and --test-fraction leave nothing to train on")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    recover_if_killed(args.data)
    names = ("archive", "images", "masks", "annotations", "pairs", "demo")
    names += ("skip_unlabelled", "skip_missing")
    # Of a volume's labels: numbers, not colours
    object_value, ignored_value = (
        value[0] if value and len(value) == 1 else None
        for value in (args.mask_value, args.ignore_value)
    )
    volumes = VolumeOptions(
        args.bands,
        args.value_range or (None if args.force else kept_value_range(args.data)),
        args.empty_share,
        object_value,
        ignored_value,
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
    grouping = Grouping(args.group_regex, args.groups, args.copies == "together", args.frames)
    options = {**source.options, **rule.options, **grouping.options}
    if args.value_range:
        options["value_range"] = list(args.value_range)
    options = json.loads(json.dumps(options))  # the types that split.json gives back
    facts = {"source": source.name or DATASET_URL, "options": options}
    facts |= {name: getattr(args, name) for name in SPLIT_DEFAULTS}
    paths = source.paths(args.data) | ({"groups": args.groups} if args.groups else {})
    is_addition = args.add and is_filled(args.data)
    if is_addition or not is_kept(args.data, source, paths, facts, args.force):
        is_done = fill(
            args.data, source, paths, rule, args.value_range, grouping, facts, is_addition
        )
    else:
        is_done = False
    if not is_done:
        hint = "" if args.add else " (--force fills it again)"
        tell(f"{args.data} already holds this data set: nothing to do{hint}.")
    for split, count in count_pairs(args.data).items():
        tell(f"{split:>6}: {count:5} pairs in {args.data / 'images' / split}")
    if not args.skip_checkpoint:
        tell(f"checkpoint: {ensure_checkpoint(args.model, args.checkpoints)}")


if __name__ == "__main__":
    run(main)
