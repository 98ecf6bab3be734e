"""Segment one image with your fine-tuned SAM 2.1: by coordinates, or by clicking.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg               # click in a window
    python test_my_image.py --image test_images/dog.jpg --box "40,30,600,620" --original
    python test_my_image.py --demo                                    # an image of the demo

Coordinates are x,y in pixels from the top left. In the window, a left click adds a foreground
point, a right click a background point; closing the window runs the segmentation. The overlay
and the mask are written to output/my_results/.
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

from finetuning.command_line import ArgumentParser, add_device_option, run
from finetuning.device_check import trusted_device
from finetuning.drawing import draw_overlay
from finetuning.image_files import read_image, read_mask, write_image
from finetuning.models import MODELS, ensure_checkpoint, load_predictor
from finetuning.pairs import DEMO_DATA, DEMO_OUTPUT
from finetuning.prompts import Prompt, make_prompt, prompt_from_mask
from finetuning.segmentation import encode_images, segment

DEMO_IMAGE, DEMO_MASK = (DEMO_DATA / kind / "val/demo_000.png" for kind in ("images", "masks"))
LEFT_BUTTON, RIGHT_BUTTON = 1, 3


class ClickWindow:
    """Collect foreground (left) and background (right) clicks on an image in a figure."""

    def __init__(self, figure: Any, image: np.ndarray) -> None:
        """Show an HxWx3 uint8 RGB image in an empty matplotlib figure, and listen."""
        self.foreground: list[tuple[int, int]] = []
        self.background: list[tuple[int, int]] = []
        self.size = image.shape[1], image.shape[0]
        self.axes = figure.subplots()
        self.axes.imshow(image)
        self.axes.set_title("left click: object   right click: background   close: segment")
        self.axes.axis("off")
        self.axes.autoscale(False)
        figure.canvas.mpl_connect("button_press_event", self.on_click)

    def on_click(self, event: Any) -> None:
        """Keep a click inside the image, and draw it at once."""
        toolbar = event.canvas.toolbar
        if event.inaxes is not self.axes or (toolbar is not None and toolbar.mode):
            return  # outside the image, or zooming and panning
        point = (round(event.xdata), round(event.ydata))
        if not all(0 <= value < size for value, size in zip(point, self.size, strict=True)):
            return  # beside the image, which may have been moved or zoomed
        if event.button == LEFT_BUTTON:
            self.foreground.append(point)
            self.axes.plot(*point, "o", color="lime", markeredgecolor="white", markersize=9)
        elif event.button == RIGHT_BUTTON:
            self.background.append(point)
            self.axes.plot(*point, "X", color="red", markeredgecolor="white", markersize=9)
        event.canvas.draw_idle()


def ask_for_clicks(image: np.ndarray) -> Prompt:
    """Open a window, wait until it is closed, and return the clicks made in it.

    Raises UserError where no window can be opened, or nothing was clicked.
    """
    import matplotlib.pyplot as plt  # chooses a window system, which --point has no need of

    no_window = (
        'no window can be opened here; give the object\'s position with --point "x,y" '
        "(on a Linux desktop, python3-tk may be missing: sudo apt install python3-tk)"
    )
    try:
        figure = plt.figure("SAM 2", figsize=(9, 7), layout="constrained")
    except ImportError as error:
        raise UserError(no_window) from error
    if figure.canvas.required_interactive_framework is None:  # it fell back to drawing to files
        raise UserError(no_window)
    window = ClickWindow(figure, image)
    plt.show(block=True)
    if not (window.foreground or window.background):
        raise UserError("nothing was clicked; click on the object, then close the window")
    return make_prompt(window.foreground, window.background)


def parse_numbers(text: str, count: int, example: str) -> tuple[float, ...]:
    """Parse `count` numbers, separated by commas, that a picture's pixels may have."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(abs(number) < 1e9 for number in numbers):  # nor NaN
        raise argparse.ArgumentTypeError(f'"{text}" is not like "{example}" (pixels)')
    return numbers


def parse_point(text: str) -> tuple[float, ...]:
    """Parse "x,y"."""
    return parse_numbers(text, 2, "320,200")


def parse_box(text: str) -> tuple[float, ...]:
    """Parse "x1,y1,x2,y2", top left before bottom right."""
    x1, y1, x2, y2 = box = parse_numbers(text, 4, "40,30,600,460")
    if x1 >= x2 or y1 >= y2:
        raise argparse.ArgumentTypeError(f'"{text}" is empty or turned round: x1<x2 and y1<y2')
    return box


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
        if not any((folder / f"{name}_{kind}.png").exists() for kind in ("mask", "overlay")):
            return name


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--image", type=Path, help="the image to segment")
    parser.add_argument("--demo", action="store_true", help="use what the demo trained")
    prompt = parser.add_argument_group("the prompt (without one, a window opens to click in)")
    prompt.add_argument(
        "--point",
        type=parse_point,
        action="append",
        default=[],
        metavar='"x,y"',
        help="a point on the object; may be repeated",
    )
    prompt.add_argument(
        "--negative-point",
        type=parse_point,
        action="append",
        default=[],
        metavar='"x,y"',
        help="a point on what is not the object; may be repeated",
    )
    prompt.add_argument(
        "--box", type=parse_box, metavar='"x1,y1,x2,y2"', help="the object's bounding box"
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
    parser.set_defaults(finetuned=Path("output/sam2_best.pt"))
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

    # The prompt: given, or else clicked; of the demo's own image the mask is known
    if args.point or args.negative_point or args.box:
        prompt = make_prompt(args.point, args.negative_point, args.box)
    elif args.demo and args.image == DEMO_IMAGE:
        prompt = prompt_from_mask(read_mask(DEMO_MASK), "center")
    else:
        prompt = ask_for_clicks(image)
    check_inside(prompt, width, height)

    with autocast(device, select_precision("auto", device)):
        features = encode_images(predictor, [image])
        mask, score = segment(predictor, features, prompt, (height, width))

    stem = free_name(args.output, args.image.stem)
    overlay_path = args.output / f"{stem}_overlay.png"
    mask_path = args.output / f"{stem}_mask.png"
    write_image(overlay_path, draw_overlay(image, mask, prompt))
    write_image(mask_path, mask.astype(np.uint8) * 255)
    print(f"model:   {checkpoint} (SAM 2.1 {facts['model_name']})")
    print(f"score:   {score:.3f} (the model's own estimate of its IoU)")
    print(f"area:    {mask.sum()} pixels, {mask.mean():.1%} of the image")
    print(f"overlay: {overlay_path}")
    print(f"mask:    {mask_path}")


if __name__ == "__main__":
    run(main)
