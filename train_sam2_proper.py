"""Fine-tune SAM 2.1 on your images: the mask decoder and the prompt encoder learn.

    python train_sam2_proper.py                            # SAM 2.1 small on data/, 20 epochs
    python train_sam2_proper.py --model tiny --epochs 5    # a smaller model, a shorter run
    python train_sam2_proper.py --limit 20 --epochs 1      # a quick look
    python train_sam2_proper.py --resume                   # go on after an interruption
    python train_sam2_proper.py --lr auto                  # find the learning rate first
    python train_sam2_proper.py --demo                     # see it work in a minute
    python train_sam2_proper.py --recipe guide             # the guide's settings, not ours
    python train_sam2_proper.py --train-encoder lora       # the image encoder learns too
    python train_sam2_proper.py --runs 3                   # how much does the seed matter?
    python train_sam2_proper.py --folds 5                  # few images: each is measured once
    torchrun --nproc_per_node=2 train_sam2_proper.py --batch-size 8    # on two GPUs

The image encoder stays frozen, so it sees each image once; what it says is kept in output/cache/
(not with --train-encoder, where that changes). Each step shows SAM 2 a point, a box, or clicks that
correct its own mask, and corrects the masks and the scores that it answers with. What is written to
output/: sam2_best.pt (best on val: the original where no epoch is better), sam2_final.pt,
train_log.csv, learning_curve.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from sam2_utils import UserError, autocast, select_device, select_precision

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetuning.basics import distributed, run_outputs
from finetuning.basics.command_line import ArgumentParser, run, tell
from finetuning.basics.files import only_run_in
from finetuning.dataset.pairs import keep_out, split_pairs
from finetuning.evaluation import object_matching
from finetuning.evaluation.measuring import MOST_OBJECTS, Validation
from finetuning.evaluation.seen_images import seen_before
from finetuning.model import trainable_encoder
from finetuning.model.cache_places import open_cache
from finetuning.model.loading import trusted_device
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import load_predictor, own_image_size
from finetuning.model.segmentation import encode_images, predict_masks
from finetuning.training import options, run_files
from finetuning.training.batches import EpochSampler, TrainingSet, make_loader
from finetuning.training.earlier_runs import require_elsewhere, set_aside
from finetuning.training.learner import (
    Learner,
    Machine,
    make_learner,
    set_learning_rate,
    speed_up,
    take_step,
)
from finetuning.training.learning_rate_trial import learning_rate_factor, try_learning_rates
from finetuning.training.log import EpochReport, Log, conclude, write_log
from finetuning.training.losses import batch_loss
from finetuning.training.options import (
    RECIPE_OPTIONS,
    add_machine_options,
    add_recipe_options,
    add_repeat_options,
    choose_defaults,
)
from finetuning.training.prompt_sampling import add_clicks
from finetuning.training.recipe import DEMO, Recipe
from finetuning.training.repeats import (
    Training,
    check_outputs,
    conclude_repeats,
    describe_training,
    forget_conclusion,
    plan_trainings,
    which_resume,
)
from finetuning.training.run_files import Start, load_state


def train_one_epoch(
    predictor: SAM2ImagePredictor,
    loader: DataLoader,
    learner: Learner,
    recipe: Recipe,
    epoch: int,
) -> dict[str, float]:
    """Go once through the training images in random order; return the means of what is reported.

    The order and the prompts follow from the seed and the epoch alone. Raises NotFiniteError when
    the loss is not finite.
    """
    loader.sampler.epoch = epoch
    learns = recipe.train_encoder != "none"
    encode = trainable_encoder.encode_with_gradients if learns else encode_images
    input_size, steps = (predictor.model.image_size,) * 2, recipe.epochs * len(loader)
    report = EpochReport(epoch, predictor.device)
    progress = tqdm(loader, desc=f"Epoch {epoch}/{recipe.epochs}", unit="step", leave=False)
    for step, batch in enumerate(progress, start=(epoch - 1) * len(loader)):
        set_learning_rate(learner, learning_rate_factor(step, steps, recipe.schedule))
        with autocast(predictor.device, learner.precision):
            # Features of the image encoder: from the cache, or computed now
            of_images = batch.features or encode(predictor, batch.images)
            of_images = of_images.to(predictor.device, torch.float32)
        learner.optimizer.zero_grad()
        shown = []
        for part in batch.parts(learner.at_once):
            with autocast(predictor.device, learner.precision):
                # What the model is shown: a prompt, perhaps with clicks that correct its answers
                features = of_images.of(part.image_of)
                prompts, mask_inputs = add_clicks(
                    predictor, features, part.prompts, part.true_masks, part.plan, learner.decoder
                )

                # Prompt encoder and mask decoder, with gradients
                sizes = [input_size] * len(prompts)
                prediction = predict_masks(
                    predictor, features, prompts, sizes, learner.decoder, mask_inputs
                )

            # The loss, mean over the objects; the mean over processes is that over those of all
            loss, of_objects = batch_loss(
                predictor, prediction, part.true_masks, recipe, part.plan.background
            )
            share = part.fraction * distributed.world_size()
            learner.scaler.scale(loss * share).backward()
            shown.append(of_objects)

        # Step
        clipped = take_step(learner, recipe.max_grad_norm)
        report.add(shown, clipped, counts=batch.fraction > 0)
        if recent := report.recent("loss", "train_iou"):
            progress.set_postfix(recent)
    return distributed.mean_over_all(report.read(), predictor.device)


def fit(
    learner: Learner,
    model: Model,
    loader: DataLoader,
    validation: Validation,
    recipe: Recipe,
    log: Log,
    settings: dict[str, Any],
    output: Path,
) -> None:
    """Train for the epochs that are not in the log yet, and write the results."""
    is_first = distributed.rank() == 0
    try:
        for epoch in range(log[-1]["epoch"] + 1, recipe.epochs + 1):
            begun = time.perf_counter()
            report = train_one_epoch(model.predictor, loader, learner, recipe, epoch)
            if is_first:
                found = validation.measure(model)
                rate = learner.optimizer.param_groups[0]["lr"]
                row = {"epoch": epoch, **report, **found, "lr": rate}
                log.append({**row, "seconds": time.perf_counter() - begun})
                run_files.save_epoch(output, model.predictor, learner, log, settings)
    except KeyboardInterrupt:
        print("\nstopped; to go on after the last finished epoch, add --resume")
        raise
    if is_first:
        write_log(output, log)  # a killed run may not have come to it
        run_files.save_model(output / run_outputs.FINAL_FILE, model.predictor, log[-1], settings)
        print(conclude(log))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    files = options.add_file_options(parser)
    add_repeat_options(files)
    options.add_threshold_option(files)
    add_recipe_options(parser)
    options.add_encoder_options(parser)
    add_machine_options(parser)
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options in their final values: as typed, else of --demo, else of --recipe."""
    parser = make_parser()
    args = parser.parse_typed(argv, {*DEMO, *RECIPE_OPTIONS}, choose_defaults)
    encoder_options = {name: getattr(args, name) for name in options.ENCODER_OPTIONS}
    problem = options.contradiction(
        args.train_encoder, encoder_options, args.lr, args.cache, args.compile
    )
    if problem:
        parser.error(problem)
    if args.lr == "auto" and distributed.world_size() > 1:
        raise UserError("--lr auto runs in one process; find the rate without torchrun first")
    if args.train_encoder != "none":
        args.compile = "off"
    args.gradient_checkpointing = {"on": True, "off": False}.get(args.gradient_checkpointing)
    has_cache = not args.no_cache and args.train_encoder == "none"
    args.cache = (args.cache or args.output / "cache") if has_cache else None
    of_encoder = options.encoder_settings(
        args.train_encoder, args.lr, args.encoder_lr, args.lora_rank
    )
    args.recipe = Recipe(**{name: getattr(args, name) for name in RECIPE_OPTIONS}, **of_encoder)
    return args


def train(
    predictor: SAM2ImagePredictor,
    training: Training,
    machine: Machine,
    settings: dict[str, Any],
    resume: bool,
    aside: Path | None = None,
) -> Log:
    """Fine-tune a model on the train pairs, for the epochs that are not done yet; return the log.

    settings: of the run, as run_files.run_settings returns them. aside: the folder whose earlier
    run is moved aside, before the first file of this one is written.
    """
    _, recipe, pairs, output = training
    torch.manual_seed(recipe.seed)
    state = load_state(output, settings) if resume else None

    # What the frozen encoder says of the images, once
    cache = None
    if settings["cache"]:
        folder = Path(settings["cache"])
        cache = open_cache(
            predictor,
            folder,
            machine.precision,
            {split: [pair.image for pair in found] for split, found in pairs.items()},
            machine.cache_in,
        )
    model = Model(predictor, FeatureSource(predictor, machine.precision, cache))
    size = predictor.model.image_size
    training_set = TrainingSet(pairs["train"], cache, size, recipe.seed, recipe.prompt_mix)
    objects = training_set.prepare()
    validation = Validation(pairs["val"], recipe.none_share > 0, most=MOST_OBJECTS)

    # Epoch 0, the model as it is; and the learning rate
    log = state["log"] if state else [{"epoch": 0}]
    if not state and distributed.rank() == 0:
        log[0].update(validation.measure(model))
        print(f"before training: val IoU {log[0]['val_iou']:.4f}")
    if recipe.lr == "auto":
        lr = state["settings"]["lr"] if state else None
        lr = lr or try_learning_rates(model, training_set, objects, recipe, train_one_epoch)
        recipe, settings = dataclasses.replace(recipe, lr=lr), {**settings, "lr": lr}

    # Training
    if aside and distributed.rank() == 0:
        set_aside(aside, settings)
    learner = make_learner(predictor, recipe, machine.precision, machine.checkpointing)
    run_files.start(output, predictor, learner, recipe, state, log, settings)
    if log[-1]["epoch"] < recipe.epochs:
        learner = speed_up(learner, predictor, recipe, objects, machine.compiling)
    sampler = EpochSampler(objects, recipe.batch_size, recipe.seed, recipe.objects_per_image)
    loader = make_loader(training_set, sampler, predictor.device)
    fit(learner, model, loader, validation, recipe, log, settings, output)
    return log


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_out(args.data, args.output, args.cache)
    device = distributed.local_device(select_device(args.device, args.threads))
    precision = select_precision(args.precision, device)
    machine = Machine(precision, args.gradient_checkpointing, args.compile, args.cache_in)
    with distributed.process_group(device), contextlib.ExitStack() as locks:
        checkpoint = run_files.prepare(args.data, args.model, args.checkpoint, args.demo)
        size = args.image_size or own_image_size(args.model)
        pairs = {split: split_pairs(args.data, split, args.limit) for split in ("train", "val")}
        trainings = plan_trainings(args.recipe, pairs, args.output, args.runs, args.folds)
        resumed = which_resume(trainings, args.resume)
        check_outputs(trainings, checkpoint)
        require_elsewhere(checkpoint, args.output)
        predictor, facts = load_predictor(args.model, checkpoint, device, size)
        start = Start(
            *(args.model, checkpoint, args.data, args.limit, args.cache, precision, size),
            seen_before(facts, checkpoint),
        )
        device = trusted_device(predictor, device, insists=args.device == "mps")
        if distributed.rank() == 0:
            folders = [args.output, *(each.output for each in trainings if args.resume)]
            for folder in dict.fromkeys(folders):
                locks.enter_context(only_run_in(folder))
            if args.resume:
                forget_conclusion(args.output, args.folds)
        logs = []
        for training, resume in zip(trainings, resumed, strict=True):
            if logs:  # as it was, for another training
                predictor, _ = load_predictor(args.model, checkpoint, device, size)
            settings = run_files.run_settings(training.recipe, start, training.pairs)
            tell(describe_training(training, args.data))
            at = f" at {size}x{size} pixels" * (size != own_image_size(args.model))
            print(f"SAM 2.1 {args.model}{at} on {device} in {settings['precision']}")
            aside = None if args.resume or logs else args.output
            logs.append(train(predictor, training, machine, settings, resume, aside))
            if args.choose_thresholds and distributed.rank() == 0:
                best, images = training.output / run_outputs.BEST_FILE, training.pairs["train"]
                object_matching.keep_rule(best, device, precision, images, training.recipe.seed)
            tell(f"wrote {', '.join(run_outputs.RESULT_FILES)} to {training.output}")
        if distributed.rank() == 0 and len(logs) > 1:
            print(conclude_repeats(args.output, trainings, logs, args.folds))
        if args.cache:
            tell(f"the features in {args.cache} may be deleted; another run would need them again")
        tell(f"next: {run_files.next_command(args.output, args.data, args.folds)}")


if __name__ == "__main__":
    run(main)
