"""Numbers out of predictions: accuracy, loss, calibration, classes, confusions, with intervals.

An image counts where its right classes are known. Where labels allow several of them, as ReaL
(https://arxiv.org/abs/2006.07159) does, an answer is right if it is any of them. No number depends
on the order of the images, to the last bit: they are sorted by key first.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ..labeler.verify import Interval
from .predictions import MODEL, HeadScores, Predictions

NUM_BINS = 15
"""Of confidence, for the calibration error; as in https://arxiv.org/abs/1706.04599."""
NUM_RESAMPLES = 1_000
"""Of the bootstrap."""

_CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution, for 95 %
_FOLDED = ("ece", "adaptive_ece")  # made of magnitudes, which noise only makes larger
_MAX_COUNTS = 1 << 22  # held at a time while resampling: 32 MB


@dataclass(frozen=True, kw_only=True)
class HeadMetrics:
    """How good the answers of one head are, each number with its 95 % interval."""

    top1: Interval
    """Percent of the images whose first answer is right."""
    top5: Interval
    """Percent of the images with a right answer among the first five."""
    loss: Interval
    """Mean cross-entropy with the right class, nats."""
    ece: Interval
    """Expected calibration error, percentage points: by how much confidence and share of right
    answers differ, on average over 15 bins of equal width."""
    adaptive_ece: Interval
    """The same over 15 bins that hold equally many images."""
    confidence: Interval
    """Mean probability of the first answer, percent: above top1 the head is too sure."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The numbers of all heads, on the same images and the same resamples."""

    heads: dict[str, HeadMetrics]
    """By name, the model's own answer first."""
    num_images: int
    """Images that count."""
    num_unlabelled: int
    """Images whose class is not known, which do not."""

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values: {"top1": 83.3, "top1_interval": [83.0, 83.6], …} by head."""
        return {
            "heads": {name: plain(head) for name, head in self.heads.items()},
            "num_images": self.num_images,
            "num_unlabelled": self.num_unlabelled,
        }


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images of like confidence."""

    low: float
    high: float
    """Edges of the confidence, low < confidence ≤ high."""
    num_images: int
    confidence: float
    """Mean; NaN without images."""
    accuracy: float
    """Share of right answers; NaN without images."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """How the images of one class fare."""

    index: int
    name: str
    num_images: int
    top1: Interval
    """Percent, with Wilson's interval, which also holds for few images."""
    top5: float
    """Percent."""
    num_named: int
    """Images, of whatever class, whose first answer is this class."""
    precision: float
    """Percent of those for which it is right; NaN if there are none."""
    instead: str
    """The most frequent wrong answer; empty if there is none."""
    num_instead: int


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """A class and a wrong answer to its images."""

    right: int
    """Class index of the images."""
    answer: int
    """Class index of the answer."""
    num_images: int
    share: float
    """Percent of the class's images."""
    confidence: float
    """Mean probability of the wrong answer, percent."""


def measure(
    predictions: Predictions, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Metrics:
    """Measure every head.

    Intervals come from the percentiles of resampled images, for the calibration errors mirrored at
    the estimate: resampling pushes these upwards, as noise in the sample did before. Where all
    images are right, or all wrong, resamples are all alike, and the exact binomial bound stands in.

    Args:
        predictions: Of any images.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If no image counts.
    """
    counted = counted_images(predictions)
    found = resample(
        {name: (counted, head) for name, head in counted.heads.items()},
        num_resamples=num_resamples,
        seed=seed,
    )
    return Metrics(
        heads={name: head_metrics(each, len(counted)) for name, each in found.items()},
        num_images=len(counted),
        num_unlabelled=len(predictions) - len(counted),
    )


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Metrics of one head by the names in HeadMetrics."""

    values: dict[str, float]
    draws: dict[str, Float64[np.ndarray, " r"]]
    """Of resampled images."""


def resample(
    answers: Mapping[str, tuple[Predictions, HeadScores]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Measure several heads on the same images and on the same resamples of them.

    Args:
        answers: Predictions, as counted_images returns them, and a head of theirs, by any name.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    columns = [_columns(predictions, head) for predictions, head in answers.values()]
    draws = resampled_means(np.concatenate(columns, 1), num_resamples=num_resamples, seed=seed)
    each = np.split(draws, len(answers), axis=1)
    found = {}
    for name, own_columns, own_draws in zip(answers, columns, each, strict=True):
        values = _values(own_columns.mean(0, keepdims=True))
        found[name] = Resampled(
            values={field: float(value[0]) for field, value in values.items()},
            draws=_values(own_draws),
        )
    return found


def head_metrics(found: Resampled, num_images: int) -> HeadMetrics:
    """Put intervals around the numbers of a head."""
    intervals = {
        name: interval(name, value, found.draws[name]) for name, value in found.values.items()
    }
    for name in ("top1", "top5"):
        if found.values[name] in (0, 100):
            intervals[name] = _all_or_none(found.values[name], num_images)
    for name in _FOLDED:
        value, low, high = intervals[name]
        intervals[name] = Interval(value, max(low, 0.0), max(high, 0.0))
    return HeadMetrics(**intervals)


def interval(name: str, value: float, draws: Float64[np.ndarray, " r"]) -> Interval:
    """Put the middle 95 % of resampled values around a metric; none if it is not finite.

    Args:
        name: Of the metric, see HeadMetrics.
        value: Of the sample, or the difference between two heads on it.
        draws: Of the resamples.
    """
    if not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]).tolist()
    return Interval(
        value, *((2 * value - high, 2 * value - low) if name in _FOLDED else (low, high))
    )


def counted_images(predictions: Predictions) -> Predictions:
    """Keep the images whose right classes are known, sorted by key.

    Raises:
        ValueError: If there are none.
    """
    if predictions.valid is None:
        known = (predictions.classes >= 0).tolist()
    else:
        known = [bool(valid) for valid in predictions.valid]
    keys = sorted(key for key, is_known in zip(predictions.keys, known, strict=True) if is_known)
    if not keys:
        raise ValueError(
            f"none of {len(known)} images has a class that is known, so nothing can be measured"
        )
    return predictions.select(keys)


def right_answers(predictions: Predictions, head: HeadScores) -> Bool[np.ndarray, "n k"]:
    """Tell which of a head's best answers are right, best first."""
    if predictions.valid is None:
        return head.top_classes == predictions.classes[:, None]
    rows = np.repeat(np.arange(len(predictions)), [len(valid) for valid in predictions.valid])
    right = np.array([one for valid in predictions.valid for one in valid], np.int64)
    places = np.arange(len(predictions))[:, None] * predictions.num_classes
    return np.isin(places + head.top_classes, rows * predictions.num_classes + right)


def resampled_means(
    values: Float64[np.ndarray, "n m"], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "r m"]:
    """Draw n rows with replacement, again and again, and average each time.

    Args:
        values: One row an image. Columns are resampled together, so their differences are paired.
        num_resamples: How often.
        seed: Of the draws, which depend on nothing else but n.
    """
    num_images = len(values)
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _MAX_COUNTS // num_images)
    means = np.empty((num_resamples, values.shape[1]))
    for start in range(0, num_resamples, at_a_time):
        counts = np.stack(
            [
                np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
                for _ in range(start, min(start + at_a_time, num_resamples))
            ]
        )
        with np.errstate(invalid="ignore"):  # a loss may be infinite
            means[start : start + len(counts)] = counts.astype(np.float64) @ values / num_images
    return means


def reliability(predictions: Predictions, head: str = MODEL) -> list[Bin]:
    """Sort answers into bins of equal width by their confidence."""
    counted = counted_images(predictions)
    scores = counted.heads[head]
    confidence = scores.top_probs[:, 0].astype(np.float64)
    right = right_answers(counted, scores)[:, 0]
    bins = _equal_widths(confidence)
    edges = np.linspace(0, 1, NUM_BINS + 1).tolist()
    return [
        Bin(
            low=edges[b],
            high=edges[b + 1],
            num_images=int((bins == b).sum()),
            confidence=_mean(confidence[bins == b]),
            accuracy=_mean(right[bins == b]),
        )
        for b in range(NUM_BINS)
    ]


def per_class(predictions: Predictions, head: str = MODEL) -> list[ClassMetrics]:
    """Measure each class that has images, in the order of the class indices.

    Where an image has several right classes it stands under the first.
    """
    counted = counted_images(predictions)
    right = right_answers(counted, counted.heads[head])
    answers = counted.heads[head].top_classes[:, 0]
    size = counted.num_classes
    num_images = np.bincount(counted.classes, minlength=size)
    num_right = np.bincount(counted.classes, right[:, 0], size)
    num_in_top5 = np.bincount(counted.classes, right.any(1), size)
    num_named = np.bincount(answers, minlength=size)
    num_named_right = np.bincount(answers, right[:, 0], size)
    instead = {pair.right: pair for pair in reversed(confusions(counted, head))}
    rows = []
    for i in np.flatnonzero(num_images).tolist():
        pair = instead.get(i)
        rows.append(
            ClassMetrics(
                index=i,
                name=counted.class_names[i],
                num_images=int(num_images[i]),
                top1=wilson(int(num_right[i]), int(num_images[i])),
                top5=100 * float(num_in_top5[i] / num_images[i]),
                num_named=int(num_named[i]),
                precision=100 * _ratio(num_named_right[i], num_named[i]),
                instead=counted.class_names[pair.answer] if pair else "",
                num_instead=pair.num_images if pair else 0,
            )
        )
    return rows


def confusions(
    predictions: Predictions, head: str = MODEL, *, most: int | None = None
) -> list[Confusion]:
    """Count wrong answers by class and answer, the most frequent first.

    Equally frequent ones follow their share of the class, then the class indices.

    Args:
        predictions: Of any images.
        head: Whose answers.
        most: Return no more than this many.
    """
    counted = counted_images(predictions)
    scores = counted.heads[head]
    wrong = ~right_answers(counted, scores)[:, 0]
    classes, answers = counted.classes[wrong], scores.top_classes[wrong, 0]
    codes, which, counts = np.unique(
        classes * counted.num_classes + answers, return_inverse=True, return_counts=True
    )
    confidence = np.bincount(which, scores.top_probs[wrong, 0], len(codes)) / counts
    of_class = np.bincount(counted.classes, minlength=counted.num_classes)
    share = counts / of_class[codes // counted.num_classes]
    order = np.lexsort((codes, -share, -counts))[:most]
    return [
        Confusion(
            right=int(codes[i]) // counted.num_classes,
            answer=int(codes[i]) % counted.num_classes,
            num_images=int(counts[i]),
            share=100 * float(share[i]),
            confidence=100 * float(confidence[i]),
        )
        for i in order
    ]


def wilson(num_right: int, num_images: int) -> Interval:
    """Return a share in percent with Wilson's 95 % interval."""
    share, weight = num_right / num_images, _Z**2 / num_images
    middle = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Interval(100 * share, 100 * max(middle - reach, 0.0), 100 * min(middle + reach, 1.0))


def classes_csv(rows: Sequence[ClassMetrics]) -> str:
    """Write one line a class, with a heading."""
    return table_csv(
        [
            {
                "class": row.index,
                "name": row.name,
                "images": row.num_images,
                "top1": f"{row.top1.value:.2f}",
                "top1_low": f"{row.top1.low:.2f}",
                "top1_high": f"{row.top1.high:.2f}",
                "top5": f"{row.top5:.2f}",
                "named": row.num_named,
                "precision": "" if math.isnan(row.precision) else f"{row.precision:.2f}",
                "most_often_instead": row.instead,
                "times_instead": row.num_instead,
            }
            for row in rows
        ]
    )


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows of equal keys as CSV, with a heading."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def plain(head: HeadMetrics) -> dict[str, Any]:
    """Turn into plain values, see Metrics.to_json."""
    values: dict[str, Any] = {}
    for field in fields(head):
        value, *ends = finite(getattr(head, field.name))
        values |= {field.name: value, f"{field.name}_interval": ends}
    return values


def finite(numbers: Iterable[float]) -> list[float | None]:
    """Put None for what is not finite, for which JSON has no word."""
    return [x if math.isfinite(x) else None for x in numbers]


# ---------------------------------------------------------------------------------- one head


def _columns(predictions: Predictions, head: HeadScores) -> Float64[np.ndarray, "n m"]:
    """Return what has to be averaged over images; of bins, confidence less right answers."""
    right = right_answers(predictions, head)
    confidence = head.top_probs[:, 0].astype(np.float64)
    gap = confidence - right[:, 0]
    sums = [right[:, 0], right.any(1), -head.true_log_probs, confidence]
    in_bins = [
        np.where(bins[:, None] == np.arange(NUM_BINS), gap[:, None], 0.0)
        for bins in (_equal_widths(confidence), _equal_counts(confidence))
    ]
    return np.concatenate([np.stack(sums, axis=1), *in_bins], axis=1)


def _values(means: Float64[np.ndarray, "r m"]) -> dict[str, Float64[np.ndarray, " r"]]:
    """Turn averages of columns into metrics."""
    widths, counts = np.split(100 * np.abs(means[:, 4:]), 2, axis=1)
    return {
        "top1": 100 * means[:, 0],
        "top5": 100 * means[:, 1],
        "loss": means[:, 2],
        "ece": widths.sum(1),
        "adaptive_ece": counts.sum(1),
        "confidence": 100 * means[:, 3],
    }


def _all_or_none(value: float, num_images: int) -> Interval:
    """Return the bound of a share at which 2.5 % of samples are right throughout, or wrong."""
    bound = 100 * ((1 - _CONFIDENCE) / 2) ** (1 / num_images)
    return Interval(100.0, bound, 100.0) if value else Interval(0.0, 0.0, 100 - bound)


def _equal_widths(confidence: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def _equal_counts(confidence: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    bins = np.empty(len(confidence), np.int64)
    bins[np.argsort(confidence, kind="stable")] = (
        np.arange(len(confidence)) * NUM_BINS // len(confidence)
    )
    return bins


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else math.nan


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if below else math.nan
