"""Features that are kept are those that set_image computes, and train as the guide does."""

import csv
import functools
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import feature_cache
import training_set
from command_line import UserError
from feature_cache import (
    FeatureCache,
    hash_encoder,
    load_features,
    mask_on_grid,
    pairs_with_objects,
)
from image_files import Pair, read_mask, read_pair, split_pairs, write_image
from sam2_utils import (
    MODELS,
    Features,
    PromptedDecoder,
    autocast,
    encode_images,
    load_predictor,
    make_predictor,
    predict_masks,
)
from train_sam2_proper import RECIPES, batch_loss, compiling_pays, main
from training_set import Batch, EpochSampler, Step, TrainingSet, make_loader

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, snapshot, write_data
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
SIZES = [(96, 128), (120, 80), (300, 352), (64, 64)]  # (H,W); what tells the images apart
ALL = [0, 1, 2, 3]
GUIDE = Namespace(**RECIPES["guide"])


@pytest.fixture(scope="module")
def predictor(random_mini) -> SAM2ImagePredictor:
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    """Return four drawn pairs, each of another size."""
    pairs = [
        Pair(str(index), tmp_path / f"images/{index}.png", tmp_path / f"masks/{index}.png")
        for index in ALL
    ]
    for index, pair in enumerate(pairs):
        write_drawing(pair, *draw_pair(index, SIZES[index]))
    return pairs


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache/train.features"


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[int, int]]:
    """Return the sizes of the images that the cache has encoded, as they come."""
    sizes = []

    def record(predictor, images):
        sizes.extend(image.shape[:2] for image in images)
        return encode_images(predictor, images)

    monkeypatch.setattr(feature_cache, "encode_images", record)
    return sizes


def write_drawing(pair: Pair, image: np.ndarray, mask: np.ndarray) -> None:
    write_image(pair.image, image)
    write_image(pair.mask, mask.astype(np.uint8) * 255)


def make_newer(path: Path) -> None:
    """Make a file ten seconds newer than it is."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10 * 10**9))


def fill(path, predictor, pairs, precision=torch.float32) -> FeatureCache:
    """Do what a run does: open the cache and encode what is missing."""
    cache = FeatureCache(path, predictor, pairs, precision)
    cache.fill(predictor)
    return cache


def held(path, predictor, pairs) -> list[int]:
    """Return the indices of the pairs that a run that starts now would not encode."""
    cache = FeatureCache(path, predictor, pairs, torch.float32)
    return [index for index in range(len(pairs)) if index in cache]


def fill_and_stop(path, predictor, pairs, after: int) -> None:
    """Open the cache, and press Ctrl-C after some images."""
    done = []

    def encode(predictor, images):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(images)
        return encode_images(predictor, images)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_cache, "encode_images", encode)
        fill(path, predictor, pairs)


def maps_of(features: Features) -> list[torch.Tensor]:
    return [features.image_embed, *features.high_res_feats]


def assert_fresh(cache, predictor, pairs, precision=torch.float32) -> None:
    """Compare all that the cache holds with what set_image computes now, rounded to float16."""
    features, grids = cache.read(list(range(len(pairs))))
    for index, pair in enumerate(pairs):
        image, mask = read_pair(pair)
        with autocast(CPU, precision):
            predictor.set_image(image)
        fresh = maps_of(Features(**predictor._features))
        for kept, expected in zip(maps_of(features), fresh, strict=True):
            assert kept.dtype == torch.float16
            assert torch.allclose(kept[index].float(), expected[0].float(), rtol=2**-10, atol=2e-6)
        assert np.array_equal(grids[index], mask_on_grid(mask, predictor.model.image_size))
        assert cache.has_object(index) == mask.any()


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return |ours - theirs| / |theirs| over all weights; 0.01 is a cosine of 0.99995."""
    assert ours.keys() == theirs.keys()
    ours, theirs = (
        torch.cat([weights[name].flatten().double() for name in sorted(weights)])
        for weights in (ours, theirs)
    )
    return float((ours - theirs).norm() / theirs.norm())


def gradients(predictor, compute_loss) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss with respect to all that learns and has one."""
    decoder = PromptedDecoder(predictor.model).requires_grad_(True)
    decoder.zero_grad()
    compute_loss().backward()
    return {
        name: weight.grad.clone()
        for name, weight in decoder.named_parameters()
        if weight.grad is not None
    }


def training_loss(predictor, batch: Batch) -> torch.Tensor:
    """Return the loss of a batch, as train_one_epoch computes it."""
    features = batch.features or encode_images(predictor, batch.images)
    input_sizes = [(predictor.model.image_size,) * 2] * len(batch.prompts)
    features = features.to(CPU, torch.float32)
    prediction = predict_masks(predictor, features, batch.prompts, input_sizes)
    return batch_loss(predictor, prediction, batch.true_masks, GUIDE)[0]


def coverage(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the exact part of each of size x size cells that an HxW bool mask covers."""

    def overlap(pixels: int) -> np.ndarray:
        edges, pixel = np.arange(size + 1) * pixels / size, np.arange(pixels)
        ends = np.minimum(edges[1:, None], pixel + 1)
        return np.maximum(ends - np.maximum(edges[:-1, None], pixel), 0) * size / pixels

    height, width = mask.shape
    return overlap(height) @ mask @ overlap(width).T


def run_training(run_script, checkpoint, *options):
    return run_script(
        main, "--model", "mini", "--checkpoint", checkpoint, "--device", "cpu",
        "--precision", "float32", "--epochs", 1, *options,
    )  # fmt: skip


def read_log(output: Path) -> list[dict[str, str]]:
    with (output / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


# ----------------------------------------------------------------------------------------------
# What is kept
# ----------------------------------------------------------------------------------------------


def test_the_cache_holds_what_set_image_computes(predictor, pairs, path):
    write_image(pairs[1].mask, np.zeros(SIZES[1], np.uint8))  # without an object
    cache = fill(path, predictor, pairs)
    assert_fresh(cache, predictor, pairs)

    features, grids = cache.read(ALL)
    some_features, some_grids = cache.read([2, 0])  # in the order asked for
    for some, all_of_them in zip(maps_of(some_features), maps_of(features), strict=True):
        assert torch.equal(some, all_of_them[[2, 0]])
    assert np.array_equal(some_grids, [grids[2], grids[0]])
    of_one = load_features(predictor, cache, 2, pairs[2], torch.float32)
    assert of_one.image_embed.dtype == torch.float32
    assert torch.equal(of_one.image_embed[0], features.image_embed[2].float())
    assert pairs_with_objects(pairs, cache) == pairs_with_objects(pairs, None) == [0, 2, 3]


def test_what_is_there_is_not_encoded_again(predictor, pairs, path, encoded):
    fill(path, predictor, pairs[:2])
    assert encoded == SIZES[:2]
    fill(path, predictor, pairs)  # the limit is lifted
    assert encoded == SIZES
    newly_sorted = [pairs[3], pairs[0], pairs[2], pairs[1]]
    assert_fresh(fill(path, predictor, newly_sorted), predictor, newly_sorted)
    fill(path, predictor, pairs[1:3])
    assert encoded == SIZES


def test_a_changed_image_or_mask_is_encoded_anew_and_nothing_else(predictor, pairs, path, encoded):
    fill(path, predictor, pairs)
    size = path.stat().st_size
    write_image(pairs[1].image, draw_pair(11, SIZES[1])[0])
    make_newer(pairs[1].image)
    write_image(pairs[2].mask, draw_pair(12, SIZES[2])[1].astype(np.uint8) * 255)
    make_newer(pairs[2].mask)
    make_newer(pairs[3].mask)  # by its time alone

    assert held(path, predictor, pairs) == [0]
    stale = FeatureCache(path, predictor, pairs, torch.float32)
    anew = load_features(predictor, stale, 1, pairs[1], torch.float32)
    encoded.clear()
    cache = fill(path, predictor, pairs)
    assert encoded == SIZES[1:]
    assert_fresh(cache, predictor, pairs)
    assert torch.allclose(anew.image_embed, cache.read([1])[0].image_embed.float(), atol=0.002)
    assert path.stat().st_size == size  # in the place of the old


def test_another_encoder_or_precision_uses_nothing_of_the_cache(
    predictor, random_mini, pairs, path, encoded
):
    pairs = pairs[:2]
    other, _ = load_predictor("mini", random_mini, CPU)
    other.model.state_dict()["image_encoder.trunk.patch_embed.proj.weight"].mul_(1.5)
    for model, precision in ((other, torch.float32), (predictor, torch.bfloat16)):
        fill(path, predictor, pairs)
        encoded.clear()
        assert_fresh(fill(path, model, pairs, precision), model, pairs, precision)
        assert encoded == SIZES[:2]


def test_the_encoders_hash_is_of_all_that_set_image_uses_and_of_nothing_that_learns(random_mini):
    model = load_predictor("mini", random_mini, CPU)[0].model
    before = hash_encoder(model)
    for name, is_used in (
        ("image_encoder.trunk.patch_embed.proj.weight", True),
        ("image_encoder.neck.convs.0.conv.bias", True),
        ("sam_mask_decoder.conv_s0.bias", True),
        ("sam_mask_decoder.conv_s1.weight", True),
        ("no_mem_embed", True),
        ("sam_mask_decoder.iou_token.weight", False),
        ("sam_prompt_encoder.point_embeddings.1.weight", False),
    ):
        weight = model.state_dict()[name]
        kept = weight.clone()
        weight.view(-1)[-1] += 1
        assert (hash_encoder(model) != before) == is_used, name
        weight.copy_(kept)
    assert hash_encoder(model) == before


# ----------------------------------------------------------------------------------------------
# Interruptions and damage
# ----------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_it_encoded_and_the_next_does_the_rest(
    predictor, pairs, path, encoded
):
    fill_and_stop(path, predictor, pairs, after=2)
    assert held(path, predictor, pairs) == [0, 1]
    encoded.clear()
    assert_fresh(fill(path, predictor, pairs), predictor, pairs)
    assert encoded == SIZES[2:]


def test_records_become_valid_while_others_are_still_encoded(predictor, pairs, path, monkeypatch):
    seen = []

    def encode(predictor, images):  # what a process that is killed now leaves
        seen.append(held(path, predictor, pairs))
        return encode_images(predictor, images)

    monkeypatch.setattr(feature_cache, "encode_images", encode)
    monkeypatch.setattr(feature_cache, "SECONDS_BETWEEN_COMMITS", -1.0)
    fill(path, predictor, pairs)
    assert seen == [[], [0], [0, 1], [0, 1, 2]]


def test_a_record_is_not_valid_before_it_has_reached_the_disk(
    predictor, pairs, path, encoded, monkeypatch
):
    flushed = []

    def pull_the_plug(file):
        flushed.append(file)
        if len(flushed) == 2:  # the first sets the file's size, the second comes before the keys
            raise OSError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the power is gone"):
        patch.setattr(feature_cache, "_flush", pull_the_plug)
        fill(path, predictor, pairs)
    assert encoded == SIZES and held(path, predictor, pairs) == []
    encoded.clear()
    assert_fresh(fill(path, predictor, pairs), predictor, pairs)
    assert encoded == SIZES


def test_a_record_that_was_being_replaced_is_neither_the_old_nor_the_new(
    predictor, pairs, path, monkeypatch
):
    fill(path, predictor, pairs)
    content, facts = pairs[1].image.read_bytes(), pairs[1].image.stat()
    write_image(pairs[1].image, draw_pair(11, SIZES[1])[0])
    make_newer(pairs[1].image)
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(FeatureCache, "_commit", lambda *_: None)  # killed before it
        fill(path, predictor, pairs)
    assert held(path, predictor, pairs) == [0, 2, 3]

    pairs[1].image.write_bytes(content)  # the old image comes back, with the old key
    os.utime(pairs[1].image, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert held(path, predictor, pairs) == [0, 2, 3]
    assert_fresh(fill(path, predictor, pairs), predictor, pairs)


def test_a_cut_cache_is_read_up_to_the_cut(predictor, pairs, path, encoded):
    whole = fill(path, predictor, pairs)
    for size, left in (
        (4 * whole.record.itemsize - 1, [0, 1, 2]),
        (int(1.5 * whole.record.itemsize), [0]),  # the key of record 1 is before the cut
        (30, []),  # within the first key
    ):
        with path.open("rb+") as file:
            file.truncate(size)
        assert held(path, predictor, pairs) == left
        fill_and_stop(path, predictor, pairs, after=0)  # before the cut record is written again
        assert held(path, predictor, pairs) == left
        encoded.clear()
        assert_fresh(fill(path, predictor, pairs), predictor, pairs)
        assert encoded == [SIZES[index] for index in ALL if index not in left]


def test_a_file_of_something_else_is_written_anew(predictor, pairs, path, encoded):
    spec = MODELS["mini"]
    smaller = make_predictor(
        build_sam2(
            spec.config, None, device="cpu",
            hydra_overrides_extra=[*spec.overrides, "model.image_size=128"],
        )
    )  # fmt: skip

    def write_garbage():
        path.write_bytes(np.random.default_rng(0).bytes(5 * 10**5))

    path.parent.mkdir()
    for write in (write_garbage, lambda: fill(path, smaller, pairs[:3])):
        write()
        assert held(path, predictor, pairs) == []
        encoded.clear()
        cache = fill(path, predictor, pairs)
        assert encoded == SIZES
        assert_fresh(cache, predictor, pairs)
        assert path.stat().st_size == len(pairs) * cache.record.itemsize


# ----------------------------------------------------------------------------------------------
# The options of training
# ----------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_before_anything_is_written(
    run_script, random_mini, tmp_path, encoded, monkeypatch
):
    write_data(tmp_path / "data")
    assert run_training(run_script, random_mini, "--limit", 2).status == 0
    before = snapshot(tmp_path)
    encoded.clear()
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: Namespace(free=200_000))
    outcome = run_training(run_script, random_mini)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert "--cache" in outcome.err.replace("--no-cache", "") and "--no-cache" in outcome.err
    assert encoded == [] and snapshot(tmp_path) == before
    make_newer(min((tmp_path / "data/images/train").iterdir()))
    assert run_training(run_script, random_mini, "--limit", 2).status == 0  # needs no more room


def test_features_are_kept_where_told_and_fit_what_was_trained(
    run_script, predictor, random_mini, tmp_path
):
    write_data(tmp_path / "data", train=2, val=1)
    assert run_training(run_script, random_mini, "--cache", "kept", "--lr", 1e-3).status == 0
    files = [file for file in snapshot(tmp_path) if file.endswith(".features")]
    assert files == ["kept/train.features", "kept/val.features"]

    finetuned, _ = load_predictor("mini", Path("output/sam2_final.pt"), CPU)
    assert hash_encoder(finetuned.model) == hash_encoder(predictor.model)
    for split in ("train", "val"):
        kept, split_list = Path(f"kept/{split}.features"), split_pairs(Path("data"), split)
        assert held(kept, finetuned, split_list) == list(range(len(split_list)))
    cache = FeatureCache(kept, finetuned, split_list, torch.float32)
    assert_fresh(cache, finetuned, split_list)

    outcome = run_training(run_script, random_mini, "--cache", "kept", "--no-cache")
    assert outcome.status == 2
    assert "--no-cache: not allowed with argument --cache" in outcome.err


def test_training_without_a_cache_ends_where_training_with_one_does(
    run_script, random_mini, tmp_path
):
    write_data(tmp_path / "data")
    # Corrective clicks jump where two places are wrong alike: rounding would not stay small.
    options = ("--epochs", 2, "--batch-size", 2, "--lr", 1e-4, "--prompts", "point")
    assert run_training(run_script, random_mini, *options, "--output", "with").status == 0
    outcome = run_training(run_script, random_mini, *options, "--output", "without", "--no-cache")
    assert outcome.status == 0, outcome.err
    assert not any("features" in file for file in snapshot(tmp_path / "without"))
    for ours, theirs in zip(read_log(Path("with")), read_log(Path("without")), strict=True):
        for name in ("val_iou", "loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=0.002)


# ----------------------------------------------------------------------------------------------
# What a step learns from
# ----------------------------------------------------------------------------------------------


def test_a_batch_of_the_cache_has_the_gradients_of_one_without(predictor, pairs, path):
    cached = TrainingSet(pairs, fill(path, predictor, pairs), 256, seed=0)
    images = TrainingSet(pairs, None, 256, seed=0)

    def gradients_of(batch):
        return gradients(predictor, lambda: training_loss(predictor, batch))

    for step in (Step(1, [0, 2], 1.0), Step(2, [3, 1], 1.0)):
        assert difference(gradients_of(cached[step]), gradients_of(images[step])) < 0.02
        for source in (cached, images):  # and its loss is the mean of its images'
            losses = [
                training_loss(predictor, source[step._replace(indices=indices)]).item()
                for indices in (step.indices, step.indices[:1], step.indices[1:])
            ]
            assert losses[0] == pytest.approx(np.mean(losses[1:]), rel=1e-4)


def test_a_step_on_the_cache_has_the_gradients_of_the_guides_literal_step(predictor, pairs, path):
    pair = pairs[0]
    write_drawing(pair, *draw_pair(0, (352, 352)))
    batch = TrainingSet([pair], fill(path, predictor, [pair]), 256, seed=0)[Step(1, [0], 1.0)]

    def guides_loss():
        image, mask = read_pair(pair)
        point_coords = batch.prompts[0].point_coords * 352 / 256
        predictor.set_image(image)
        _, coords, labels, _ = predictor._prep_prompts(point_coords, np.ones(1), None, None, True)
        sparse, dense = predictor.model.sam_prompt_encoder((coords, labels), None, None)
        low_res_masks, scores, _, _ = predictor.model.sam_mask_decoder(
            image_embeddings=predictor._features["image_embed"][-1].unsqueeze(0),
            image_pe=predictor.model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=[f[-1].unsqueeze(0) for f in predictor._features["high_res_feats"]],
        )
        logits = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])
        truth = torch.from_numpy(mask).float()
        probability = torch.sigmoid(logits[0, 0])
        seg_loss = -(truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
        predicted = (logits[0] > 0).float()
        intersection = (predicted * truth).sum((1, 2))
        iou = intersection / (predicted.sum((1, 2)) + truth.sum() - intersection + 1e-6)
        return seg_loss + 0.05 * (scores[0] - iou).abs().mean()

    ours = gradients(predictor, lambda: training_loss(predictor, batch))
    # Without the score loss they differ by 0.025, for a mask one cell aside by 0.003.
    assert difference(ours, gradients(predictor, guides_loss)) < 0.002


def test_a_mask_on_the_grid_has_the_cells_that_are_half_covered_or_one_where_none_is():
    for size in ((96, 128), (300, 352), (1000, 700)):  # smaller and larger than the grid
        _, mask = draw_pair(5, size)
        grid, covered = mask_on_grid(mask, 256), coverage(mask, 256)
        assert grid.shape == (256, 256) and grid.dtype == bool
        is_clear = abs(covered - 0.5) > 1e-3
        assert np.array_equal(grid[is_clear], covered[is_clear] > 0.5)

    blocks = np.zeros((512, 512), bool)
    blocks[0, 0] = blocks[2, 2:4] = blocks[4:6, 4:6] = True  # 1, 2 and 4 of 4 pixels
    assert mask_on_grid(blocks, 256)[[0, 1, 2], [0, 1, 2]].tolist() == [False, True, True]
    assert mask_on_grid(blocks, 256).sum() == 2
    assert not mask_on_grid(np.zeros((1000, 700), bool), 256).any()
    for y, x in ((0, 0), (999, 699), (501, 333)):
        mask = np.zeros((1000, 700), bool)
        mask[y, x] = True
        grid = mask_on_grid(mask, 256)
        assert grid.sum() == 1 and coverage(mask, 256)[grid] > 0


def test_prompts_lie_in_the_mask_and_follow_from_seed_epoch_and_image_alone(predictor, pairs, path):
    cached = TrainingSet(pairs, fill(path, predictor, pairs), 256, seed=0)
    images = TrainingSet(pairs, None, 256, seed=0)
    another_seed = TrainingSet(pairs, None, 256, seed=1)
    covered = [coverage(read_mask(pair.mask), 256) for pair in pairs]
    drawn = []
    for epoch in range(1, 9):
        points = [prompt.point_coords.tolist() for prompt in cached[Step(epoch, ALL, 1.0)].prompts]
        for index, ((x, y),) in enumerate(points):
            assert covered[index][int(y), int(x)] > 0.499
        for indices in ([3, 1], [2], [0]):  # in other batches
            for source in (cached, images):
                prompts = source[Step(epoch, indices, 0.5)].prompts
                assert [prompt.point_coords.tolist() for prompt in prompts] == [
                    points[index] for index in indices
                ]
        drawn.append(str(points))
        drawn.append(
            str([p.point_coords.tolist() for p in another_seed[Step(epoch, ALL, 1.0)].prompts])
        )
    assert len(set(drawn)) == len(drawn)


# ----------------------------------------------------------------------------------------------
# Who does what: the order, processes, compilers
# ----------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    indices, orders = [1, 2, 4, 5, 7, 8, 9], []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        sampler = EpochSampler(indices, 3, seed)
        sampler.epoch = epoch
        steps = list(sampler)
        assert [(step[0], len(step[1]), step[2]) for step in steps] == [
            (epoch, 3, 1.0), (epoch, 3, 1.0), (epoch, 1, 1.0)
        ]  # fmt: skip
        assert len(sampler) == len(steps)
        orders.append([index for _, batch, *_ in steps for index in batch])
    assert all(sorted(order) == indices for order in orders)
    first, second_epoch, second_seed, first_again = orders
    assert first == first_again != second_epoch != second_seed != first


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_each_batch_and_one_without_images_stands_in(monkeypatch, world_size):
    sampler = EpochSampler(list(range(7)), 3, seed=0)
    alone, shares = list(sampler), []
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(sampler))
    stand_ins = 0
    for (_, batch, *_), *parts in zip(alone, *shares, strict=True):
        busy = [(indices, fraction) for _, indices, fraction, _ in parts if fraction]
        assert sorted(index for indices, _ in busy for index in indices) == sorted(batch)
        for indices, fraction in busy:
            assert fraction == pytest.approx(len(indices) / len(batch))
        idle = [indices for _, indices, fraction, _ in parts if not fraction]
        assert all(len(indices) == 1 and indices[0] in batch for indices in idle)
        stand_ins += len(idle)
    assert stand_ins == sum(max(0, world_size - len(batch)) for _, batch, *_ in alone)


def test_a_loading_process_gives_the_same_batches(predictor, pairs, path):
    batches = TrainingSet(pairs, fill(path, predictor, pairs), 256, seed=0)
    sampler = EpochSampler(ALL, 3, seed=0)
    elsewhere = DataLoader(
        batches,
        sampler=sampler,
        batch_size=None,
        collate_fn=training_set._as_it_is,
        num_workers=1,
        multiprocessing_context="spawn",  # as macOS and Windows start processes
    )
    for theirs, ours in zip(elsewhere, make_loader(batches, sampler, CPU), strict=True):
        tensors = [(*maps_of(batch.features), *batch.true_masks) for batch in (theirs, ours)]
        assert all(map(torch.equal, *tensors))
        assert len(theirs.prompts) == len(ours.prompts) == len(ours.true_masks)
        for prompts in zip(theirs.prompts, ours.prompts, strict=True):
            assert all(map(np.array_equal, *prompts))
        assert theirs.fraction == ours.fraction and theirs.images == ours.images == []


def test_only_full_batches_are_compiled_and_a_missing_compiler_is_no_obstacle(
    run_script, random_mini, tmp_path, monkeypatch
):
    write_data(tmp_path / "data")
    compiled_sizes = []

    def compile_recording(forward, **_):
        def compiled(features, *points):
            compiled_sizes.append(len(points[0]))
            return forward(features, *points)

        return compiled

    def compile_failing(*_, **__):
        def compiled(*_):
            raise RuntimeError("no compiler\nand many more lines")

        return compiled

    outcomes = {}
    for name, compiler, option in (
        ("off", None, "off"), ("failing", compile_failing, "on"),
        ("recording", compile_recording, "on"),
    ):  # fmt: skip
        monkeypatch.setattr(torch, "compile", compiler)
        outcomes[name] = run_training(
            run_script, random_mini, "--lr", 1e-3, "--batch-size", 3, "--compile", option,
            "--cache", "cache", "--output", name, "--prompts", "point",
        )  # fmt: skip
        assert outcomes[name].status == 0, outcomes[name].err
        weights, expected = (weights_of(Path(run) / "sam2_final.pt") for run in (name, "off"))
        assert all(torch.equal(weight, expected[key]) for key, weight in weights.items())
    assert "(no compiler); going on without it" in outcomes["failing"].out
    assert "compil" not in outcomes["off"].out
    assert "going on without" not in outcomes["recording"].out
    assert compiled_sizes == [3, 3]  # to try it, and of the epoch's batches of 3 and 1


def test_compiling_is_left_to_long_runs_of_full_size_models_on_a_cpu(predictor):
    assert not compiling_pays(predictor, 10**9)
    full_size = Namespace(image_size=1024)
    assert compiling_pays(Namespace(device=CPU, model=full_size), 10**9)
    assert not compiling_pays(Namespace(device=CPU, model=full_size), 10)
    assert not compiling_pays(Namespace(device=torch.device("cuda"), model=full_size), 10**9)


def test_a_gpu_too_small_for_eight_images_encodes_fewer_at_once(predictor, path, monkeypatch):
    """And where not even one fits, a line says what to do: a smaller batch would not help."""
    pairs = [Pair(str(i), path.parent / f"{i}.png", path.parent / f"m{i}.png") for i in range(5)]
    for index, pair in enumerate(pairs):
        write_drawing(pair, *draw_pair(index))
    tried = []

    def encode(predictor, images, room):
        tried.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return encode_images(predictor, images)

    monkeypatch.setattr(feature_cache, "ENCODED_AT_ONCE", {"cpu": 8})
    monkeypatch.setattr(feature_cache, "encode_images", functools.partial(encode, room=2))
    cache = fill(path, predictor, pairs)
    assert tried == [5, 4, 2, 2, 1]
    monkeypatch.setattr(feature_cache, "encode_images", encode_images)
    assert_fresh(cache, predictor, pairs)
    path.unlink()
    monkeypatch.setattr(feature_cache, "encode_images", functools.partial(encode, room=0))
    with pytest.raises(UserError, match="even one image; use a smaller --model") as caught:
        fill(path, predictor, pairs)
    assert "batch-size" not in str(caught.value)
    monkeypatch.setattr(feature_cache, "encode_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill(path, predictor, pairs)


@pytest.mark.parametrize("value", [float("nan"), 1e9])  # the latter is beyond half precision
def test_features_that_are_not_finite_are_never_kept(predictor, pairs, path, monkeypatch, value):
    def encode(predictor, images):
        features = encode_images(predictor, images)
        if images[0].shape[:2] == SIZES[2]:
            features.high_res_feats[0][0, 1, 2, 3] = value
        return features

    monkeypatch.setattr(feature_cache, "encode_images", encode)
    with pytest.raises(UserError, match=r"2\.png are not finite .*--precision float32"):
        fill(path, predictor, pairs)
    assert held(path, predictor, pairs) == [0, 1]


# ----------------------------------------------------------------------------------------------
# torchrun
# ----------------------------------------------------------------------------------------------

# Four images: three in the first batch, one in the last, where one process has none.
STEPS = ("--epochs", 1, "--batch-size", 3, "--lr", 1e-3, "--precision", "float32")


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory, random_mini) -> tuple[Path, subprocess.CompletedProcess]:
    """Train with two processes; return the folder and what they printed."""
    if sys.platform == "win32":
        pytest.skip("torchrun is not for Windows")
    folder = tmp_path_factory.mktemp("torchrun")
    write_data(folder / "data", train=4, val=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        ROOT / "train_sam2_proper.py", "--model", "mini", "--checkpoint", random_mini,
        "--device", "cpu", *STEPS,
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_learn_what_one_learns(torchrun, run_script, predictor, random_mini):
    folder, _ = torchrun
    data = ("--data", folder / "data")
    assert run_training(run_script, random_mini, *data, *STEPS).status == 0
    original = weights_of(random_mini)
    moved = [
        {name: weight - original[name] for name, weight in weights_of(file).items()}
        for file in (folder / "output/sam2_final.pt", Path("output/sam2_final.pt"))
    ]
    assert difference(*moved) < 0.002
    for rows in zip(read_log(folder / "output"), read_log(Path("output")), strict=True):
        ours, theirs = ({**row, "seconds": 0} for row in rows)
        assert {name: float(value or 0) for name, value in ours.items()} == pytest.approx(
            {name: float(value or 0) for name, value in theirs.items()}, abs=0.001
        )
    load_predictor("mini", folder / "output/sam2_final.pt", CPU)

    pairs = split_pairs(folder / "data", "train")
    path = folder / "output/cache/train.features"
    assert held(path, predictor, pairs) == ALL
    assert_fresh(FeatureCache(path, predictor, pairs, torch.float32), predictor, pairs)


def test_of_several_processes_one_shows_what_is_going_on(torchrun):
    _, done = torchrun
    for text in ("before training: val IoU", "epoch   1  loss", "wrote sam2_best.pt", "next: "):
        assert done.stdout.count(text) == 1, done.stdout
    for bar in ("Encoding train", "Encoding val"):
        assert len(re.findall(rf"{bar}: +0%", done.stderr)) == 1, done.stderr
