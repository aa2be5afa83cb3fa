"""tl-seg predict: which files it writes, what is in them, and how it goes on after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tokenlabel.cli import segment as tl_seg
from tokenlabel.segmenter import predict as job
from tokenlabel.segmenter import weights as weights_module
from tokenlabel.segmenter.class_sets import (
    CLASS_SETS,
    ClassSet,
    class_set_of,
    generated_colours,
    voc_colour,
)
from tokenlabel.segmenter.draw import draw_segmentation, label_image, legend, overlay
from tokenlabel.segmenter.inference import segment
from tokenlabel.segmenter.predict import Look, PredictReport, predict
from tokenlabel.segmenter.uper_net import ModelConfig, create_model
from tokenlabel.segmenter.weights import find_weights, load_model
from tokenlabel.trainer.checkpoint import Checkpoint, save
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.recipe import build_record

RECIPE = """
[model]
name = "upernet_lvvit_s"
num_classes = 4
image_size = 32
kwargs = { embed_dim = 8, depth = 4, num_heads = 2, stem_width = 4, out_blocks = [0, 1, 2, 3], \
head_dim = 6, deep_dim = 8 }
[inference]
short_px = 32
long_px = 90
window_px = 32
stride_px = 21
"""
NAMES = ["sky", "tree", "road", "car"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    import tomllib

    torch.manual_seed(1)
    table = tomllib.loads(RECIPE)["model"]
    model = create_model(build_record(ModelConfig, table, "model."))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 5
    path = tmp_path_factory.mktemp("run") / "best.pt"
    weights = model.state_dict()
    save(
        Checkpoint(
            recipe=RECIPE, class_ids=NAMES, class_names=NAMES, grid=(2, 2), step=1, model=weights
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six photos in two folders, one of them not readable and one too narrow."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, size in {
        "a/1": (40, 30),
        "a/2": (33, 61),
        "b/1": (50, 45),
        "b/x.y": (32, 32),
    }.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    (folder / "b" / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing")
    Image.new("RGB", (300, 2)).save(folder / "b" / "narrow.png")
    return folder


def run(checkpoint: Path, images: Path, out: Path, **options: Any) -> PredictReport:
    options = dict(device="cpu", num_workers=0) | options
    return predict(checkpoint, str(images), out, **options)


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


KEYS = ("a/1", "a/2", "b/1", "b/x%2Ey")
ALWAYS = {"classes.tsv", "index.json", "legend.png", "settings.json"}


def test_each_image_gets_a_label_png_and_an_overlay_and_the_rest_is_accounted_for(
    checkpoint, photos, tmp_path
):
    report = run(checkpoint, photos, tmp_path / "out")
    wanted = {f"labels/{key}.png" for key in KEYS} | {f"overlays/{key}.jpg" for key in KEYS}
    assert files(tmp_path / "out") == wanted | ALWAYS
    trained = load_model(checkpoint)
    pixels = np.zeros(4, dtype=int)
    for key in KEYS:
        photo = Image.open(photos / f"{key.replace('%2E', '.')}.png").convert("RGB")
        expected = segment(
            trained.model,
            torch.from_numpy(np.array(photo)).permute(2, 0, 1),
            trained.inference,
            mean=trained.config.mean,
            std=trained.config.std,
        )
        with Image.open(tmp_path / "out" / "labels" / f"{key}.png") as found:
            assert (found.mode, found.size) == ("P", photo.size)
            assert np.array_equal(np.array(found), expected.numpy())
            colours = np.array(trained.classes.colours)[expected.numpy()]
            assert np.array_equal(np.array(found.convert("RGB")), colours)
        pixels += np.bincount(expected.numpy().ravel(), minlength=4)
    assert report.num_images == 4
    assert report.pixels == {name: n for name, n in zip(NAMES, pixels.tolist()) if n}
    assert list(report.pixels.values()) == sorted(report.pixels.values(), reverse=True)
    assert report.unreadable.keys() == {"b/narrow", "b/torn"}
    assert "2 × 300 px (height × width) would be seen at" in report.unreadable["b/narrow"]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index == {"format": "tokenlabel-segmentations", "version": 1, **report.to_json()}
    table = (tmp_path / "out" / "classes.tsv").read_text().splitlines()
    assert table[:2] == ["index\tname\tcolour", "0\tsky\t#e69f00"]
    assert len(table) == 5


def test_a_run_goes_on_where_it_was_killed_and_ends_the_same(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    whole = run(checkpoint, photos, out)
    kept = out / "labels" / "a" / "2.png"
    before = kept.stat().st_mtime_ns
    (out / "index.json").unlink()
    (out / "labels" / "a" / "1.png").unlink()
    (out / "overlays" / "b" / "1.jpg").unlink()
    (out / "labels" / "b" / "x%2Ey.png").write_bytes(b"torn")
    again = run(checkpoint, photos, out)
    assert again.num_before == 1
    assert kept.stat().st_mtime_ns == before
    assert (again.pixels, again.unreadable) == (whole.pixels, whole.unreadable)
    assert run(checkpoint, photos, out).num_before == 4


def test_predictions_of_other_settings_are_not_mixed(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, photos, out)
    with pytest.raises(ValueError, match=r"other settings \(inference, flip differ\).*--overwrite"):
        run(checkpoint, photos, out, flip=True, inference={"mode": "whole"})
    report = run(checkpoint, photos, out, overwrite=True, look=Look(overlays=False))
    assert report.num_before == 0
    assert files(out) == {f"labels/{key}.png" for key in KEYS} | ALWAYS


def test_a_folder_with_other_things_is_left_alone(checkpoint, photos, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty and holds no predictions"):
        run(checkpoint, photos, tmp_path, overwrite=True)
    assert files(tmp_path) == {"thesis.txt"}


def test_a_single_image_will_do(checkpoint, photos, tmp_path):
    report = run(checkpoint, photos / "b" / "x.y.png", tmp_path / "out")
    assert report.num_images == 1
    assert "labels/x%2Ey.png" in files(tmp_path / "out")


def test_published_checkpoints_have_names(monkeypatch):
    place = Place(device=torch.device("cpu"))
    monkeypatch.setattr(weights_module, "fetch", lambda name, place: Path(name))
    found = find_weights("upernet_lvvit_m", place).as_posix()
    assert found.endswith(
        "zihangJiang/TokenLabeling/releases/download/v1.1-seg/upernet_lvvit_m.pth"
    )
    assert find_weights("runs/best.pt", place) == Path("runs/best.pt")
    with pytest.raises(ValueError, match="upernet_lvvit_t is neither a file nor .*upernet_lvvit_s"):
        find_weights("upernet_lvvit_t", place)


def test_names_and_colours_can_be_chosen(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\nperson\ncar\n")
    classes = class_set_of(NAMES)
    chosen = job.choose_classes(classes, names=names, palette="cityscapes")
    assert chosen.names == ("sky", "road", "person", "car")
    assert chosen.colours == CLASS_SETS["cityscapes"].colours[:4]
    assert job.choose_classes(classes, palette="generated").colours == generated_colours(4)
    names.write_text("sky\nroad\n")
    with pytest.raises(ValueError, match="names 2 classes, the model has 4; expected one a line"):
        job.choose_classes(classes, names=names)
    many = class_set_of([str(n) for n in range(22)])
    with pytest.raises(ValueError, match="palette voc has 21 colours, the model 22 classes"):
        job.choose_classes(many, palette="voc")


# --------------------------------------------------------------------------------- the command


def test_the_command_prints_what_was_found(checkpoint, photos, tmp_path):
    words = ["predict", "--checkpoint", str(checkpoint), "--images", str(photos)]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu", "--workers", "0"]
    done = CliRunner().invoke(tl_seg, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "model     upernet_lvvit_s, raw weights"
    assert lines[1] == "images    4 images"
    assert lines[-3] == "left out  2 images"
    assert lines[-1].startswith("  b/torn: ")
    done = CliRunner().invoke(tl_seg, [*words, "--json"])
    facts = json.loads(done.stdout)
    assert facts["num_before"] == facts["num_images"] == 4
    assert sum(facts["pixels"].values()) == 40 * 30 + 33 * 61 + 50 * 45 + 32 * 32


def test_multi_scale_is_six_sizes_and_their_mirror_images(checkpoint, photos, tmp_path):
    words = ["predict", "--checkpoint", str(checkpoint), "--images", str(photos / "a" / "1.png")]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu", "--workers", "0", "--multi-scale"]
    done = CliRunner().invoke(tl_seg, words)
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert settings["flip"] is True


def test_a_mistake_is_one_line(checkpoint, photos, tmp_path):
    words = ["predict", "--checkpoint", str(checkpoint), "--images", str(photos / "c")]
    done = CliRunner().invoke(tl_seg, [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{photos / 'c'} does not exist" in done.stderr


PAIR = """
import os, sys
from tokenlabel.segmenter.predict import predict
checkpoint, images, out, port = sys.argv[1:]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
report = predict(checkpoint, images, __import__("pathlib").Path(out), device="cpu", num_workers=0)
assert report.is_main == (rank == "0")
os._exit(os.waitpid(other, 0)[1] != 0 if other else 0)  # a tidy end would take a second
"""


def test_two_processes_do_what_one_does(checkpoint, photos, tmp_path):
    from loop_runs import free_port

    one = run(checkpoint, photos, tmp_path / "one")
    command = [sys.executable, "-c", PAIR, checkpoint, photos, tmp_path / "two", free_port()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "two" / "index.json").read_text())
    assert index["pixels"] == one.pixels
    assert index["unreadable"] == one.unreadable
    assert index["num_images"] == 4
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for key in KEYS:
        pair = [(tmp_path / name / "labels" / f"{key}.png").read_bytes() for name in ("one", "two")]
        assert pair[0] == pair[1]


# ------------------------------------------------------------------------------------ pictures


def test_an_overlay_mixes_photo_and_colour_and_marks_borders():
    classes = ClassSet(names=("left", "right"), colours=((200, 0, 0), (0, 0, 100)))
    labels = np.repeat(np.array([[0, 0, 1, 1, 255]]), 3, axis=0)
    photo = Image.new("RGB", (5, 3), (100, 100, 100))
    found = np.array(overlay(photo, labels, classes, opacity=0.5))
    assert found[1, 0].tolist() == [150, 50, 50]
    assert found[1, 3].tolist() == [50, 50, 100]
    assert found[1, 4].tolist() == [100, 100, 100]  # no class: as it is
    assert found[1, 2].min() > 140  # the border between the two is bright
    assert np.array_equal(
        np.array(overlay(photo, labels, classes, opacity=0.0))[:, 0], [[100] * 3] * 3
    )


def test_large_images_are_drawn_smaller_and_labels_stay_labels():
    classes = class_set_of(["a", "b"])
    labels = np.zeros((40, 200), dtype=np.uint8)
    labels[:, 100:] = 1
    found = overlay(Image.new("RGB", (200, 40)), labels, classes, opacity=1.0, longest_px=50)
    assert found.size == (50, 10)
    assert np.array(found)[5, 10].tolist() == list(classes.colours[0])
    assert np.array(found)[5, 40].tolist() == list(classes.colours[1])


def test_the_legend_names_classes_by_their_share():
    labels = np.array([[0, 2, 2, 2], [2, 2, 255, 255]])
    entries = legend(labels, class_set_of(["sky", "tree", "road"]))
    assert [str(entry) for entry in entries] == ["road 83%", "sky 17%"]
    many = class_set_of([str(n) for n in range(40)])
    entries = legend(np.arange(40)[None], many)
    assert len(entries) == 25
    assert str(entries[-1]) == "and 16 more classes 40%"


def test_only_large_regions_carry_their_name():
    classes = class_set_of(["sky", "tree"])
    labels = np.zeros((100, 200), dtype=np.int64)
    labels[:5, :20] = 1  # 1 % of the pixels
    photo = Image.new("RGB", (200, 100), (90, 90, 90))
    plain = np.array(overlay(photo, labels, classes))
    sheet = np.array(draw_segmentation(photo, labels, classes, title="x"))
    drawn = sheet[39 : 39 + 100, 12 : 12 + 200]  # below the title
    changed = np.argwhere((drawn != plain).any(-1))
    assert len(changed) > 100
    assert changed.min(0)[0] > 30  # nothing near the small region in the corner
    assert changed.max(0)[0] < 75


def test_a_sheet_has_room_for_the_legend_of_a_small_image():
    classes = class_set_of([f"a class with a rather long name, number {n}" for n in range(20)])
    labels = np.arange(20).reshape(4, 5)
    sheet = draw_segmentation(Image.new("RGB", (5, 4)), labels, classes, title="a key " * 40)
    assert sheet.width > 500
    assert sheet.height > 20 * 15


def test_above_256_classes_a_label_png_has_16_bits():
    labels = np.array([[0, 255, 256, 299]])
    found = label_image(labels, generated_colours(300))
    assert found.mode.startswith("I;16")
    assert np.array_equal(np.array(found), labels)
    assert label_image(np.array([[0, 255]]), generated_colours(256)).mode == "P"


def test_colours_of_data_sets_are_known_by_their_class_names():
    assert class_set_of(["Road", "sidewalk ", "building"]).colours == generated_colours(3)
    for known in CLASS_SETS.values():
        assert class_set_of([name.upper() for name in known.names]).colours == known.colours
    synonyms = [f"{name}, other;word" for name in CLASS_SETS["ade20k"].names]
    assert class_set_of(synonyms).colours[0] == (120, 120, 120)
    assert [len(s.names) for s in CLASS_SETS.values()] == [150, 19, 21]
    assert all(len(s.names) == len(s.colours) for s in CLASS_SETS.values())


def test_generated_colours_differ_and_do_not_depend_on_how_many_are_asked_for():
    colours = generated_colours(600)
    assert len(set(colours)) == 600
    assert colours[:9] == generated_colours(9)


def test_voc_colours_deal_out_the_bits_of_the_index():
    found = [voc_colour(index) for index in (0, 1, 2, 4, 8, 20)]
    assert found == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (0, 0, 128), (64, 0, 0), (0, 64, 128)]
