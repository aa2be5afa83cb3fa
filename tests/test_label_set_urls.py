"""Label sets behind URLs: the same bytes as in a folder, from the first slice to the data set."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from offered import web_server
from packed import files_of, jpeg_of

from tokenlabel.cli import label, shard
from tokenlabel.labeler import storage
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.label_set import LabelSet, check_output, read_slices, remove_index
from tokenlabel.labeler.published import PublishedFiles, import_set
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.teacher import Teacher, as_teacher
from tokenlabel.labeler.verify import check_keys
from tokenlabel.shards.pack import pack
from tokenlabel.shards.relabel import relabel
from tokenlabel.shards.verify import verify

URL = "memory://bucket/label sets/labels"
MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _empty_and_impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "RETRY_SECS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    MEMORY.store.clear()
    yield
    MEMORY.store.clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    root = tmp_path_factory.mktemp("photos")
    for number in range(9):
        path = root / "abc"[number // 3] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg_of(number))
    return open_source(root)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    return as_teacher(model, name="tiny", image_size=64, device=torch.device("cpu"))


@pytest.fixture
def run(source: ImageSource, teacher: Teacher) -> Callable[..., Any]:
    """Label nine photos in slices of three."""

    def run(out: Path | str = URL, **options: Any) -> Any:
        options = {"top_k": 2, "shard_size": 3, "batch_size": 2, "num_workers": 1} | options
        return generate(source, out, teacher=teacher, **options)

    return run


@pytest.fixture
def local(run: Callable[..., Any], tmp_path: Path) -> Path:
    """The same label set in a folder."""
    run(tmp_path / "local")
    return tmp_path / "local"


def stored(url: str = URL) -> dict[str, bytes]:
    """Everything below a URL."""
    root = f"/{url.removeprefix('memory://')}/"
    return {path.removeprefix(root): MEMORY.cat_file(path) for path in MEMORY.find(root)}


def copy(folder: Path, url: str = URL) -> str:
    for name, data in files_of(folder).items():
        MEMORY.pipe_file(f"{url}/{name}", data)
    return url


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """What is read from the memory, as (file, start, end); None and None are the whole."""
    made: list[tuple[str, int | None, int | None]] = []
    read = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        made.append((path.rpartition("/")[2], start, end))
        return read(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return made


# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("way", ["memory", "memory, trailing slash", "file"])
def test_labels_have_the_same_bytes_behind_a_url(
    run: Callable[..., Any], local: Path, tmp_path: Path, way: str
):
    url = {"memory": URL, "memory, trailing slash": f"{URL}/", "file": f"file://{tmp_path}/new"}[
        way
    ]
    summary = run(url)
    assert (summary.num_labelled, summary.num_unfinished) == (9, 0)
    assert (files_of(tmp_path / "new") if way == "file" else stored()) == files_of(local)


@pytest.mark.parametrize(
    "lost", [["labels-00001.json"], ["labels-00001.tar"], ["labels-00001.tar", "index.json"]]
)
def test_what_is_missing_behind_a_url_is_made_again_and_the_rest_is_kept(
    run: Callable[..., Any], local: Path, lost: list[str]
):
    copy(local)
    for name in lost:
        MEMORY.rm_file(f"{URL}/{name}")
    assert run().num_new == 3
    assert stored() == files_of(local)


def test_a_damaged_tar_behind_a_url_is_found_and_made_again(run: Callable[..., Any], local: Path):
    copy(local)
    tar = bytearray(stored()["labels-00002.tar"])
    tar[600] ^= 1
    MEMORY.pipe_file(f"{URL}/labels-00002.tar", bytes(tar))
    with pytest.raises(ValueError, match=rf"{URL}/labels-00002\.tar is not what was written"):
        LabelSet.open(URL).verify()
    assert run().num_new == 3
    assert stored() == files_of(local)


def test_processes_share_the_slices_behind_a_url(run: Callable[..., Any], local: Path):
    first = run(rank=0, world_size=2)
    assert (first.num_labelled, first.num_unfinished) == (6, 1)
    with pytest.raises(FileNotFoundError, match=r"no index\.json: labelling is still going on"):
        LabelSet.open(URL)
    assert run(rank=1, world_size=2).num_unfinished == 0
    assert stored() == files_of(local)


def test_other_labels_behind_a_url_are_replaced_only_if_asked_for(
    run: Callable[..., Any], local: Path
):
    copy(local)
    MEMORY.pipe_file(f"{URL}/labels-00007.tar", b"of a larger run")
    with pytest.raises(ValueError, match=rf"{URL} holds labels of another run \(k 2 there, 1 here"):
        run(top_k=1)
    assert run(top_k=1, overwrite=True).num_new == 9
    assert LabelSet.open(URL).k == 1 and "labels-00007.tar" not in stored()


def test_a_store_that_fails_for_a_moment_is_asked_again(
    run: Callable[..., Any], local: Path, monkeypatch: pytest.MonkeyPatch
):
    write, tried = MemoryFileSystem.pipe_file, []

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> None:
        tried.append(path)
        if tried.count(path) == 1:
            raise RuntimeError("slow down")
        write(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    run()
    assert stored() == files_of(local)


def test_a_store_that_takes_nothing_is_named_and_has_no_label_set(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    def pipe_file(*_: Any, **__: Any) -> None:
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    with pytest.raises(OSError, match=rf"cannot write {URL}/labels-0000\d\.tar: quota exceeded"):
        run()
    assert stored() == {} and read_slices(URL) == []


def test_a_url_that_holds_a_data_set_or_takes_no_files_is_refused():
    MEMORY.pipe_file(f"{URL}/index.json", b'{"format": "tokenlabel-shards"}')
    with pytest.raises(ValueError, match="holds 'tokenlabel-shards' already; give --out"):
        check_output(URL)
    with pytest.raises(ValueError, match="neither takes nor lists files; give a local folder"):
        check_output("https://example.org/labels")
    with pytest.raises(ValueError, match="nosuch://x/labels cannot be opened: Protocol not known"):
        check_output("nosuch://x/labels")


def test_a_published_set_is_imported_to_a_url(tmp_path: Path):
    scores, classes = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])
    planes = torch.stack([scores, classes])[..., None, None].expand(2, 2, 18, 18)
    (tmp_path / "published/a").mkdir(parents=True)
    torch.save(planes.half().clone(), tmp_path / "published/a/x.pt")
    for out in (URL, tmp_path / "labels"):
        import_set(
            PublishedFiles(str(tmp_path / "published")),
            out,
            kind="token-labeling",
            axes="rows-cols",
            fit="stretch",
            num_classes=3,
            class_names=["a", "b", "c"],
        )
    assert stored() == files_of(tmp_path / "labels")


# ----------------------------------------------------------------------------------------- reading


def test_maps_behind_a_url_are_read_by_key_and_no_tar_as_a_whole(
    local: Path, requests: list[tuple[str, int | None, int | None]]
):
    expected, labels = LabelSet.open(local), pickle.loads(pickle.dumps(LabelSet.open(copy(local))))
    assert labels.keys == expected.keys and labels.is_remote and not expected.is_remote
    requests.clear()
    assert labels.read(labels.keys[4]) == expected.read(labels.keys[4])
    ((name, start, end),) = requests
    assert name == "labels-00001.tar" and start is not None and end is not None
    assert end - start == len(expected.read(labels.keys[4]))
    shuffled = labels.keys[::-2] * 20
    assert list(labels.read_each(shuffled)) == list(map(expected.read, shuffled))
    assert all(end is not None for _, _, end in requests)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("labels-00001.tar", None, r"labels-00001\.tar is missing, though the index names it"),
        ("labels-00001.tar", 1000, r"labels-00001\.tar has 1000 bytes, 10240 were written"),
        ("labels-00000.json", None, r"labels-00000\.json is missing or damaged"),
        ("labels-00000.json", 99, r"labels-00000\.json is missing or damaged"),
        ("index.json", 99, r"index\.json is damaged"),
    ],
)
def test_a_set_behind_a_url_that_is_not_whole_is_refused_by_name(
    local: Path, name: str, damage: int | None, problem: str
):
    file = f"{copy(local)}/{name}"
    data = MEMORY.cat_file(file)
    MEMORY.rm_file(file)
    if damage is not None:
        MEMORY.pipe_file(file, data[:damage])
    with pytest.raises(ValueError, match=f"{URL}/{problem}"):
        LabelSet.open(URL)


def test_a_url_without_a_label_set_says_so(local: Path):
    with pytest.raises(FileNotFoundError, match=f"label folder {URL} does not exist"):
        LabelSet.open(URL)
    MEMORY.pipe_file(f"{URL}/notes.txt", b"")
    with pytest.raises(FileNotFoundError, match="so it is no label set; make one with tl-label"):
        LabelSet.open(URL)
    remove_index(copy(local))
    with pytest.raises(FileNotFoundError, match="labelling is still going on or was broken off"):
        LabelSet.open(URL)


def test_a_set_on_a_web_server_is_read_but_not_written(local: Path):
    expected = LabelSet.open(local)
    with web_server(local) as server:
        labels = LabelSet.open(server.url)
        assert list(labels.read_each(labels.keys)) == [expected.read(key) for key in labels.keys]
        labels.verify()
        with pytest.raises(FileNotFoundError, match="label folder .*/nowhere does not exist"):
            LabelSet.open(f"{server.url}/nowhere")
        with pytest.raises(ValueError, match="neither takes nor lists files"):
            remove_index(server.url)


def test_verifying_a_set_behind_a_url_finds_what_is_wrong_with_it(local: Path, source: ImageSource):
    assert check_keys(copy(local), source).is_whole
    tar = bytearray(stored()["labels-00001.tar"])
    tar[530] ^= 1
    MEMORY.pipe_file(f"{URL}/labels-00001.tar", bytes(tar))
    MEMORY.rm_file(f"{URL}/labels-00002.tar")
    found = check_keys(URL, source)
    assert "checksum" in found.damaged["labels-00001.tar"]
    assert found.damaged["labels-00002.tar"] == "missing"
    assert len(found.undecodable) == 1


# ------------------------------------------------------------------------------------ the data set


def test_packing_labels_behind_a_url_reads_each_tar_once_and_leaves_no_copy(
    local: Path,
    source: ImageSource,
    tmp_path: Path,
    requests: list[tuple[str, int | None, int | None]],
):
    labels = LabelSet.open(copy(local))
    requests.clear()
    pack(source, tmp_path / "far", split="train", labels=labels, shard_size=4, num_workers=2)
    assert sorted(requests) == [(f"labels-0000{i}.tar", None, None) for i in range(3)]
    near = LabelSet.open(local)
    pack(source, tmp_path / "near", split="train", labels=near, shard_size=4)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "near")


def test_a_tar_that_changed_behind_a_url_is_not_packed(
    local: Path, source: ImageSource, tmp_path: Path
):
    labels = LabelSet.open(copy(local))
    tar = bytearray(stored()["labels-00001.tar"])
    tar[-1] ^= 1
    MEMORY.pipe_file(f"{URL}/labels-00001.tar", bytes(tar))
    with pytest.raises(ValueError, match=rf"{URL}/labels-00001\.tar is not what was written"):
        pack(source, tmp_path / "shards", split="train", labels=labels)
    assert os.listdir(tmp_path / "shards") == []  # noqa: PTH208


def test_relabelling_with_labels_behind_a_url(local: Path, source: ImageSource, tmp_path: Path):
    data = pack(source, tmp_path / "data", split="train", shard_size=4).index
    relabel(data.folder, LabelSet.open(local), out=tmp_path / "near")
    relabel(data.folder, LabelSet.open(copy(local)), out=tmp_path / "far")
    assert files_of(tmp_path / "far") == files_of(tmp_path / "near")
    assert verify(tmp_path / "far") == []


# ------------------------------------------------------------------------------------ command line


def ask(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_take_urls(local: Path, source: ImageSource, tmp_path: Path):
    copy(local)
    for command in (["info"], ["info", "--json", "--images", source.root]):
        assert ask(label, *command, URL) == ask(label, *command, local)
    sheet = tmp_path / "sheet.png"
    ask(label, "show", URL, "--images", source.root, "--out", sheet, LabelSet.open(URL).keys[0])
    assert sheet.stat().st_size > 10_000
    ask(label, "export", URL, "--kind", "relabel", "--out", tmp_path / "published")
    assert len(list((tmp_path / "published").rglob("*.pt"))) == 9
    options = ("--images", source.root, "--out", tmp_path / "shards", "--split", "train")
    ask(shard, "pack", "--labels", URL, *options)
    ask(shard, "relabel", tmp_path / "shards", "--labels", f"file://{local}", "--in-place")
    assert verify(tmp_path / "shards") == []


def test_commands_that_need_a_folder_refuse_urls(tmp_path: Path):
    result = CliRunner().invoke(shard, ["info", "s3://bucket/shards"])
    assert result.exit_code == 2
    assert "s3://bucket/shards is a URL; give a folder on this machine" in result.output


def test_a_url_that_cannot_be_used_is_one_line():
    result = CliRunner().invoke(label, ["info", "nosuch://bucket/labels"])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "nosuch://bucket/labels/index.json cannot be opened: Protocol not known" in result.output
