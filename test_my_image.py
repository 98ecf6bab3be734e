"""Segment new images with your fine-tuned SAM 2.1: one image or a folder of them.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg               # click in a window
    python test_my_image.py --image test_images/dog.jpg --box "40,30,600,620" --original
    python test_my_image.py --image cells.png --box "5,5,40,40" --box "60,8,90,51"   # two objects
    python test_my_image.py --image my_folder --prompts prompts.csv   # image,x,y; image,x1,y1,x2,y2
    python test_my_image.py --image my_folder                         # click in each image in turn
    python test_my_image.py --image my_folder --auto whole            # no prompt: a mask per image
    python test_my_image.py --image my_folder --auto objects          # no prompt: all objects
    python test_my_image.py --image my_folder --auto whole --tta      # average mirrored views
    python test_my_image.py --image my_folder --auto whole --save masks,overlays,cutouts,coco
    python test_my_image.py --image scan.nii.gz --auto whole          # or DICOM, TIFF stacks
    python test_my_image.py --demo                                    # the demo's model and image

Coordinates are x,y in pixels from the top left. A second --box, or --next-object, starts another
object. In a table, the column "object" tells objects apart, and "label" is 0 for background points.

Results go to output/my_results/: a mask (for several objects a label map, with a value for each
object) and an overlay. The results of a folder go to a subfolder with its name and include
results.csv, with a row for each object. Run the same command again to segment what is missing, or
with --overwrite to redo everything. The slices of a volume are like the images of a folder, called
scan_001, ...; their masks are also written as one volume.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError, select_device

import numpy as np

from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    parse_range,
    run,
    tell,
)
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT, only_run_in
from finetuning.basics.image_files import read_image, read_mask
from finetuning.inference.coco_files import coco_files, require_pycocotools
from finetuning.inference.folder_results import (
    RESULTS_FILE,
    VIEWS_SETTING,
    FolderResults,
    make_settings,
    utf8_name,
)
from finetuning.inference.given_prompts import (
    add_prompt_options,
    check_inside,
    make_prompts,
    read_prompts,
)
from finetuning.inference.result_files import RESULT_KINDS, free_name, write_files
from finetuning.inference.segmenting import (
    SegmentationMethod,
    print_tally,
    read_like_training,
    resolve_rule,
    segment_folder,
)
from finetuning.inference.volume_results import (
    add_volume_options,
    list_others,
    list_slices,
    slices_on_disk,
    write_volumes,
)
from finetuning.model.checkpoints import checkpoint_path
from finetuning.model.loading import bands_of, cleaning_of, load_segmenters, value_range_of
from finetuning.model.models import MODELS, ensure_checkpoint
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.averaging import add_views_option, choose_views
from finetuning.segmentation.clean_masks import NO_CLEANING, add_clean_option, describe_cleaning
from finetuning.segmentation.prompts import Prompt, make_prompt, prompt_from_mask
from finetuning.volumes.files import name_of, volumes_at

DEMO_IMAGE, DEMO_MASK = (DEMO_DATA / kind / "val/demo_000.png" for kind in ("images", "masks"))


def choose_prompts(
    given: list[tuple[str, Any]], auto: str | None, is_demo_image: bool
) -> dict[str, Prompt] | None:
    """Return an image's prompts by object name; None if they come from elsewhere or are clicked."""
    if auto == "whole":
        return {"1": make_prompt()}
    if is_demo_image and not given:  # the demo has a true mask to place the point by
        return {"1": prompt_from_mask(read_mask(DEMO_MASK), "center")}
    prompts = make_prompts(given) if given else []
    return {str(number): prompt for number, prompt in enumerate(prompts, start=1)} or None


def choose_checkpoint(
    file: Path | None, finetuned: Path, is_original: bool, model_name: str | None, is_demo: bool
) -> Path:
    """Return the checkpoint: the given file, the original (downloaded if missing) or finetuned."""
    if is_original:
        return ensure_checkpoint(model_name or "small")
    if not file and not finetuned.is_file():
        command = "python train_sam2_proper.py" + " --demo" * is_demo
        raise UserError(f"no fine-tuned model at {finetuned}; run: {command}, or use --original")
    return file or finetuned


def segment_one(
    image: np.ndarray, prompts: dict[str, Prompt] | None, method: SegmentationMethod, title: str
) -> list[SegmentedObject]:
    """Segment a single HxWx3 uint8 RGB image; prompts and title as in SegmentationMethod.segment.

    Raises UserError for a prompt outside the image, and if the user clicks on nothing.
    """
    for prompt in prompts.values() if prompts else ():
        check_inside(prompt, image.shape[1], image.shape[0])
    objects, _ = method.segment(image, prompts, title)
    if not objects:
        raise UserError("nothing was clicked; click on the object, then press Enter")
    return objects


def save_one(
    output: Path, path: Path, image: np.ndarray, objects: list[SegmentedObject], kinds: set[str]
) -> None:
    """Write a single image's results under new names, and print the objects and the files."""
    for found in objects:
        which = f"object {found.name}\n" if len(objects) > 1 else ""
        print(f"{which}score:   {found.score:.3f} (the model's own estimate of its IoU)")
        print(f"area:    {found.mask.sum()} pixels, {found.mask.mean():.1%} of the image")
    name = free_name(output, path.stem)
    files = write_files(output, name, image, objects, kinds)
    # Objects share files, such as the overlay; each is printed once
    paths = dict.fromkeys(entry for object_files in files for entry in object_files.items())
    for file in coco_files(output, f"{name}_") if "coco" in kinds else ():
        file.put(utf8_name(path.name), objects)
        file.write()
        paths["coco", file.path.name] = None
    for what, file in paths:
        tell(f"{what + ':':<8} {output / file}")


def parse_kinds(text: str) -> set[str]:
    """Parse "masks,overlays" as an argparse type."""
    kinds = {kind.strip() for kind in text.split(",")}
    if not kinds <= set(RESULT_KINDS):
        raise argparse.ArgumentTypeError(f'"{text}": choose from {",".join(RESULT_KINDS)}')
    return kinds


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--image", type=Path, help="the image or volume to segment, or a folder of them"
    )
    parser.add_argument(
        "--demo", action="store_true", help="use the demo's fine-tuned model and image"
    )
    add_prompt_options(parser)
    parser.add_argument(
        "--value-range",
        type=parse_range,
        metavar='"low,high"',
        help="pixel values of black and white in images of more than 8 bits (default: as in "
        "training)",
    )
    add_volume_options(parser)
    model = parser.add_argument_group("the model (default: the fine-tuned output/sam2_best.pt)")
    model.add_argument("--original", action="store_true", help="use the original SAM 2.1")
    model.add_argument(
        "--checkpoint", type=checkpoint_path, help="use this checkpoint, or the best of this folder"
    )
    model.add_argument(
        "--model", choices=MODELS, help="its size (default: the checkpoint's, else small)"
    )
    add_views_option(model)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        type=Path,
        help="their folder (default: output/my_results; for a folder of images, NAME in it)",
    )
    results.add_argument(
        "--save",
        type=parse_kinds,
        metavar="KINDS",
        default="masks,overlays",
        help=f"which files to write: {','.join(RESULT_KINDS)}",
    )
    add_clean_option(results)
    results.add_argument("--overwrite", action="store_true", help="for a folder: redo all images")
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(machine, "auto: the fastest that the device supports natively")
    parser.set_defaults(finetuned=Path("output/sam2_best.pt"), given=[])
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    parser = make_parser()
    args = parser.parse_args_with_demo(
        argv, image=DEMO_IMAGE, model="mini", finetuned=DEMO_OUTPUT / "sam2_best.pt"
    )
    if not args.image:
        parser.error("--image is missing; give the image to segment")
    if args.original and args.checkpoint:
        parser.error("--original and --checkpoint name two models; give one of them")
    if bool(args.given) + bool(args.prompts) + bool(args.auto) > 1:
        parser.error("points or boxes, --prompts and --auto exclude each other; choose one of them")
    if args.auto != "objects" and (args.min_score is not None or args.min_area is not None):
        parser.error("--min-score and --min-area are for --auto objects; add it")
    if args.auto == "objects" and args.tta:
        parser.error("--auto objects cannot average views; omit --tta")
    args.volumes = volumes_at(args.image, args.bands)
    is_folder = args.image.is_dir() or bool(args.volumes)
    if args.given and is_folder and not args.volumes:
        parser.error(
            "points and boxes are for a single image; for a folder, use --prompts FILE.csv"
        )
    if (args.prompts or args.overwrite) and not is_folder:
        parser.error("--prompts and --overwrite are for a folder of images; give one as --image")
    if args.slice and not args.volumes:
        parser.error("--slice is for a volume: DICOM, NIfTI or a TIFF stack; leave it out")
    if not args.output:
        args.output = (DEMO_OUTPUT if args.demo else Path("output")) / "my_results"
        args.output /= name_of(args.image.resolve()) if is_folder else ""
    if args.output.resolve() == args.image.resolve():
        parser.error("--output is the folder of the images; choose another one for the results")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device, args.threads)
    is_folder = args.image.is_dir() or bool(args.volumes)
    is_demo_image = args.demo and args.image == DEMO_IMAGE
    if is_demo_image and not args.image.is_file():
        raise UserError(f"no {DEMO_IMAGE} yet; run: python train_sam2_proper.py --demo")
    if "coco" in args.save:
        require_pycocotools()

    # Report mistakes in the images and prompts before the slow loading of a model
    prompts = choose_prompts(args.given, args.auto, is_demo_image)
    if is_folder:
        images = list_others(args.image, args.volumes)
        volumes = list_slices(args.volumes, args.bands, args.slice, bool(args.given))
        names = [image.name for image in images]
        names += [volume.names[index] for volume in volumes for index in volume.wanted]
        folder_prompts = prompts and dict.fromkeys(names, prompts)
        if args.prompts:
            folder_prompts = read_prompts(args.prompts, names)
    else:
        read_image(args.image)

    checkpoint = choose_checkpoint(
        args.checkpoint, args.finetuned, args.original, args.model, args.demo
    )
    opens_window, views = not (prompts or args.prompts or args.auto), choose_views(args.tta)
    segmenters, facts = load_segmenters(
        checkpoint, args.model, device, args.device == "mps", args.precision, opens_window
    )
    tell(f"model:   {checkpoint} (SAM 2.1 {facts['model_name']})")
    if (bands := bands_of(facts)) and not args.bands:
        tell(f'warning: this model was trained with --bands "{bands}"; add it for such files')
    ranges, rule = (args.value_range, value_range_of(facts)), None
    if args.auto == "objects":
        rule = resolve_rule(facts, checkpoint, args.min_score, args.min_area)
    # SAM 2's mask generator has its own ways to clean masks
    cleaning = NO_CLEANING if args.clean == "off" or rule else cleaning_of(facts)
    if cleaning != NO_CLEANING:
        print(f"cleaned: {describe_cleaning(cleaning)}; --clean off leaves masks as they are")
    for segmenter in segmenters.values():
        segmenter.views, segmenter.cleaning = views, cleaning
    method = SegmentationMethod(segmenters, rule, opens_window)

    if not is_folder:
        image = read_like_training(args.image, *ranges)
        objects = segment_one(image, prompts, method, args.image.name)
        save_one(args.output, args.image, image, objects, args.save)
        return

    with only_run_in(args.output), slices_on_disk(volumes, ranges, args.bands) as slices:
        settings = make_settings(args.image, checkpoint, *ranges, rule, cleaning)
        settings |= {"bands": list(args.bands), VIEWS_SETTING: len(views)}
        results = FolderResults(args.output, args.save, settings, args.overwrite)
        images = [*images, *slices]
        tally = segment_folder(
            images,
            folder_prompts,
            method,
            ranges,
            results,
            args.overwrite,
            [name for volume in volumes for name in volume.names],
        )
        write_volumes(args.output, volumes, results)
    print_tally(tally, args.output / RESULTS_FILE)


if __name__ == "__main__":
    run(main)
