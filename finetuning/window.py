"""A window to click in."""

from __future__ import annotations

from typing import Any

from sam2_utils import UserError

import numpy as np

from finetuning.prompts import Prompt, make_prompt

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
