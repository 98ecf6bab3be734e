"""The report says the same on the console and on its page, in English and in Korean, to anybody."""

import ast
import hashlib
import io
import locale
import re
import string
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pytest
import torch
from conftest import CPU, write_blank, write_data

import compare_models
from compare_models import main
from finetuning.basics.csv_files import write_with_digest
from finetuning.basics.files import DATASET_URL
from finetuning.basics.image_files import write_image
from finetuning.basics.language import KOREAN, parse_language, use_language
from finetuning.basics.run_outputs import RUN_COLUMNS, RUNS_FILE
from finetuning.comparison import report_sentences
from finetuning.comparison.clicks import clicks_table
from finetuning.comparison.figures import Picture
from finetuning.comparison.report import (
    format_box,
    format_files,
    format_summary,
    metrics_table,
    summarize,
)
from finetuning.comparison.report_page import TEMPLATE, Setup, write_page
from finetuning.comparison.report_sentences import (
    describe_empty,
    empty_sentence,
    runs_sentence,
    split_sentences,
)
from finetuning.comparison.tables import (
    BOX_CHARACTERS,
    WIDE_ENCODINGS,
    Table,
    display_width,
    format_table,
    print_anywhere,
)
from finetuning.dataset.pairs import Pair, facts_text, split_pairs
from finetuning.evaluation.interval import format_interval, group_numbers
from finetuning.evaluation.measuring import Comparison, Result
from finetuning.evaluation.metrics import METRICS
from finetuning.evaluation.seen_images import SEEN, Overlap, hash_files, record_seen
from finetuning.model.checkpoints import save_checkpoint
from finetuning.model.loading import Files
from finetuning.model.model import FeatureSource, Model
from finetuning.model.models import MODELS, is_published, load_predictor
from finetuning.segmentation.prompts import make_prompt

ROOT = Path(__file__).resolve().parents[1]
HARMFUL = "<script>alert(1)</script>\"'&.png"
PAGE = Path("output/comparison/report.html")
UNSEEN = Overlap(4)


def made_up(*objects: tuple[int, float, float], groups: dict[int, str] | None = None):
    """Return results of objects, each (number of its image, IoU before, IoU after)."""
    results = []
    for k, (index, *ious) in enumerate(objects):
        pair = Pair(
            str(index), Path(f"{index}.png"), Path("m.png"), group=(groups or {}).get(index)
        )
        metrics = [{name: 100 * iou if name == "HD95" else iou for name in METRICS} for iou in ious]
        results.append(Result(index, k, pair, "center", make_prompt([(1, 2)]), 0.1, metrics))
    return results


SOME = made_up((0, 0.5, 0.75), (1, 0.5, 0.5), (2, 0.75, 0.25), (3, 0.25, 0.75))


def on_console(monkeypatch, text: str, encoding: str) -> str:
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    print_anywhere(text)
    console.flush()
    return console.buffer.getvalue().decode(encoding)


# What is said


def test_the_metrics_are_a_row_each_with_means_and_medians():
    table = metrics_table(SOME)
    assert [row[0] for row in table.rows] == [
        "IoU", "Dice", "Precision", "Recall", "Boundary IoU", "HD95 (px)",
    ]  # fmt: skip
    assert table.rows[0][1:] == ["0.5000", "0.5625", "0.5000", "0.6250"]
    assert table.rows[-1][1:] == ["50.0", "56.2", "50.0", "62.5"]
    assert table.note == "HD95: in pixels, lower is better"


def test_an_image_with_many_objects_counts_once_among_the_images_medians():
    results = made_up((0, 0.1, 0.2), (0, 0.2, 0.4), (0, 0.9, 0.9), (1, 0.6, 0.8))
    assert metrics_table(results).rows[-1] == [
        "IoU, median per image", "0.4000", "0.6000", "0.4000", "0.6000",
    ]  # fmt: skip
    assert len(metrics_table(SOME).rows) == len(METRICS)
    assert summarize(results, "val", UNSEEN).sentences[0] == (
        "4 objects in 2 images: 3 better, 1 equal, 0 worse"
    )


def test_images_are_counted_and_what_the_split_means_is_said():
    for split, words in (
        ("val", "download_dataset.py --test-fraction 0.1"),
        ("test", "no training has read these images"),
        ("train", "the model was trained on these images"),
    ):
        overlap = Overlap(4, trained_on=4) if split == "train" else UNSEEN
        summary = summarize(SOME, split, overlap)
        assert summary.sentences[0] == "4 images: 2 better, 1 equal, 1 worse"
        assert words in summary.sentences[2] and len(summary.sentences) == 3
        assert split_sentences(split, overlap) == summary.sentences[2:]
        assert f"mean IoU ({split})" in format_box(summary)
        assert "trained on" not in format_box(summary)
    assert "mean IoU (val, single mask)" in format_box(summarize(SOME, "val", UNSEEN, "single"))


@pytest.mark.parametrize("split", ["val", "test", "2 folds"])
def test_what_the_model_has_seen_is_said_in_the_box_and_below_it(split):
    good = ("slightly optimistic", "no training has read", "had not seen it")
    seen = summarize(SOME, split, Overlap(4, trained_on=3, changed_masks=2))
    text = " ".join(seen.sentences)
    assert "the model was trained on 3 of these 4 images" in text
    assert "the masks of 2 of these 4 images have changed" in text
    assert not any(words in text for words in good)
    box = format_box(seen)
    assert "trained on:        3 of 4 images" in box and "masks changed:     2 of 4 images" in box
    assert {len(line) for line in box.splitlines()} == {42}

    unknown = " ".join(split_sentences(split, Overlap(4, is_known=False)))
    assert "it is not known whether" in unknown
    assert not any(words in unknown for words in good[1:])  # of val, the training chose its epoch


def test_a_test_split_that_chose_the_epoch_is_no_test():
    (sentence,) = split_sentences("test", Overlap(4, validated_on=2))
    assert sentence == "the best epoch was chosen on 2 of these 4 images"


def test_images_without_an_object_are_counted_in_a_sentence():
    assert empty_sentence(3, []) == "3 more images have no object and are not measured"
    assert "the original finds something in 2 of them, the fine-tuned model in 1" in (
        empty_sentence(3, [2, 1])
    )


@pytest.mark.parametrize("kind", ["none", "center"])
def test_what_is_found_in_images_without_an_object_is_counted(tmp_path, monkeypatch, kind):
    pairs = [Pair(name, Path(f"{name}.png"), Path("m.png")) for name in "abc"]
    (result,) = made_up((0, 0.1, 0.2))
    comparison = Comparison([], pairs, [result._replace(pair=pairs[0])])
    found = {pairs[1]: [1.0, 0.0], pairs[2]: [1.0, 1.0]}
    monkeypatch.setattr(
        report_sentences, "find_in_empty", lambda _, empty, __: [found[pair] for pair in empty]
    )
    (sentence,) = describe_empty([comparison], kind, "best")
    assert sentence == empty_sentence(2, [2, 1] if kind == "none" else [])
    assert describe_empty([comparison._replace(pairs=pairs[:1])], kind, "best") == []


def test_images_of_one_group_are_drawn_together():
    gains = np.random.default_rng(0).normal(0.05, 0.1, 60)
    objects = [(k, 0.4, 0.4 + gains[k // 3]) for k in range(180)]
    groups = {k: f"patient {k // 3}" for k in range(180)}
    apart, together = made_up(*objects), made_up(*objects, groups=groups)
    assert len(set(group_numbers(apart))) == 180
    assert group_numbers(together).tolist() == [k // 3 for k in range(180)]
    interval = summarize(together, "val", UNSEEN, seed=3).interval
    assert (
        interval
        == format_interval(gains, seed=3)[0]
        != summarize(apart, "val", UNSEEN, seed=3).interval
    )
    assert (
        "paired bootstrap over 180 images in 60 groups"
        in (summarize(together, "val", UNSEEN).sentences[1])
    )
    # An image alone is no group's, whatever that is called
    some = made_up((0, 0, 0), (1, 0, 0), (2, 0, 0), groups={1: "0", 2: "0"})
    assert group_numbers(some).tolist() == [0, 1, 1]
    one = summarize(made_up((0, 0.1, 0.2), (1, 0.1, 0.2), groups={0: "a", 1: "a"}), "val", UNSEEN)
    assert one.interval == "" and one.sentences[1].endswith(
        "; one group of images is too few for a confidence interval"
    )


def test_trainings_with_other_seeds_are_summed_up_in_a_line(tmp_path):
    path = tmp_path / RUNS_FILE
    rows = [(1, 42, 0.59, 0.58), (2, 43, 0.6, 0.6), (3, 44, 0.61, 0.59)]
    write_with_digest(path, RUN_COLUMNS, rows)
    assert runs_sentence(path) == (
        "3 training runs with different seeds: val IoU best 0.6000 ± 0.0100 (0.5900 to 0.6100), "
        "last 0.5900 ± 0.0100; the 95% interval over images does not include this spread"
    )
    assert summarize(SOME, "val", UNSEEN, runs_file=path).sentences[3] == runs_sentence(path)
    assert len(summarize(SOME, "val", UNSEEN, runs_file=tmp_path / "absent.csv").sentences) == 3


def assert_left_out(runs_file: Path) -> None:
    sentence = summarize(SOME, "val", UNSEEN, runs_file=runs_file).sentences[3]
    assert sentence.startswith("warning: ") and "it is left out" in sentence
    assert sentence.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00\xff\xfe", b"a,b\n1,2\n", b"run,seed,best_val_iou,last_val_iou\n",
        b"run,seed,best_val_iou,last_val_iou\n1,42,0.5,0.5\n2,43,0.5,0.5\n",
        b'run,seed,best_val_iou,last_val_iou\n1,42,0.5,"' + b"x" * 200_000 + b'"\n',
    ],
)  # fmt: skip
def test_a_file_of_runs_that_is_damaged_or_foreign_is_left_out_with_a_warning(tmp_path, content):
    path = tmp_path / RUNS_FILE
    path.write_bytes(content)
    sentence = summarize(SOME, "val", UNSEEN, runs_file=path).sentences[3]
    assert sentence.startswith("warning: ") and "it is ignored" in sentence
    assert sentence.isprintable()


# In two languages


class Call(NamedTuple):
    """A call of say(...) in the project's code."""

    where: str
    text: str
    names: set[str]


def calls_of_say() -> list[Call]:
    calls = []
    for path in (ROOT / "compare_models.py", *sorted((ROOT / "finetuning").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "say":
                assert isinstance(node.args[0], ast.Constant), f"{path.name}:{node.lineno}"
                names = {word.arg for word in node.keywords}
                calls.append(Call(f"{path.name}:{node.lineno}", node.args[0].value, names))
    template = jinja2.Environment().parse(TEMPLATE.read_text(encoding="utf-8"))
    for node in template.find_all(jinja2.nodes.Call):
        if getattr(node.node, "name", None) == "say":
            names = {word.key for word in node.kwargs}
            calls.append(Call(f"{TEMPLATE.name}:{node.lineno}", node.args[0].value, names))
    return calls


def placeholders(text: str) -> list[tuple[str, str]]:
    parts = string.Formatter().parse(text)
    return sorted((name, form) for _, name, form, _ in parts if name is not None)


def test_every_text_is_in_korean_with_the_same_placeholders_and_none_is_left_over():
    calls = calls_of_say()
    assert len(calls) > 60
    for call in calls:
        assert call.text in KOREAN, call.where
        names = {name for name, _ in placeholders(call.text)}
        assert None in call.names or names == call.names or names > call.names, call.where
    assert not KOREAN.keys() - {call.text for call in calls}
    for english, korean in KOREAN.items():
        assert placeholders(korean) == placeholders(english), english
        assert english.startswith("\n") == korean.startswith("\n")
        korean.encode("cp949")  # what an old Korean console can show


def test_in_korean_all_lines_of_the_box_and_of_a_table_are_equally_wide():
    assert display_width("한글 IoU") == 8 and display_width("e\u0301") == 1
    results = made_up((0, 0.1, 0.2), (0, 0.2, 0.4), (1, 0.6, 0.8))
    use_language("ko")
    for mask_kind in ("best", "single"):
        summary = summarize(results, "val", UNSEEN, mask_kind)
        lines = format_box(summary).splitlines()
        assert {display_width(line) for line in lines} == {42}
        assert "평균 IoU" in lines[1] and "파인튜닝한 SAM 2" in lines[4]
    table = summary.metrics._replace(note="")
    lines = format_table(table).splitlines()[1:]
    assert any("중앙값" in line for line in lines)
    assert len({display_width(line) for line in lines}) == 1
    assert "신뢰구간" in format_summary(summary)


def test_where_box_characters_may_be_wide_or_lacking_the_box_is_ascii(monkeypatch):
    for language in ("ko", "en"):
        use_language(language)
        text = format_summary(summarize(SOME, "val", UNSEEN)) + "\n±"
        for encoding in (*sorted(WIDE_ENCODINGS), "ms949"):
            shown = on_console(monkeypatch, text, encoding)
            assert not set(BOX_CHARACTERS) & set(shown)
            assert len({display_width(line) for line in shown.splitlines()[:8]}) == 1
            assert "±" in shown
        assert "┌" in on_console(monkeypatch, text, "utf-8")
        assert on_console(monkeypatch, text, "utf-8").rstrip() == text
    text = format_box(summarize(SOME, "val", UNSEEN)) + "\n0.1 ± 0.2"
    assert "+/-" in on_console(monkeypatch, text, "ascii")


def test_the_language_is_that_of_the_system_where_the_console_can_show_it(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", console)
    for variables, code in (
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "en_US.UTF-8", "LC_ALL": "ko_KR.eucKR"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": ""}, "ko"),
        ({"LANG": "kok_IN"}, "en"),  # Konkani
    ):
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert parse_language("auto") == code, variables
        assert parse_language("ko") == "ko" and parse_language("en") == "en"

    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for found, code in (
        (("Korean_Korea", "949"), "ko"),
        (("en_US", None), "en"),
        ((None,) * 2, "en"),
    ):
        monkeypatch.setattr(locale, "getlocale", lambda found=found: found)
        assert parse_language("auto") == code
    monkeypatch.setenv("LANG", "ko_KR.UTF-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert parse_language("auto") == "en"


def test_what_is_compared_is_said_first():
    files = Files("mini", Path("a.pt"), [Path("b.pt")], [{"epoch": 0}], 256)
    text = format_files(files, Path("images"), True)
    assert text.splitlines() == [
        "original:   a.pt",
        "fine-tuned: b.pt (SAM 2.1 mini)",
        "            identical to the original: no epoch of the training was better",
        "images:     images (the test split is the default where there is one; "
        "--split val: the validation split)",
    ]
    use_language("ko")
    korean = format_files(files._replace(facts=[{}]), Path("images"), False).splitlines()
    assert korean == ["원본:     a.pt", "파인튜닝: b.pt (SAM 2.1 mini)", "이미지:   images"]


def test_it_is_said_whether_the_original_is_the_published_one(tmp_path, monkeypatch):
    file = tmp_path / "small.pt"
    file.write_bytes(b"weights")
    assert is_published(file, "small") is False and is_published(file, "mini") is None
    own = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(MODELS, "small", MODELS["small"]._replace(sha256=own))
    assert is_published(file, "small") is True
    files = Files("small", Path("a.pt"), [Path("b.pt")], [{}], 1024, is_published=True)
    first = format_files(files, Path("images"), False).splitlines()[0]
    assert first == "original:   a.pt (SAM 2.1 small, as published)"
    foreign = format_files(files._replace(is_published=False), Path("images"), False)
    assert foreign.startswith("original:   a.pt (not the published file of SAM 2.1 small)")


# The page


class Reader(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.open = "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture
def model(random_mini) -> Model:
    predictor, _ = load_predictor("mini", random_mini, CPU)
    return Model(predictor, FeatureSource(predictor, torch.float32))


@pytest.fixture
def make_page(tmp_path, model, random_mini):
    """Return a function that writes a page of SOME, with some pictures, and reads it."""

    def make(pictures=(), clicks=None, data="data", facts=None, results=SOME) -> Reader:
        for name in ("scatter.png", *(["clicks.png"] if clicks else [])):
            write_blank(tmp_path / name)
        files = Files("mini", random_mini, [random_mini], [facts or {}], 256)
        command = ["compare_models.py", "--data", data]
        setup = Setup(Path(data), "val", "box", "best", 42, command)
        summary = summarize(results, "val", UNSEEN)
        write_page(tmp_path, summary, files, model, setup, clicks, pictures)
        return Reader((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def write_picture(path: Path, name: str, gain: float, size=(40, 120)) -> Picture:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    write_image(path, noise)
    return Picture(path, name, (0.5, 0.5 + gain))


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_has_the_numbers_that_are_printed(make_page, language):
    use_language(language)
    table = clicks_table(np.array([[[0.2, 0.4]], [[0.6, 0.88]]]), True, "image")
    page = make_page(clicks=table)
    summary = summarize(SOME, "val", UNSEEN)
    assert page.all("html") == [{"lang": language}]
    for text in (summary.original, summary.finetuned, summary.improvement, summary.interval):
        assert text in page.words and text in format_summary(summary)
    for sentence in summary.sentences:
        assert sentence in page.words
    for shown in (summary.metrics, summary.sizes, table):
        assert is_in(shown, page.words)
        assert not is_in(shown._replace(rows=[[*shown.rows[0][:-1], "0.1234"]]), page.words)
    assert len(page.all("img")) == 2
    assert len(page.all("h1")) == 1


def is_in(table: Table, words: str) -> bool:
    rows = [" ".join(row) for row in table.rows]
    return table.title in words and table.note in words and all(row in words for row in rows)


def test_the_page_needs_nothing_but_itself(make_page, tmp_path):
    pictures = [write_picture(tmp_path / f"{k}.png", f"{k}.jpg", -k / 20) for k in range(4)]
    page = make_page(pictures)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "srcset", "data", "poster", "background"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), tag
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    assert len(page.all("img")) == 1 + 4
    assert all(image["alt"] and image["width"] and image["height"] for image in page.all("img"))


def test_names_of_files_do_no_harm(make_page, tmp_path):
    picture = write_picture(tmp_path / "a.png", HARMFUL, 0.1)
    facts = {"epoch": 3, "settings": {HARMFUL: HARMFUL, "lr": 0.1, "x": None, "y": [1, "\u202e"]}}
    page = make_page([picture], data=HARMFUL, facts=facts)
    assert not page.all("script")
    assert page.text.count(HARMFUL) >= 5
    assert page.all("img")[1]["alt"].startswith(HARMFUL)
    assert "\u202e" not in page.text  # nor do they turn the text round
    assert page.words.count("x -") == 1
    for settings in ("text", [1], None, {}):
        assert "Training settings" not in make_page(facts={"settings": settings}).text
    lone = make_page([picture._replace(name="\udcff.png")])  # a name that is no UTF-8
    assert r"\udcff.png" in lone.text


def test_many_large_pictures_stay_below_ten_megabytes(make_page, tmp_path):
    """Noise is the worst that JPEG can get; only the five best and the five worst are shown."""
    worst = write_picture(tmp_path / "noise.png", "", 0, (1300, 1300)).path
    pictures = [Picture(worst, f"image {k:02}", (0.5, 0.9 - k / 20)) for k in range(13)]
    page = make_page(pictures)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    shown = re.findall(r"image (\d\d) IoU 0.50 → 0\.\d\d \((\S+)%p\)", page.words)
    assert [int(name) for name, _ in shown] == [0, 1, 2, 3, 4, 12, 11, 10, 9, 8]
    assert shown[0][1] == "+40.0" and shown[5][1] == "-20.0"
    assert all(int(image["width"]) <= 1200 for image in page.all("img"))


def test_the_data_set_is_cited_only_where_it_was_used(make_page, tmp_path):
    for source, is_cited in ((DATASET_URL, True), ("my.zip", False)):
        (tmp_path / "split.json").write_text(facts_text({"source": source}), encoding="utf-8")
        page = make_page(data=str(tmp_path))
        assert ("Jha" in page.text) == is_cited
        assert "Ravi" in page.text and "arXiv:2408.00714" in page.text


# The whole


@pytest.fixture
def trained(run_script, tmp_path, random_mini):
    """Write a test split too and, as if trained, a model whose decoder alone is another one."""
    write_data(tmp_path / "data", train=1, val=2)
    for folder in ("images", "masks"):
        source = tmp_path / "data" / folder / "val"
        target = tmp_path / "data" / folder / "test"
        target.mkdir()
        first = min(source.iterdir())
        (target / f"a & b's{first.suffix}").write_bytes(first.read_bytes())
    model = load_predictor("mini", random_mini, CPU)[0].model
    with torch.no_grad():
        for weight in model.sam_mask_decoder.output_hypernetworks_mlps.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    train = split_pairs(tmp_path / "data", "train")
    settings = {
        "lr": 0.125,
        SEEN: record_seen({"train": train, "val": []}, hash_files(train), before=[]),
    }
    save_checkpoint(tmp_path / "output/sam2_best.pt", model, epoch=2, settings=settings)
    return "--original", random_mini


def test_images_for_a_test_are_compared_where_there_are_any(run_script, trained):
    outcome = run_script(main, *trained, "--language", "en")
    assert outcome.status == 0, outcome.err
    assert "mean IoU (test)" in outcome.out and "--split val" in outcome.out
    assert "test: no training has read these images" in outcome.out
    assert "one image is too few" in outcome.out
    outcome = run_script(main, *trained, "--language", "en", "--split", "val")
    assert "mean IoU (val)" in outcome.out and "--split val" not in outcome.out


def test_the_page_of_a_comparison_says_what_the_console_says(run_script, trained):
    options = (*trained, "--split", "val", "--clicks", 2, "--figures", 2)
    outcome = run_script(main, *options, "--language", "ko")
    assert outcome.status == 0, outcome.err
    page = Reader(PAGE.read_text(encoding="utf-8"))
    printed = outcome.out.split("└")[1].splitlines()[1:]
    for line in filter(None, printed[:-1]):
        if re.search(r"\d", line):  # not of a header, whose cells may have two lines
            assert " ".join(line.split()) in page.words
    assert len(page.all("img")) == 4
    assert "--language ko" in page.text and "0.125" in page.text and "에폭 2" in page.text
    assert re.search(r"[0-9a-f]{64}", page.text)
    assert "학습에 쓴 이미지" in page.text and "2장 중 0장" in page.text

    Path("output/sam2_best.pt").with_name(RUNS_FILE).write_bytes(b"\xff")
    outcome = run_script(main, *options, "--language", "en")
    assert outcome.status == 0 and "warning: " in outcome.out
    assert "IoU  " in outcome.out


def test_a_language_that_is_not_there_ends_with_one_line(run_script):
    outcome = run_script(main, "--language", "fr")
    assert outcome.status == 2 and outcome.err.startswith("error: ")
    assert "must be auto, en or ko, not fr" in outcome.err and outcome.err.count("\n") == 1


def test_what_stays_of_an_interrupted_comparison_is_not_an_earlier_page(
    run_script, trained, monkeypatch
):
    assert run_script(main, *trained).status == 0
    assert PAGE.is_file()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare_models, "draw_comparisons", fail)
    assert run_script(main, *trained).status == 2
    assert not PAGE.exists()
