"""A label set can be described in one screen, and looked at."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from colour_teacher import NUM_CLASSES, colour_teacher, patchwork
from conftest import random_map
from PIL import Image

from tokenlabel.cli import label
from tokenlabel.labeler import sheet
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.geometry import PaletteMaps, crop_view, sample_targets
from tokenlabel.labeler.info import describe, in_words
from tokenlabel.labeler.label_map import LabelMap, encode, keep_mass
from tokenlabel.labeler.label_set import LabelSet, write_index, write_slice
from tokenlabel.labeler.sources import ImageSource, open_source

SIZES = [(96, 64), (64, 96), (80, 80)]


def flat_map(classes: list[list[int]], probability: float = 0.75) -> LabelMap:
    """A top-1 map of twelve classes with the same probability everywhere."""
    grid = np.array(classes, np.uint32)
    return LabelMap(
        scores=np.zeros((1, *grid.shape), np.float16),
        classes=grid[None],
        num_classes=NUM_CLASSES,
        log_normalizer=np.full(grid.shape, -np.log(probability), np.float16),
    )


@pytest.fixture
def write_set(tmp_path) -> Callable[..., LabelSet]:
    """Write label maps as a label set."""

    def write(maps: dict[str, LabelMap], *, quarantined: dict[str, str] | None = None) -> LabelSet:
        folder = tmp_path / "written"
        folder.mkdir()
        first = next(iter(maps.values()))
        settings = {
            "teacher": {"name": "t"},
            "fit": "native",
            "k": first.k,
            "num_classes": first.num_classes,
        }
        record = write_slice(
            folder,
            0,
            [(key, encode(label_map)) for key, label_map in maps.items()],
            settings=settings,
            quarantined=quarantined or {},
            num_correct=None,
        )
        names = [f"class {i}" for i in range(first.num_classes)]
        write_index(folder, [record], settings=settings, class_names=names)
        return LabelSet.open(folder)

    return write


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ImageSource:
    """Nine patchworks, most in the folder of their most frequent colour, some not."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(9):
        path = root / f"c{number % 3:02}" / f"photo {number}.png"
        path.parent.mkdir(exist_ok=True)
        patchwork(number, size=SIZES[number % 3]).save(path)
    names = [f"c{i:02}\tcolour <{i}>" for i in range(NUM_CLASSES)]
    (root / "classes.txt").write_text("\n".join(names))
    return open_source(root)


@pytest.fixture(scope="module")
def labels(source, tmp_path_factory) -> LabelSet:
    """Their label set by the colour teacher, all classes kept."""
    out = tmp_path_factory.mktemp("labels")
    generate(source, out, teacher=colour_teacher(), top_k=NUM_CLASSES)
    return LabelSet.open(out)


# ---------------------------------------------------------------------------------------- info


def test_cells_and_images_are_counted_by_first_class(write_set):
    maps = {
        "a/1": flat_map([[3, 3, 3], [3, 5, 5]]),
        "a/2": flat_map([[3, 7]]),
        "b/1": flat_map([[5, 5], [5, 5]]),
    }
    found = describe(write_set(maps))
    assert found.num_images == 3
    assert found.num_cells == 12
    assert found.num_classes_seen == 3
    assert [tuple(count) for count in found.most_seen] == [
        ("class 5", 6, 2),
        ("class 3", 5, 2),
        ("class 7", 1, 1),
    ]
    assert found.least_seen == found.most_seen[::-1]
    assert found.grids == [([(2, 3)], 1), ([(1, 2)], 1), ([(2, 2)], 1)]
    assert found.mean_confidence == pytest.approx(0.75, abs=1e-3)
    assert found.mean_residual == pytest.approx(0.25, abs=1e-3)
    assert found.folders is None


def test_a_repeated_class_counts_once_in_the_residual(write_set):
    label_map = random_map(np.random.default_rng(0), spread=2.0)
    cut = keep_mass(label_map, 0.5)
    assert label_map.log_normalizer is not None
    all_logs = cut.scores.astype(np.float64) - label_map.log_normalizer
    kept = [
        sum(np.exp(logs[i]) for i in range(5) if i == 0 or classes[i] != classes[i - 1])
        for logs, classes in zip(all_logs.reshape(5, -1).T, cut.classes.reshape(5, -1).T)
    ]
    found = describe(write_set({"a/1": cut}))
    assert found.mean_residual == pytest.approx(1 - np.mean(kept), abs=1e-3)


def test_without_a_normaliser_confidence_is_not_known(write_set):
    found = describe(write_set({"a/1": replace(flat_map([[1]]), log_normalizer=None)}))
    assert (found.mean_confidence, found.mean_residual) == (None, None)


def test_teacher_and_folders_disagree_as_often_as_generate_said(source, labels):
    found = describe(labels, source=source)
    assert found.folders is not None
    assert found.folders.num_images == 9
    assert 0 < found.folders.num_disagreeing
    assert found.folders.num_disagreeing == 9 - labels.index["num_correct"]
    assert len(found.folders.worst) == found.folders.num_disagreeing
    ratios = [d.teacher_probability / d.folder_probability for d in found.folders.worst]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("normalizer", [True, False])
def test_probabilities_are_those_of_the_class_target(write_set, source, normalizer):
    rng = np.random.default_rng(4)
    keys = [sample.key for sample in source.samples]
    maps = {
        key: random_map(rng, grid=(3, 4), k=4, num_classes=NUM_CLASSES, normalizer=normalizer)
        for key in keys
    }
    found = describe(write_set(maps), source=source)
    assert found.folders is not None and found.folders.worst
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    for entry in found.folders.worst:
        label_map = maps[entry.key]
        target = sample_targets(
            PaletteMaps.from_label_maps([label_map]),
            whole,
            label_map.grid,
            fill="residual" if normalizer else "zero",
        ).dense_view()[0]
        folder = int(entry.folder_class.removeprefix("class "))
        assert entry.teacher_class == f"class {target.argmax()}"
        assert entry.teacher_probability == pytest.approx(float(target.max()), rel=1e-3)
        assert entry.folder_probability == pytest.approx(float(target[folder]), rel=1e-3)
        assert entry.folder_class == f"class {int(entry.key[1:3])}"


def test_a_large_set_is_described_by_a_random_choice(labels):
    first, again, other = (describe(labels, num_images=4, seed=seed) for seed in (0, 0, 1))
    assert first.num_images == 4
    assert first == again
    assert first != other
    assert describe(labels, num_images=0).num_images == 9


def test_images_of_other_classes_are_not_compared(write_set, source):
    maps = {source.samples[0].key: random_map(np.random.default_rng(0))}
    assert describe(write_set(maps), source=source).folders is None


def test_the_words_name_what_the_index_knows(labels):
    words = in_words(labels, describe(labels))
    assert words["teacher"] == (
        f"nearest colour, 64 px, fp32, weights {labels.index['teacher']['weights_sha256'][:12]}, "
        f"timm {labels.index['teacher']['timm_version']}"
    )
    assert words["classes"] == "top 12 of 12 in each cell, 16-bit scores"
    assert words["images"] == "9 labelled, 0 left out"
    assert words["read"] == "9 maps, all of them"


def run(*arguments: object):
    return CliRunner().invoke(label, [str(argument) for argument in arguments])


def test_the_info_command_fills_one_screen_at_most(labels, source):
    out = run("info", labels.folder, "--images", source.root)
    assert out.exit_code == 0, out.output
    assert len(out.stdout.splitlines()) <= 24
    assert re.search(r"disagree    \d of 9 images \(\d+\.\d%\)", out.stdout)
    assert re.search(r"  c0\d/photo%20\d: colour <\d> +\d", out.stdout)


def test_the_info_command_prints_json(labels, source):
    out = run("info", labels.folder, "--images", source.root, "--json")
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert found["index"]["fit"] == "native"
    assert found["maps"]["folders"]["num_images"] == 9
    assert found["maps"]["grids"][0].keys() == {"levels", "num_images"}


def test_the_info_command_says_why_folders_are_not_compared(labels, tmp_path):
    (tmp_path / "one").mkdir()
    patchwork(0, size=(32, 32)).save(tmp_path / "one" / "1.png")
    out = run("info", labels.folder, "--images", tmp_path)
    assert out.exit_code == 0, out.output
    assert "not compared, they are other classes: 1 there, 12 of the teacher" in out.stdout


# ---------------------------------------------------------------------------------------- show


def middle_colours(panel: Image.Image, columns: int) -> list[tuple[int, ...]]:
    """Colours at the middle height, at the middles of so many equal parts."""
    pixels = np.asarray(panel)[panel.height // 2]
    return [tuple(pixels[int((i + 0.5) / columns * panel.width)]) for i in range(columns)]


def test_confidence_and_residual_are_painted_where_they_are():
    sure, unsure = flat_map([[1]], 0.99), flat_map([[1]], 0.02)
    label_map = LabelMap(
        scores=np.zeros((1, 1, 2), np.float16),
        classes=np.ones((1, 1, 2), np.uint32),
        num_classes=NUM_CLASSES,
        log_normalizer=np.concatenate([sure.log_normalizer, unsure.log_normalizer], 1),  # pyright: ignore
    )
    white = Image.new("RGB", (200, 100), "white")
    panel = sheet._heat_panel(white, label_map, white)
    # Each heat map takes about a third; its right fifth is the scale.
    colours = middle_colours(panel, 24)
    (left, right), (left_rest, right_rest) = (colours[2], colours[4]), (colours[10], colours[12])
    assert left[0] > 200 and left[2] < 90  # viridis: yellow is 1, purple 0
    assert right[0] < 90 and right[2] > 60
    assert left_rest == pytest.approx(right, abs=8)
    assert right_rest == pytest.approx(left, abs=8)


def test_a_sheet_shows_the_photo_each_level_and_the_crop():
    rng = np.random.default_rng(0)
    photo = patchwork(0, size=(96, 64))
    names = [f"class {i}" for i in range(40)]
    one = sheet.draw_sheet("a/1", photo, [random_map(rng)], names)
    two = sheet.draw_sheet(
        "a/1", photo, [random_map(rng), random_map(rng, grid=(9, 12))], names, folder_class="cat"
    )
    assert two.height > one.height + 300
    again = sheet.draw_sheet("a/1", photo, [random_map(np.random.default_rng(0))], names)
    other = sheet.draw_sheet("a/1", photo, [random_map(np.random.default_rng(0))], names, seed=1)
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_without_a_normaliser_words_stand_in_place_of_heat():
    window = (0.1, 0.0, 0.9, 1.0)
    label_map = random_map(np.random.default_rng(0), normalizer=False, window=window)
    photo = patchwork(0, size=(96, 64))
    panel = np.asarray(sheet._heat_panel(photo, label_map, photo))
    words = panel[:, : panel.shape[1] // 2]
    assert (words.max(2) == words.min(2)).all()  # black on white
    names = [f"class {i}" for i in range(40)]
    assert sheet.draw_sheet("a/1", photo, [label_map], names).width > 900


def test_sheets_are_written_as_a_picture_or_as_one_page(labels, source, tmp_path):
    keys = [sample.key for sample in source.samples[:2]]
    sheets = sheet.draw_sheets(labels, source, keys)
    sheet.write_sheets(sheets, tmp_path / "new" / "x.png", title="t")
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.height == sum(drawn.height for drawn in sheets.values())
    sheet.write_sheets(sheets, tmp_path / "x.html", title="a <b>")
    page = (tmp_path / "x.html").read_text()
    assert "<h1>a &lt;b&gt;</h1>" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2
    for src in sources:
        data = base64.b64decode(src.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).size in {drawn.size for drawn in sheets.values()}
    with pytest.raises(ValueError, match=r"x.jpg ends neither in .png nor in .html"):
        sheet.write_sheets(sheets, tmp_path / "x.jpg", title="t")


def test_keys_not_given_are_chosen_at_random(labels, source):
    chosen = list(sheet.draw_sheets(labels, source, []))
    assert len(set(chosen)) == 3
    assert set(chosen) <= set(labels.keys)


def test_wrong_keys_are_answered_with_the_reason(write_set, source):
    rng = np.random.default_rng(0)
    maps = {s.key: random_map(rng, num_classes=NUM_CLASSES) for s in source.samples[1:]}
    labels = write_set(maps | {"zz/gone": maps[source.samples[1].key]}, quarantined={"c": "empty"})
    with pytest.raises(ValueError, match="c was left out of .*: empty"):
        sheet.draw_sheets(labels, source, ["c"])
    with pytest.raises(ValueError, match="'zz/gone' has no image"):
        sheet.draw_sheets(labels, source, ["zz/gone"])
    with pytest.raises(ValueError, match="'c01/photo 4' has no label .* mean c01/photo%204"):
        sheet.draw_sheets(labels, source, ["c01/photo 4"])


def test_the_show_command_writes_a_sheet(labels, source, tmp_path):
    key = source.samples[4].key
    out = run("show", labels.folder, key, "--images", source.root, "--out", tmp_path / "x.png")
    assert out.exit_code == 0, out.output
    assert out.stdout == f"{tmp_path / 'x.png'}: {key}\n"
    assert Image.open(tmp_path / "x.png").width > 900
    wrong = run("show", labels.folder, "?", "--images", source.root, "--out", tmp_path / "y.png")
    assert wrong.exit_code == 2
    assert not Path(tmp_path / "y.png").exists()
