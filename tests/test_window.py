"""In the window, mouse and key events show masks at once, and the masks shown are saved."""

import warnings
from pathlib import Path

from sam2_utils import UserError

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair
from matplotlib.backend_bases import KeyEvent, MouseEvent, NavigationToolbar2

from finetuning.basics.image_files import read_mask, write_image
from finetuning.basics.pictures import COLORS
from finetuning.inference import window_picture
from finetuning.inference.clicked_object import mask_to_logits
from finetuning.inference.window import ask_in_window
from finetuning.model.model import Segmenter
from finetuning.model.models import load_predictor
from finetuning.segmentation.automatic import SegmentedObject
from finetuning.segmentation.drawing import draw_object
from finetuning.segmentation.prompts import make_prompt
from test_my_image import main

IMAGE = draw_pair(0)[0]
MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "sam2_mini.pt"
A, B, C = (60, 40), (30, 70), (100, 20)  # pixels of it


@pytest.fixture(scope="session")
def segmenters() -> dict[str, Segmenter]:
    """Return mini, and a copy of it with slightly changed weights."""
    predictors = [load_predictor("mini", MINI, CPU)[0] for _ in range(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in predictors[1].model.sam_mask_decoder.parameters():
            weights += 0.02 * torch.randn_like(weights)
    finetuned, original = (Segmenter(predictor, torch.float32) for predictor in predictors)
    return {"fine-tuned": finetuned, "original": original}


class Person:
    """A user of the window, who clicks on pixels of the image and presses keys."""

    def __init__(self, figure, image: np.ndarray) -> None:
        self.figure, self.canvas, self.image = figure, figure.canvas, image
        self.axes = figure.axes[0]

    def mouse(self, name: str, x: float, y: float, button=None, **more) -> None:
        where = self.axes.transData.transform((x, y))
        event = MouseEvent(name, self.canvas, *where, button, **more)
        self.canvas.callbacks.process(name, event)

    def click(self, x: float, y: float, button: int = 1, **more) -> None:
        self.mouse("button_press_event", x, y, button, **more)
        self.mouse("button_release_event", x, y, button)

    def drag(self, start, end, button: int = 1) -> None:
        self.mouse("button_press_event", *start, button)
        self.mouse("motion_notify_event", *np.add(start, end) / 2)
        self.mouse("motion_notify_event", *end)
        self.mouse("button_release_event", *end, button)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.canvas.callbacks.process(
                "key_press_event", KeyEvent("key_press_event", self.canvas, key)
            )

    @property
    def title(self) -> str:
        return self.axes.get_title()

    @property
    def box(self) -> list[float]:
        """The corners of the box that is drawn; nan for none."""
        x, y = next(line for line in self.axes.lines if line.get_linestyle() == "-").get_data()
        return [min(x), min(y), max(x), max(y)]

    def screen(self, part=np.s_[:, :]) -> np.ndarray:
        """Return the color on the screen at each pixel of a part of the image, HxWx3."""
        self.canvas.draw()
        colors = np.asarray(self.canvas.buffer_rgba())[..., :3].astype(int)
        y, x = (index[part] for index in np.indices(self.image.shape[:2]))
        where = self.axes.transData.transform(np.stack([x, y], axis=-1).reshape(-1, 2))
        column, row = np.floor(where).astype(int).T
        return colors[len(colors) - 1 - row, column].reshape(*x.shape, 3)

    def sees(self, number: int = 0, part=np.s_[:, :]) -> np.ndarray:
        """Return where an object's color or its white outline is on the screen, HxW bool."""
        tinted = self.image[part] // 2 + np.array(COLORS[number]) // 2
        return (self.screen(part) >= tinted - 2).all(-1)


@pytest.fixture
def at_window(monkeypatch, segmenters):
    """Return a function that opens a window, lets a person act in it, and returns the answer."""
    plt.switch_backend("agg")
    plt.close("all")
    monkeypatch.setattr(plt.FigureCanvasBase, "required_interactive_framework", "test")

    def open_window(does, image=IMAGE, models=("fine-tuned",), start=(), title="dog.jpg"):
        monkeypatch.setattr(plt, "show", lambda block: does(Person(plt.gcf(), image)))
        return ask_in_window(image, title, {name: segmenters[name] for name in models}, start)

    yield open_window
    assert not plt.get_fignums()


def replay(segmenter: Segmenter, *prompts: dict, logits=None, image=IMAGE) -> SegmentedObject:
    """Segment with one prompt after the other, each with the logits of the previous mask."""
    segmenter.encode(image)
    for options in prompts:
        prompt = make_prompt(**options)
        mask, score, logits = segmenter.segment(prompt, logits)
    return SegmentedObject(prompt, mask, score)


def assert_same(one: SegmentedObject, other: SegmentedObject) -> None:
    assert np.array_equal(one.mask, other.mask)
    assert one.score == other.score
    for left, right in zip(one.prompt, other.prompt, strict=True):
        assert np.array_equal(left, right) and left.dtype == right.dtype


def assert_shown(person: Person, one: SegmentedObject, number: int = 0, beside=False) -> None:
    """Assert that the screen shows the object's mask where nothing else is drawn.

    beside: the other objects' masks.
    """
    assert f"score {one.score:.3f}, area {one.mask.sum()} pixels" in person.title
    covered = (beside | np.zeros_like(one.mask)).astype(np.uint8)
    covered = cv2.dilate(covered, np.ones((3, 3)))  # with its outline
    for point in one.prompt.point_coords.astype(int).tolist():
        cv2.circle(covered, point, 3, 1, -1)
    corners = one.prompt.point_coords[one.prompt.point_labels >= 2].astype(int).tolist()
    if corners:
        cv2.rectangle(covered, *corners, 1, 3)
    assert one.mask.sum() > 100
    assert ((person.sees(number) != one.mask) & (covered == 0)).sum() <= 5


def test_a_click_shows_the_segmenters_mask_at_once(at_window, segmenters):
    expected = replay(segmenters["fine-tuned"], {"foreground": [A]})

    def does(person):
        assert person.sees().sum() == 0 and "click on it" in person.title
        person.click(A[0] + 0.3, A[1] - 0.2)
        assert_shown(person, expected)

    objects, is_cancelled = at_window(does)
    assert not is_cancelled
    assert_same(*objects, expected)


def test_later_clicks_correct_the_mask_so_far(at_window, segmenters):
    first = {"foreground": [A]}
    both = {"foreground": [A], "background": [B]}
    expected = replay(segmenters["fine-tuned"], first, both)
    assert (expected.mask != replay(segmenters["fine-tuned"], both).mask).any()

    def does(person):
        person.click(*A)
        person.click(*B, button=3)
        assert_shown(person, expected)

    assert_same(*at_window(does).objects, expected)


def test_a_drag_is_a_box_that_is_drawn_meanwhile(at_window, segmenters):
    def does(person):
        person.mouse("button_press_event", 90, 80, 1)
        person.mouse("motion_notify_event", 50, 60)
        assert person.box == [50, 60, 90, 80] and "click on it" in person.title
        person.mouse("motion_notify_event", 20, 10)
        person.mouse("button_release_event", 20, 10, 1)
        assert person.box == [20, 10, 90, 80]
        assert_shown(person, expected)

    expected = replay(segmenters["fine-tuned"], {"box": (20, 10, 90, 80)})
    assert_same(*at_window(does).objects, expected)


def test_a_box_ends_at_the_edge_and_may_not_be_flat(at_window, segmenters):
    def does(person):
        person.drag(A, (A[0] + 30, A[1]))  # no height
        assert "click on it" in person.title and np.isnan(person.box).all()
        person.drag((20, 10), (500, 400))

    expected = replay(segmenters["fine-tuned"], {"box": (20, 10, 127, 95)})
    assert_same(*at_window(does).objects, expected)


def test_an_unsteady_click_is_a_click_and_only_the_left_button_drags(at_window, segmenters):
    def does(person):
        person.drag(A, (A[0] + 0.6, A[1] + 0.6))  # four pixels of the screen
        person.drag(B, C, button=3)
        person.drag(C, A, button=2)

    prompts = {"foreground": [A]}, {"foreground": [A], "background": [B]}
    assert_same(*at_window(does).objects, replay(segmenters["fine-tuned"], *prompts))


def test_a_box_is_replayed_before_the_clicks_and_replaces_another(at_window, segmenters):
    def does(person):
        person.click(*A)
        person.drag((5, 5), (50, 50))
        person.drag((20, 10), (90, 80))
        assert_shown(person, replay(segmenters["fine-tuned"], *prompts[:2]))
        person.click(*B, button=3)

    box = {"box": (20, 10, 90, 80)}
    prompts = box, {**box, "foreground": [A]}, {**box, "foreground": [A], "background": [B]}
    assert_same(*at_window(does).objects, replay(segmenters["fine-tuned"], *prompts))


@pytest.mark.parametrize("key", ("u", "backspace", "U", "ㅕ"))
def test_undone_is_as_if_never_done(at_window, segmenters, key):
    def does(person):
        person.press(key)  # there is nothing to undo
        person.click(*A)
        person.click(*C)
        person.drag((20, 10), (90, 80))
        person.click(*B, button=3)
        person.press(key, key)
        assert np.isnan(person.box).all()
        person.press(key)
        assert_shown(person, replay(segmenters["fine-tuned"], {"foreground": [A]}))
        person.click(*B, button=3)

    prompts = {"foreground": [A]}, {"foreground": [A], "background": [B]}
    assert_same(*at_window(does).objects, replay(segmenters["fine-tuned"], *prompts))


def test_r_starts_the_object_over_and_leaves_the_others(at_window, segmenters):
    first, second = (replay(segmenters["fine-tuned"], {"foreground": [at]}) for at in (A, C))

    def does(person):
        person.click(*A)
        person.press("n")
        person.click(*B)
        person.press("r")
        assert not (person.sees(1) & ~first.mask).any() and "click on it" in person.title
        person.click(*C)

    for found, expected in zip(at_window(does).objects, (first, second), strict=True):
        assert_same(found, expected)


def test_finished_objects_stay_in_their_colors_and_n_leads_back_to_them(at_window, segmenters):
    first = replay(segmenters["fine-tuned"], {"foreground": [A]})
    second = replay(segmenters["fine-tuned"], {"box": (40, 50, 60, 70)})
    more = replay(segmenters["fine-tuned"], {"foreground": [A]}, {"foreground": [A, C]})

    def does(person):
        person.press("n")  # from an object that is empty there is none to go to
        person.click(*A)
        person.press("n")
        assert (person.sees(0) != first.mask).sum() <= 2  # its points are gone
        assert "object 2" in person.title
        person.drag((40, 50), (60, 70))
        assert_shown(person, second, number=1, beside=first.mask)
        assert (person.sees(0) & first.mask & ~second.mask).sum() > 500
        person.press("n", "n")  # to the third, which is empty, and to the first
        assert "object 1" in person.title
        person.click(*C)

    objects, _ = at_window(does)
    assert_same(objects[0], more)
    assert_same(objects[1], second)
    assert len(objects) == 2


def test_o_shows_what_the_other_model_makes_of_the_same_clicks(at_window, segmenters, capsys):
    prompts = {"foreground": [A]}, {"foreground": [A], "background": [B]}
    finetuned = replay(segmenters["fine-tuned"], *prompts)
    original = replay(segmenters["original"], *prompts)
    third = replay(segmenters["original"], *prompts, {"foreground": [A, C], "background": [B]})
    segmenters["original"].features = None

    def does(person):
        person.click(*A)
        person.click(*B, button=3)
        assert segmenters["original"].features is None
        person.press("o")
        assert_shown(person, original)
        assert person.title.startswith("original")
        person.press("o")
        assert_shown(person, finetuned)
        person.press("o")
        person.click(*C)

    assert_same(*at_window(does, models=("fine-tuned", "original")).objects, third)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("encoding the image" in line for line in printed)


def test_with_one_model_o_does_nothing(at_window, segmenters, capsys):
    def does(person):
        person.click(*A)
        person.press("o")

    expected = replay(segmenters["fine-tuned"], {"foreground": [A]})
    assert_same(*at_window(does).objects, expected)
    assert capsys.readouterr().out.count("encoding") == 1


def test_enter_saves_and_escape_cancels(at_window):
    def does(key):
        def click_and_press(person):
            person.click(*A)
            person.press(key)
            assert not plt.get_fignums()

        return click_and_press

    objects, is_cancelled = at_window(does("enter"))
    assert len(objects) == 1 and not is_cancelled
    assert at_window(does("escape")) == ([], True)


def test_an_untouched_window_gives_no_object(at_window):
    assert at_window(lambda person: None) == ([], False)
    assert at_window(lambda person: person.press("enter")) == ([], False)


def test_h_shows_the_keys_and_hides_them(at_window):
    def does(person):
        def is_white() -> float:
            return (person.screen() > 230).all(-1).mean()

        before = is_white()
        person.press("h")
        assert is_white() > before + 0.1
        person.press("ㅗ")
        assert is_white() == before

    at_window(does)


def test_matplotlibs_own_keys_are_off_in_this_window_only(at_window):
    def does(person):
        toolbar = person.canvas.toolbar = NavigationToolbar2(person.canvas)
        person.click(*A)
        person.axes.set_xlim(10, 80)
        person.press("o", "p", "l", "k", "g", "q", "left", "home", "ctrl+w", None)
        assert not toolbar.mode and person.axes.get_xlim() == (10, 80)
        assert person.axes.get_xscale() == "linear" and plt.get_fignums()

    assert len(at_window(does).objects) == 1
    other = plt.figure()
    other.canvas.toolbar = NavigationToolbar2(other.canvas)
    other.canvas.callbacks.process(
        "key_press_event", KeyEvent("key_press_event", other.canvas, "o")
    )
    assert other.canvas.toolbar.mode
    plt.close(other)


def test_zooming_and_panning_are_no_clicks(at_window, segmenters):
    def does(person):
        toolbar = person.canvas.toolbar = NavigationToolbar2(person.canvas)
        for tool in (toolbar.zoom, toolbar.pan):
            tool()
            person.click(*B)
            person.drag((5, 5), (50, 50))
            tool()
        toolbar.home()
        person.click(*A)

    expected = replay(segmenters["fine-tuned"], {"foreground": [A]})
    assert_same(*at_window(does).objects, expected)


def test_where_one_has_zoomed_clicks_and_masks_are_in_place(at_window, segmenters):
    expected = replay(segmenters["fine-tuned"], {"foreground": [A]})

    def does(person):
        person.axes.set(xlim=(40, 90), ylim=(70, 30))
        person.click(*A)
        seen = np.s_[35:65, 45:85]
        assert (person.sees(part=seen) != expected.mask[seen]).mean() < 0.03

    assert_same(*at_window(does).objects, expected)


def test_clicks_beside_the_image_are_not_points(at_window):
    def does(person):
        person.axes.set_xlim(-60, 60)
        person.click(-30, 25)
        person.click(-30, 25, button=3)
        person.drag((-30, 25), (50, 50))
        person.click(500, 10)
        person.mouse("button_press_event", *A, 2)
        person.mouse("button_release_event", *A, 2)
        person.mouse("button_release_event", *A, 1)  # it was pressed elsewhere
        person.mouse("motion_notify_event", *B)

    assert at_window(does) == ([], False)


def test_a_double_click_is_one_click(at_window, segmenters):
    def does(person):
        person.mouse("button_press_event", *A, 1)
        person.mouse("button_release_event", *A, 3)  # another button
        assert "click on it" in person.title
        person.mouse("button_release_event", *A, 1)
        person.click(*A, dblclick=True)

    assert_same(*at_window(does).objects, replay(segmenters["fine-tuned"], {"foreground": [A]}))


def test_a_large_image_is_drawn_small_but_segmented_at_its_size(at_window, segmenters):
    image = np.kron(draw_pair(1)[0], np.ones((20, 20, 1), np.uint8))  # 2560x1920
    seen = []

    def does(person):
        person.click(1200, 803)
        seen.append(person.sees())

    (found,) = at_window(does, image).objects
    assert found.mask.shape == (1920, 2560)
    assert (seen[0] != found.mask).mean() < 0.03
    (point,) = found.prompt.point_coords.tolist()
    assert np.abs(np.subtract(point, (1200, 803))).max() <= 3  # a pixel of the screen
    assert_same(found, replay(segmenters["fine-tuned"], {"foreground": [point]}, image=image))


def test_on_a_large_screen_masks_are_drawn_coarser_but_in_place(at_window, segmenters, monkeypatch):
    drawn_at = []

    def draw(canvas, mask, number):
        drawn_at.append(canvas.shape)
        draw_object(canvas, mask, number=number)

    def does(person):
        person.figure.set_size_inches(30, 20)
        person.canvas.draw()
        person.click(*A)
        assert_shown(person, replay(segmenters["fine-tuned"], {"foreground": [A]}))

    monkeypatch.setattr(window_picture, "draw_object", draw)
    at_window(does)
    assert drawn_at and max(drawn_at[-1]) == window_picture.MAX_DRAWN_SIDE


def test_a_korean_name_is_in_the_title_bar_and_misses_no_glyph(at_window, monkeypatch):
    titles = []
    monkeypatch.setattr(
        plt.FigureManagerBase, "set_window_title", lambda manager, title: titles.append(title)
    )

    def does(person):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            person.click(*A)
            person.press("h")
            person.canvas.draw()

    at_window(does, title="강아지.jpg (1/3)")
    assert titles[-1] == "강아지.jpg (1/3)"


def test_clicks_correct_the_mask_that_an_object_came_with(at_window, segmenters):
    segmenter = segmenters["fine-tuned"]
    other = np.zeros(IMAGE.shape[:2], bool)
    other[80:90, 100:120] = True
    start = [
        SegmentedObject(make_prompt([C]), draw_pair(0)[1], 0.5),
        SegmentedObject(make_prompt(), other, 0.25),
    ]
    logits = mask_to_logits(start[0].mask, segmenter)
    expected = replay(segmenter, {"foreground": [C], "background": [B]}, logits=logits)
    of_original = replay(segmenters["original"], {"foreground": [C]})
    whole = replay(segmenters["original"], {})

    def does(person):
        assert_shown(person, start[0], beside=other)
        person.press("o")
        assert_shown(person, of_original, beside=whole.mask)
        person.press("o")
        person.click(*B, button=3)
        assert_shown(person, expected, beside=other)

    objects, _ = at_window(does, models=tuple(segmenters), start=start)
    assert_same(objects[0], expected)
    assert_same(objects[1], start[1])


def test_a_starts_from_the_mask_without_a_prompt_which_clicks_correct(at_window, segmenters):
    segmenter = segmenters["fine-tuned"]
    whole = replay(segmenter, {})
    logits = mask_to_logits(whole.mask, segmenter)
    expected = replay(segmenter, {"foreground": [C]}, logits=logits)

    def does(person):
        person.click(*B)  # which it forgets
        person.press("a")
        assert f"score {whole.score:.3f}, area {whole.mask.sum()} pixels" in person.title
        person.click(*C)

    objects, _ = at_window(does)
    assert_same(objects[0], expected)


def test_a_box_or_starting_over_forgets_the_mask_that_an_object_came_with(at_window, segmenters):
    start = [SegmentedObject(make_prompt([C]), draw_pair(0)[1], 0.5)]
    boxed = replay(segmenters["fine-tuned"], {"box": (20, 10, 90, 80)})
    clicked = replay(segmenters["fine-tuned"], {"foreground": [A]})

    def starts_over(person):
        person.press("r")
        person.click(*A)

    drags = at_window(lambda person: person.drag((20, 10), (90, 80)), start=start)
    assert_same(*drags.objects, boxed)
    assert_same(*at_window(starts_over, start=start).objects, clicked)
    assert at_window(lambda person: person.press("ㄱ"), start=start) == ([], False)


def test_an_error_closes_the_window_and_is_raised(at_window, segmenters, monkeypatch):
    def fail(self, *_):
        raise UserError("the model's scores are not finite")

    def does(person):
        with monkeypatch.context() as patched:
            patched.setattr(Segmenter, "segment", fail)
            person.click(*A)
        assert not plt.get_fignums()

    with pytest.raises(UserError, match="not finite"):
        at_window(does)


def test_without_a_display_the_message_names_point(segmenters):
    plt.switch_backend("agg")
    segmenters["fine-tuned"].features = None
    with pytest.raises(UserError, match="--point"):
        ask_in_window(IMAGE, "dog.jpg", segmenters)
    assert segmenters["fine-tuned"].features is None and not plt.get_fignums()


def test_the_script_opens_a_window_and_writes_what_was_seen_in_it(
    run_script, at_window, segmenters, monkeypatch
):
    prompts = {"foreground": [A]}, {"foreground": [A], "background": [B]}
    expected = replay(segmenters["fine-tuned"], *prompts)
    segmenters["fine-tuned"].encode(np.zeros_like(IMAGE))  # the script has a model of its own

    def does(block):
        person = Person(plt.gcf(), IMAGE)
        person.click(*A)
        person.click(*B, button=3)
        person.press("enter")

    write_image(Path("내 사진.png"), IMAGE)
    options = ("--image", "내 사진.png", "--checkpoint", MINI, "--precision", "float32")
    monkeypatch.setattr(plt, "show", does)
    outcome = run_script(main, *options)
    assert outcome.status == 0, outcome.err
    mask = read_mask(Path("output/my_results/내 사진_001_mask.png"))
    assert np.array_equal(mask, expected.mask)

    monkeypatch.setattr(plt, "show", lambda block: plt.close())
    outcome = run_script(main, *options)
    assert outcome.status == 2 and "nothing was clicked" in outcome.err
    assert len(list(Path("output/my_results").iterdir())) == 2


def test_without_a_display_the_script_says_to_give_a_point(run_script):
    plt.switch_backend("agg")
    write_image(Path("a.png"), IMAGE)
    outcome = run_script(main, "--image", "a.png", "--checkpoint", MINI)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and "--point" in outcome.err
