"""What a training measures on, after each epoch: masks and prompts are prepared once, and kept."""

from __future__ import annotations

import zlib
from typing import NamedTuple, TypeVar

from sam2_utils import UserError, autocast

import numpy as np
from tqdm import tqdm

from finetuning.evaluation import Model
from finetuning.metrics import LOGGED
from finetuning.objects import read_objects
from finetuning.pairs import Pair
from finetuning.prompts import Prompt, prompt_from_mask
from finetuning.segmentation import Features, segment_together

AT_ONCE = {"cuda": 16}  # images, and prompts, that are decoded together
AT_ONCE_ON_CPU = 4

T = TypeVar("T")


class Example(NamedTuple):
    """An object to find: its image, its prompt, and its HxW mask, packed to a kB or so."""

    pair: Pair
    kind: str  # of the prompt
    prompt: Prompt
    size: tuple[int, int]
    packed: bytes

    def mask(self) -> np.ndarray:
        """Return the HxW bool mask."""
        height, width = self.size
        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        return np.unpackbits(bits, count=height * width).reshape(self.size).view(bool)


class Validation:
    """Measures a model on the same objects with the same prompts, as often as is asked for.

    Each object is prompted with the point deepest in its mask; and, where that is wanted, all of an
    image together with nothing. compare_models.py measures in the same way. Images without an
    object are left out.
    """

    def __init__(self, pairs: list[Pair], without_prompt: bool = False) -> None:
        """Nothing is read yet. without_prompt: measure that, too."""
        self.pairs, self.kinds = pairs, ("center", "none")[: 1 + without_prompt]
        self._examples: list[list[Example]] = []  # of each image that has any

    def measure(self, model: Model) -> dict[str, float]:
        """Return the mean of each metric, and the mean IoU without a prompt, by the log's names.

        Raises UserError where no image has an object, or a mask is not of its image's size.
        """
        self._examples = self._examples or self._prepare()
        if not self._examples:
            raise UserError("every validation mask is empty; check that objects are white (255)")
        at_once = AT_ONCE.get(model.predictor.device.type, AT_ONCE_ON_CPU)
        found: dict[str, list[list[float]]] = {kind: [] for kind in self.kinds}
        with tqdm(total=len(self._examples), desc="Validating", unit="image", leave=False) as bar:
            for images in in_parts(self._examples, at_once):
                features = Features.join(
                    [model.source.features(first.pair.image, first.size) for first, *_ in images]
                )
                everyone = [(row, example) for row, of in enumerate(images) for example in of]
                for kind in self.kinds:
                    of_kind = [each for each in everyone if each[1].kind == kind]
                    for part in in_parts(of_kind, at_once):
                        found[kind] += _measure(model, features, part)
                bar.update(len(images))
        means = {
            kind: dict(zip(LOGGED, np.mean(values, axis=0).tolist(), strict=True))
            for kind, values in found.items()
        }
        row = {f"val_{name.lower()}": mean for name, mean in means["center"].items()}
        return row | ({"val_iou_no_prompt": means["none"]["IoU"]} if "none" in means else {})

    def _prepare(self) -> list[list[Example]]:
        examples = []
        for pair in tqdm(self.pairs, desc="Reading masks", unit="mask", leave=False, delay=1):
            of_image = []
            for kind in self.kinds:
                objects = read_objects(pair._replace(as_one=kind == "none"))
                for mask in objects:
                    packed = zlib.compress(np.packbits(mask), level=1)
                    prompt = prompt_from_mask(mask, kind)
                    of_image.append(Example(pair, kind, prompt, objects.size, packed))
            examples += [of_image] if of_image else []
        return examples


def in_parts(items: list[T], size: int) -> list[list[T]]:
    """Return lists of so many items, the last perhaps shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _measure(
    model: Model, features: Features, examples: list[tuple[int, Example]]
) -> list[list[float]]:
    """Return each metric of each example, which has a row of the features."""
    rows, objects = zip(*examples, strict=True)
    with autocast(model.predictor.device, model.source.precision):
        masks = segment_together(
            model.predictor,
            features.of(list(rows)),
            [example.prompt for example in objects],
            [example.size for example in objects],
        )
    return [
        [float(metric(mask, example.mask())) for metric in LOGGED.values()]
        for mask, example in zip(masks, objects, strict=True)
    ]
