"""The training loop: what it writes and refuses, and that nothing is lost when it is killed."""

import copy
import dataclasses
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from loop_runs import KILLS, PAIR, fixed_data, tiny_recipe, write_data
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tokenlabel.cli import train as tl_train
from tokenlabel.trainer import loop, run_log
from tokenlabel.trainer.checkpoint import Checkpoint, load_model, read
from tokenlabel.trainer.dashboards import TensorBoard
from tokenlabel.trainer.data import open_data
from tokenlabel.trainer.distributed import Place, join_processes
from tokenlabel.trainer.evaluate import evaluate
from tokenlabel.trainer.feed import Batch, TrainFeed
from tokenlabel.trainer.loop import Outcome, fit, train
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.optim import Ema, make_optimizer, skip_if
from tokenlabel.trainer.recipe import Duration, EmaConfig, OptimConfig, parse_recipe
from tokenlabel.trainer.resume import ends_epoch, is_due
from tokenlabel.trainer.run_log import RunLog, read_metrics
from tokenlabel.trainer.watch import DivergedError, clock, in_short

DRAW, DRAW_CROPS = run_log.draw_curves, loop.draw_crops
HERE = Place(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """One thread, as the tensors are tiny; no pictures, as they would take most of the time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)
    monkeypatch.setattr(loop, "draw_crops", lambda *_, **options: Image.new("RGB", (8, 8)))


def run(out: Path, *overrides: str, spoil=None, num_eval: int = 0, **options) -> Outcome:
    data = fixed_data(spoil=spoil, num_eval=num_eval)
    return fit(tiny_recipe(*overrides), data, out, HERE, **options)


def last(out: Path) -> Checkpoint:
    return read(out / "checkpoints" / "last.pt")


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out) if line["kind"] == kind]


def without_timing(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("images_per_sec", "data_wait")}


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Names of all tensors of two checkpoints that are not the same to the last bit."""
    found = []
    for kind in ("model", "ema"):
        a, b = getattr(one, kind), getattr(other, kind)
        found += [f"{kind} {name}" for name in a if not torch.equal(a[name], b[name])]
    for number, state in one.optimizer["state"].items():
        theirs = other.optimizer["state"][number]
        found += [f"adam {number} {name}" for name in state if not state[name].equal(theirs[name])]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The runs of loop_runs.py: killed and resumed ones, and one on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    run_script(folder)
    return folder


def run_script(folder: Path, *arguments: str) -> str:
    script = Path(__file__).with_name("loop_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "data"
    write_data(folder)
    return folder


# -------------------------------------------------------------------------- exact resumption


@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_at_any_step_and_resumed_ends_in_the_same_bits(runs, name):
    undisturbed, resumed = last(runs / "undisturbed"), last(runs / name)
    assert undisturbed.step == resumed.step == 14
    assert differing(undisturbed, resumed) == []
    assert undisturbed.feed == resumed.feed


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_logs_every_step_once_with_the_same_numbers(runs, name):
    undisturbed, resumed = read_metrics(runs / "undisturbed"), read_metrics(runs / name)
    assert list(map(without_timing, resumed)) == list(map(without_timing, undisturbed))
    assert [line["step"] for line in lines(runs / name, "train")] == list(range(1, 15))


@pytest.mark.parametrize(
    "name",
    [
        "killed-pair",  # at random steps: the one, the other, both
        "stopped-and-resumed-pair",
        "pair-on-full-disk",
    ],
)
def test_two_processes_that_are_disturbed_and_resumed_end_in_the_same_bits(runs, name):
    assert_same_runs(runs / "pair", runs / name, num_processes=2, num_steps=13)


def assert_same_runs(one: Path, other: Path, *, num_processes: int, num_steps: int) -> None:
    a, b = last(one), last(other)
    assert a.step == b.step == num_steps
    assert differing(a, b) == []
    assert (a.feed, a.best, a.metrics) == (b.feed, b.best, b.metrics)
    assert len(a.feed) == num_processes
    assert differing(*(read(folder / "checkpoints" / "best.pt") for folder in (one, other))) == []
    records = [list(map(without_timing, read_metrics(folder))) for folder in (one, other)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_two_processes_killed_again_and_again_at_any_moment_end_in_the_same_bits(tmp_path):
    said = run_script(tmp_path, "slow")
    assert int(said.split()[0]) >= 5
    assert_same_runs(tmp_path / "pair", tmp_path / "killed-pair", num_processes=2, num_steps=62)


def test_a_process_whose_peer_has_died_or_hangs_says_so_in_one_line_and_stops(runs):
    died, hangs = ((runs / f"{name}.txt").read_text() for name in ("killed-pair", "hanging"))
    for line in (*died.splitlines(), hangs):
        assert "another one has died or not answered for" in line
        assert line.rstrip().endswith("with --resume")
    assert "not answered for 2 s" in hangs
    assert hangs.count("\n") == 1


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(runs):
    stopped = last(runs / "stopped-pair")
    assert (stopped.step, stopped.world_size) == (8, 2)
    assert "told to stop: saving at step 8 of 13" in (runs / "stopped-pair.txt").read_text()


def test_an_image_that_is_not_finite_on_one_of_two_processes_skips_the_step_on_both(runs):
    folder = runs / "one-of-two-not-finite"
    (skipped,) = lines(folder, "skipped")
    assert skipped["step"] == 3
    assert sorted(skipped["keys"]) == [f"image 2.{i}" for i in range(8)]
    found = last(folder)
    assert (found.step, found.num_skipped) == (14, 1)
    for weights in (found.model, found.ema or {}):
        assert all(value.isfinite().all() for value in weights.values())


def test_a_full_disk_stops_with_what_is_saved_and_the_run_goes_on_from_there(runs):
    message = (runs / "full-disk.txt").read_text()
    assert "File too large" in message  # what this test's limit says instead of No space left
    assert "stopped at step 6 and is saved up to step 4: --resume goes on from there" in message
    assert differing(last(runs / "undisturbed"), last(runs / "full-disk")) == []


def test_a_full_disk_stops_both_of_two_processes_with_a_line_of_each(runs):
    own, other = (runs / "pair-on-full-disk.txt").read_text().splitlines()
    assert own.startswith("[Errno 28] No space left on device while saving: ")
    assert "step-6.pt'. The run stopped at step 6 and is saved up to step 4: --resume" in own
    assert "process 1 stops: another one has died" in other


def test_shards_cut_short_under_a_run_stop_it_in_one_line_instead_of_a_bus_error(runs):
    (line,) = (runs / "lost-shards.txt").read_text().splitlines()
    assert f"a shard of {runs / 'lost-data'} was cut short" in line
    assert "The run stopped at step 5 and is saved up to step 4: --resume goes on" in line
    assert differing(last(runs / "undisturbed"), last(runs / "lost-shards")) == []


def test_killed_and_failed_runs_leave_no_temporary_files(runs):
    assert [path for path in runs.rglob("*.tmp") if path.parent.parent.parent == runs] == []


def test_a_lost_shard_stops_with_what_is_saved_and_the_run_goes_on_once_it_is_back(
    runs, shards, tmp_path, monkeypatch
):
    data, hidden = tmp_path / "data", tmp_path / "hidden"
    shutil.copytree(shards, data)
    lost = next(data.glob("**/*val*.tar"))
    deliver = TrainFeed.__next__

    def deliver_and_lose(self: TrainFeed) -> Batch:
        if self.state()["num_batches"] == 7:
            lost.rename(hidden)
        return deliver(self)

    recipe = tiny_recipe("evaluation.every=4 steps")
    monkeypatch.setattr(loop, "write_report", lambda out: out)
    monkeypatch.setattr(TrainFeed, "__next__", deliver_and_lose)
    message = rf"{lost.name}.* stopped at step 8 and is saved up to step 6: --resume goes on"
    with pytest.raises((OSError, ValueError), match=message):
        train(recipe, data=data, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr(TrainFeed, "__next__", deliver)
    hidden.rename(lost)
    train(recipe, data=data, out=tmp_path / "run", resume=True, device="cpu")
    assert differing(last(tmp_path / "run"), last(runs / "undisturbed")) == []


def test_the_comparison_of_bits_sees_a_single_one(runs):
    one, other = last(runs / "undisturbed"), last(runs / "undisturbed")
    other.model["cls_token"][0, 0, 0] += 1e-9
    assert differing(one, other) == ["model cls_token"]


def test_each_start_of_a_run_is_recorded(runs):
    starts = json.loads((runs / "in-a-later-pass" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 9]
    assert starts[0]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert starts[0]["data"] == str(runs / "data")


def test_sigterm_saves_and_stops_and_resuming_loses_nothing(tmp_path):
    def terminate(batch: Batch, number: int) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = run(tmp_path / "run", "run.checkpoint_every=100 epochs", spoil=terminate)
    assert outcome.step == 6  # the step it came in is finished, and learned of one step later
    assert signal.getsignal(signal.SIGTERM) is before
    run(tmp_path / "run", "run.checkpoint_every=100 epochs", resume=True)
    run(tmp_path / "undisturbed")
    assert differing(last(tmp_path / "run"), last(tmp_path / "undisturbed")) == []


def test_a_run_that_was_stopped_has_a_report(shards, tmp_path, monkeypatch):
    def terminate(self: TrainFeed) -> Batch:
        monkeypatch.setattr(TrainFeed, "__next__", deliver)  # the report asks for a batch, too
        os.kill(os.getpid(), signal.SIGTERM)
        return deliver(self)

    deliver = TrainFeed.__next__
    monkeypatch.setattr(TrainFeed, "__next__", terminate)
    outcome = train(tiny_recipe(), data=shards, out=tmp_path / "run", device="cpu")
    assert outcome.step < outcome.total_steps
    assert (tmp_path / "run" / "report.html").is_file()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path, num_eval=1)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    outcome = run(tmp_path, num_eval=1, resume=True)
    assert (outcome.step, outcome.total_steps) == (14, 14)
    assert outcome.metrics == last(tmp_path).metrics != {}
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    assert len(lines(tmp_path, "train")) == 14


def test_resuming_where_there_is_nothing_starts_anew(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(tmp_path / "new", resume=True).step == 14
    assert "holds no checkpoint yet: starting at step 0" in caplog.text


@pytest.mark.parametrize(
    "override, name",
    [
        ("optim.lr=5e-4", "optim.lr"),
        ("run.seed=1", "run.seed"),
        ("model.kwargs.depth=1", "model.kwargs"),
    ],
)
def test_resuming_with_another_recipe_is_refused_with_the_keys(tmp_path, override, name):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"--resume with another recipe .*: {name} changed"):
        run(tmp_path, override, resume=True)


def test_resuming_may_change_what_does_not_decide_the_result(tmp_path):
    run(tmp_path)
    run(tmp_path, "run.log_every=5 steps", "run.workers=2", "evaluation.crop_pct=1", resume=True)


def test_resuming_with_other_classes_is_refused(tmp_path):
    run(tmp_path)
    renamed = dataclasses.replace(fixed_data(), class_ids=[f"x{i}" for i in range(40)])
    with pytest.raises(ValueError, match="--resume with other classes"):
        fit(tiny_recipe(), renamed, tmp_path, HERE, resume=True)


def tear(path: Path) -> None:
    """Cut a file, under all of its names, short."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def test_a_torn_checkpoint_is_passed_over_for_the_previous_one_and_that_is_said(tmp_path, caplog):
    run(tmp_path)
    before = last(tmp_path)
    tear(tmp_path / "checkpoints" / "last.pt")
    run(tmp_path, resume=True)
    assert "passed over: " in caplog.text
    assert "last.pt is torn" in caplog.text
    assert "going on from " in caplog.text
    assert "step-12.pt, step 12, instead" in caplog.text
    assert differing(last(tmp_path), before) == []
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, 15))


def test_where_no_checkpoint_can_be_used_each_says_why(tmp_path):
    run(tmp_path)
    tear(tmp_path / "checkpoints" / "last.pt")
    (tmp_path / "checkpoints" / "step-12.pt").unlink()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "checkpoints" / "step-12.pt")
    with pytest.raises(ValueError, match="can be resumed: .*last.pt is torn.*step-12.pt is not a"):
        run(tmp_path, resume=True)


def saved_by_two(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"world_size": 2}, path)


def test_another_number_of_processes_goes_on_at_the_last_whole_epoch_and_says_so(tmp_path, caplog):
    asked = []

    def open_train(state: Any, first_pass: int) -> Any:
        asked.append((state, first_pass))
        return fixed_data().open_train(state, first_pass)

    every = "run.checkpoint_every=5 steps"
    run(tmp_path, every)
    for name in ("last", "epoch"):
        saved_by_two(tmp_path / "checkpoints" / f"{name}.pt")
    (tmp_path / "checkpoints" / "step-10.pt").unlink()
    data = dataclasses.replace(fixed_data(), open_train=open_train)
    fit(tiny_recipe(every), data, tmp_path, HERE, resume=True)
    assert "last.pt was saved by 2 processes, not 1, at step 14, in the middle of" in caplog.text
    assert "goes on with 1: from the end of epoch 2, step 10" in caplog.text
    assert asked == [(None, 2)]
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, 15))


def test_what_is_due_each_epoch_stays_at_the_ends_of_epochs_for_a_whole_run():
    steps_per_epoch = 1281167 / 1024
    every = Duration.parse("1 epochs")
    due = [step for step in range(20_100) if is_due(every, step, steps_per_epoch)]
    assert due == [round(epoch * steps_per_epoch) for epoch in range(1, 17)]
    assert due[-1] != 16 * due[0]
    assert all(ends_epoch(step, steps_per_epoch) for step in due)
    every = Duration.parse("50 steps")
    assert [step for step in range(201) if is_due(every, step, 7.3)] == [50, 100, 150, 200]
    assert is_due(Duration.parse("0.01 epochs"), 1, 2.5)  # at least a step


def test_an_evaluation_that_a_stop_has_left_out_is_made_up_for(tmp_path):
    def terminate(batch: Batch, number: int) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    every = "evaluation.every=6 steps"
    assert run(tmp_path / "run", every, spoil=terminate, num_eval=1).step == 6
    assert lines(tmp_path / "run", "eval") == []
    run(tmp_path / "run", every, num_eval=1, resume=True)
    run(tmp_path / "undisturbed", every, num_eval=1)
    assert_same_runs(tmp_path / "undisturbed", tmp_path / "run", num_processes=1, num_steps=14)


def test_a_torn_best_checkpoint_makes_the_next_evaluation_the_best(tmp_path, caplog):
    every = "evaluation.every=4 steps"
    run(tmp_path, every, "run.checkpoint_every=5 steps", num_eval=1)
    folder = tmp_path / "checkpoints"
    shutil.copyfile(folder / "step-12.pt", folder / "copy")
    for path in folder.glob("*.pt"):
        path.unlink()
    (folder / "copy").rename(folder / "last.pt")
    (folder / "best.pt").write_bytes(b"torn")
    outcome = run(tmp_path, every, "run.checkpoint_every=5 steps", num_eval=1, resume=True)
    assert "the next evaluation counts as the best" in caplog.text
    assert outcome.best is not None
    assert outcome.best["step"] == 14 == read(folder / "best.pt").step


def test_another_number_of_processes_is_refused_where_no_epoch_was_saved(tmp_path):
    run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        saved_by_two(path)
    with pytest.raises(ValueError, match="saved by 2 processes, not 1, .* start 2 again, or begin"):
        run(tmp_path, resume=True)


def test_a_run_of_two_processes_goes_on_alone_from_its_last_epoch_with_other_draws(
    runs, caplog, monkeypatch
):
    folder = runs / "alone"
    shutil.copytree(runs / "stopped-pair", folder)
    seen: list[str] = []
    deliver = TrainFeed.__next__

    def deliver_and_note(self: TrainFeed) -> Batch:
        batch = deliver(self)
        seen.extend(batch.keys)
        return batch

    monkeypatch.setattr(loop, "write_report", lambda out: out)
    monkeypatch.setattr(TrainFeed, "__next__", deliver_and_note)
    recipe = tiny_recipe("evaluation.every=4 steps", *PAIR)
    for attempt in ("from the end of an epoch", "from a checkpoint of its own"):
        train(recipe, data=runs / "data", out=folder, resume=True, device="cpu")
        feed, first = last(folder).feed[0], last(runs / "pair").feed[0]
        assert (feed["world_size"], feed["batch_size"], feed["num_batches"]) == (1, 8, 7), attempt
        assert feed["seed"] != first["seed"]
    assert "step 8, in the middle of an epoch" in caplog.text
    assert caplog.text.count("goes on with 1: from the end of epoch 2, step 6") == 1
    assert len(seen) == 7 * 8
    assert len(set(seen[:23])) == 23  # a pass begins anew, and has each image once
    rates = [[(x["step"], x["lr"]) for x in lines(f, "train")] for f in (folder, runs / "pair")]
    assert rates[0] == rates[1]


# -------------------------------------------------------------------------- many processes


@pytest.mark.parametrize(
    "name", ["two-processes", "one-process-in-parts", "two-processes-in-parts"]
)
def test_more_processes_and_parts_of_a_batch_give_the_losses_and_weights_of_one(runs, name):
    one, other = lines(runs / "one-process", "train"), lines(runs / name, "train")
    assert len(one) == len(other) == 14
    for key in ("loss", "class_loss", "dense_loss", "grad_norm"):
        found, expected = [line[key] for line in other], [line[key] for line in one]
        assert found == pytest.approx(expected, abs=1e-5)
    assert one[0]["loss"] - one[12]["loss"] > 0.01  # the same images again, and better known
    a, b = last(runs / "one-process").model, last(runs / name).model
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_two_processes_evaluate_the_model_that_is_saved(runs, weights):
    out = runs / "two-processes-with-statistics"
    model = load_model(out / "checkpoints" / "last.pt", ema=weights == "ema").model
    batches = fixed_data(num_eval=2).eval_batches
    assert batches is not None
    expected = evaluate(model, batches, HERE)["loss"]
    assert lines(out, "eval")[-1][f"{weights}_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim.batch_size = 4 cannot be shared by 3 processes"):
        place = dataclasses.replace(HERE, world_size=3)
        fit(tiny_recipe(), fixed_data(), tmp_path, place)


@pytest.mark.parametrize("device", ["cuda:99", "tpu7"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(ValueError, match=f"--device .?{device}"):
        with join_processes(device):
            pass


# ----------------------------------------------------------------------------- the run folder


def test_a_run_writes_everything_about_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "draw_curves", DRAW)
    outcome = run(tmp_path, "evaluation.every=6 steps", num_eval=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.toml", "environment.json", "metrics.jsonl", "tensorboard", "curves.png",
        "checkpoints",
    }  # fmt: skip
    recipe = parse_recipe((tmp_path / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe == tiny_recipe("evaluation.every=6 steps")
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, 15))
    evaluations = lines(tmp_path, "eval")
    assert [line["step"] for line in evaluations] == [6, 12, 14]
    assert evaluations[-1]["num_images"] == 8
    assert outcome.metrics["ema_loss"] == evaluations[-1]["ema_loss"]
    train_line = lines(tmp_path, "train")[1]
    assert train_line["loss"] == pytest.approx(
        train_line["class_loss"] + train_line["dense_loss"], rel=1e-5
    )
    assert train_line["epoch"] == pytest.approx(2 / 5)
    assert train_line["images_per_sec"] > 0
    assert 0 <= train_line["data_wait"] <= 1
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 200


def test_tensorboard_holds_the_numbers_of_the_metrics_file(tmp_path):
    run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    expected = lines(tmp_path, "train")
    assert [event.step for event in scalars] == [line["step"] for line in expected]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in expected])


def test_tensorboard_shows_crops_and_targets_at_the_start_and_after_each_epoch(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "draw_crops", DRAW_CROPS)
    run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    sheets = events.Images("crops")
    assert [sheet.step for sheet in sheets] == [1, 5, 10]  # an epoch is 5 steps
    assert min(sheets[0].width, sheets[0].height) > 600


def test_tensorboard_shows_each_step_of_a_killed_run_once(runs):
    events = EventAccumulator(str(runs / "in-a-later-pass" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    expected = lines(runs / "undisturbed", "train")
    assert [event.step for event in scalars] == [line["step"] for line in expected]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in expected])


def test_a_full_disk_under_tensorboard_is_an_error_of_the_run_without_a_traceback(
    tmp_path, monkeypatch
):
    printed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    noise = Image.effect_noise((80, 80), 100)
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            with RunLog(tmp_path, dashboards=[TensorBoard(tmp_path / "tensorboard")]) as records:
                for step in range(20):
                    records.show("crops", step, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert printed == []
    assert threading.excepthook == printed.append


def test_the_progress_line_has_loss_rate_speed_wait_and_memory():
    values = {"loss": 6.9077, "lr": 1.6e-3, "images_per_sec": 1234.5, "data_wait": 0.034}
    assert in_short(values) == "loss 6.908, lr 0.0016, 1234 images/s, data wait 3%"
    assert in_short(values | {"gpu_memory_gb": 31.46}).endswith("data wait 3%, 31.5 GB")
    assert clock(93_784.4) == "26:03:04"


class FakeWandb(ModuleType):
    """What the wandb package does, written down instead of sent."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.exit_codes: list[int] = []
        self.problem: str | None = None

    def init(self, **options: Any) -> "FakeWandb":
        if self.problem:
            raise self.Error(self.problem)
        (Path(options["dir"]) / "wandb").mkdir(exist_ok=True)
        self.begun.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)

    def Image(self, picture: Image.Image) -> tuple[int, int]:  # noqa: N802 (wandb's name)
        return picture.size


@pytest.fixture
def fake_wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_given_what_tensorboard_shows(tmp_path, fake_wandb):
    run(tmp_path, "evaluation.every=6 steps", num_eval=1, wandb="photos")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    pictures = {("crops", event.step) for event in events.Images("crops")}
    logged = {
        (name, values["step"]): value
        for values in fake_wandb.logged
        for name, value in values.items()
        if name != "step"
    }
    assert logged.keys() == shown.keys() | pictures
    assert all(logged[place] == pytest.approx(value) for place, value in shown.items())
    assert fake_wandb.axes[-1] == ("*", "step")
    assert fake_wandb.begun[0]["project"] == "photos"
    assert fake_wandb.begun[0]["config"]["model"]["name"] == "lvvit_t"
    assert fake_wandb.exit_codes == [0]


def test_resuming_goes_on_with_the_same_run_of_wandb_and_a_new_run_gets_another(
    tmp_path, fake_wandb
):
    short = "schedule.duration=2 steps"
    run(tmp_path, short, wandb="photos")
    run(tmp_path, short, wandb="photos", resume=True)
    run(tmp_path, short, wandb="photos", overwrite=True)
    first, second, third = (begun["id"] for begun in fake_wandb.begun)
    assert first == second != third
    assert {begun["resume"] for begun in fake_wandb.begun} == {"allow"}


def test_wandb_learns_that_a_run_has_failed(tmp_path, fake_wandb):
    with pytest.raises(DivergedError):
        run(tmp_path, "schedule.duration=30 steps", spoil=poison(*range(60)), wandb="photos")
    assert fake_wandb.exit_codes == [1]


def test_wandb_that_cannot_begin_is_one_clear_error(tmp_path, fake_wandb):
    fake_wandb.problem = "no API key configured"
    with pytest.raises(ValueError, match="--wandb cannot begin: no API key .*WANDB_MODE=offline"):
        run(tmp_path, wandb="photos")


@pytest.mark.parametrize("option", [["--wandb"], ["--wandb", "photos"]])
def test_without_the_package_wandb_the_command_says_how_to_get_it(
    tmp_path, monkeypatch, shards, option
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["run", "--recipe", "demo", "--data", str(shards), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(tl_train, [*arguments, *option])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "train run: --wandb needs the package wandb, which is not installed: "
        "pip install 'tokenlabel[wandb]'"
    )
    assert not (tmp_path / "run").exists()


def test_the_command_passes_on_project_and_patience(tmp_path, monkeypatch, shards):
    asked: list[dict[str, Any]] = []

    def note(recipe: Any, **options: Any) -> Outcome:
        asked.append(options)
        return Outcome(step=0, total_steps=1, metrics={}, best=None, is_main=False)

    monkeypatch.setattr(loop, "train", note)
    arguments = ["run", "--recipe", "demo", "--data", str(shards), "--out", str(tmp_path / "run")]
    for more in ([], ["--wandb"], ["--wandb", "photos", "--timeout-secs", "30"]):
        assert CliRunner().invoke(tl_train, [*arguments, *more]).exit_code == 0
    found = [(options["wandb"], options["timeout"].total_seconds()) for options in asked]
    assert found == [(None, 600), ("tokenlabel", 600), ("photos", 30)]


def test_the_line_of_many_steps_is_their_mean(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "many", "run.log_every=7 steps", "run.checkpoint_every=7 steps")
    each = [line["loss"] for line in lines(tmp_path / "one", "train")]
    means = [line["loss"] for line in lines(tmp_path / "many", "train")]
    assert means == pytest.approx([sum(each[:7]) / 7, sum(each[7:]) / 7], rel=1e-5)


def test_a_folder_in_the_way_is_refused_naming_the_ways_out(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match="not empty; --resume goes on .* --overwrite deletes"):
        run(tmp_path)
    with pytest.raises(ValueError, match="give only one"):
        run(tmp_path, resume=True, overwrite=True)


def test_a_mistake_in_the_recipe_or_the_weights_leaves_no_folder_behind(tmp_path):
    for overrides, init, message in [
        (["model.image_size=100"], None, "multiples of 16"),
        (["schedule.duration=1 steps"], None, "schedule.warmup"),
        ([], tmp_path / "nowhere.pt", "does not exist"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            run(tmp_path / "run", *overrides, init=init)
        assert not (tmp_path / "run").exists()


def test_overwriting_deletes_the_old_run_but_never_foreign_files(tmp_path):
    run(tmp_path)
    run(tmp_path, "schedule.duration=3 steps", overwrite=True)
    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert last(tmp_path).step == 5
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="it holds thesis.tex, which no run has written"):
        run(tmp_path, overwrite=True)
    assert last(tmp_path).step == 5


def test_a_run_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


def test_a_metrics_file_torn_by_a_kill_is_mended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr'
    )
    RunLog(tmp_path, step=1).close()
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]


def test_curves_of_a_run_without_evaluation_say_so_instead_of_failing(tmp_path):
    DRAW([{"kind": "train", "step": 1, "loss": None, "lr": 0.1}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


# -------------------------------------------------------------------------- what is computed


def test_the_loop_computes_what_a_plain_loop_does(tmp_path):
    overrides = ("model.drop_path=0", "model.mix_token=false", "labels.class_target=label")
    recipe = tiny_recipe(*overrides, "labels.dense_weight=0", "schedule.duration=4 steps")
    fit(recipe, fixed_data(), tmp_path, HERE)

    torch.manual_seed(recipe.run.seed)
    model: Any = create_model(recipe.model).train()
    parameters = list(model.named_parameters())
    decayed = [p for name, p in parameters if p.ndim > 1 and name not in NOT_DECAYED]
    others = [p for name, p in parameters if p.ndim <= 1 or name in NOT_DECAYED]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    )
    feed = fixed_data().open_train(None, 0)
    top, floor = 1e-3, 1e-5
    warmup = [1e-6, (1e-6 + top) / 2]
    cosine = [floor + (top - floor) * (1 + math.cos(math.pi * step / 4)) / 2 for step in (2, 3)]
    for lr in [*warmup, *cosine, floor, floor]:
        batch = next(feed)
        loss = nn.functional.cross_entropy(
            model(batch.images)[0], batch.classes, label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, value in model.state_dict().items():
        if not name.startswith("aux_head"):  # not taught, and silenced
            torch.testing.assert_close(
                last(tmp_path).model[name], value, rtol=1e-4, atol=1e-6, msg=name
            )


NOT_DECAYED = ("pos_embed", "cls_token")


def test_weight_decay_spares_vectors_position_embeddings_and_the_class_token():
    model = create_model(tiny_recipe().model)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(decays) == set(dict(model.named_parameters()))
    spared = {name for name, decay in decays.items() if decay == 0}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "patch_embed.bn1.bias"} <= spared
    assert all(name.endswith("weight") for name in set(decays) - spared)
    assert "patch_embed.conv1.weight" not in spared


def test_a_bad_step_is_left_out_by_the_optimizer_on_the_device():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.ones(1, 2)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    skip_if(optimizer, torch.tensor(1.0))
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    skip_if(optimizer, torch.tensor(0.0))
    optimizer.step()
    assert not torch.equal(before["weight"], model.weight)


def test_the_average_follows_the_weights_after_its_warmup():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    ema = Ema(model, EmaConfig(decay=0.9))
    expected = copy.deepcopy(model.state_dict())
    for step in range(200):
        for value in model.state_dict().values():
            value.copy_(value + 1)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in ema.model.state_dict().items():
        wanted = expected[name] if value.is_floating_point() else model.state_dict()[name]
        torch.testing.assert_close(value, wanted, msg=name)


def test_without_an_average_only_raw_weights_are_evaluated(tmp_path):
    outcome = run(tmp_path, "ema.decay=0", num_eval=1)
    assert "raw_top1" in outcome.metrics
    assert "ema_top1" not in outcome.metrics
    assert last(tmp_path).ema is None


def test_best_says_which_weights_it_means(tmp_path):
    outcome = run(tmp_path, "evaluation.every=2 steps", num_eval=1)
    best = outcome.best
    assert best is not None
    evaluations = {line["step"]: line for line in lines(tmp_path, "eval")}
    assert best["top1"] == evaluations[best["step"]][f"{best['weights']}_top1"]
    assert best["top1"] == max(
        max(line["raw_top1"], line["ema_top1"]) for line in evaluations.values()
    )
    assert read(tmp_path / "checkpoints" / "best.pt").step == best["step"]


def test_gradient_clipping_and_bf16_change_the_run_but_not_its_health(tmp_path):
    run(tmp_path / "plain")
    for override in ("optim.clip_grad=1e-3", "run.precision=bf16", "model.mix_token=false"):
        run(tmp_path / override, override)
        assert all(line["loss"] < 20 for line in lines(tmp_path / override, "train"))
        assert differing(last(tmp_path / "plain"), last(tmp_path / override)) != []


def test_a_dense_head_that_is_not_taught_says_nothing(tmp_path):
    run(tmp_path, "labels.dense_weight=0", "labels.class_target=label")
    found = last(tmp_path).model
    assert not found["aux_head.weight"].any()
    assert not found["aux_head.bias"].any()
    assert {line["dense_loss"] for line in lines(tmp_path, "train")} == {0.0}


@pytest.mark.slow
def test_compiled_training_computes_the_same(tmp_path):
    run(tmp_path / "plain", "model.drop_path=0")
    run(tmp_path / "compiled", "model.drop_path=0", "run.compile=on")
    plain, compiled = (lines(tmp_path / name, "train") for name in ("plain", "compiled"))
    assert [line["loss"] for line in compiled] == pytest.approx(
        [line["loss"] for line in plain], abs=1e-4
    )


# --------------------------------------------------------------------------- initial weights


def test_init_takes_the_weights_of_a_checkpoint_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path / "first")
    start = tmp_path / "first" / "checkpoints" / "last.pt"
    still = ("optim.lr=1e-12", "schedule.warmup_lr=0", "schedule.min_lr=0", "ema.decay=0")
    for ema, kind in ((True, "ema"), (False, "model")):
        out = tmp_path / f"second-{kind}"
        run(out, *still, init=start, init_ema=ema)
        source = getattr(read(start), kind)
        for name, value in last(out).model.items():
            if "bn" not in name:  # running statistics move without any learning rate
                torch.testing.assert_close(value, source[name], rtol=0, atol=1e-9, msg=name)
    assert "last.pt: ema weights loaded; all fit" in caplog.text


def test_init_with_other_classes_gives_new_heads(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    other = create_model(tiny_recipe("model.num_classes=7", "model.image_size=32").model)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    run(tmp_path / "run", init=tmp_path / "other.pth")
    assert "pos_embed resized; head.weight, head.bias, aux_head.weight" in caplog.text


# ------------------------------------------------------------------------- non-finite steps


def poison(*numbers: int):
    def spoil(batch: Batch, number: int) -> None:
        if number in numbers:
            batch.images[1, :, 5, 5] = torch.nan

    return spoil


def test_a_step_that_is_not_finite_changes_nothing_and_is_logged_with_its_keys(tmp_path, caplog):
    run(tmp_path / "short", "run.checkpoint_every=4 steps", "schedule.duration=2 steps")
    run(tmp_path / "run", "run.checkpoint_every=4 steps", spoil=poison(4, 9))
    skipped = lines(tmp_path / "run", "skipped")
    assert [(line["step"], line["keys"][1]) for line in skipped] == [
        (4, "image 3.1"),
        (9, "image 8.1"),
    ]
    assert "step 4 skipped: its loss or gradient is not finite; images image 3.0" in caplog.text
    final = last(tmp_path / "run")
    assert final.num_skipped == 2
    assert lines(tmp_path / "run", "train")[-1]["num_skipped"] == 2
    for weights in (final.model, final.ema or {}):
        assert all(value.isfinite().all() for value in weights.values())
    assert lines(tmp_path / "run", "train")[3]["loss"] is None  # the mean over no step


def test_weights_average_and_adams_state_after_a_skipped_step_are_those_before(tmp_path):
    every = "run.checkpoint_every=1 steps"

    def stop(batch: Batch, number: int) -> None:
        poison(6)(batch, number)
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path, every, spoil=stop)
    after, before = last(tmp_path), read(tmp_path / "checkpoints" / "step-5.pt")
    assert (before.step, before.num_skipped, after.step, after.num_skipped) == (5, 0, 6, 1)
    assert differing(before, after) == []


def test_a_run_that_is_never_finite_stops_with_advice(tmp_path):
    every = ("run.checkpoint_every=100 epochs", "run.log_every=100 epochs")
    with pytest.raises(DivergedError, match="last 20 steps, up to step 23, .* lower optim.lr"):
        run(tmp_path, "schedule.duration=50 steps", *every, spoil=poison(*range(4, 60)))


# ------------------------------------------------------------------------------ real shards


def test_data_and_recipe_that_do_not_fit_are_refused_before_anything_is_written(shards, tmp_path):
    cases = [
        (["model.num_classes=39"], {}, "has 40 classes, the recipe's model 39.*num_classes=40"),
        ([], {"split": "val"}, "split 'val' of .* has no label maps.*labels.dense_weight=0"),
        ([], {"split": "test"}, "no split 'test'"),
        ([], {"val_split": "test"}, "no split 'test'"),
    ]
    for overrides, options, message in cases:
        with pytest.raises(ValueError, match=message):
            train(tiny_recipe(*overrides), data=shards, out=tmp_path / "run", **options)
    with pytest.raises(FileNotFoundError, match="no index.json"):
        train(tiny_recipe(), data=tmp_path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_label_maps_over_other_classes_than_the_model_are_refused_with_both_numbers(tmp_path):
    write_data(tmp_path / "data")
    path = tmp_path / "data" / "index.json"
    text = path.read_text().replace('"labels": null', '"labels": {"num_classes": 1000}', 1)
    path.write_text(text)
    with pytest.raises(ValueError, match="over 1000 classes, the recipe's model has 40"):
        open_data(tiny_recipe(), tmp_path / "data", HERE)


def test_a_recipe_without_label_maps_trains_on_shards_without_them(shards, tmp_path):
    recipe = tiny_recipe(
        "labels.dense_weight=0", "labels.class_target=label", "schedule.duration=2 steps"
    )
    outcome = train(recipe, data=shards, out=tmp_path / "run", split="val", device="cpu")
    assert outcome.metrics["num_images"] == 6
    assert (tmp_path / "run" / "report.html").is_file()
