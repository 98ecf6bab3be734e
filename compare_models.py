"""Compare the original SAM 2.1 with your fine-tuned one: mean IoU, and pictures.

    python compare_models.py                    # output/sam2_best.pt on the val split of data/
    python compare_models.py --prompt box       # prompted with the object's box, not a point
    python compare_models.py --limit 20         # a quick look
    python compare_models.py --figures 20       # more pictures
    python compare_models.py --clicks 10        # and when their masks are corrected, click by click
    python compare_models.py --mask single      # the mask that other tools take
    python compare_models.py --demo             # what train_sam2_proper.py --demo made

Both models get the same prompts, and of three masks each the one with the highest predicted
score counts; or SAM 2's single mask, with --mask single. Written to output/comparison/:
results.csv and the pictures; with --clicks, also clicks.csv and clicks.png.
"""

from __future__ import annotations

import contextlib
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from clicks import (
    CLICK_FILES,
    MAX_CLICKS,
    draw_clicks,
    format_clicks,
    simulate_clicks,
    write_clicks,
)
from command_line import ArgumentParser, UserError, number, run, seed
from device_check import trusted_device
from feature_cache import FeatureCache, hash_encoder, load_features
from image_files import (
    DEMO_DATA,
    Pair,
    atomic_write,
    read_mask,
    read_pair,
    split_pairs,
    write_csv,
)
from sam2_utils import (
    MODELS,
    Features,
    Prompt,
    add_device_option,
    add_precision_option,
    autocast,
    calculate_dice,
    calculate_iou,
    draw_overlay,
    ensure_checkpoint,
    load_predictor,
    prompt_from_mask,
    segment,
    select_device,
    select_precision,
)

import numpy as np
import torch
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

BOX_WIDTH = 40
FIGURE_NAME = re.compile(r"comparison_\d+_[+-]\d+p_")
RESAMPLES = 10_000  # of the bootstrap
FEW_IMAGES = 20  # below it, bootstrap intervals are clearly too narrow
# Of an object, by the fraction of the image that its true mask covers
SIZES = (
    ("small", "below 5%", 0.0, 0.05),
    ("medium", "5 to 15%", 0.05, 0.15),
    ("large", "15% and more", 0.15, np.inf),
)
ASCII_BOX = str.maketrans("┌┐└┘├┤─│", "++++++-|")


class Result(NamedTuple):
    """What both models made of one image."""

    index: int  # among the images compared
    pair: Pair
    prompt: Prompt
    original_iou: float
    finetuned_iou: float
    original_dice: float
    finetuned_dice: float
    area_fraction: float  # of the image that the true mask covers, 0 to 1

    @property
    def gain(self) -> float:
        return self.finetuned_iou - self.original_iou


class Models(NamedTuple):
    """The two models to compare, and whether one encoding of an image serves both."""

    original: SAM2ImagePredictor
    finetuned: SAM2ImagePredictor
    share_encoder: bool
    cache: FeatureCache | None  # what training has kept, of a shared encoder


def segment_with_both(
    models: Models, index: int, pair: Pair, prompt: Prompt, size: tuple[int, int], args: Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Return the HxW bool masks of the original and of the fine-tuned model for one prompt."""
    original_features, finetuned_features = load_both_features(models, index, pair, args)
    with autocast(args.device, args.precision):
        original_mask, _ = segment(models.original, original_features, prompt, size, args.mask)
        finetuned_mask, _ = segment(models.finetuned, finetuned_features, prompt, size, args.mask)
    return original_mask, finetuned_mask


def load_both_features(
    models: Models, index: int, pair: Pair, args: Namespace
) -> tuple[Features, Features]:
    """Return an image's features for the original and for the fine-tuned model."""
    features = load_features(models.original, models.cache, index, pair, args.precision)
    if models.share_encoder:
        return features, features
    return features, load_features(models.finetuned, None, index, pair, args.precision)


def compare(models: Models, pairs: list[Pair], args: Namespace) -> list[Result]:
    """Measure both models on the same prompts; pairs with an empty mask are left out."""
    results = []
    for index, pair in enumerate(tqdm(pairs, desc="Comparing", unit="image")):
        true_mask = read_mask(pair.mask)
        if not true_mask.any():
            continue
        prompt = prompt_from_mask(true_mask, args.prompt, np.random.default_rng([args.seed, index]))
        masks = segment_with_both(models, index, pair, prompt, true_mask.shape, args)
        ious = [float(calculate_iou(mask, true_mask)) for mask in masks]
        dices = [float(calculate_dice(mask, true_mask)) for mask in masks]
        results.append(Result(index, pair, prompt, *ious, *dices, float(true_mask.mean())))
    if not results:
        raise UserError("every mask is empty; check that objects are white (255)")
    return results


def format_table(results: list[Result], measured: str) -> str:
    """Return the guide's box: mean IoU of both models, and the improvement in %p.

    measured: on what, like "val".
    """
    original = np.mean([result.original_iou for result in results])
    finetuned = np.mean([result.finetuned_iou for result in results])
    rule = "─" * BOX_WIDTH
    rows = [
        f"mean IoU ({measured})".center(BOX_WIDTH),
        None,
        f"  original SAM 2:    {original:.2%}",
        f"  fine-tuned SAM 2:  {finetuned:.2%}",
        None,
        f"  improvement:       {100 * (finetuned - original):+.1f}%p",
    ]
    lines = [f"├{rule}┤" if row is None else f"│{row:<{BOX_WIDTH}}│" for row in rows]
    return "\n".join([f"┌{rule}┐", *lines, f"└{rule}┘"])


def format_details(results: list[Result], seed: int) -> str:
    """Return what is printed below the box."""
    means = np.mean([result[3:] for result in results], axis=0)
    gains = np.array([result.gain for result in results])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    return (
        f"mean IoU   {means[0]:.4f} -> {means[1]:.4f}\n"
        f"mean Dice  {means[2]:.4f} -> {means[3]:.4f}\n"
        f"images     {len(results)}: {better} better, {len(results) - better - worse} equal, "
        f"{worse} worse\n"
        f"{format_interval(gains, seed)}\n"
        f"{format_sizes(results)}"
    )


def bootstrap_interval(gains: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean of M gains in IoU, one an image.

    It is the percentile interval of the bootstrap (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) over images, whose two IoUs stay paired.
    """
    rng = np.random.default_rng(seed)
    parts = [  # not all at once, which would fill the memory with many images
        gains[rng.integers(len(gains), size=(RESAMPLES // 100, len(gains)))].mean(axis=1)
        for _ in range(100)
    ]
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(low), float(high)


def format_interval(gains: np.ndarray, seed: int) -> str:
    """Return the mean gain and its interval in %p, and what to beware of."""
    line = f"improvement {100 * gains.mean():+.1f}%p"
    if len(gains) == 1:
        return f"{line}, of one image: too few for an interval"
    low, high = bootstrap_interval(gains, seed)
    line += f", 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    line += f" (paired bootstrap over {len(gains)} images)"
    if low <= 0 <= high:
        line += "; it includes 0: could be chance"
    if len(gains) < FEW_IMAGES:
        line += "; few images: take it as wider"
    return line


def format_sizes(results: list[Result]) -> str:
    """Return a line a size of object: how many images, and the mean IoU of both models."""
    lines = ["mean IoU by object size, in % of the image's area"]
    for name, limits, at_least, below in SIZES:
        ious = [result[3:5] for result in results if at_least <= result.area_fraction < below]
        means = " -> ".join(f"{mean:.4f}" for mean in np.mean(ious, axis=0)) if ious else "-"
        images = f"{len(ious)} image{'s' * (len(ious) != 1)}"
        lines.append(f"  {name:<6}  {limits:<12}  {images:>11}  {means}")
    return "\n".join(lines)


def write_results(path: Path, results: list[Result]) -> None:
    """Write a row an image."""
    rows = []
    for result in results:
        points = zip(result.prompt.point_coords, result.prompt.point_labels, strict=True)
        prompt = " ".join(f"{x:g},{y:g}:{label}" for (x, y), label in points)
        numbers = [f"{value:.6f}" for value in result[3:]]
        rows.append([result.pair.image.name, prompt, *numbers])
    write_csv(path, ["image", "prompt", *Result._fields[3:]], rows)


def choose_figures(results: list[Result], count: int) -> list[Result]:
    """Choose the results to draw: half the biggest gains, half the biggest losses."""
    ranked = sorted(results, key=lambda result: result.gain, reverse=True)
    if count >= len(ranked):
        return ranked
    return ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def draw_comparison(path: Path, models: Models, result: Result, args: Namespace) -> None:
    """Draw one image three times, the true outline in yellow: the prompt, and each model's mask."""
    image, true_mask = read_pair(result.pair)
    original_mask, finetuned_mask = segment_with_both(
        models, result.index, result.pair, result.prompt, true_mask.shape, args
    )
    prompted = draw_overlay(image, prompt=result.prompt, true_mask=true_mask)
    panels = {
        "prompt and true outline": prompted,
        f"original: IoU {result.original_iou:.2f}": draw_overlay(
            image, original_mask, true_mask=true_mask
        ),
        f"fine-tuned: IoU {result.finetuned_iou:.2f}": draw_overlay(
            image, finetuned_mask, true_mask=true_mask
        ),
    }
    figure = Figure(figsize=(12, 12), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")


def draw_comparisons(models: Models, results: list[Result], args: Namespace) -> int:
    """Draw the chosen results, named by rank and gain in %p; return how many."""
    chosen = choose_figures(results, args.figures)
    for rank, result in enumerate(tqdm(chosen, desc="Drawing", unit="figure"), start=1):
        points = round(100 * result.gain)
        path = args.output / f"comparison_{rank:02}_{points:+d}p_{result.pair.name}.png"
        draw_comparison(path, models, result, args)
    return len(chosen)


def remove_earlier(output: Path) -> None:
    """Remove an earlier comparison's files that would be taken for this one's."""
    for path in output.glob("comparison_*.png"):
        if FIGURE_NAME.match(path.name):
            path.unlink()
    for name in CLICK_FILES:
        (output / name).unlink(missing_ok=True)


def measure_clicks(models: Models, results: list[Result], args: Namespace) -> np.ndarray:
    """Return the IoU of both models on the M images of the results after 1 to N clicks, 2xMxN."""
    ious = np.zeros((2, len(results), args.clicks))
    for row, result in enumerate(tqdm(results, desc="Clicking", unit="image")):
        true_mask = read_mask(result.pair.mask)
        both = load_both_features(models, result.index, result.pair, args)
        for of_model, predictor, features in zip(ious, models[:2], both, strict=True):
            with autocast(args.device, args.precision):
                of_model[row] = simulate_clicks(
                    predictor,
                    features,
                    true_mask,
                    args.clicks,
                    not args.no_mask_prompt,
                    args.mask,
                )
    return ious


def report_clicks(models: Models, results: list[Result], args: Namespace) -> None:
    """Measure, print, write and draw what both models make of simulated clicks."""
    ious = measure_clicks(models, results, args)
    print(format_clicks(ious, not args.no_mask_prompt))
    names = [result.pair.image.name for result in results]
    write_clicks(args.output / "clicks.csv", names, ious)
    draw_clicks(args.output / "clicks.png", ious, not args.no_mask_prompt)


def load_models(pairs: list[Pair], insists_on_mps: bool, args: Namespace) -> Models:
    """Load the original and the fine-tuned model, which must be of the same size.

    The original is what training started from, if it is there. args.precision becomes a dtype:
    that of the training, unless another is asked for. args.device becomes the CPU where MPS
    computes wrongly, unless that was insisted on.
    """
    if not args.finetuned.is_file():
        command = "python train_sam2_proper.py" + " --demo" * args.demo
        raise UserError(f"no fine-tuned model at {args.finetuned}; run: {command}")
    finetuned, facts = load_predictor(args.model, args.finetuned, args.device)
    args.device = trusted_device(finetuned, args.device, insists_on_mps)
    name, settings = facts["model_name"], facts.get("settings")
    settings = settings if isinstance(settings, dict) else {}  # of another program
    started_from = Path(settings.get("checkpoint", ""))
    checkpoint = args.original or (
        started_from if started_from.is_file() else ensure_checkpoint(name)
    )
    original, _ = load_predictor(name, checkpoint, args.device)
    print(f"original:   {checkpoint}\nfine-tuned: {args.finetuned} (SAM 2.1 {name})")
    if facts.get("epoch") == 0:
        print("            which is the original: no epoch of the training was better")
    args.precision = choose_precision(args, settings)
    share_encoder = hash_encoder(original.model) == hash_encoder(finetuned.model)
    folder, cache = args.cache or settings.get("cache"), None
    if share_encoder and folder:
        path = Path(folder) / f"{args.split}.features"
        cache = FeatureCache(path, original, pairs, args.precision)
    return Models(original, finetuned, share_encoder, cache)


def choose_precision(args: Namespace, settings: dict[str, Any]) -> torch.dtype:
    """Return the precision asked for, else that of the training, else the device's own."""
    if args.precision == "auto":
        with contextlib.suppress(UserError):  # trained on a device with other abilities
            return select_precision(settings.get("precision", "auto"), args.device)
    return select_precision(args.precision, args.device)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--demo", action="store_true", help="compare what the demo trained")
    models = parser.add_argument_group("the models")
    models.add_argument(
        "--finetuned", type=Path, default=Path("output/sam2_best.pt"), help="the fine-tuned file"
    )
    models.add_argument(
        "--original", type=Path, help="the original (default: what training started from)"
    )
    models.add_argument(
        "--model", choices=MODELS, help="their size (default: what the fine-tuned file says)"
    )
    data = parser.add_argument_group("what they are compared on")
    data.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    data.add_argument("--split", choices=("val", "train"), default="val", help="which images")
    data.add_argument("--limit", type=number(int, at_least=1), help="the first N images only")
    data.add_argument(
        "--prompt",
        choices=("center", "random", "box"),
        default="center",
        help="the point deepest inside the mask, a random point in it, or its box",
    )
    data.add_argument(
        "--mask",
        choices=("best", "single"),
        default="best",
        help="best: of the three masks, the one that the model scores highest; single: the single "
        "mask, or the best where that is not stable, as video and other tools take it",
    )
    data.add_argument("--seed", type=seed, default=42, help="of random points and of the interval")
    data.add_argument(
        "--cache",
        type=Path,
        help="where features are read from (default: where training kept them)",
    )
    clicks = parser.add_argument_group("simulated clicks, whatever --prompt says")
    clicks.add_argument(
        "--clicks",
        type=number(int, at_least=1, below=MAX_CLICKS + 1),
        metavar="N",
        help="also measure 1 to N clicks, each where the model's mask is most wrong (default: off)",
    )
    clicks.add_argument(
        "--no-mask-prompt",
        action="store_true",
        help="give the models the clicks alone, without their previous mask",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", type=Path, default=Path("output/comparison"), help="where they go"
    )
    results.add_argument(
        "--figures",
        type=number(int, at_least=0),
        default=10,
        help="how many pictures: the biggest gains and the biggest losses",
    )
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(machine, "auto: that of the training")
    args = parser.parse_args_with_demo(
        argv,
        data=DEMO_DATA,
        finetuned=Path("output/demo/sam2_best.pt"),
        output=Path("output/demo/comparison"),
    )
    if args.no_mask_prompt and not args.clicks:
        raise UserError("--no-mask-prompt is about simulated clicks; add --clicks 10, say")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    insists_on_mps = args.device == "mps"
    args.device = select_device(args.device)
    pairs = split_pairs(args.data, args.split, args.limit)
    models = load_models(pairs, insists_on_mps, args)

    results = compare(models, pairs, args)
    measured = args.split + (", single mask" if args.mask == "single" else "")
    print_anywhere(format_table(results, measured))
    print(format_details(results, args.seed))
    write_results(args.output / "results.csv", results)
    remove_earlier(args.output)
    drawn = draw_comparisons(models, results, args)
    if args.clicks:
        report_clicks(models, results, args)
    also = ", ".join(["", *CLICK_FILES]) if args.clicks else ""
    print(f"wrote results.csv{also} and {drawn} picture(s) to {args.output}")


def print_anywhere(table: str) -> None:
    """Print a table, with ASCII in place of box characters where the console lacks them."""
    try:
        table.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        table = table.translate(ASCII_BOX)
    print(table)


if __name__ == "__main__":
    run(main)
