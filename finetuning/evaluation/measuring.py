"""Measure models: the same prompts for all of them, and metrics of their masks."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.dataset.objects import limit_objects, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.metrics import LOGGED, METRICS, Metric
from finetuning.model.model import Model, features_for, segment_with_all
from finetuning.model.prompts import Prompt, make_prompt, prompt_from_mask
from finetuning.model.segmentation import Features

AT_ONCE = {"cuda": 16}  # images, and prompts, that are decoded together
AT_ONCE_ON_CPU = 4

T = TypeVar("T")

MOST_OBJECTS = 2000  # after each epoch


class Example(NamedTuple):
    """An object to find: its image, its prompt, and its true mask, packed to a kB or so."""

    index: int  # of its image among the pairs
    object: int  # its number in its image, from 0
    pair: Pair
    prompt_kind: str  # as in prompt_from_mask
    prompt: Prompt
    size: tuple[int, int]  # (H,W) of the image
    packed: bytes

    def mask(self) -> np.ndarray:
        """Return the HxW bool mask."""
        height, width = self.size
        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        return np.unpackbits(bits, count=height * width).reshape(self.size).view(bool)


class Result(NamedTuple):
    """What one or more models made of one object."""

    index: int  # of its image among the pairs
    object: int  # its number in its image, from 0
    pair: Pair
    prompt_kind: str
    prompt: Prompt
    area_fraction: float  # of the image that the true mask covers, 0 to 1
    metrics: list[dict[str, float]]  # of each model, by their names
    models: Sequence[Model] = ()  # which made them

    @property
    def name(self) -> tuple[str, int]:
        """Its image's file name, and its number in it, from 1."""
        return self.pair.image.name, self.object + 1

    @property
    def gain(self) -> float:
        """How much the IoU of the last model is above that of the first."""
        return self.metrics[-1]["IoU"] - self.metrics[0]["IoU"]


def measure(
    models: Sequence[Model],
    pairs: list[Pair],
    prompt_kind: str = "center",
    mask_kind: str = "best",
    seed: int = 0,
    description: str = "Measuring",
    metrics: Mapping[str, Metric] = METRICS,
    first_index: int = 0,
) -> list[Result]:
    """Measure models on every object, with the same prompts; an image without any is left out.

    Without a prompt (none), all objects of an image are one.

    Arguments:
      prompt_kind: as in prompt_from_mask.
      mask_kind: best or single, as in choose_masks.
      seed: of random points.
      description: of the progress bar.
      metrics: by name.
      first_index: of the first pair.
    """
    progress = tqdm(pairs, desc=description, unit="image", leave=False)
    examples = (
        read_examples(pair, [prompt_kind], index, seed)
        for index, pair in enumerate(progress, first_index)
    )
    return list(measure_examples(models, examples, mask_kind, metrics))


def find_in_empty(
    models: Sequence[Model], pairs: list[Pair], mask_kind: str = "best"
) -> list[list[float]]:
    """Say of each image without an object whether each model finds something without a prompt.

    Returns a row an image: 1.0 for a mask that is not empty, else 0.0, of each model.
    """
    nothing = [
        [Example(index, 0, pair, "none", make_prompt(), mask.shape, pack_mask(mask))]
        for index, pair in enumerate(pairs)
        for mask in [np.zeros(read_objects(pair).size, bool)]
    ]
    found = {"found": lambda predicted, _: predicted.any()}
    results = measure_examples(models, nothing, mask_kind, found)
    return [[of_model["found"] for of_model in result.metrics] for result in results]


def read_examples(
    pair: Pair, prompt_kinds: Sequence[str], index: int = 0, seed: int = 0
) -> list[Example]:
    """Return each object of an image with a prompt of each kind; its mask file is read once.

    Without a prompt (none), all objects are one, whether they are chosen or not.
    """
    objects = read_objects(pair._replace(chosen=None, as_one=False))
    examples = []
    for kind in prompt_kinds:
        as_one = pair.as_one or kind == "none"
        chosen = objects if pair.chosen is None else objects.only(pair.chosen)
        for k, mask in enumerate(objects.together() if as_one else chosen):
            prompt = prompt_from_mask(mask, kind, np.random.default_rng([seed, index, k]))
            of_kind = index, k, pair._replace(as_one=as_one), kind
            examples.append(Example(*of_kind, prompt, objects.size, pack_mask(mask)))
    return examples


def pack_mask(mask: np.ndarray) -> bytes:
    """Return an HxW bool mask packed, as Example keeps it."""
    return zlib.compress(np.packbits(mask), level=1)


def measure_examples(
    models: Sequence[Model],
    images: Iterable[list[Example]],
    mask_kind: str = "best",
    metrics: Mapping[str, Metric] = METRICS,
) -> Iterator[Result]:
    """Measure models on the examples of each image, in batches that follow from these alone.

    images: read as they are needed; those without an example are passed over.
    """
    at_once = AT_ONCE.get(models[0].predictor.device.type, AT_ONCE_ON_CPU)
    for together in in_parts(filter(None, images), at_once):
        features = features_for(models, [(one.pair.image, one.size) for one, *_ in together])
        rows = [(row, example) for row, examples in enumerate(together) for example in examples]
        for kind in dict.fromkeys(example.prompt_kind for _, example in rows):
            of_kind = [(row, example) for row, example in rows if example.prompt_kind == kind]
            for part in in_parts(of_kind, at_once):
                yield from _measure(models, features, part, mask_kind, metrics)


def _measure(
    models: Sequence[Model],
    features: Sequence[Features],
    part: Sequence[tuple[int, Example]],
    mask_kind: str,
    metrics: Mapping[str, Metric],
) -> Iterator[Result]:
    """Measure models on examples, each with its row of the features, all in one batch."""
    rows, examples = zip(*part, strict=True)
    prompts, sizes = [one.prompt for one in examples], [one.size for one in examples]
    of_rows = [of_model.of(list(rows)) for of_model in features]
    masks = segment_with_all(models, of_rows, prompts, sizes, mask_kind)
    for example, of_example in zip(examples, zip(*masks, strict=True), strict=True):
        true_mask = example.mask()
        of_models = [
            {name: float(metric(mask, true_mask)) for name, metric in metrics.items()}
            for mask in of_example
        ]
        area = float(true_mask.mean())
        yield Result(*example[:5], area, of_models, models)


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of so many items, the last perhaps shorter."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def group_by_image(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of each image's objects together."""
    return [list(group) for _, group in itertools.groupby(results, key=lambda result: result.index)]


def mean_metrics(results: list[Result], model: int = 0) -> dict[str, float]:
    """Return the mean of each metric of one of the models."""
    return {
        name: float(np.mean([result.metrics[model][name] for result in results]))
        for name in results[0].metrics[model]
    }


def mean_gain(results: list[Result]) -> float:
    """Return the mean of how much the IoU is above that of the first model."""
    return float(np.mean([result.gain for result in results]))


def unit_of(results: Sequence[Result]) -> str:
    """Say what is counted: "image", where each has one object, else "object"."""
    return "image" if len({result.index for result in results}) == len(results) else "object"


class Validation:
    """Measures a model on the same objects with the same prompts, as often as is asked for.

    Each object is prompted with the point deepest in its mask; and, where that is wanted, all of an
    image together with nothing. Images without an object are left out. The numbers are those of
    measure(), to the last digit.
    """

    def __init__(
        self, pairs: list[Pair], without_prompt: bool = False, most: int | None = None
    ) -> None:
        """Nothing is read yet.

        without_prompt: measure that, too. most: how many objects are measured, if there are more.
        """
        self.pairs, self.kinds, self.most = pairs, ("center", "none")[: 1 + without_prompt], most
        self._images: list[list[Example]] = []

    def measure(self, model: Model) -> dict[str, float]:
        """Return the mean of each metric, and the mean IoU without a prompt, by the log's names.

        Raises UserError where no image has an object, or a mask is not of its image's size.
        """
        self._images = self._images or self._read()
        progress = tqdm(self._images, desc="Validating", unit="image", leave=False)
        results = list(measure_examples([model], progress, metrics=LOGGED))
        means = {
            kind: mean_metrics([result for result in results if result.prompt_kind == kind])
            for kind in self.kinds
        }
        row = {f"val_{name.lower()}": mean for name, mean in means["center"].items()}
        return row | ({"val_iou_no_prompt": means["none"]["IoU"]} if "none" in means else {})

    def _read(self) -> list[list[Example]]:
        """Return the examples of each image that has any, and say how many have none."""
        pairs = self.pairs if self.most is None else limit_objects(self.pairs, self.most)
        progress = tqdm(pairs, desc="Reading masks", unit="mask", leave=False, delay=1)
        images = [read_examples(pair, self.kinds) for pair in progress]
        found = [examples for examples in images if examples]
        if not found:
            raise UserError("every validation mask is empty; check that objects are white (255)")
        if len(found) < len(images):
            print(
                f"skipped {len(images) - len(found)} of {len(images)} validation images: their "
                "masks are empty"
            )
        return found
