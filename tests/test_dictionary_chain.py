"""Label maps that need a dictionary are read wherever they go: packed, fed, relabelled, checked."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import random_map
from packed import files_of, jpeg_of, labels_for

from tokenlabel.cli import label, shard
from tokenlabel.labeler.label_map import LabelMapError, decode, encode, train_dictionary
from tokenlabel.labeler.label_set import LabelSet, read_slices, write_index
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.verify import check_keys
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.shards.relabel import relabel
from tokenlabel.shards.verify import verify
from tokenlabel.trainer.feed import Batch, TrainFeed
from tokenlabel.trainer.recipe import AugmentConfig


def trained_on(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    maps = [random_map(rng, grid=(3, 4), k=2, num_classes=2) for _ in range(400)]
    return train_dictionary([encode(m) for m in maps], size_bytes=1024)


DICTIONARY, OTHER = trained_on(0), trained_on(1)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    for number in range(6):
        path = tmp_path / "images" / ("cat" if number < 3 else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_of(number))
    return open_source(tmp_path / "images")


@pytest.fixture
def labels(source: ImageSource, tmp_path: Path) -> LabelSet:
    return labels_for(source, tmp_path / "labels", dictionary=DICTIONARY)


@pytest.fixture
def plain(source: ImageSource, tmp_path: Path) -> LabelSet:
    """The same maps without a dictionary."""
    return labels_for(source, tmp_path / "plain")


@pytest.fixture
def packed(source: ImageSource, tmp_path: Path) -> Callable[[LabelSet | None], ShardIndex]:
    def packed(labels: LabelSet | None) -> ShardIndex:
        name = "shards" if labels is None else f"shards-{Path(labels.folder).name}"
        return pack(source, tmp_path / name, split="train", labels=labels, shard_size=4).index

    return packed


def batch_of(index: ShardIndex) -> Batch:
    feed = TrainFeed(
        index, image_size=(16, 16), batch_size=6, augment=AugmentConfig(), num_threads=1
    )
    try:
        return next(feed)
    finally:
        feed.close()


def assert_same(batch: Batch, other: Batch) -> None:
    assert batch.keys == other.keys and torch.equal(batch.images, other.images)
    assert batch.maps is not None and other.maps is not None
    for name, value in vars(batch.maps).items():
        theirs = getattr(other.maps, name)
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs


def test_a_label_set_gives_its_dictionary_with_its_maps(labels: LabelSet, plain: LabelSet):
    assert (labels.dictionary, plain.dictionary) == (DICTIONARY, None)
    for key in labels.keys:
        assert labels.read(key) != plain.read(key)
        (ours,) = decode(labels.read(key), dictionary=labels.dictionary)
        assert ours.equals(decode(plain.read(key))[0])


def test_training_sees_the_same_targets_with_a_dictionary_as_without(
    labels: LabelSet, plain: LabelSet, packed: Callable[[LabelSet | None], ShardIndex]
):
    with_one, without = packed(labels), packed(plain)
    assert read_index(with_one.folder).split("train").dictionary == DICTIONARY
    assert read_index(without.folder).split("train").dictionary is None
    assert_same(batch_of(with_one), batch_of(without))
    assert verify(with_one.folder) == []


@pytest.mark.parametrize("from_plain", [False, True])
def test_relabelling_carries_the_dictionary_or_drops_it(
    labels: LabelSet,
    plain: LabelSet,
    packed: Callable[[LabelSet | None], ShardIndex],
    tmp_path: Path,
    from_plain: bool,
):
    old, new = (plain, labels) if from_plain else (labels, plain)
    before = packed(old)
    relabelled = relabel(before.folder, new, out=tmp_path / "new").index
    assert relabelled.split("train").dictionary == (DICTIONARY if from_plain else None)
    assert files_of(tmp_path / "new") == files_of(packed(new).folder)
    assert_same(batch_of(relabelled), batch_of(before))


def test_maps_of_another_dictionary_are_not_packed(
    source: ImageSource, packed: Callable[[LabelSet | None], ShardIndex], tmp_path: Path
):
    mixed = labels_for(source, tmp_path / "mixed", dictionary=OTHER)
    mixed = replace(mixed, dictionary=DICTIONARY)
    with pytest.raises(ValueError, match=r"label map of .* is damaged: the compressed frame needs"):
        packed(mixed)
    data = packed(None).folder
    before = files_of(data)
    with pytest.raises(ValueError, match=r"needs zstd dictionary \d+: give the one that is stored"):
        relabel(data, mixed, out=None)
    assert files_of(data) == before


def test_slices_of_several_dictionaries_are_no_label_set(
    labels: LabelSet, source: ImageSource, tmp_path: Path
):
    other = labels_for(source, tmp_path / "other", dictionary=OTHER)
    (record,), (theirs,) = read_slices(labels.folder), read_slices(other.folder)
    write_index(labels.folder, [record], settings=theirs.settings, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"labels-00000\.json is of maps with another dictionary"):
        LabelSet.open(labels.folder)


def test_a_map_without_its_dictionary_says_where_it_is(labels: LabelSet):
    with pytest.raises(LabelMapError, match=r"needs zstd dictionary \d+: .*index\.json"):
        decode(labels.read(labels.keys[0]))


def test_a_data_set_whose_dictionary_is_damaged_is_refused(
    labels: LabelSet, packed: Callable[[LabelSet | None], ShardIndex]
):
    folder = packed(labels).folder
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(re.sub(r'("dictionary": "....).', r"\1/", text))
    with pytest.raises(ValueError, match="dictionary of the label set is damaged: its checksum"):
        read_index(folder)


def test_checks_and_pictures_read_maps_with_their_dictionary(
    labels: LabelSet, source: ImageSource, tmp_path: Path
):
    assert check_keys(labels.folder, source).is_whole
    runner = CliRunner()
    info = runner.invoke(label, ["info", str(labels.folder), "--json"])
    assert info.exit_code == 0 and len(info.stdout) < 4000  # the dictionary itself is not shown
    key = labels.keys[0]
    out = tmp_path / "sheet.png"
    shown = ["show", str(labels.folder), "--images", source.root, "--out", str(out), key]
    assert runner.invoke(label, shown).exit_code == 0 and out.exists()


def test_the_data_sets_description_names_levels_score_bits_and_dictionary(
    labels: LabelSet, packed: Callable[[LabelSet | None], ShardIndex]
):
    settings: dict[str, Any] = {"levels": [448, 640], "score_bits": 8, "mass": 0.99}
    folder = packed(replace(labels, index=labels.index | settings)).folder
    result = CliRunner().invoke(shard, ["info", str(folder)])
    assert (
        "label maps: a, native fit, at 448 + 640 px, top 2 (up to 0.99 of the mass), 8-bit scores, "
        f"a dictionary of {len(DICTIONARY):,} bytes\n"
    ) in result.stdout
    described = CliRunner().invoke(shard, ["info", str(folder), "--json"]).stdout
    facts = json.loads(described)["splits"]["train"]["labels"]
    assert facts["levels"] == [448, 640] and "dictionary" not in facts
    assert facts["dictionary_sha256"] == labels.index["dictionary_sha256"]
