"""Fine-tune SAM 2.1 on your images: the mask decoder and the prompt encoder learn.

    python train_sam2_proper.py                            # SAM 2.1 small on data/
    python train_sam2_proper.py --model tiny --epochs 5    # a smaller model, a shorter run
    python train_sam2_proper.py --limit 20 --epochs 1      # a quick look
    python train_sam2_proper.py --resume                   # go on after an interruption
    python train_sam2_proper.py --lr auto                  # find the learning rate first
    python train_sam2_proper.py --demo                     # see it work in a minute
    python train_sam2_proper.py --recipe guide             # the guide's settings, not ours
    python train_sam2_proper.py --turns                    # images have no upright, like cells
    python train_sam2_proper.py --train-encoder lora       # the image encoder learns too
    python train_sam2_proper.py --runs 3                   # how much does the seed matter?
    python train_sam2_proper.py --folds 5                  # few images: each is measured once
    torchrun --nproc_per_node=2 train_sam2_proper.py --batch-size 8    # on two GPUs

The image encoder stays frozen, so each image is encoded once and cached in output/cache/ (except
with --train-encoder). Each step prompts SAM 2 with a point, a box, or clicks that correct its own
mask, and trains the masks and scores that it answers with. The results are in output/: sam2_best.pt
(the best on val; the original if no epoch is better), sam2_final.pt, train_log.csv,
learning_curve.png, and augmentation.png: training images as the model is shown them.
"""

import time
from pathlib import Path

import sam2_utils

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from finetuning.basics import command_line, distributed
from finetuning.basics.run_outputs import AUGMENTATION_FILE, BEST_FILE, MEAN_FILE
from finetuning.evaluation import measuring
from finetuning.model.loading import trusted_device
from finetuning.model.model import Model
from finetuning.model.models import load_predictor
from finetuning.model.trainable_encoder import encode_with_gradients
from finetuning.segmentation.clean_masks import CLEANING, Cleaning
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.training import (
    earlier_runs,
    options,
    repeats,
    run_files,
    training_log,
)
from finetuning.training.auto_values import resolve_auto
from finetuning.training.learner import (
    Learner,
    make_learner,
    set_learning_rate,
    speed_up,
    take_step,
)
from finetuning.training.learning_rate_trial import try_learning_rates
from finetuning.training.losses import batch_loss
from finetuning.training.recipe import Recipe
from finetuning.training.weight_average import average_runs
from finetuning.training_data import batches
from finetuning.training_data.augmentation_picture import draw_augmentation
from finetuning.training_data.encoding import open_features
from finetuning.training_data.epoch_sampling import EpochSampler
from finetuning.training_data.prompt_sampling import add_clicks


def train_one_epoch(
    predictor: SAM2ImagePredictor,
    loader: batches.BatchLoader,
    learner: Learner,
    recipe: Recipe,
    epoch: int,
) -> dict[str, float]:
    """Train once on each image, in random order; return the means of the reported values.

    The order and the prompts depend only on the seed and the epoch. Raises NotFiniteError if the
    loss is not finite.
    """
    loader.sampler.epoch = epoch
    learns = recipe.train_encoder != "none"
    encode = encode_with_gradients if learns else encode_images
    steps = recipe.epochs * len(loader)
    report = training_log.EpochReport(epoch, predictor.device)
    progress = tqdm(loader, desc=f"Epoch {epoch}/{recipe.epochs}", unit="step", leave=False)
    for step, batch in enumerate(progress, start=(epoch - 1) * len(loader)):
        set_learning_rate(learner, step, steps, recipe.schedule)
        with sam2_utils.autocast(predictor.device, learner.precision):
            # Features of the image encoder: from the cache, or computed now
            image_features = batch.features or encode(predictor, batch.images)
            image_features = image_features.to(predictor.device, torch.float32)
        learner.optimizer.zero_grad()
        reported = []
        for part in batch.parts(learner.at_once):
            with sam2_utils.autocast(predictor.device, learner.precision):
                # The prompts: a point or a box, perhaps with clicks that correct the answers
                features = image_features.of(part.image_of)
                sizes = part.prompt_sizes(predictor.model.image_size)
                shown = (part.prompts, part.true_masks, part.plan)
                prompts, mask_inputs = add_clicks(
                    predictor, features, *shown, learner.decoder, sizes
                )

                # Prompt encoder and mask decoder, with gradients
                prediction = predict_masks(
                    predictor, features, prompts, sizes, learner.decoder, mask_inputs
                )

            # The loss, mean over the objects of the step. Processes average their gradients, so
            # each weighs its mean by its fraction of the objects, times the number of processes
            loss, object_values = batch_loss(
                predictor, prediction, part.true_masks, recipe, part.plan.background
            )
            share = part.fraction * distributed.world_size()
            learner.scaler.scale(loss * share).backward()
            reported.append(object_values)

        # Clip the gradients and take a step
        clipped = take_step(learner, recipe.max_grad_norm)
        report.add(reported, clipped, counts=batch.fraction > 0)
        if recent := report.recent("loss", "train_iou"):
            progress.set_postfix(recent)
    return distributed.mean_over_all(report.read(), predictor.device)


def fit(
    learner: Learner,
    model: Model,
    loader: batches.BatchLoader,
    validation: measuring.Validation,
    recipe: Recipe,
    log: training_log.Log,
    settings: dict[str, object],
    output: Path,
) -> None:
    """Train the epochs that are not in the log yet; save the model and the log after each."""
    is_first = distributed.rank() == 0
    try:
        for epoch in range(log[-1]["epoch"] + 1, recipe.epochs + 1):
            start = time.perf_counter()
            report = train_one_epoch(model.predictor, loader, learner, recipe, epoch)
            # The other processes wait for the first one in their next step
            if is_first:
                metrics = validation.measure(model)
                lr = learner.optimizer.param_groups[0]["lr"]
                row = {"epoch": epoch, **report, **metrics, "lr": lr}
                log.append({**row, "seconds": time.perf_counter() - start})
                run_files.save_epoch(output, model.predictor, learner, log, settings)
    except KeyboardInterrupt:
        print("\nstopped; to continue after the last finished epoch, add --resume")
        raise
    if is_first:
        run_files.finish(output, model.predictor, log, settings)


def open_data(
    predictor: SAM2ImagePredictor,
    training: repeats.Training,
    machine: options.Machine,
    cleaning: Cleaning,
) -> tuple[Model, batches.TrainingSet, measuring.Validation]:
    """Encode the images, once each as the encoder is frozen; return the model and its data."""
    _, recipe, pairs, _ = training
    source, augmentation = open_features(
        predictor, machine.precision, machine.cache, machine.cache_in, pairs, recipe.augmentation
    )
    training_set = batches.TrainingSet(
        pairs["train"],
        source.cache,
        predictor.model.image_size,
        recipe.seed,
        recipe.prompt_mix,
        augmentation,
        recipe.loss_grid,
    )
    without_prompt = recipe.none_share > 0
    validation = measuring.Validation(pairs["val"], without_prompt, most=measuring.MOST_OBJECTS)
    return Model(predictor, source, cleaning=cleaning), training_set, validation


def train(
    predictor: SAM2ImagePredictor,
    training: repeats.Training,
    machine: options.Machine,
    settings: dict[str, object],
    resume: bool,
    aside: Path | None = None,
) -> training_log.Log:
    """Fine-tune a model on its train pairs, or resume; return the log.

    settings: as run_files.run_settings returns them; they are saved with the models. aside: the
    output folder whose earlier run is moved aside before this one writes its first file.
    """
    recipe, output = training.recipe, training.output
    torch.manual_seed(recipe.seed)
    state = run_files.load_state(output, settings) if resume else None

    # What auto means: found by the interrupted run, or now, from the training masks
    image_size = predictor.model.image_size
    recipe, cleaning = resolve_auto(recipe, state, training.pairs["train"], image_size)
    model, training_set, validation = open_data(
        predictor, training._replace(recipe=recipe), machine, cleaning
    )
    number = training_set.augmentation.augment.number
    found = {"epochs": recipe.epochs, "augment": number, "loss_grid": recipe.loss_grid}
    settings = {**settings, **found, CLEANING: cleaning._asdict()}
    objects = training_set.prepare()  # their number, by the index of their image

    # Epoch 0 is the original model
    log = state["log"] if state else [{"epoch": 0}]
    if not state and distributed.rank() == 0:
        log[0].update(validation.measure(model))
        print(f"before training: val IoU {log[0]['val_iou']:.4f}")

    # The learning rate: given, found by an interrupted run, or found now
    if recipe.lr == "auto":
        lr = state["settings"]["lr"] if state else None
        lr = lr or try_learning_rates(model, training_set, objects, recipe, train_one_epoch)
        recipe, settings = recipe.with_lr(lr), {**settings, "lr": lr}

    # The learner. From here on, the run writes to its output folder
    if aside and distributed.rank() == 0:
        earlier_runs.set_aside(aside, Path(settings["data"]), machine.cache)
    learner = make_learner(predictor, recipe, machine.precision, machine.checkpointing)
    run_files.start_or_resume(output, predictor, learner, recipe, state, log, settings)
    if log[-1]["epoch"] < recipe.epochs:
        learner = speed_up(learner, predictor, recipe, objects, machine.compiling)

    # The epochs
    sampler = EpochSampler(objects, recipe.batch_size, recipe.seed, recipe.objects_per_image)
    if not state and training_set.augmentation.is_on and distributed.rank() == 0:
        draw_augmentation(output / AUGMENTATION_FILE, training_set, sampler, recipe.epochs)
    loader = batches.make_loader(training_set, sampler, predictor.device)
    fit(learner, model, loader, validation, recipe, log, settings, output)
    return log


def main(argv: list[str] | None = None) -> None:
    args = options.parse_args(argv, __doc__)
    device = distributed.local_device(sam2_utils.select_device(args.device, args.threads))
    precision = sam2_utils.select_precision(args.precision, device)
    machine = options.Machine(
        precision, args.cache, args.cache_in, args.gradient_checkpointing, args.compile
    )
    with distributed.process_group(device):
        # The data, the model to start from, and what to train
        checkpoint, pairs = run_files.prepare(
            args.data, args.model, args.checkpoint, args.limit, args.demo
        )
        trainings = repeats.plan_trainings(args.recipe, pairs, args.output, args.runs, args.folds)
        resumed = repeats.which_resume(trainings, args.resume)
        repeats.check_outputs(args.output, trainings, checkpoint)
        predictor, facts = load_predictor(args.model, checkpoint, device, args.image_size)
        start = run_files.make_start(
            facts,
            model=args.model,
            checkpoint=checkpoint,
            image_size=args.image_size,
            data=args.data,
            limit=args.limit,
            cache=args.cache,
            precision=precision,
        )
        device = trusted_device(predictor, device, insists=args.device == "mps")

        with repeats.only_run_of(args.output, trainings, args.resume):
            if args.resume and distributed.rank() == 0:
                repeats.forget_conclusion(args.output, len(trainings), args.folds)
            logs = []
            for training, resume in zip(trainings, resumed, strict=True):
                if logs:  # the last training has changed the weights
                    predictor, _ = load_predictor(args.model, checkpoint, device, args.image_size)
                settings = run_files.run_settings(training.recipe, start, training.pairs)
                command_line.tell(repeats.describe_training(training, args.data))
                print(repeats.describe_model(args.model, args.image_size, device, precision))
                # The first new training moves an earlier run aside
                aside = None if args.resume or logs else args.output
                logs.append(train(predictor, training, machine, settings, resume, aside))
                if args.choose_thresholds:
                    repeats.choose_thresholds(training, BEST_FILE, device, precision)
                command_line.tell(repeats.describe_results(training.output))
            if distributed.rank() == 0 and len(logs) > 1:
                print(repeats.conclude_repeats(args.output, trainings, logs, args.folds))
            if len(logs) > 1 and not args.folds:
                predictor, _ = load_predictor(args.model, checkpoint, device, args.image_size)
                runs = [training.output for training in trainings]
                average_runs(predictor, precision, args.cache, pairs["val"], args.output, runs)
                if args.choose_thresholds:
                    repeats.choose_thresholds(trainings[0], MEAN_FILE, device, precision)
            if args.cache:
                command_line.tell(
                    f"the features in {args.cache} may be deleted; another run will recompute them"
                )
            command_line.tell(f"next: {repeats.next_command(args.output, args.data, args.folds)}")


if __name__ == "__main__":
    command_line.run(main)
