"""report.html: everything in one file, drawn from the run itself, and never without a report."""

import base64
import io
import json
import math
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import random_map
from PIL import Image

from tokenlabel import cli
from tokenlabel.labeler.label_map import encode
from tokenlabel.shards.index import (
    ShardEntry,
    ShardIndex,
    SplitIndex,
    format_idx,
    write_index,
)
from tokenlabel.trainer import page
from tokenlabel.trainer.checkpoint import Checkpoint, save
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.recipe import Recipe, parse_recipe, to_toml
from tokenlabel.trainer.report import write_report

NUM_CLASSES = 12
CLASS_NAMES = [f"creature {i}" for i in range(NUM_CLASSES - 1)] + ["<b>bold & brash</b>"]
RECIPE = parse_recipe(f"""
    summary = "a tiny run"
    [model]
    name = "lvvit_t"
    num_classes = {NUM_CLASSES}
    image_size = 32
    kwargs = {{ embed_dim = 24, depth = 1, num_heads = 2, stem_width = 4 }}
    [augment]
    random_erasing = 0.0
    color_jitter = 0.0
    [schedule]
    duration = "50 steps"
    warmup = "5 steps"
    cooldown = "10 steps"
""")


class Reader(HTMLParser):
    """What a browser finds on a page: pictures, words, and addresses that it would fetch."""

    void = {"meta", "img"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[Image.Image] = []
        self.captions: list[str] = []
        self.words = ""
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.void:
            self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "poster", "action", "srcset"):
                self.addresses.append(value or "")
            if name == "src" and value:
                self.images.append(Image.open(page_bytes(value)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] == "figcaption":
            self.captions.append(data)


def page_bytes(uri: str) -> io.BytesIO:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return io.BytesIO(base64.b64decode(data))


def write_split(
    folder: Path, split: str, *, num: int, labels: bool, first_class: int = NUM_CLASSES - 1
) -> SplitIndex:
    """Write one shard of noise images by hand; classes count down from the first."""
    rng = np.random.default_rng(num)
    name, rows = f"{split}-000000.tar", []
    with tarfile.open(folder / name, "w") as tar:
        for i in range(num):
            picture = io.BytesIO()
            pixels = rng.integers(0, 256, (40 + 8 * i, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "JPEG")
            label_map = random_map(rng, grid=(4, 5), k=3, num_classes=NUM_CLASSES)
            fields = {"jpg": picture.getvalue(), "cls": b"%d" % (first_class - i)}
            fields |= {"tlm": encode(label_map)} if labels else {}
            rows.append([])
            for field, data in fields.items():
                info = tarfile.TarInfo(f"some folder/photo {i}.{field}".replace(" ", "%20"))
                info.size = len(data)
                rows[-1].append((info.name, tar.offset + 512, len(data)))
                tar.addfile(info, io.BytesIO(data))
    (folder / name).with_suffix(".idx").write_text(format_idx(rows))
    entry = ShardEntry(
        name=name, samples=num, bytes=(folder / name).stat().st_size, sha256="", idx_sha256=""
    )
    return SplitIndex(
        num_samples=num, has_labels=labels, seed=0, shards=[entry], labels=None,
        num_listed=num, quarantined={}, repaired={},
    )  # fmt: skip


def write_run(
    folder: Path,
    *,
    recipe: Recipe = RECIPE,
    labels: bool = True,
    val: bool = True,
    first_val_class: int = NUM_CLASSES - 1,
    checkpoint: bool = True,
    metrics: str | None = None,
) -> Path:
    """Write a data set and a run folder as tl-shard pack and tl-train run leave them."""
    data, run = folder / "shards", folder / "a_run"
    data.mkdir()
    (run / "checkpoints").mkdir(parents=True)
    splits = {"train": write_split(data, "train", num=3, labels=labels)}
    if val:
        splits["val"] = write_split(data, "val", num=2, labels=False, first_class=first_val_class)
    ids = [f"n{i}" for i in range(NUM_CLASSES)]
    write_index(
        ShardIndex(
            folder=data,
            num_classes=NUM_CLASSES,
            class_ids=ids,
            class_names=CLASS_NAMES,
            splits=splits,
        )  # fmt: skip
    )
    (run / "recipe.toml").write_text(to_toml(recipe))
    start = {"step": 0, "data": str(data), "packages": {"torch": torch.__version__}}
    (run / "environment.json").write_text(json.dumps([start]))
    lines = [
        {"kind": "train", "step": 10 * i, "loss": 9.0 - i, "class_loss": 4.0, "dense_loss": 5.0 - i,
         "lr": 1e-3, "images_per_sec": 100.0} for i in range(1, 5)
    ]  # fmt: skip
    lines.append({"kind": "eval", "step": 40, "raw_top1": 12.5, "raw_top5": 50.0, "num_images": 2})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text if metrics is None else metrics)
    if checkpoint:
        torch.manual_seed(0)
        model = create_model(recipe.model, dense=recipe.labels.dense_weight > 0)
        content = Checkpoint(
            recipe=to_toml(recipe), class_ids=ids, class_names=CLASS_NAMES, grid=model.grid,
            step=40, model=model.state_dict(),
        )  # fmt: skip
        save(content, run / "checkpoints" / "best.pt")
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(write_report(write_run(tmp_path_factory.mktemp("whole"))))


def test_the_page_asks_nothing_of_the_network(whole: Reader):
    assert whole.addresses
    assert all(address.startswith("data:") for address in whole.addresses)
    assert not whole.tags & {"script", "link", "iframe", "object", "embed"}


def test_each_photo_is_shown_with_its_map_its_crop_and_the_crops_targets(whole: Reader):
    for caption in ("Photo and crop's frame", "Label map, 4 × 5 cells", "Token targets, 2 × 2"):
        assert whole.captions.count(caption) == 3
    assert len([c for c in whole.captions if c.startswith("Training crop")]) == 3


def test_student_and_teacher_stand_side_by_side_where_there_are_maps(whole: Reader):
    assert whole.captions.count("Teacher") == 3
    assert whole.captions.count("Student") == 3 + 2
    assert "split has no label maps" in whole.words


def test_classes_are_named_and_their_names_are_not_markup(whole: Reader):
    assert "creature 9" in whole.words
    assert "<b>bold & brash</b>" in whole.words
    assert "some folder/photo 0" in whole.words


def test_a_split_of_classes_that_were_never_trained_on_says_so(tmp_path: Path, whole: Reader):
    sentence = "None of its classes has a photo in the training split"
    assert sentence not in whole.words
    run = write_run(tmp_path, first_val_class=2)
    assert sentence in Reader(write_report(run)).words


def test_results_and_facts_are_told(whole: Reader):
    assert "top-1 12.5 %" in whole.words
    assert "40 of 60 steps taken" in whole.words
    assert "a tiny run" in whole.words
    assert torch.__version__ in whole.words
    assert "embed_dim = 24" in whole.words


def test_the_frame_in_the_photo_has_the_shape_of_the_photo_and_the_crop_that_of_the_student(
    whole: Reader,
):
    sizes = [image.size for image in whole.images[:4]]
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3] == (320, 320)


def test_a_run_on_class_labels_gets_a_report_without_maps(tmp_path: Path):
    recipe = parse_recipe(to_toml(RECIPE), ["labels.dense_weight=0", "labels.class_target=label"])
    found = Reader(write_report(write_run(tmp_path, recipe=recipe, labels=False, val=False)))
    assert "class labels alone" in found.words
    assert "Teacher" not in found.captions
    assert found.captions.count("Student") == 3


@pytest.mark.parametrize("dense_weight", [1.0, 0.0])
def test_a_run_of_a_timm_model_gets_a_report(tmp_path: Path, dense_weight: float):
    changes = ["model.name=test_vit", f"labels.dense_weight={dense_weight}"]
    text = to_toml(RECIPE).partition("\n[model.kwargs]")
    recipe = parse_recipe(text[0] + text[2][text[2].index("\n[augment]") :], changes)
    run = write_run(tmp_path, recipe=recipe)
    done = CliRunner().invoke(cli.train, ["report", str(run)])
    assert (done.exit_code, done.output) == (0, f"{run / 'report.html'}\n")
    found = Reader(run / "report.html")
    assert found.captions.count("Token targets, 2 × 2") == 3
    assert found.captions.count("Student") == 3 + 2
    assert ("Its colours show its dense head" in found.words) == (dense_weight > 0)


def test_pictures_may_stand_below_all_else(tmp_path: Path):
    run, picture = write_run(tmp_path, checkpoint=False), tmp_path / "x.png"
    Image.new("RGBA", (8, 4), (0, 0, 255)).save(picture)
    done = CliRunner().invoke(cli.train, ["report", str(run), "--picture", str(picture), "a <sky>"])
    assert done.exit_code == 0, done.output
    found = Reader(run / "report.html")
    assert found.captions[-1] == "a <sky>" and found.images[-1].size == (8, 4)
    picture.write_text("no picture")
    done = CliRunner().invoke(cli.train, ["report", str(run), "--picture", str(picture), "x"])
    assert done.exit_code == 2 and "x.png" in done.output


def test_a_run_that_has_only_begun_gets_a_report(tmp_path: Path):
    found = Reader(write_report(write_run(tmp_path, checkpoint=False, metrics="")))
    assert "There is no model to show" in found.words
    assert "nothing was logged" in found.words
    assert found.captions.count("Token targets, 2 × 2") == 3


def test_a_report_can_be_written_after_the_data_set_is_gone(tmp_path: Path):
    run = write_run(tmp_path)
    (tmp_path / "shards" / "index.json").unlink()
    found = Reader(write_report(run))
    assert "The data set cannot be read" in found.words
    assert "top-1 12.5 %" in found.words
    assert not found.images


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no recipe.toml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ pieces of a page


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.94, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 7.0, [-4, -2, 0, 2, 4, 6, 8]),
        (5.0, 5.0, [5, 6, 7, 8, 9, 10]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low: float, high: float, expected: list[float]):
    np.testing.assert_allclose(page.nice_ticks(low, high), expected, atol=1e-12)


def test_any_range_gets_few_enclosing_ticks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = sorted(rng.normal(size=2) * 10.0 ** rng.integers(-6, 6))
        ticks = page.nice_ticks(float(low), float(high))
        assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high)
        assert 2 <= len(ticks) <= 8


def test_a_chart_places_its_points_between_its_axes():
    chart = page.line_chart("loss", {"a": [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]}, x_label="step")
    found = re.search(r'<polyline points="([^"]+)"', chart)
    assert found
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in found[1].split())
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1)
    assert y1 < y2 < y0  # SVG's y runs down
    assert y2 - y1 == pytest.approx(y0 - y2)


def test_numbers_that_are_not_finite_are_left_out_of_a_chart():
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    chart = page.line_chart("loss", {"a": points}, x_label="step")
    assert "nan" not in chart and "inf" not in chart
    assert len(re.findall("<circle", chart)) == 2
