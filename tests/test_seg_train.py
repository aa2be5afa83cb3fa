"""Training of segmentation models: exact resume, published rules, guards, records."""

import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from seg_sets import TINY, tiny_recipe, write_shards

from tokenlabel.cli import segment as tl_seg
from tokenlabel.segmenter import train as job
from tokenlabel.segmenter.feed import SegTrainFeed
from tokenlabel.segmenter.recipe import RECIPE_FOLDER, SegRecipe, SegSchedule, load_recipe
from tokenlabel.segmenter.train import train
from tokenlabel.segmenter.uper_net import create_model
from tokenlabel.segmenter.weights import load_model
from tokenlabel.trainer import run_log
from tokenlabel.trainer.checkpoint import Checkpoint, read, save
from tokenlabel.trainer.loop import Outcome
from tokenlabel.trainer.models import create_model as create_classifier
from tokenlabel.trainer.recipe import ModelConfig, parse_recipe, parse_record, recipe_names, to_toml


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), num_train=10, num_val=3)


@pytest.fixture(autouse=True)
def _one_thread_and_no_curves(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)
    monkeypatch.setattr(run_log, "write_environment", _write_no_versions)


def _write_no_versions(out: Path, *, step: int, about: dict[str, Any]) -> None:
    (out / "environment.json").write_text(json.dumps([about | {"step": step}]), encoding="utf-8")


def run(data: Path, out: Path, *overrides: str, **options: Any) -> Outcome:
    return train(tiny_recipe(*overrides), data=data, out=out, device="cpu", **options)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    run(data, out)
    return out


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else []
    return {k: t for key, item in items for k, t in tensors(item, f"{name}.{key}").items()}


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    for name in ("model", "ema", "optimizer"):
        mine, theirs = tensors(getattr(one, name)), tensors(getattr(other, name))
        assert mine.keys() == theirs.keys() and mine
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert one.metrics == other.metrics and one.best == other.best


def metric_lines(out: Path) -> list[dict[str, Any]]:
    """All but times."""
    lines = run_log.read_metrics(out)
    return [
        {k: v for k, v in li.items() if k not in ("images_per_sec", "data_wait")} for li in lines
    ]


# ------------------------------------------------------------------------------------- resume


def die_at(step: int, monkeypatch) -> None:
    deliver, count = SegTrainFeed.__next__, [0]

    def deliver_or_die(self: SegTrainFeed) -> Any:
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return deliver(self)

    monkeypatch.setattr(SegTrainFeed, "__next__", deliver_or_die)


@pytest.mark.parametrize("step", [5])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    data, undisturbed, tmp_path, step, monkeypatch
):
    def killed() -> None:
        die_at(step, monkeypatch)
        run(data, tmp_path / "run")

    assert os.WTERMSIG(in_fork(killed)) == signal.SIGKILL
    assert read(tmp_path / "run/checkpoints/last.pt").step == step - 1
    outcome = run(data, tmp_path / "run", resume=True)
    assert outcome.step == outcome.total_steps == 7
    mine, theirs = (read(out / "checkpoints/last.pt") for out in (tmp_path / "run", undisturbed))
    assert_same_state(mine, theirs)
    assert metric_lines(tmp_path / "run") == metric_lines(undisturbed)


def test_a_run_that_is_told_to_stop_saves_and_owes_its_evaluation(
    data, undisturbed, tmp_path, monkeypatch
):
    deliver, count = SegTrainFeed.__next__, [0]

    def deliver_and_stop(self: SegTrainFeed) -> Any:
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return deliver(self)

    with monkeypatch.context() as patch:
        patch.setattr(SegTrainFeed, "__next__", deliver_and_stop)
        stopped = run(data, tmp_path / "run")
    assert stopped.step == 4 and read(tmp_path / "run/checkpoints/last.pt").owes_evaluation
    run(data, tmp_path / "run", resume=True)
    assert_same_state(
        read(tmp_path / "run/checkpoints/last.pt"), read(undisturbed / "checkpoints/last.pt")
    )


def test_resume_refuses_another_recipe_but_not_other_records(data, undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(ValueError, match="with another recipe than the run's: optim.lr changed"):
        run(data, tmp_path / "run", "optim.lr=1e-4", resume=True)
    outcome = run(data, tmp_path / "run", "run.log_every=3 steps", resume=True)
    assert outcome.step == 7


# -------------------------------------------------------------------------- several processes


def in_fork(work: Callable[[], object], **environment: str) -> int:
    """Run in a process of its own; return how it ended, as waitpid does."""
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment)
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return os.waitpid(child, 0)[1]


def on_two(work: Callable[[], object]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
                work()
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def test_a_run_of_one_process_may_go_on_with_two(data, tmp_path, monkeypatch):
    def stopped() -> None:
        die_at(5, monkeypatch)
        run(data, tmp_path / "run")

    in_fork(stopped)
    assert on_two(lambda: run(data, tmp_path / "run", resume=True)) == [0, 0]
    last = read(tmp_path / "run/checkpoints/last.pt")
    assert last.step == 7 and last.world_size == 2
    assert last.metrics["num_images"] == 3


# -------------------------------------------------------------------------------------- rules


def test_the_learning_rate_is_the_published_one():
    recipe = load_recipe("upernet_lvvit_s")
    schedule = SegSchedule.of(recipe, 1263.1)
    assert schedule.total_steps == 160_000
    for step in (0, 1, 700, 1499, 1500, 80_000, 159_999):
        regular = 6e-5 * (1 - step / 160_000)
        if step < 1500:
            regular *= 1 - (1 - step / 1500) * (1 - 1e-6)
        assert math.isclose(schedule.lr_of(step), regular, rel_tol=1e-12)


@pytest.mark.parametrize("size, drop, miou", [("s", 0.1, 47.9), ("m", 0.2, 49.4), ("l", 0.5, 50.9)])
def test_the_shipped_recipes_are_the_published_configurations(size, drop, miou):
    recipe = load_recipe(f"upernet_lvvit_{size}")
    assert recipe.model.mlp_drop == drop and recipe.model.drop_path == 0
    assert recipe.paper_miou == miou and recipe.loss.averaging == "published"
    assert (recipe.optim.batch_size, recipe.optim.lr, recipe.optim.decayed) == (16, 6e-5, "all")
    assert (recipe.inference.mode, recipe.inference.stride_px) == ("slide", 341)
    assert (recipe.augment.scale, recipe.augment.cat_max_ratio) == ((0.5, 2.0), 0.75)
    assert parse_record(SegRecipe, to_toml(recipe)) == recipe


@pytest.mark.parametrize("name", recipe_names(RECIPE_FOLDER))
def test_each_shipped_recipe_opens_with_what_it_is_and_builds(name):
    text = (RECIPE_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ") and "tl-seg" in text.partition("\n\n")[0]
    recipe = load_recipe(name)
    assert recipe.summary
    with torch.device("meta"):
        create_model(replace(recipe.model, num_classes=3))


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_all_weights_are_decayed_or_matrices_only(decayed):
    recipe = tiny_recipe(f"optim.decayed={decayed}", "optim.weight_decay=0.3")
    model = create_model(replace(recipe.model, num_classes=3))
    optimizer = job._make_optimizer(model, recipe.optim)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, weight in model.named_parameters():
        spared = decayed == "matrices" and (
            weight.ndim == 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        )
        assert decay[id(weight)] == (0.0 if spared else 0.3), name


def test_the_first_step_is_that_of_a_loop_of_four_lines(data, tmp_path):
    from tokenlabel.segmenter.feed import SegSamples
    from tokenlabel.segmenter.loss import seg_loss
    from tokenlabel.shards.index import read_index
    from tokenlabel.trainer.step import step_seed

    recipe = tiny_recipe(
        "schedule.duration=1 steps", "schedule.warmup=0 steps", "ema.decay=0", "optim.clip_grad=0.5"
    )
    train(recipe, data=data, out=tmp_path / "run", device="cpu")
    torch.manual_seed(0)
    model = create_model(replace(recipe.model, num_classes=4)).train()
    samples = SegSamples(read_index(data), "train")
    feed = SegTrainFeed(
        samples, recipe.augment, batch_size=4, mean=recipe.model.mean, std=recipe.model.std,
        seed=0, num_workers=0,
    )  # fmt: skip
    batch = next(feed)
    torch.manual_seed(step_seed(0, 0, 0))
    logits, aux_logits = model(batch.images)
    seg_loss(logits, aux_logits, batch.masks).total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01).step()
    saved = read(tmp_path / "run/checkpoints/last.pt").model
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ the run folder


def test_a_run_in_bf16_goes_nearly_as_one_in_fp32(data, undisturbed, tmp_path):
    run(data, tmp_path / "run", "run.precision=bf16", "schedule.duration=7 steps")
    exact, rough = (
        [line["loss"] for line in metric_lines(out) if line["kind"] == "train"]
        for out in (undisturbed, tmp_path / "run")
    )
    assert rough != exact
    np.testing.assert_allclose(rough, exact, rtol=0.02)


def test_a_run_leaves_checkpoints_metrics_and_a_sheet(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} >= {
        "checkpoints", "metrics.jsonl", "recipe.toml", "environment.json", "tensorboard",
        "predictions.png",
    }  # fmt: skip
    lines = run_log.read_metrics(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 7]
    assert {"raw_miou", "ema_miou", "raw_pixel_accuracy"} <= {k for line in lines for k in line}
    losses = [line["main_loss"] + 0.4 * line["aux_loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses, [line["loss"] for line in lines if "loss" in line])
    with Image.open(undisturbed / "predictions.png") as sheet:
        assert sheet.width > 3 * 384
    trained = load_model(undisturbed / "checkpoints/best.pt")
    assert trained.config.num_classes == 4 and trained.inference.short_px == 32


def test_a_small_model_learns_colours(data, tmp_path):
    # 32 channels: with the 8 of TINY a token of 16 px cannot say where in it each colour lies.
    width = (
        "model.kwargs={ embed_dim = 32, depth = 4, num_heads = 2, stem_width = 8, "
        "out_blocks = [0, 1, 2, 3], head_dim = 32, deep_dim = 32 }"
    )
    outcome = run(
        data, tmp_path / "run", width, "schedule.duration=150 steps", "optim.lr=1e-2",
        "ema.decay=0", "evaluation.every=1000 steps", "run.checkpoint_every=1000 steps",
        "run.log_every=1000 steps", "model.mlp_drop=0", "model.drop_path=0", "model.head_drop=0",
        "augment.scale=[1,2]", "augment.brightness=0", "augment.contrast=[1,1]",
        "augment.saturation=[1,1]", "augment.hue=0", "evaluation.num_sheets=0",
    )  # fmt: skip
    assert outcome.metrics["raw_miou"] > 60  # one class for all pixels: about 7
    assert not (tmp_path / "run/predictions.png").exists()


def test_steps_that_are_not_finite_change_nothing_and_are_named(data, tmp_path, monkeypatch):
    deliver, count = SegTrainFeed.__next__, [0]

    def spoil(self: SegTrainFeed) -> Any:
        batch, count[0] = deliver(self), count[0] + 1
        if count[0] == 2:
            batch.images[0, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(SegTrainFeed, "__next__", spoil)
    run(data, tmp_path / "run", "schedule.duration=3 steps")
    last = read(tmp_path / "run/checkpoints/last.pt")
    assert last.num_skipped == 1
    assert all(t.isfinite().all() for t in last.model.values() if t.is_floating_point())
    skipped = [li for li in run_log.read_metrics(tmp_path / "run") if li["kind"] == "skipped"]
    assert skipped[0]["step"] == 2 and len(skipped[0]["keys"]) == 4


# ------------------------------------------------------------------------------------ starting


def write_classifier(path: Path) -> None:
    """A tiny LV-ViT as tl-train saves it, whose shapes are those of TINY."""
    recipe = parse_recipe(
        '[model]\nname = "lvvit_t"\nnum_classes = 7\nimage_size = 48\n'
        "kwargs = { embed_dim = 8, depth = 4, num_heads = 2, stem_width = 4 }\n"
    )
    torch.manual_seed(9)
    model = create_classifier(recipe.model)
    assert isinstance(recipe.model, ModelConfig)
    names = [f"c{i}" for i in range(7)]
    save(
        Checkpoint(
            recipe=to_toml(recipe),
            class_ids=names,
            class_names=names,
            grid=(3, 3),
            step=1,
            model=model.state_dict(),
        ),  # fmt: skip
        path,
    )


def test_training_begins_with_a_classifier_and_says_what_was_taken(data, tmp_path, caplog):
    write_classifier(tmp_path / "classifier.pt")
    caplog.set_level("INFO")
    recipe = tiny_recipe("schedule.duration=1 steps", "schedule.warmup=1 steps", "ema.decay=0")
    train(recipe, data=data, out=tmp_path / "run", device="cpu", init=tmp_path / "classifier.pt")
    assert "weights of a classifier; backbone.pos_embed resized; norm, head" in caplog.text
    before = read(tmp_path / "classifier.pt").model["blocks.2.attn.qkv.weight"]
    after = read(tmp_path / "run/checkpoints/last.pt").model["backbone.blocks.2.attn.qkv.weight"]
    assert (before - after).abs().max() < 1e-4


def test_class_counts_must_agree(data, tmp_path):
    with pytest.raises(ValueError, match="has 4 classes, the recipe's model 150; --set model.num"):
        run(data, tmp_path / "run", "model.num_classes=150")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ("optim.decayed=some", "optim.decayed = 'some'; allowed: 'all', 'matrices'"),
        ("schedule.warmup=9 steps", "longer than schedule.duration"),
        ("augment.crop=512", "unknown key 'augment.crop'"),
        ("model.name=upernet_lvvit_xl", "did you mean upernet_lvvit_"),
        ("schedule.power=0", "schedule.power = 0"),
    ],
)
def test_mistakes_in_a_recipe_are_named_before_a_folder_is_made(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_names_its_files(data, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    arguments = [
        "train", "--recipe", str(tmp_path / "tiny.toml"), "--data", str(data),
        "--out", str(tmp_path / "run"), "--device", "cpu", "--set", "schedule.duration=2 steps",
    ]  # fmt: skip
    done = CliRunner().invoke(tl_seg, arguments)
    assert done.exit_code == 0, done.output
    assert "last.pt  step 2 of 2" in done.output and "mIoU" in done.output
    again = CliRunner().invoke(tl_seg, arguments)
    assert again.exit_code == 2 and "--resume goes on with the run in it" in again.output
    listed = CliRunner().invoke(tl_seg, ["recipes"])
    assert "upernet_lvvit_l   UperNet on LV-ViT-L, ADE20K" in listed.output
    shown = CliRunner().invoke(tl_seg, ["recipes", "upernet_lvvit_s"])
    assert shown.output.startswith("# UperNet on LV-ViT-S")
    assert json.loads((tmp_path / "run/environment.json").read_text())[0]["split"] == "train"
