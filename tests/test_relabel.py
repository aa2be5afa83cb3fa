"""Relabelling: other maps, the same images; a data set is whole whenever the job is killed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from packed import (
    broken_off_at,
    files_of,
    fill_disk,
    keys_of,
    labels_for,
    photo,
    read_with_dali,
    read_with_tarfile,
    read_with_webdataset,
)

from tokenlabel import cli
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.shards.relabel import relabel
from tokenlabel.shards.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Two classes of ten photos, one of which no teacher has seen."""
    for number in range(20):
        path = tmp_path / "images" / ("cat" if number < 10 else "dog") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return open_source(tmp_path / "images")


@pytest.fixture
def data(source: ImageSource, tmp_path: Path) -> ShardIndex:
    """A labelled split of four shards and one without labels."""
    labels = labels_for(source, tmp_path / "labels-1", quarantined="cat/03")
    pack(source, tmp_path / "data", split="train", labels=labels, shard_size=5)
    return pack(source, tmp_path / "data", split="val", shard_size=9).index


@pytest.fixture
def labels(source: ImageSource, tmp_path: Path) -> LabelSet:
    """Maps of another size, of all photos."""
    return labels_for(source, tmp_path / "labels-2", k=1, seed=1)


def by_key(index: ShardIndex, split: str) -> dict[str, list[bytes]]:
    return dict(read_with_tarfile(index, split))


# -------------------------------------------------------------------------------- what comes out


def test_images_classes_and_order_stay_and_maps_are_new(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    summary = relabel(data.folder, labels, out=tmp_path / "new")
    assert (summary.split, summary.left_out, summary.num_unused_labels) == ("train", {}, 0)
    assert keys_of(summary.index, "train") == keys_of(data, "train")
    old, new = by_key(data, "train"), by_key(summary.index, "train")
    assert len(new) == 19
    for key, (jpg, cls, tlm) in new.items():
        assert [jpg, cls] == old[key][:2]
        assert tlm == labels.read(key) != old[key][2]
    entry, before = summary.index.split("train"), data.split("train")
    assert entry.labels is not None and entry.labels["k"] == 1
    assert [shard.samples for shard in entry.shards] == [shard.samples for shard in before.shards]
    assert (entry.seed, entry.repaired) == (before.seed, before.repaired)
    assert entry.quarantined == {"cat/03": "not labelled: truncated"}
    assert verify(tmp_path / "new") == verify(data.folder) == []


def test_the_result_is_what_packing_the_labels_would_have_given(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    labels = labels_for(source, tmp_path / "labels-2", quarantined="cat/03", seed=1)
    relabel(data.folder, labels, out=tmp_path / "new")
    pack(source, tmp_path / "packed", split="train", labels=labels, shard_size=5)
    pack(source, tmp_path / "packed", split="val", shard_size=9)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "packed")


def test_other_splits_are_copied(data: ShardIndex, labels: LabelSet, tmp_path: Path):
    relabel(data.folder, labels, out=tmp_path / "new")
    old, new = files_of(data.folder), files_of(tmp_path / "new")
    assert old.keys() == new.keys()
    for name in new:
        assert (new[name] == old[name]) == name.startswith("val-")


def test_in_place_gives_the_same_files(data: ShardIndex, labels: LabelSet, tmp_path: Path):
    relabel(data.folder, labels, out=tmp_path / "new")
    relabel(data.folder, labels, out=None)
    assert files_of(data.folder) == files_of(tmp_path / "new")


def test_a_split_without_labels_can_get_its_first(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    index = relabel(data.folder, labels, out=None, split="val").index
    assert index.split("val").has_labels and index.split("val").num_samples == 20
    assert {key: fields[2] for key, fields in by_key(index, "val").items()} == {
        key: labels.read(key) for key in labels.keys
    }
    assert verify(data.folder) == []


def test_webdataset_and_dali_read_what_was_relabelled(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    index = relabel(data.folder, labels, out=tmp_path / "new").index
    expected = {key: tuple(fields) for key, fields in by_key(index, "train").items()}
    assert read_with_webdataset(index, "train") == expected
    assert read_with_dali(index, "train") == expected


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    for num_workers in (1, 3):
        relabel(data.folder, labels, out=tmp_path / f"{num_workers}", num_workers=num_workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_labels_made_from_the_packed_shards_fit_them(data: ShardIndex, tmp_path: Path):
    shards = open_source(data.folder / "train-*.tar")
    labels = labels_for(shards, tmp_path / "labels-2", seed=1)
    assert relabel(data.folder, labels, out=None).index.split("train").num_samples == 19


# ------------------------------------------------------------------- labels that do not fit quite


def test_images_that_the_labeler_could_not_label_leave_the_data_set(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    labels = labels_for(source, tmp_path / "labels-2", quarantined="dog/11")
    summary = relabel(data.folder, labels, out=tmp_path / "new")
    assert summary.left_out == {"dog/11": "not labelled: truncated"}
    split = summary.index.split("train")
    assert set(split.quarantined) == {"cat/03", "dog/11"}
    assert split.num_samples + len(split.quarantined) == split.num_listed == 20
    assert verify(tmp_path / "new") == []


def test_a_shard_that_loses_all_images_goes_and_the_others_are_counted_anew(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    order = keys_of(data, "train")
    kept = {"cat/03", *order[5:]}
    for sample in source.samples:
        if sample.key not in kept:
            Path(sample.file).unlink()
    labels = labels_for(open_source(source.root), tmp_path / "labels-2")
    summary = relabel(data.folder, labels, out=None, allow_missing=True)
    assert keys_of(summary.index, "train") == order[5:]
    assert sorted(path.name for path in data.folder.glob("train-*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]
    assert verify(data.folder) == []


def test_missing_labels_are_an_error_unless_allowed(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    (Path(source.root) / "dog/11.jpg").unlink()
    photo(99).save(Path(source.root) / "dog/new.jpg")
    labels = labels_for(open_source(source.root), tmp_path / "labels-2")
    before = files_of(data.folder)
    with pytest.raises(
        ValueError,
        match=r"1 \(dog/11\) of 19 images have no label; 1 \(dog/new\) of 20 labels .*--allow-miss",
    ):
        relabel(data.folder, labels, out=None)
    assert files_of(data.folder) == before
    summary = relabel(data.folder, labels, out=None, allow_missing=True)
    assert summary.left_out == {"dog/11": "no label in the label set"}
    assert summary.num_unused_labels == 1


def test_labels_for_none_of_the_images_are_an_error(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    shutil.move(Path(source.root) / "dog", Path(source.root) / "eel")
    shutil.move(Path(source.root) / "cat", Path(source.root) / "dog")
    labels = labels_for(open_source(source.root), tmp_path / "labels-2")
    with pytest.raises(ValueError, match="no image of split 'train' in .*data has a label map"):
        relabel(data.folder, labels, out=None, allow_missing=True)
    assert verify(data.folder) == []


def test_labels_of_other_classes_are_refused(data: ShardIndex, source: ImageSource, tmp_path: Path):
    before = files_of(data.folder)
    more = labels_for(source, tmp_path / "more", num_classes=1000)
    with pytest.raises(ValueError, match="label maps have 1000 classes and .*data has 2; "):
        relabel(data.folder, more, out=None)
    turned = labels_for(source, tmp_path / "turned", class_names=["dog", "cat"])
    with pytest.raises(ValueError, match="class 0 is 'cat' in .*data and 'dog' in the label maps"):
        relabel(data.folder, turned, out=None)
    assert files_of(data.folder) == before


def test_a_damaged_label_is_named_and_nothing_changes(
    data: ShardIndex, source: ImageSource, tmp_path: Path
):
    labels = labels_for(source, tmp_path / "labels-2", damaged="cat/05")
    before = files_of(data.folder)
    with pytest.raises(ValueError, match="the label map of cat/05 is damaged"):
        relabel(data.folder, labels, out=None)
    assert files_of(data.folder) == before


# ------------------------------------------------------------------------- data sets and folders


def test_a_damaged_shard_is_not_given_a_fresh_checksum(data: ShardIndex, labels: LabelSet):
    path = data.folder / "train-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000002\.tar changed after packing"):
        relabel(data.folder, labels, out=None)
    assert [str(problem) for problem in verify(data.folder)] == [
        "train-000002.tar: changed after packing: its checksum does not fit"
    ]


def test_a_damaged_shard_of_another_split_is_not_copied(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    path = data.folder / "val-000000.idx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"val-000000\.idx changed after packing"):
        relabel(data.folder, labels, out=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_split_must_be_named_where_there_is_a_choice(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    relabel(data.folder, labels, out=None, split="val")
    with pytest.raises(ValueError, match="has the splits 'train', 'val'; name the one.*--split"):
        relabel(data.folder, labels, out=None)
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'val'"):
        relabel(data.folder, labels, out=None, split="test")


def test_a_folder_with_something_in_it_is_refused(
    data: ShardIndex, labels: LabelSet, tmp_path: Path
):
    relabel(data.folder, labels, out=tmp_path / "new")
    with pytest.raises(FileExistsError, match="new is not empty, it holds index.json; give --out"):
        relabel(data.folder, labels, out=tmp_path / "new")
    with pytest.raises(ValueError, match="is the data set itself; --in-place"):
        relabel(data.folder, labels, out=data.folder)


def test_shards_of_others_are_referred_to_pack(tmp_path: Path, labels: LabelSet):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/000.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no index.json, so it is no data set.*shard pack"):
        relabel(tmp_path / "theirs", labels, out=None)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        relabel(tmp_path / "nowhere", labels, out=None)


# ------------------------------------------------------------------------------------ broken off


@pytest.mark.parametrize("in_place", [True, False])
def test_a_full_disk_is_one_line_and_changes_nothing(
    data: ShardIndex,
    labels: LabelSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_place: bool,
):
    before = files_of(data.folder)
    fill_disk(monkeypatch, after=3)
    with pytest.raises(OSError, match=r"cannot write .*train-0\S+: No space left") as caught:
        relabel(data.folder, labels, out=None if in_place else tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert files_of(data.folder) == before
    assert in_place or list((tmp_path / "new").iterdir()) == []


KILLED = """
import itertools, os, shutil, signal, sys, traceback
from pathlib import Path
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.shards import writer
from tokenlabel.shards.relabel import relabel

data, labels, copies = map(Path, sys.argv[1:4])
in_place = sys.argv[4] == "in place"

def dying(function):
    def call(*arguments, **options):
        global num_left
        num_left -= 1
        if num_left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for number in itertools.count():
    copy = copies / f"{number:03}"
    if in_place:
        shutil.copytree(data, copy)
    if os.fork() == 0:
        num_left = number
        writer.create = dying(writer.create)
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            setattr(Path, name, dying(getattr(Path, name)))
        source, out = (copy, None) if in_place else (data, copy)
        try:
            relabel(source, LabelSet.open(labels), out=out, num_workers=1)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


@pytest.mark.parametrize("where", ["in place", "out"])
def test_killed_anywhere_a_relabel_can_be_run_again_and_no_reader_sees_a_mixture(
    data: ShardIndex, labels: LabelSet, tmp_path: Path, where: str
):
    (tmp_path / "copies").mkdir()
    command = [sys.executable, "-c", KILLED, data.folder, labels.folder, tmp_path / "copies", where]
    subprocess.run(command, check=True)
    old = files_of(data.folder)
    new = files_of(relabel(data.folder, labels, out=tmp_path / "whole").index.folder)
    *killed, finished = sorted((tmp_path / "copies").iterdir())
    assert files_of(finished) == new
    states = set()
    for copy in killed:
        files = {path.name: path.read_bytes() for path in copy.glob("[!.]*")}
        if files == new:
            states.add("new")
            continue
        if files == old:
            states.add("old")
        elif "index.json" not in files:
            states.add("no index")
        else:
            states.add("no such split")
            assert list(read_index(copy).splits) == ["val"]
        if where == "in place":
            relabel(copy, labels, out=None)
        else:
            relabel(data.folder, labels, out=copy)
        assert files_of(copy) == new
    assert len(killed) > 20
    assert (
        states == {"in place": {"old", "no such split", "new"}, "out": {"no index", "new"}}[where]
    )


def test_a_pack_finishes_the_relabel_that_died_before_it(
    data: ShardIndex, source: ImageSource, labels: LabelSet
):
    with broken_off_at("_forget"):
        relabel(data.folder, labels, out=None)
    assert read_index(data.folder).split("train").labels == data.split("train").labels
    pack(source, data.folder, split="test")
    index = read_index(data.folder)
    assert index.split("train").labels != data.split("train").labels
    assert list(index.splits) == ["test", "train", "val"]
    assert verify(data.folder) == []


# ---------------------------------------------------------------------------------- command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.shard, ["relabel", *map(str, arguments)])


def test_the_command_says_what_it_wrote(data: ShardIndex, source: ImageSource, tmp_path: Path):
    labels = labels_for(source, tmp_path / "labels-2", quarantined="dog/11").folder
    result = run(data.folder, "--labels", labels, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("train: 18 samples in 4 shards, ")
    assert lines[1:] == [
        f"  left out: 1 image, listed in {tmp_path}/new/index.json",
        "    dog/11: not labelled: truncated",
    ]
    assert run(data.folder, "--labels", labels, "--in-place", "--workers", 1).exit_code == 0
    assert files_of(data.folder) == files_of(tmp_path / "new")


def test_a_command_that_is_run_again_after_a_kill_says_so(data: ShardIndex, labels: LabelSet):
    with broken_off_at("finish_publishing"):
        relabel(data.folder, labels, out=None)
    result = run(data.folder, "--labels", labels.folder, "--in-place")
    assert "made by an earlier run; its files are in their places now\n" in result.stdout
    assert verify(data.folder) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "give either --out, a new folder, or --in-place"),
        (["--out", "new", "--in-place"], "give either --out, a new folder, or --in-place"),
        (["--in-place", "--split", "test"], "has no split 'test'; it has 'train', 'val'"),
        (["--in-place", "--labels", "nowhere"], "label folder nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    data: ShardIndex, labels: LabelSet, options: list[str], problem: str
):
    result = run(data.folder, "--labels", labels.folder, *options)
    assert result.exit_code == 2
    assert problem in result.stderr and len(result.stderr.splitlines()) == 1
