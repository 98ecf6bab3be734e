"""The comparison is fair, complete, and says the number that training said."""

import contextlib
import csv
import io
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import sam2_utils
from sam2_utils import UserError

import numpy as np
import pytest
import torch
from conftest import CPU, snapshot, write_data

import train_sam2_proper
from compare_models import main
from finetuning.basics.image_files import read_image, read_mask, write_image
from finetuning.comparison.figures import choose_figures
from finetuning.comparison.report import format_box, sizes_table, summarize
from finetuning.comparison.tables import print_anywhere
from finetuning.dataset.pairs import Pair
from finetuning.evaluation.interval import bootstrap_interval, format_interval
from finetuning.evaluation.measuring import Result
from finetuning.evaluation.metrics import METRICS
from finetuning.evaluation.seen_images import Overlap
from finetuning.model import loading
from finetuning.model import model as model_module
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.loading import choose_precision, load_models
from finetuning.segmentation.prompts import make_prompt


@pytest.fixture(scope="module")
def training(tmp_path_factory, random_mini) -> tuple[Path, str]:
    """Train for two epochs; return the folder with data/ and output/, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("training"), io.StringIO()
    write_data(folder / "data", train=4, val=4)
    options = ("--model", "mini", "--checkpoint", str(random_mini), "--epochs", "2")
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        train_sam2_proper.main([*options, "--lr", "1e-3"])
    return folder, printed.getvalue()


@pytest.fixture
def trained(training, tmp_path) -> str:
    """Copy that training into the test's folder; return what it printed."""
    folder, printed = training
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return printed


def printed_ious(out: str) -> list[float]:
    """Return the mean IoU of the original and of the fine-tuned model in the table of metrics."""
    return list(map(float, re.search(r"^  IoU +(\S+) +(\S+)", out, re.MULTILINE).groups()))


def read_results() -> list[dict[str, str]]:
    path = Path("output/comparison/results.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def made_up_results(
    original: list[float], finetuned: list[float], areas: list[float] | None = None
) -> list[Result]:
    prompt = make_prompt([(1, 2)])
    areas = areas or [0.1] * len(original)
    return [
        Result(
            i,
            0,
            Pair(str(i), Path(f"{i}.png"), Path(f"{i}.png")),
            "center",
            prompt,
            area,
            [dict.fromkeys(METRICS, iou) for iou in ious],
        )
        for i, (*ious, area) in enumerate(zip(original, finetuned, areas, strict=True))
    ]


def test_the_table_is_the_guides_box():
    results = made_up_results([0.6592, 0.6592], [0.8333, 0.8333])
    assert format_box(summarize(results, "val", Overlap(1))) == (
        "┌────────────────────────────────────────┐\n"
        "│             mean IoU (val)             │\n"
        "├────────────────────────────────────────┤\n"
        "│  original SAM 2:    65.92%             │\n"
        "│  fine-tuned SAM 2:  83.33%             │\n"
        "├────────────────────────────────────────┤\n"
        "│  improvement:       +17.4%p            │\n"
        "└────────────────────────────────────────┘"
    )


def test_the_numbers_are_those_that_training_printed(run_script, trained, random_mini):
    outcome = run_script(main, "--original", random_mini, "--figures", 0)
    assert outcome.status == 0, outcome.err
    before, best = re.search(r"val IoU (\S+) before training, (\S+) at best", trained).groups()
    assert printed_ious(outcome.out) == [float(before), float(best)]

    rows = read_results()
    assert len(rows) == 4
    metrics = ("iou", "dice", "precision", "recall", "boundary_iou", "hd95")
    assert list(rows[0]) == [
        "image", "object", "prompt",
        *(f"{model}_{metric}" for metric in metrics for model in ("original", "finetuned")),
        "area_fraction",
    ]  # fmt: skip
    mean = np.mean([float(row["finetuned_iou"]) for row in rows])
    assert f"{mean:.4f}" == best
    for row in rows:
        iou, dice = float(row["finetuned_iou"]), float(row["finetuned_dice"])
        assert dice == pytest.approx(2 * iou / (1 + iou), abs=1e-4)
        mask = read_mask(Path("data/masks/val", row["image"]).with_suffix(".png"))
        assert float(row["area_fraction"]) == pytest.approx(mask.sum() / mask.size, abs=1e-6)
    better = sum(float(row["finetuned_iou"]) > float(row["original_iou"]) for row in rows)
    assert f"4 images: {better} better" in outcome.out


def test_the_interval_is_that_of_the_mean_gain():
    gains = np.random.default_rng(1).normal(0.05, 0.2, 100)
    low, high = bootstrap_interval(gains, seed=3)
    assert (low, high) == bootstrap_interval(gains, seed=3) != bootstrap_interval(gains, seed=4)
    standard_error = gains.std() / np.sqrt(len(gains))  # for so many, means are all but normal
    expected = gains.mean() - 1.96 * standard_error, gains.mean() + 1.96 * standard_error
    assert (low, high) == pytest.approx(expected, abs=0.1 * standard_error)

    four_times_low, four_times_high = bootstrap_interval(np.tile(gains, 4), seed=3)
    assert four_times_high - four_times_low == pytest.approx((high - low) / 2, rel=0.05)
    low, high = bootstrap_interval(np.full(50, 0.1), seed=3)
    assert low == high == pytest.approx(0.1)


def sentence_on(gains: np.ndarray) -> str:
    return format_interval(gains, seed=42)[1]


def test_the_interval_says_what_to_beware_of():
    spread = np.linspace(-0.1, 0.1, 180)
    clear, unclear = sentence_on(0.08 + spread), sentence_on(spread)
    assert re.fullmatch(
        r"improvement \+8\.0%p, 95% interval \+7\.\d to \+8\.\d "
        r"\(paired bootstrap over 180 images\)",
        clear,
    )
    assert unclear.endswith("; it includes 0, so this could be chance")
    assert "could be chance" not in sentence_on(spread - 0.08)
    assert "with so few images" in sentence_on(0.08 + spread[:5])
    one = sentence_on(np.array([0.5]))
    assert one == "improvement +50.0%p; one image is too few for a confidence interval"


def test_sizes_are_counted_apart():
    results = made_up_results(
        [0.1, 0.2, 0.3, 0.5, 0.7], [0.2, 0.6, 0.8, 0.6, 0.9], [0.01, 0.05, 0.1499, 0.15, 1.0]
    )
    assert sizes_table(results).rows == [
        ["small", "below 5%", "1", "0.1000", "0.2000"],
        ["medium", "5 to 15%", "2", "0.2500", "0.7000"],
        ["large", "15% or more", "2", "0.6000", "0.7500"],
    ]
    assert [row[2:] for row in sizes_table(results[:1]).rows[1:]] == [["0", "-", "-"]] * 2


def test_without_options_original_and_precision_are_those_of_the_training(
    run_script, tmp_path, random_mini
):
    write_data(tmp_path / "data", train=2, val=2)
    options = ("--model", "mini", "--checkpoint", random_mini, "--precision", "bfloat16")
    trained = run_script(train_sam2_proper.main, *options, "--epochs", 1, "--lr", 1e-3).out
    before, best = re.search(r"val IoU (\S+) before training, (\S+) at best", trained).groups()
    outcome = run_script(main, "--figures", 0)
    assert printed_ious(outcome.out) == [float(before), float(best)]
    assert str(random_mini) in outcome.out


def test_the_precision_is_the_one_asked_for_else_that_of_the_training(monkeypatch):
    for device_has_bfloat16 in (True, False):
        monkeypatch.setattr(sam2_utils, "cpu_has_bfloat16", lambda has=device_has_bfloat16: has)
        own = torch.bfloat16 if device_has_bfloat16 else torch.float32
        assert choose_precision("auto", "float32", CPU) == torch.float32
        assert choose_precision("auto", "bfloat16", CPU) == torch.bfloat16
        assert choose_precision("float32", "bfloat16", CPU) == torch.float32
        assert choose_precision("bfloat16", "float32", CPU) == torch.bfloat16
        assert choose_precision("auto", "float16", CPU) == own  # which a CPU cannot
        assert choose_precision("auto", None, CPU) == own
    with pytest.raises(UserError, match="needs CUDA"):
        choose_precision("float16", "float32", CPU)


@pytest.fixture
def loaded(monkeypatch):
    """Let small models be loaded, of a training in bfloat16; return the paths and sizes."""
    found = []
    settings = {"precision": "bfloat16", "checkpoint": __file__, "cache": "of_training"}

    def load(name, path, device, size=None):
        size = size or (512 if path == "best.pt" else 1024)  # of the file itself
        found.append((str(path), size))
        model = torch.nn.Module()
        model.image_encoder, model.image_size = torch.nn.Linear(2, 2), size
        model.sam_prompt_embed_dim = 256
        torch.nn.init.constant_(model.image_encoder.weight, float(path == "with_encoder.pt"))
        torch.nn.init.zeros_(model.image_encoder.bias)
        return Namespace(model=model, device=device), {"model_name": "mini", "settings": settings}

    monkeypatch.setattr(loading, "load_predictor", load)
    return found


def test_models_are_compared_as_the_training_was_unless_asked_otherwise(loaded):
    given = None, CPU, False
    models, files = load_models(["best.pt"], None, *given, "auto", None)
    assert loaded == [("best.pt", 512), (__file__, 512)] and files.image_size == 512
    assert files.original == Path(__file__) and files.finetuned == ["best.pt"]
    assert [model.source.precision for model in models] == [torch.bfloat16] * 2
    assert [model.source.cache.folder for model in models] == [Path("of_training")] * 2
    assert models[0].source is models[1].source

    loaded.clear()
    models, files = load_models(["best.pt"], Path("other.pt"), *given, "float32", Path("mine"))
    assert loaded == [("best.pt", 512), ("other.pt", 512)]
    assert files.original == Path("other.pt")
    assert [model.source.precision for model in models] == [torch.float32] * 2
    assert [model.source.cache.folder for model in models] == [Path("mine")] * 2


def test_a_model_whose_encoder_has_learnt_has_features_of_its_own(loaded):
    models, _ = load_models(["best.pt", "with_encoder.pt"], None, None, CPU, False, "auto", None)
    original, same, other = models
    assert same.source is original.source and other.source.cache is None
    assert other.source.predictor is other.predictor
    encoders = [model.predictor.model.image_encoder for model in models]
    assert encoders[0] is encoders[1] and encoders[0] is not encoders[2]


def test_a_model_compared_with_itself_gains_nothing(run_script, trained):
    outcome = run_script(main, "--original", "output/sam2_best.pt", "--figures", 0)
    assert "improvement:       +0.0%p" in outcome.out
    assert "4 images: 0 better, 4 equal, 0 worse" in outcome.out


@pytest.mark.parametrize("kind", ["center", "random", "box"])
def test_every_kind_of_prompt_is_reproducible_and_recorded(run_script, trained, random_mini, kind):
    options = ("--original", random_mini, "--figures", 0, "--prompt", kind)
    first = run_script(main, *options, "--seed", 3)
    rows = read_results()
    assert run_script(main, *options, "--seed", 3).out == first.out
    assert read_results() == rows
    labels = "2 3" if kind == "box" else "1"
    assert all(re.findall(r":(\d)", row["prompt"]) == labels.split() for row in rows)
    run_script(main, *options, "--seed", 4)
    same = [row["prompt"] for row in read_results()] == [row["prompt"] for row in rows]
    assert same == (kind != "random")


def test_pictures_show_the_biggest_gains_and_losses_only(run_script, trained, random_mini):
    run_script(main, "--original", random_mini, "--figures", 3)
    first = {path.name for path in Path("output/comparison").glob("comparison_*.png")}
    assert len(first) == 3
    mine = Path("output/comparison/comparison_of_mine.png")
    mine.write_bytes(b"the user's own")
    run_script(main, "--original", random_mini, "--figures", 1)
    second = {path.name for path in Path("output/comparison").glob("comparison_*.png")}
    assert len(second - {mine.name}) == 1  # the earlier pictures would pass for this comparison's
    assert mine.read_bytes() == b"the user's own"
    image = read_image(Path("output/comparison") / (second - {mine.name}).pop())
    height, width = image.shape[:2]
    assert width > 2.5 * height  # three panels side by side
    assert image.std() > 20


def test_the_chosen_pictures_are_the_extremes():
    gains = [0.1, -0.4, 0.3, 0.0, 0.5, -0.1]
    results = made_up_results([0.5] * 6, [0.5 + gain for gain in gains])
    assert [of_image[0].pair.name for of_image in choose_figures(results, 3)] == ["4", "2", "1"]
    assert [of_image[0].pair.name for of_image in choose_figures(results, 99)] == list("420351")
    assert choose_figures(results, 0) == []


def test_one_encoding_serves_both_models_only_if_their_encoders_are_equal(
    run_script, trained, random_mini, tmp_path, monkeypatch
):
    encoded = []
    encode_images = model_module.encode_images

    def count(*arguments):
        encoded.append(arguments)
        return encode_images(*arguments)

    monkeypatch.setattr(model_module, "encode_images", count)
    options = ("--original", random_mini, "--figures", 0, "--clean", "off")
    from_cache = run_script(main, *options).out
    assert len(encoded) == 0
    shutil.rmtree(tmp_path / "output/cache")
    together = run_script(main, *options).out
    assert len(encoded) == 4
    assert together == from_cache

    hashes = iter(["one", "another"])  # as if the encoders were different
    monkeypatch.setattr(loading, "hash_encoder", lambda _: next(hashes))
    apart = run_script(main, *options).out  # with features that no cache has rounded
    assert printed_ious(apart) == pytest.approx(printed_ious(together), abs=0.002)
    assert len(encoded) == 4 + 8


def test_a_console_without_box_characters_gets_a_box_all_the_same(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    print_anywhere(format_box(summarize(made_up_results([0.5], [0.75]), "val", Overlap(1))))
    console.flush()
    text = console.buffer.getvalue().decode("ascii")
    assert "|  improvement:       +25.0%p            |" in text
    assert text.startswith("+" + 40 * "-" + "+")


def test_mistakes_end_with_one_clear_line(run_script, trained, random_mini, tmp_path):
    for split in ("train", "val"):
        for path in (tmp_path / "data/masks" / split).iterdir():
            write_image(tmp_path / "empty/masks" / split / path.name, np.zeros((96, 128), np.uint8))
            image = tmp_path / "data/images" / split / f"{path.stem}.jpg"
            write_image(tmp_path / "empty/images" / split / image.name, read_image(image))
    before = snapshot(tmp_path / "output")
    for options, message in (
        (("--finetuned", "absent.pt"), "python train_sam2_proper.py"),
        (("--original", "absent.pt"), "no such checkpoint"),
        (("--model", "tiny"), "use --model mini"),
        (("--split", "trial"), "--split"),
        (("--split", "test"), "data has no test images"),
        (("--prompt", "lasso"), "--prompt"),
        (("--figures", -1), "--figures"),
        (("--limit", 0), "--limit"),
        (("--data", "nowhere"), "python download_dataset.py"),
        (("--data", "empty"), "every mask is empty"),
    ):
        outcome = run_script(main, "--original", random_mini, *options)
        assert outcome.status == 2, options
        last_line = outcome.err.splitlines()[-1]
        assert last_line.startswith("error: ") and message in last_line
    assert snapshot(tmp_path / "output") == before


def test_different_model_sizes_are_not_compared(run_script, trained, tmp_path):
    class Tiny(torch.nn.Module):
        def state_dict(self):
            blocks = {f"image_encoder.trunk.blocks.{i}.x": torch.zeros(1) for i in range(12)}
            return {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(96, 3), **blocks}

    save_checkpoint(tmp_path / "tiny.pt", Tiny())
    outcome = run_script(main, "--original", "tiny.pt")
    assert outcome.status == 2 and "is a SAM 2 tiny checkpoint, not mini" in outcome.err


def test_folds_measure_each_image_once_by_a_model_that_has_not_seen_it(
    run_script, tmp_path, random_mini
):
    write_data(tmp_path / "data", train=4, val=3)
    options = ("--model", "mini", "--checkpoint", random_mini, "--epochs", 2, "--lr", 1e-3)
    outcome = run_script(main, "--folds")
    assert outcome.status == 2 and "train_sam2_proper.py --folds 5" in outcome.err
    assert run_script(train_sam2_proper.main, *options, "--folds", 3).status == 0
    outcome = run_script(main, "--folds", "--original", random_mini, "--figures", 2, "--clicks", 2)
    assert outcome.status == 0, outcome.err
    assert "mean IoU (3 folds)" in outcome.out and "had not seen it" in outcome.out

    rows = {row["image"]: float(row["finetuned_iou"]) for row in read_results()}
    assert sorted(rows) == [f"pair_{index:03}.jpg" for index in range(7)]
    with Path("output/folds.csv").open(encoding="utf-8-sig", newline="") as file:
        folds = list(csv.DictReader(file))
    for number in ("1", "2", "3"):
        with Path(f"output/fold_{number}/train_log.csv").open(encoding="utf-8-sig") as file:
            last = float(list(csv.DictReader(file))[-1]["val_iou"])
        of_fold = [rows[Path(f["image"]).name + ".jpg"] for f in folds if f["fold"] == number]
        assert np.mean(of_fold) == pytest.approx(last, abs=1e-5)

    assert run_script(main, "--folds", "--original", random_mini, "--limit", 1).status == 0
    assert len(read_results()) == 3  # of each fold
    Path("output/fold_2/sam2_final.pt").unlink()
    outcome = run_script(main, "--folds", "--original", random_mini)
    assert outcome.status == 2 and "sam2_final.pt is missing" in outcome.err
    assert run_script(main, "--folds", "--split", "val").status == 2
