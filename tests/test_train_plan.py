"""tl-train plan: what is timed, and what follows from it for the whole run."""

import json

import pytest
from click.testing import CliRunner
from loop_runs import tiny_recipe, write_data

from tokenlabel.cli import train as tl_train
from tokenlabel.trainer import plan
from tokenlabel.trainer.feed import TrainFeed
from tokenlabel.trainer.plan import in_words, measure
from tokenlabel.trainer.recipe import to_toml


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "data"
    write_data(folder)
    return folder


class Clock:
    """Time that passes only while something is done that takes some."""

    def __init__(
        self, monkeypatch, *, feed_secs: float, step_secs: float, eval_secs: float
    ) -> None:
        self.secs = 0.0
        monkeypatch.setattr(plan.time, "perf_counter", lambda: self.secs)
        self._slow_down(monkeypatch, TrainFeed, "__next__", feed_secs)
        self._slow_down(monkeypatch, plan._Step, "__call__", step_secs)
        self._slow_down(monkeypatch, plan._Step, "predict", eval_secs)

    def _slow_down(self, monkeypatch, cls: type, name: str, secs: float) -> None:
        method = getattr(cls, name)

        def slow(*args):
            self.secs += secs
            return method(*args)

        monkeypatch.setattr(cls, name, slow)


def test_hours_follow_from_the_clock_and_the_schedule(shards, monkeypatch):
    Clock(monkeypatch, feed_secs=2.0, step_secs=0.5, eval_secs=4.0)
    found = measure(
        tiny_recipe("evaluation.every=5 steps"), shards, device="cpu", num_steps=3, num_processes=2
    )
    assert (found.share, found.parts, found.total_steps) == (2, 1, 14)
    assert found.feed_images_per_sec == pytest.approx(2 / 2.0)
    assert found.step_images_per_sec == pytest.approx(2 / 0.5)
    assert found.images_per_sec == pytest.approx(2 / 2.5)
    assert found.train_hours == pytest.approx(14 * 2.5 / 3600)
    # 3 evaluations of 6 images with 2 sets of weights, shared by 2 processes, 2 s an image
    assert found.eval_hours == pytest.approx(3 * 6 * 2 / 2 * 2.0 / 3600)
    assert found.limit == "feed"
    assert in_words(found)["together"] == "0.8 images/s each, 1.6 on all 2"
    assert in_words(found)["time"].startswith("1.2 min on 2 such devices: 14 steps 35.0 s, ")
    assert "compete for the cores" in found.advice
    assert found.memory_bytes > 1e7


@pytest.mark.parametrize(
    "feed_secs, step_secs, limit", [(1.0, 1.05, "both"), (1.0, 1.2, "step"), (1.2, 1.0, "feed")]
)
def test_the_slower_one_limits_if_it_is_clearly_slower(
    shards, monkeypatch, feed_secs, step_secs, limit
):
    Clock(monkeypatch, feed_secs=feed_secs, step_secs=step_secs, eval_secs=0.1)
    found = measure(tiny_recipe(), shards, device="cpu", num_steps=1)
    assert found.limit == limit
    words = {"both": "feed and step alike", "step": "the step on the device", "feed": "the feed"}
    assert in_words(found)["limit"] == words[limit]


def test_slow_steps_are_timed_once_and_that_is_said(shards, monkeypatch):
    clock = Clock(monkeypatch, feed_secs=1.0, step_secs=70.0, eval_secs=70.0)
    found = measure(tiny_recipe(), shards, device="cpu", num_steps=8)
    assert found.num_steps_timed == 1
    assert in_words(found)["measured"].startswith("1 step of 4 images")
    assert found.images_per_sec == pytest.approx(4 / 71)
    assert clock.secs < 1000


def test_the_advice_names_what_limits():
    assert "compete for the cores" in plan.advise(1.0, 1.0, 2.0, 1, None)
    assert "more cores (run.workers)" in plan.advise(2.0, 1.0, 2.0, 1, None)
    assert plan.advise(1.0, 2.0, 2.0, 6, 10) == "the feed keeps up"
    assert "larger parts may be faster" in plan.advise(1.0, 2.0, 2.0, 4, 10)


def test_the_command_measures_here_and_prints_every_line_or_json(shards, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_recipe("run.device_batch_size=2")))
    arguments = ["plan", "--recipe", str(recipe), "--data", str(shards), "--device", "cpu"]
    done = CliRunner().invoke(tl_train, [*arguments, "--steps", "2"])
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.output.splitlines()]
    assert names == [
        "with", "measured", "feed", "step", "together", "time", "memory", "limit", "advice",
    ]  # fmt: skip
    assert "2 steps of 4 images in 2 parts, 1 workers" in done.output
    done = CliRunner().invoke(tl_train, [*arguments, "--steps", "2", "--json"])
    found = json.loads(done.output)
    assert found["images_per_sec"] > 0
    assert found["limit"] in ("feed", "step", "both")


def test_what_a_run_would_refuse_is_refused(shards):
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        measure(tiny_recipe(), shards, device="cpu", num_processes=3)
    with pytest.raises(ValueError, match="--steps 0: allowed: >= 1"):
        measure(tiny_recipe(), shards, device="cpu", num_steps=0)
