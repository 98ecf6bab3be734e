"""The runs of recipes.py: train recipes, each run in its own process, and measure the models.

Each measured model is a row of runs.csv, and its weights are kept beside it. So no run is repeated,
and a model can be measured again in another use, or averaged with others.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from sam2_utils import UserError

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.recipe_measures import MEASURES, measure_all, measure_point
from finetuning.basics.files import atomic_write, without_apostrophe, write_csv
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.evaluation.measuring import Validation
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.image_variants import ImageVariant
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor
from finetuning.segmentation.views import MIRRORS, UPRIGHT
from finetuning.training.learner import Learner, make_learner
from finetuning.training.recipe import Recipe
from finetuning.training.weight_average import average_weights
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.cleaning_choice import choose_cleaning
from finetuning.training_data.encoding import open_features
from finetuning.training_data.epoch_sampling import EpochSampler
from finetuning.training_data.thin_objects import choose_loss_grid
from train_sam2_proper import train_one_epoch

VAL, HELD_OUT = "val", "training images held out"
TUNING = f"{HELD_OUT}, one point"  # enough to choose a learning rate
LAST, BEST = "last epoch", "best epoch on val"
# How a model is used: tta: views averaged; clean: masks cleaned
AS_IT_IS, TTA, CLEAN, BOTH = USES = "as it is", "tta", "clean", "tta and clean"
KEY_COLUMNS = (
    "recipe", "options", "model", "data", "limit", "training images", "epochs", "lr", "seed",
    "weights", "use", "measured on",
)  # fmt: skip
COSTS = ("training s", "encoded images", "measuring s")
RUN_COLUMNS = (*KEY_COLUMNS, *MEASURES, *COSTS)


class Bench(NamedTuple):
    """The settings that all runs share."""

    model: str
    checkpoint: Path
    device: torch.device
    precision: torch.dtype
    data: Path
    limit: int | None  # images used of each split
    output: Path
    cache: Path
    jobs: int  # parallel runs
    threads: int  # per run


class Run(NamedTuple):
    """A model to measure: a recipe with its learning rate and epochs, trained with a seed."""

    name: str
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)  # of several, the weights are averaged
    images: int | None = None  # the first training images; None: all
    measured_on: str = VAL  # or HELD_OUT or TUNING
    weights: str = LAST  # or BEST
    use: str = AS_IT_IS  # one of USES

    def key(self, bench: Bench) -> dict[str, str]:
        """Return the columns that identify the run: the first ones of its row."""
        recipe = self.recipe
        values = asdict(recipe).items()
        options = ", ".join(f"{name} {value}" for name, value in values if name not in KEY_COLUMNS)
        facts = (
            *(self.name, options, bench.model, bench.data, bench.limit or "all"),
            *(self.images or "all", recipe.epochs, recipe.lr, " ".join(map(str, self.seeds))),
            *(self.weights, self.use, self.measured_on),
        )
        return dict(zip(KEY_COLUMNS, map(str, facts), strict=True))


class Trained(NamedTuple):
    """What a training leaves: state_dicts of the weights that learn, and what it cost."""

    weights: dict[str, dict[str, torch.Tensor]]  # LAST, and BEST if every epoch was validated
    seconds: float  # of the steps, as clock counts them
    encoded: int  # images that the image encoder was asked for


def clock(device: torch.device) -> float:
    """Return the seconds that this process has computed; on a GPU, the time.

    A CPU's seconds hardly depend on what else the computer does.
    """
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def do_runs(runs: list[Run], bench: Bench, description: str) -> list[dict[str, str]]:
    """Do the runs that runs.csv does not have; return the rows of all."""
    path = bench.output / "runs.csv"
    rows = {key_of(row): row for row in read_rows(path)}
    keys = [key_of(planned.key(bench)) for planned in runs]
    missing = [planned for planned, key in zip(runs, keys, strict=True) if key not in rows]
    if not missing:
        return [rows[key] for key in keys]
    encode(missing, bench)
    # A process does all runs that share a training
    trainings: dict[str, list[Run]] = {}
    for planned in missing:
        training = planned._replace(weights=LAST, use=AS_IT_IS)
        trainings.setdefault(repr(training), []).append(planned)
    os.environ["TQDM_DISABLE"] = "1"  # for the new processes, whose bars would mix
    with multiprocessing.get_context("spawn").Pool(bench.jobs, maxtasksperchild=1) as pool:
        train_and_measure_here = functools.partial(train_and_measure, bench=bench)
        done = pool.imap_unordered(train_and_measure_here, trainings.values())
        for new in tqdm(done, desc=description, unit="training", total=len(trainings)):
            rows.update({key_of(row): row for row in new})
            write_csv(path, RUN_COLUMNS, [list(row.values()) for row in rows.values()])
    return [rows[key] for key in keys]


def encode(runs: list[Run], bench: Bench) -> None:
    """Encode the images of the runs and their variants, before processes would do it twice."""
    predictor, _ = load_predictor(bench.model, bench.checkpoint, bench.device)
    encoded = set()
    for planned in runs:
        train, measured = split_images(planned, bench)
        augment, pairs = planned.recipe.augmentation, {"train": train, "val": measured}
        key = planned.images, planned.measured_on, planned.use, augment
        if key in encoded:
            continue
        encoded.add(key)
        source, _ = open_features(predictor, bench.precision, bench.cache, "disk", pairs, augment)
        encode_views(in_use(Model(predictor, source), planned.use, train), measured)


def in_use(model: Model, use: str, train: list[Pair]) -> Model:
    """Return a model in one of the USES; cleaning is chosen on the train pairs."""
    if use in (TTA, BOTH):
        model = model._replace(views=MIRRORS)
    return model._replace(cleaning=choose_cleaning(train)) if use in (CLEAN, BOTH) else model


def encode_views(model: Model, pairs: list[Pair]) -> None:
    """Cache the features of the images in all views, as several measures ask for them."""
    turned = [
        ImageVariant(pair.image, view) for pair in pairs for view in model.views if view != UPRIGHT
    ]
    model.source.cache.fill(turned, model.predictor, "views")


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY_COLUMNS)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read runs.csv if it exists; raise UserError if it has other columns."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != RUN_COLUMNS:
            raise UserError(f"{path} has other columns; use another --output")
        return [{column: without_apostrophe(cell) for column, cell in row.items()} for row in table]


def train_and_measure(runs: list[Run], bench: Bench) -> list[dict[str, str]]:
    """Do runs that share a training and return their rows; each call has its own process."""
    torch.set_num_threads(bench.threads)
    validates = any(planned.weights == BEST for planned in runs)
    trained = [load_or_train(runs[0], seed, bench, validates) for seed in runs[0].seeds]
    predictor, _ = load_predictor(bench.model, bench.checkpoint, bench.device)
    cache = FeatureCache(bench.cache, predictor, bench.precision)
    model = Model(predictor, FeatureSource(predictor, bench.precision, cache))
    rows = []
    for planned in runs:
        start = clock(bench.device)
        states = [each.weights[planned.weights] for each in trained]
        make_learner(predictor, planned.recipe, bench.precision).weights.load_state_dict(
            average_weights(states)
        )
        train, measured = split_images(planned, bench)
        measure = measure_point if planned.measured_on == TUNING else measure_all
        ious = measure(in_use(model, planned.use, train), measured)
        seconds = sum(each.seconds for each in trained), clock(bench.device) - start
        rows.append({
            **planned.key(bench),
            **{name: f"{ious[name]:.6f}" if name in ious else "" for name in MEASURES},
            "training s": f"{seconds[0]:.1f}",
            "encoded images": str(trained[0].encoded),
            "measuring s": f"{seconds[1]:.1f}",
        })  # fmt: skip
    return rows


def split_images(planned: Run, bench: Bench) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and those to measure: val, or a quarter of the training pairs.

    The number of images to train on does not change what is measured.
    """
    pairs = split_pairs(bench.data, "train", bench.limit)
    if planned.measured_on == VAL:
        return pairs[: planned.images], split_pairs(bench.data, "val", bench.limit)
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    held_out, others = order[: len(order) // 4], sorted(order[len(order) // 4 :])
    return [pairs[index] for index in others[: planned.images]], [pairs[i] for i in held_out]


def load_or_train(planned: Run, seed: int, bench: Bench, validates: bool) -> Trained:
    """Return what a run's training with this seed left in the output folder; else train.

    validates: the weights of the best epoch are needed, too.
    """
    planned = planned._replace(seeds=(seed,), weights=LAST, use=AS_IT_IS)
    name = hashlib.sha256(repr(planned.key(bench)).encode()).hexdigest()[:16]
    path = bench.output / "weights" / f"{name}.pt"
    if path.is_file():
        trained = Trained(**torch.load(path, weights_only=True))
        if BEST in trained.weights or not validates:
            return trained
    pairs, measured = split_images(planned, bench)
    recipe, validation = replace(planned.recipe, seed=seed), Validation(measured)
    trained = train_recipe(recipe, pairs, bench, validation if validates else None)
    with atomic_write(path) as temporary:
        torch.save(trained._asdict(), temporary)
    return trained


def train_recipe(
    recipe: Recipe, pairs: list[Pair], bench: Bench, validation: Validation | None
) -> Trained:
    """Train a recipe; with a validation, keep the weights of the best epoch as well."""
    torch.manual_seed(recipe.seed)
    predictor, _ = load_predictor(bench.model, bench.checkpoint, bench.device)
    source, augmentation = open_features(
        predictor, bench.precision, bench.cache, "disk", {"train": pairs}, recipe.augmentation
    )
    image_size = predictor.model.image_size
    training_set = TrainingSet(
        pairs,
        source.cache,
        image_size,
        recipe.seed,
        recipe.prompt_mix,
        augmentation,
        choose_loss_grid(pairs, image_size) if recipe.loss_grid == "auto" else recipe.loss_grid,
    )
    objects = training_set.prepare()
    sampler = EpochSampler(objects, recipe.batch_size, recipe.seed, recipe.objects_per_image)
    loader = make_loader(training_set, sampler, bench.device)
    learner = make_learner(predictor, recipe, bench.precision)
    model = Model(predictor, source)

    seconds, best_iou, best = 0.0, -1.0, {}
    for epoch in range(1, recipe.epochs + 1):
        start = clock(bench.device)
        train_one_epoch(predictor, loader, learner, recipe, epoch)
        seconds += clock(bench.device) - start
        if validation and (iou := validation.measure(model)["val_iou"]) > best_iou:
            best_iou, best = iou, {BEST: on_cpu(learner)}
    encoded = len(pairs) + sum(map(len, augmentation.further))
    return Trained({LAST: on_cpu(learner), **best}, seconds, encoded)


def on_cpu(learner: Learner) -> dict[str, torch.Tensor]:
    """Return a copy of the weights that learn."""
    state = learner.weights.state_dict()
    return {name: weight.to("cpu", copy=True) for name, weight in state.items()}
