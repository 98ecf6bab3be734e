"""What the window shows: the image, its masks and clicks, a title and the help."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from matplotlib.artist import Artist

from finetuning.inference.clicked_object import Box
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.drawing import draw_object
from finetuning.segmentation.prompts import make_prompt

MAX_DRAWN_SIDE = 1600  # screen pixels; on larger screens, masks are drawn coarser to stay fast
ImagePart = tuple[int, int, int, int]  # X1,Y1,X2,Y2 in pixels of the image, the last two exclusive


class MaskedImage(Artist):
    """An image with masks; only the visible part is drawn, at the resolution of the screen.

    So the time to draw does not depend on the image's size, and zooming in shows full detail.
    Matplotlib's own AxesImage computes in floating point and takes some five times as long.
    """

    def __init__(self, image: np.ndarray) -> None:
        """Take an HxWx3 uint8 RGB image."""
        super().__init__()
        self.image = image
        self.objects: dict[int, SegmentedObject] = {}  # by number
        self.current = 0
        # Cached pictures: a click changes only the current object, so the others are drawn once
        self._seen: tuple | None = None  # the part and size that the pictures show
        self._others: np.ndarray | None = None  # all objects except the current one
        self._picture: np.ndarray | None = None  # all objects

    def set_objects(self, found: list[SegmentedObject | None], current: int) -> None:
        """Set all objects; the current one's mask is drawn last, over the others."""
        before = {n: id(one) for n, one in self.objects.items() if n != self.current}
        after = {n: id(one) for n, one in enumerate(found) if one and n != current}
        if before != after:
            self._others = None
        self._picture = None
        self.objects = {n: one for n, one in enumerate(found) if one}
        self.current = current

    def draw(self, renderer: Any) -> None:
        """Draw the visible part; matplotlib calls this whenever anything has changed."""
        x1, y1, x2, y2 = part = self.visible_part()
        # Pixel centers have whole coordinates, so the edges of the part lie half a pixel outside
        corners = self.axes.transData.transform([(x1 - 0.5, y2 - 0.5), (x2 - 0.5, y1 - 0.5)])
        (left, bottom), (right, top) = np.rint(corners).astype(int).tolist()
        size = max(1, right - left), max(1, top - bottom)
        if self._seen != (part, size):
            self._seen, self._others, self._picture = (part, size), None, None
        if self._picture is None:
            self._picture = self.paint(part, size)
        context = renderer.new_gc()
        context.set_clip_rectangle(self.axes.bbox)
        renderer.draw_image(context, left, bottom, self._picture)
        context.restore()

    def visible_part(self) -> ImagePart:
        """Return the part of the image that lies in the axes, with a margin."""
        bounds = []
        for limits, length in zip(
            (self.axes.get_xlim(), self.axes.get_ylim()), self.image.shape[1::-1], strict=True
        ):
            low, high = sorted(limits)
            margin = (
                0.05 * (high - low) + 1
            )  # hides the outlines that masks get where they are cut off
            first = int(np.clip(np.floor(low - margin), 0, length - 1))
            bounds.append((first, int(np.clip(np.ceil(high + margin), first + 1, length))))
        (x1, x2), (y1, y2) = bounds
        return x1, y1, x2, y2

    def paint(self, part: ImagePart, size: tuple[int, int]) -> np.ndarray:
        """Return a part of the image with its masks, HxWx4 uint8 RGBA, bottom row first.

        size: (W,H) in screen pixels.
        """
        x1, y1, x2, y2 = part
        scale = min(1, MAX_DRAWN_SIDE / max(size))
        drawn_size = tuple(max(1, round(scale * side)) for side in size)

        def draw_mask(canvas: np.ndarray, number: int) -> None:
            mask = self.objects[number].mask[y1:y2, x1:x2].view(np.uint8)
            mask = cv2.resize(mask, drawn_size, interpolation=cv2.INTER_NEAREST)
            draw_object(canvas, mask.view(bool), number=number)

        if self._others is None:
            how = cv2.INTER_AREA if drawn_size[0] < x2 - x1 else cv2.INTER_NEAREST
            self._others = cv2.resize(self.image[y1:y2, x1:x2], drawn_size, interpolation=how)
            for number in self.objects.keys() - {self.current}:
                draw_mask(self._others, number)
        canvas = self._others.copy()
        if self.current in self.objects:
            draw_mask(canvas, self.current)
        canvas = cv2.resize(canvas, size, interpolation=cv2.INTER_NEAREST)
        return cv2.cvtColor(cv2.flip(canvas, 0), cv2.COLOR_RGB2RGBA)


class WindowPicture:
    """Everything that the figure shows; it is laid out once, then only its data change."""

    def __init__(self, figure: Any, image: np.ndarray, hint: str, help_text: str) -> None:
        """Show an HxWx3 uint8 RGB image in an empty matplotlib figure, with a hint below it."""
        self.figure = figure
        self.size = height, width = image.shape[:2]
        self.axes = figure.add_axes((0.01, 0.05, 0.98, 0.89))
        self.axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
        self.axes.axis("off")
        self.image = self.axes.add_artist(MaskedImage(image))
        self.points = [
            self.axes.plot(
                [], [], shape, color=color, markeredgecolor="white", markersize=9,
                scalex=False, scaley=False,
            )[0]
            for shape, color in (("X", "red"), ("o", "lime"))  # labels 0 and 1
        ]  # fmt: skip
        (self.box,) = self.axes.plot([], [], color="lime", scalex=False, scaley=False)
        figure.text(0.5, 0.025, hint, ha="center", va="center", fontsize=9)
        self.help = figure.text(
            0.5, 0.5, help_text, ha="center", va="center", multialignment="left",
            family="monospace", visible=False,
            bbox={"facecolor": "white", "edgecolor": "gray", "alpha": 0.92, "pad": 12},
        )  # fmt: skip

    def show(self, found: list[SegmentedObject | None], current: int, title: str) -> None:
        """Show all masks, and the current object's clicks and box."""
        self.axes.set_title(title, fontsize=11)
        self.image.set_objects(found, current)
        coords, labels = found[current].prompt if found[current] else make_prompt()
        for label, points in enumerate(self.points):
            points.set_data(*coords[labels == label].T)
        corners = coords[labels >= 2]
        self.draw_box(Box(*corners.ravel()) if len(corners) else None)

    def draw_box(self, box: Box | None) -> None:
        """Draw a box, or remove it."""
        x1, y1, x2, y2 = box or (np.nan,) * 4
        self.box.set_data([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1])
        self.figure.canvas.draw_idle()

    def say(self, title: str) -> None:
        """Show a title at once, before a slow step."""
        self.axes.set_title(title, fontsize=11)
        self.figure.canvas.draw()
        self.figure.canvas.flush_events()

    def toggle_help(self) -> None:
        """Show or hide the list of keys."""
        self.help.set_visible(not self.help.get_visible())
        self.figure.canvas.draw_idle()

    def pixel_at(self, event: Any) -> tuple[int, int]:
        """Return the (X,Y) pixel under an event; it may lie outside the image."""
        x, y = self.axes.transData.inverted().transform((event.x, event.y))
        return round(float(x)), round(float(y))

    def clip(self, point: tuple[int, int]) -> tuple[int, int]:
        """Return the nearest (X,Y) pixel of the image."""
        height, width = self.size
        return min(max(point[0], 0), width - 1), min(max(point[1], 0), height - 1)
