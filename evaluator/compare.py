"""Two sets of answers to the same images: is one better, or is it luck?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool

from ..labeler.verify import Interval
from . import metrics
from .metrics import HeadMetrics, Resampled
from .predictions import MODEL, HeadScores, Predictions

MOST_EXACT = 1_000
"""Images on which the two differ, up to which the paired test is exact."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What sets B apart from A; differences are B less A, with 95 % intervals."""

    num_images: int
    """Images that count: in both sets, with a known class."""
    num_left_out: int
    """Images that only one of the sets has."""
    a: HeadMetrics
    b: HeadMetrics
    differences: dict[str, Interval]
    """By the fields of HeadMetrics, in the same units; resampled in pairs."""
    num_both: int
    """Images that both get right."""
    only_a: list[str]
    """Keys of the images that only A gets right; those where both are surest come first."""
    only_b: list[str]
    num_neither: int
    p_value: float
    """McNemar's: how likely as unequal a split of only_a and only_b is if neither is better."""
    is_exact: bool
    """Whether it is the binomial's; else that of chi² with continuity correction."""
    agreement: Interval
    """Percent of the images to which both give the same first answer, right or wrong."""
    classes: list["ClassChange"]
    """Classes on which their shares of right answers differ, the most first."""

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values."""
        plain: dict[str, Any] = {"a": metrics.plain(self.a), "b": metrics.plain(self.b)}
        plain["differences"] = {
            name: metrics.finite(each) for name, each in self.differences.items()
        }
        plain["agreement"] = list(self.agreement)
        plain["classes"] = [vars(change) for change in self.classes]
        return {field.name: getattr(self, field.name) for field in fields(self)} | plain


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """How the images of one class fare in A and in B."""

    index: int
    name: str
    num_images: int
    top1_a: float
    """Percent."""
    top1_b: float


def compare(
    a: Predictions,
    b: Predictions,
    *,
    head_a: str = MODEL,
    head_b: str = MODEL,
    num_resamples: int = metrics.NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare the answers of two heads on the images that both have seen.

    Args:
        a: The one to compare with, e.g. the baseline.
        b: May be the same as A, to compare its heads.
        head_a: Whose answers of A.
        head_b: Whose answers of B.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If they have no image in common, or say different things about its class; if a
            head does not exist.
    """
    _check_head(a, head_a, "A")
    _check_head(b, head_b, "B")
    num_all = len(set(a.keys) | set(b.keys))
    a, b = _common_images(a, b)
    num_left_out = num_all - len(a)
    _check_labels(a, b)
    a, b = metrics.counted_images(a), metrics.counted_images(b)
    scores_a, scores_b = a.heads[head_a], b.heads[head_b]
    right_a = metrics.right_answers(a, scores_a)[:, 0]
    right_b = metrics.right_answers(b, scores_b)[:, 0]
    num_same = int((scores_a.top_classes[:, 0] == scores_b.top_classes[:, 0]).sum())
    found = metrics.resample(
        {"a": (a, scores_a), "b": (b, scores_b)}, num_resamples=num_resamples, seed=seed
    )
    only_a = _surest(right_a & ~right_b, a.keys, scores_a, scores_b)
    only_b = _surest(right_b & ~right_a, a.keys, scores_a, scores_b)
    p_value, is_exact = mcnemar(len(only_a), len(only_b))
    return Comparison(
        num_images=len(a),
        num_left_out=num_left_out,
        a=metrics.head_metrics(found["a"], len(a)),
        b=metrics.head_metrics(found["b"], len(a)),
        differences=_differences(found["a"], found["b"]),
        num_both=int((right_a & right_b).sum()),
        only_a=only_a,
        only_b=only_b,
        num_neither=int((~right_a & ~right_b).sum()),
        p_value=p_value,
        is_exact=is_exact,
        agreement=metrics.wilson(num_same, len(a)),
        classes=_changes(a, right_a, right_b),
    )


def mcnemar(num_only_a: int, num_only_b: int) -> tuple[float, bool]:
    """Test whether two models that differ on some images are equally good (two-sided).

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
    or percentages", Psychometrika 12 (1947); the correction is Edwards'.

    Args:
        num_only_a: Images that only A gets right.
        num_only_b: Images that only B gets right.

    Returns:
        The p-value, and whether it is exact (up to MOST_EXACT images) or chi²'s.
    """
    total, gap = num_only_a + num_only_b, abs(num_only_a - num_only_b)
    if total <= MOST_EXACT:
        tail = sum(math.comb(total, i) for i in range(min(num_only_a, num_only_b) + 1))
        return min(1.0, 2 * tail / 2**total), True
    chi2 = max(gap - 1, 0) ** 2 / total
    return math.erfc(math.sqrt(chi2 / 2)), False


def _check_head(predictions: Predictions, head: str, name: str) -> None:
    if head not in predictions.heads:
        raise ValueError(f"{name} has no head {head!r}; it has {', '.join(predictions.heads)}")


def _common_images(a: Predictions, b: Predictions) -> tuple[Predictions, Predictions]:
    if a.num_classes != b.num_classes:
        raise ValueError(
            f"A has {a.num_classes} classes, B {b.num_classes}: their answers cannot be compared"
        )
    common = sorted(set(a.keys) & set(b.keys))
    if not common:
        raise ValueError(
            f"A and B have no image in common: A has {_example(a)}, B has {_example(b)}; both must "
            "be predictions of the same data"
        )
    return a.select(common), b.select(common)


def _example(predictions: Predictions) -> str:
    return f"{predictions.keys[0]!r}" if predictions.keys else "none"


def _check_labels(a: Predictions, b: Predictions) -> None:
    """Refuse images, the same and in the same order in both, of which something else is right."""
    for i in np.flatnonzero(a.classes != b.classes).tolist()[:1]:
        raise ValueError(
            f"the class of {a.keys[i]} is {a.classes[i]} in A, but {b.classes[i]} in B; both "
            "must be predictions of the same data with the same classes (-1 stands for: not known)"
        )
    if a.valid != b.valid:
        raise ValueError(
            "A and B count different classes as right: evaluate both with the same label file"
        )


def _differences(a: Resampled, b: Resampled) -> dict[str, Interval]:
    return {
        name: metrics.interval(name, b.values[name] - value, b.draws[name] - a.draws[name])
        for name, value in a.values.items()
    }


def _surest(
    which: Bool[np.ndarray, " n"], keys: Sequence[str], a: HeadScores, b: HeadScores
) -> list[str]:
    """List keys by falling product of both confidences."""
    sureness = a.top_probs[:, 0].astype(np.float64) * b.top_probs[:, 0]
    return [keys[i] for i in sorted(np.flatnonzero(which).tolist(), key=lambda i: -sureness[i])]


def _changes(
    predictions: Predictions, right_a: Bool[np.ndarray, " n"], right_b: Bool[np.ndarray, " n"]
) -> list[ClassChange]:
    size = predictions.num_classes
    num_images = np.bincount(predictions.classes, minlength=size)
    num_a, num_b = (np.bincount(predictions.classes, right, size) for right in (right_a, right_b))
    gap = np.abs(num_b - num_a)
    order = sorted(np.flatnonzero(gap).tolist(), key=lambda i: (-gap[i], num_images[i], i))
    return [
        ClassChange(
            index=i,
            name=predictions.class_names[i],
            num_images=int(num_images[i]),
            top1_a=float(100 * num_a[i] / num_images[i]),
            top1_b=float(100 * num_b[i] / num_images[i]),
        )
        for i in order
    ]
