"""Segment one image with your fine-tuned SAM 2.1: by coordinates, or by clicking.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg               # click in a window
    python test_my_image.py --image test_images/dog.jpg --box "40,30,600,620" --original
    python test_my_image.py --image cells.png --box "5,5,40,40" --box "60,8,90,51"   # two objects
    python test_my_image.py --demo                                    # an image of the demo

Coordinates are x,y in pixels from the top left. A second --box, or --next-object, begins another
object. In the window, a left click adds a foreground point, a right click a background point;
closing the window runs the segmentation. Written to output/my_results/: the overlay, and the mask;
of several objects a label map, in which each has a value of its own.
"""

from __future__ import annotations

import argparse
import itertools
import operator
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError, autocast, select_device, select_precision

import numpy as np

from finetuning.checkpoints import setting
from finetuning.command_line import (
    ArgumentParser,
    add_device_option,
    parse_numbers,
    parse_range,
    run,
)
from finetuning.device_check import trusted_device
from finetuning.drawing import draw_object
from finetuning.image_files import read_image, read_mask, read_values, write_image
from finetuning.models import MODELS, ensure_checkpoint, load_predictor
from finetuning.pairs import DEMO_DATA, DEMO_OUTPUT
from finetuning.prompts import Prompt, make_prompt, prompt_from_mask
from finetuning.segmentation import encode_images, segment
from finetuning.window import ask_for_clicks

RESULTS = ("mask", "labels", "overlay")  # how the files' names end
DEMO_IMAGE, DEMO_MASK = (DEMO_DATA / kind / "val/demo_000.png" for kind in ("images", "masks"))


def parse_point(text: str) -> tuple[float, ...]:
    """Parse "x,y"."""
    return parse_numbers(text, 2, "320,200")


def parse_box(text: str) -> tuple[float, ...]:
    """Parse "x1,y1,x2,y2", top left before bottom right."""
    x1, y1, x2, y2 = box = parse_numbers(text, 4, "40,30,600,460")
    if x1 >= x2 or y1 >= y2:
        raise argparse.ArgumentTypeError(f'"{text}" is empty or turned round: x1<x2 and y1<y2')
    return box


class AddToPrompt(argparse.Action):
    """Keeps what is given of the prompt in its order: (option, value), (option, value), ..."""

    def __call__(self, parser: Any, namespace: Namespace, value: Any, option: str) -> None:
        namespace.given = [*namespace.given, (option, value)]


def make_prompts(given: list[tuple[str, Any]]) -> list[Prompt]:
    """Return a prompt an object, of (option, value) in the order that they were typed.

    A second --box, or --next-object, begins another object.
    """
    objects: list[dict[str, Any]] = [{}]
    for option, value in given:
        if option == "--next-object" or (option == "--box" and "box" in objects[-1]):
            objects.append({})
        if option == "--box":
            objects[-1]["box"] = value
        elif option != "--next-object":
            kind = "foreground" if option == "--point" else "background"
            objects[-1].setdefault(kind, []).append(value)
    if not all(objects):
        raise UserError("--next-object goes between the points or boxes of two objects")
    return [make_prompt(**of_object) for of_object in objects]


def check_inside(prompt: Prompt, width: int, height: int) -> None:
    """Raise UserError for a point outside the image; a box may end at its very edge."""
    for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
        is_beyond = operator.gt if label in (2, 3) else operator.ge
        if min(x, y) < 0 or is_beyond(x, width) or is_beyond(y, height):
            raise UserError(
                f"{x:g},{y:g} lies outside the image, which is {width} pixels wide and {height} "
                f"high; x goes from 0 to {width - 1}, y from 0 to {height - 1}"
            )


def free_name(folder: Path, stem: str) -> str:
    """Return `stem` with the first number that no result in `folder` has yet."""
    for number in itertools.count(1):
        name = f"{stem}_{number:03}"
        if not any((folder / f"{name}_{kind}.png").exists() for kind in RESULTS):
            return name


def value_range_of(facts: dict[str, Any]) -> tuple[float, float] | None:
    """Return the range of values that a model was trained on, if its file says one."""
    limits = setting(facts, "value_range", list) or []
    are_numbers = all(isinstance(limit, int | float) for limit in limits)
    return tuple(limits) if len(limits) == 2 and are_numbers and limits[0] < limits[1] else None


def write_results(
    folder: Path,
    stem: str,
    image: np.ndarray,
    prompts: list[Prompt],
    found: list[tuple[np.ndarray, float]],
) -> dict[str, Path]:
    """Write the overlay, and the mask or the label map; return their paths.

    found: of each object the HxW bool mask and its score; where two overlap in the label map, the
    pixel is of the one with the higher score.
    """
    name = free_name(folder, stem)
    overlay, labels = image.copy(), np.zeros(image.shape[:2], np.uint16)
    for number, (prompt, (mask, _)) in enumerate(zip(prompts, found, strict=True)):
        draw_object(overlay, mask, prompt, number=number)
    for number in sorted(range(len(found)), key=lambda number: found[number][1]):
        labels[found[number][0]] = number + 1
    kind = "labels" if len(found) > 1 else "mask"
    paths = {"overlay": folder / f"{name}_overlay.png", kind: folder / f"{name}_{kind}.png"}
    write_image(paths["overlay"], overlay)
    if len(found) == 1:
        labels = (255 * labels).astype(np.uint8)
    write_image(paths[kind], labels.astype(np.uint8) if len(found) < 256 else labels)
    return paths


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--image", type=Path, help="the image to segment")
    parser.add_argument("--demo", action="store_true", help="use what the demo trained")
    prompt = parser.add_argument_group("the prompt (without one, a window opens to click in)")
    for option, parse, metavar, what in (
        ("--point", parse_point, '"x,y"', "a point on the object; may be repeated"),
        ("--negative-point", parse_point, '"x,y"', "one on what is not the object; likewise"),
        (
            "--box",
            parse_box,
            '"x1,y1,x2,y2"',
            "its bounding box; a second box is another object's",
        ),
    ):
        prompt.add_argument(
            option, action=AddToPrompt, type=parse, metavar=metavar, help=what, dest="given"
        )
    prompt.add_argument(
        "--next-object", action=AddToPrompt, nargs=0, dest="given", help="points of another follow"
    )
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
    parser.add_argument(
        "--output", type=Path, default=Path("output/my_results"), help="where results go"
    )
    add_device_option(parser)
    parser.set_defaults(finetuned=Path("output/sam2_best.pt"), given=[])
    args = parser.parse_args_with_demo(
        argv,
        image=DEMO_IMAGE,
        model="mini",
        finetuned=DEMO_OUTPUT / "sam2_best.pt",
        output=DEMO_OUTPUT / "my_results",
    )
    if not args.image:
        parser.error("--image is missing: the image to segment")
    if args.original and args.checkpoint:
        parser.error("--original and --checkpoint name two models; give one of them")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device)
    if args.image == DEMO_IMAGE and not args.image.is_file():
        raise UserError(f"no {DEMO_IMAGE} yet; run: python train_sam2_proper.py --demo")
    image = read_image(args.image)
    height, width = image.shape[:2]

    # The model; the original is downloaded if missing
    checkpoint = args.checkpoint or args.finetuned
    if args.original:
        checkpoint = ensure_checkpoint(args.model or "small")
    elif not args.checkpoint and not checkpoint.is_file():
        command = "python train_sam2_proper.py" + " --demo" * args.demo
        raise UserError(f"no fine-tuned model at {checkpoint}; run: {command}, or use --original")
    predictor, facts = load_predictor(args.model, checkpoint, device)
    device = trusted_device(predictor, device, insists=args.device == "mps")

    value_range, trained_range = args.value_range, value_range_of(facts)
    if not value_range and trained_range and read_values(args.image)[0].dtype != np.uint8:
        value_range = trained_range
    if value_range:
        image = read_image(args.image, value_range)

    # The prompts: given, or else clicked; of the demo's own image the mask is known
    if args.given:
        prompts = make_prompts(args.given)
    elif args.demo and args.image == DEMO_IMAGE:
        prompts = [prompt_from_mask(read_mask(DEMO_MASK), "center")]
    else:
        prompts = [ask_for_clicks(image)]
    for prompt in prompts:
        check_inside(prompt, width, height)

    with autocast(device, select_precision("auto", device)):
        features = encode_images(predictor, [image])
        found = [segment(predictor, features, prompt, (height, width)) for prompt in prompts]

    print(f"model:   {checkpoint} (SAM 2.1 {facts['model_name']})")
    for number, (mask, score) in enumerate(found, start=1):
        which = f"object {number}\n" if len(found) > 1 else ""
        print(f"{which}score:   {score:.3f} (the model's own estimate of its IoU)")
        print(f"area:    {mask.sum()} pixels, {mask.mean():.1%} of the image")
    for name, path in write_results(args.output, args.image.stem, image, prompts, found).items():
        print(f"{name + ':':<8} {path}")


if __name__ == "__main__":
    run(main)
