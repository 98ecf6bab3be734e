"""The learner: weights, optimizer, learning rate, and the compiled or distributed decoder."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

from sam2_utils import autocast

import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.model.trainable_encoder import let_encoder_learn
from finetuning.segmentation.predicting import Features, PromptedDecoder, feature_shapes
from finetuning.training.recipe import Recipe
from finetuning.training_data.training_masks import IMAGE, LOSS_GRIDS

WARMUP_SHARE = 0.05  # share of the steps over which the cosine schedule warms up
# Compiling the decoder takes about a minute. It pays off from this many objects on.
COMPILE_FROM_OBJECTS = 3000


class LearningWeights(PromptedDecoder):
    """All weights that learn: prompt encoder, mask decoder, and part of the image encoder."""

    def __init__(self, model: SAM2Base, encoder_weights: list[torch.nn.Parameter]) -> None:
        super().__init__(model)
        self.encoder = torch.nn.ParameterList(encoder_weights)


class Learner(NamedTuple):
    """What learns, and how; weights, optimizer and scaler are saved so that a run can resume."""

    weights: LearningWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales float16 gradients; does nothing in other precisions
    precision: torch.dtype  # for autocast
    decoder: torch.nn.Module  # the weights as they compute: plain, compiled or distributed
    at_once: int = sys.maxsize  # objects per forward and backward pass


def make_learner(
    predictor: SAM2ImagePredictor,
    recipe: Recipe,
    precision: torch.dtype,
    checkpointing: bool | None = None,
) -> Learner:
    """Freeze the model except its prompt encoder and mask decoder, and set up AdamW for these.

    With recipe.train_encoder, the image encoder learns too; see let_encoder_learn.
    """
    model, device = predictor.model, predictor.device
    model.eval().requires_grad_(False)
    encoder_weights = let_encoder_learn(
        model, recipe.train_encoder, recipe.lora_rank, checkpointing
    )
    weights = LearningWeights(model, encoder_weights).requires_grad_(True)
    decoder_weights = [*weights.prompt_encoder.parameters(), *weights.mask_decoder.parameters()]
    # The schedule scales each group's own highest rate, which the group keeps as initial_lr
    groups = [{"params": decoder_weights, "initial_lr": recipe.lr}]
    if encoder_weights:
        groups.append({"params": list(weights.encoder), "initial_lr": recipe.encoder_lr})
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        fused=device.type in ("cpu", "cuda"),  # one kernel for all weights
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    at_once = objects_at_once(predictor, recipe)
    return Learner(weights, optimizer, scaler, precision, decoder=weights, at_once=at_once)


def set_learning_rate(learner: Learner, step: int, steps: int, schedule: str) -> None:
    """Set the learning rate of step 0, 1, ... of a training of so many steps."""
    factor = learning_rate_factor(step, steps, schedule)
    for group in learner.optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def learning_rate_factor(step: int, steps: int, schedule: str) -> float:
    """Return a step's learning rate as a share of the highest one.

    cosine: a linear warm-up, then along a cosine to zero (Loshchilov and Hutter, SGDR, 2017).
    """
    if schedule == "constant":
        return 1.0
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)  # + 1: the first step already learns
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def objects_at_once(predictor: SAM2ImagePredictor, recipe: Recipe) -> int:
    """Return how many objects of a step the decoder computes together.

    A GPU computes all of them. A CPU computes as many as fit into its caches: with a full-size
    model one, which takes 9/10 of the time and 2/3 of the memory of four at once.
    """
    if (
        predictor.device.type != "cpu"
        or recipe.train_encoder != "none"  # the encoder needs the gradients of all objects at once
        or distributed.world_size() > 1  # processes must run equally many backward passes
    ):
        return sys.maxsize
    # On a fine grid, or on the pixels of images, the loss takes most of the memory
    sides = {grid: grid for grid in LOSS_GRIDS[1:]} | {IMAGE: 1024}
    side = max(predictor.model.image_size, sides.get(recipe.loss_grid, 0))
    return max(1, (1024 // side) ** 2)


def take_step(learner: Learner, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradients to max_grad_norm, over all weights (0: no clipping), and take a step.

    Returns a tensor on the device, to avoid waiting for it: 1.0 if they were clipped, else 0.0.
    """
    clipped = torch.zeros((), device=next(learner.weights.parameters()).device)
    if max_grad_norm:
        # The norm is that of the true gradients, so float16's scale is divided out first
        learner.scaler.unscale_(learner.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learner.weights.parameters(), max_grad_norm)
        clipped = (norm > max_grad_norm).float()
    learner.scaler.step(learner.optimizer)  # skips the step if float16 gradients overflowed
    learner.scaler.update()
    return clipped


def speed_up(
    learner: Learner,
    predictor: SAM2ImagePredictor,
    recipe: Recipe,
    objects: dict[int, int],
    compiling: str,
) -> Learner:
    """Distribute the decoder under torchrun; in one process, compile it if that is on or pays off.

    objects: the number of objects of each training image, by its index. compiling: on, off, auto.
    """
    if distributed.world_size() > 1:
        if compiling == "on" and distributed.rank() == 0:
            print("--compile on works in one process only; continuing without it")
        distribute = torch.nn.parallel.DistributedDataParallel
        # Not every step uses every weight: a step without clicks has no mask prompt
        return learner._replace(decoder=distribute(learner.decoder, find_unused_parameters=True))
    shown = sum(min(count, recipe.objects_per_image) for count in objects.values())
    pays = compiling_pays(predictor, learner.precision, shown * recipe.epochs)
    if compiling == "on" or (compiling == "auto" and pays):
        return compile_decoder(learner, predictor, recipe)
    return learner


def compiling_pays(
    predictor: SAM2ImagePredictor, precision: torch.dtype, object_count: int
) -> bool:
    """Return whether compiling saves more time than it takes, as measured on CPUs.

    In bfloat16 the compiled decoder is 1.7 times as fast, in float32 no faster.
    """
    is_full_size = predictor.model.image_size >= 512
    is_faster = predictor.device.type == "cpu" and precision == torch.bfloat16
    return is_faster and is_full_size and object_count >= COMPILE_FROM_OBJECTS


class CompiledDecoder(torch.nn.Module):
    """A decoder compiled for one prompted object at a time; other calls run uncompiled.

    For several objects, the compiler (torch 2.14) fixes strides that depend on the number of
    points, and fails at prompts with another number.
    """

    def __init__(self, decoder: PromptedDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.compiled = torch.compile(decoder.decode_masks)

    def forward(
        self, features: Features, point_coords: torch.Tensor, *prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if point_coords.shape[0] != 1 or not point_coords.shape[1]:
            return self.decoder(features, point_coords, *prompts)
        prompts = point_coords, *prompts
        sparse_embeddings, dense_embeddings = self.decoder.embed_prompts(*prompts)
        # Compile once for any number of points
        torch._dynamo.mark_dynamic(sparse_embeddings, 1)
        return self.compiled(features, sparse_embeddings, dense_embeddings.float().contiguous())


def compile_decoder(learner: Learner, predictor: SAM2ImagePredictor, recipe: Recipe) -> Learner:
    """Return the learner with a compiled decoder, or unchanged if compiling fails."""
    print("compiling the decoder (about a minute; --compile off skips it)")
    decoder, device = learner.weights, predictor.device
    # Compile now, on an empty image with one point, rather than in the first step
    compiled = CompiledDecoder(decoder)
    maps = [
        torch.zeros(1, *shape, device=device).permute(0, 3, 1, 2)
        for shape in feature_shapes(predictor.model)
    ]
    points = torch.zeros(1, 1, 2, device=device)
    labels = torch.ones(1, 1, dtype=torch.int32, device=device)
    try:
        features = Features(maps[0], maps[1:])
        with autocast(device, learner.precision):
            if recipe.prompts == "mixed":  # add_clicks runs the decoder without gradients
                with torch.no_grad():
                    compiled(features, points, labels, None)
            answers = compiled(features, points, labels, None)
        sum(answer.mean() for answer in answers).backward()
    except Exception as error:  # compilers raise anything, and the run can do without one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"torch.compile does not work here ({reason}); continuing without it, only slower")
        return learner
    finally:
        decoder.zero_grad()  # of the backward pass above
    return learner._replace(decoder=compiled, at_once=1)
