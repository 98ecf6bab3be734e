"""Segment new images with your fine-tuned SAM 2.1: one, by coordinates or clicks, or a folder.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg               # click in a window
    python test_my_image.py --image test_images/dog.jpg --box "40,30,600,620" --original
    python test_my_image.py --image cells.png --box "5,5,40,40" --box "60,8,90,51"   # two objects
    python test_my_image.py --image my_folder --prompts prompts.csv   # image,x,y; image,x1,y1,x2,y2
    python test_my_image.py --image my_folder                         # click in each image in turn
    python test_my_image.py --image my_folder --auto whole            # no prompt: one mask an image
    python test_my_image.py --image my_folder --auto objects          # no prompt: all objects
    python test_my_image.py --image my_folder --auto whole --save masks,overlays,cutouts,coco
    python test_my_image.py --demo                                    # an image of the demo

Coordinates are x,y in pixels from the top left. A second --box, or --next-object, begins another
object; in a table, a column "object" tells them apart, and a column "label" is 0 for background.
Written to output/my_results/: the mask (of several objects a label map, in which each has a value
of its own) and the overlay. Those of a folder go to a folder of its name there, with results.csv, a
row an object; the same command again does what is missing, and --overwrite does all.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError, select_device

import numpy as np

from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    brief,
    one_line,
    parse_range,
    run,
    tell,
)
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, only_run_in
from finetuning.basics.image_files import read_image, read_mask
from finetuning.inference.coco_files import coco_files, require_pycocotools
from finetuning.inference.folder_results import TABLE, Results, list_images, printable, settings_of
from finetuning.inference.given_prompts import (
    add_prompt_options,
    check_inside,
    make_prompts,
    read_prompts,
)
from finetuning.inference.result_files import KINDS, Segmented, free_name, write_files
from finetuning.inference.segmenting import Tally, Way, read_like_training, segment_folder
from finetuning.model.automatic import ANY, Rule, rule_of
from finetuning.model.loading import load_segmenters, value_range_of
from finetuning.model.models import MODELS, ensure_checkpoint
from finetuning.model.prompts import Prompt, make_prompt, prompt_from_mask

DEMO_IMAGE, DEMO_MASK = (DEMO_DATA / kind / "val/demo_000.png" for kind in ("images", "masks"))


def parse_kinds(text: str) -> set[str]:
    """Parse "masks,overlays"."""
    kinds = {kind.strip() for kind in text.split(",")}
    if not kinds <= set(KINDS):
        raise argparse.ArgumentTypeError(f'"{text}" is not some of {",".join(KINDS)}')
    return kinds


def prompts_of_each(
    given: list[tuple[str, Any]], auto: str | None, is_demo_image: bool
) -> dict[str, Prompt] | None:
    """Return the prompts of an image's objects by name; None where they are to be clicked."""
    if auto == "whole":
        return {"1": make_prompt()}
    if is_demo_image and not given:  # its mask is known
        return {"1": prompt_from_mask(read_mask(DEMO_MASK), "center")}
    prompts = make_prompts(given) if given else []
    return {str(number): prompt for number, prompt in enumerate(prompts, start=1)} or None


def segment_one(
    image: np.ndarray,
    prompts: dict[str, Prompt] | None,
    way: Way,
    title: str,
) -> list[Segmented]:
    """Segment one HxWx3 uint8 RGB image; `prompts` are its objects', where there are any."""
    for prompt in prompts.values() if prompts else ():
        check_inside(prompt, image.shape[1], image.shape[0])
    objects, _ = way.segment(image, prompts, title)
    if not objects:
        raise UserError("nothing was clicked; click on the object, then press Enter")
    return objects


def save_one(
    output: Path, path: Path, image: np.ndarray, objects: list[Segmented], kinds: set[str]
) -> None:
    """Write what was found in one image, under names that are free, and say where and what."""
    for found in objects:
        which = f"object {found.name}\n" if len(objects) > 1 else ""
        print(f"{which}score:   {found.score:.3f} (the model's own estimate of its IoU)")
        print(f"area:    {found.mask.sum()} pixels, {found.mask.mean():.1%} of the image")
    name = free_name(output, path.stem)
    files = write_files(output, name, image, objects, kinds)
    paths = dict.fromkeys((what, file) for of_object in files for what, file in of_object.items())
    for file in coco_files(output, f"{name}_") if "coco" in kinds else ():
        file.put(printable(path.name), objects)
        file.write()
        paths["coco", file.path.name] = None
    for what, file in paths:
        tell(f"{what + ':':<8} {output / file}")


def print_tally(tally: Tally, table: Path) -> None:
    """Say what has become of a folder's images; exit with status 1 where any of them failed."""
    parts = [
        f"{tally.segmented} segmented",
        f"{tally.had_results} had results already (--overwrite does all)" * (tally.had_results > 0),
        f"{tally.without_row} without a row in the table" * (tally.without_row > 0),
        f"{tally.skipped} skipped" * (tally.skipped > 0),
    ]
    print(f"images:  {', '.join(filter(None, parts))}")
    if table.is_file():
        tell(f"results: {table}, and files beside it")
    if tally.failed:
        names = ", ".join(map(brief, tally.failed[:3])) + ", ..." * (len(tally.failed) > 3)
        message = f"{len(tally.failed)} image(s) failed: {names}; {one_line(table)} says why"
        print(f"error: {message}; mend them and run this again", file=sys.stderr)
        raise SystemExit(1)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--image", type=Path, help="the image to segment, or a folder of them")
    parser.add_argument("--demo", action="store_true", help="use what the demo trained")
    add_prompt_options(parser)
    parser.add_argument(
        "--value-range",
        type=parse_range,
        metavar='"low,high"',
        help="what is black and white in images of more than 8 bits (default: as in training)",
    )
    model = parser.add_argument_group("the model (default: the fine-tuned output/sam2_best.pt)")
    model.add_argument("--original", action="store_true", help="use the original SAM 2.1")
    model.add_argument("--checkpoint", type=Path, help="use this file")
    model.add_argument(
        "--model", choices=MODELS, help="its size (default: what the file says, else small)"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        type=Path,
        help="where they go (default: output/my_results, or in it NAME of a folder)",
    )
    results.add_argument(
        "--save", type=parse_kinds, metavar="KINDS", default="masks,overlays", help=",".join(KINDS)
    )
    results.add_argument(
        "--overwrite", action="store_true", help="of a folder, do all images again"
    )
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(machine, "auto: the fastest that is native")
    parser.set_defaults(finetuned=Path("output/sam2_best.pt"), given=[])
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    parser = make_parser()
    args = parser.parse_args_with_demo(
        argv, image=DEMO_IMAGE, model="mini", finetuned=DEMO_OUTPUT / "sam2_best.pt"
    )
    if not args.image:
        parser.error("--image is missing: the image to segment")
    if args.original and args.checkpoint:
        parser.error("--original and --checkpoint name two models; give one of them")
    if bool(args.given) + bool(args.prompts) + bool(args.auto) > 1:
        parser.error("points and boxes, --prompts and --auto are three ways; choose one of them")
    if args.auto != "objects" and (args.min_score is not None or args.min_area is not None):
        parser.error("--min-score and --min-area are of --auto objects; add it")
    if args.given and args.image.is_dir():
        parser.error("points and boxes are of one image; for a folder, use --prompts FILE.csv")
    if (args.prompts or args.overwrite) and not args.image.is_dir():
        parser.error("--prompts and --overwrite are for a folder of images, which --image is not")
    if not args.output:
        args.output = (DEMO_OUTPUT if args.demo else Path("output")) / "my_results"
        args.output /= args.image.resolve().name if args.image.is_dir() else ""
    if args.output.resolve() == args.image.resolve():
        parser.error("--output is the folder of the images; results go to another one")
    return args


def choose_checkpoint(
    file: Path | None, finetuned: Path, is_original: bool, model_name: str | None, is_demo: bool
) -> Path:
    """Return the file to load: the one given, the original, downloaded if missing, or finetuned."""
    if is_original:
        return ensure_checkpoint(model_name or "small")
    if not file and not finetuned.is_file():
        command = "python train_sam2_proper.py" + " --demo" * is_demo
        raise UserError(f"no fine-tuned model at {finetuned}; run: {command}, or use --original")
    return file or finetuned


def choose_rule(
    facts: dict[str, Any], checkpoint: Path, min_score: float | None, min_area: float | None
) -> Rule:
    """Return which masks --auto objects keeps: as asked for, as the model's file says, or SAM 2."""
    known = rule_of(facts)
    if not known and min_score is None:
        tell(
            f"warning: {checkpoint} does not say which masks are objects, so SAM 2's own rule for "
            "the original is taken; repeat the training's command with --resume "
            "--choose-thresholds, or give a --min-score"
        )
    given = {"min_score": min_score, "min_area": min_area}
    given = {name: value for name, value in given.items() if value is not None}
    if not known and min_score is not None:
        known = ANY
    rule = (known or Rule())._replace(**given)
    area = f"{rule.min_area:.2%} of the image"
    print(f"kept:    masks of a score above {rule.min_score:.3g} and an area of {area} or more")
    return rule


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, is_folder = select_device(args.device, args.threads), args.image.is_dir()
    is_demo_image = args.demo and args.image == DEMO_IMAGE
    if is_demo_image and not args.image.is_file():
        raise UserError(f"no {DEMO_IMAGE} yet; run: python train_sam2_proper.py --demo")
    if "coco" in args.save:
        require_pycocotools()

    # What is wrong with the images or the prompts is said before a model is loaded
    prompts = prompts_of_each(args.given, args.auto, is_demo_image)
    if is_folder:
        images = list_images(args.image)
        names = [image.name for image in images]
        of_images = prompts and dict.fromkeys(names, prompts)
        of_images = read_prompts(args.prompts, names) if args.prompts else of_images
    else:
        read_image(args.image)

    checkpoint = choose_checkpoint(
        args.checkpoint, args.finetuned, args.original, args.model, args.demo
    )
    opens_window = not prompts and not args.prompts and not args.auto
    segmenters, facts = load_segmenters(
        checkpoint, args.model, device, args.device == "mps", args.precision, opens_window
    )
    tell(f"model:   {checkpoint} (SAM 2.1 {facts['model_name']})")
    ranges = args.value_range, value_range_of(facts)
    rule = None
    if args.auto == "objects":
        rule = choose_rule(facts, checkpoint, args.min_score, args.min_area)
    way = Way(segmenters, rule, opens_window)
    if not is_folder:
        image = read_like_training(args.image, *ranges)
        objects = segment_one(image, prompts, way, args.image.name)
        save_one(args.output, args.image, image, objects, args.save)
        return

    with only_run_in(args.output):
        settings = settings_of(args.image, checkpoint, *ranges, rule)
        results = Results(args.output, args.save, settings, args.overwrite)
        tally = segment_folder(images, of_images, way, ranges, results, args.overwrite)
    print_tally(tally, args.output / TABLE)


if __name__ == "__main__":
    run(main)
