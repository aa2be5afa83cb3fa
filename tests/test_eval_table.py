"""Many checkpoints × many sets: each cell as if alone, none twice, failures named."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from shard_sets import jpeg, noise

from tokenlabel.cli import evaluate as tl_eval
from tokenlabel.evaluator import table
from tokenlabel.evaluator.metrics import measure
from tokenlabel.evaluator.predict import PredictConfig, predict
from tokenlabel.evaluator.table import (
    Cell,
    CheckpointRow,
    CommonOptions,
    DataColumn,
    Plan,
    evaluate_many,
    read_plan,
    simple_plan,
    to_markdown,
)
from tokenlabel.trainer.distributed import Place

ALONE = Place(device=torch.device("cpu"))
OPTIONS: dict[str, Any] = {"model": "test_resnet", "image_size": 32, "num_workers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, a.pt and b.pt, and two sets of three classes, x and y."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / name)
    rng = np.random.default_rng(0)
    for name, num_images in (("x", 7), ("y", 4)):
        for i in range(num_images):
            path = folder / name / f"class{i % 3}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(noise(rng, 40, 40)))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (checkpoint, data) that a model really looks at."""
    calls: list[tuple[str, str]] = []

    def count(checkpoint: Any, data: Any, *others: Any) -> Any:
        calls.append((Path(str(checkpoint)).name, Path(data).name))
        return predict(checkpoint, data, *others)

    monkeypatch.setattr(table, "predict", count)
    return calls


def plan_of(made: Path, checkpoints: str = "ab", data: str = "xy", **options: Any) -> Plan:
    return simple_plan(
        [str(made / f"{name}.pt") for name in checkpoints],
        [str(made / name) for name in data],
        **OPTIONS | options,
    )


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(tl_eval, ["table", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


# ---------------------------------------------------------------------------------------- cells


def test_each_cell_is_what_the_pair_gives_alone(made, tmp_path):
    cells = evaluate_many(plan_of(made), tmp_path, ALONE)
    pairs = [(Path(cell.checkpoint).name, Path(cell.data).name) for cell in cells]
    assert pairs == [("a.pt", "x"), ("a.pt", "y"), ("b.pt", "x"), ("b.pt", "y")]
    for cell in cells:
        alone = predict(cell.checkpoint, cell.data, PredictConfig(**OPTIONS), ALONE)
        assert cell.found is not None and cell.found == measure(alone)
        assert cell.found.num_images == {"x": 7, "y": 4}[Path(cell.data).name]


def test_finished_cells_are_not_computed_again(made, tmp_path, asked):
    first = evaluate_many(plan_of(made, "a"), tmp_path, ALONE)
    assert asked == [("a.pt", "x"), ("a.pt", "y")]
    again = evaluate_many(plan_of(made, "ba", "yx", batch_size=2), tmp_path, ALONE)
    assert asked[2:] == [("b.pt", "y"), ("b.pt", "x")]
    assert [cell.found for cell in again[2:]] == [cell.found for cell in first[::-1]]


def test_a_job_that_was_killed_goes_on_where_it_stopped(made, tmp_path, asked, monkeypatch):
    whole = evaluate_many(plan_of(made), tmp_path / "whole", ALONE)
    asked.clear()
    write = table.write_tables

    def stop(cells: list[Cell], out: Path) -> None:
        write(cells, out)
        if sum(cell.found is not None for cell in cells) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(table, "write_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_many(plan_of(made), tmp_path / "killed", ALONE)
    text = (tmp_path / "killed" / "table.md").read_text()
    assert text.count("not yet") == 2
    monkeypatch.setattr(table, "write_tables", write)
    resumed = evaluate_many(plan_of(made), tmp_path / "killed", ALONE)
    assert len(asked) == 4
    assert [cell.found for cell in resumed] == [cell.found for cell in whole]


def touch_photo(folder: Path) -> dict[str, Any]:
    photo = folder / "x" / "class0" / "0.jpg"
    os.utime(photo, (1, 1))
    return {}


def move_photo(folder: Path) -> dict[str, Any]:
    (folder / "x" / "class0" / "0.jpg").rename(folder / "x" / "class1" / "0.jpg")
    return {}


def change_weights(folder: Path) -> dict[str, Any]:
    shutil.copy(folder / "b.pt", folder / "a.pt")
    return {}


def set_option(name: str, value: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {name: value}


@pytest.mark.parametrize(
    "change",
    [
        touch_photo,
        move_photo,
        change_weights,
        set_option("image_size", 48),
        set_option("crop_pct", 0.5),
        set_option("flip", True),
        set_option("precision", "bf16"),
    ],
)
def test_whatever_changes_answers_makes_a_cell_new(made, tmp_path, asked, change):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder, copy_function=shutil.copy2)
    evaluate_many(plan_of(folder, "a", "x"), tmp_path / "out", ALONE)
    evaluate_many(plan_of(folder, "a", "x", **change(folder)), tmp_path / "out", ALONE)
    assert len(asked) == 2


def test_a_data_set_that_was_moved_with_its_dates_keeps_its_cells(made, tmp_path, asked):
    evaluate_many(plan_of(made, "a", "x"), tmp_path / "out", ALONE)
    shutil.copytree(made, tmp_path / "moved", copy_function=shutil.copy2)
    evaluate_many(plan_of(tmp_path / "moved", "a", "x"), tmp_path / "out", ALONE)
    assert len(asked) == 1


def test_a_damaged_cell_is_made_again(made, tmp_path, asked, caplog):
    evaluate_many(plan_of(made, "a", "x"), tmp_path, ALONE)
    (path,) = (tmp_path / "cells").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    (cell,) = evaluate_many(plan_of(made, "a", "x"), tmp_path, ALONE)
    assert len(asked) == 2 and cell.found is not None
    assert "it is made again" in caplog.text


# ------------------------------------------------------------------------------------- failures


def test_a_failing_cell_is_named_and_the_others_go_on(made, tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes((made / "a.pt").read_bytes()[:1000])
    wide = tmp_path / "wide"
    for i in range(5):
        (wide / f"class{i}").mkdir(parents=True)
        (wide / f"class{i}" / "0.jpg").write_bytes(jpeg(noise(np.random.default_rng(i))))
    arguments = ["--checkpoint", torn, "--checkpoint", made / "a.pt", "--data", wide]
    arguments += ["--data", made / "x", "--data", tmp_path / "none", "--out", tmp_path / "out"]
    code, markdown, errors = run(*arguments, "--model", "test_resnet", "--image-size", 32)
    assert code == 1 and "tl-eval table: 5 of 6 cells failed" in errors
    cells = json.loads((tmp_path / "out" / "table.json").read_text())
    reasons = [cell["problem"] for cell in cells]
    assert "torn.pt" in reasons[0] and "torn.pt" in reasons[1]
    assert "has 5 classes, the model 3" in reasons[3]
    assert reasons[4] is None and cells[4]["num_images"] == 7
    assert f"{tmp_path / 'none'}" in reasons[5]
    assert f"- {made / 'a.pt'} on {wide}: {reasons[3]}" in markdown
    assert markdown.splitlines()[3].count("failed") == 2


@pytest.mark.parametrize("allowed", [True, False])
def test_unreadable_images_are_counted_and_fail_unless_allowed(made, tmp_path, allowed):
    shutil.copytree(made / "y", tmp_path / "y")
    (tmp_path / "y" / "class0" / "torn.jpg").write_bytes(b"no image")
    arguments = ["--checkpoint", made / "a.pt", "--data", tmp_path / "y", "--out", tmp_path / "out"]
    arguments += ["--model", "test_resnet", "--image-size", 32]
    code, markdown, _ = run(*arguments, *["--allow-corrupt"] * allowed)
    assert code == (0 if allowed else 1)
    assert markdown.endswith("1 image could not be read\n")


# ---------------------------------------------------------------------------------------- tables


def test_the_three_tables_say_the_same(made, tmp_path):
    cells = evaluate_many(plan_of(made), tmp_path, ALONE)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    content = json.loads((tmp_path / "table.json").read_text())
    for cell, line, plain in zip(cells, lines, content, strict=True):
        assert cell.found is not None
        head = cell.found.heads["model"]
        assert (line["checkpoint"], line["data"]) == (cell.checkpoint, cell.data)
        assert float(line["loss"]) == pytest.approx(head.loss.value, rel=1e-5)
        assert float(line["top1_high"]) == pytest.approx(head.top1.high, rel=1e-5)
        assert plain["heads"]["model"]["ece"] == head.ece.value
        assert plain["facts"]["model"] == "test_resnet"
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:4]]
    shown = [float(text.strip("|* ").split(" [")[0]) for row in rows for text in row[1:]]
    expected = [cell.found.heads["model"].top1.value for cell in cells if cell.found]
    assert shown == pytest.approx(expected, abs=0.005)


def test_the_best_of_each_column_stands_out_and_bars_are_escaped(made, tmp_path):
    (found,) = evaluate_many(plan_of(made, "a", "x"), tmp_path, ALONE)
    cells = [
        Cell(checkpoint="a|b", data="x", found=found.found, facts=found.facts),
        Cell(checkpoint="c", data="x", problem="out | of luck"),
        Cell(checkpoint="d", data="x"),
    ]
    assert "**" not in to_markdown(cells)
    lines = to_markdown([*cells, Cell(checkpoint="e", data="x", found=found.found)]).splitlines()
    assert lines[2].startswith("| a\\|b | **") and lines[5].startswith("| e | **")
    assert lines[3:5] == ["| c | failed |", "| d | not yet |"]
    assert lines[-1] == "- c on x: out | of luck"


# ---------------------------------------------------------------------------------------- plans


PLAN = """
[[checkpoint]]
name = "theirs"
checkpoint = "resnet50.pt"
model = "resnet50"
crop_pct = 1
[[checkpoint]]
checkpoint = "ours.pt"
ema = false
[[data]]
data = "shards"
split = "test"
[[data]]
data = "imagenet-r"
subset = "imagenet-r"
[options]
precision = "bf16"
flip = true
"""


def test_a_plan_gives_rows_and_columns_options_of_their_own(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = read_plan(tmp_path / "plan.toml")
    assert plan == Plan(
        checkpoints=(
            CheckpointRow(name="theirs", checkpoint="resnet50.pt", model="resnet50", crop_pct=1.0),
            CheckpointRow(checkpoint="ours.pt", ema=False),
        ),
        data=(
            DataColumn(data="shards", split="test"),
            DataColumn(data="imagenet-r", subset="imagenet-r"),
        ),
        options=CommonOptions(precision="bf16", flip=True),
    )
    assert [row.title for row in plan.checkpoints] == ["theirs", "ours.pt"]
    assert [column.title for column in plan.data] == ["shards test", "imagenet-r"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[options]", "[option]", "unknown key 'option'; a plan has"),
        ("crop_pct", "crop_pc", "unknown key 'checkpoint.crop_pc' .did you mean 'crop_pct'"),
        ("crop_pct = 1", 'crop_pct = "all"', "checkpoint.crop_pct = 'all' is not a number"),
        ('precision = "bf16"', 'precision = "fp8"', "options.precision = 'fp8'; allowed: 'fp32'"),
        ('data = "shards"', "", "a .*data.* has no data = FOLDER"),
        ("[[data]]", "[[data", "is not valid TOML"),
        ('checkpoint = "ours.pt"', 'name = "theirs"', "checkpoint 'theirs' stands in the table tw"),
        ('checkpoint = "ours.pt"', "", "needs checkpoint = or model ="),
        (PLAN, '[[data]]\ndata = "x"', "has no checkpoint; give --checkpoint"),
        (PLAN, 'checkpoint = "a.pt"', "checkpoint is no list of tables"),
    ],
)
def test_mistakes_in_a_plan_are_named(tmp_path, old, new, message):
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.toml")


def test_options_beside_a_plan_are_refused(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    code, _, errors = run(tmp_path / "plan.toml", "--out", tmp_path / "out", "--flip")
    assert code == 2 and "--flip stands beside" in errors
    assert not (tmp_path / "out").exists()


def test_a_plan_is_carried_out(made, tmp_path):
    plan = f"""
        [[checkpoint]]
        name = "small"
        checkpoint = "{made / "a.pt"}"
        model = "test_resnet"
        image_size = 32
        [[checkpoint]]
        name = "large"
        checkpoint = "{made / "a.pt"}"
        model = "test_resnet"
        image_size = 64
        [[data]]
        data = "{made / "y"}"
    """
    (tmp_path / "plan.toml").write_text(plan)
    code, markdown, _ = run(tmp_path / "plan.toml", "--out", tmp_path / "out")
    assert code == 0 and markdown == (tmp_path / "out" / "table.md").read_text()
    cells = json.loads((tmp_path / "out" / "table.json").read_text())
    sizes = [cell["facts"]["view"]["image_size"] for cell in cells]
    assert sizes == [[32, 32], [64, 64]]
