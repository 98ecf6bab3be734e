"""Compare the original SAM 2.1 with your fine-tuned one: mean IoU, and pictures.

    python compare_models.py                    # output/sam2_best.pt on data/'s test split, or val
    python compare_models.py --prompt box       # prompted with the object's box, not a point
    python compare_models.py --limit 20         # a quick look
    python compare_models.py --figures 20       # more pictures
    python compare_models.py --clicks 10        # and when their masks are corrected, click by click
    python compare_models.py --mask single      # the mask that other tools take
    python compare_models.py --auto             # and how many objects are found without a prompt
    python compare_models.py --folds            # what train_sam2_proper.py --folds trained
    python compare_models.py --demo             # what train_sam2_proper.py --demo made

Both models get the same prompts, and of three masks each the one with the highest predicted
score counts; or SAM 2's single mask, with --mask single. Written to output/comparison/:
report.html, which holds all that is printed; results.csv, scatter.png and the pictures; with
--clicks, also clicks.csv and clicks.png; with --auto, auto.csv.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from pathlib import Path

from sam2_utils import UserError, select_device

import numpy as np

from finetuning.basics.command_line import (
    ArgumentParser,
    add_device_option,
    add_precision_option,
    number,
    one_line,
    run,
    seed,
)
from finetuning.basics.files import DEMO_DATA, DEMO_OUTPUT
from finetuning.basics.language import add_language_option, say, use_language
from finetuning.basics.run_outputs import RUNS_FILE
from finetuning.comparison.clicks import CLICK_FILES, clicks_table, draw_clicks, write_clicks
from finetuning.comparison.detection import AUTO_FILE, compare_automatic
from finetuning.comparison.figures import draw_comparisons, draw_scatter, remove_earlier
from finetuning.comparison.report import (
    format_files,
    format_summary,
    size_of,
    summarize,
    write_results,
)
from finetuning.comparison.report_page import Setup, write_page
from finetuning.comparison.report_sentences import empty_sentence
from finetuning.comparison.tables import Table, format_table, print_anywhere
from finetuning.dataset.pairs import SPLITS, Pair, keep_out, split_pairs
from finetuning.dataset.splitting import read_folds
from finetuning.evaluation.measuring import Result, find_in_empty, measure, unit_of
from finetuning.evaluation.seen_images import add_overlaps, count_overlap, require_unseen
from finetuning.evaluation.simulated_clicks import MAX_CLICKS, measure_clicks
from finetuning.model.loading import load_models
from finetuning.model.model import Model
from finetuning.model.models import MODELS


def choose_pairs(
    data: Path, split: str | None, limit: int | None, finetuned: Path, folds: Path | None
) -> tuple[str, dict[Path, list[Pair]]]:
    """Return what is measured, as it is called, and the pairs of each fine-tuned model.

    That is a split (by default test, where there is one, else val), or all folds of a training.
    """
    if folds:
        pairs = {name: split_pairs(data, name) for name in ("train", "val")}
        of_folds = read_folds(folds, pairs)
        return f"{len(of_folds)} folds", {model: of[:limit] for model, of in of_folds.items()}
    split = split or ("test" if (data / "images/test").is_dir() else "val")
    return split, {finetuned: split_pairs(data, split, limit)}


def measure_all(
    original: Model,
    finetuned: list[Model],
    pairs_of: list[list[Pair]],
    prompt_kind: str,
    mask_kind: str,
    seed: int,
) -> list[Result]:
    """Measure the original and each of the fine-tuned models on the pairs of the latter."""
    results: list[Result] = []
    done = 0
    for model, pairs in zip(finetuned, pairs_of, strict=True):
        how = prompt_kind, mask_kind, seed, "Comparing"
        results += measure([original, model], pairs, *how, first_index=done)
        done += len(pairs)
    return results


def describe_empty(
    results: list[Result],
    original: Model,
    finetuned: list[Model],
    pairs_of: list[list[Pair]],
    prompt_kind: str,
    mask_kind: str,
) -> list[str]:
    """Say how many images have no object and, without a prompt, in how many one is found."""
    measured, numbers = {result.index for result in results}, itertools.count()
    count, found = 0, []
    for model, pairs in zip(finetuned, pairs_of, strict=True):
        empty = [pair for pair in pairs if next(numbers) not in measured]
        count += len(empty)
        if prompt_kind == "none":
            found += find_in_empty([original, model], empty, mask_kind)
    return [empty_sentence(count, np.sum(found, axis=0).tolist())] if count else []


def compare_clicks(
    output: Path,
    results: list[Result],
    count: int,
    with_mask: bool,
    mask_kind: str,
) -> Table:
    """Measure and write what clicks that correct each model's own mask bring; return the table."""
    ious, unit = measure_clicks(results, count, with_mask, mask_kind), unit_of(results)
    write_clicks(output / "clicks.csv", [result.name for result in results], ious)
    draw_clicks(output / "clicks.png", ious, with_mask, unit)
    return clicks_table(ious, with_mask, unit)


def draw_ious(path: Path, results: list[Result]) -> None:
    """Draw the IoU of the fine-tuned model over that of the original, a dot an object."""
    ious = np.array([[of_model["IoU"] for of_model in result.metrics] for result in results])
    sizes = [size_of(result.area_fraction) for result in results]
    draw_scatter(path, ious, sizes, unit_of(results))


def add_data_options(parser: ArgumentParser) -> None:
    """Add what the models are compared on, and how they are prompted."""
    data = parser.add_argument_group("what they are compared on")
    data.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    data.add_argument(
        "--split", choices=SPLITS, help="which images (default: test where there are any, else val)"
    )
    at_least_1 = number(int, at_least=1)
    data.add_argument("--limit", type=at_least_1, help="the first N images only (of each fold)")
    data.add_argument(
        "--prompt",
        choices=("center", "random", "box", "none"),
        default="center",
        help="the point deepest in the mask, a random point in it, or its box; none: nothing, and "
        "all objects are to be found",
    )
    data.add_argument(
        "--mask",
        choices=("best", "single"),
        default="best",
        help="best: of the three masks, the one that the model scores highest; single: the single "
        "mask, or the best where that is not stable, as video and other tools take it",
    )
    data.add_argument(
        "--allow-seen", action="store_true", help="measure test images that were trained on, too"
    )
    data.add_argument("--seed", type=seed, default=42, help="of random points and of the interval")
    data.add_argument(
        "--cache",
        type=Path,
        help="where features are read from (default: where training kept them)",
    )


def add_more_options(parser: ArgumentParser) -> None:
    """Add what else is measured: clicks, and objects without a prompt."""
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
    parser.add_argument(
        "--auto",
        action="store_true",
        help="also count the objects that SAM 2's automatic mask generator finds (slow)",
    )


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--demo", action="store_true", help="compare what the demo trained")
    models = parser.add_argument_group("the models")
    models.add_argument(
        "--finetuned", type=Path, default=Path("output/sam2_best.pt"), help="the fine-tuned file"
    )
    models.add_argument(
        "--folds",
        type=Path,
        nargs="?",
        const=Path("output"),
        metavar="DIR",
        help="the folder of train_sam2_proper.py --folds: each image by a model that it is new to",
    )
    models.add_argument(
        "--original", type=Path, help="the original (default: what training started from)"
    )
    models.add_argument(
        "--model", choices=MODELS, help="their size (default: what the fine-tuned file says)"
    )
    add_data_options(parser)
    add_more_options(parser)
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
    add_language_option(results)
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
    if args.folds and args.split:
        raise UserError("--folds measures train and val; leave --split out")
    if args.folds and args.auto:
        raise UserError("--auto measures one model, and --folds several; leave one of them out")
    if args.no_mask_prompt and not args.clicks:
        raise UserError("--no-mask-prompt is about simulated clicks; add --clicks 10, say")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    use_language(args.language)
    keep_out(args.data, args.output)
    device = select_device(args.device, args.threads)
    split, pairs_of = choose_pairs(args.data, args.split, args.limit, args.finetuned, args.folds)
    training = split_pairs(args.data, "train") if args.auto else []
    if not args.finetuned.is_file() and not args.folds:
        command = "python train_sam2_proper.py" + " --demo" * args.demo
        raise UserError(f"no fine-tuned model at {args.finetuned}; run: {command}")
    (original, *finetuned), files = load_models(
        list(pairs_of),
        args.original,
        args.model,
        device,
        insists_on_mps=args.device == "mps",
        precision_name=args.precision,
        cache_folder=args.cache,
    )
    images = args.data / "images" / ("" if args.folds else split)
    print(format_files(files, images, split == "test" and not args.split))

    overlap = add_overlaps(list(map(count_overlap, pairs_of.values(), files.facts)))
    if split == "test" and not args.allow_seen:
        require_unseen(overlap, files.finetuned_name)

    # The same prompts for both
    how = args.prompt, args.mask, args.seed
    results = measure_all(original, finetuned, list(pairs_of.values()), *how)
    if not results:
        raise UserError("every mask is empty; check that objects are white (255)")
    runs_file = None if args.folds else args.finetuned.with_name(RUNS_FILE)
    summary = summarize(results, split, overlap, args.mask, args.seed, runs_file)
    empty = original, finetuned, list(pairs_of.values()), args.prompt, args.mask
    summary.sentences.extend(describe_empty(results, *empty))
    print_anywhere(format_summary(summary))
    write_results(args.output / "results.csv", results)
    remove_earlier(args.output)
    draw_ious(args.output / "scatter.png", results)
    pictures = draw_comparisons(args.output, results, args.mask, args.figures)

    clicks, with_mask = None, not args.no_mask_prompt
    if args.clicks:
        clicks = compare_clicks(args.output, results, args.clicks, with_mask, args.mask)
        print_anywhere("\n" + format_table(clicks))
    automatic = None
    if args.auto:
        of_models = [original, *finetuned], files.facts[0], *pairs_of.values()
        automatic = compare_automatic(args.output, *of_models, training, args.seed)
        print_anywhere("\n" + format_table(automatic))
    setup = Setup(args.data, split, args.prompt, args.mask, args.seed, ["compare_models.py", *argv])
    write_page(args.output, summary, files, original, setup, clicks, pictures, automatic)
    extra = (*(CLICK_FILES if clicks else ()), *([AUTO_FILE] if automatic else ()))
    names = ", ".join(["report.html", "results.csv", "scatter.png", *extra])
    print(
        say(
            "\nwrote {names} and {count} picture(s) to {output}",
            names=names, count=len(pictures), output=one_line(args.output),
        )
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
