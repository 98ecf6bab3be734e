"""Measure the seconds from a click in the window to its mask on the screen.

    python benchmarks/click_latency.py                     # small, 2 threads
    python benchmarks/click_latency.py --size 6000x4000    # a larger image

Uses random weights, a random image and matplotlib's own mouse events. Figures are drawn in memory
(Agg), as every window system does before it copies them to the screen. Prints the median of 20
clicks on one object, and the model's part of it (prompt encoder, mask decoder, full-size mask).
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import select_device, select_precision

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backend_bases import MouseEvent

from finetuning.basics.command_line import ArgumentParser, add_device_option, number, run
from finetuning.inference.window import ClickWindow
from finetuning.model.model import Segmenter
from finetuning.model.models import MODELS, build_predictor


class TimedSegmenter(Segmenter):
    """A segmenter that records the seconds of each mask, but returns an ellipse.

    Random weights give noisy masks, whose outlines take longer to draw than those of an object.
    """

    def encode(self, image):
        super().encode(image)
        self.seconds = []
        y, x = (np.linspace(-1, 1, length) ** 2 for length in self.size)
        self.ellipse = x + y[:, None] < 0.4

    def segment(self, *arguments):
        start = time.perf_counter()
        _, *others = super().segment(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return self.ellipse, *others


def click(figure, x: float, y: float) -> float:
    """Left-click at (x,y) of the image; return the seconds until the window is redrawn."""
    canvas = figure.canvas
    where = figure.axes[0].transData.transform((x, y))
    with mock.patch.object(canvas, "draw_idle"):  # like a window, draw once, after the handlers
        start = time.perf_counter()
        for name in ("button_press_event", "button_release_event"):
            canvas.callbacks.process(name, MouseEvent(name, canvas, *where, 1))
        canvas.draw()
    return time.perf_counter() - start


def parse_size(text: str) -> tuple[int, int]:
    """Parse "WIDTHxHEIGHT"."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise ArgumentTypeError(f'"{text}" is not like "1280x1024"') from error
    return width, height


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--size", type=parse_size, default=(1280, 1024), help="image in pixels")
    parser.add_argument("--clicks", type=at_least_1, default=20, help="how many to measure")
    add_device_option(parser)
    parser.set_defaults(threads=2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    device = select_device(args.device, args.threads)
    rng, (width, height) = np.random.default_rng(0), args.size
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    predictor, precision = build_predictor(args.model, device), select_precision("auto", device)
    segmenter = TimedSegmenter(predictor, precision)
    plt.switch_backend("agg")
    figure = plt.figure(figsize=(9, 7))
    window = ClickWindow(figure, image, {args.model: segmenter}, [], lambda: None)
    figure.canvas.draw()
    click(figure, width / 2, height / 2)  # warm up: some work is done only once
    window.undo()
    segmenter.seconds.clear()
    seconds = [click(figure, *(rng.random(2) * args.size)) for _ in range(args.clicks)]
    whole, model = np.median(seconds), np.median(segmenter.seconds)
    print(f"{whole:.3f} s from click to mask, {model:.3f} s of it in the model")
    print(
        f"(median of {args.clicks}; {args.model}, {width}x{height} pixels, {device}, "
        f"{torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    run(main)
