"""report.html: how good a checkpoint is, and what two of them do differently, one file each."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..labeler.folder import replace_file
from ..labeler.verify import Interval
from ..trainer import page
from . import metrics
from .compare import Comparison
from .metrics import Bin, ClassMetrics, HeadMetrics, Metrics, wilson
from .predictions import MODEL, Predictions
from .sheets import card

REPORT = "report.html"
CLASSES = "classes.csv"
COMPARISON = "compare.html"

Photos = Callable[[Sequence[str]], Mapping[str, Image.Image]]
"""Finds photos by their keys."""

MEANINGS = {
    "top1": ("top-1, %", 2),
    "top5": ("top-5, %", 2),
    "loss": ("loss, nats", 4),
    "ece": ("calibration error, points", 2),
    "adaptive_ece": ("the same, adaptive", 2),
    "confidence": ("mean confidence, %", 2),
}
"""What people read for the fields of HeadMetrics, and digits behind the point."""

HEADS = {
    MODEL: "the model's own answer",
    "class": "the class head alone",
    "dense_mean": "the dense head, mean over the tokens",
    "dense_max": "the dense head, maximum over the tokens",
    "published": "class head + half of the dense maximum, as published",
}

_SIGNIFICANT = 0.05
_NUM_PHOTOS = 12
_NUM_ROWS = 10
_MOST_SMALL = 20  # classes, all of which fit into one table
_WIDTH, _LEFT, _BOTTOM, _LOW = 420, 48, 250, 320  # of the diagram: right, axes, lower end


def write_report(
    predictions: Predictions, folder: Path, *, found: Metrics, photos: Photos | None = None
) -> list[Path]:
    """Write report.html and classes.csv into a folder, replacing earlier ones.

    Args:
        predictions: Of a whole set.
        folder: Made if it is not there.
        found: What metrics.measure found in them.
        photos: Without it no photo is shown.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = metrics.per_class(predictions)
    sections = [
        _opening(predictions, found),
        _heads(found),
        _calibration(predictions),
        _classes(classes),
        _confusions(predictions),
        _mistakes(predictions, photos),
        _facts(predictions),
    ]
    title = f"Evaluation of {name_of(predictions)}"
    report, table = folder / REPORT, folder / CLASSES
    replace_file(table, metrics.classes_csv(classes).encode("utf-8", errors="surrogateescape"))
    replace_file(report, page.page(title, sections).encode("utf-8", errors="replace"))
    return [report, table]


def name_of(predictions: Predictions) -> str:
    """Name what was evaluated, as far as the predictions say."""
    return str(predictions.facts.get("model", "a model"))


def count_images(number: int) -> str:
    """Write a number of images in words."""
    return f"{number:,} image{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------- one checkpoint


def _opening(predictions: Predictions, found: Metrics) -> str:
    facts = predictions.facts
    parts = [page.title(f"Evaluation of {name_of(predictions)}")]
    top1 = found.heads[MODEL].top1
    data = f" of {facts['data']}" if "data" in facts else ""
    words = f"{top1.value:.2f} % of {count_images(found.num_images)}{data} are named rightly"
    words += f" (95 % interval {top1.low:.2f} to {top1.high:.2f} %)."
    parts.append(page.text(words))
    if found.num_unlabelled:
        parts.append(
            page.text(f"{count_images(found.num_unlabelled)} without a known class do not count.")
        )
    if predictions.valid is not None:
        parts.append(
            page.text("Images may have several right classes; an answer is right if it is any.")
        )
    if predictions.unreadable:
        parts.append(
            page.text(
                f"{count_images(len(predictions.unreadable))} could not be read; see the end."
            )
        )
    return "\n".join(parts)


def _heads(found: Metrics) -> str:
    rows = [
        [words, *(with_interval(head, field) for head in found.heads.values())]
        for field, (words, _) in MEANINGS.items()
    ]
    words = (
        "In brackets: where the number would lie 95 times of 100 had other images of the same kind "
        "been drawn (bootstrap over images). The calibration error is by how many points "
        "confidence and share of right answers differ, on average over 15 bins of confidence; "
        "adaptive: bins of equally many images."
    )
    names = ["", *(HEADS.get(name, name) for name in found.heads)]
    return page.section("The numbers", page.columns(names, rows), page.text(words))


def with_interval(head: HeadMetrics, field: str) -> str:
    """Write a number with its interval, as 83.30 [83.00, 83.60]."""
    _, digits = MEANINGS[field]
    return in_words(getattr(head, field), digits)


def in_words(interval: Interval, digits: int = 2, *, sign: str = "") -> str:
    """Write a value with its interval; sign "+" marks differences."""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def _calibration(predictions: Predictions) -> str:
    charts = [
        '<figure style="max-width:32rem">'
        f"<figcaption><b>{escape(HEADS.get(name, name))}</b></figcaption>"
        f"{reliability_diagram(metrics.reliability(predictions, name))}</figure>"
        for name in predictions.heads
    ]
    words = (
        "Bars: of the answers with this confidence, how many are right, with a 95 % interval. On "
        "the dashed line confidence can be taken at its word; below it the model is too sure. "
        "Underneath: how the answers spread over confidence."
    )
    return page.section(
        "Can its confidence be believed?",
        page.text(words),
        f'<div class="charts">{"".join(charts)}</div>',
    )


def _classes(classes: Sequence[ClassMetrics]) -> str:
    words = f"All classes stand in {CLASSES} beside this page."
    by_share = sorted(classes, key=lambda row: (row.top1.value, row.top1.high, row.index))
    if len(classes) <= _MOST_SMALL:
        tables = [page.text("From the worst to the best."), _class_table(by_share)]
    else:
        best = sorted(classes, key=lambda row: (-row.top1.value, -row.top1.low, row.index))
        tables = [
            "<h3>Worst</h3>",
            _class_table(by_share[:_NUM_ROWS]),
            "<h3>Best</h3>",
            _class_table(best[:_NUM_ROWS]),
        ]
    return page.section("Classes", *tables, page.text(words))


def _class_table(rows: Sequence[ClassMetrics]) -> str:
    names = ["class", "most often instead", "images", "top-1, %", "top-5, %", "precision, %"]
    return page.columns(
        names,
        [
            [
                row.name,
                f"{row.instead} ({row.num_instead})" if row.instead else "",
                f"{row.num_images:,}",
                in_words(row.top1, 1),
                f"{row.top5:.1f}",
                "never named" if math.isnan(row.precision) else f"{row.precision:.1f}",
            ]
            for row in rows
        ],
        num_words=2,
    )


def _confusions(predictions: Predictions) -> str:
    pairs = metrics.confusions(predictions, most=2 * _NUM_ROWS)
    if not pairs:
        return page.section("Most confused", page.text("No image is named wrongly."))
    names = predictions.class_names
    rows = [
        [
            names[pair.right],
            names[pair.answer],
            f"{pair.num_images:,}",
            f"{pair.share:.1f}",
            f"{pair.confidence:.1f}",
        ]
        for pair in pairs
    ]
    heading = ["class", "answer", "images", "of the class, %", "mean confidence, %"]
    return page.section("Most confused", page.columns(heading, rows, num_words=2))


def confident_mistakes(predictions: Predictions, most: int) -> list[str]:
    """List the keys of images that the model is surest to name rightly, but does not."""
    counted = metrics.counted_images(predictions)
    scores = counted.heads[MODEL]
    wrong = ~metrics.right_answers(counted, scores)[:, 0]
    order = np.argsort(-scores.top_probs[:, 0], kind="stable")
    return [counted.keys[i] for i in order[wrong[order]][:most]]


def _mistakes(predictions: Predictions, photos: Photos | None) -> str:
    keys = confident_mistakes(predictions, _NUM_PHOTOS)
    heading = "Confident mistakes"
    if not keys:
        return page.section(heading, page.text("There is no mistake."))
    words = "The wrong answers that the model is surest of. Bold: the right class, where it stands "
    words += "among the first five. Some of these are mistakes of the labels."
    found = photos(keys) if photos else {}
    cards = [card(key, found.get(key), {"model": predictions}) for key in keys]
    return page.section(heading, page.text(words), page.cards(cards))


def _facts(predictions: Predictions) -> str:
    facts = {name.replace("_", " "): _plain(value) for name, value in predictions.facts.items()}
    parts = [page.table(facts)]
    if predictions.unreadable:
        lines = [f"{key}: {reason}" for key, reason in predictions.unreadable.items()]
        parts.append(
            page.details(f"{count_images(len(lines))} that could not be read", "\n".join(lines))
        )
    return page.section("Facts", *parts)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------ two checkpoints


def write_comparison(
    a: Predictions,
    b: Predictions,
    path: Path,
    *,
    found: Comparison,
    head_a: str = MODEL,
    head_b: str = MODEL,
    photos: Photos | None = None,
) -> None:
    """Write a page with the numbers of both, their differences, and photos that tell them apart.

    Args:
        a: What B is compared with.
        b: Of the same images.
        path: An .html.
        found: What compare.compare found.
        head_a: Whose answers of A were compared.
        head_b: Whose answers of B were compared.
        photos: Without it no photo is shown.
    """
    answers, heads = {"A": a, "B": b}, {"A": head_a, "B": head_b}
    parts = [page.title("A and B compared"), page.text(verdict(found))]
    parts.append(page.table({name: described(answers[name], heads[name]) for name in answers}))
    if found.num_left_out:
        parts.append(page.text(f"{found.num_left_out:,} images that only one has are left out."))
    sections = ["\n".join(parts), _differences(found), _changes(found)]
    for name, other, keys in (("A", "B", found.only_a), ("B", "A", found.only_b)):
        shown = keys[:_NUM_PHOTOS]
        pictures = photos(shown) if photos else {}
        cards = page.cards(card(key, pictures.get(key), answers, heads=heads) for key in shown)
        words = f"{name} is right and {other} is wrong; first where both are sure."
        heading = f"Only {name} is right: {count_images(len(keys))}"
        sections.append(page.section(heading, page.text(words), cards) if keys else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.page("A and B compared", sections).encode("utf-8", errors="replace"))


def verdict(found: Comparison) -> str:
    """Say in a sentence whether one of two is better."""
    test = "exact" if found.is_exact else "chi² with continuity correction"
    counts = (
        f"only A is right on {count_images(len(found.only_a))}, only B on {len(found.only_b):,}"
    )
    p_value = f"p = {found.p_value:.2g}, McNemar's test, {test}"
    if found.p_value >= _SIGNIFICANT:
        return f"Neither is shown to be better in top-1: {counts}; {p_value}."
    better, worse = ("B", "A") if len(found.only_b) > len(found.only_a) else ("A", "B")
    return f"{better} is better than {worse} in top-1: {counts}; {p_value}."


def described(predictions: Predictions, head: str = MODEL) -> str:
    """Say in a line what was evaluated, as far as the predictions know."""
    facts = predictions.facts
    names = ("model", "checkpoint", "data", "split", "labels", "subset")
    parts = [str(facts[name]) for name in names if facts.get(name)]
    if "weights" in facts:
        parts.append(f"{facts['weights']} weights")
    if "view" in facts:
        parts.append("{} × {} px".format(*facts["view"]["image_size"]))
    if head != MODEL:
        parts.append(HEADS.get(head, head))
    return " · ".join(parts) or f"predictions of {count_images(len(predictions))}"


def _differences(found: Comparison) -> str:
    rows = [
        [
            words,
            with_interval(found.a, field),
            with_interval(found.b, field),
            in_words(found.differences[field], digits, sign="+"),
        ]
        for field, (words, digits) in MEANINGS.items()
    ]
    counts = {
        "both right": found.num_both,
        "only A right": len(found.only_a),
        "only B right": len(found.only_b),
        "neither right": found.num_neither,
        "same first answer": in_words(found.agreement, 1) + " %",
    }
    words = "In brackets: 95 % intervals, for the differences from pairs (bootstrap over images)."
    heading = f"The numbers, on {count_images(found.num_images)}"
    table = page.columns(["", "A", "B", "B less A"], rows)
    return page.section(heading, table, page.text(words), page.table(counts))


def _changes(found: Comparison) -> str:
    if not found.classes:
        return ""
    rows = [
        [
            change.name,
            f"{change.num_images:,}",
            f"{change.top1_a:.1f}",
            f"{change.top1_b:.1f}",
            f"{change.top1_b - change.top1_a:+.1f}",
        ]
        for change in found.classes[: 2 * _NUM_ROWS]
    ]
    heading = ["class", "images", "A, top-1 %", "B, top-1 %", "B less A"]
    words = f"{len(found.classes):,} classes differ; first where most images do."
    return page.section("Classes", page.text(words), page.columns(heading, rows))


# -------------------------------------------------------------------------------------- diagram


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Draw accuracy over confidence as SVG, and below it how many answers each bin holds."""
    total = sum(each.num_images for each in bins)
    most = max(each.num_images for each in bins)
    marks = [
        f'<path d="M{_x(0.0)} {_y(tick):.1f}H{_x(1.0)}" class="grid"/>'
        f'<text x="{_x(0.0) - 7}" y="{_y(tick) + 4:.1f}" class="tick end">{tick:.0%}</text>'
        f'<text x="{_x(tick):.1f}" y="{_BOTTOM + 17}" class="tick middle">{tick:.0%}</text>'
        for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    marks += [_bar(each, most) for each in bins if each.num_images]
    marks += [
        f'<path d="M{_x(0.0)} {_y(0.0)}L{_x(1.0)} {_y(1.0)}" fill="none" stroke="var(--soft)" '
        'stroke-dasharray="5 4"/>',
        f'<text x="{_x(0.5)}" y="{_LOW + 17}" class="tick middle">confidence of '
        f"{count_images(total)}; the fullest bin holds {most / total:.0%}</text>",
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_LOW + 26}" role="img" '
        f'aria-label="Share of right answers over confidence">{"".join(marks)}</svg>'
    )


def _x(confidence: float) -> float:
    return _LEFT + confidence * (_WIDTH - _LEFT - 24)


def _y(share: float) -> float:
    return _BOTTOM - share * (_BOTTOM - 10)


def _bar(each: Bin, most: int) -> str:
    """Draw a bin: its share of right answers, the interval of that, and how full it is."""
    x, width = _x(each.low) + 1, _x(each.high) - _x(each.low) - 2
    top, middle = _y(each.accuracy), _x((each.low + each.high) / 2)
    interval = wilson(round(each.accuracy * each.num_images), each.num_images)
    height = max((_LOW - _BOTTOM - 26) * each.num_images / most, 1.0)
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_BOTTOM - top:.1f}" '
        f'fill="var(--a)" fill-opacity="0.6"><title>{each.num_images:,} images, confidence '
        f"{each.confidence:.1%}, right {each.accuracy:.1%}</title></rect>"
        f'<path d="M{middle:.1f} {_y(interval.low / 100):.1f}V{_y(interval.high / 100):.1f}" '
        'stroke="var(--ink)" stroke-width="1.5"/>'
        f'<rect x="{x:.1f}" y="{_LOW - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
        'fill="var(--soft)"/>'
    )
