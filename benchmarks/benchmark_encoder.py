"""Measure two training steps of one image each: CPU seconds of a step, peak memory of the process.

    python benchmarks/benchmark_encoder.py --train-encoder lora
    python benchmarks/benchmark_encoder.py --train-encoder full --gradient-checkpointing off
    python benchmarks/benchmark_encoder.py --no-cache            # the encoder stays frozen

Takes the options of train_sam2_proper.py, the images of --data, and random weights. Linux, CPU.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sam2_proper
from command_line import run
from image_files import split_pairs
from sam2_utils import build_predictor, select_precision
from training_set import EpochSampler, TrainingSet, make_loader

import torch

STEPS = 2  # the second has the optimizer's state in memory beside the rest


def main(argv: list[str] | None = None) -> None:
    args = train_sam2_proper.parse_args(argv)
    args.device = torch.device("cpu")
    args.precision = select_precision(args.precision, args.device)
    torch.manual_seed(args.seed)
    predictor = build_predictor(args.model, args.device)
    learner = train_sam2_proper.make_learner(predictor, args)
    pairs = split_pairs(args.data, "train", STEPS)
    training_set = TrainingSet(pairs, None, predictor.model.image_size, args.seed)
    loader = make_loader(training_set, EpochSampler(list(range(STEPS)), 1, args.seed), args.device)
    start = time.process_time()
    train_sam2_proper.train_one_epoch(predictor, loader, learner, 1, args)
    seconds = (time.process_time() - start) / STEPS
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{seconds:.1f} CPU seconds a step, peak {gigabytes:.2f} GB")


if __name__ == "__main__":
    run(main)
