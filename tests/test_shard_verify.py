"""index.json refuses what it cannot vouch for; verify finds whatever is not as it was packed."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_map
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenlabel.labeler.label_map import encode
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.index import (
    ShardEntry,
    ShardIndex,
    SplitIndex,
    format_idx,
    read_index,
    write_index,
)
from tokenlabel.shards.pack import pack
from tokenlabel.shards.verify import verify

NUM_CLASSES = 3
Sample = tuple[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of small photos, several shards, one image left out."""
    root = tmp_path_factory.mktemp("packed")
    for number in range(9):
        path = root / f"images/class {number % NUM_CLASSES}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (25 * number, 99, 50)).save(path)
    (root / "images/class 0/broken.jpg").write_bytes(b"nothing")
    source = open_source(root / "images")
    for split in ("train", "val"):
        pack(source, root / "shards", split=split, shard_size=4)
    return root / "shards"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(packed, tmp_path / "shards")


def problems_of(folder: Path) -> list[str]:
    return [str(problem) for problem in verify(folder)]


def label_bytes(num_classes: int = NUM_CLASSES) -> bytes:
    return encode(random_map(np.random.default_rng(0), grid=(2, 3), k=2, num_classes=num_classes))


def signed_data_set(folder: Path, *shards: list[Sample], has_labels: bool = True) -> Path:
    """Write tars of any content with an index whose checksums are all right."""
    folder.mkdir()
    entries = []
    for number, samples in enumerate(shards):
        buffer, rows = io.BytesIO(), []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for key, fields in samples:
                row = []
                for extension, data in fields.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    row.append((member.name, buffer.tell() + tarfile.BLOCKSIZE, len(data)))
                    archive.addfile(member, io.BytesIO(data))
                rows.append(row)
        idx = format_idx(rows).encode()
        name = f"train-{number:06}.tar"
        (folder / name).write_bytes(buffer.getvalue())
        (folder / name).with_suffix(".idx").write_bytes(idx)
        entries.append(
            ShardEntry(
                name=name,
                samples=len(samples),
                bytes=len(buffer.getvalue()),
                sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
                idx_sha256=hashlib.sha256(idx).hexdigest(),
            )
        )
    num_samples = sum(map(len, shards))
    split = SplitIndex(
        num_samples=num_samples,
        has_labels=has_labels,
        seed=0,
        shards=entries,
        labels={} if has_labels else None,
        num_listed=num_samples,
        quarantined={},
        repaired={},
    )
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    write_index(
        ShardIndex(
            folder=folder,
            num_classes=NUM_CLASSES,
            class_ids=names,
            class_names=names,
            splits={"train": split},
        )
    )
    return folder


def sample(key: str, **fields: bytes) -> Sample:
    return key, {"jpg": b"a picture", "cls": b"2", "tlm": label_bytes()} | fields


# --------------------------------------------------------------------------------------- verify


def test_a_whole_data_set_has_no_problems(folder: Path, tmp_path: Path):
    assert verify(folder) == []
    assert verify(signed_data_set(tmp_path / "signed", [sample("a"), sample("b")])) == []


@settings(max_examples=150)
@given(data=st.data())
def test_every_flipped_byte_is_found(packed: Path, data: st.DataObject):
    path = data.draw(st.sampled_from(sorted(packed.iterdir())), "file")
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1), "position")
    flip = data.draw(st.integers(1, 255), "flip")
    try:
        path.write_bytes(
            content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]
        )
        assert path.name in {problem.file for problem in verify(packed)}
    finally:
        path.write_bytes(content)


def test_a_class_name_that_is_no_text_is_found(folder: Path):
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"class 0"', r'"\ud800"', 1))
    assert [problem.file for problem in verify(folder)] == ["index.json"]


def test_every_truncated_file_is_found(folder: Path):
    for path in sorted(folder.glob("*-*")):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert [problem.file for problem in verify(folder)] == [path.name]
        path.write_bytes(content)


def test_missing_files_are_found(folder: Path):
    (folder / "train-000001.tar").unlink()
    (folder / "val-000000.idx").unlink()
    assert problems_of(folder) == ["train-000001.tar: is missing", "val-000000.idx: is missing"]


def test_surplus_files_are_found(folder: Path):
    shutil.copy(folder / "train-000000.tar", folder / "train-000003.tar")
    (folder / ".train-000000.tar.part").write_bytes(b"")
    assert problems_of(folder) == [
        ".train-000000.tar.part: is not part of the data set",
        "train-000003.tar: is not part of the data set",
    ]


def test_two_exchanged_shards_are_found(folder: Path):
    content = (folder / "train-000000.idx").read_bytes()
    shutil.copy(folder / "train-000001.idx", folder / "train-000000.idx")
    (folder / "train-000001.idx").write_bytes(content)
    assert problems_of(folder) == [
        "train-000000.idx: changed after packing: its checksum does not fit",
        "train-000001.idx: changed after packing: its checksum does not fit",
    ]


def test_a_wrong_count_is_found(tmp_path: Path):
    folder = signed_data_set(tmp_path / "shards", [sample("a"), sample("b")])
    index = read_index(folder)
    split = index.split("train")
    entry = replace(split.shards[0], samples=3)
    write_index(replace(index, splits={"train": replace(split, shards=[entry], num_samples=3)}))
    assert problems_of(folder) == ["train-000000.tar: holds 2 samples, the index says 3"]


def test_an_idx_that_does_not_fit_its_tar_is_found(tmp_path: Path):
    folder = signed_data_set(tmp_path / "shards", [sample("a"), sample("b")])
    idx = (folder / "train-000000.idx").read_bytes().replace(b"jpg 512 ", b"jpg 513 ")
    (folder / "train-000000.idx").write_bytes(idx)
    index = read_index(folder)
    split = index.split("train")
    entry = replace(split.shards[0], idx_sha256=hashlib.sha256(idx).hexdigest())
    write_index(replace(index, splits={"train": replace(split, shards=[entry])}))
    assert problems_of(folder) == ["train-000000.idx: does not fit train-000000.tar"]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (sample("x", tlm=b"\0" * 40), "sample x has a damaged label map: "),
        (sample("x", tlm=label_bytes(7)), "has a label map of 7 classes, the data set has 3"),
        (sample("x", cls=b"3"), "has class b'3', allowed are 0 to 2"),
        (sample("x", cls=b"-1"), "has class b'-1', allowed are 0 to 2"),
        (sample("x", cls=b""), "has class b'', allowed are 0 to 2"),
        (sample("x", cls=b"0" * 5000), "has class b'0000"),
        (sample("x", txt=b"?"), "has the fields jpg cls tlm txt, expected jpg cls tlm"),
        (("x", {"jpg": b"", "cls": b"1"}), "has the fields jpg cls, expected jpg cls tlm"),
        (("x", {"cls": b"1", "jpg": b"", "tlm": b""}), "has the fields cls jpg tlm, expected jpg"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_wrong_sample_is_found(tmp_path: Path, wrong: Sample, problem: str):
    folder = signed_data_set(tmp_path / "shards", [sample("a"), wrong, sample("b")])
    (found,) = problems_of(folder)
    assert found.startswith("train-000000.tar: sample x has")
    assert problem in found


def test_labels_in_a_split_without_labels_are_found(tmp_path: Path):
    folder = signed_data_set(tmp_path / "shards", [sample("a")], has_labels=False)
    assert problems_of(folder) == [
        "train-000000.tar: sample a has the fields jpg cls tlm, expected jpg cls"
    ]


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ([["a", "b", "a"]], "train-000000.tar: sample a is in train-000000.tar already"),
        ([["a", "b"], ["c", "b"]], "train-000001.tar: sample b is in train-000000.tar already"),
    ],
)
def test_keys_that_occur_twice_are_found(tmp_path: Path, shards: list[list[str]], problem: str):
    folder = signed_data_set(tmp_path / "shards", *([sample(k) for k in keys] for keys in shards))
    assert problems_of(folder) == [problem]


def test_a_tar_that_is_none_is_found(tmp_path: Path):
    folder = signed_data_set(tmp_path / "shards", [sample("a")])
    tar = b"no tar at all" * 100
    (folder / "train-000000.tar").write_bytes(tar)
    index = read_index(folder)
    split = index.split("train")
    sha256 = hashlib.sha256(tar).hexdigest()
    entry = replace(split.shards[0], bytes=len(tar), sha256=sha256)
    write_index(replace(index, splits={"train": replace(split, shards=[entry])}))
    (found,) = problems_of(folder)
    assert found.startswith("train-000000.tar: is no readable tar: ")


# ------------------------------------------------------------------------------------ index.json


def test_the_index_reads_back_as_written(packed: Path):
    index = read_index(packed)
    before = (packed / "index.json").read_bytes()
    write_index(index)
    assert (packed / "index.json").read_bytes() == before
    assert read_index(packed) == index


def test_an_unknown_split_is_answered_with_the_known_ones(packed: Path):
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'val'"):
        read_index(packed).split("test")


def test_shards_without_an_index_are_an_unfinished_data_set(folder: Path):
    (folder / "index.json").rename(folder / ".index.json.part")
    with pytest.raises(FileNotFoundError, match="still going on or was broken off; run the same"):
        read_index(folder)


def test_a_folder_without_an_index_is_no_data_set(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no index.json, so it is no data set; make one"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match="data set folder .*/nowhere does not exist"):
        read_index(tmp_path / "nowhere")


def test_an_index_without_its_shards_is_refused(folder: Path):
    index = read_index(folder)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001.tar is missing \(1 of 6 files"):
        index.shard_paths("train")
    assert len(index.shard_paths("val")) == 3


def test_a_shard_of_another_size_is_refused(folder: Path):
    index = read_index(folder)
    with (folder / "val-000002.tar").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=r"val-000002.tar has \d+ bytes, the index says \d+; copy"):
        index.shard_paths("val")


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


FIRST = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("version", value=2), "has version 2, this tokenlabel reads version 1; install"),
        (_set("format", value="tokenlabel-labels"), "describes 'tokenlabel-labels', expected"),
        (_set("num_classes", value=4), "num_classes, class_ids and class_names disagree"),
        (_set("num_classes", value=3.0), "is damaged.*expected int, found 3.0"),
        (_set("class_ids", value="abc"), "is damaged.*expected list, found 'abc'"),
        (_set("splits", value=[]), "is damaged"),
        (_set("splits", "train", "has_labels", value=0), "expected bool, found 0"),
        (_set("splits", "train", "num_samples", value=8), "not the sum over its shards"),
        (_set("splits", "train", "quarantined", value={"x": 1}), "expected str, found 1"),
        (_set(*FIRST, "name", value="../train-000000.tar"), "is no shard name of split 'train'"),
        (_set(*FIRST, "name", value="/etc/train-000000.tar"), "is no shard name"),
        (_set(*FIRST, "name", value="val-000000.tar"), "is no shard name of split 'train'"),
        (_set(*FIRST, "bytes", value="12"), "expected int, found '12'"),
    ],
)
def test_a_wrong_index_is_refused(folder: Path, change: Callable[[Any], None], problem: str):
    data = json.loads((folder / "index.json").read_text())
    change(data)
    (folder / "index.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=problem):
        read_index(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, "\xff"])
def test_text_that_is_no_index_is_refused(folder: Path, text: str):
    (folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="index.json is damaged"):
        read_index(folder)
    assert [problem.file for problem in verify(folder)] == ["index.json"]


def test_every_entry_of_the_index_is_documented(packed: Path, docs_folder: Path):
    text = (docs_folder / "dataset-shards.md").read_text()
    index = json.loads((packed / "index.json").read_text())
    split = index["splits"]["train"]
    for name in (*index, *split, *split["shards"][0]):
        assert f'"{name}": ' in text, name
