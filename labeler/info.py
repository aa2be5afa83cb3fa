"""What is in a label set: the job behind `tl-label info`."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .label_map import LabelMap, decode
from .label_set import LabelSet
from .published import above_fill, is_first
from .sources import ImageSource

DEFAULT_NUM_IMAGES = 10_000
_NUM_SHOWN = 5
_NUM_WORST = 10


class ClassCount(NamedTuple):
    """How often a class is seen."""

    name: str
    num_cells: int
    """In which it comes first."""
    num_images: int
    """In which it comes first in at least one cell."""


class Disagreement(NamedTuple):
    """An image that the teacher takes for something else than its folder says."""

    key: str
    folder_class: str
    folder_probability: float
    """What the class target of the whole image gives to the folder's class."""
    teacher_class: str
    teacher_probability: float


@dataclass(frozen=True, kw_only=True)
class FolderAgreement:
    """How teacher and folders compare, over the images that were read."""

    num_images: int
    num_disagreeing: int
    """Images of which the class target has another first class than the folder's."""
    worst: list[Disagreement]
    """Those where the teacher's class is furthest ahead of the folder's, in nats, first."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `describe` found in the maps it read; what the index says is not repeated."""

    num_images: int
    """Whose maps were read: all of the set, or a random choice."""
    grids: list[tuple[list[tuple[int, int]], int]]
    """(rows, cols) of the levels of a map → number of images, most frequent first."""
    num_cells: int
    num_classes_seen: int
    """Classes that come first in at least one cell."""
    most_seen: list[ClassCount]
    least_seen: list[ClassCount]
    """Of the classes seen at all, fewest cells first."""
    mean_confidence: float | None
    """Mean probability of a cell's first class; None where maps keep no normaliser."""
    mean_residual: float | None
    """Mean probability outside the top k; None likewise."""
    folders: FolderAgreement | None
    """None without images, or if their classes are not the teacher's."""

    def to_json(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        content = dict(vars(self))
        content["grids"] = [{"levels": levels, "num_images": n} for levels, n in self.grids]
        content["most_seen"] = [entry._asdict() for entry in self.most_seen]
        content["least_seen"] = [entry._asdict() for entry in self.least_seen]
        if self.folders is not None:
            content["folders"] = dict(vars(self.folders))
            content["folders"]["worst"] = [entry._asdict() for entry in self.folders.worst]
        return content


def describe(
    labels: LabelSet,
    *,
    source: ImageSource | None = None,
    num_images: int = DEFAULT_NUM_IMAGES,
    seed: int = 0,
    show_progress: bool = True,
) -> Description:
    """Read a label set's maps and count what is in them; of pyramids, the first level.

    Args:
        labels: The label set.
        source: Its images, for what their folders say; no image is read.
        num_images: Whose maps are read at most, chosen at random; 0 means all.
        seed: Of the choice.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        LabelMapError: If a map is damaged.
    """
    keys = labels.keys
    if 0 < num_images < len(keys):
        keys = sorted(random.Random(seed).sample(keys, num_images))
    folder_of = _folder_classes(labels, source)
    cells = np.zeros(labels.num_classes, np.int64)
    images = np.zeros(labels.num_classes, np.int64)
    grids: Counter[tuple[tuple[int, int], ...]] = Counter()
    masses: list[_Mass] = []
    disagreements: list[Disagreement] = []
    num_compared = 0
    bar = tqdm(keys, desc="info", unit="map", disable=None if show_progress else True)
    for key, data in zip(bar, labels.read_each(keys)):
        maps = decode(data, dictionary=labels.dictionary)
        first = maps[0]
        grids[tuple(level.grid for level in maps)] += 1
        classes, counts = np.unique(first.classes[0], return_counts=True)
        cells[classes] += counts
        images[classes] += 1
        if first.log_normalizer is not None:
            masses.append(_mass(first))
        if key in folder_of:
            num_compared += 1
            answer = _class_target(first)
            if answer.best != folder_of[key]:
                disagreements.append(_disagreement(key, folder_of[key], answer, labels))
    disagreements.sort(key=lambda d: d.folder_probability / d.teacher_probability)
    seen = np.flatnonzero(cells)
    ranked = seen[np.argsort(-cells[seen], kind="stable")].tolist()
    counted = [ClassCount(labels.class_names[i], int(cells[i]), int(images[i])) for i in ranked]
    return Description(
        num_images=len(keys),
        grids=[(list(grid), n) for grid, n in grids.most_common()],
        num_cells=int(cells.sum()),
        num_classes_seen=len(seen),
        most_seen=counted[:_NUM_SHOWN],
        least_seen=counted[::-1][:_NUM_SHOWN],
        mean_confidence=float(np.mean([m.first for m in masses])) if masses else None,
        mean_residual=float(np.mean([m.residual for m in masses])) if masses else None,
        folders=FolderAgreement(
            num_images=num_compared,
            num_disagreeing=len(disagreements),
            worst=disagreements[:_NUM_WORST],
        )
        if num_compared
        else None,
    )


def in_words(labels: LabelSet, found: Description) -> dict[str, str]:
    """Return a line about each thing that people want to know of a set."""
    index = labels.index
    teacher = index["teacher"]
    sizes = index.get("levels") or [teacher.get("image_size")]
    tiles = " in tiles" if index.get("tiles") else ""
    facts = [
        str(teacher.get("name")),
        f"{' + '.join(map(str, sizes))} px{tiles}" if sizes[0] else "",
        teacher.get("precision", ""),
        f"weights {teacher['weights_sha256'][:12]}" if "weights_sha256" in teacher else "",
        f"timm {teacher['timm_version']}" if "timm_version" in teacher else "",
    ]
    grids = [
        f"{' + '.join(f'{rows}×{cols}' for rows, cols in levels)} cells of {n:,}"
        for levels, n in found.grids[:_NUM_SHOWN]
    ]
    more = ["…"] if len(found.grids) > _NUM_SHOWN else []
    tar_bytes = sum(shard["bytes"] for shard in index["shards"])
    num_maps = max(1, len(labels))
    lines = {
        "teacher": ", ".join(filter(None, facts)),
        "geometry": f"fit {index['fit']}, {', '.join(grids + more)}",
        "classes": f"top {labels.k} of {labels.num_classes:,} in each cell, "
        f"{index.get('score_bits', 16)}-bit scores",
        "images": f"{len(labels):,} labelled, {len(labels.quarantined):,} left out",
        "size": f"{index.get('map_bytes', tar_bytes) / num_maps:,.0f} bytes an image, "
        f"{tar_bytes / 1e6:,.1f} MB in all (shards: {len(index['shards']):,})",
    }
    if "classes" in teacher:
        lines["classes"] += f"; {teacher['classes'].rpartition(',')[0]} of the teacher's"
    if "imported" in index:
        imported = index["imported"]
        lines["imported"] = f"{imported['kind']} files of {imported['from']}, {imported['axes']}"
    all_read = found.num_images == len(labels)
    lines["read"] = f"{found.num_images:,} maps, " + (
        "all of them" if all_read else f"chosen at random from {len(labels):,}"
    )
    if found.mean_confidence is not None and found.mean_residual is not None:
        lines["confidence"] = (
            f"{found.mean_confidence:.1%} for a cell's first class on average; "
            f"{found.mean_residual:.1%} residual, outside the top {labels.k}"
        )
    else:
        lines["confidence"] = "not known: the maps keep no normaliser"
    lines["seen"] = (
        f"{found.num_classes_seen:,} of {labels.num_classes:,} classes come first in some cell"
    )
    lines["most"] = _listed(found.most_seen, found.num_cells)
    lines["least"] = _listed(found.least_seen, found.num_cells)
    return lines


def _listed(counts: Sequence[ClassCount], num_cells: int) -> str:
    return ", ".join(f"{count.name} {count.num_cells / num_cells:.2%}" for count in counts)


def _folder_classes(labels: LabelSet, source: ImageSource | None) -> dict[str, int]:
    """Return the folder's class of each key, where folders and teacher have the same classes."""
    if source is None or source.num_classes != labels.num_classes:
        return {}
    return {s.key: s.class_index for s in source.samples if s.class_index is not None}


class _Mass(NamedTuple):
    """Means over the cells of a map."""

    first: float
    residual: float


def _mass(label_map: LabelMap) -> _Mass:
    assert label_map.log_normalizer is not None
    logs = label_map.scores.astype(np.float32) - label_map.log_normalizer
    probabilities = np.exp(logs)
    kept = (probabilities * is_first(label_map.classes)).sum(0)
    return _Mass(float(probabilities[0].mean()), float(np.clip(1 - kept, 0, 1).mean()))


class _ClassTarget(NamedTuple):
    """The class target of a whole map: what geometry.sample_targets gives a view of its window."""

    probabilities: dict[int, float]
    background: float
    best: int


def _class_target(label_map: LabelMap) -> _ClassTarget:
    fill = "zero" if label_map.log_normalizer is None else "residual"
    above = above_fill(label_map, fill) * is_first(label_map.classes)
    palette, place = np.unique(label_map.classes, return_inverse=True)
    sums = np.bincount(place.ravel(), above.ravel().astype(np.float64))
    logits = sums / above[0].size  # above those of the classes outside the palette, which are 0
    num_outside = label_map.num_classes - len(palette)
    total = np.exp(logits).sum() + num_outside
    probabilities = dict(zip(palette.tolist(), (np.exp(logits) / total).tolist()))
    return _ClassTarget(probabilities, 1 / total, int(palette[logits.argmax()]))


def _disagreement(key: str, folder: int, answer: _ClassTarget, labels: LabelSet) -> Disagreement:
    return Disagreement(
        key=key,
        folder_class=labels.class_names[folder],
        folder_probability=answer.probabilities.get(folder, answer.background),
        teacher_class=labels.class_names[answer.best],
        teacher_probability=answer.probabilities[answer.best],
    )
