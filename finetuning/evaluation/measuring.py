"""Measure models: give all of them the same prompts and compute the metrics of their masks."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from sam2_utils import UserError

import numpy as np
from tqdm import tqdm

from finetuning.basics.cropped_masks import CroppedMask, crop_mask, crop_together
from finetuning.dataset.objects import count_objects, limit_objects, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.metrics import LOGGED, METRICS, Metric
from finetuning.model.model import Model, features_for, segment_with_all
from finetuning.model.trainable_encoder import merged_adapters
from finetuning.segmentation.averaging import ViewFeatures
from finetuning.segmentation.features import Features
from finetuning.segmentation.prompts import Prompt, make_prompt, prompt_from_mask

AT_ONCE = {"cuda": 16}  # images, and prompts, decoded in one batch
AT_ONCE_ON_CPU = 4

T = TypeVar("T")

MOST_OBJECTS = 2000  # measured after each epoch
SLOW = 10  # seconds of a validation from which the user is told


class PackedMask(NamedTuple):
    """A CroppedMask whose hxw crop is compressed to about 1 kB."""

    bits: bytes
    shape: tuple[int, int]
    x: int
    y: int


class Example(NamedTuple):
    """An object to find: its image, its prompt, and its true mask."""

    index: int  # of the image among the pairs
    object: int  # the object's number in its image, from 0
    pair: Pair
    prompt_kind: str  # as in prompt_from_mask
    prompt: Prompt
    size: tuple[int, int]  # (H,W) of the image
    packed: PackedMask

    def mask(self) -> CroppedMask:
        """Return the true mask."""
        height, width = self.packed.shape
        bits = np.frombuffer(zlib.decompress(self.packed.bits), np.uint8)
        crop = np.unpackbits(bits, count=height * width).reshape(height, width).view(bool)
        return CroppedMask(crop, self.packed.x, self.packed.y, self.size)


class Result(NamedTuple):
    """The metrics of one or more models on one object."""

    index: int  # of the image among the pairs
    object: int  # the object's number in its image, from 0
    pair: Pair
    prompt_kind: str
    prompt: Prompt
    area_fraction: float  # area of the true mask / area of the image, 0 to 1
    metrics: list[dict[str, float]]  # one dict per model: metric name -> value

    @property
    def name(self) -> tuple[str, int]:
        """The image's file name and the object's number in it, from 1."""
        return self.pair.image.name, self.object + 1

    @property
    def gain(self) -> float:
        """The IoU of the last model minus the IoU of the first."""
        return self.metrics[-1]["IoU"] - self.metrics[0]["IoU"]


class Comparison(NamedTuple):
    """Models, and their results on the same images with the same prompts."""

    models: Sequence[Model]
    pairs: list[Pair]
    results: list[Result]  # none for an image without an object


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
    """Measure models on every object with the same prompts; skip images without an object.

    Without a prompt (none), all objects of an image count as one.

    Arguments:
      prompt_kind: as in prompt_from_mask.
      mask_kind: best or single, as in choose_masks.
      seed: for random points.
      description: label of the progress bar.
      metrics: metric name -> function.
      first_index: index of the first pair.
    """
    examples = (
        read_examples(pair, [prompt_kind], index, seed)
        for index, pair in enumerate(pairs, first_index)
    )
    total, unit = len(pairs), "image"
    if prompt_kind != "none" and any(pair.per_object for pair in pairs):
        total, unit = sum(count_objects(pairs).values()), "object"
    results = measure_examples(models, examples, mask_kind, metrics)
    return list(tqdm(results, desc=description, total=total, unit=unit, leave=False))


def find_in_empty(
    models: Sequence[Model], pairs: list[Pair], mask_kind: str = "best"
) -> list[list[float]]:
    """Return whether each model, without a prompt, finds something in images without an object.

    Returns one row per image, one value per model: 1.0 for a mask that is not empty, else 0.0.
    """
    examples = [
        [Example(index, 0, pair, "none", make_prompt(), mask.size, pack_mask(mask))]
        for index, pair in enumerate(pairs)
        for mask in [crop_mask(np.zeros(read_objects(pair).size, bool))]
    ]
    found = {"found": lambda predicted, _true, _size: predicted.any()}
    results = measure_examples(models, examples, mask_kind, found)
    return [[metrics["found"] for metrics in result.metrics] for result in results]


def read_examples(
    pair: Pair, prompt_kinds: Sequence[str], index: int = 0, seed: int = 0
) -> list[Example]:
    """Return each object of an image with a prompt of each kind; read its mask file once.

    Without a prompt (none), all objects of the image count as one, even those that pair.chosen
    leaves out.
    """
    objects = read_objects(pair._replace(chosen=None, as_one=False))
    examples = []
    for kind in prompt_kinds:
        as_one = pair.as_one or kind == "none"
        chosen = objects if pair.chosen is None else objects.only(pair.chosen)
        measured = objects.together() if as_one else chosen
        for k, mask in enumerate(measured.all_cropped()):
            # Each object has a seed of its own: its prompt does not depend on earlier draws
            prompt = prompt_from_mask(mask.crop, kind, np.random.default_rng([seed, index, k]))
            prompt = prompt.moved(mask.x, mask.y)
            identity = index, k, pair._replace(as_one=as_one), kind
            examples.append(Example(*identity, prompt, objects.size, pack_mask(mask)))
    return examples


def pack_mask(mask: CroppedMask) -> PackedMask:
    """Compress a mask as Example stores it."""
    bits = zlib.compress(np.packbits(mask.crop), level=1)
    return PackedMask(bits, mask.crop.shape, mask.x, mask.y)


def measure_examples(
    models: Sequence[Model],
    images: Iterable[list[Example]],
    mask_kind: str = "best",
    metrics: Mapping[str, Metric] = METRICS,
) -> Iterator[Result]:
    """Measure models on the examples of each image, in batches that depend on the examples alone.

    images: an iterator is read as needed; images without an example are skipped.
    """
    # Other batches would change the last digits, and training and comparison could disagree
    at_once = prompts_at_once(models)
    for batch in in_parts(filter(None, images), at_once):
        features = features_for(models, [(one.pair.image, one.size) for one, *_ in batch])
        rows = [(row, example) for row, examples in enumerate(batch) for example in examples]
        # Prompts in one batch must have equally many points
        for kind in dict.fromkeys(example.prompt_kind for _, example in rows):
            same_kind = [(row, example) for row, example in rows if example.prompt_kind == kind]
            for part in in_parts(same_kind, at_once):
                yield from _measure(models, features, part, mask_kind, metrics)


def _measure(
    models: Sequence[Model],
    features: Sequence[Features | ViewFeatures],
    part: Sequence[tuple[int, Example]],
    mask_kind: str,
    metrics: Mapping[str, Metric],
) -> Iterator[Result]:
    """Measure models on one batch of (row of the features, example)."""
    rows, examples = zip(*part, strict=True)
    prompts, sizes = [one.prompt for one in examples], [one.size for one in examples]
    batch_features = [model_features.of(list(rows)) for model_features in features]
    masks = segment_with_all(models, batch_features, prompts, sizes, mask_kind)
    for example, model_masks in zip(examples, zip(*masks, strict=True), strict=True):
        true_mask = example.mask()
        values = [_measure_mask(crop_mask(mask), true_mask, metrics) for mask in model_masks]
        height, width = example.size
        yield Result(*example[:5], true_mask.area / (height * width), values)


def _measure_mask(
    predicted: CroppedMask, true_mask: CroppedMask, metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Return the metrics of a mask, computed in the box of both masks."""
    crops, _, _ = crop_together(predicted, true_mask)
    return {name: float(metric(*crops, true_mask.size)) for name, metric in metrics.items()}


def prompts_at_once(models: Sequence[Model]) -> int:
    """Return how many prompts are decoded in one batch on the models' device.

    With several views of each image there are fewer images, so that their features take no more
    memory.
    """
    at_once = AT_ONCE.get(models[0].predictor.device.type, AT_ONCE_ON_CPU)
    return max(1, at_once // len(models[0].views))


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def group_by_image(results: Sequence[Result]) -> list[list[Result]]:
    """Return one list of results per image."""
    return [list(group) for _, group in itertools.groupby(results, key=lambda result: result.index)]


def mean_metrics(results: list[Result], model: int = 0) -> dict[str, float]:
    """Return the mean of each metric for one of the models."""
    return {
        name: float(np.mean([result.metrics[model][name] for result in results]))
        for name in results[0].metrics[model]
    }


def mean_gain(results: list[Result]) -> float:
    """Return the mean gain in IoU from the first to the last model."""
    return float(np.mean([result.gain for result in results]))


def counted_unit(results: Sequence[Result]) -> str:
    """Return what a result stands for: "image" if each image has one object, else "object"."""
    return "image" if len({result.index for result in results}) == len(results) else "object"


class Validation:
    """Measures a model on the same objects with the same prompts after every epoch.

    Each object is prompted with the point deepest inside its mask. On request, all objects of an
    image are also measured together, without a prompt. Images without an object are skipped. The
    numbers equal those of measure(), to the last digit.
    """

    def __init__(
        self, pairs: list[Pair], without_prompt: bool = False, most: int | None = None
    ) -> None:
        """Read nothing yet.

        without_prompt: also measure without a prompt. most: the maximum number of objects.
        """
        self.pairs, self.kinds, self.most = pairs, ("center", "none")[: 1 + without_prompt], most
        self._images: list[list[Example]] = []

    def measure(self, model: Model) -> dict[str, float]:
        """Return the mean of each metric, and the mean IoU without a prompt, by column of the log.

        Raises UserError if no image has an object or if a mask and its image differ in size.
        """
        # The masks are read once and kept, compressed, for all epochs
        is_first = not self._images
        self._images = self._images or self._read()
        count, begun = sum(map(len, self._images)), time.perf_counter()
        with merged_adapters(model.predictor.model):  # as in the file that is saved
            results = measure_examples([model], self._images, metrics=LOGGED)
            results = list(tqdm(results, "Validating", count, unit="prompt", leave=False))
        has_several = count > len(self.kinds) * len(self._images)
        if is_first and has_several and (seconds := time.perf_counter() - begun) > SLOW:
            images = f"{len(self._images)} image{'s' * (len(self._images) > 1)}"
            print(f"validation takes {seconds:.0f} s each time: {len(results)} prompts in {images}")
        means = {
            kind: mean_metrics([result for result in results if result.prompt_kind == kind])
            for kind in self.kinds
        }
        row = {f"val_{name.lower()}": mean for name, mean in means["center"].items()}
        return row | ({"val_iou_no_prompt": means["none"]["IoU"]} if "none" in means else {})

    def _read(self) -> list[list[Example]]:
        """Return the examples of each image that has an object; print how many have none."""
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
