"""Augmentation: masks and prompts follow their image, runs repeat to the bit, val never changes."""

import csv
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import snapshot, write_data

import train_sam2_proper
from finetuning.basics.image_files import read_image, write_image
from finetuning.dataset.objects import Objects, read_objects
from finetuning.dataset.pairs import Pair
from finetuning.model.image_variants import CachedImage, ImageVariant, file_of, read_variant
from finetuning.segmentation.predicting import Features
from finetuning.segmentation.views import ALL_VIEWS, MIRRORED, UPRIGHT, View
from finetuning.training import training_log
from finetuning.training.options import parse_args
from finetuning.training.recipe import GUIDE, Recipe
from finetuning.training_data import augmentation as augmentation_module
from finetuning.training_data import augmentation_picture, encoding
from finetuning.training_data.augmentation import (
    KEPT_SHARE,
    VISIBLE_SHARE,
    Augment,
    Augmentation,
    ObjectPixels,
    Variant,
    auto_number,
    draw_variant,
    draw_variants,
    visible_objects,
)
from finetuning.training_data.batches import Batch, TrainingSet, make_loader
from finetuning.training_data.epoch_sampling import EpochSampler, Step
from finetuning.training_data.prompt_sampling import PromptMix
from train_sam2_proper import main

SIZE = 256  # of the maps and of the model's input
FEATURE_BYTES = 2 * 128 * (16 * 16 + 64 * 64 // 8 + 32 * 32 // 4)  # of an image, of mini


class PixelCache:
    """A feature cache whose features are the pixels of the images, resized."""

    def __init__(self, held_on: torch.device | None = None) -> None:
        self.held_on = held_on

    def size(self, image: CachedImage) -> tuple[int, int]:
        return read_variant(image).shape[:2]

    def read(self, images: list[CachedImage]) -> Features:
        maps = np.stack([resized(read_variant(image)) for image in images])
        maps = torch.from_numpy(np.ascontiguousarray(maps)).half()
        maps = [maps.clone().permute(0, 3, 1, 2) for _ in range(3)]  # the channels stay last
        return Features(maps[0], maps[1:])


def resized(image: np.ndarray) -> np.ndarray:
    """Return an image as SIZExSIZE, by the pixels at the centers."""
    rows, columns = ((2 * np.arange(SIZE) + 1) * length // (2 * SIZE) for length in image.shape[:2])
    return image[rows][:, columns]


def draw_colours(folder: Path, count: int = 3) -> list[Pair]:
    """Write images of gray ground with a red, a green and a blue object apart, and label maps."""
    pairs = []
    for index in range(count):
        rng = np.random.default_rng(index)
        image, labels = np.full((120, 180, 3), 120, np.uint8), np.zeros((120, 180), np.uint8)
        for k in range(3):
            y, x = rng.integers(4, 60), 4 + 60 * k + rng.integers(20)
            height, width = rng.integers(30, 50), rng.integers(24, 36)
            labels[y : y + height, x : x + width] = k + 1
        for k in range(3):
            image[labels == k + 1] = np.eye(3, dtype=np.uint8)[k] * 200
        write_image(folder / f"{index}.png", image)
        write_image(folder / f"{index}_labels.png", labels)
        pairs.append(
            Pair(str(index), folder / f"{index}.png", folder / f"{index}_labels.png", True)
        )
    return pairs


def colour_masks(image: np.ndarray) -> list[np.ndarray]:
    """Return where an image is mostly red, green and blue, each HxW bool."""
    values = image.astype(int)
    is_vivid = values.max(-1) - values.min(-1) > 60
    return [is_vivid & (values.argmax(-1) == channel) for channel in range(3)]


def require_alike(batch: Batch, images: list[np.ndarray]) -> int:
    """Check the true masks and prompts of a batch against the colours of its SIZExSIZE images.

    Returns the number of objects.
    """
    for i, true_mask, prompt in zip(batch.image_of, batch.true_masks, batch.prompts, strict=True):
        found = colour_masks(images[i])
        mask = resized(true_mask.numpy()) >= 128
        ious = [(mask & one).sum() / (mask | one).sum() for one in found]
        colour = int(np.argmax(ious))
        assert ious[colour] > 0.85, ious
        for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
            if label == 1:
                x, y = (int(np.clip(round(float(value)), 0, SIZE - 1)) for value in (x, y))
                # The nearest pixel to a point inside may lie beside a border
                near = found[colour][max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                assert near.any()
    return len(batch.prompts)


def augmentation_of(pairs: list[Pair], number: int = 8, turns: bool = False) -> Augmentation:
    return Augmentation(Augment(number, turns), draw_variants(pairs, number, turns))


def batches_of(training_set: TrainingSet, epochs: int, count: int) -> list[Batch]:
    steps = [
        Step(epoch, list(range(count)), 1.0, 0, [(0, 1, 2)] * count)
        for epoch in range(1, epochs + 1)
    ]
    return list(make_loader(training_set, steps, torch.device("cpu")))


# What the model is shown


@pytest.mark.parametrize("kind", ["inner", "box"])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("held", [None, torch.device("cpu")])
def test_masks_and_prompts_lie_on_their_objects_in_every_variant(tmp_path, kind, turns, held):
    pairs = draw_colours(tmp_path)
    training_set = TrainingSet(
        pairs, PixelCache(held), SIZE, 0, PromptMix(kind), augmentation_of(pairs, 8, turns)
    )
    assert training_set.prepare() == {0: 3, 1: 3, 2: 3}
    views, variants = set(), set()
    for batch in batches_of(training_set, 8, 3):
        for maps in (batch.features.image_embed, *batch.features.high_res_feats):
            images = list(maps.permute(0, 2, 3, 1).float().numpy().astype(np.uint8))
            assert require_alike(batch, images) == 9
            assert maps.is_contiguous(memory_format=torch.channels_last)
        views |= {shown.view for shown in batch.shown}
        variants |= {shown.image for shown in batch.shown}
    assert len(variants) == 3 * 8  # each once in as many epochs
    assert views == {UPRIGHT, MIRRORED} or (turns and len(views) > 4)


@pytest.mark.parametrize("turns", [False, True])
def test_without_a_cache_each_epoch_draws_new_variants(tmp_path, turns):
    pairs = draw_colours(tmp_path)
    augmentation, shown = Augmentation(Augment("auto", turns)), set()
    training_set, again, other = (
        TrainingSet(pairs, None, SIZE, seed, PromptMix("inner"), augmentation) for seed in (0, 0, 1)
    )
    for batch in batches_of(training_set, 8, 3):
        assert require_alike(batch, [resized(image) for image in batch.images]) == 9
        shown |= {one.image for one in batch.shown}
    assert len(shown) == 3 * 8 and all(isinstance(image, ImageVariant) for image in shown)
    assert not training_set._masks and not training_set._variant_masks  # none comes again
    first, again, other = (batches_of(one, 1, 3)[0].images for one in (training_set, again, other))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_objects_that_are_mostly_cropped_away_are_replaced_by_visible_ones(tmp_path):
    pairs = draw_colours(tmp_path, 8)
    augmentation = augmentation_of(pairs)
    hiding = [drawn for of_image in augmentation.further for drawn in of_image if drawn.hidden]
    assert hiding and all(len(drawn.hidden) < 3 for drawn in hiding)
    for pair, of_image in zip(pairs, augmentation.further, strict=True):
        masks = list(read_objects(pair))
        for variant, hidden in of_image:
            left = [variant.of_mask(mask).sum() / mask.sum() for mask in masks]
            assert hidden == {k for k, share in enumerate(left) if share < VISIBLE_SHARE}
            kept = sum(variant.of_mask(mask).sum() for mask in masks)
            assert kept >= KEPT_SHARE * sum(mask.sum() for mask in masks)
    assert visible_objects((0, 2), frozenset(), 4) == (0, 2)
    assert visible_objects((0, 2), frozenset({2}), 4) in ((0, 1), (0, 3))
    assert visible_objects((0, 1, 2), frozenset({1, 2}), 3) == (0, 0, 0)
    assert set(visible_objects((4, 5), frozenset({4, 5}), 7)) < {0, 1, 2, 3, 6}


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (40, 50)])
@pytest.mark.parametrize("filled", ["all", "a pixel", "nothing"])
def test_any_image_has_variants(size, filled):
    mask = np.full(size, filled == "all")
    mask[-1, -1] = filled != "nothing"
    objects = Objects(size, [mask] if mask.any() else [], lambda found: found)
    gray = np.repeat(np.random.default_rng(0).integers(0, 256, (*size, 1), np.uint8), 3, axis=2)
    for seed in range(20):
        variant, _ = draw_variant(np.random.default_rng(seed), ObjectPixels(objects), True)
        seen = variant.of_array(gray)
        assert seen.dtype == np.uint8 and (seen[..., :1] == seen).all()  # gray stays gray
        assert seen.shape[:2] == variant.of_mask(mask).shape
        assert not mask.any() or variant.of_mask(mask).any()


def test_a_variant_changes_colours_a_little_and_the_plain_one_nothing():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    assert np.array_equal(Variant().of_array(image), image)
    brighter = Variant(value=1.25).of_array(image)
    assert brighter.mean() > image.mean() + 10
    turned = Variant(View(1), hue=6).of_array(image)
    assert turned.shape == (40, 30, 3) and not np.array_equal(turned, np.rot90(image))


def test_background_and_all_objects_turn_with_the_image(tmp_path):
    pairs = draw_colours(tmp_path)
    for mix in (PromptMix("inner", none_share=0.999), PromptMix("inner", background_share=0.999)):
        training_set = TrainingSet(pairs, PixelCache(), SIZE, 0, mix, augmentation_of(pairs))
        for batch in batches_of(training_set, 4, 3):
            images = batch.features.image_embed.permute(0, 2, 3, 1).numpy().astype(np.uint8)
            for i, mask, prompt in zip(
                batch.image_of, batch.true_masks, batch.prompts, strict=True
            ):
                vivid = np.any(colour_masks(images[i]), axis=0)
                if batch.plan.kind == "none":
                    seen = resized(mask.numpy()) >= 128
                    assert (seen & vivid).sum() > 0.9 * (seen | vivid).sum()
                elif not mask.any():  # the point is on background
                    x, y = prompt.point_coords[0].astype(int)
                    assert not vivid[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].all()


# How many variants


def test_auto_encodes_about_a_thousand_images():
    numbers = {1: 8, 45: 8, 125: 8, 180: 5, 400: 2, 500: 2, 501: 1, 720: 1, 1000: 1, 20000: 1}
    assert {count: auto_number(count) for count in numbers} == numbers


def test_the_option_counts_the_unchanged_image_and_the_guide_has_none():
    parsed = {text: parse_args(["--augment", text]).recipe.augment for text in ("auto", "off", "3")}
    assert parsed == {"auto": "auto", "off": "off", "3": 3}
    assert parse_args(["--augment", "1"]).recipe.augment == "off"
    assert parse_args([]).recipe.augmentation == Augment("auto", False, 2)
    assert parse_args(["--turns"]).recipe.augmentation.turns
    assert parse_args(["--recipe", "guide"]).recipe.augment == "off"
    for wrong in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit):
            parse_args(["--augment", wrong])


def test_variants_depend_on_the_image_not_on_its_neighbours(tmp_path):
    pairs = draw_colours(tmp_path)
    all_variants = draw_variants(pairs, 8, False)
    assert draw_variants(pairs[1:], 4, False) == [of_image[:3] for of_image in all_variants[1:]]
    assert all_variants[0] != all_variants[1]


# Runs


@pytest.fixture(autouse=True)
def as_many_as_users_get(monkeypatch) -> None:
    """Let auto make up to eight variants; other tests make fewer, to be quick."""
    monkeypatch.setattr(augmentation_module, "AUTO_MOST", 8)


@pytest.fixture
def train(run_script, tmp_path, random_mini, monkeypatch):
    """Train on four and two drawn pairs, as users do."""
    write_data(tmp_path / "data", train=4, val=2)
    options = "--model", "mini", "--checkpoint", random_mini, "--device", "cpu", "--lr", 1e-3
    return lambda *more: run_script(main, *options, *more)


def weights(output: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(output) / "sam2_final.pt", weights_only=True)["model"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def features_in(folder: str) -> int:
    return len(list(Path(folder).glob("*.safetensors")))


def val_before(output: str) -> str:
    with (Path(output) / "train_log.csv").open(encoding="utf-8-sig", newline="") as file:
        return next(csv.DictReader(file))["val_iou"]


def test_a_run_repeats_to_the_bit_wherever_features_are_held(train):
    first = train("--augment", 3, "--epochs", 2)
    assert first.status == 0, first.err
    assert "augmentation: 8 variants of the training images to encode, once (" in first.out
    assert features_in("output/cache") == 2 + 4 * 3
    again = train("--augment", 3, "--epochs", 2, "--output", "again", "--cache", "output/cache",
                  "--cache-in", "memory")  # fmt: skip
    assert again.status == 0 and "augmentation:" not in again.out
    assert same(weights("output"), weights("again"))
    assert features_in("output/cache") == 2 + 4 * 3


def test_an_interrupted_run_goes_on_with_its_number_of_variants(train, monkeypatch):
    assert train("--epochs", 3, "--output", "whole").status == 0
    save = train_sam2_proper.run_files.save_epoch

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    shared = "--cache", "whole/cache", "--epochs", 3
    with monkeypatch.context() as patch:
        patch.setattr(train_sam2_proper.run_files, "save_epoch", save_and_stop)
        assert train(*shared).status == 130
    for other in (3, "off"):
        refused = train(*shared, "--augment", other, "--resume")
        assert refused.status == 2, refused.out
        assert f"had --augment 8, not {other}; resume with the same" in refused.err

    # A new run would have fewer variants now
    limit_disk(monkeypatch, images=20)
    outcome = train("--cache", "new_cache", "--epochs", 3, "--resume")
    assert outcome.status == 2 and "has room for" in outcome.err
    limit_disk(monkeypatch, images=2 + 4 * 8)
    outcome = train("--cache", "new_cache", "--epochs", 3, "--resume")
    assert outcome.status == 0, outcome.err
    assert same(weights("output"), weights("whole"))


def limit_disk(monkeypatch, images: int) -> None:
    """Let the disk have room for the features of so many images, and little more."""
    usage = SimpleNamespace(free=int((images + 0.9) * FEATURE_BYTES))
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize(("images", "number"), [(2 * (2 + 4 * 8), 8), (2 * (2 + 4 * 5), 5), (7, 1)])
def test_auto_writes_to_half_of_the_free_disk(train, monkeypatch, images, number):
    limit_disk(monkeypatch, images)
    outcome = train("--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert features_in("output/cache") == 2 + 4 * number
    said = f"augmentation: {number} of 8 variants of each image, as the disk of "
    assert (said in outcome.out) == (number < 8)
    # What is cached needs no space
    limit_disk(monkeypatch, images=0)
    assert train("--epochs", 1).status == 0
    assert features_in("output/cache") == 2 + 4 * number


def test_runs_and_folds_encode_each_variant_once(train):
    assert train("--epochs", 1, "--augment", 2).status == 0
    files = {path.name for path in Path("output/cache").iterdir()}
    assert train("--epochs", 1, "--augment", 2, "--runs", 2, "--seed", 7).status == 0
    assert {path.name for path in Path("output/cache").iterdir()} == files
    assert train("--epochs", 1, "--augment", 2, "--folds", 2).status == 0
    assert features_in("output/cache") == 6 * 2  # the images of val are trained on, too
    assert files < {path.name for path in Path("output/cache").iterdir()}


def test_val_is_measured_on_the_unchanged_images(train):
    assert train("--epochs", 1, "--augment", "off", "--output", "off").status == 0
    assert features_in("off/cache") == 6 and not Path("off/augmentation.png").exists()
    assert train("--epochs", 1, "--augment", 4, "--turns", "--cache", "off/cache").status == 0
    assert val_before("off") == val_before("output")
    assert not same(weights("off"), weights("output"))
    assert features_in("off/cache") == 6 + 4 * 3
    assert train("--epochs", 1, "--no-cache", "--output", "uncached").status == 0
    assert not same(weights("off"), weights("uncached"))


def test_off_shows_what_a_plain_training_set_shows(tmp_path):
    pairs = draw_colours(tmp_path)
    off = Augmentation(Augment("off"), [[]] * 3)
    plain, also = (
        TrainingSet(pairs, PixelCache(), SIZE, 0, PromptMix("mixed"), *more)
        for more in ((), (off,))
    )
    for ours, theirs in zip(batches_of(plain, 3, 3), batches_of(also, 3, 3), strict=True):
        assert torch.equal(ours.features.image_embed, theirs.features.image_embed)
        assert torch.equal(ours.true_masks, theirs.true_masks) and ours.shown == theirs.shown
        assert str(ours.prompts) == str(theirs.prompts) and ours.plan == theirs.plan
        assert all(one.image == pairs[i].image for i, one in enumerate(ours.shown))


def test_a_loading_process_shows_the_same(tmp_path):
    pairs = draw_colours(tmp_path)
    here = TrainingSet(
        pairs, PixelCache(), SIZE, 0, PromptMix("mixed"), augmentation_of(pairs, 4, True)
    )
    here.prepare()
    there = pickle.loads(pickle.dumps(here))
    for ours, theirs in zip(batches_of(here, 5, 3), batches_of(there, 5, 3), strict=True):
        assert torch.equal(ours.true_masks, theirs.true_masks) and ours.shown == theirs.shown
        assert torch.equal(ours.features.image_embed, theirs.features.image_embed)


def test_an_image_of_another_size_than_its_mask_is_still_refused(tmp_path):
    pairs = draw_colours(tmp_path)
    write_image(pairs[0].image, read_image(pairs[0].image)[:-1])
    for cache, augment in ((None, Augmentation(Augment("auto"))), (PixelCache(), None)):
        augment = augment or augmentation_of(pairs)
        error = TrainingSet(pairs, cache, SIZE, 0, augmentation=augment)[Step(1, [0], 1.0)]
        assert "a mask must have its image's size" in str(error)


def test_the_picture_shows_masks_and_prompts_and_moves_aside_with_its_run(train, monkeypatch):
    monkeypatch.setattr(training_log, "draw_learning_curve", lambda path, _: path.touch())
    outcome = train("--epochs", 2, "--augment", 2)
    assert "learning_curve.png, augmentation.png to output" in outcome.out, outcome.err
    first = snapshot(Path("output"))["augmentation.png"]
    outcome = train("--epochs", 2, "--augment", "off")
    assert "augmentation.png" not in outcome.out and not Path("output/augmentation.png").exists()
    assert snapshot(Path("output/earlier_1"))["augmentation.png"] == first


def test_what_the_picture_draws_lies_on_the_objects(tmp_path):
    pairs = draw_colours(tmp_path)
    sampler = EpochSampler({0: 3, 1: 3, 2: 3}, 2, 0, objects_per_image=3)
    for cache, augment in (
        (PixelCache(), augmentation_of(pairs, 8, True)),
        (None, Augmentation(Augment("auto", True))),
    ):
        training_set = TrainingSet(pairs, cache, SIZE, 0, PromptMix("none"), augment)
        for step in sampler:
            batch = augmentation_picture.load_alone(training_set, step, step.indices[0])
            assert file_of(batch.shown[0].image) == pairs[step.indices[0]].image
            image = read_image(pairs[step.indices[0]].image)
            seen = augmentation_picture.draw_shown(image, batch, SIZE).astype(int)
            outline = (seen[..., 0] > 200) & (seen[..., 1] > 160) & (seen[..., 2] < 80)
            inside = np.any(colour_masks(seen), axis=0) & ~outline
            border = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((9, 9)))
            assert outline.sum() > 50 and border[outline].mean() > 0.95


def test_views_are_drawn_evenly():
    pair, augmentation = (
        Pair("a", Path("a.png"), Path("b.png")),
        Augmentation(Augment(1, True, mirror_from=1), [[]]),
    )
    views = [augmentation.show(pair, 0, epoch, seed=0).view for epoch in range(1, 401)]
    assert set(views) == set(ALL_VIEWS)
    assert all(views.count(view) > 25 for view in ALL_VIEWS)
    only = augmentation._replace(augment=Augment(1, True, mirror_from=99))
    assert only.show(pair, 0, 1, seed=0).view == UPRIGHT


def test_a_run_without_variants_is_not_resumed_with_them_and_keeps_its_epochs(train):
    assert train("--epochs", 2, "--augment", "off").status == 0
    refused = train("--resume")
    assert refused.status == 2 and "had --augment off, not auto" in refused.err
    resumed = train("--resume", "--augment", "off")
    assert resumed.status == 0 and "all 2 epochs are done" in resumed.out


def test_few_images_get_more_epochs_with_variants():
    recipe, off = Recipe(), Recipe(augment="off")
    assert recipe.with_epochs(45).epochs == 80 and recipe.with_epochs(90).epochs == 40
    assert recipe.with_epochs(180).epochs == recipe.with_epochs(720).epochs == 20
    assert off.with_epochs(45).epochs == GUIDE.epochs == 20
    assert Recipe(epochs=7).with_epochs(45).epochs == 7
