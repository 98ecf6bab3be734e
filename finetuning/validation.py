"""What a training measures on, after each epoch: masks and prompts are prepared once, and kept."""

from __future__ import annotations

from sam2_utils import UserError

from tqdm import tqdm

from finetuning.dataset.objects import limit_objects
from finetuning.dataset.pairs import Pair
from finetuning.evaluation import Example, mean_metrics, measure_examples, read_examples
from finetuning.metrics import LOGGED
from finetuning.model.model import Model

MOST_OBJECTS = 2000  # after each epoch


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
