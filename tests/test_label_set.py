"""Label shards on disk: what was written is read, and what is not whole is refused."""

import errno
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

from tokenlabel.labeler.label_set import (
    INDEX_NAME,
    LabelSet,
    is_whole,
    read_slice,
    write_index,
    write_slice,
)

SETTINGS = {"teacher": {"name": "a_teacher"}, "fit": "native", "k": 2, "num_classes": 3}
NAMES = ["ant", "bee", "ünï 字"]
ODD_KEYS = ["001%2EBlack%20footed/a%2Eb", "ünï/字", f"{'long' * 20}/{'er' * 40}", f"a/{'ü' * 150}"]


def write_set(folder: Path, slices: list[dict[str, bytes]], quarantined: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    records = [
        write_slice(
            folder,
            number,
            maps.items(),
            settings=SETTINGS,
            quarantined=quarantined if number == 0 else {},
            num_correct=1,
        )
        for number, maps in enumerate(slices)
    ]
    write_index(folder, records, settings=SETTINGS, class_names=NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five maps in two slices; their bytes are not label maps, and nobody here looks into them."""
    slices = [{f"a/{i}": bytes([i]) * (500 + 10 * i) for i in range(3)}]
    slices.append({f"b/{i}": bytes([100 + i]) * 512 for i in range(2)})
    write_set(tmp_path / "labels", slices, {"a/bad": "the file is empty (0 bytes)"})
    return tmp_path / "labels"


def rewrite_index(folder: Path, **changes) -> None:
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    (folder / INDEX_NAME).write_text(json.dumps({**index, **changes}), encoding="utf-8")


def test_every_map_is_read_back_by_its_key(folder):
    labels = LabelSet.open(folder)
    assert labels.keys == ["a/0", "a/1", "a/2", "b/0", "b/1"]
    assert [labels.read(key) for key in labels.keys] == [
        *(bytes([i]) * (500 + 10 * i) for i in range(3)),
        *(bytes([100 + i]) * 512 for i in range(2)),
    ]


def test_the_index_says_what_made_the_set_and_what_was_left_out(folder):
    labels = LabelSet.open(folder)
    assert (labels.k, labels.num_classes, labels.class_names) == (2, 3, NAMES)
    assert labels.quarantined == {"a/bad": "the file is empty (0 bytes)"}
    assert len(labels) == labels.index["num_labelled"] == 5
    assert labels.index["num_quarantined"] == 1
    assert labels.index["num_correct"] == 2
    assert labels.index["teacher"] == {"name": "a_teacher"}
    assert "a/0" in labels and "a/bad" not in labels


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_read_by_tarfile_and_webdataset_too(tmp_path, key):
    write_set(tmp_path, [{"a/first": b"x" * 700, key: b"a map", "z": b"y"}], {})
    assert LabelSet.open(tmp_path).read(key) == b"a map"
    with tarfile.open(tmp_path / "labels-00000.tar") as tar:
        member = tar.extractfile(f"{key}.tlm")
        assert member is not None and member.read() == b"a map"
    samples = WebDataset(str(tmp_path / "labels-00000.tar"), shardshuffle=False)
    assert {sample["__key__"]: sample["tlm"] for sample in samples}[key] == b"a map"


def test_a_set_is_read_by_many_threads_and_survives_a_trip_to_another_process(folder):
    labels = pickle.loads(pickle.dumps(LabelSet.open(folder)))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(labels.read, labels.keys * 20))
    assert read == [labels.read(key) for key in labels.keys] * 20


def test_the_same_maps_make_the_same_bytes(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = read_slice(folder, 1)
    assert record is not None
    labels = LabelSet.open(folder)
    again = tmp_path / "again"
    again.mkdir()
    maps = [(key, labels.read(key)) for key in record.samples]
    write_slice(again, 1, maps, settings=SETTINGS, quarantined={}, num_correct=1)
    assert all(path.read_bytes() == before[path.name] for path in again.iterdir())


def test_a_set_without_maps_can_be_opened(tmp_path):
    write_set(tmp_path, [{}], {"a": "damaged"})
    assert len(LabelSet.open(tmp_path)) == 0


def test_a_torn_tar_is_refused_by_name(folder):
    os.truncate(folder / "labels-00001.tar", 1000)
    with pytest.raises(ValueError, match=r"labels-00001\.tar has 1000 bytes, 10240 were written"):
        LabelSet.open(folder)


def test_a_tar_torn_while_it_is_read_is_refused(folder):
    labels = LabelSet.open(folder)
    os.truncate(folder / "labels-00001.tar", 1000)
    with pytest.raises(ValueError, match=r"labels-00001\.tar ends before the label map of b/1"):
        labels.read("b/1")


@pytest.mark.parametrize("name", ["labels-00000.tar", "labels-00001.json"])
def test_a_missing_file_is_named_with_what_to_do(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*run the same tl-label generate"):
        LabelSet.open(folder)


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_flipped_bit_anywhere_in_a_tar(folder):
    labels = LabelSet.open(folder)
    labels.verify()
    flip_a_bit(folder / "labels-00001.tar", 600)
    record = read_slice(folder, 1)
    assert record is not None and not is_whole(folder, record)
    with pytest.raises(ValueError, match=r"labels-00001\.tar is not what was written"):
        labels.verify()


def test_a_flipped_bit_in_any_json_is_found_on_opening(folder):
    for name in (INDEX_NAME, "labels-00000.json", "labels-00001.json"):
        whole = (folder / name).read_bytes()
        for position in range(0, len(whole) - 1, 7):  # the last byte is a line's end
            flip_a_bit(folder / name, position)
            with pytest.raises(ValueError, match=f"{name}|is damaged"):
                LabelSet.open(folder)
            (folder / name).write_bytes(whole)
    LabelSet.open(folder)


@pytest.mark.parametrize("name", ["../labels-00000.tar", "/etc/passwd", "labels-00001.tar"])
def test_an_index_that_names_other_files_is_refused(folder, name):
    shards = [{"name": name, "samples": 3, "bytes": 1, "sha256": ""}]
    rewrite_index(folder, shards=shards)
    with pytest.raises(ValueError, match=r"expected labels-00000\.tar"):
        LabelSet.open(folder)


def test_shards_without_an_index_are_an_unfinished_set(folder):
    (folder / INDEX_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"no index\.json.*goes on where it stopped"):
        LabelSet.open(folder)


def test_an_index_without_shards_is_refused(folder):
    for path in folder.glob("labels-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"labels-00000\.tar is missing, though the index names"):
        LabelSet.open(folder)


def test_a_folder_that_is_no_label_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        LabelSet.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it is no label set; make one with tl-label"):
        LabelSet.open(tmp_path)
    (tmp_path / INDEX_NAME).write_text('{"format": "tokenlabel-shards"}')
    with pytest.raises(ValueError, match=r"describes 'tokenlabel-shards', not 'tokenlabel-labels'"):
        LabelSet.open(tmp_path)
    (tmp_path / INDEX_NAME).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        LabelSet.open(tmp_path)


def test_an_index_of_a_later_version_is_refused(folder):
    rewrite_index(folder, version=2)
    with pytest.raises(ValueError, match=r"has version 2, this tokenlabel reads 1"):
        LabelSet.open(folder)


def test_the_index_removes_what_killed_processes_and_larger_runs_left_behind(folder):
    before = {path.name for path in folder.iterdir()}
    left = [".labels-00000.tar.host-1.part", ".index.json.host-2.part", "labels-00002.tar"]
    for name in [*left, "notes.txt"]:
        (folder / name).write_bytes(b"")
    records = [record for number in (0, 1) if (record := read_slice(folder, number))]
    write_index(folder, records, settings=SETTINGS, class_names=NAMES)
    assert {path.name for path in folder.iterdir()} == before | {"notes.txt"}


def test_a_full_disk_leaves_no_half_file_and_names_the_one_it_was(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*labels-00002\.tar: No space left"):
        write_slice(folder, 2, [("c", b"x")], settings=SETTINGS, quarantined={}, num_correct=0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
