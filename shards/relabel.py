"""A data set + other label maps → the same images with these maps: behind `tl-shard relabel`.

Images and classes are copied byte by byte, in their order and shard by shard; nothing is decoded
or shuffled again.
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..labeler.archives import list_tar, read_member
from ..labeler.folder import sha256_of
from ..labeler.label_set import LabelSet
from . import index as index_file
from .index import ShardEntry, ShardIndex
from .pack import at_hand, check_label_classes, join, label_facts, read_label
from .writer import (
    ShardWriter,
    close_on_disk,
    create,
    finish_publishing,
    map_in_order,
    naming,
    only_writer,
    publish,
    staging,
)

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RelabelSummary:
    """What a finished relabel did."""

    index: ShardIndex
    split: str
    left_out: dict[str, str]
    """Key of each image that the new label set has no map for → why."""
    num_unused_labels: int
    """Labels without an image; above 0 only with allow_missing."""
    was_made_before: bool
    """Whether an earlier run had made everything, and only the files had to be moved."""
    duration_secs: float


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample of a packed data set, but for its label map."""

    key: str
    offset: int
    """Of the JPEG in its tar."""
    num_bytes: int
    """Of the JPEG."""
    cls: bytes


def relabel(
    data: Path,
    labels: LabelSet,
    *,
    out: Path | None,
    split: str | None = None,
    allow_missing: bool = False,
    num_workers: int | None = None,
) -> RelabelSummary:
    """Give the samples of a split other label maps, or their first ones.

    Images that the new label set has no map for leave the data set and are quarantined in
    index.json. Every old shard is compared with its checksum before anything is taken from it.

    Args:
        data: A data set made by tl-shard pack.
        labels: The label maps.
        out: A new folder for the whole data set; its other splits are copied. None replaces the
            split in `data`; until all new shards are complete that takes room for both.
        split: Which one; None takes the one that has label maps, or the only one.
        allow_missing: Leave images without a label out, instead of refusing the label set.
        num_workers: Shards read and written at a time; None takes the cores of this process.

    Raises:
        ValueError: If labels and data set do not belong together, a shard is damaged, or the
            split is unknown or must be named.
        OSError: If `out` holds a data set already (FileExistsError), or something is not there
            or cannot be written.
    """
    begin = time.monotonic()
    target = data if out is None else out
    if not data.is_dir():
        raise FileNotFoundError(f"data set folder {data} does not exist")
    if out is not None:
        if out.exists() and out.samefile(data):
            raise ValueError(f"--out {out} is the data set itself; --in-place replaces its maps")
        out.mkdir(parents=True, exist_ok=True)
    num_workers = num_workers or len(os.sched_getaffinity(0))
    facts = label_facts(labels)
    with only_writer(target):
        made_before = finish_publishing(target)
        old = index_file.read_index(data)
        split = _choose(old, split)
        if made_before is not None and _labels_of(made_before, split) == facts:
            return RelabelSummary(
                index=made_before,
                split=split,
                left_out={},
                num_unused_labels=0,
                was_made_before=True,
                duration_secs=time.monotonic() - begin,
            )
        if out is not None:
            _check_empty(out)
        check_label_classes(data, old.class_ids, old.class_names, labels)
        entry = old.split(split)
        with staging(target, split) as staged, ThreadPoolExecutor(num_workers) as pool:
            stored = list(pool.map(stored_samples, old.shard_paths(split)))
            left_out, num_unused_labels = join(
                [sample.key for samples in stored for sample in samples],
                labels,
                allow_missing,
                left_out_before=entry.quarantined,
            )
            jobs = _jobs(split, entry.shards, stored, left_out)
            if not jobs:
                raise ValueError(f"no image of split {split!r} in {data} has a label map")
            with at_hand(labels, target) as near:
                written = map_in_order(
                    pool, lambda job: _rewrite(data, near, staged, job), jobs, ahead=num_workers
                )
                bar = tqdm(written, f"relabel {split}", len(jobs), disable=None, unit="shard")
                shards = list(bar)
            if out is not None:
                _copy_others(old, split, staged)
            new_entry = replace(
                entry,
                num_samples=sum(shard.samples for shard in shards),
                has_labels=True,
                shards=shards,
                labels=facts,
                quarantined=dict(sorted((entry.quarantined | left_out).items())),
            )
            new = replace(old, folder=target, splits=old.splits | {split: new_entry})
            publish(new, staged)
    return RelabelSummary(
        index=new,
        split=split,
        left_out=left_out,
        num_unused_labels=num_unused_labels,
        was_made_before=False,
        duration_secs=time.monotonic() - begin,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    old: ShardEntry
    name: str
    samples: list[StoredSample]


def _labels_of(index: ShardIndex, split: str) -> dict[str, Any] | None:
    return index.splits[split].labels if split in index.splits else None


def _check_empty(out: Path) -> None:
    names = sorted(path.name for path in out.iterdir() if path.name[0] != ".")
    if names:
        raise FileExistsError(f"{out} is not empty, it holds {names[0]}; give --out a new folder")


def _choose(index: ShardIndex, split: str | None) -> str:
    if split is not None:
        index.split(split)
        return split
    names = [name for name, entry in index.splits.items() if entry.has_labels] or [*index.splits]
    if len(names) != 1:
        raise ValueError(
            f"{index.folder} has the splits {', '.join(map(repr, names))}; "
            "name the one to relabel with --split"
        )
    return names[0]


def stored_samples(path: Path) -> list[StoredSample]:
    """List the samples of a packed shard.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds anything else, or is damaged.
    """
    members = list_tar(str(path)).members
    samples = []
    for key, run in groupby(members, lambda member: member.name.rpartition(".")[0]):
        fields = {member.name[len(key) + 1 :]: member for member in run}
        if [*fields][:2] != ["jpg", "cls"] or fields["cls"].content is None:
            raise ValueError(
                f"{path}: sample {key} has the fields {' '.join(fields)}, expected jpg, cls and "
                "perhaps tlm; check the data set with tl-shard verify"
            )
        jpg = fields["jpg"]
        samples.append(StoredSample(key, jpg.offset, jpg.num_bytes, fields["cls"].content))
    return samples


def _jobs(
    split: str, shards: list[ShardEntry], stored: list[list[StoredSample]], left_out: dict[str, str]
) -> list[_Job]:
    """Drop the samples that are left out, and shards that become empty by that."""
    jobs: list[_Job] = []
    for shard, samples in zip(shards, stored):
        samples = [sample for sample in samples if sample.key not in left_out]
        if samples:
            jobs.append(_Job(shard, index_file.shard_name(split, len(jobs)), samples))
    return jobs


def _rewrite(data: Path, labels: LabelSet, staged: Path, job: _Job) -> ShardEntry:
    path = data / job.old.name
    _check(path, sha256_of(path), job.old.sha256)
    writer = ShardWriter(staged, job.name)
    try:
        for sample in job.samples:
            jpg = read_member(str(path), sample.offset, sample.num_bytes)
            label = read_label(labels, sample.key)
            writer.add(sample.key, [("jpg", jpg), ("cls", sample.cls), ("tlm", label)])
        return writer.finish()
    finally:
        writer.abandon()


def _copy_others(index: ShardIndex, split: str, staged: Path) -> None:
    for name, entry in index.splits.items():
        if name == split:
            continue
        index.shard_paths(name)  # raises where one is missing
        for shard in entry.shards:
            _copy(index.folder / shard.name, staged, shard.sha256)
            _copy(index.folder / shard.idx_name, staged, shard.idx_sha256)


def _copy(path: Path, folder: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file, naming(folder / path.name):
        copy = create(folder / path.name)
        while block := file.read(_COPY_BYTES):
            digest.update(block)
            copy.write(block)
        close_on_disk(copy)
    _check(path, digest.hexdigest(), sha256)


def _check(path: Path, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise ValueError(
            f"{path} changed after packing, its checksum does not fit; copy it again "
            "(tl-shard verify finds all that changed)"
        )
