"""What learns: the prompt encoder and the mask decoder, compiled and distributed."""

from __future__ import annotations

import sys
from typing import NamedTuple

from sam2_utils import autocast

import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from finetuning.basics import distributed
from finetuning.model.segmentation import Features, PromptedDecoder, feature_shapes
from finetuning.model.trainable_encoder import let_encoder_learn
from finetuning.training.recipe import Recipe

# Compiling the decoder takes about a minute, which so many objects of a full-size model win back.
COMPILE_FROM_OBJECTS = 3000


class Machine(NamedTuple):
    """How a run computes on its machine."""

    precision: torch.dtype
    checkpointing: bool | None = None  # of the encoder that learns, as in let_encoder_learn
    compiling: str = "auto"  # on, off, or auto, as in speed_up
    cache_in: str = "auto"  # as in choose_place


class LearningWeights(PromptedDecoder):
    """All that learns: prompt encoder, mask decoder, and the given part of the image encoder."""

    def __init__(self, model: SAM2Base, encoder_weights: list[torch.nn.Parameter]) -> None:
        super().__init__(model)
        self.encoder = torch.nn.ParameterList(encoder_weights)


class Learner(NamedTuple):
    """What learns, and how; its weights, optimizer and scaler are saved to go on later."""

    weights: LearningWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16 gradients; else it does nothing
    precision: torch.dtype  # that the components compute in
    decoder: torch.nn.Module  # computes with the weights, perhaps compiled or distributed
    at_once: int = sys.maxsize  # objects of a step that it computes together


def make_learner(
    predictor: SAM2ImagePredictor,
    recipe: Recipe,
    precision: torch.dtype,
    checkpointing: bool | None = None,
) -> Learner:
    """Freeze the whole model but its prompt encoder and its mask decoder; these learn.

    With recipe.train_encoder, the image encoder learns too; see let_encoder_learn.
    """
    model, device = predictor.model, predictor.device
    model.eval().requires_grad_(False)
    encoder_weights = let_encoder_learn(
        model, recipe.train_encoder, recipe.lora_rank, checkpointing
    )
    weights = LearningWeights(model, encoder_weights).requires_grad_(True)
    decoder_weights = [*weights.prompt_encoder.parameters(), *weights.mask_decoder.parameters()]
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


def set_learning_rate(learner: Learner, factor: float) -> None:
    """Set each group's learning rate to a part of its highest, which the group keeps."""
    for group in learner.optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def objects_at_once(predictor: SAM2ImagePredictor, recipe: Recipe) -> int:
    """Return how many objects of a step the decoder computes together.

    On a CPU it is as many as its caches may hold: of a full-size model one, which takes nine tenths
    of the time and two thirds of the memory of four at once. A GPU computes all together.
    """
    if (
        predictor.device.type != "cpu"
        or recipe.train_encoder != "none"  # whose gradients all need
        or distributed.world_size() > 1  # whose processes would have other numbers of parts
    ):
        return sys.maxsize
    return max(1, (1024 // predictor.model.image_size) ** 2)


def take_step(learner: Learner, max_grad_norm: float) -> torch.Tensor:
    """Change the weights by one step against their gradients.

    Gradients longer than max_grad_norm, over all weights, are scaled down to it (0: none are).
    Returns 1.0 where they were, else 0.0, on the device.
    """
    clipped = torch.zeros((), device=next(learner.weights.parameters()).device)
    if max_grad_norm:
        learner.scaler.unscale_(learner.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learner.weights.parameters(), max_grad_norm)
        clipped = (norm > max_grad_norm).float()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    return clipped


def speed_up(
    learner: Learner,
    predictor: SAM2ImagePredictor,
    recipe: Recipe,
    objects: dict[int, int],
    compiling: str,
) -> Learner:
    """Compile the decoder, if it is on, or auto and worth it; or distribute it.

    objects: how many each training image has. compiling: on, off or auto.
    """
    if distributed.world_size() > 1:
        if compiling == "on" and distributed.rank() == 0:
            print("--compile on is for one process; going on without it")
        distribute = torch.nn.parallel.DistributedDataParallel
        return learner._replace(decoder=distribute(learner.decoder, find_unused_parameters=True))
    shown = sum(min(count, recipe.objects_per_image) for count in objects.values())
    pays = compiling_pays(predictor, learner.precision, shown * recipe.epochs)
    if compiling == "on" or (compiling == "auto" and pays):
        return compile_decoder(learner, predictor, recipe)
    return learner


def compiling_pays(
    predictor: SAM2ImagePredictor, precision: torch.dtype, object_count: int
) -> bool:
    """Say whether a faster decoder will have won back the time of compiling; measured on CPUs.

    With bfloat16 it is 1.7 times as fast, in float32 no faster than before.
    """
    is_full_size = predictor.model.image_size >= 512
    is_faster = predictor.device.type == "cpu" and precision == torch.bfloat16
    return is_faster and is_full_size and object_count >= COMPILE_FROM_OBJECTS


class CompiledDecoder(torch.nn.Module):
    """A decoder compiled for one object at a time; without a prompt, it goes uncompiled.

    Of several at once, the compiler (torch 2.14) takes strides for fixed that follow from the
    number of points, and stops at prompts of another.
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
        # One kernel for prompts of any number of points, with masks and without
        torch._dynamo.mark_dynamic(sparse_embeddings, 1)
        return self.compiled(features, sparse_embeddings, dense_embeddings.float().contiguous())


def compile_decoder(learner: Learner, predictor: SAM2ImagePredictor, recipe: Recipe) -> Learner:
    """Return a learner with a compiled decoder, or as it is, where that does not work."""
    print("compiling the decoder (a minute or so; --compile off does without)")
    decoder, device = learner.weights, predictor.device
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
            if recipe.prompts == "mixed":  # clicks are placed without gradients
                with torch.no_grad():
                    compiled(features, points, labels, None)
            answers = compiled(features, points, labels, None)
        sum(answer.mean() for answer in answers).backward()
    except Exception as error:  # whatever compilers raise: the run can go on without one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"torch.compile does not work here ({reason}); going on without it, only slower")
        return learner
    finally:
        decoder.zero_grad()
    return learner._replace(decoder=compiled, at_once=1)
