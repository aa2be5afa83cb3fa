"""Reports and comparisons as a reader finds them: one file each, and true."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from predicted import NAMES, predictions, some_answers
from test_report import Reader

from tokenlabel.cli import evaluate as tl_eval
from tokenlabel.evaluator import metrics
from tokenlabel.evaluator.compare import compare
from tokenlabel.evaluator.predictions import Predictions
from tokenlabel.evaluator.report import (
    confident_mistakes,
    reliability_diagram,
    verdict,
    write_comparison,
    write_report,
)
from tokenlabel.evaluator.sheets import right_names


def photos(keys: Sequence[str]) -> dict[str, Image.Image]:
    """Photos whose width tells which they are; the first is gone."""
    return {key: Image.new("RGB", (320, 40 + int(key.split("/")[1]))) for key in keys[1:]}


def report_of(one: Predictions, folder: Path) -> Reader:
    page, _ = write_report(one, folder, found=metrics.measure(one), photos=photos)
    return Reader(page)


# -------------------------------------------------------------------------------- one checkpoint


def test_the_report_holds_every_number_with_its_interval(tmp_path):
    one = predictions(*some_answers(60), heads=3)
    reader = report_of(one, tmp_path)
    for head in metrics.measure(one).heads.values():
        for value, low, high in (head.top1, head.top5, head.ece):
            assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in reader.words
        assert f"{head.loss.value:.4f} [{head.loss.low:.4f}, " in reader.words


def test_the_report_needs_nothing_else(tmp_path):
    reader = report_of(predictions(*some_answers(60)), tmp_path)
    assert reader.addresses and all(a.startswith("data:image/jpeg;") for a in reader.addresses)
    assert not reader.tags & {"script", "link", "iframe"}


def test_a_class_name_cannot_break_the_page(tmp_path):
    one = replace(
        predictions(*some_answers(60)), class_names=["<b>&\"'", *NAMES[1:8]], facts={"model": "<i>"}
    )
    reader = report_of(one, tmp_path)
    assert "<b>&\"'" in reader.words and "<i>" in reader.words


def test_confident_mistakes_are_the_surest_wrong_answers():
    probs, classes = some_answers(60)
    wrong = sorted((-row.max(), i) for i, row in enumerate(probs) if row.argmax() != classes[i])
    expected = [f"photo/{i}" for _, i in wrong[:5]]
    assert confident_mistakes(predictions(probs, classes), 5) == expected


def test_mistakes_are_shown_with_answers_and_the_right_class(tmp_path):
    one = predictions(*some_answers(60))
    reader = report_of(one, tmp_path)
    keys = confident_mistakes(one, 12)
    assert [image.height for image in reader.images] == [
        40 + int(k.split("/")[1]) for k in keys[1:]
    ]
    assert reader.captions.count("model") == 12
    assert f"{keys[0]} (no photo)" in reader.captions
    text = (tmp_path / "report.html").read_text()
    cards = text.split('<div class="card">')[1:]
    for key, card in zip(keys, cards, strict=True):
        (right,) = right_names(one, key)
        row = one.keys.index(key)
        assert f"<h3>{right}</h3>" in card
        top = one.heads["model"]
        assert f"{NAMES[top.top_classes[row, 0]]}</span><span>{top.top_probs[row, 0]:.1%}" in card
        bold = re.findall(r'<li class="right">.*?<span>(\w+)</span>', card)
        assert bold == ([right] if NAMES.index(right) in top.top_classes[row] else [])


def test_worst_and_best_classes_are_apart_where_there_are_many(tmp_path):
    rng = np.random.default_rng(0)
    probs = rng.random((120, 30))
    probs /= probs.sum(1, keepdims=True)
    classes = np.where(np.arange(120) < 40, probs.argmax(1), rng.integers(0, 30, 120))
    one = replace(predictions(probs, classes), class_names=[f"class {i}" for i in range(30)])
    report_of(one, tmp_path)
    rows = metrics.per_class(one)
    lines = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [line["name"] for line in lines] == [row.name for row in rows]
    text = (tmp_path / "report.html").read_text()
    _, worst, best = re.split("<h3>Worst</h3>|<h3>Best</h3>", text.split("Most confused")[0])
    shares = {row.name: row.top1.value for row in rows}
    for part, expected in ((worst, sorted(shares.values())), (best, sorted(shares.values())[::-1])):
        shown = re.findall(r"<tr><td>(class \d+)</td>", part)
        assert [shares[name] for name in shown] == expected[:10]


def test_a_perfect_model_has_a_report_too(tmp_path):
    reader = report_of(predictions(np.eye(3) * 0.8 + 0.1, np.arange(3)), tmp_path)
    assert "There is no mistake." in reader.words
    assert "No image is named wrongly." in reader.words
    assert not reader.images


def test_what_does_not_count_is_said(tmp_path):
    probs, classes = some_answers(30)
    valid = [(int(c),) if i % 3 else () for i, c in enumerate(classes)]
    one = replace(
        predictions(probs, np.where(np.arange(30) % 3, classes, -1), valid=valid),
        unreadable={"photo/torn": "cut off"},
    )
    reader = report_of(one, tmp_path)
    assert "20 images of photos" in reader.words
    assert "10 images without a known class" in reader.words
    assert "1 image could not be read" in reader.words
    assert "photo/torn: cut off" in reader.words
    assert "several right classes" in reader.words


def test_bars_of_the_reliability_diagram_are_as_high_as_accuracy():
    bins = metrics.reliability(predictions(*some_answers(200)))
    drawn = re.findall(
        r'<rect [^>]*y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="var\(--a\)"',
        reliability_diagram(bins),
    )
    filled = [each for each in bins if each.num_images]
    heights = [float(height) for _, height in drawn]
    (floor,) = {round(float(y) + float(height)) for y, height in drawn}
    assert heights == pytest.approx([(floor - 10) * each.accuracy for each in filled], abs=0.1)


# ------------------------------------------------------------------------------ two checkpoints


def test_a_comparison_shows_both_answers_to_what_one_gets_right(tmp_path):
    a, b = (predictions(*some_answers(40, seed=seed)) for seed in (1, 2))
    found = compare(a, b)
    write_comparison(a, b, tmp_path / "compare.html", found=found, photos=photos)
    reader = Reader(tmp_path / "compare.html")
    assert f"Only A is right: {len(found.only_a)} images" in reader.words
    assert f"Only B is right: {len(found.only_b)} images" in reader.words
    num_shown = min(len(found.only_a), 12) + min(len(found.only_b), 12)
    assert reader.captions.count("A") == reader.captions.count("B") == num_shown
    assert len(reader.images) == num_shown - 2
    value, low, high = found.differences["top1"]
    assert f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" in reader.words
    assert verdict(found) in reader.words


def test_the_verdict_names_the_better_one_only_where_luck_is_unlikely():
    a = predictions(*some_answers(200, seed=1, skill=1.0))
    b = predictions(*some_answers(200, seed=2, skill=4.0))
    assert verdict(compare(a, b)).startswith("B is better than A in top-1: only A is right on ")
    assert verdict(compare(b, a)).startswith("A is better than B")
    assert verdict(compare(a, a)).startswith("Neither is shown to be better")


# -------------------------------------------------------------------------------------- commands


def run(*arguments: object) -> tuple[int, str, str]:
    words = ["compare", *map(str, arguments)]
    result = CliRunner().invoke(tl_eval, words, prog_name="tl-eval")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.npz", tmp_path / "b.json"
    for seed, path in enumerate(paths):
        predictions(*some_answers(40, seed=seed), heads=2).save(path)
    return paths


def test_predictions_are_compared_by_the_command(files, tmp_path):
    code, text, errors = run(*files, "--report", tmp_path / "out", "--json", tmp_path / "c.json")
    assert code == 0
    found = compare(*(Predictions.load(path) for path in files))
    assert verdict(found) in text
    assert json.loads((tmp_path / "c.json").read_text())["p_value"] == found.p_value
    assert "tl-eval compare: no photos are shown: " in errors
    assert (tmp_path / "out" / "compare.html").is_file()


def test_heads_are_compared_by_the_command(files):
    code, text, _ = run(files[0], files[0], "--head-b", "head1", "--json", "-")
    one = Predictions.load(files[0])
    assert code == 0
    assert json.loads(text)["b"]["top1"] == metrics.measure(one).heads["head1"].top1.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "none.npz"], "none.npz does not exist; tl-eval --predict none.npz writes it"),
        (["A", "best.pt"], "best.pt is a checkpoint: give the --data to look at"),
        (["A", "B", "--image-size", "32"], "--image-size is for checkpoints"),
        (["A", "B", "--model-b", "vit"], "--model-b is for checkpoints"),
        (["A", "B", "--head-a", "dense"], "A has no head 'dense'; it has model, head1"),
        (["A", "B", "--json", "no/x.json"], "--json no/x.json: the folder no is missing"),
    ],
)
def test_mistakes_are_one_line(files, arguments, message):
    code, _, errors = run(*[{"A": files[0], "B": files[1]}.get(word, word) for word in arguments])
    assert code == 2 and errors.startswith("tl-eval compare: ") and errors.count("\n") == 1
    assert message in errors


def test_an_unknown_command_is_named():
    result = CliRunner().invoke(tl_eval, ["tabel"])
    assert result.exit_code == 2
    assert "no such command 'tabel'; there are compare, table, or options" in result.stderr


def test_help_lists_options_and_the_commands_below():
    text = CliRunner().invoke(tl_eval, ["--help"]).stdout
    assert "--checkpoint" in text
    assert re.search(r"\n  compare +Say whether", text) and re.search(r"\n  table +Evaluate", text)
    below = CliRunner().invoke(tl_eval, ["table", "--help"], prog_name="tl-eval").stdout
    assert below.startswith("Usage: tl-eval table [OPTIONS] [PLAN]")
