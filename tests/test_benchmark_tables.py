"""What benchmarks/ adds to its scripts: tables of goals and numbers, made-up indices."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def table() -> ModuleType:
    return importlib.import_module("table")


@pytest.fixture
def run() -> ModuleType:
    return importlib.import_module("run")


def loss_result(folder: Path, *, times_faster: float) -> None:
    machine = {"date": "2026-01-02", "processor": "Slide rule", "cores": 3, "gpu": None}
    machine |= {"python": "3.11.0", "torch": "2.6.0"}
    rows = [
        {"batch": batch, "times_faster": times_faster, "memory": 0.2, "sparse_ms": 4.0}
        for batch in (16, 64)
    ]
    (folder / "loss.json").write_text(json.dumps({"machine": machine, "rows": rows}))


def test_a_goal_that_is_missed_is_marked_and_one_that_is_met_is_not(table, tmp_path: Path):
    loss_result(tmp_path, times_faster=4.0)
    lines = table.speed(table.read_results(tmp_path)).splitlines()
    assert "Measured on: Slide rule, 3 cores, Python 3.11.0, torch 2.6.0." in lines
    (small,) = (line for line in lines if "loss, batch 16" in line)
    (large,) = (line for line in lines if "batch 64" in line)
    assert small.endswith("| ≥ 3 × | 4.00 × | `loss.py` | 2026-01-02 |")
    assert large.endswith("| ≥ 5 × | **4.00 ×, missed** | `loss.py` | 2026-01-02 |")


def test_what_was_not_measured_is_said_to_be(table, tmp_path: Path):
    loss_result(tmp_path, times_faster=9.0)
    results = table.read_results(tmp_path)
    (line,) = (line for line in table.speed(results).splitlines() if "tl-eval --help" in line)
    assert "| ≤ 0.3 s | not measured |" in line
    short = table.speed_in_short(results)
    assert "against dense ones: 9.00 × (goal ≥ 5 ×; `loss.py`)" in " ".join(short.split())
    assert len(re.findall("^- ", short, re.MULTILINE)) == 5


def test_a_result_without_the_number_is_an_error_that_names_it(table, tmp_path: Path):
    loss_result(tmp_path, times_faster=9.0)
    path = tmp_path / "loss.json"
    path.write_text(path.read_text().replace('"batch": 64', '"batch": 65'))
    with pytest.raises(LookupError, match=r"loss\.json: token targets.*0 rows with {'batch': 64}"):
        table.speed(table.read_results(tmp_path))


def test_only_what_stands_between_the_marks_is_replaced(table):
    page = "before\n<!-- BEGIN speed -->\nold\n<!-- END speed -->\nafter\n"
    new = table.replaced(page, "speed", r"new \1")
    assert new == page.replace("old", r"new \1")
    with pytest.raises(ValueError, match="expected <!-- BEGIN speed --> … <!-- END speed --> once"):
        table.replaced("nothing\n", "speed", "new")


def test_the_pages_say_what_the_results_say(table):
    for path, text in table.rewritten(table.read_results(table.RESULTS)).items():
        assert path.read_text(encoding="utf-8") == text, "run python benchmarks/table.py"


def test_make_bench_all_runs_every_benchmark(run):
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert scripts - {script.name for script in run.SCRIPTS} <= {
        "alignment_picture", "run", "scenes", "table",
    }  # fmt: skip


def test_a_script_that_cannot_run_says_what_it_lacks(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = run.Script("loss", ("no_such_module", "json.no_such_part"))
    expected = "needs no_such_module, json.no_such_part, not installed here"
    assert run.obstacle(script, on_gpu=False) == expected
    assert run.obstacle(run.Script("loss"), on_gpu=True) == "torch finds no GPU here"
    assert run.obstacle(run.Script("loss"), on_gpu=False) is None


def test_made_up_indices_are_read_like_real_ones(tmp_path: Path):
    scale = importlib.import_module("scale")
    scale.build(tmp_path / "few", 25)
    labels, source, order = scale.plan_packing(tmp_path / "few")
    assert sorted(labels.keys) == [sample.key for sample in source.samples]
    assert len(order) == len(set(order)) == 25
    index, paths = scale.open_index(tmp_path / "few")
    assert index.split("train").num_samples == 25
    assert [path.stat().st_size for path in paths] == [
        s.bytes for s in index.splits["train"].shards
    ]
    reader = scale.open_reader(tmp_path / "few")
    (meta,) = reader.reader_meta().values()
    assert meta["epoch_size"] == 25
