"""Before its first step a run reads each file once, in its first process; the others are told."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sam2_utils import UserError

import numpy as np
import pytest
import torch
from conftest import CPU, draw_pair, write_data

from finetuning.basics import distributed, files, threads
from finetuning.basics.files import content_sha256, hash_contents
from finetuning.basics.threads import in_threads
from finetuning.dataset.pairs import Pair, split_pairs
from finetuning.model import feature_cache
from finetuning.model.cache_places import open_cache
from finetuning.model.feature_cache import FeatureCache
from finetuning.model.models import load_predictor
from finetuning.preparation.filling import write_objects
from finetuning.training.recipe import DEFAULT
from finetuning.training.run_files import Start, run_settings
from finetuning.training_data import batches
from finetuning.training_data.batches import TrainingSet
from finetuning.training_data.epoch_sampling import Step
from finetuning.training_data.prompt_sampling import PromptMix

EVERYTHING = PromptMix("mixed", none_share=0.4, background_share=0.6)


@pytest.fixture(scope="module")
def predictor(random_mini):
    return load_predictor("mini", random_mini, CPU)[0]


@pytest.fixture
def pairs(tmp_path) -> dict[str, list[Pair]]:
    data = write_data(tmp_path / "data", train=3, val=1)
    return {split: split_pairs(data, split) for split in ("train", "val")}


@pytest.fixture
def be_process(monkeypatch):
    """Return a function that makes this one of two processes, of which the first comes first."""
    sent: list[bytes] = []

    def broadcast(values: list, src: int) -> None:
        assert src == 0
        if distributed.rank() == 0:
            sent.append(pickle.dumps(values))
        else:
            values[:] = pickle.loads(sent.pop(0))

    def be(rank: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    return be


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Return the names of the files whose content is hashed, as they come."""
    names, digest = [], files.hashlib.file_digest

    def record(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", record)
    return names


def write_image_of(objects: list[np.ndarray], folder: Path) -> Pair:
    write_objects(folder / "many_mask", objects, objects[0].shape)
    (masks,) = folder.glob("many_mask*")
    return Pair("many", folder / "many.png", masks, per_object=True)


# ----------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------


def test_all_processes_have_what_the_first_one_makes(be_process):
    def fail() -> None:
        pytest.fail("the others are to make nothing")

    assert distributed.from_first(lambda: "alone") == "alone"
    be_process(0)
    assert distributed.from_first(lambda: {"a": 1}) == {"a": 1}
    be_process(1)
    assert distributed.from_first(fail) == {"a": 1}


@pytest.mark.parametrize("error", [UserError("no mask; add one"), OSError(28, "full", "a.png")])
def test_what_the_first_process_fails_at_ends_all(be_process, error):
    def fail() -> None:
        raise error

    for rank in (0, 1):
        be_process(rank)
        with pytest.raises(type(error)) as raised:
            distributed.from_first(fail)
        assert str(raised.value) == str(error)


def test_the_first_item_that_fails_is_the_one_that_is_told_and_others_are_not_begun(monkeypatch):
    begun, ended = [], threading.Event()

    class Threads(ThreadPoolExecutor):
        def shutdown(self, *arguments, **options):
            ended.set()
            super().shutdown(*arguments, **options)

    def fail_from_3_on(number: int) -> int:
        begun.append(number)
        if number > 3:
            assert ended.wait(60)
        if number >= 3:
            raise UserError(f"{number} is wrong; fix it")
        return -number

    monkeypatch.setattr(threads, "THREADS", 2)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Threads)
    assert in_threads(fail_from_3_on, range(3), "Counting", "number") == [0, -1, -2]
    begun.clear()
    ended.clear()
    with pytest.raises(UserError, match=r"^3 is wrong"):
        in_threads(fail_from_3_on, range(100), "Counting", "number")
    assert len(begun) <= 6  # those before it, itself, and one in each thread


# ----------------------------------------------------------------------------------------------
# Content
# ----------------------------------------------------------------------------------------------


def test_a_file_is_hashed_once_unless_it_changes(tmp_path, hashed):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"as it was")
    digests = hash_contents([first, second, first])
    assert list(digests) == [first, second] and len(set(digests.values())) == 1
    assert content_sha256(first) == digests[first]
    assert sorted(hashed) == ["first", "second"]
    first.write_bytes(b"as it is!")  # of the same length
    assert content_sha256(first) != digests[first] and len(hashed) == 3
    first.unlink()
    with pytest.raises(UserError, match="no such file"):
        content_sha256(first)


def test_settings_and_features_of_a_run_hash_each_file_once(
    predictor, random_mini, pairs, tmp_path, be_process, hashed
):
    start = Start("mini", random_mini, tmp_path / "data", None, None, torch.float32, 256, [])
    of_processes, others = [], []
    for rank in (0, 1):
        be_process(rank)
        settings = run_settings(DEFAULT, start, pairs)
        cache = FeatureCache(tmp_path / "cache", predictor, torch.float32)
        cache.look_up([pair.image for pair in pairs["train"]])
        of_processes.append((settings, cache._paths))
        others.append([name for name in hashed if name != random_mini.name])
    assert of_processes[0] == of_processes[1]
    everything = [path for of in pairs.values() for pair in of for path in (pair.image, pair.mask)]
    assert sorted(others[0]) == sorted(path.name for path in everything)
    assert others[0] == others[1]


# ----------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------


def test_one_process_checks_the_features_for_all(
    predictor, pairs, tmp_path, be_process, monkeypatch
):
    images = [pair.image for pair in pairs["train"]]
    FeatureCache(tmp_path / "cache", predictor, torch.float32).fill(images, predictor, "train")
    digest, checked = feature_cache._digest, []

    def count(*arguments):
        checked.append(distributed.rank())
        return digest(*arguments)

    monkeypatch.setattr(feature_cache, "_digest", count)
    monkeypatch.setattr(FeatureCache, "_encode", lambda *_: pytest.fail("all are there"))
    caches = []
    for rank in (0, 1):
        be_process(rank)
        caches.append(FeatureCache(tmp_path / "cache", predictor, torch.float32))
        caches[-1].fill(images, predictor, "train")
        assert caches[-1].size(images[0]) == (96, 128)
    assert checked == [0, 0, 0]
    ours, theirs = (cache.read(images).image_embed for cache in caches)
    assert torch.equal(ours, theirs)


def test_processes_encode_a_share_each_of_what_the_first_one_misses(
    predictor, pairs, tmp_path, be_process, monkeypatch
):
    images = [pair.image for pair in pairs["train"]]
    encode, asked = FeatureCache._encode, {}

    def encode_for_both(cache, mine, predictor, description):
        asked[distributed.rank()] = mine
        encode(cache, images[1:], predictor, description)  # the other process does its share

    caches = [FeatureCache(tmp_path / "cache", predictor, torch.float32) for _ in range(2)]
    caches[0].fill(images[:1], predictor, "train")
    monkeypatch.setattr(FeatureCache, "_encode", encode_for_both)
    for rank, cache in enumerate(caches):
        be_process(rank)
        cache.fill(images, predictor, "train")
        assert cache.missing(images) == []
    assert asked == {0: [images[1]], 1: [images[2]]}


def test_a_machine_that_does_not_see_the_folder_is_said(predictor, pairs, tmp_path, be_process):
    images, folder = [pair.image for pair in pairs["train"]], tmp_path / "cache"
    be_process(0)  # which encodes its share, and sees nothing of the other's
    with pytest.raises(UserError, match=r"not all machines see .*cache; name a shared folder"):
        FeatureCache(folder, predictor, torch.float32).fill(images, predictor, "train")


def test_a_machine_without_the_features_that_the_first_one_has_is_said(
    predictor, pairs, tmp_path, be_process
):
    images, folder = [pair.image for pair in pairs["train"]], tmp_path / "cache"
    FeatureCache(folder, predictor, torch.float32).fill(images, predictor, "train")
    be_process(0)
    FeatureCache(folder, predictor, torch.float32).fill(images, predictor, "train")
    folder.rename(tmp_path / "on another machine")
    be_process(1)
    with pytest.raises(UserError, match=r"not all machines see .*cache; name a shared folder"):
        FeatureCache(folder, predictor, torch.float32).fill(images, predictor, "train")


def test_an_image_that_differs_on_another_machine_is_not_kept_as_that_of_the_first(
    predictor, pairs, tmp_path, be_process
):
    images, folder = [pair.image for pair in pairs["train"][:1]], tmp_path / "cache"
    cache = FeatureCache(folder, predictor, torch.float32)
    cache.look_up(images)
    images[0].write_bytes(pairs["train"][1].image.read_bytes())
    cache._encode(images, predictor, "train")
    (written,) = folder.iterdir()
    assert written != cache._path(images[0])
    assert written == FeatureCache(folder, predictor, torch.float32)._path(images[0])


@pytest.mark.parametrize(("rank", "splits"), [(0, ("train", "val")), (1, ("train",))])
def test_only_the_process_that_validates_holds_the_features_of_val(
    predictor, pairs, tmp_path, be_process, rank, splits
):
    open_cache(
        predictor,
        tmp_path / "cache",
        torch.float32,
        {split: [pair.image for pair in found] for split, found in pairs.items()},
    )
    for each in range(rank + 1):  # the first one's word comes first
        be_process(each)
        cache = open_cache(
            predictor,
            tmp_path / "cache",
            torch.float32,
            {split: [pair.image for pair in found] for split, found in pairs.items()},
            "memory",
        )
    held = {cache._path(pair.image) for split in splits for pair in pairs[split]}
    assert cache._held.keys() == held


# ----------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------


def test_steps_show_the_prepared_masks_and_read_no_file(pairs, tmp_path, be_process):
    _, mask = draw_pair(5)
    objects = [mask, np.roll(mask, 20, axis=1) & ~mask, np.roll(mask, 30, axis=0) & ~mask]
    several = write_image_of(objects, tmp_path)
    several.image.write_bytes(pairs["train"][0].image.read_bytes())
    images = [*pairs["train"], several]
    steps = [
        Step(epoch, [3, 0, 2], 1.0, number, [(0, 2), (0,), (0,)])
        for number, epoch in enumerate((1, 1, 2, 2, 3, 3, 4, 4))
    ]
    unprepared = TrainingSet(images, None, 256, 0, EVERYTHING)
    expected = [unprepared[step] for step in steps]
    shown = {(batch.plan.kind == "none", batch.plan.background) for batch in expected}
    assert len(shown) == 3
    sets = []
    for rank in (0, 1):
        be_process(rank)
        sets.append(TrainingSet(images, None, 256, 0, EVERYTHING))
        assert sets[rank].prepare() == {0: 1, 1: 1, 2: 1, 3: 3}
        for pair in images if rank == 0 else ():
            for path in pair.mask_files():
                path.unlink()
    for prepared in sets:
        for step, theirs in zip(steps, expected, strict=True):
            ours = prepared[step]
            assert torch.equal(ours.true_masks, theirs.true_masks)
            assert ours.image_of == theirs.image_of and ours.fraction == theirs.fraction
            for prompts in zip(ours.prompts, theirs.prompts, strict=True):
                assert all(map(np.array_equal, *prompts))


def test_of_an_image_with_many_objects_the_masks_are_read_when_they_are_shown(
    pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "MAX_PREPARED", 2)
    masks = [np.zeros((96, 128), bool) for _ in range(3)]
    for k, mask in enumerate(masks):
        mask[:, 40 * k : 40 * k + 30] = True
    many = write_image_of(masks, tmp_path)
    many.image.write_bytes(pairs["train"][0].image.read_bytes())
    training_set = TrainingSet([many], None, 256, 0)
    assert training_set.prepare() == {0: 3} and not training_set._masks[0].packed
    training_set[Step(1, [0], 1.0, objects=[(1,)])]
    training_set[Step(2, [0], 1.0, objects=[(1, 2)])]
    assert training_set._masks[0].packed.keys() >= {1, 2}


def test_a_mask_that_cannot_be_read_is_said_before_training_in_every_process(pairs, be_process):
    damaged = pairs["train"][1].mask
    damaged.write_bytes(b"no mask")
    for rank in (0, 1):
        be_process(rank)
        with pytest.raises(UserError, match=rf"^{damaged}"):
            TrainingSet(pairs["train"], None, 256, 0).prepare()
