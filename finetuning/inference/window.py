"""The window to click in: it shows the mask after each click."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sam2_utils import UserError

import numpy as np

from finetuning.inference.clicked_object import Box, Click, ClickedObject
from finetuning.inference.window_picture import WindowPicture
from finetuning.model.model import Segmenter
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.prompts import make_prompt

LEFT_BUTTON, RIGHT_BUTTON = 1, 3
MIN_DRAG = 6  # screen pixels; anything shorter counts as a click, as hands are unsteady
HINT = "left click: object   right click: not the object   drag: box   Enter: save   h: all keys"
HELP = """\
left click     on the object
right click    on what is not the object
drag           a box around the object

a              the mask without a prompt, to correct by clicks
u, Backspace   undo
r              start the object over
n              next object, or a new one{switch}
h              this help

Enter          save (so does closing the window)
Escape         cancel, save nothing for this image"""
KOREAN_KEYS = dict(zip("ㅁㅕㄱㅜㅐㅗ", "aurnoh", strict=True))  # while the keyboard types Korean


class Answer(NamedTuple):
    """What the user did in a window.

    is_cancelled: by Escape; save nothing for this image, and show no further images.
    """

    objects: list[SegmentedObject]
    is_cancelled: bool


class ClickWindow:
    """Turns mouse and key events into objects, and shows their masks."""

    def __init__(
        self,
        figure: Any,
        image: np.ndarray,
        segmenters: dict[str, Segmenter],
        start: list[SegmentedObject],
        close: Callable[[], None],
    ) -> None:
        """Listen to an empty matplotlib figure, which `close` closes; the rest as ask_in_window."""
        self.figure, self.image, self.segmenters, self.close = figure, image, segmenters, close
        self.encoded: set[str] = set()
        self.is_cancelled = False
        self.error: Exception | None = None
        self.pressed: Any = None  # the event that started a click or a drag
        self.model = next(iter(segmenters))
        self.objects = [ClickedObject(found, self.model) for found in start] or [ClickedObject()]
        self.current = 0
        switch = f"\no              {' / '.join(segmenters)}" if len(segmenters) > 1 else ""
        self.picture = WindowPicture(figure, image, HINT, HELP.format(switch=switch))
        self.actions = {
            **dict.fromkeys(("u", "backspace"), self.undo),
            **dict.fromkeys(("enter", "return"), close),
            "r": self.start_over, "n": self.next_object, "o": self.switch,
            "h": self.picture.toggle_help, "escape": self.cancel,
            "a": self.start_automatically,
        }  # fmt: skip
        self.show()
        self.listen()

    def listen(self) -> None:
        """Connect the mouse and the keys; disconnect matplotlib's own keys, which would act too."""
        canvas = self.figure.canvas
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)
        for name, handler in (
            ("button_press_event", self.on_press),
            ("motion_notify_event", self.on_move),
            ("button_release_event", self.on_release),
            ("key_press_event", self.on_key),
        ):
            canvas.mpl_connect(name, self.closing_on_error(handler))

    def closing_on_error(self, handler: Callable[[Any], None]) -> Callable[[Any], None]:
        """Let a handler's error close the window, where matplotlib would only print it.

        ask_in_window raises it.
        """

        def handle(event: Any) -> None:
            try:
                handler(event)
            except Exception as error:
                self.error = error
                self.close()

        return handle

    def segment(self) -> list[SegmentedObject | None]:
        """Segment each object with the current model; None for objects without a click."""
        segmenter = self.segmenters[self.model]
        if self.model not in self.encoded:
            print(f"encoding the image for the {self.model} model ...", flush=True)
            segmenter.encode(self.image)
            self.encoded.add(self.model)
        return [one.segment(self.model, segmenter) for one in self.objects]

    def show(self) -> None:
        """Show all masks, and the current object's score and area in the title."""
        found = self.segment()
        one = found[self.current]
        title = f"{self.model}, object {self.current + 1}: "
        if one is None:
            title += "click on it"
        else:
            area = np.count_nonzero(one.mask)
            title += f"score {one.score:.3f}, area {area} pixels ({area / one.mask.size:.1%})"
        self.picture.show(found, self.current, title)

    def on_press(self, event: Any) -> None:
        """Start a click or a drag on the image."""
        is_zooming = event.canvas.widgetlock.locked()  # or panning
        is_ours = event.inaxes and event.button in (LEFT_BUTTON, RIGHT_BUTTON)
        if is_ours and not is_zooming and not event.dblclick:
            point = self.picture.pixel_at(event)
            self.pressed = event if point == self.picture.clip(point) else None

    def on_move(self, event: Any) -> None:
        """Draw the box during a drag."""
        if self.pressed and self.is_drag(event):
            self.picture.draw_box(self.dragged_box(event))

    def on_release(self, event: Any) -> None:
        """End a click or a drag, and show the new mask."""
        if not self.pressed or event.button != self.pressed.button:
            return
        step = Click(*self.picture.pixel_at(self.pressed), int(event.button == LEFT_BUTTON))
        if self.is_drag(event):
            step = self.dragged_box(event)
        self.pressed = None
        # A drag along one row or column of pixels is no box
        if isinstance(step, Click) or (step.x1 < step.x2 and step.y1 < step.y2):
            self.objects[self.current].steps.append(step)
        self.show()

    def on_key(self, event: Any) -> None:
        """Run the key's action."""
        key = (event.key or "").lower()
        action = self.actions.get(KOREAN_KEYS.get(key, key))
        if action:
            action()

    def is_drag(self, event: Any) -> bool:
        """Return whether the left button was dragged, not just clicked."""
        distance = max(abs(event.x - self.pressed.x), abs(event.y - self.pressed.y))
        return self.pressed.button == LEFT_BUTTON and distance > MIN_DRAG

    def dragged_box(self, event: Any) -> Box:
        """Return the box between the start of the drag and an event."""
        start, end = self.picture.pixel_at(self.pressed), self.picture.pixel_at(event)
        (x1, x2), (y1, y2) = map(sorted, zip(start, self.picture.clip(end), strict=True))
        return Box(x1, y1, x2, y2)

    def undo(self) -> None:
        """Remove the last click or box."""
        del self.objects[self.current].steps[-1:]
        self.show()

    def start_over(self) -> None:
        """Reset the object, including the mask that it started with."""
        self.objects[self.current] = ClickedObject()
        self.show()

    def start_automatically(self) -> None:
        """Restart the object from the mask that the model gives without any prompt."""
        mask, score, _ = self.segmenters[self.model].segment(make_prompt())
        start = SegmentedObject(make_prompt(), mask, score)
        self.objects[self.current] = ClickedObject(start, self.model)
        self.show()

    def next_object(self) -> None:
        """Go to the next object; after the last one, to a new one or, if it is empty, the first."""
        if self.current == len(self.objects) - 1 and self.segment()[-1] is not None:
            self.objects.append(ClickedObject())
        self.current = (self.current + 1) % len(self.objects)
        self.show()

    def switch(self) -> None:
        """Show the other model's masks for the same clicks."""
        names = list(self.segmenters)
        self.model = names[(names.index(self.model) + 1) % len(names)]
        if self.model not in self.encoded:
            self.picture.say(f"{self.model}: encoding the image ...")
        self.show()

    def cancel(self) -> None:
        """Close the window and save nothing."""
        self.is_cancelled = True
        self.close()


def ask_in_window(
    image: np.ndarray,
    title: str,
    segmenters: dict[str, Segmenter],
    start: list[SegmentedObject] = (),
) -> Answer:
    """Open a window, wait until it is closed, and return the objects that the user clicked on.

    Arguments:
      image: HxWx3 uint8 RGB.
      title: the window's title; it may hold any Unicode characters.
      segmenters: models by name. The window starts with the first one; a second one encodes the
        image only when the user switches to it.
      start: objects that the first model has already found, to correct by clicks.

    Raises UserError if no window can be opened.
    """
    import matplotlib.pyplot as plt  # chooses a window system, which --point does not need

    no_window = (
        "no window can be opened here; give the object's position with --point \"x,y\", a folder's "
        "prompts with --prompts FILE.csv, or segment without a prompt with --auto whole "
        "(on a Linux desktop, python3-tk may be missing: sudo apt install python3-tk)"
    )
    try:
        figure = plt.figure(figsize=(9, 7))
    except ImportError as error:
        raise UserError(no_window) from error
    try:
        if figure.canvas.required_interactive_framework is None:  # it can only draw to files
            raise UserError(no_window)
        figure.canvas.manager.set_window_title(title)
        window = ClickWindow(figure, image, segmenters, start, lambda: plt.close(figure))
        plt.show(block=True)
    finally:
        plt.close(figure)
    if window.error:
        raise window.error
    found = [one for one in window.segment() if one is not None]
    return Answer([] if window.is_cancelled else found, window.is_cancelled)
