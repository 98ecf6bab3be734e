"""Measure the CPU seconds and peak memory of training steps, with one image per step.

    python benchmarks/benchmark_encoder.py --train-encoder lora
    python benchmarks/benchmark_encoder.py --train-encoder full --gradient-checkpointing off
    python benchmarks/benchmark_encoder.py --no-cache            # the encoder stays frozen

Takes the options of train_sam2_proper.py. Uses the images of --data and random weights, on the CPU
of a Linux machine.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam2_utils import select_precision

import torch

import train_sam2_proper
from finetuning.basics.command_line import run
from finetuning.dataset.pairs import split_pairs
from finetuning.model.models import build_predictor
from finetuning.training import options
from finetuning.training.learner import make_learner
from finetuning.training_data.batches import TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler
from finetuning.training_data.training_masks import LOSS_GRID

STEPS = 2  # from the second on, the optimizer's state is in memory


def main(argv: list[str] | None = None) -> None:
    args = options.parse_args(argv, __doc__)
    recipe, device = args.recipe, torch.device("cpu")
    torch.manual_seed(recipe.seed)
    predictor = build_predictor(args.model, device)
    precision = select_precision(args.precision, device)
    learner = make_learner(predictor, recipe, precision, args.gradient_checkpointing)
    pairs = split_pairs(args.data, "train", STEPS)
    training_set = TrainingSet(
        pairs,
        None,
        predictor.model.image_size,
        recipe.seed,
        recipe.prompt_mix,
        loss_grid=LOSS_GRID if recipe.loss_grid == "auto" else recipe.loss_grid,
    )
    sampler = EpochSampler(dict.fromkeys(range(STEPS), 1), 1, recipe.seed)
    loader = make_loader(training_set, sampler, device)
    start = time.process_time()
    train_sam2_proper.train_one_epoch(predictor, loader, learner, recipe, epoch=1)
    seconds = (time.process_time() - start) / STEPS
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{seconds:.1f} CPU seconds per step, peak {gigabytes:.2f} GB")


if __name__ == "__main__":
    run(main)
