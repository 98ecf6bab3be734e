"""Measure what fine-tuning costs: the guide's loop against this project's, on the same images.

    python benchmarks/benchmark_training.py --limit 50                      # small, on data/
    python benchmarks/benchmark_training.py --model mini --epochs 4 --val-limit 100
    python benchmarks/benchmark_training.py --random-weights --limit 50 --totals-for 400

Every variant runs in a process of its own, one after the other: the guide's loop, written out
plainly (float32, batch 1, the encoder in every step); this project's with the guide's recipe, with
the compiled decoder and without; with its own recipe, whose corrective clicks cost something; and,
as the floor, the bare decoder, forward and backward on tensors in memory.
Prints a table and writes it to output/benchmark/ as benchmark.csv and benchmark.png. A total is
encode + epochs x epoch (+ compiling), from what was measured; validation is in none of them.
With --random-weights, time and memory are those of the real weights; the IoU means nothing.
"""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sam2_proper
from command_line import ArgumentParser, UserError, number, run, seed
from compare_models import Models, segment_with_both
from feature_cache import FeatureCache, load_features, pairs_with_objects
from image_files import Pair, atomic_write, read_mask, read_pair, split_pairs, write_csv
from sam2_utils import (
    MODELS,
    add_device_option,
    autocast,
    build_predictor,
    encode_images,
    ensure_checkpoint,
    load_predictor,
    predict_masks,
    prompt_from_mask,
    random_point,
    save_checkpoint,
    segment,
    select_device,
    select_precision,
)
from training_set import EpochSampler, TrainingSet, make_loader

import numpy as np
import torch
from matplotlib.figure import Figure
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

GUIDE, OURS = "the guide's loop", "this project, default recipe"
COMPILED, PLAIN = "this project, guide's recipe", "this project, guide's recipe, not compiled"
EPOCHS = (1, 5, 20)
COLUMNS = (
    "variant", "encode s/image", "step s/image", "epoch s", "compile s",
    *(f"{epochs} epoch{'s' * (epochs > 1)} s" for epochs in EPOCHS),
    "20 epochs, ratio", "peak GB", "val IoU", "images shown",
)  # fmt: skip


def measure_guide(args: Namespace) -> dict[str, Any]:
    """Run the guide's loop, word for word, and time its two parts."""
    predictor, pairs, settings = prepare(args, precision="float32")
    pairs = pairs[: args.guide_images]
    model = predictor.model
    model.sam_mask_decoder.train(True)
    model.sam_prompt_encoder.train(True)
    learned = [*model.sam_mask_decoder.parameters(), *model.sam_prompt_encoder.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=settings.lr, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(args.seed)
    encode_seconds = step_seconds = 0.0
    for _ in range(args.epochs):
        for index in tqdm(rng.permutation(len(pairs)), desc=GUIDE, unit="image"):
            start = clock(args.device)
            image, mask = read_pair(pairs[index])
            predictor.set_image(image)
            encoded = clock(args.device)

            point = np.array([[random_point(mask, rng)]])
            label = np.ones((1, 1), np.int32)
            _, coords, labels, _ = predictor._prep_prompts(
                point, label, box=None, mask_logits=None, normalize_coords=True
            )
            sparse_embeddings, dense_embeddings = model.sam_prompt_encoder(
                points=(coords, labels), boxes=None, masks=None
            )
            features = predictor._features["high_res_feats"]
            low_res_masks, scores, _, _ = model.sam_mask_decoder(
                image_embeddings=predictor._features["image_embed"],
                image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse_embeddings,
                dense_prompt_embeddings=dense_embeddings,
                multimask_output=True,
                repeat_image=False,
                high_res_features=[level[-1].unsqueeze(0) for level in features],
            )
            masks = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])
            truth = torch.from_numpy(mask.astype(np.float32)).to(args.device)
            probability = torch.sigmoid(masks[0, 0])
            seg_loss = -(
                truth * torch.log(probability + 1e-5)
                + (1 - truth) * torch.log(1 - probability + 1e-5)
            ).mean()
            predicted = (masks[0] > 0).float()
            intersection = (predicted * truth).sum((1, 2))
            union = predicted.sum((1, 2)) + truth.sum() - intersection
            score_loss = (scores[0] - intersection / (union + 1e-6)).abs().mean()
            loss = seg_loss + settings.score_weight * score_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            encode_seconds += encoded - start
            step_seconds += clock(args.device) - encoded
    shown = args.epochs * len(pairs)
    model.eval()
    return {
        "encode s/image": encode_seconds / shown,
        "step s/image": step_seconds / shown,
        "compile s": 0.0,
        "peak GB": peak_gigabytes(args.device),
        "val IoU": validate(predictor, settings, args),
        "images shown": shown,
    }


def measure_project(
    args: Namespace, compiling: str, fill: bool, recipe: str = "guide"
) -> dict[str, Any]:
    """Run this project's loop over the feature cache, which is filled first or is there already."""
    predictor, pairs, settings = prepare(args, "auto", compiling, recipe)
    folder = args.output / "cache"
    if fill:
        shutil.rmtree(folder, ignore_errors=True)
    start = clock(args.device)
    cache = FeatureCache(folder / "train.features", predictor, pairs, settings.precision)
    cache.fill(predictor)
    encode_seconds = clock(args.device) - start

    indices = pairs_with_objects(pairs, cache)
    sampler = EpochSampler(indices, settings.batch_size, args.seed)
    training_set = TrainingSet(
        pairs, cache, predictor.model.image_size, args.seed, settings.prompts
    )
    loader = make_loader(training_set, sampler, args.device)
    start = clock(args.device)
    learner = train_sam2_proper.make_learner(predictor, settings)
    learner = train_sam2_proper.speed_up(learner, predictor, len(indices), settings)
    compiled = clock(args.device)
    for epoch in range(1, args.epochs + 1):
        train_sam2_proper.train_one_epoch(predictor, loader, learner, epoch, settings)
    seconds = clock(args.device) - compiled
    shown = args.epochs * len(indices)
    return {
        "encode s/image": encode_seconds / len(pairs) if fill else None,
        "step s/image": seconds / shown,
        "compile s": compiled - start,
        "peak GB": peak_gigabytes(args.device),
        "val IoU": validate(predictor, settings, args),
        "images shown": shown,
    }


def measure_floor(args: Namespace, compiling: str) -> float:
    """Return the bare decoder's seconds an image: forward and backward, on tensors in memory."""
    predictor, pairs, settings = prepare(args, precision="auto", compiling=compiling)
    learner = train_sam2_proper.make_learner(predictor, settings)
    learner = train_sam2_proper.speed_up(learner, predictor, 1, settings)
    batch = pairs[: settings.batch_size]
    images, masks = zip(*map(read_pair, batch), strict=True)
    with autocast(args.device, settings.precision):
        features = encode_images(predictor, list(images)).to(args.device, torch.float32)
    prompts = [prompt_from_mask(mask, "center") for mask in masks]
    sizes = [mask.shape for mask in masks]

    def step() -> None:
        learner.weights.zero_grad()
        with autocast(args.device, settings.precision):
            prediction = predict_masks(predictor, features, prompts, sizes, learner.decoder)
        sum(answer.mean() for answer in prediction).backward()

    return time_repeated(step, args.device, times=40) / len(batch)


def measure_comparison(args: Namespace) -> dict[str, float]:
    """Return seconds an image of evaluating one model, and of comparing two, without a cache."""
    predictor, pairs, settings = prepare(args, precision="auto")
    finetuned, _ = load_predictor(args.model, args.checkpoint, args.device)
    models = Models(predictor, finetuned, share_encoder=True, cache=None)
    examples = [(pair, read_mask(pair.mask)) for pair in pairs[:5]]
    of_comparison = Namespace(**vars(settings), mask="best")

    def evaluate_one() -> None:
        for pair, mask in examples:
            features = load_features(predictor, None, 0, pair, settings.precision)
            with autocast(args.device, settings.precision):
                segment(predictor, features, prompt_from_mask(mask, "center"), mask.shape)

    def compare_two() -> None:
        for pair, mask in examples:
            prompt = prompt_from_mask(mask, "center")
            segment_with_both(models, 0, pair, prompt, mask.shape, of_comparison)

    return {
        "one": time_repeated(evaluate_one, args.device, times=2) / len(examples),
        "two": time_repeated(compare_two, args.device, times=2) / len(examples),
    }


def prepare(
    args: Namespace, precision: str, compiling: str = "off", recipe: str = "guide"
) -> tuple[SAM2ImagePredictor, list[Pair], Namespace]:
    """Return the model, the training pairs, and training's own defaults with these settings."""
    torch.manual_seed(args.seed)
    settings = train_sam2_proper.parse_args(
        [
            *("--recipe", recipe, "--compile", compiling),
            *("--batch-size", str(args.batch_size), "--lr", str(args.lr)),
        ]
    )
    settings.device, settings.epochs = args.device, args.epochs
    settings.precision = select_precision(precision, args.device)
    predictor, _ = load_predictor(args.model, args.checkpoint, args.device)
    return predictor, split_pairs(args.data, "train", args.limit), settings


def validate(predictor: SAM2ImagePredictor, settings: Namespace, args: Namespace) -> float:
    """Return the mean val IoU, in the precision of the variant and without a cache."""
    pairs: list[Pair] = split_pairs(args.data, "val", args.val_limit)
    return train_sam2_proper.evaluate(predictor, pairs, None, settings)


def clock(device: torch.device) -> float:
    """Return seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_repeated(step: Callable[[], None], device: torch.device, times: int) -> float:
    """Return the mean seconds of a step, after one that warms up."""
    step()
    start = clock(device)
    for _ in range(times):
        step()
    return (clock(device) - start) / times


def peak_gigabytes(device: torch.device) -> float | None:
    """Return the most memory that this process has held: the GPU's, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, whose memory and caches are nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def add_totals(row: dict[str, Any], image_count: int, encode: float) -> None:
    """Add the seconds of an epoch over image_count images, and of several, to a measured row."""
    is_guide = row["variant"] == GUIDE
    row["epoch s"] = image_count * (row["step s/image"] + (encode if is_guide else 0))
    once = row["compile s"] + (0 if is_guide else image_count * encode)
    for epochs, column in zip(EPOCHS, COLUMNS[5:8], strict=True):
        row[column] = once + epochs * row["epoch s"]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [[_format(row[column]) for column in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw_totals(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw each variant's hours over the number of epochs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, max(EPOCHS) + 1)
    for row in rows:
        once = row[COLUMNS[5]] - row["epoch s"]
        axes.plot(epochs, (once + epochs * row["epoch s"]) / 3600, label=row["variant"])
    axes.set(xlabel="epochs", ylabel="hours", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    at_least_1 = number(int, at_least=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="from download_dataset.py")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--checkpoint", type=Path, help="its file (default: SAM 2.1's, downloaded)")
    parser.add_argument("--random-weights", action="store_true", help="for time and memory only")
    parser.add_argument("--limit", type=at_least_1, help="the first N training images only")
    parser.add_argument("--guide-images", type=at_least_1, help="show the guide's loop N of them")
    parser.add_argument(
        "--totals-for", type=at_least_1, help="images of the totals (default: those measured)"
    )
    parser.add_argument("--val-limit", type=at_least_1, default=10, help="val images to measure")
    parser.add_argument("--epochs", type=at_least_1, default=1, help="how many to measure")
    parser.add_argument("--batch-size", type=at_least_1, default=1, help="of this project's loop")
    parser.add_argument("--lr", type=number(float, above=0), default=1e-5, help="of all loops")
    parser.add_argument("--seed", type=seed, default=42, help="of weights, order and prompts")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), help="results")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = select_device(args.device)
    if args.random_weights:
        args.checkpoint = args.output / f"random_{args.model}.pt"
        torch.manual_seed(args.seed)
        save_checkpoint(args.checkpoint, build_predictor(args.model, torch.device("cpu")).model)
    args.checkpoint = args.checkpoint or ensure_checkpoint(args.model)
    image_count = len(split_pairs(args.data, "train", args.limit))
    if image_count < 5:
        raise UserError("a benchmark needs at least 5 training images; raise --limit")

    guide = in_own_process(measure_guide, args)
    compiled = in_own_process(measure_project, args, "on", True)
    plain = in_own_process(measure_project, args, "off", False)
    ours = in_own_process(measure_project, args, "on", False, "default")
    floors = {mode: in_own_process(measure_floor, args, mode) for mode in ("on", "off")}
    comparison = in_own_process(measure_comparison, args)
    shutil.rmtree(args.output / "cache")

    rows = [
        {"variant": name, **measured}
        for name, measured in (
            (GUIDE, guide),
            (COMPILED, compiled),
            (PLAIN, plain),
            (OURS, ours),
        )
    ]
    rows[2]["encode s/image"] = rows[3]["encode s/image"] = compiled["encode s/image"]
    for row in rows:
        add_totals(row, args.totals_for or image_count, row["encode s/image"])
    for row in rows:
        row[COLUMNS[8]] = rows[0][COLUMNS[7]] / row[COLUMNS[7]]

    precision = str(select_precision("auto", args.device)).removeprefix("torch.")
    total_of = args.totals_for or image_count
    title = f"SAM 2.1 {args.model}, {total_of} images, {args.device}, {precision}"
    cores = f"{torch.get_num_threads()} threads, {platform.system()}, PyTorch {torch.__version__}"
    print(f"{title}; the guide's loop in float32; {cores}\n")
    print(format_table(rows))
    for row, floor in ((rows[1], floors["on"]), (rows[2], floors["off"])):
        ratio = row["step s/image"] / floor
        print(f"{row['variant']}: {ratio:.2f} times the bare decoder's {floor:.3f} s an image")
    print(
        f"comparing two models: {comparison['two'] / comparison['one']:.3f} times evaluating one "
        f"({comparison['one']:.3f} s an image, encoded anew)"
    )
    table = [[row[column] for column in COLUMNS] for row in rows]
    write_csv(args.output / "benchmark.csv", COLUMNS, table)
    draw_totals(args.output / "benchmark.png", rows, title)
    print(f"wrote benchmark.csv and benchmark.png to {args.output}")


if __name__ == "__main__":
    run(main)
