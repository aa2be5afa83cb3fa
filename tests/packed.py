"""Data sets made by pack: label sets to go with photos, and other people's readers."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from conftest import random_map
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from webdataset.compat import WebDataset

from tokenlabel.labeler import label_set
from tokenlabel.labeler.dictionary import to_settings
from tokenlabel.labeler.folder import Location
from tokenlabel.labeler.label_map import encode
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import ImageSource
from tokenlabel.shards import writer
from tokenlabel.shards.index import ShardIndex

Contents = dict[str, tuple[bytes, bytes, bytes]]
"""Key → jpg, cls, tlm."""


def photo(number: int) -> Image.Image:
    """A small picture that no other number shares."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 24))


def jpeg_of(number: int) -> bytes:
    buffer = io.BytesIO()
    photo(number).save(buffer, "JPEG")
    return buffer.getvalue()


def labels_for(
    source: ImageSource,
    folder: Location,
    *,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    quarantined: str | None = None,
    damaged: str | None = None,
    k: int = 2,
    seed: int = 0,
    dictionary: bytes | None = None,
) -> LabelSet:
    """A label set of all images of a source, as tl-label generate leaves it in a folder or URL."""
    num_classes = num_classes or source.num_classes
    rng = np.random.default_rng(seed)
    maps = {
        sample.key: encode(
            random_map(rng, grid=(3, 4), k=k, num_classes=num_classes), dictionary=dictionary
        )
        for sample in source.samples
        if sample.key != quarantined
    }
    if damaged:
        maps[damaged] = maps[damaged][:-3]
    settings = {"teacher": {"name": "a"}, "fit": "native", "k": k, "num_classes": num_classes}
    settings |= {} if dictionary is None else to_settings(dictionary)
    label_set.check_output(folder)
    record = label_set.write_slice(
        folder,
        0,
        maps.items(),
        settings=settings,
        quarantined={quarantined: "truncated"} if quarantined else {},
        num_correct=None,
    )
    class_names = class_names or [f"class {number}" for number in range(num_classes)]
    label_set.write_index(folder, [record], settings=settings, class_names=class_names)
    return LabelSet.open(folder)


def fill_disk(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the disk be full once pack or relabel has begun so many files."""
    created = []

    def create(path: Path) -> BinaryIO:
        created.append(path)
        return path.open("xb") if len(created) <= after else Path("/dev/full").open("wb")

    monkeypatch.setattr(writer, "create", create)


@contextmanager
def broken_off_at(function: str) -> Iterator[None]:
    """Break off pack or relabel where it calls a function of the writer."""

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, function, die)
        yield


def read_with_tarfile(index: ShardIndex, split: str) -> list[tuple[str, list[bytes]]]:
    """Read a split in order, by the names in the tars alone."""
    samples = []
    for path in index.shard_paths(split):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.rpartition(".")
                if extension == "jpg":
                    samples.append((key, []))
                file = archive.extractfile(member)
                assert file is not None and samples[-1][0] == key
                samples[-1][1].append(file.read())
    return samples


def keys_of(index: ShardIndex, split: str) -> list[str]:
    return [key for key, _ in read_with_tarfile(index, split)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_with_webdataset(index: ShardIndex, split: str) -> Contents:
    urls = [str(path) for path in index.shard_paths(split)]
    return {
        sample["__key__"]: (sample["jpg"], sample["cls"], sample["tlm"])
        for sample in WebDataset(urls, shardshuffle=False)
    }


def read_with_dali(index: ShardIndex, split: str, *, with_idx: bool = True) -> Contents:
    paths = index.shard_paths(split)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        fields: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path) for path in index.idx_paths(split)] if with_idx else None,
            ext=["jpg", "cls", "tlm"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*fields)
    contents = {}
    for _ in range(index.split(split).num_samples):
        jpg, cls, tlm = (output[0] for output in pipeline.run())
        _, _, name = jpg.source_info().split(":", maxsplit=2)  # tar:offset:name
        contents[name.removesuffix(".jpg")] = tuple(bytes(np.array(x)) for x in (jpg, cls, tlm))
    return contents
