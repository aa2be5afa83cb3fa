"""Recipes: round trip through TOML, and errors that say what to write instead."""

import dataclasses
import itertools
import json
import logging
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from loop_runs import FixedFeed, fixed_data, write_data
from shard_sets import NUM_CLASSES, make_samples, write_split
from test_readme import parse
from timm.models import build_model_with_cfg, register_model
from timm.models.volo import VOLO
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align

from tokenlabel import cli
from tokenlabel.trainer import loop, run_log
from tokenlabel.trainer.checkpoint import load_model, read
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.feed import Batch
from tokenlabel.trainer.mix_token import sample_box
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.optim import Schedule, explain_lr
from tokenlabel.trainer.recipe import (
    AugmentConfig,
    Duration,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    differences,
    find_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    to_toml,
)

# ----------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_the_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.summary
    assert parse_recipe(to_toml(recipe)) == recipe


FULL_SIZES = {
    "class_labels": (28.6e6, 7),
    "deit_small": (22.4e6, 14),
    "demo": (1_063_008, 7),
    "lvvit_l_224": (150_021_968, 14),
    "lvvit_l_448": (150.47e6, 28),
    "lvvit_l_512": (150.66e6, 32),
    "lvvit_m_224": (55_830_544, 14),
    "lvvit_m_384": (56.03e6, 24),
    "lvvit_m_448": (56.13e6, 28),
    "lvvit_s_224": (26_151_824, 14),
    "lvvit_s_384": (26.30e6, 24),
    "lvvit_t_224": (8_534_720, 14),
    "relabel_resnet50": (25_557_032, 7),
    "t2t_vit_14": (21.9e6, 14),
    "transfer": (26_151_824, 14),
    "volo_d1": (26.6e6, 14),
}
"""Parameters with 1000 classes, rounded or exact, and tokens along a side."""

IMAGENET = 1_281_167


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_build_their_model_at_its_full_size(name):
    recipe = load_recipe(name)
    config = dataclasses.replace(recipe.model, num_classes=recipe.model.num_classes or 1000)
    # Shapes alone, no memory and no arithmetic; T2T-ViT's attention cannot do without.
    with torch.device("cpu" if name == "t2t_vit_14" else "meta"):
        model = create_model(config, dense=recipe.labels.dense_weight > 0)
        with FlopCounterMode(display=False) as forward:
            model.train()(torch.zeros(2, 3, *config.image_hw))
    expected, side = FULL_SIZES[name]
    tolerance = 0 if isinstance(expected, int) else 0.002
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=tolerance)
    assert model.grid == (side, side)
    # Backward takes twice as much as forward: one product for the weights, one for the input.
    gflop = 3 * forward.get_total_flops() / 2 / 1e9
    said = re.search(r"^Compute +([\d.]+) GFLOP an image", "\n".join(header(name)), re.MULTILINE)
    assert said and float(said[1]) == pytest.approx(gflop, abs=0.05)
    in_all = re.search(r"^Compute .*; ([\d.]+) EFLOP in all", "\n".join(header(name)), re.MULTILINE)
    if in_all:
        num_epochs = recipe.schedule.duration.amount + recipe.schedule.cooldown.amount
        assert float(in_all[1]) == pytest.approx(gflop * IMAGENET * num_epochs / 1e9, abs=0.06)
    assert bool(in_all) == (name not in ("demo", "class_labels", "transfer"))


def header(name: str) -> list[str]:
    """The comment that a shipped recipe begins with, without its marks."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    return [line[2:] for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def commands(name: str) -> list[list[str]]:
    """Its commands of ours as their words; what continues a command stands 4 columns deeper."""
    text = "\n".join(header(name))
    found = re.findall(r"^.{10}(?:torchrun .*)?(tl-.*(?:\n {14}.*)*)", text, re.MULTILINE)
    return [command.split() for command in found]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_open_with_what_a_reader_needs(name):
    labels = [line[:10].strip() for line in header(name) if line[:10].strip()]
    of_a_paper = ["Paper", "Original", "Hardware", "Compute", "Here"]
    is_ours = name in ("demo", "class_labels")
    needed = ["Hardware", "Compute", "Command", "Expect"] if is_ours else of_a_paper
    assert [label for label in needed if label not in labels] == []
    assert is_ours or "on purpose" in "\n".join(header(name))


@pytest.mark.parametrize("name", recipe_names())
def test_commands_in_shipped_recipes_parse_and_name_the_recipe(name):
    refers = re.search(r"^Here +the commands in (\w+).toml", "\n".join(header(name)), re.MULTILINE)
    found = commands(refers[1] if refers else name)
    recipes = [parse(words).get("recipe") for words in found]
    assert (refers[1] if refers else name) in recipes
    assert f"--recipe {name}" in " ".join(header(name))


@pytest.mark.parametrize(
    "name, lr, drop_path, crop_pct, top1",
    [
        ("lvvit_t_224", 1.6e-3, 0.1, 0.9, 79.1),
        ("lvvit_s_224", 1.6e-3, 0.1, 0.9, 83.3),
        ("lvvit_m_224", 1.6e-3, 0.2, 1.0, 84.0),
        ("lvvit_l_224", 1.0e-3, 0.3, 1.0, None),
    ],
)
def test_the_paper_recipes_say_what_the_paper_says(name, lr, drop_path, crop_pct, top1):
    recipe = load_recipe(name)
    assert recipe.model.name == name.removesuffix("_224")
    assert (recipe.optim.lr, recipe.model.drop_path) == (lr, drop_path)
    assert (recipe.evaluation.crop_pct, recipe.paper_top1) == (crop_pct, top1)
    assert recipe.optim.batch_size == recipe.optim.lr_batch_size == 1024
    assert (recipe.optim.weight_decay, recipe.optim.betas) == (0.05, (0.9, 0.999))
    assert recipe.schedule == ScheduleConfig(
        duration=Duration(300.0, "epochs"),
        warmup=Duration(5.0, "epochs"),
        cooldown=Duration(10.0, "epochs"),
        warmup_lr=1e-6,
        min_lr=1e-5,
    )
    assert recipe.ema.decay == 0.99992
    assert recipe.labels.smoothing == 0.1
    assert (recipe.labels.class_weight, recipe.labels.dense_weight) == (1, 1)
    assert recipe.augment.scale == (0.08, 1.0)
    assert recipe.augment.random_erasing == 0.25


@pytest.mark.parametrize(
    ("name", "drop_path", "crop_pct", "top1"),
    [
        ("lvvit_s_384", 0.1, 0.9, 84.4),
        ("lvvit_m_384", 0.2, 1.0, 85.4),
        ("lvvit_m_448", 0.2, 1.0, 85.5),
        ("lvvit_l_448", 0.3, 1.0, 86.2),
        ("lvvit_l_512", 0.3, 1.0, 86.4),
    ],
)
def test_the_fine_tunings_are_those_of_the_paper_on_the_networks_own_recipe(
    name, drop_path, crop_pct, top1
):
    recipe, start = load_recipe(name), load_recipe(f"{name[:7]}_224")
    assert recipe.model.name == name[:7]
    assert recipe.model.image_size == int(name[8:])
    assert recipe.model.drop_path == start.model.drop_path == drop_path
    assert (recipe.augment, recipe.labels) == (start.augment, start.labels)
    assert recipe.evaluation == start.evaluation
    assert (recipe.evaluation.crop_pct, recipe.paper_top1) == (crop_pct, top1)
    assert recipe.optim == OptimConfig(
        batch_size=512, lr=5e-6, lr_batch_size=512, weight_decay=1e-8
    )
    schedule = Schedule.of(recipe, steps_per_epoch=10.0)
    assert schedule.total_steps == 300
    assert schedule.lr(0) == pytest.approx(1e-6)
    assert [schedule.lr(step) for step in range(50, 300)] == pytest.approx([5e-6] * 250)


# ---------------------------------------------------------------------------- shrunken runs

HERE = Place(device=torch.device("cpu"))
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "stem_width": 4}


def shrunken(name: str, num_steps: int, *changes: str) -> Recipe:
    """A shipped recipe, but for its size and length."""
    tiny = ["model.image_size=64", "optim.batch_size=4", "run.workers=1", "run.log_every=1 steps"]
    tiny += [f"schedule.duration={num_steps} steps", "schedule.warmup=0 steps"]
    return load_recipe(name, [*tiny, "schedule.cooldown=0 steps", *changes])


def tiny_lvvit(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, kwargs=TINY))


def published_lvvit(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write weights of a tiny LV-ViT as its authors do."""
    torch.manual_seed(7)
    weights = create_model(ModelConfig(name="lvvit_s", kwargs=TINY, **changes)).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    return weights


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    return read(out / "checkpoints" / "last.pt").model


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]


@pytest.fixture
def _fast(monkeypatch):
    """One thread, as the tensors are tiny; no pictures, as they would take most of the time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)
    monkeypatch.setattr(loop, "write_report", lambda out: out)


@pytest.mark.usefixtures("_fast")
def test_a_fine_tuning_goes_on_from_a_smaller_size_with_its_position_embeddings_resized(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    before = published_lvvit(tmp_path / "small.pth.tar", num_classes=NUM_CLASSES, image_size=32)
    recipe = tiny_lvvit(shrunken("lvvit_s_384", 2, f"model.num_classes={NUM_CLASSES}"))
    loop.fit(recipe, fixed_data(), tmp_path / "run", HERE, init=tmp_path / "small.pth.tar")
    assert "published weights loaded; pos_embed resized" in caplog.text
    after = last_weights(tmp_path / "run")
    grid = before["pos_embed"][:, 1:].transpose(1, 2).reshape(1, -1, 2, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    expected = before | {"pos_embed": torch.cat([before["pos_embed"][:, :1], grid], 1)}
    for name in (name for name in after if not name.startswith("patch_embed.bn")):
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(after["head.weight"], before["head.weight"])  # it is trained, too
    assert not torch.equal(after["aux_head.weight"], before["aux_head.weight"])
    assert all(line["dense_loss"] > 0 for line in metrics_of(tmp_path / "run"))


@pytest.mark.usefixtures("_fast")
def test_a_transfer_keeps_the_network_and_begins_heads_for_the_classes_of_the_data(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    before = published_lvvit(tmp_path / "other.pth.tar", num_classes=7, image_size=64)
    (tmp_path / "data").mkdir()
    samples = make_samples(f"t{i}" for i in range(8))
    unlabelled = [{k: v for k, v in s.items() if not k.endswith(".tlm")} for s in samples]
    write_split(tmp_path / "data", unlabelled)
    recipe = tiny_lvvit(shrunken("transfer", 3))
    out = tmp_path / "run"
    init = tmp_path / "other.pth.tar"
    loop.train(recipe, data=tmp_path / "data", out=out, init=init, device="cpu")
    assert "head.weight, head.bias, aux_head.weight, aux_head.bias dropped" in caplog.text
    assert load_recipe(str(out / "recipe.toml")).model.num_classes == NUM_CLASSES
    after = last_weights(out)
    assert after["head.weight"].shape == (NUM_CLASSES, 16)
    assert not after["aux_head.weight"].any() and not after["aux_head.bias"].any()
    kept = [name for name in before if "head" not in name and ".bn" not in name]
    for name in kept:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-3, msg=name)
    assert not torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    assert [line["dense_loss"] for line in metrics_of(out)] == [0, 0, 0]


TINY_NETWORKS: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "deit_small_patch16_224": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "resnet50": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "t2t_vit_14": {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 16},
    "tiny_volo": {},
}


@register_model
def tiny_volo(pretrained: bool = False, **kwargs: Any) -> VOLO:
    """A VOLO-D1 whose sizes timm would not let us choose."""
    sizes = dict(embed_dims=[8, 16, 16, 16], num_heads=[2, 2, 2, 2], stem_hidden_dim=8)
    layers = [1, 1, 1, 1]
    return build_model_with_cfg(VOLO, "volo_d1_224", pretrained, layers=layers, **sizes, **kwargs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "data"
    write_data(folder)
    return folder


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("name", recipe_names())
def test_each_shipped_recipe_runs_from_shards_to_a_model_that_loads(name, shards, tmp_path):
    recipe = shrunken(
        name, 1, f"model.num_classes={NUM_CLASSES}", "evaluation.batch_size=6"
    )  # fmt: skip
    kind = recipe.model.name.replace("volo_d1_224", "tiny_volo")
    kwargs = TINY_NETWORKS.get(kind, TINY)
    model = dataclasses.replace(recipe.model, name=kind, kwargs=kwargs)
    recipe = dataclasses.replace(recipe, model=model)
    assert loop.train(recipe, data=shards, out=tmp_path / "run", device="cpu").step == 1
    train, evaluation = metrics_of(tmp_path / "run")
    assert train["class_loss"] > 0
    assert (train["dense_loss"] > 0) == (recipe.labels.dense_weight > 0)
    assert evaluation["num_images"] == 6
    assert ("ema_top1" in evaluation) == (recipe.ema.decay > 0)
    found = load_model(tmp_path / "run" / "checkpoints" / "best.pt")
    assert found.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, NUM_CLASSES)


class LargeFeed(FixedFeed):
    """Images of 128 px, on which a CNN has enough cells for something to be mixed."""

    def __init__(self) -> None:
        super().__init__([0, 1, 2, 3])

    def __next__(self) -> Batch:
        batch = super().__next__()
        return dataclasses.replace(batch, images=F.interpolate(batch.images, scale_factor=2))


@pytest.mark.usefixtures("_fast")
def test_the_relabel_recipe_teaches_a_cnn_one_label_pooled_over_each_crop(tmp_path):
    recipe = shrunken(
        "relabel_resnet50", 1, "model.name=test_resnet", "labels.fill=zero",
        f"model.num_classes={NUM_CLASSES}", "model.image_size=128",
    )  # fmt: skip
    data = dataclasses.replace(fixed_data(), open_train=lambda state, first_pass: LargeFeed())
    loop.fit(recipe, data, tmp_path / "run", HERE)
    [line] = metrics_of(tmp_path / "run")
    assert line["dense_loss"] == 0
    assert line["loss"] == pytest.approx(line["class_loss"])

    torch.manual_seed(recipe.run.seed)
    model = create_model(recipe.model, dense=False).train()
    batch = next(LargeFeed())
    box = sample_box(model.grid, np.random.default_rng([recipe.run.seed, 0]))
    logits = model(batch.images, box)[0].detach()
    targets = pooled_like_relabel(batch, model.grid)
    targets = box.kept * targets + (1 - box.kept) * targets.flip(0)
    assert 0 < box.kept < 1
    expected = -(targets * logits.log_softmax(1)).sum(1).mean().item()
    assert line["class_loss"] == pytest.approx(expected, rel=1e-4)

    own = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    assert set(last_weights(tmp_path / "run")) == set(own.state_dict())


def pooled_like_relabel(batch: Batch, grid: tuple[int, int]) -> torch.Tensor:
    """ReLabel's operator: roi_align of a map's scores, 0 outside the top k, then softmax."""
    assert batch.maps is not None
    rows = []
    for i, view in enumerate(batch.views):
        scores, indices = batch.maps.scores[i, 0].float(), batch.maps.indices[i, 0].long()
        dense = torch.zeros(NUM_CLASSES, *scores.shape[1:])
        dense.scatter_(0, batch.maps.palette[i][indices], scores)
        size = torch.tensor(dense.shape[:0:-1]).repeat(2)
        x0, y0, width, height = view[0, 2], view[1, 2], view[0, 0], view[1, 1]
        box = torch.stack([x0, y0, x0 + width, y0 + height]) * size
        pooled = roi_align(dense[None], [box[None]], grid, sampling_ratio=2, aligned=True)
        rows.append(pooled.mean((0, 2, 3)))
    return torch.stack(rows).softmax(1)


# ------------------------------------------------------------------------------------- TOML


def test_every_field_survives_the_round_trip():
    recipe = Recipe(
        summary='quotes " and \\ and ünïcode and \x7f',
        paper_top1=12.5,
        model=ModelConfig(
            image_size=(96, 128), mix_token=False, kwargs={"depth": 3, "mlp_ratio": 2.5, "x y": "z"}
        ),
        augment=AugmentConfig(scale=(1e-5, 0.5), interpolation="bilinear"),
        optim=OptimConfig(clip_grad=1.0, eps=1e-12, batch_size=7),
        schedule=ScheduleConfig(duration=Duration(60.0, "steps"), warmup=Duration(0.0, "epochs")),
        run=RunConfig(log_every=Duration(2.5, "epochs"), workers=3),
    )
    assert parse_recipe(to_toml(recipe)) == recipe
    assert tomllib.loads(to_toml(recipe))["schedule"]["duration"] == "60 steps"


def test_keys_left_out_keep_their_defaults():
    assert parse_recipe("") == Recipe()
    assert parse_recipe("[optim]\nlr = 1").optim == OptimConfig(lr=1.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = 3", "unknown key 'lr' .did you mean 'optim.lr'.*known: summary, paper_top1, model"),
        (
            "[optim]\nlearning_rate = 3",
            r"unknown key 'optim.learning_rate'.*known in \[optim\]: .*lr",
        ),
        ("[optim]\nweight_deday = 3", "did you mean 'weight_decay'"),
        ("[optim]\nlr = 'fast'", "optim.lr = 'fast' is not a number"),
        ("[optim]\nlr = true", "optim.lr = True is not a number"),
        ("[optim]\nbatch_size = 2.5", "optim.batch_size = 2.5 is not a whole number"),
        ("[model]\nmix_token = 1", "model.mix_token = 1 is not true or false"),
        ("[model]\nname = 1", "model.name = 1 is not a text"),
        ("[model]\nimage_size = [1, 2, 3]", "is not a whole number or a list of 2 numbers"),
        ("[augment]\nscale = 0.5", "augment.scale = 0.5 is not a list of 2 numbers"),
        ("[labels]\nfill = 'none'", "labels.fill = 'none'; allowed: 'residual', 'zero'"),
        ("[schedule]\nduration = 300", 'not a text such as "300 epochs" or "60 steps"'),
        ("[schedule]\nduration = '3 weeks'", "'3 weeks' is no duration"),
        ("[schedule]\nduration = '2.5 steps'", "steps are whole"),
        ("optim = 3", r"optim = 3 is not a table; write \[optim\]"),
        ("[optim", "not valid TOML"),
    ],
)
def test_mistakes_in_a_recipe_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("model.num_classes=-1", "model.num_classes = -1; allowed: >= 0"),
        ("model.drop_path=1", "model.drop_path = 1.0; allowed: 0 <= rate < 1"),
        ("augment.scale=[0.5, 0.1]", r"augment.scale = \(0.5, 0.1\); allowed: 0 < smallest"),
        ("augment.hflip=2", "augment.hflip = 2.0; allowed: 0 to 1"),
        ("augment.std=[0, 1, 1]", "augment.std = .* allowed: > 0"),
        ("labels.smoothing=1", "labels.smoothing"),
        ("optim.lr=-1", "optim.lr = -1.0; allowed: > 0"),
        ("optim.lr=nan", "optim.lr = nan; allowed: > 0"),
        ("optim.clip_grad=0", "optim.clip_grad = 0.0; allowed: > 0, or left out"),
        ("optim.betas=[0.9, 1]", "optim.betas"),
        ("schedule.duration=0 epochs", "schedule.duration = 0 epochs; allowed: more than nothing"),
        ("schedule.min_lr=1", "schedule.min_lr = 1.0; allowed: at most optim.lr = 0.0016"),
        ("ema.decay=1", "ema.decay"),
        ("evaluation.crop_pct=0", "evaluation.crop_pct"),
        ("run.seed=-1", "run.seed = -1"),
        ("run.workers=0", "run.workers = 0"),
        ("run.log_every=0 steps", "run.log_every = 0 steps"),
    ],
)
def test_values_out_of_range_are_named_with_what_is_allowed(assignment, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe("", [assignment])


def test_weights_of_zero_on_both_losses_are_refused():
    with pytest.raises(ValueError, match="class_weight . labels.dense_weight = 0.0"):
        parse_recipe("", ["labels.class_weight=0", "labels.dense_weight=0"])


# ---------------------------------------------------------------------------- command line


def test_assignments_win_over_the_file_and_take_their_types_from_the_recipe():
    recipe = parse_recipe(
        "[optim]\nlr = 1",
        [
            "optim.lr=2e-3",
            "run.precision=bf16",
            'run.compile="off"',
            "model.image_size=[32, 64]",
            "model.mix_token=false",
            "model.kwargs.depth=2",
            "schedule.duration = 2.5 epochs",
            "optim.clip_grad=5",
        ],
    )
    assert recipe.optim.lr == 2e-3
    assert (recipe.run.precision, recipe.run.compile) == ("bf16", "off")
    assert recipe.model.image_hw == (32, 64)
    assert recipe.model.mix_token is False
    assert recipe.model.kwargs == {"depth": 2}
    assert recipe.schedule.duration == Duration(2.5, "epochs")
    assert recipe.optim.clip_grad == 5.0


@pytest.mark.parametrize("assignment", ["optim.lr", "=3", "optim..lr=3", ""])
def test_malformed_assignments_are_refused(assignment):
    with pytest.raises(ValueError, match="not of the form section.key=value"):
        parse_recipe("", [assignment])


def test_assignments_below_a_plain_key_are_refused():
    with pytest.raises(ValueError, match="summary is no section"):
        parse_recipe("summary = 'x'", ["summary.x=3"])


def test_unknown_recipes_are_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="unknown recipe 'lvit_s_224' .did you mean 'lvvit_s_224'"):
        find_recipe("lvit_s_224")


def test_the_beginning_of_a_recipes_name_suggests_those_it_begins():
    with pytest.raises(ValueError, match="did you mean 'lvvit_s_224' or 'lvvit_s_384'"):
        find_recipe("lvvit_s")
    with pytest.raises(ValueError, match="unknown recipe 'xyz'; known: class_labels, "):
        find_recipe("xyz")


def test_missing_recipe_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.toml does not exist"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_recipes_load_from_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(Recipe(summary="mine")), encoding="utf-8")
    assert load_recipe(str(path), ["run.seed=3"]) == Recipe(summary="mine", run=RunConfig(seed=3))


def test_the_command_line_lists_and_shows_recipes(tmp_path):
    listed = CliRunner().invoke(cli.train, ["recipes"])
    lines = listed.output.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *recipe_names()]
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("lvvit_s_224"))
    assert re.fullmatch(r"lvvit_s_224 +LV-ViT-S, 224 px, token labels +310 +23 +83.3", row)
    ends = [lines[0].index(head) + len(head) for head in ("epochs", "H100 hours", "paper top-1")]
    assert [row[:end].split()[-1] for end in ends] == ["310", "23", "83.3"]
    shown = CliRunner().invoke(cli.train, ["show", "demo", "--set", "run.seed=3"])
    assert parse_recipe(shown.output) == load_recipe("demo", ["run.seed=3"])
    wrong = CliRunner().invoke(cli.train, ["show", "demo", "--set", "run.sed=3"])
    assert wrong.exit_code == 2
    assert "unknown key 'run.sed' (did you mean 'seed'?)" in wrong.output


def test_the_list_of_recipes_as_json_holds_numbers_and_null_where_nothing_is_stated():
    listed = CliRunner().invoke(cli.train, ["recipes", "--json"])
    found = {facts.pop("name"): facts for facts in json.loads(listed.output)}
    assert sorted(found) == recipe_names()
    top1 = [(name, facts["paper_top1"]) for name, facts in found.items() if facts["paper_top1"]]
    assert dict(top1)["lvvit_l_512"] == 86.4
    assert found["deit_small"] == {
        "summary": "DeiT-S, 224 px, token labels",
        "epochs": 300,
        "gflop_per_image": 28.0,
        "h100_hours": 16,
        "paper_top1": None,
    }
    assert (found["demo"]["epochs"], found["lvvit_s_384"]["epochs"]) == (None, 30)
    unknown = [name for name, facts in found.items() if facts["h100_hours"] is None]
    assert unknown == ["class_labels", "demo", "transfer"]  # they are not of ImageNet


def test_differences_name_the_keys():
    new = parse_recipe("", ["optim.lr=1", "model.kwargs.depth=3", "ema.decay=0", "summary=x"])
    assert differences(Recipe(), new) == ["summary", "model.kwargs", "optim.lr", "ema.decay"]
    assert differences(new, new) == []


# ------------------------------------------------------------------------- learning rate, EMA


@pytest.mark.parametrize(
    "text, steps", [("300 epochs", 750), ("60 steps", 60), ("0.1 epochs", 1), ("0 epochs", 0)]
)
def test_durations_become_steps(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=2.5) == steps


def test_learning_rate_warms_up_follows_the_cosine_and_cools_down():
    recipe = parse_recipe(
        "",
        ["schedule.duration=100 steps", "schedule.warmup=10 steps", "schedule.cooldown=20 steps"]
        + ["schedule.warmup_lr=0.1", "schedule.min_lr=0.2", "optim.lr=1"],
    )
    schedule = Schedule.of(recipe, steps_per_epoch=7.0)
    assert schedule.total_steps == 120
    assert [schedule.lr(step) for step in (0, 5)] == pytest.approx([0.1, 0.55])
    for step in range(10, 100):
        assert schedule.lr(step) == pytest.approx(
            0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 100))
        )
    assert {schedule.lr(step) for step in range(100, 120)} == {0.2}


def test_learning_rates_scale_with_the_batch_and_the_reason_is_said():
    recipe = parse_recipe("", ["optim.batch_size=256"])
    schedule = Schedule.of(recipe, steps_per_epoch=10.0)
    assert schedule.peak_lr == pytest.approx(4e-4)
    assert schedule.min_lr == pytest.approx(2.5e-6)
    text = explain_lr(recipe.optim)
    assert "0.0004 = optim.lr 0.0016 × batch 256 / 1024" in text
    assert "as the recipe says for batch 1024" in explain_lr(OptimConfig())


def test_a_warmup_longer_than_the_run_is_refused_with_both_in_steps():
    recipe = parse_recipe("", ["schedule.duration=60 steps"])
    with pytest.raises(ValueError, match="5 epochs is longer .* 60 steps: 500 and 60 steps"):
        Schedule.of(recipe, steps_per_epoch=100.0)


def test_ema_config_off_is_allowed():
    assert EmaConfig(decay=0.0).decay == 0


def test_the_documentation_names_every_key(docs_folder):
    text = (docs_folder / "recipes.md").read_text(encoding="utf-8")
    keys = [name for name in _all_keys(Recipe(), "") if f"`{name}`" not in text]
    assert keys == []


def _all_keys(record: Any, prefix: str) -> list[str]:
    keys = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        is_section = dataclasses.is_dataclass(value) and not isinstance(value, Duration)
        keys += _all_keys(value, f"{field.name}.") if is_section else [prefix + field.name]
    return keys
