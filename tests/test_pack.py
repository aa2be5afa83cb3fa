"""Packing: what comes out is what went in, whoever reads it, and nothing half done stays."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from offered import fill_with_photos, offer, shards_of, tar_of
from packed import (
    Contents,
    broken_off_at,
    files_of,
    fill_disk,
    jpeg_of,
    keys_of,
    labels_for,
    photo,
    read_with_dali,
    read_with_tarfile,
    read_with_webdataset,
)
from PIL import Image
from wds2idx import IndexCreator

from tokenlabel import cli
from tokenlabel.labeler.images import BadImage, load_image, portable_jpeg
from tokenlabel.labeler.sources import ImageSource, Sample, open_source
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.shards.verify import verify
from tokenlabel.shards.writer import tar_header

ODD_NAMES = [
    "ünï/字 ö.jpg",
    "001.Black footed/a.b.c.jpg",
    "001.Black footed/a.b.d.jpg",
    "__background__/100%.jpg",
    "back\\slash/quote'\".jpg",
    f"{'long' * 20}/{'er' * 40}.jpg",  # above 100 bytes: split over two fields of the header
    f"{'long' * 20}/{'ü' * 100}.jpg",  # no such place to split
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of ten photos."""
    for number in range(20):
        path = tmp_path / "images" / ("cat" if number < 10 else "dog") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


# -------------------------------------------------------------------------- other people's readers


@pytest.fixture
def odd(tmp_path: Path, out: Path) -> tuple[ShardIndex, Contents]:
    """A data set of names that readers trip over, and what should be in it."""
    for number, name in enumerate(ODD_NAMES):
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    source = open_source(tmp_path / "odd")
    labels = labels_for(source, tmp_path / "labels")
    summary = pack(source, out, split="train", labels=labels, shard_size=3)
    expected = {
        sample.key: (
            source.read(sample),
            str(sample.class_index).encode(),
            labels.read(sample.key),
        )
        for sample in source.samples
    }
    assert len(expected) == len(ODD_NAMES)
    return summary.index, expected


def test_webdataset_reads_what_was_packed(odd: tuple[ShardIndex, Contents]):
    index, expected = odd
    assert read_with_webdataset(index, "train") == expected


def test_dali_reads_what_was_packed(odd: tuple[ShardIndex, Contents]):
    index, expected = odd
    assert read_with_dali(index, "train") == expected


def test_dali_reads_what_was_packed_without_our_idx_too(odd: tuple[ShardIndex, Contents]):
    index, expected = odd
    assert read_with_dali(index, "train", with_idx=False) == expected


def test_the_idx_equals_that_of_dalis_own_script(
    odd: tuple[ShardIndex, Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, _ = odd
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # the script asks `tar`, which speaks the locale
    theirs = tmp_path / "theirs.idx"
    for tar, idx in zip(index.shard_paths("train"), index.idx_paths("train")):
        with IndexCreator(str(tar), str(theirs), verbose=False) as creator:
            creator.create_index()
        for ours, line in zip(idx.read_text().splitlines(), theirs.read_text().splitlines()):
            if "ü" * 100 not in ours:  # of names in GNU's long form the script takes a wrong offset
                assert ours == line


# ---------------------------------------------------------------------------------- order, bytes


def test_the_order_depends_on_the_seed_alone(images: Path, tmp_path: Path):
    source = open_source(images)
    runs: list[dict[str, Any]] = [{"seed": 1}, {"seed": 1, "shard_size": 4}, {"seed": 2}]
    orders = [
        keys_of(pack(source, tmp_path / f"{number}", split="train", **options).index, "train")
        for number, options in enumerate(runs)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [s.key for s in source.samples]


def test_this_is_the_order_of_seed_0_on_every_machine(images: Path, out: Path):
    index = pack(open_source(images), out, split="train").index
    expected = ["dog/11", "dog/14", "dog/10", "dog/18", "dog/15"]
    assert keys_of(index, "train")[:5] == expected


def test_the_shuffle_mixes_the_classes(images: Path, out: Path):
    index = pack(open_source(images), out, split="train").index
    classes = [key.split("/")[0] for key in keys_of(index, "train")]
    assert 2 <= classes[:10].count("cat") <= 8


def test_a_new_image_does_not_move_the_others(images: Path, tmp_path: Path):
    before = keys_of(pack(open_source(images), tmp_path / "a", split="train").index, "train")
    photo(99).save(images / "cat/new.jpg")
    after = keys_of(pack(open_source(images), tmp_path / "b", split="train").index, "train")
    assert [key for key in after if key != "cat/new"] == before


def test_the_bytes_do_not_depend_on_the_number_of_workers(images: Path, tmp_path: Path):
    source = open_source(images)
    for num_workers in (1, 3):
        pack(source, tmp_path / f"{num_workers}", split="train", num_workers=num_workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_tar_members_tell_nothing_about_the_machine(images: Path, out: Path):
    (path,) = pack(open_source(images), out, split="train").index.shard_paths("train")
    with tarfile.open(path) as archive:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive}
    assert facts == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"shard_size": 8}, [8, 8, 4]),
        ({"shard_size": 20}, [20]),
        ({"shard_bytes": 10_000}, [3, 3, 3, 3, 3, 3, 2]),
    ],
    ids=str,
)
def test_shards_end_at_the_size_asked_for(
    images: Path, out: Path, options: dict[str, Any], sizes: list[int]
):
    index = pack(open_source(images), out, split="train", **options).index
    assert [shard.samples for shard in index.split("train").shards] == sizes
    largest = max(path.stat().st_size for path in index.shard_paths("train"))
    assert largest <= options.get("shard_bytes", largest)


def test_an_image_larger_than_a_shard_gets_one_of_its_own(images: Path, out: Path):
    Image.effect_noise((300, 300), 80).save(images / "cat/large.jpg")
    index = pack(open_source(images), out, split="train", shard_bytes=10_000).index
    assert len(keys_of(index, "train")) == 21


@pytest.mark.parametrize("way", ["tar of class tars", "zip", "braces", "list"])
def test_the_bytes_do_not_depend_on_what_held_the_images(tmp_path: Path, way: str):
    photos = fill_with_photos(tmp_path / "photos")
    offered = offer(photos, tmp_path / "offered")
    source = open_source(offered[way], root=photos if way == "list" else None)
    folder = open_source(photos)
    labels = labels_for(folder, tmp_path / "labels")
    sets = [
        pack(images, tmp_path / f"{i}", split="train", labels=labels, shard_size=8).index
        for i, images in enumerate((folder, source))
    ]
    assert sets[0].splits == sets[1].splits
    assert verify(sets[1].folder) == []


def test_plain_jpegs_in_shards_of_others_stay_untouched(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    for i, shard in enumerate(shards_of(images, num_shards=3)):
        (tmp_path / f"{i:03}.tar").write_bytes(shard)
    labels = labels_for(source, tmp_path / "labels")
    shards = open_source(f"{tmp_path}/{{000..002}}.tar")
    index = pack(shards, out, split="train", labels=labels).index
    assert read_with_webdataset(index, "train") == {
        s.key: (source.read(s), str(s.class_index).encode(), labels.read(s.key))
        for s in source.samples
    }


def test_images_without_classes_are_refused(images: Path, out: Path):
    with pytest.raises(ValueError, match="cat says of no image which class it has, .*PATH,CLASS"):
        pack(open_source(images / "cat"), out, split="train")
    assert not out.exists()


# --------------------------------------------------------------------------- repaired, quarantined


def test_unusable_images_are_listed_and_not_packed(images: Path, out: Path):
    (images / "cat/00.jpg").write_bytes((images / "cat/01.jpg").read_bytes()[:-100])
    (images / "dog/10.jpg").write_bytes(b"")
    (images / "dog/gone.jpg").symlink_to(images / "nowhere.jpg")
    split = pack(open_source(images), out, split="train").index.split("train")
    assert set(split.quarantined) == {"cat/00", "dog/10", "dog/gone"}
    assert split.quarantined["cat/00"].startswith("truncated")
    assert split.quarantined["dog/10"] == "the file is empty (0 bytes)"
    assert split.quarantined["dog/gone"] == "cannot be read: No such file or directory"
    assert split.num_samples + len(split.quarantined) == split.num_listed == 21
    assert read_index(out).split("train") == split


def test_looking_at_the_ends_packs_the_same_and_finds_what_is_cut_off(images: Path, tmp_path: Path):
    (images / "cat/00.jpg").write_bytes((images / "cat/01.jpg").read_bytes()[:-100])
    for check in ("decode", "ends"):
        pack(open_source(images), tmp_path / check, split="train", check=check)
    assert files_of(tmp_path / "decode") == files_of(tmp_path / "ends")


def test_the_headers_are_those_of_tarfile():
    for name, num_bytes in (("a.jpg", 0), ("é/ü.cls", 3), ("x" * 100, 8**11 - 1), ("x", 8**11)):
        info = tarfile.TarInfo(name)
        info.size = num_bytes
        form = tarfile.USTAR_FORMAT if num_bytes < 8**11 else tarfile.GNU_FORMAT
        assert tar_header(name, num_bytes) == info.tobuf(form, "utf-8")


def test_storage_that_fails_is_an_error_and_not_a_hundred_bad_images(
    images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: ImageSource, sample: Sample) -> bytes:
        raise OSError(errno.EIO, "Input/output error", sample.file)

    monkeypatch.setattr(ImageSource, "read", fail)
    with pytest.raises(OSError, match="Input/output error: '.*jpg'"):
        pack(open_source(images), out, split="train")
    assert list(out.iterdir()) == []


def test_repaired_images_are_counted_by_reason(images: Path, out: Path):
    photo(0).save(images / "cat/00.jpg", "PNG")
    photo(1).save(images / "cat/01.jpg", "PNG")
    photo(2).convert("CMYK").save(images / "cat/02.jpg")
    index = pack(open_source(images), out, split="train").index
    assert index.split("train").repaired == {"CMYK colours": 1, "PNG, not JPEG": 2}
    packed = dict(read_with_tarfile(index, "train"))
    assert packed["cat/00"][0].startswith(b"\xff\xd8")
    assert packed["cat/05"][0] == (images / "cat/05.jpg").read_bytes()


def test_images_are_shrunk_on_request(images: Path, out: Path):
    index = pack(open_source(images), out, split="train", max_side_px=16).index
    assert index.split("train").repaired == {"longer side above 16 px": 20}


def test_a_folder_of_unusable_images_is_an_error(tmp_path: Path, out: Path):
    (tmp_path / "images/cat").mkdir(parents=True)
    (tmp_path / "images/cat/x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 images can be packed, e.g. cat/x: .* empty"):
        pack(open_source(tmp_path / "images"), out, split="train")
    assert list(out.iterdir()) == []


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Spoil a file somewhere behind its first two bytes."""
    at = int(rng.integers(2, len(data) - 64))
    put = {
        "cut off": b"",
        "cut off, with an end": b"\xff\xd9",
        "a flipped bit": bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :],
        "64 bytes of garbage": rng.bytes(64) + data[at + 64 :],
        "64 bytes of zeros": bytes(64) + data[at + 64 :],
        "64 bytes left out": data[at + 64 :],
        "a marker": bytes([0xFF, rng.integers(0xC0, 0xFF)]) + data[at + 2 :],
    }
    return data[:at] + put[kind]


def is_refused(read: Callable[[bytes], object], data: bytes) -> bool:
    try:
        read(data)
    except BadImage:
        return True
    return False


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Image appears to be a malformed MPO"
)
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"subsampling": "4:4:4"}]
)
def test_the_check_of_an_image_finds_what_decoding_it_in_full_finds(options: dict[str, Any]):
    """The check decodes at an eighth of the size, in grey."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    photo(0).resize((96, 72)).save(buffer, "JPEG", quality=92, **options)
    kinds = ["cut off", "cut off, with an end", "a flipped bit", "64 bytes of garbage"]
    kinds += ["64 bytes of zeros", "64 bytes left out", "a marker"]
    found = 0
    for number in range(140):
        data = damaged(buffer.getvalue(), kinds[number % len(kinds)], rng)
        in_full = is_refused(load_image, data)
        assert is_refused(portable_jpeg, data) == in_full, kinds[number % len(kinds)]
        found += in_full
    assert 20 < found < 140


# ---------------------------------------------------------------------------- joining with labels


def test_each_image_meets_its_own_label(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    labels = labels_for(source, tmp_path / "labels")
    index = pack(source, out, split="train", labels=labels).index
    assert {key: fields[2] for key, fields in read_with_tarfile(index, "train")} == {
        key: labels.read(key) for key in labels.keys
    }
    assert index.split("train").has_labels
    facts = index.split("train").labels
    assert facts is not None
    assert (facts["teacher"], facts["k"], facts["num_labelled"]) == ({"name": "a"}, 2, 20)
    assert "shards" not in facts and "class_names" not in facts


def test_images_without_a_label_are_an_error_that_lists_ten(
    images: Path, tmp_path: Path, out: Path
):
    labels = labels_for(open_source(images), tmp_path / "labels")
    for number in range(100, 112):
        photo(number).save(images / f"cat/{number}.jpg")
    with pytest.raises(
        ValueError, match=r"12 \(cat/100, .*cat/109, …\) of 32 images have no label.*allow-missing"
    ):
        pack(open_source(images), out, split="train", labels=labels)
    assert not out.exists()


def test_labels_without_an_image_are_an_error_that_lists_ten(
    images: Path, tmp_path: Path, out: Path
):
    labels = labels_for(open_source(images), tmp_path / "labels")
    for number in range(3):
        (images / f"cat/{number:02}.jpg").unlink()
    with pytest.raises(ValueError, match=r"3 \(cat/00, cat/01, cat/02\) of 20 labels have no"):
        pack(open_source(images), out, split="train", labels=labels)


def test_allow_missing_packs_what_matches_and_counts_the_rest(
    images: Path, tmp_path: Path, out: Path
):
    labels = labels_for(open_source(images), tmp_path / "labels")
    (images / "cat/00.jpg").unlink()
    photo(99).save(images / "cat/new.jpg")
    summary = pack(open_source(images), out, split="train", labels=labels, allow_missing=True)
    split = summary.index.split("train")
    assert (split.num_samples, summary.num_unused_labels) == (19, 1)
    assert split.quarantined == {"cat/new": "no label in the label set"}
    assert verify(out) == []


def test_images_that_the_labeler_quarantined_are_no_error(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    labels = labels_for(source, tmp_path / "labels", quarantined="cat/03")
    split = pack(source, out, split="train", labels=labels).index.split("train")
    assert split.quarantined == {"cat/03": "not labelled: truncated"}
    assert split.num_samples == 19


def test_labels_of_another_class_count_are_refused(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    labels = labels_for(source, tmp_path / "labels", num_classes=1000)
    with pytest.raises(ValueError, match="label maps have 1000 classes and .* has 2; .*--classes"):
        pack(source, out, split="train", labels=labels)


def test_labels_with_the_classes_in_another_order_are_refused(
    images: Path, tmp_path: Path, out: Path
):
    source = open_source(images)
    labels = labels_for(source, tmp_path / "labels", class_names=["dog", "cat"])
    with pytest.raises(
        ValueError, match="class 0 is 'cat' in .* and 'dog' in the label maps; .*--cl"
    ):
        pack(source, out, split="train", labels=labels)


def test_a_damaged_label_is_named(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    labels = labels_for(source, tmp_path / "labels", damaged="cat/03")
    with pytest.raises(ValueError, match="the label map of cat/03 is damaged: "):
        pack(source, out, split="train", labels=labels)
    assert list(out.iterdir()) == []


# ------------------------------------------------------------------- what is in the folder already


def test_a_second_split_is_added(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    pack(source, out, split="train", labels=labels_for(source, tmp_path / "labels"))
    before = files_of(out)
    index = pack(source, out, split="val").index
    assert list(read_index(out).splits) == ["train", "val"]
    assert [index.split(name).has_labels for name in index.splits] == [True, False]
    assert before.items() - files_of(out).items() == {("index.json", before["index.json"])}
    assert verify(out) == []


def test_splits_with_other_classes_are_refused(images: Path, tmp_path: Path, out: Path):
    pack(open_source(images), out, split="train")
    (tmp_path / "val/cat").mkdir(parents=True)
    photo(0).save(tmp_path / "val/cat/0.jpg")
    with pytest.raises(ValueError, match="has 1 classes, the data set .* has 2; .*--classes"):
        pack(open_source(tmp_path / "val"), out, split="val")
    (tmp_path / "val/classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match="class 0 is 'dog' in .* and 'cat' in .*; .*--classes"):
        pack(open_source(tmp_path / "val"), out, split="val")
    assert list(read_index(out).splits) == ["train"]


def test_a_split_that_is_there_already_is_refused(images: Path, out: Path):
    pack(open_source(images), out, split="train")
    before = files_of(out)
    with pytest.raises(FileExistsError, match=r"holds a split 'train' .*\(20 samples\); --over"):
        pack(open_source(images), out, split="train", seed=5)
    assert files_of(out) == before


def test_overwrite_replaces_a_split_and_leaves_the_others(images: Path, out: Path):
    source = open_source(images)
    val = pack(source, out, split="val").index.split("val")
    pack(source, out, split="train", shard_size=2)
    pack(source, out, split="train", shard_size=15, overwrite=True)
    assert len(list(out.glob("train-*.tar"))) == len(list(out.glob("train-*.idx"))) == 2
    assert read_index(out).split("val") == val
    assert verify(out) == []


def test_overwriting_the_only_split_may_change_the_classes(images: Path, out: Path):
    pack(open_source(images), out, split="train")
    (images / "eel").mkdir()
    photo(99).save(images / "eel/x.jpg")
    assert pack(open_source(images), out, split="train", overwrite=True).index.num_classes == 3


def test_the_old_split_stays_when_overwriting_fails(images: Path, out: Path):
    pack(open_source(images), out, split="train")
    before = files_of(out)
    for path in images.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 20 images"):
        pack(open_source(images), out, split="train", overwrite=True)
    assert files_of(out) == before


def test_shards_that_no_index_names_are_not_overwritten_unasked(images: Path, out: Path):
    out.mkdir()
    (out / "train-000003.tar").write_bytes(b"somebody's work")
    with pytest.raises(FileExistsError, match="holds train-000003.tar and 0 more .*--overwrite"):
        pack(open_source(images), out, split="train")
    pack(open_source(images), out, split="val")  # another split's names are free
    pack(open_source(images), out, split="train", overwrite=True)
    assert verify(out) == []


def test_two_packs_cannot_write_into_one_folder(images: Path, out: Path):
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="another tl-shard pack or relabel is writing into"):
        pack(open_source(images), out, split="train")
    os.close(descriptor)
    pack(open_source(images), out, split="train")


# ------------------------------------------------------------------------------ broken off, refused

KILLED = """
import os, signal, sys
from pathlib import Path
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards import pack as module

class Killer(module.SplitWriter):
    def add(self, key, members):
        if key == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        super().add(key, members)

module.SplitWriter = Killer
module.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), split="train", shard_size=6)
"""


def test_a_killed_pack_leaves_no_split_and_can_be_run_again(
    images: Path, tmp_path: Path, out: Path
):
    source = open_source(images)
    whole = pack(source, tmp_path / "whole", split="train", shard_size=6).index
    victim = keys_of(whole, "train")[15]
    command = [sys.executable, "-c", KILLED, str(images), str(out), victim]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [".train.part"]
    with pytest.raises(FileNotFoundError, match="has no index.json: .* broken off; run the same"):
        read_index(out)
    pack(source, out, split="train", shard_size=6)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_pack_that_dies_while_renaming_leaves_no_index(images: Path, out: Path):
    with broken_off_at("sync_folder"):
        pack(open_source(images), out, split="train", shard_size=6)
    assert not (out / "index.json").exists()
    pack(open_source(images), out, split="train", shard_size=15, overwrite=True)
    assert verify(out) == []


def test_the_next_pack_moves_the_files_of_one_that_died_while_renaming(
    images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def die(self: Path, target: Path) -> Path:
        os.replace(self, target)  # noqa: PTH105
        if target == out / "train-000001.tar":
            raise KeyboardInterrupt
        return target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            pack(open_source(images), out, split="train", shard_size=6)
    assert (out / "train-000001.tar").exists() and not (out / "index.json").exists()
    pack(open_source(images), out, split="val")
    assert list(read_index(out).splits) == ["train", "val"]
    assert verify(out) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    fill_disk(monkeypatch, after=3)
    with pytest.raises(OSError, match=r"cannot write .*train-000001\.\S+: No space left") as caught:
        pack(open_source(images), out, split="train", shard_size=6)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_an_output_that_cannot_be_made_is_named(images: Path):
    with pytest.raises(OSError, match="00.jpg"):
        pack(open_source(images), images / "cat/00.jpg/shards", split="train")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"split": "a/b"}, "split 'a/b' cannot name files"),
        ({"split": "train.v2"}, "cannot name files; use letters, digits"),
        ({"split": "train", "shard_bytes": 400}, "shard_bytes is 400, less than most images"),
        ({"split": "train", "shard_size": 0}, "shard_size is 0, allowed from 1"),
        ({"split": "train", "max_side_px": 0}, "max_side_px is 0, allowed from 1"),
        ({"split": "train", "num_workers": 0}, "num_workers is 0, allowed from 1"),
        ({"split": "train", "quality": 101}, "quality is 101, allowed from 1 to 95"),
    ],
)
def test_arguments_out_of_range_are_refused(
    images: Path, out: Path, options: dict[str, Any], problem: str
):
    with pytest.raises(ValueError, match=problem):
        pack(open_source(images), out, **options)
    assert not out.exists()


# ---------------------------------------------------------------------------------- command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.shard, [str(argument) for argument in arguments])


def test_the_command_says_what_it_packed(images: Path, tmp_path: Path, out: Path):
    photo(0).save(images / "cat/00.jpg", "PNG")
    (images / "dog/broken.jpg").write_bytes(b"")
    labels = labels_for(open_source(images), tmp_path / "labels").folder
    result = run("pack", "--images", images, "--labels", labels, "--out", out, "--split", "train")
    assert result.exit_code == 0, result.output
    assert "train: 20 samples in 1 shard, " in result.stdout
    assert "  encoded anew: 1 (PNG, not JPEG)\n" in result.stdout
    assert f"  left out: 1 of 21, all listed in {out}/index.json\n" in result.stdout
    assert "    dog/broken: the file is empty (0 bytes)\n" in result.stdout


def test_the_command_takes_a_list_into_an_archive(tmp_path: Path, out: Path):
    (tmp_path / "val.tar").write_bytes(tar_of({"1.jpg": jpeg_of(1), "2.jpg": jpeg_of(2)}))
    (tmp_path / "val.csv").write_text("image,class\n1.jpg,dog\n2.jpg,cat\n")
    options = ["--out", out, "--split", "val", "--root", tmp_path / "val.tar"]
    result = run("pack", "--images", tmp_path / "val.csv", *options)
    assert result.exit_code == 0, result.output
    index = read_index(out)
    assert index.class_ids == ["cat", "dog"]
    assert dict(read_with_tarfile(index, "val"))["1"] == [jpeg_of(1), b"1"]


def test_options_reach_the_packer(images: Path, tmp_path: Path, out: Path):
    (tmp_path / "classes.txt").write_text("dog\tA dog\ncat\n")
    options = ["--classes", tmp_path / "classes.txt", "--shard-bytes", "12kB", "--shard-size", 2]
    options += ["--max-side-px", 20, "--seed", 7, "--workers", 1, "--quality", 50]
    result = run("pack", "--images", images, "--out", out, "--split", "val", *options)
    assert result.exit_code == 0, result.output
    index = read_index(out)
    assert index.class_names == ["A dog", "cat"]
    split = index.split("val")
    assert (len(split.shards), split.seed) == (10, 7)
    assert split.repaired == {"longer side above 20 px": 20}


def test_info_fits_on_one_screen(images: Path, tmp_path: Path, out: Path):
    source = open_source(images)
    pack(source, out, split="train", labels=labels_for(source, tmp_path / "labels"))
    pack(source, out, split="val", shard_size=5)
    lines = run("info", out).stdout.splitlines()
    assert lines[0] == f"{out}: 2 classes (cat, dog)"
    assert lines[1].startswith("train: 20 samples in 1 shard, ")
    assert lines[2] == "  label maps: a, native fit, top 2, 16-bit scores"
    assert lines[3].startswith("val: 20 samples in 4 shards, ")
    assert lines[4:] == ["  no label maps"]


def test_info_speaks_json(images: Path, out: Path):
    pack(open_source(images), out, split="train", seed=3)
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["num_classes"] == 2
    assert facts["splits"]["train"]["num_samples"] == 20
    assert facts["splits"]["train"]["seed"] == 3


def test_verify_prints_problems_and_exits_with_1(images: Path, out: Path):
    pack(open_source(images), out, split="train", shard_size=6)
    result = run("verify", out)
    assert (result.exit_code, result.stdout) == (0, "all 20 samples in 4 shards are whole\n")
    (out / "train-000002.tar").unlink()
    result = run("verify", out)
    assert result.exit_code == 1
    assert result.stdout == f"train-000002.tar: is missing\n1 problem in {out}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pack", "--images", "nowhere", "--out", "o", "--split", "train"], "does not exist"),
        (["pack", "--images", ".", "--out", "o", "--split", "a b"], "split 'a b' cannot name"),
        (["pack", "--images", ".", "--out", "o", "--split", "t", "--labels", "."], "no label set"),
        (["info", "."], "has no index.json, so it is no data set"),
        (["verify", "."], "has no index.json, so it is no data set"),
        (
            ["pack", "--images", ".", "--out", "o", "--split", "t", "--shard-bytes", "4 apples"],
            "'4 apples' is no size; write it like 400MB",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    images: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
):
    monkeypatch.chdir(images)
    result = run(*arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) <= 4  # click's own errors show the usage too


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("250000", 250_000), ("400MB", 400_000_000), ("1.5 GiB", 3 * 2**29), ("12kb", 12_000)],
)
def test_sizes_are_read_with_their_unit(text: str, num_bytes: int):
    assert cli._Size().convert(text, None, None) == num_bytes
