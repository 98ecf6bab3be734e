"""Measure what averaging views of each image (--tta) gains, for several sets of views.

    python benchmarks/averaged_views.py --finetuned output/seed_1 output/seed_2 output/seed_3
    python benchmarks/averaged_views.py --prompts center box --clicks 0 --limit 20  # a quick look

Prints, for each set of views and each kind of prompt, the mean IoU of the original and of the
fine-tuned models on val, the standard deviation over the latter, and the seconds of all models.
The features of all views are computed before and kept in the cache.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import select_device

import numpy as np

from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    number,
    run,
)
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation.measuring import Comparison, measure
from finetuning.evaluation.metrics import METRICS
from finetuning.evaluation.simulated_clicks import measure_clicks
from finetuning.model.checkpoints import checkpoint_path
from finetuning.model.image_variants import ImageVariant
from finetuning.model.loading import load_models
from finetuning.model.model import Model
from finetuning.segmentation.views import ALL_VIEWS, MIRRORED, MIRRORS, UPRIGHT

VIEWS = {
    "1": (UPRIGHT,),
    "2, left-right": (UPRIGHT, MIRRORED),
    "4, mirrored": MIRRORS,
    "4, turned": ALL_VIEWS[:4],
    "8": ALL_VIEWS,
}
IOU = {"IoU": METRICS["IoU"]}


def measure_ious(models: list[Model], pairs: list[Pair], prompt: str, clicks: int) -> np.ndarray:
    """Return each model's mean IoU with a kind of prompt; if it is "", after so many clicks."""
    results = measure(models, pairs, prompt or "center", metrics=IOU, seed=42)
    if not prompt:
        comparison = Comparison(models, pairs, results)
        return measure_clicks(comparison, clicks, True, "best")[..., -1].mean(axis=1)
    return np.mean([[one["IoU"] for one in result.metrics] for result in results], axis=0)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument(
        "--finetuned", type=checkpoint_path, nargs="+", default=[Path("output/sam2_best.pt")],
        help="fine-tuned models with the same image encoder",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="of features")
    kinds = ("center", "box", "random", "none")
    parser.add_argument("--prompts", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("--clicks", type=number(int, at_least=0), default=5, help="0: none")
    parser.add_argument("--limit", type=number(int, at_least=1), help="the first N images only")
    add_device_option(parser)
    add_precision_option(parser, "auto: the precision of the training")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = select_device(args.device, args.threads)
    how = None, None, device, False, args.precision, args.cache
    models, _ = load_models(args.finetuned, *how)
    pairs = split_pairs(args.data, "val", args.limit)
    for view in ALL_VIEWS:
        images = [
            pair.image if view == UPRIGHT else ImageVariant(pair.image, view) for pair in pairs
        ]
        models[0].source.cache.fill(images, models[0].predictor, str(tuple(view)))

    prompts = {prompt: prompt for prompt in args.prompts}
    prompts |= {f"{args.clicks} clicks": ""} if args.clicks else {}
    for what, prompt in prompts.items():
        for name, views in VIEWS.items():
            start = time.perf_counter()
            of_views = [model._replace(views=views) for model in models]
            original, *finetuned = measure_ious(of_views, pairs, prompt, args.clicks)
            seconds = time.perf_counter() - start
            spread = np.std(finetuned, ddof=1) if len(finetuned) > 1 else 0
            ious = f"original {original:.4f}  fine-tuned {np.mean(finetuned):.4f} ± {spread:.4f}"
            print(f"{what:<9} {name:<14} {ious}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    run(main)
