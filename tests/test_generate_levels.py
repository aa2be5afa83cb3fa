"""Label maps beyond the usual: at several levels, smaller, of many classes, broken off."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from colour_teacher import NUM_CLASSES, STRIDE, NearestColour, colour_teacher, patchwork
from torch import Tensor

from tokenlabel.cli import label
from tokenlabel.labeler import pipeline
from tokenlabel.labeler.dictionary import read_dictionary, train_on_set
from tokenlabel.labeler.generate import Summary, generate, parse_levels
from tokenlabel.labeler.geometry import PaletteMaps, crop_view, sample_targets
from tokenlabel.labeler.label_map import decode, encode, keep_mass
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.score import Scorer
from tokenlabel.labeler.sources import open_source
from tokenlabel.labeler.teacher import as_teacher

SIZES = [(96, 72), (72, 96), (80, 80), (120, 60), (96, 72)]
LEVELS = [32, 48, 80]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty photos of several shapes, a folder for each of the teacher's classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(NUM_CLASSES):
        (root / f"c{number:02}").mkdir()
    for number in range(20):
        photo = patchwork(number, size=SIZES[number % 5])
        photo.save(root / f"c{number % NUM_CLASSES:02}" / f"{number}.png")
    return root


@pytest.fixture
def run(images, tmp_path) -> Callable[..., Summary]:
    """Label the photos at three levels, in slices of at most eight."""

    def run(out: Path = tmp_path / "labels", **options) -> Summary:
        options = {"levels": LEVELS, "shard_size": 8, "batch_size": 3, "num_workers": 2} | options
        teacher = options.pop("teacher", None) or colour_teacher((options["levels"] or LEVELS)[0])
        source = options.pop("source", None) or open_source(images)
        return generate(source, out, teacher=teacher, **options)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batches_of(monkeypatch) -> list[tuple[int, ...]]:
    """Note the shape of every batch that the teacher gets from now on."""
    shapes = []
    start = Scorer.start

    def noting(self, images, *, level=0):
        shapes.append(images.shape)
        return start(self, images, level=level)

    monkeypatch.setattr(Scorer, "start", noting)
    return shapes


# ------------------------------------------------------------------------------------------- levels


def test_each_level_is_the_map_that_a_teacher_of_that_size_makes(run, tmp_path):
    summary = run(batch_size=1, top_k=3)
    pyramids = LabelSet.open(tmp_path / "labels")
    for level, size in enumerate(LEVELS):
        single = run(tmp_path / str(size), levels=[size], batch_size=1, top_k=3)
        alone = LabelSet.open(tmp_path / str(size))
        assert alone.keys == pyramids.keys
        for key in alone.keys:
            maps = decode(pyramids.read(key))
            assert len(maps) == len(LEVELS)
            assert maps[level].equals(decode(alone.read(key))[0])
        if level == 0:  # what the whole image is ranked as comes from the first level
            assert summary.num_correct == single.num_correct


def test_one_level_is_the_same_set_as_an_image_size(run, tmp_path):
    run(levels=[64])
    run(tmp_path / "plain", levels=[], teacher=colour_teacher(64))
    assert files_of(tmp_path / "labels") == files_of(tmp_path / "plain")


def test_the_set_names_its_levels_and_nothing_that_was_not_asked_for(run, tmp_path):
    run()
    index = LabelSet.open(tmp_path / "labels").index
    assert index["levels"] == LEVELS
    assert index["teacher"]["image_size"] == LEVELS[0]
    assert not {"mass", "score_bits", "dictionary", "dictionary_sha256"} & index.keys()
    run(tmp_path / "plain", levels=[])
    assert "levels" not in LabelSet.open(tmp_path / "plain").index


def test_larger_levels_come_in_smaller_batches(run, monkeypatch):
    shapes = batches_of(monkeypatch)
    run(levels=[32, 64], batch_size=4, shard_size=100, fit="stretch")
    assert shapes.count((4, 32, 32, 3)) == 5
    assert shapes.count((1, 64, 64, 3)) == 20
    assert len(shapes) == 25


def test_pixels_that_wait_for_others_of_their_shape_are_bounded(run, monkeypatch, tmp_path):
    run(tmp_path / "waiting", batch_size=7)
    shapes = batches_of(monkeypatch)
    monkeypatch.setattr(pipeline, "_MAX_WAITING_BYTES", 0)
    run(batch_size=7)
    assert len(shapes) == 20 * len(LEVELS)
    alone, together = LabelSet.open(tmp_path / "labels"), LabelSet.open(tmp_path / "waiting")
    assert alone.keys == together.keys
    for key in alone.keys:
        for one, other in zip(decode(alone.read(key)), decode(together.read(key))):
            assert np.allclose(one.scores, other.scores, atol=1e-2)


def test_a_small_crop_reads_the_level_that_saw_it_large(run, tmp_path):
    run(levels=[32, 80])
    labels = LabelSet.open(tmp_path / "labels")
    coarse, fine = decode(labels.read(labels.keys[0]))
    crop = crop_view(torch.tensor([[0.0, 0.0, 0.3, 0.3]]))
    both = sample_targets(PaletteMaps.from_label_maps([[coarse, fine]]), crop, (2, 2))
    alone = sample_targets(PaletteMaps.from_label_maps([fine]), crop, (2, 2))
    assert torch.allclose(both.dense_tokens(), alone.dense_tokens(), atol=1e-5)


# ----------------------------------------------------------------------------------- bytes of a map


def test_mass_score_bits_and_dictionary_decide_how_a_map_is_stored(run, tmp_path):
    run(tmp_path / "plain", top_k=8)
    plain = LabelSet.open(tmp_path / "plain")
    dictionary = train_on_set(plain.keys, plain.read_each, size_bytes=1_000)
    run(top_k=8, mass=0.9, score_bits=8, dictionary=dictionary)
    small = LabelSet.open(tmp_path / "labels")
    assert small.dictionary == dictionary
    assert (small.index["mass"], small.index["score_bits"]) == (0.9, 8)
    for key in plain.keys:
        levels = [keep_mass(level, 0.9) for level in decode(plain.read(key))]
        assert small.read(key) == encode(levels, score_bits=8, dictionary=dictionary)
        assert len(small.read(key)) <= len(encode(levels, score_bits=8))  # at worst it is unused
        found = decode(small.read(key), dictionary=small.dictionary)
        assert all(np.array_equal(a.classes, b.classes) for a, b in zip(found, levels))


def test_a_dictionary_can_be_trained_on_a_set_that_has_one(run, images, tmp_path):
    run(tmp_path / "plain")
    commands = [
        f"dictionary {tmp_path}/plain --out {tmp_path}/first.dict --size 800",
        f"dictionary {tmp_path}/labels --out {tmp_path}/second.dict --size 800",
    ]
    found = CliRunner().invoke(label, commands[0].split())
    assert found.stdout == f"{tmp_path}/first.dict: 800 bytes, trained on 20 label maps\n"
    run(dictionary=read_dictionary(tmp_path / "first.dict"))
    assert CliRunner().invoke(label, commands[1].split()).exit_code == 0
    # The payloads are the same, however they were compressed.
    assert read_dictionary(tmp_path / "second.dict") == read_dictionary(tmp_path / "first.dict")


def test_files_that_are_no_dictionary_are_refused(run, tmp_path):
    (tmp_path / "text").write_text("this is no dictionary")
    with pytest.raises(ValueError, match="text: not a zstd dictionary; tl-label dictionary trains"):
        read_dictionary(tmp_path / "text")
    with pytest.raises(ValueError, match="a dictionary of 65537 bytes; a label set takes 65536"):
        run(dictionary=bytes(65_537))
    with pytest.raises(ValueError, match="size 65537 is not between 256 and 65536 bytes"):
        train_on_set([], lambda keys: [], size_bytes=65_537)


def test_too_few_maps_to_train_on_are_an_error(run, tmp_path):
    run()
    labels = LabelSet.open(tmp_path / "labels")
    with pytest.raises(ValueError, match="no dictionary can be trained on 2 label maps.*--size"):
        train_on_set(labels.keys[:2], labels.read_each)


def test_a_run_with_another_dictionary_is_refused_by_its_checksum(run, tmp_path):
    run(tmp_path / "plain")
    plain = LabelSet.open(tmp_path / "plain")
    run(dictionary=train_on_set(plain.keys, plain.read_each, size_bytes=900))
    with pytest.raises(ValueError, match=r"\(dictionary_sha256 '\w{64}' there, None here\)"):
        run()
    with pytest.raises(ValueError, match=r"dictionary_sha256 '\w{64}' there, '\w{64}' here\)"):
        run(dictionary=train_on_set(plain.keys, plain.read_each, size_bytes=800))


# ----------------------------------------------------------------------- a hundred thousand classes


class WideHead(NearestColour):
    """A head of 100,000 classes, those of the twelve colours the last among them."""

    num_classes = 100_000

    def forward_head(self, cells: Tensor) -> Tensor:
        others = torch.linspace(-40, -30, self.num_classes - NUM_CLASSES)
        return torch.cat([others.expand(len(cells), -1), super().forward_head(cells)], 1)


def test_a_hundred_thousand_classes_come_back_from_map_and_targets(tmp_path):
    (tmp_path / "flat").mkdir()
    patchwork(0, size=(64, 64)).save(tmp_path / "flat" / "photo.png")
    source = open_source(tmp_path / "flat")
    wide = as_teacher(WideHead(), name="wide", image_size=32, device=torch.device("cpu"))
    generate(source, tmp_path / "wide", teacher=wide, fit="stretch", top_k=3)
    generate(source, tmp_path / "few", teacher=colour_teacher(32), fit="stretch", top_k=3)
    (found,) = decode(LabelSet.open(tmp_path / "wide").read("photo"))
    (narrow,) = decode(LabelSet.open(tmp_path / "few").read("photo"))
    first = WideHead.num_classes - NUM_CLASSES
    assert found.num_classes == 100_000
    # Colours lie evenly around a circle: of the second and third, either may come first.
    assert np.array_equal(found.classes[0], narrow.classes[0] + first)
    assert np.array_equal(found.scores, narrow.scores)
    corners = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).flip(1) / 4
    in_cells = crop_view(torch.cat([corners + 0.12, corners + 0.13], 1))
    targets = sample_targets(PaletteMaps.from_label_maps([found] * 16), in_cells, (1, 1))
    best = targets.dense_tokens()[:, 0].argmax(-1)
    assert np.array_equal(best.numpy(), found.classes[0].ravel())
    assert best.min() >= first > 65_535


# ------------------------------------------------------------------------------------------ stopped


def stop_at(monkeypatch, num_batches: int) -> None:
    """Send this process SIGTERM at its so-manieth batch; those before it are computed by then."""
    start, count = Scorer.start, 0

    def counting(self, images, *, level=0):
        nonlocal count
        count += 1
        if count == num_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        fetch = start(self, images)
        if count < num_batches:
            fetch()
        return fetch

    monkeypatch.setattr(Scorer, "start", counting)


@pytest.mark.parametrize("levels", [LEVELS, []])
def test_runs_that_are_stopped_again_and_again_end_in_the_bytes_of_one(
    run, monkeypatch, tmp_path, levels
):
    whole = run(tmp_path / "whole", levels=levels, shard_size=20)
    num_done, num_stops = 0, 0
    for num_batches in (1, 3, 5, 7, 9, 11, 99):
        with monkeypatch.context() as patch:
            stop_at(patch, num_batches)
            summary = run(levels=levels, shard_size=20)
        num_done += summary.num_new
        if not summary.was_stopped:
            break
        num_stops += 1
        assert summary.num_unfinished == 1
        assert summary.num_kept == num_done < 20
        assert not (tmp_path / "labels" / "index.json").exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert num_stops >= 2
    assert (summary.num_kept, num_done) == (0, 20)
    assert summary.num_correct == whole.num_correct
    assert files_of(tmp_path / "labels") == files_of(tmp_path / "whole")


def test_no_image_that_was_kept_meets_the_teacher_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        kept = run(levels=[], shard_size=20).num_kept
    shapes = batches_of(monkeypatch)
    run(levels=[], shard_size=20)
    assert 9 <= kept == 20 - sum(shape[0] for shape in shapes)


def test_slices_before_the_stop_are_finished_and_counted(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        summary = run(levels=[], shard_size=4, batch_size=2, fit="stretch")
    assert summary.was_stopped
    assert (summary.num_slices, summary.num_unfinished) in ((5, 2), (5, 3))
    assert summary.num_labelled == 4 * (5 - summary.num_unfinished)
    assert summary.num_new == summary.num_labelled + summary.num_kept
    assert {"labels-00000.json", "labels-00001.json"} <= files_of(tmp_path / "labels").keys()


@pytest.mark.parametrize("position", [3, 200, -50])
def test_a_damaged_remainder_is_begun_anew(run, monkeypatch, tmp_path, caplog, position):
    run(tmp_path / "whole", shard_size=20)
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        assert run(shard_size=20).was_stopped
    (remainder,) = (tmp_path / "labels").glob("*.partial")
    data = bytearray(remainder.read_bytes())
    data[position] ^= 1
    remainder.write_bytes(data)
    run(shard_size=20)
    assert "labels-00000.partial is damaged: its slice begins anew" in caplog.text
    assert files_of(tmp_path / "labels") == files_of(tmp_path / "whole")


def test_what_a_run_with_other_settings_left_unfinished_is_not_thrown_away(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run(shard_size=20).was_stopped
    with pytest.raises(ValueError, match=r"labels of another run \(k 5 there, 3 here\)"):
        run(shard_size=20, top_k=3)
    assert run(shard_size=20, top_k=3, overwrite=True).num_new == 20


STOPPED_AND_RUN_AGAIN = """
import os, signal, sys
from tokenlabel.cli import label
from tokenlabel.labeler.score import Scorer
import torch, timm, tokenlabel.labeler.generate, tokenlabel.labeler.teacher  # once for all

start, left = Scorer.start, 0

def counting(self, images, *, level=0):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return start(self, images, level=level)

Scorer.start = counting
for left in (4, 3, 0):
    if child := os.fork():
        print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        label(sys.argv[1:])
"""


def test_sigterm_ends_the_command_with_status_0_and_a_word_on_how_to_go_on(images, tmp_path):
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = "--teacher test_resnet --levels 64,96 --shard-size 20 --batch-size 2 --device cpu"

    def command(out: str) -> list[str]:
        paths = {"--images": images, "--checkpoint": tmp_path / "weights.pth"}
        named = [str(word) for pair in paths.items() for word in pair]
        return ["generate", *options.split(), *named, "--out", str(tmp_path / out)]

    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AND_RUN_AGAIN, *command("labels")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in lines if line.startswith("ended")] == ["ended with 0"] * 3
    stopped = [line for line in lines if line.startswith("stopped")]
    assert len(stopped) == 2
    assert re.fullmatch(
        r"stopped: 1 of 1 slice unfinished, \d+ images? of it kept; "
        "run the same command again to go on",
        stopped[0],
    )
    assert done.stderr.count("told to stop: finishing what has begun") == 2
    assert CliRunner().invoke(label, command("whole")).exit_code == 0
    assert files_of(tmp_path / "labels") == files_of(tmp_path / "whole")


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("text", ["", "448;640", "448,", "a,b", "448,-640", "1.5"])
def test_levels_that_are_no_sizes_are_refused(text):
    with pytest.raises(ValueError, match="are not sizes in px like 448,640,896"):
        parse_levels(text)
    assert parse_levels("448, 640") == [448, 640]


def test_levels_that_do_not_rise_in_whole_cells_are_refused(run):
    with pytest.raises(
        ValueError, match="levels 64,66 come to 64,64 px in whole cells of 8 px; each must be"
    ):
        run(levels=[64, 66])
    with pytest.raises(ValueError, match="each must be larger than the one before"):
        run(levels=[80, 64])
    with pytest.raises(ValueError, match="levels 0,64: each is the side of an image, 1 px or more"):
        run(levels=[0, 64], teacher=colour_teacher(64))
    with pytest.raises(ValueError, match="the first is not 32 px, the size that teacher nearest"):
        run(levels=[48, 64], teacher=colour_teacher(32))
    assert STRIDE == 8


def test_a_teacher_of_one_size_cannot_make_levels(run):
    model = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=NUM_CLASSES)
    squares = as_teacher(model, name="deit", device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="deit takes images of 224x224 px alone and cannot make levels 224,448"
    ):
        run(teacher=squares, levels=[224, 448], fit="stretch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 1.0}, "mass 1.0 is not a probability between 0 and 1, e.g. 0.99"),
        ({"mass": 0.0}, "mass 0.0 is not a probability"),
        ({"score_bits": 12}, "score bits 12 are not 8 or 16"),
    ],
)
def test_other_storage_options_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_image_size_and_levels_exclude_each_other(images, tmp_path):
    arguments = f"generate --images {images} --out {tmp_path} --image-size 64 --levels 64,96"
    found = CliRunner().invoke(label, arguments.split())
    assert found.exit_code == 2
    assert "--image-size and --levels: give one; the first level is the image size" in found.stderr
