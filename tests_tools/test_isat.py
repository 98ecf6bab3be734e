"""ISAT, which knows models by the names of their files: the single mask.

To a point it answers with that which its best mask, as a second prompt, leads to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile

from conftest import CPU, Segment, as_prompt, compare
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from ISAT.segment_any.segment_any import SegAny

from finetuning.model.models import load_predictor
from finetuning.segmentation.predicting import encode_images, segment_with_logits


def open_isat(checkpoint: Path, folder: Path) -> Segment:
    path = folder / checkpoint.stem / "sam2.1_hiera_tiny.pt"
    path.parent.mkdir()
    copyfile(checkpoint, path)
    with hydra_of_isat():
        tool = SegAny(str(path), use_bfloat16=False)

    def answer(place):
        if len(place) == 2:
            return tool.predict_with_point_prompt([place], [1])
        return tool.predict_with_box_prompt(list(place))

    def segment(image, places):
        tool.set_image(image)
        return [answer(place)[0] > 0 for place in places]

    return segment


@contextmanager
def hydra_of_isat() -> Iterator[None]:
    """Let ISAT find its configurations, not those of the sam2 that is imported beside it."""
    GlobalHydra.instance().clear()
    initialize_config_module("ISAT.segment_any.sam2.configs", version_base="1.2")
    yield
    GlobalHydra.instance().clear()
    initialize_config_module("sam2", version_base="1.2")


def ask_twice(checkpoint: Path) -> Segment:
    predictor, _ = load_predictor(None, checkpoint, CPU)

    def segment(image, places):
        features, masks = encode_images(predictor, [image]), []
        for place in places:
            asked = predictor, features, as_prompt(place), image.shape[:2]
            best = segment_with_logits(*asked)[2]
            masks.append(segment_with_logits(*asked, best, kind="single")[0])
        return masks

    return segment


def test_it_gives_our_single_mask_of_a_box(tiny, tmp_path):
    compare("isat-sam", "single", tiny, lambda path: open_isat(path, tmp_path), ("box",))


def test_it_gives_our_mask_of_a_point_and_the_best_mask(tiny, tmp_path):
    answer, prompts = ask_twice(tiny.finetuned), ("point",)
    compare(
        "isat-sam", "twice", tiny, lambda path: open_isat(path, tmp_path), prompts, answer=answer
    )
