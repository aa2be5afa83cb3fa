"""Images in archives, shards and lists: the same samples from everywhere, and damage is named."""

import io
import itertools
import logging
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from offered import CLASSES, fill_with_photos, offer, tar_of, web_server

from tokenlabel.labeler import storage
from tokenlabel.labeler.archives import list_archive, read_member
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.images import BadImage
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.teacher import as_teacher

WAYS = [
    "tar",
    "tar from outside",
    "folder in a tar",
    "tar of class tars",
    "zip",
    "braces",
    "glob",
    "list",
    "list beside the folder",
    "list into a tar",
    "memory",
    "memory glob",
    "http",
    "http without ranges",
    "tar over http",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_with_photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def ways(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return offer(photos, tmp_path_factory.mktemp("offered") / "ways")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "RETRY_SECS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def contents_of(source: ImageSource) -> list[tuple[str, int | None, bytes]]:
    return [(sample.key, sample.class_index, source.read(sample)) for sample in source.samples]


# ------------------------------------------------------------------------- the same from everywhere


@pytest.mark.parametrize("way", WAYS)
def test_the_same_images_have_the_same_keys_order_classes_and_bytes(
    photos: Path, ways: dict[str, str], way: str
):
    expected = open_source(photos)
    folder = Path(ways["list"]).parent
    if way in ways and way != "list":
        found = open_source(ways[way])
        contents = contents_of(found)
    elif way == "list":
        found = open_source(ways[way], root=photos)
        contents = contents_of(found)
    elif way == "list beside the folder":
        found = open_source(photos.parent / "list.tsv")
        expected_keys = [f"photos/{sample.key}" for sample in expected.samples]
        assert [sample.key for sample in found.samples] == expected_keys
        contents = [(key.removeprefix("photos/"), *rest) for key, *rest in contents_of(found)]
    elif way == "list into a tar":
        found = open_source(ways["list"], root=ways["tar"])
        contents = contents_of(found)
    elif way.startswith("memory"):
        memory = fsspec.filesystem("memory")
        for path in folder.glob("shard-*"):
            memory.pipe_file(f"/{path.name}", path.read_bytes())
        name = "shard-*.tar" if way.endswith("glob") else "shard-{000000..000003}.tar"
        found = open_source(f"memory://{name}")
        contents = contents_of(found)
    else:
        with web_server(folder, has_ranges="without" not in way) as server:
            name = "plain.tar" if way.startswith("tar") else "shard-{000000..000003}.tar"
            found = open_source(f"{server.url}/{name}")
            contents = contents_of(found)
    assert contents == contents_of(expected)
    assert found.num_classes == expected.num_classes == 3
    if "shard" not in found.root:
        assert found.class_ids == expected.class_ids == CLASSES
        assert found.class_names == expected.class_names


def test_labels_are_the_same_bytes_whatever_held_the_images(
    photos: Path, ways: dict[str, str], tmp_path: Path
):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    teacher = as_teacher(model, name="tiny", image_size=64, device=torch.device("cpu"))
    sources = [
        open_source(photos),
        *(open_source(ways[way]) for way in ("tar of class tars", "braces")),
        open_source(ways["list"], root=photos),
    ]
    tars = []
    for i, source in enumerate(sources):
        generate(source, tmp_path / f"{i}", teacher=teacher, top_k=2, shard_size=17, batch_size=5)
        paths = sorted((tmp_path / f"{i}").glob("labels-*"))
        assert [path.name for path in paths[::2]] == ["labels-00000.json", "labels-00001.json"]
        tars.append([path.read_bytes() for path in paths])
    assert all(other == tars[0] for other in tars)


def test_many_threads_read_one_archive(photos: Path, ways: dict[str, str]):
    expected = contents_of(open_source(photos))
    for way in ("tar", "zip", "tar of class tars"):
        source = open_source(ways[way])
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(source.read, source.samples * 5))
        assert found == [data for _, _, data in expected] * 5


def test_a_source_can_be_sent_to_another_process(ways: dict[str, str]):
    source = open_source(ways["tar of class tars"])
    assert contents_of(pickle.loads(pickle.dumps(source))) == contents_of(source)


def test_samples_of_a_million_images_fit_into_memory(tmp_path: Path):
    num_images = 2000
    names = [f"n01440764/n01440764_{number}.JPEG" for number in range(10_000, 10_000 + num_images)]
    (tmp_path / "x.tar").write_bytes(tar_of(dict.fromkeys(names, b"image")))
    samples = open_source(tmp_path / "x.tar").samples
    sample = samples[-1]
    parts = [sample, sample.key, sample.offset, sample.num_bytes]
    assert sum(map(sys.getsizeof, parts)) + 16 + 8 < 250  # + the garbage collector's and the list's
    assert len({id(sample.file) for sample in samples}) == 1


# -------------------------------------------------------------------------------- tars and zips


def _listed(path: Path) -> list[tuple[str, bytes]]:
    members = list_archive(str(path)).members
    return [(m.name, read_member(str(path), m.offset, m.num_bytes)) for m in members]


def _with_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive.getmembers()]
        return [(name, file.read()) for name, file in files if file is not None]


LONG = f"{'long' * 20}/{'ü' * 100}/{'er' * 60}.jpg"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_listed_as_tarfile_reads_them(tmp_path: Path, format: int):
    members = {"a/": b"", "a/ü 1.jpg": b"x" * 700, "a/none": b"", f"{'a' * 90}/{'b' * 90}": b"y"}
    if format != tarfile.USTAR_FORMAT:
        members |= {LONG: b"z" * 512, "behind": b"1"}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(members, format=format))
    assert _listed(path) == _with_tarfile(path) == [(n, d) for n, d in members.items() if n != "a/"]
    assert list_archive(str(path)).folders == ["a"]
    assert [m.content for m in list_archive(str(path)).members[:2]] == [None, b""]


def test_sizes_above_the_octal_field_are_read(tmp_path: Path):
    info = tarfile.TarInfo("large.jpg")
    info.size = 9 << 30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with (tmp_path / "x.tar").open("wb") as file:  # mostly a hole, not nine gigabytes
            file.write(info.tobuf(format))
            file.seek(info.size, io.SEEK_CUR)
            file.write(tar_of({"behind.jpg": b"it"}))
        members = list_archive(str(tmp_path / "x.tar")).members
        assert [(m.name, m.num_bytes) for m in members] == [
            ("large.jpg", 9 << 30),
            ("behind.jpg", 2),
        ]


def test_a_tar_cut_anywhere_is_named_with_the_offset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = tar_of({"cat/a.jpg": b"a" * 700, "dog/b.jpg": b"b" * 100})
    ends = {1536: ["cat/a.jpg"], 2560: ["cat/a.jpg", "dog/b.jpg"]}
    path = tmp_path / "x.tar"
    for num_bytes in itertools.chain(range(0, 2560, 64), range(0, 2560, 511)):
        path.write_bytes(whole[:num_bytes])
        caplog.clear()
        if num_bytes in ends:  # between two members nothing tells a cut from a sloppy writer
            assert [m.name for m in list_archive(str(path)).members] == ends[num_bytes]
            assert f"no end mark at offset {num_bytes}" in caplog.text
        elif 512 + 700 <= num_bytes < 1536 or 2048 + 100 <= num_bytes:  # only padding is missing
            list_archive(str(path))
            assert "no end mark" in caplog.text
        else:
            with pytest.raises(ValueError, match=r"x\.tar is (truncated|empty): .*offset \d+"):
                list_archive(str(path))


def test_every_changed_byte_of_a_header_is_noticed(tmp_path: Path):
    whole = tar_of({"cat/a.jpg": b"a" * 700, "dog/b.jpg": b"b" * 100})
    path = tmp_path / "x.tar"
    for offset in range(1536, 2048, 3):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        with pytest.raises(ValueError, match=r"x\.tar is damaged at offset 1536"):
            list_archive(str(path))


@given(st.binary(max_size=12), st.binary(max_size=1), st.binary(max_size=600))
def test_whatever_a_header_says_the_outcome_is_a_listing_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, size: bytes, kind: bytes, content: bytes
):
    path = tmp_path_factory.getbasetemp() / "random.tar"
    header = bytearray(tarfile.TarInfo("cat/x.jpg").tobuf())
    header[124:136] = size.ljust(12, b"\0")
    header[156:157] = kind.ljust(1, b"0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + content + tar_of({}))
    try:
        list_archive(str(path))
    except ValueError as error:
        assert "random.tar" in str(error) and "offset" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "cat/../../x.jpg"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    (tmp_path / "x.tar").write_bytes(tar_of({"cat/0.jpg": b"0", name: b"1"}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, b"1")
    for suffix in ("tar", "zip"):
        with pytest.raises(ValueError, match=rf"x\.{suffix}: the name '{name}' at offset .* leads"):
            open_source(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard")])
def test_links_are_refused(tmp_path: Path, kind: bytes, word: str):
    info = tarfile.TarInfo("cat/x.jpg")
    info.type, info.linkname = kind, "cat/y.jpg"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info)
    with pytest.raises(ValueError, match=f"cat/x.jpg at offset 0 is a {word}.*--dereference"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_the_command_to_unpack_them(tmp_path: Path, mode: str):
    with tarfile.open(tmp_path / f"x.tar.{mode}", f"w:{mode}"):  # pyright: ignore[reportCallIssue, reportArgumentType]
        pass
    with pytest.raises(ValueError, match=r"is compressed.*; unpack it first: \w+ FILE"):
        open_source(tmp_path / f"x.tar.{mode}")


def test_what_is_no_tar_is_not_called_damaged(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(b"<html>" * 300)
    with pytest.raises(ValueError, match=r"x\.tar is no tar file"):
        open_source(tmp_path / "x.tar")


def test_an_inner_tar_that_is_cut_is_named_with_its_place_in_the_outer_one(tmp_path: Path):
    inner = tar_of({"1.jpg": b"1" * 700})
    outer = tar_of({"cat.tar": inner, "dog.tar": inner[:1000]})
    (tmp_path / "x.tar").write_bytes(outer)
    offset = 512 + len(inner) + 512
    with pytest.raises(ValueError, match=rf"x\.tar is truncated: the member at offset {offset}"):
        open_source(tmp_path / "x.tar")


def test_class_tars_packed_from_outside_their_folder_give_the_same_keys(tmp_path: Path):
    inner = tar_of({"cat/": b"", "cat/1.jpg": b"1"})
    empty = tar_of({})
    outer = {"notes.md": b"", "._cat.tar": b"?", "cat.tar": inner, "eel.tar": empty}
    (tmp_path / "x.tar").write_bytes(tar_of(outer))
    source = open_source(tmp_path / "x.tar")
    assert [sample.key for sample in source.samples] == ["cat/1"]
    assert source.class_ids == ["cat", "eel"]


def test_classes_and_empty_class_folders_in_a_tar_count(tmp_path: Path):
    members = {"./": b"", "p/dog/": b"", "p/cat/": b"", "p/dog/1.jpg": b"1", "p/dog/x/2.jpg": b"2"}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(members | {"c/": b""}))
    assert open_source(path).class_ids == ["c", "p"]
    path.write_bytes(tar_of(members | {"p/classes.txt": b"eel\ndog\tA dog\ncat\n"}))
    source = open_source(f"{path}/p")
    assert source.class_names == ["eel", "A dog", "cat"]
    assert [sample.class_index for sample in source.samples] == [1, 1]


def test_the_folder_beside_classes_txt_is_a_class(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(tar_of({"classes.txt": b"dog\n", "dog/deep/1.jpg": b"1"}))
    assert open_source(tmp_path / "x.tar").class_ids == ["dog"]


def test_hidden_and_other_members_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    names = ["cat/1.jpg", "cat/._1.jpg", "cat/notes.md", "__MACOSX/cat/1.jpg", ".git/x.jpg"]
    (tmp_path / "x.tar").write_bytes(tar_of(dict.fromkeys(names, b"")))
    with caplog.at_level(logging.INFO):
        assert [sample.key for sample in open_source(tmp_path / "x.tar").samples] == ["cat/1"]
    assert "left out 2 files, ending in none of .jpg" in caplog.text


def test_splits_in_a_tar_are_refused_with_what_to_give(tmp_path: Path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"d/train/cat/1.jpg": b"1", "d/val/cat/1.jpg": b"1"}))
    with pytest.raises(
        ValueError, match=r"are splits, not classes \(train, val\); .*x\.tar/d/train"
    ):
        open_source(path)
    assert [sample.key for sample in open_source(f"{path}/d/train/").samples] == ["cat/1"]


def test_a_flat_tar_holds_images_without_classes(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(tar_of({"./": b"", "./2.jpg": b"2", "./1.jpg": b"1"}))
    source = open_source(tmp_path / "x.tar")
    assert [(s.key, s.class_index) for s in source.samples] == [("1", None), ("2", None)]


def test_an_archive_that_changes_under_a_job_stops_it(tmp_path: Path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"cat/1.jpg": b"1" * 700}))
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match=r"x\.tar ends within the 700 bytes at offset 512"):
        source.read(source.samples[0])
    path.unlink()
    with pytest.raises(OSError, match=r"x\.tar could be read before and now cannot") as caught:
        source.read(source.samples[0])
    assert not isinstance(caught.value, FileNotFoundError)  # which would blame the one image


def test_a_damaged_zip_is_named(tmp_path: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"cat/{number}.jpg", b"pixels" * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(
        ValueError, match=r"x\.zip is truncated or damaged, the directory at its end"
    ):
        open_source(path)
    path.write_bytes(whole)
    source = open_source(path)
    offset = source.samples[1].offset
    assert offset is not None
    for damage, place in ((b"\xff" * 8, offset + 40), (b"\0", offset)):
        path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        with pytest.raises(BadImage, match=rf"x\.zip is damaged \w+ offset {offset}"):
            source.read(source.samples[1])
        assert source.read(source.samples[0]) == b"pixels" * 100


def test_a_zip_that_cannot_be_read_is_refused(tmp_path: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/1.jpg", b"1")
    with pytest.raises(ValueError, match=r"compressed by method 14"):
        open_source(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.jpg", b"1")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    struct.pack_into("<H", data, directory + 8, 1)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cat/1.jpg at offset 0 is encrypted"):
        open_source(path)
    with pytest.raises(ValueError, match="zip files are read locally only"):
        open_source("memory://x.zip")


# --------------------------------------------------------------------------------------- shards


def _write_shards(folder: Path, *shards: dict[str, bytes]) -> str:
    for i, shard in enumerate(shards):
        (folder / f"s-{i}.tar").write_bytes(tar_of(shard))
    return f"{folder}/s-{{0..{len(shards) - 1}}}.tar"


def test_shards_without_cls_hold_images_without_classes(tmp_path: Path):
    shard = {"./a/0.jpg": b"0", "./a/0.json": b"{}", "./a/1.seg.png": b"mask", "./a/1.webp": b"1"}
    source = open_source(_write_shards(tmp_path, shard))
    assert [(s.key, s.class_index, source.read(s)) for s in source.samples] == [
        ("a/0", None, b"0"),
        ("a/1", None, b"1"),
    ]


def test_keys_of_shards_stay_what_they_are(tmp_path: Path):
    names = ["cat/a%2Eb", "100%", "with blank", "ünï/字"]
    shard = {f"{name}.{ext}": b"1" for name in names for ext in ("jpg", "cls")}
    source = open_source(_write_shards(tmp_path, shard))
    assert [s.key for s in source.samples] == ["100%25", "cat/a%2Eb", "with%20blank", "ünï/字"]


def test_of_several_images_in_a_sample_the_jpeg_is_taken(tmp_path: Path):
    shard = {"0.png": b"depth", "0.JPG": b"photo", "0.cls": b"0", "1.txt": b"no image"}
    source = open_source(_write_shards(tmp_path, shard))
    assert contents_of(source) == [("0", 0, b"photo")]


def test_one_shard_is_known_by_its_cls(tmp_path: Path):
    _write_shards(tmp_path, {"n01440764_1.jpg": b"1", "n01440764_1.cls": b"3"})
    source = open_source(tmp_path / "s-0.tar")
    assert [(s.key, s.class_index) for s in source.samples] == [("n01440764_1", 3)]
    assert source.class_ids == ["0", "1", "2", "3"]


def test_a_classes_file_names_the_numbers_of_shards(tmp_path: Path):
    pattern = _write_shards(tmp_path, {"0.jpg": b"", "0.cls": b"1"})
    (tmp_path / "names.txt").write_text("0\tzero\n2\ttwo\n1\tone\n")
    source = open_source(pattern, classes=tmp_path / "names.txt")
    assert (source.class_names, source.samples[0].class_index) == (["zero", "two", "one"], 1)
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="has a class 1, but .*names.txt names 1 classes, 0 to 0"):
        open_source(pattern, classes=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ([{"0.jpg": b"", "0.cls": b"cat"}], r"s-0\.tar: 0\.cls at offset 1024 holds b'cat'"),
        ([{"0.jpg": b"", "0.cls": b"9" * 30}], r"0\.cls at offset .* holds b''"),
        ([{"0.jpg": b"", "0.cls": b"99999999"}], "a class 99999999; above 10000000 classes must"),
        ([{"0.jpg": b"", "0.cls": b"0"}, {"1.jpg": b""}], r"1\.jpg in .*s-1\.tar has no \.cls"),
        ([{"0.jpg": b""}, {"0.jpg": b""}], r"0\.jpg \(.*s-0.* and 0\.jpg \(.*s-1.* share the key"),
        ([{"0.jpg": b"", "0.JPG": b""}], r"s-0\.tar: 0\.JPG is there twice, at offsets 512 and"),
        ([{"0.txt": b""}], "no images in .*; expected samples with one of the fields jpg"),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, shards: list[dict[str, bytes]], problem: str):
    with pytest.raises(ValueError, match=problem):
        open_source(_write_shards(tmp_path, *shards))


def test_shards_of_our_own_bring_their_class_names(photos: Path, tmp_path: Path):
    from tokenlabel.shards.pack import pack

    source = open_source(photos)
    pack(source, tmp_path / "shards", split="train", shard_size=8)
    again = open_source(tmp_path / "shards/train-*.tar")
    assert (again.class_ids, again.class_names) == (source.class_ids, source.class_names)
    keys = [(sample.key, sample.class_index) for sample in source.samples]
    assert [(sample.key, sample.class_index) for sample in again.samples] == keys


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{0..2}.tar", ["s-0.tar", "s-1.tar", "s-2.tar"]),
        ("s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
        ("{b,a}-{0..1}.tar", ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]),
        ("https://a.b/{7..7}.tar?x=1", ["https://a.b/7.tar?x=1"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_expanded_as_in_a_shell(pattern: str, expected: list[str]):
    assert storage.expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["s-{5..3}.tar", "s-{a}.tar", "s-{}.tar"])
def test_braces_that_mean_nothing_are_refused(pattern: str):
    with pytest.raises(ValueError, match=r"\{.*\} in s-.* is neither a range .*ascending.* nor"):
        storage.expand(pattern)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path):
    path = tmp_path / "photos [new] {1}.tar"
    path.write_bytes(tar_of({"cat/1.jpg": b"1"}))
    assert [sample.key for sample in open_source(path).samples] == ["cat/1"]


# ---------------------------------------------------------------------------------------- remote


def test_shards_that_are_not_there_are_named(tmp_path: Path):
    _write_shards(tmp_path, {"0.jpg": b""})
    with pytest.raises(FileNotFoundError, match=r"s-1\.tar, one of .*s-\{0\.\.1\}\.tar, does not"):
        open_source(f"{tmp_path}/s-{{0..1}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/t-\*\.tar"):
        open_source(f"{tmp_path}/t-*.tar")
    with pytest.raises(FileNotFoundError, match="memory://nowhere-0.tar does not exist"):
        open_source("memory://nowhere-{0..1}.tar")
    with web_server(tmp_path) as server:
        with pytest.raises(
            FileNotFoundError, match=f"{server.url}/no.tar does not exist: HTTP 404"
        ):
            open_source(f"{server.url}/no.tar")


def test_a_server_that_stumbles_is_asked_again(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(tar_of({"cat/1.jpg": b"1" * 700}))
    with web_server(tmp_path) as server:
        source = open_source(f"{server.url}/x.tar")
        server.num_failures = 2
        assert source.read(source.samples[0]) == b"1" * 700
        server.num_failures = 3
        with pytest.raises(OSError, match=f"cannot read {server.url}/x.tar: .*503"):
            source.read(source.samples[0])


def test_a_server_without_ranges_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "x.tar").write_bytes(tar_of({"cat/1.jpg": b"1" * 700}))
    with web_server(tmp_path, has_ranges=False) as server:
        source = open_source(f"{server.url}/x.tar")
        assert "x.tar can be read as a whole only: copying it to" in caplog.text
    assert source.read(source.samples[0]) == b"1" * 700  # the server is gone


COPIES = """
import sys
from pathlib import Path
from tokenlabel.labeler import storage
print(storage.with_ranges(sys.argv[1]))
"""


def test_copies_are_gone_when_the_process_ends(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(tar_of({"cat/1.jpg": b"1"}))
    with web_server(tmp_path, has_ranges=False) as server:
        command = [sys.executable, "-c", COPIES, f"{server.url}/x.tar"]
        copy = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert copy.endswith(".tar") and not Path(copy).exists() and not Path(copy).parent.exists()


def test_urls_that_cannot_be_opened_are_refused():
    with pytest.raises(ValueError, match="gopher://x.tar cannot be opened: Protocol not known"):
        open_source("gopher://x.tar")
    with pytest.raises(ValueError, match="a web server does not list its files.*in braces"):
        open_source("http://127.0.0.1/x-*.tar")


# ----------------------------------------------------------------------------------------- lists


def _list(folder: Path, text: str, *, name: str = "list.csv") -> Path:
    for file in ("cat/1.jpg", "dog/2.JPEG", "a,b.png"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"pixels")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog/2.JPEG,b\r\ncat/1.jpg, a\r\n\r\n", [("cat/1", 0), ("dog/2", 1)]),
        ("\ufefffile,label\n./cat/1.jpg,5\ndog//2.JPEG,10\n", [("cat/1", 5), ("dog/2", 10)]),
        ("cat/1.jpg\ta, b\na,b.png\tc", [("a,b", 1), ("cat/1", 0)]),
        ('"a,b.png",c\n', [("a,b", 0)]),
        ("cat/1.jpg\ndog/2.JPEG\n", [("cat/1", None), ("dog/2", None)]),
    ],
)
def test_lists_are_read(tmp_path: Path, text: str, expected: list[tuple[str, int | None]]):
    source = open_source(_list(tmp_path, text))
    assert [(sample.key, sample.class_index) for sample in source.samples] == expected
    assert source.read(source.samples[0]) == b"pixels"


def test_a_damaged_index_beside_shards_costs_the_names_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pattern = _write_shards(tmp_path, {"0.jpg": b"", "0.cls": b"1"})
    for content in ("{", "[]", '{"format": "tokenlabel-shards", "class_ids": 3}'):
        (tmp_path / "index.json").write_text(content)
        assert open_source(pattern).class_names == ["0", "1"]
        assert "index.json could not be read" in caplog.text
        caplog.clear()


def test_numbers_in_a_list_may_be_names(tmp_path: Path):
    (tmp_path / "classes.txt").write_text("10\n9\n")
    source = open_source(_list(tmp_path, "cat/1.jpg,9\ndog/2.JPEG,10\n"))
    assert [sample.class_index for sample in source.samples] == [1, 0]


def test_absolute_paths_below_the_root_give_relative_keys(tmp_path: Path):
    path = _list(tmp_path, f"{tmp_path}/cat/1.jpg\n")
    assert [sample.key for sample in open_source(path).samples] == ["cat/1"]
    assert [sample.key for sample in open_source(path, root=tmp_path / "cat").samples] == ["1"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no images"),
        ("file,label\n", "names no images"),
        ("cat/1.jpg,a\ncat/1.jpg b\n", r"line 2: 'cat/1\.jpg b' is not PATH, PATH,CLASS or"),
        ("cat/1.jpg,a,b\n", "line 1: .* is not PATH"),
        ("cat/1.jpg,\n", "line 1: .* is not PATH"),
        ("cat/1.jpg,a\ndog/2.JPEG\n", r"line 2: .* has no class, unlike the lines before"),
        ("cat/1.jpg\ndog/2.JPEG,b\n", r"line 2: .* has a class, unlike the lines before"),
        (f"cat/1.jpg,{'x' * 200_000}\n", "line 1: field larger than field limit"),
        ("cat/1.jpg\n../x.jpg\n", r"line 2: \.\./x\.jpg leads out of .*--root"),
        ("/etc/x.jpg\n", r"line 1: /etc/x\.jpg leads out of"),
        ("cat/1.jpg\ncat/1.jpg\n", r"cat/1\.jpg and cat/1\.jpg in .*list.csv would share the key"),
    ],
)
def test_a_wrong_list_is_named_with_the_line(tmp_path: Path, text: str, problem: str):
    with pytest.raises(ValueError, match=rf"list\.csv.*{problem}|{problem}"):
        open_source(_list(tmp_path, text))


def test_a_list_in_the_wrong_place_says_so_at_once(tmp_path: Path):
    path = _list(tmp_path, "nowhere/1.jpg,a\n")
    with pytest.raises(
        FileNotFoundError, match="its first image, .*nowhere/1.jpg, does not.*--root"
    ):
        open_source(path)
    (tmp_path / "x.tar").write_bytes(tar_of({"cat/1.jpg": b"1"}))
    with pytest.raises(ValueError, match=r"line 1: nowhere/1\.jpg is not in .*x\.tar"):
        open_source(path, root=tmp_path / "x.tar")


def test_a_root_is_for_lists_alone(photos: Path):
    with pytest.raises(ValueError, match="--root / is for lists of images"):
        open_source(photos, root="/")


def test_classes_cannot_be_named_for_a_list_without_any(tmp_path: Path):
    path = _list(tmp_path, "cat/1.jpg\n")
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(
        ValueError, match="names.txt names classes, but .*list.csv says of no image"
    ):
        open_source(path, classes=tmp_path / "names.txt")
