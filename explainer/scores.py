"""Numbers out of images.jsonl: how faithful each method is, with 95 % intervals over images.

Methods are resampled together, so that their differences from the random row are paired.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float64

from ..evaluator.metrics import interval, resampled_means, wilson
from ..labeler.verify import Interval
from .localize import segmentation_scores
from .perturb import ACCURACY_CURVES, Curve, Protocol, area_under

CONTROL = "random"
"""The method that every other one has to be told apart from."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of each method."""

    title: str
    higher_is_better: bool


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "positive": Measure(title="positive", higher_is_better=False),
        "negative": Measure(title="negative", higher_is_better=True),
        "insertion": Measure(title="insertion", higher_is_better=True),
        "deletion": Measure(title="deletion", higher_is_better=False),
        "boxes_hit": Measure(title="hits box", higher_is_better=True),
        "boxes_mass": Measure(title="heat in box", higher_is_better=True),
        "masks_hit": Measure(title="hits mask", higher_is_better=True),
        "masks_mass": Measure(title="heat in mask", higher_is_better=True),
        "pixel_accuracy": Measure(title="pixel accuracy", higher_is_better=True),
        "mean_ap": Measure(title="mAP", higher_is_better=True),
        "miou": Measure(title="mIoU", higher_is_better=True),
    }
)
"""All in percent: areas under curves, shares of images, mean shares of heat, see localize."""

_K = TypeVar("_K")


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanCurve:
    """A curve, averaged over images, with its 95 % interval at each point."""

    fractions: list[float]
    """Of the pixels that are changed."""
    probability: list[Interval]
    """Of the explained class."""
    accuracy: list[Interval]
    """Share of the images whose answer is right."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Of heatmaps in float32 with those in float64, over their patches."""

    median: float
    lowest: float
    num_images: int


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodScores:
    """How faithful the heatmaps of one method are."""

    measures: dict[str, Interval]
    """By the keys of MEASURES; those that were measured."""
    less_random: dict[str, Interval]
    """The same, less that of the random row, on the same images; empty for random itself."""
    curves: dict[Curve, MeanCurve]
    correlation: Correlation | None

    def is_like_random(self, measure: str) -> bool:
        """Tell whether the interval of the difference holds 0."""
        difference = self.less_random.get(measure)
        return difference is not None and difference.low <= 0 <= difference.high


@dataclass(frozen=True, eq=False, kw_only=True)
class Faithfulness:
    """How faithful the heatmaps of several methods are, on the same images."""

    methods: dict[str, MethodScores]
    """"random" is always among them."""
    clean_accuracy: Interval | None
    """Percent; None where no right classes are known. Accuracy is then agreement with the model's
    answer to the whole image."""
    num_images: int
    num_annotated: dict[str, int]
    """Images that "boxes", "masks" and "segmentation" say something of."""
    unreadable: dict[str, str]
    """Key → why."""
    facts: dict[str, Any]
    """What decided the numbers."""

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values: {"methods": {"gae": {"positive": 16.9, …}, …}, …}."""
        plain = {name: value for name, value in vars(self).items() if name != "methods"}
        accuracy = self.clean_accuracy
        plain["clean_accuracy"] = None if accuracy is None else accuracy.value
        plain["clean_accuracy_interval"] = None if accuracy is None else list(accuracy[1:])
        return plain | {"methods": {name: _plain(each) for name, each in self.methods.items()}}


@dataclass(frozen=True, eq=False)
class _Mean:
    """An average over images and those over resampled ones."""

    value: float
    draws: Float64[np.ndarray, " r"]

    def interval(self) -> Interval:
        return interval("", self.value, self.draws)

    def less(self, other: "_Mean") -> Interval:
        return _Mean(self.value - other.value, self.draws - other.draws).interval()


def sum_up(header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> Faithfulness:
    """Turn the lines of a finished images.jsonl into numbers.

    Args:
        header: The first line.
        lines: The others.

    Raises:
        ValueError: None of the images could be read.
    """
    records: list[Mapping[str, Any]] = []
    unreadable: dict[str, str] = {}
    for line in lines:
        if "unreadable" in line:
            unreadable[line["key"]] = line["unreadable"]
        else:
            records.append(line)
    if not records:
        key, why = next(iter(unreadable.items()))
        raise ValueError(f"none of the images can be read; {key}: {why}")
    methods, plain = header["methods"], header["protocol"]
    protocol = Protocol(**plain | {"curves": tuple(plain["curves"])})
    num_annotated = {
        kind: sum(kind in record["methods"][CONTROL] for record in records)
        for kind in header["annotations"]
    }
    means: dict[str, dict[str, _Mean]] = {name: {} for name in methods}
    curves: dict[str, dict[Curve, MeanCurve]] = {name: {} for name in methods}
    for curve in protocol.curves:
        fractions = protocol.fractions(curve)
        for name, points in _curve_means(records, methods, curve, fractions).items():
            means[name][curve] = points.pop("area")[0]
            curves[name][curve] = MeanCurve(
                fractions=fractions,
                **{kind: [each.interval() for each in own] for kind, own in points.items()},
            )
    for kind in num_annotated:
        if num_annotated[kind]:
            of_kind = _segmentation_means if kind == "segmentation" else _place_means
            for name, found in of_kind(records, methods, kind).items():
                means[name] |= found
    return Faithfulness(
        methods={
            name: MethodScores(
                measures={measure: mean.interval() for measure, mean in means[name].items()},
                less_random={}
                if name == CONTROL
                else {key: mean.less(means[CONTROL][key]) for key, mean in means[name].items()},
                curves=curves[name],
                correlation=_correlations(records, name),
            )
            for name in methods
        },
        clean_accuracy=wilson(sum(record["right"] for record in records), len(records))
        if header["labels_known"]
        else None,
        num_images=len(records),
        num_annotated=num_annotated,
        unreadable=unreadable,
        facts={key: value for key, value in header.items() if key not in ("format", "version")},
    )


def _curve_means(
    records: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    curve: Curve,
    fractions: Sequence[float],
) -> dict[str, dict[str, list[_Mean]]]:
    """Average a curve's points, and the area under it: of accuracy for the published tests."""
    measured = "accuracy" if curve in ACCURACY_CURVES else "probability"
    columns = {}
    for name in methods:
        own = [record["methods"][name][curve] for record in records]
        columns[name, "accuracy"] = np.array([each["right"] for each in own], np.float64)
        columns[name, "probability"] = np.array([each["probability"] for each in own], np.float64)
        columns[name, "area"] = area_under(fractions, columns[name, measured])[:, None]
    found: dict[str, dict[str, list[_Mean]]] = {name: {} for name in methods}
    for (name, kind), means in _means(columns).items():
        found[name][kind] = means
    return found


def _place_means(
    records: Sequence[Mapping[str, Any]], methods: Sequence[str], kind: str
) -> dict[str, dict[str, _Mean]]:
    """Average hits and heat inside over the images that have an annotation."""
    columns = {name: 100 * _annotated(records, name, kind) for name in methods}
    return {
        name: {f"{kind}_hit": hit, f"{kind}_mass": mass}
        for name, (hit, mass) in _means(columns).items()
    }


def _segmentation_means(
    records: Sequence[Mapping[str, Any]], methods: Sequence[str], kind: str
) -> dict[str, dict[str, _Mean]]:
    """Sum up what localize.segment found in the images that have a mask."""
    found: dict[str, dict[str, _Mean]] = {}
    columns = {name: _annotated(records, name, kind) for name in methods}
    for name, means in _means(columns).items():
        values = segmentation_scores(np.array([[mean.value for mean in means]]))
        draws = segmentation_scores(np.stack([mean.draws for mean in means], axis=1))
        found[name] = {key: _Mean(float(values[key][0]), draws[key]) for key in values}
    return found


def _annotated(
    records: Sequence[Mapping[str, Any]], name: str, kind: str
) -> Float64[np.ndarray, "n m"]:
    own = [record["methods"][name] for record in records]
    return np.array([each[kind] for each in own if kind in each], np.float64)


def _means(columns: Mapping[_K, Float64[np.ndarray, "n m"]]) -> dict[_K, list[_Mean]]:
    """Average columns, all over the same resamples of the images."""
    joined = np.concatenate(list(columns.values()), axis=1)
    values, draws = joined.mean(0), resampled_means(joined)
    means = iter([_Mean(float(value), own) for value, own in zip(values, draws.T, strict=True)])
    return {key: [next(means) for _ in range(own.shape[1])] for key, own in columns.items()}


def _correlations(records: Sequence[Mapping[str, Any]], name: str) -> Correlation | None:
    found = [record["methods"][name].get("correlation") for record in records]
    known = [each for each in found if each is not None]
    if not known:
        return None
    return Correlation(median=float(np.median(known)), lowest=min(known), num_images=len(known))


def _plain(scores: MethodScores) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, (value, *ends) in scores.measures.items():
        plain |= {name: value, f"{name}_interval": ends}
        if name in scores.less_random:
            plain[f"{name}_less_random"] = list(scores.less_random[name])
    plain["curves"] = {
        curve: {
            "fractions": own.fractions,
            "accuracy": [list(each) for each in own.accuracy],
            "probability": [list(each) for each in own.probability],
        }
        for curve, own in scores.curves.items()
    }
    return plain | {"correlation": scores.correlation and vars(scores.correlation)}
