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
from argparse import Namespace
from pathlib import Path

from sam2_utils import UserError, select_device, select_precision

import torch
from tqdm import tqdm

from finetuning.checkpoints import setting
from finetuning.clicks import (
    CLICK_FILES,
    MAX_CLICKS,
    draw_clicks,
    format_clicks,
    measure_clicks,
    write_clicks,
)
from finetuning.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    number,
    run,
    seed,
)
from finetuning.device_check import trusted_device
from finetuning.drawing import draw_object, draw_panels
from finetuning.evaluation import (
    METRICS,
    Model,
    Result,
    features_for,
    group_by_image,
    mean_gain,
    mean_metrics,
    measure,
    segment_with_all,
    unit_of,
)
from finetuning.feature_cache import FeatureCache, FeatureSource, hash_encoder
from finetuning.files import write_csv
from finetuning.models import MODELS, ensure_checkpoint, load_predictor
from finetuning.objects import read_pair
from finetuning.pairs import DEMO_DATA, DEMO_OUTPUT, SPLITS, split_pairs
from finetuning.report import format_details, format_table, print_anywhere

FIGURE_NAME = re.compile(r"comparison_\d+_[+-]\d+p_")


def load_models(
    finetuned_file: Path,
    original_file: Path | None,
    model_name: str | None,
    device: torch.device,
    insists_on_mps: bool,
    precision_name: str,
    cache_folder: Path | None,
) -> list[Model]:
    """Load the original and the fine-tuned model, which must be of the same size.

    Where the files are not given, the original is what training started from, the precision
    (auto) and the folder of the features are those of the training. Where MPS computes wrongly,
    unless insisted on, both are on the CPU.
    """
    finetuned, facts = load_predictor(model_name, finetuned_file, device)
    device = trusted_device(finetuned, device, insists_on_mps)
    name, started_from = facts["model_name"], Path(setting(facts, "checkpoint") or "")
    checkpoint = original_file or (
        started_from if started_from.is_file() else ensure_checkpoint(name)
    )
    original, _ = load_predictor(name, checkpoint, device)
    print(f"original:   {checkpoint}\nfine-tuned: {finetuned_file} (SAM 2.1 {name})")
    if facts.get("epoch") == 0:
        print("            which is the original: no epoch of the training was better")

    precision = choose_precision(precision_name, setting(facts, "precision"), device)
    folder, source = cache_folder or setting(facts, "cache"), FeatureSource(original, precision)
    if hash_encoder(original.model) != hash_encoder(finetuned.model):
        return [Model(original, source), Model(finetuned, FeatureSource(finetuned, precision))]
    if folder:
        source = source._replace(cache=FeatureCache(Path(folder), original, precision))
    return [Model(original, source), Model(finetuned, source)]


def choose_precision(name: str, trained_in: str | None, device: torch.device) -> torch.dtype:
    """Return the precision asked for, else that of the training, else the device's own."""
    if name == "auto":
        with contextlib.suppress(UserError):  # trained on a device with other abilities
            return select_precision(trained_in or "auto", device)
    return select_precision(name, device)


def write_results(path: Path, results: list[Result]) -> None:
    """Write a row an object."""
    columns = [f"{model}_{name.lower()}" for name in METRICS for model in ("original", "finetuned")]
    rows = []
    for result in results:
        points = zip(result.prompt.point_coords, result.prompt.point_labels, strict=True)
        prompt = " ".join(f"{x:g},{y:g}:{label}" for (x, y), label in points)
        numbers = [of_model[name] for name in METRICS for of_model in result.metrics]
        numbers = [f"{value:.6f}" for value in (*numbers, result.area_fraction)]
        rows.append([*result.name, prompt, *numbers])
    write_csv(path, ["image", "object", "prompt", *columns, "area_fraction"], rows)


def choose_figures(results: list[Result], count: int) -> list[list[Result]]:
    """Choose the images to draw, by their objects' mean gain: half the biggest, half the worst."""
    ranked = sorted(group_by_image(results), key=mean_gain, reverse=True)
    if count >= len(ranked):
        return ranked
    return ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def draw_comparisons(
    output: Path, models: list[Model], results: list[Result], mask_kind: str, count: int
) -> int:
    """Draw the chosen images, named by rank and gain in %p; return how many."""
    chosen = choose_figures(results, count)
    for rank, of_image in enumerate(tqdm(chosen, desc="Drawing", unit="figure"), start=1):
        pair = of_image[0].pair
        image, objects = read_pair(pair)
        features = features_for(models, pair, objects.size)
        panels = [image.copy() for _ in range(1 + len(models))]
        for result in of_image:
            true_mask = objects[result.object]
            masks = segment_with_all(models, features, result.prompt, objects.size, mask_kind)
            draw_object(panels[0], prompt=result.prompt, true_mask=true_mask)
            for panel, mask in zip(panels[1:], masks, strict=True):
                draw_object(panel, mask, true_mask=true_mask, number=result.object)
        titles = ["prompt and true outline"] + [
            f"{name}: IoU {mean_metrics(of_image, model)['IoU']:.2f}"
            for model, name in enumerate(("original", "fine-tuned"))
        ]
        name = f"comparison_{rank:02}_{round(100 * mean_gain(of_image)):+d}p_{pair.name}.png"
        draw_panels(output / name, dict(zip(titles, panels, strict=True)))
    return len(chosen)


def remove_earlier(output: Path) -> None:
    """Remove an earlier comparison's files that would be taken for this one's."""
    for path in output.glob("comparison_*.png"):
        if FIGURE_NAME.match(path.name):
            path.unlink()
    for name in CLICK_FILES:
        (output / name).unlink(missing_ok=True)


def add_data_options(parser: ArgumentParser) -> None:
    """Add what the models are compared on, and how they are prompted."""
    data = parser.add_argument_group("what they are compared on")
    data.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    data.add_argument("--split", choices=SPLITS, default="val", help="which images")
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


def make_parser() -> ArgumentParser:
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
    add_data_options(parser)
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
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    args = make_parser().parse_args_with_demo(
        argv,
        data=DEMO_DATA,
        finetuned=DEMO_OUTPUT / "sam2_best.pt",
        output=DEMO_OUTPUT / "comparison",
    )
    if args.no_mask_prompt and not args.clicks:
        raise UserError("--no-mask-prompt is about simulated clicks; add --clicks 10, say")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device)
    pairs = split_pairs(args.data, args.split, args.limit)
    if not args.finetuned.is_file():
        command = "python train_sam2_proper.py" + " --demo" * args.demo
        raise UserError(f"no fine-tuned model at {args.finetuned}; run: {command}")
    models = load_models(
        args.finetuned,
        args.original,
        args.model,
        device,
        insists_on_mps=args.device == "mps",
        precision_name=args.precision,
        cache_folder=args.cache,
    )

    # The same prompts for both
    results = measure(models, pairs, args.prompt, args.mask, args.seed, "Comparing")
    if not results:
        raise UserError("every mask is empty; check that objects are white (255)")
    measured = args.split + (", single mask" if args.mask == "single" else "")
    print_anywhere(format_table(results, measured))
    print(format_details(results, args.seed))
    write_results(args.output / "results.csv", results)
    remove_earlier(args.output)
    drawn = draw_comparisons(args.output, models, results, args.mask, args.figures)

    # Clicks that correct each model's own mask
    if args.clicks:
        with_mask = not args.no_mask_prompt
        ious = measure_clicks(models, results, args.clicks, with_mask, args.mask)
        what = unit_of(results) + "s"
        print(format_clicks(ious, with_mask, what))
        write_clicks(args.output / "clicks.csv", [result.name for result in results], ious)
        draw_clicks(args.output / "clicks.png", ious, with_mask, what)
    also = ", ".join(["", *CLICK_FILES]) if args.clicks else ""
    print(f"wrote results.csv{also} and {drawn} picture(s) to {args.output}")


if __name__ == "__main__":
    run(main)
