"""Recipes: round trip through TOML, and errors that say what to write instead."""

import dataclasses
import math
import tomllib
from typing import Any

import pytest
from click.testing import CliRunner

from tokenlabel import cli
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.optim import Schedule, explain_lr
from tokenlabel.trainer.recipe import (
    RECIPE_FOLDER,
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


def shrunk(recipe: Recipe) -> Recipe:
    kwargs: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 1}
    if recipe.model.name.startswith("lvvit"):
        kwargs["stem_width"] = 4
    if recipe.model.name == "convnext_tiny":
        kwargs = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, kwargs=kwargs))


# ----------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_build_their_model_and_survive_the_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.summary
    assert parse_recipe(to_toml(recipe)) == recipe
    model = shrunk(recipe).model
    if not model.num_classes:  # it takes the data set's
        model = dataclasses.replace(model, num_classes=7)
    assert create_model(model).num_classes == model.num_classes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_open_with_what_a_reader_needs(name):
    text = (RECIPE_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    needed = ["# Hardware"]
    of_a_paper = name not in ("demo", "class_labels")
    needed += ["# Paper", "# Original", "on purpose"] if of_a_paper else ["# Command", "# Expect"]
    assert [word for word in needed if word not in text] == []


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
        ("lr = 3", "unknown key 'lr'.*known: summary, paper_top1, model"),
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
    with pytest.raises(ValueError, match="unknown recipe 'lvvit_s' .did you mean 'lvvit_s_224'"):
        find_recipe("lvvit_s")


def test_missing_recipe_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.toml does not exist"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_recipes_load_from_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(Recipe(summary="mine")), encoding="utf-8")
    assert load_recipe(str(path), ["run.seed=3"]) == Recipe(summary="mine", run=RunConfig(seed=3))


def test_the_command_line_lists_and_shows_recipes(tmp_path):
    listed = CliRunner().invoke(cli.train, ["recipes"])
    assert all(name in listed.output for name in recipe_names())
    assert "83.3 %  LV-ViT-S, 224 px, token labels" in listed.output
    shown = CliRunner().invoke(cli.train, ["show", "demo", "--set", "run.seed=3"])
    assert parse_recipe(shown.output) == load_recipe("demo", ["run.seed=3"])
    wrong = CliRunner().invoke(cli.train, ["show", "demo", "--set", "run.sed=3"])
    assert wrong.exit_code == 2
    assert "unknown key 'run.sed' (did you mean 'seed'?)" in wrong.output


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
