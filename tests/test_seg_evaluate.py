"""tl-seg eval: exact numbers at the masks' own size, on any number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from seg_sets import NAMES, tiny_recipe, write_shards
from sklearn.metrics import confusion_matrix
from test_seg_train import on_two

from tokenlabel.cli import segment as tl_seg
from tokenlabel.segmenter.class_sets import class_set_of
from tokenlabel.segmenter.evaluate import as_table, confusions, evaluate
from tokenlabel.segmenter.feed import SegSamples
from tokenlabel.segmenter.inference import segment
from tokenlabel.segmenter.sheet import Compared, draw_sheet
from tokenlabel.segmenter.uper_net import create_model
from tokenlabel.segmenter.weights import load_model
from tokenlabel.shards.index import read_index
from tokenlabel.trainer.checkpoint import Checkpoint, save
from tokenlabel.trainer.recipe import to_toml


@pytest.fixture(scope="module", autouse=True)
def _no_threads_before_the_forks():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), num_train=1, num_val=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    recipe = tiny_recipe("model.num_classes=4")
    model = create_model(recipe.model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    weights = model.state_dict()
    content = dict(class_ids=NAMES, class_names=NAMES, grid=model.grid, step=1)
    save(Checkpoint(recipe=to_toml(recipe), model=weights, **content), path)  # pyright: ignore
    return path


def reference(checkpoint: Path, data: Path, **options) -> np.ndarray:
    """Scikit-learn's matrix over all pixels with a class, image after image."""
    trained = load_model(checkpoint)
    samples = SegSamples(read_index(data), "val")
    true, called = [], []
    for i in range(len(samples)):
        pixels, mask = samples.read(i)
        predicted = segment(
            trained.model, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), trained.inference,
            mean=trained.config.mean, std=trained.config.std, **options,
        ).numpy()  # fmt: skip
        true.append(mask[mask != 255])
        called.append(predicted[mask != 255])
    return confusion_matrix(np.concatenate(true), np.concatenate(called), labels=range(4))


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.0, 1.75), "flip": True}])
def test_the_counts_are_those_of_scikit_learn(checkpoint, data, options):
    report = evaluate(checkpoint, data, device="cpu", num_workers=0, **options)
    counts = reference(checkpoint, data, **options)
    np.testing.assert_array_equal(report.counts.numpy(), counts)
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert report.result.miou == pytest.approx(100 * np.nanmean(iou))
    assert report.result.pixel_accuracy == pytest.approx(100 * counts.trace() / counts.sum())
    assert report.result.num_images == 5


def test_two_processes_count_what_one_counts(checkpoint, data, tmp_path):
    whole = evaluate(checkpoint, data, device="cpu", num_workers=0)

    def work() -> None:
        report = evaluate(checkpoint, data, device="cpu", num_workers=0)
        name = "main" if report.is_main else "other"
        (tmp_path / name).write_text(json.dumps(report.counts.tolist()), encoding="utf-8")

    assert on_two(work) == [0, 0]
    for name in ("main", "other"):
        assert json.loads((tmp_path / name).read_text()) == whole.counts.tolist()


def test_whole_and_slide_are_the_checkpoints_or_what_is_asked_for(checkpoint, data):
    slide = evaluate(checkpoint, data, device="cpu", num_workers=0)
    whole = evaluate(checkpoint, data, device="cpu", num_workers=0, inference={"mode": "whole"})
    assert slide.inference.mode == "slide" and whole.inference.mode == "whole"
    assert not torch.equal(slide.counts, whole.counts)


def test_the_table_has_each_class_and_the_words_name_what_is_mistaken(checkpoint, data):
    report = evaluate(checkpoint, data, device="cpu", num_workers=0)
    lines = as_table(report).splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(NAMES)
    ious = [float(line.split()[1]) for line in lines[1:] if "–" not in line]
    assert ious == sorted(ious, reverse=True)
    off = report.counts.clone().fill_diagonal_(0)
    row, col = divmod(int(off.argmax()), 4)
    share = off.max().item() / report.counts.sum().item()
    said = f"{NAMES[row]} taken for {NAMES[col]}: {share:.2%} of all pixels"
    assert confusions(report)[0] == said


def test_other_classes_and_a_missing_split_are_named(checkpoint, data, tmp_path):
    recipe = tiny_recipe("model.num_classes=3")
    model = create_model(recipe.model)
    names = NAMES[:3]
    other = Checkpoint(
        recipe=to_toml(recipe), class_ids=names, class_names=names, grid=(2, 2), step=1,
        model=model.state_dict(),
    )  # fmt: skip
    save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="tells 3 classes apart, .* has 4"):
        evaluate(tmp_path / "other.pt", data, device="cpu", num_workers=0)
    with pytest.raises(ValueError, match="has no split 'test'"):
        evaluate(checkpoint, data, split="test", device="cpu", num_workers=0)


def test_the_command_prints_a_table_or_json_and_draws(checkpoint, data, tmp_path):
    common = ["eval", "--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu"]
    common += ["--workers", "0"]
    done = CliRunner().invoke(tl_seg, [*common, "--sheet", str(tmp_path / "a.png"), "--count", "2"])
    assert done.exit_code == 0, done.output
    assert "mIoU" in done.output and "slide, fp32" in done.output
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.height > 2 * 250
    facts = json.loads(CliRunner().invoke(tl_seg, [*common, "--json"]).output)
    assert [score["name"] for score in facts["classes"]] == NAMES
    assert np.array(facts["confusion"]).sum() == facts["num_pixels"]


def test_a_sheet_says_how_much_is_right():
    mask = torch.tensor([[0, 1], [255, 1]]).repeat_interleave(20, 0).repeat_interleave(20, 1)
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image = Compared("a", pixels, mask, torch.zeros_like(mask))
    sheet = draw_sheet([image], class_set_of(["one", "two"]), ignore_index=255)
    assert sheet.width > 3 * 360
