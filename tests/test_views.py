"""Views of an image: masks, features and prompts turn with it, and back."""

import numpy as np
import pytest
import torch

from finetuning.segmentation.prompts import make_prompt, mask_box
from finetuning.segmentation.views import ALL_VIEWS, MIRRORS, UPRIGHT

MASK = np.zeros((9, 14), bool)
MASK[2:5, 8:13] = True


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_prompts_stay_on_what_they_are_on(view):
    seen, size = view.of_array(MASK), view.of_size(MASK.shape)
    assert seen.shape == size
    prompt = view.of_prompt(make_prompt([(8, 2)], [(0, 8)], mask_box(MASK)), MASK.shape)
    first, last, (x, y), (other_x, other_y) = prompt.point_coords.astype(int).tolist()
    assert (*first, *last) == mask_box(seen)
    corners = {(first[0], first[1]), (last[0], first[1]), (first[0], last[1]), tuple(last)}
    assert seen[y, x] and (x, y) in corners
    assert (not seen[other_y, other_x] and (other_x, other_y) != (0, 8)) or view == UPRIGHT


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_a_view_is_undone(view):
    back, prompt = view.undone(), make_prompt([(3, 7)], box=(1, 2, 11, 8))
    assert np.array_equal(back.of_array(view.of_array(MASK)), MASK)
    there = view.of_prompt(prompt, MASK.shape)
    again = back.of_prompt(there, view.of_size(MASK.shape))
    assert np.array_equal(again.point_coords, prompt.point_coords)


def test_maps_turn_like_arrays_and_all_views_differ():
    values = np.arange(16.0).reshape(4, 4)
    maps = torch.from_numpy(values)[None, None]
    seen = [view.of_maps(maps)[0, 0].numpy() for view in ALL_VIEWS]
    for view, turned in zip(ALL_VIEWS, seen, strict=True):
        assert np.array_equal(turned, view.of_array(values))
    assert len({turned.tobytes() for turned in seen}) == len(ALL_VIEWS)


def test_mirrors_only_mirror():
    values = np.arange(6).reshape(2, 3)
    seen = [view.of_array(values).tolist() for view in MIRRORS]
    assert seen == [
        [[0, 1, 2], [3, 4, 5]],
        [[2, 1, 0], [5, 4, 3]],
        [[3, 4, 5], [0, 1, 2]],
        [[5, 4, 3], [2, 1, 0]],
    ]


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_torch_takes_views_of_any_size(view):
    for size in ((1, 1, 3), (1, 5, 3), (4, 1, 3)):
        assert (
            torch.from_numpy(view.of_array(np.zeros(size, np.uint8)).transpose(2, 0, 1)).any() == 0
        )
