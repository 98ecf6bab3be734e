"""Compare the original SAM 2.1 with your fine-tuned one: mean IoU, and pictures.

    python compare_models.py                    # output/sam2_best.pt on data/'s test split, or val
    python compare_models.py --prompt box       # prompted with the object's box, not a point
    python compare_models.py --limit 20         # a quick look
    python compare_models.py --figures 20       # more pictures
    python compare_models.py --clicks 10        # and when their masks are corrected, click by click
    python compare_models.py --mask single      # the mask that other tools take
    python compare_models.py --tta              # both average 4 mirrored views of each image
    python compare_models.py --auto             # and how many objects are found without a prompt
    python compare_models.py --folds            # what train_sam2_proper.py --folds trained
    python compare_models.py --demo             # what train_sam2_proper.py --demo made

Both models get the same prompts. Of three masks each, the one with the highest predicted score
counts; with --mask single, SAM 2's single mask. Written to output/comparison/: report.html, which
contains everything that is printed; results.csv, scatter.png and the pictures; with --clicks, also
clicks.csv and clicks.png; with --auto, auto.csv.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from sam2_utils import UserError, select_device

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
from finetuning.comparison.clicks import CLICK_FILES, compare_clicks
from finetuning.comparison.detection import AUTO_FILE, compare_automatic
from finetuning.comparison.figures import draw_comparisons, draw_ious, remove_earlier
from finetuning.comparison.report import format_files, format_summary, summarize, write_results
from finetuning.comparison.report_page import Setup, write_page
from finetuning.comparison.report_sentences import (
    cleaning_sentences,
    describe_empty,
    describe_views,
)
from finetuning.comparison.tables import Table, format_table, print_anywhere
from finetuning.dataset.pairs import SPLITS, Pair, keep_out, split_pairs
from finetuning.dataset.splitting import read_folds
from finetuning.evaluation.measuring import Comparison, measure
from finetuning.evaluation.seen_images import add_overlaps, count_overlap, require_unseen
from finetuning.evaluation.simulated_clicks import MAX_MEASURED_CLICKS
from finetuning.model.checkpoints import checkpoint_path
from finetuning.model.loading import load_models
from finetuning.model.model import Model
from finetuning.model.models import MODELS
from finetuning.segmentation.averaging import add_views_option, choose_views
from finetuning.segmentation.clean_masks import NO_CLEANING, add_clean_option


def choose_pairs(
    data: Path, split: str | None, limit: int | None, finetuned: Path, folds: Path | None
) -> tuple[str, list[Path], list[list[Pair]]]:
    """Return the split's display name, the fine-tuned models' files, and the pairs for each.

    By default, the split is test if there is one, else val. folds: the output folder of a training
    with folds; each image is then measured by the model that was not trained on it.
    """
    if folds:
        by_model = read_folds(folds, {name: split_pairs(data, name) for name in ("train", "val")})
        folds_pairs = [pairs[:limit] for pairs in by_model.values()]
        return f"{len(by_model)} folds", list(by_model), folds_pairs
    split = split or ("test" if (data / "images/test").is_dir() else "val")
    return split, [finetuned], [split_pairs(data, split, limit)]


def require_finetuned(file: Path, is_demo: bool) -> None:
    """Raise UserError if there is no fine-tuned model; the message has the training's command."""
    if not file.is_file():
        command = "python train_sam2_proper.py" + " --demo" * is_demo
        raise UserError(f"no fine-tuned model at {file}; run: {command}")


def measure_all(
    models: list[Model], pairs: list[list[Pair]], prompt_kind: str, mask_kind: str, seed: int
) -> list[Comparison]:
    """Measure the original, the first model, and each fine-tuned model on the latter's pairs.

    Both models' masks are cleaned as the fine-tuned model's file says. Raises UserError if no image
    has an object.
    """
    original, *finetuned = models
    comparisons: list[Comparison] = []
    done = 0
    for model, own_pairs in zip(finetuned, pairs, strict=True):
        both = [original._replace(cleaning=model.cleaning), model]
        how = (prompt_kind, mask_kind, seed, "Comparing")
        # Images are numbered across all folds, since the number seeds the random points
        results = measure(both, own_pairs, *how, first_index=done)
        comparisons.append(Comparison(both, own_pairs, results))
        done += len(own_pairs)
    if not any(comparison.results for comparison in comparisons):
        raise UserError("every mask is empty; check that objects are white (255)")
    return comparisons


def print_written(
    output: Path, pictures: int, clicks: Table | None, automatic: Table | None
) -> None:
    """Print which files were written."""
    extra = (*(CLICK_FILES if clicks else ()), *([AUTO_FILE] if automatic else ()))
    names = ", ".join(["report.html", "results.csv", "scatter.png", *extra])
    print(
        say(
            "\nwrote {names} and {count} picture(s) to {output}",
            names=names, count=pictures, output=one_line(output),
        )
    )  # fmt: skip


def add_data_options(parser: ArgumentParser) -> None:
    """Add the options for the images and the prompts."""
    data = parser.add_argument_group("images and prompts")
    data.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    data.add_argument(
        "--split",
        choices=SPLITS,
        help="which images (default: test if there is a test split, else val)",
    )
    at_least_1 = number(int, at_least=1)
    data.add_argument("--limit", type=at_least_1, help="the first N images only (of each fold)")
    data.add_argument(
        "--prompt",
        choices=("center", "random", "box", "none"),
        default="center",
        help="center: the point deepest inside the mask; random: a random point inside it; box: "
        "its box; none: no prompt, the models find all objects",
    )
    data.add_argument(
        "--mask",
        choices=("best", "single"),
        default="best",
        help="best: the one of three masks that the model scores highest; single: the single mask "
        "that video and other tools use, or the best if the single mask is not stable",
    )
    add_clean_option(data)
    data.add_argument(
        "--allow-seen", action="store_true", help="also measure test images that were trained on"
    )
    data.add_argument(
        "--seed", type=seed, default=42, help="for random points and the confidence interval"
    )
    data.add_argument(
        "--cache",
        type=Path,
        help="folder of the cached features (default: the cache of the training)",
    )


def add_more_options(parser: ArgumentParser) -> None:
    """Add the options for simulated clicks and for objects found without a prompt."""
    clicks = parser.add_argument_group("simulated clicks, independent of --prompt")
    clicks.add_argument(
        "--clicks",
        type=number(int, at_least=1, below=MAX_MEASURED_CLICKS + 1),
        metavar="N",
        help="also measure 1 to N clicks, each where the model's mask is most wrong (default: off)",
    )
    clicks.add_argument(
        "--no-mask-prompt",
        action="store_true",
        help="give the models only the clicks, not their previous mask",
    )
    parser.add_argument(
        "--auto",
        action="store_true",
        help="also count the objects that SAM 2's automatic mask generator finds (slow)",
    )


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--demo", action="store_true", help="compare the models of the demo")
    models = parser.add_argument_group("the models")
    models.add_argument(
        "--finetuned",
        type=checkpoint_path,
        default=Path("output/sam2_best.pt"),
        help="the fine-tuned file, or its folder",
    )
    models.add_argument(
        "--folds",
        type=Path,
        nargs="?",
        const=Path("output"),
        metavar="DIR",
        help="the output folder of train_sam2_proper.py --folds: measure each image with the model "
        "that was not trained on it",
    )
    models.add_argument(
        "--original",
        type=checkpoint_path,
        help="the original (default: the checkpoint that training started from)",
    )
    models.add_argument(
        "--model", choices=MODELS, help="model size (default: as recorded in the fine-tuned file)"
    )
    add_views_option(models)
    add_data_options(parser)
    add_more_options(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", type=Path, default=Path("output/comparison"), help="folder for the results"
    )
    results.add_argument(
        "--figures",
        type=number(int, at_least=0),
        default=10,
        help="number of pictures: half the largest gains, half the largest losses",
    )
    add_language_option(results)
    machine = parser.add_argument_group("the machine")
    add_device_option(machine)
    add_precision_option(machine, "auto: the precision of the training")
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    args = make_parser().parse_args_with_demo(
        argv,
        data=DEMO_DATA,
        finetuned=DEMO_OUTPUT / "sam2_best.pt",
        output=DEMO_OUTPUT / "comparison",
    )
    if args.folds and args.split:
        raise UserError("--folds measures train and val; omit --split")
    if args.folds and args.auto:
        raise UserError("--auto measures one model and --folds several; omit one of them")
    if args.auto and args.tta:
        raise UserError("--auto cannot average views; omit --tta or --auto")
    if args.no_mask_prompt and not args.clicks:
        raise UserError("--no-mask-prompt needs simulated clicks; add --clicks 10")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    use_language(args.language)
    keep_out(args.data, args.output)
    device = select_device(args.device, args.threads)

    # The images and the models
    split, paths, pairs = choose_pairs(
        args.data, args.split, args.limit, args.finetuned, args.folds
    )
    training = split_pairs(args.data, "train") if args.auto else []
    if not args.folds:
        require_finetuned(args.finetuned, args.demo)
    models, files = load_models(
        paths, args.original, args.model, device, args.device == "mps", args.precision, args.cache
    )
    views = choose_views(args.tta)
    models = [model._replace(views=views) for model in models]
    if args.clean == "off":
        models = [model._replace(cleaning=NO_CLEANING) for model in models]
    images = args.data / "images" / ("" if args.folds else split)
    print(format_files(files, images, split == "test" and not args.split))
    overlap = add_overlaps(list(map(count_overlap, pairs, files.facts)))
    if split == "test" and not args.allow_seen:
        require_unseen(overlap, files.finetuned_name)

    # The same prompts for both models
    comparisons = measure_all(models, pairs, args.prompt, args.mask, args.seed)
    results = [result for comparison in comparisons for result in comparison.results]
    runs_file = None if args.folds else args.finetuned.with_name(RUNS_FILE)
    summary = summarize(results, split, overlap, args.mask, args.seed, runs_file)
    summary.sentences.extend(describe_views(views))
    summary.sentences.extend(cleaning_sentences(comparisons))
    summary.sentences.extend(describe_empty(comparisons, args.prompt, args.mask))
    print_anywhere(format_summary(summary))

    write_results(args.output / "results.csv", results)
    remove_earlier(args.output)
    draw_ious(args.output / "scatter.png", results)
    pictures = draw_comparisons(args.output, comparisons, args.mask, args.figures)

    # On request: corrective clicks, and objects found without a prompt
    clicks = automatic = None
    if args.clicks:
        with_mask = not args.no_mask_prompt
        clicks = compare_clicks(args.output, comparisons, args.clicks, with_mask, args.mask)
        print_anywhere("\n" + format_table(clicks))
    if args.auto:
        facts = files.facts[0]
        automatic = compare_automatic(args.output, models, facts, pairs[0], training, args.seed)
        print_anywhere("\n" + format_table(automatic))

    setup = Setup(args.data, split, args.prompt, args.mask, args.seed, ["compare_models.py", *argv])
    write_page(args.output, summary, files, models[0], setup, clicks, pictures, automatic)
    print_written(args.output, len(pictures), clicks, automatic)


if __name__ == "__main__":
    run(main)
