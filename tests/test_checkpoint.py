"""Checkpoints: atomic, refused when torn or foreign, and loaded with a report of every change."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tokenlabel.trainer import checkpoint as checkpoint_module
from tokenlabel.trainer.checkpoint import (
    Checkpoint,
    latest,
    load_model,
    load_weights,
    read,
    read_best,
    read_latest,
    save,
    save_step,
    step_files,
)
from tokenlabel.trainer.models import Student, create_model
from tokenlabel.trainer.models.lvvit import LVViT, resize_pos_embed
from tokenlabel.trainer.recipe import ModelConfig, Recipe, to_toml

TINY: dict[str, Any] = dict(embed_dim=16, depth=2, num_heads=2, stem_width=4)


def config(
    *, num_classes: int = 5, image_size: int | tuple[int, int] = 32, **kwargs
) -> ModelConfig:
    return ModelConfig(num_classes=num_classes, image_size=image_size, kwargs=TINY | kwargs)


def new_model(seed: int = 0, **changes) -> LVViT:
    torch.manual_seed(seed)
    model = create_model(config(**changes))
    assert isinstance(model, LVViT)
    return model


def checkpoint_of(
    model: LVViT, *, step: int = 7, ema: LVViT | None = None, **changes
) -> Checkpoint:
    height, width = model.grid
    recipe = Recipe(
        model=config(num_classes=model.num_classes, image_size=(height * 16, width * 16))
    )
    values: dict[str, Any] = dict(
        recipe=to_toml(recipe),
        class_ids=[f"n{i}" for i in range(model.num_classes)],
        class_names=[f"class {i}" for i in range(model.num_classes)],
        grid=model.grid,
        step=step,
        model=model.state_dict(),
        ema=ema.state_dict() if ema else None,
    )
    return Checkpoint(**values | changes)


def same_weights(model: Student, other: Student) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------- files


def test_a_checkpoint_reads_back_as_it_was(tmp_path):
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model.train()(torch.randn(2, 3, 32, 32))[0].sum().backward()
    optimizer.step()
    feed = [{"num_batches": 3, "pipeline": b"\x00\xff", "split": "train"}]
    written = checkpoint_of(
        model, optimizer=optimizer.state_dict(), feed=feed, num_skipped=2, world_size=1,
        best={"top1": 1.5, "step": 3, "weights": "raw"}, metrics={"raw_top1": 1.5},
    )  # fmt: skip
    save(written, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    for name in ("recipe", "class_ids", "class_names", "grid", "step", "feed", "best", "metrics"):
        assert getattr(found, name) == getattr(written, name), name
    assert found.optimizer["param_groups"] == written.optimizer["param_groups"]
    for key, value in written.model.items():
        assert torch.equal(found.model[key], value), key
    first = written.optimizer["state"][0]
    assert all(torch.equal(found.optimizer["state"][0][k], v) for k, v in first.items())


def test_saving_keeps_the_newest_two_the_last_and_the_best(tmp_path):
    model = new_model()
    for step, is_best in [(2, False), (4, True), (10, False), (30, False)]:
        save_step(checkpoint_of(model, step=step), tmp_path, is_best=is_best)
    assert [path.name for path in step_files(tmp_path)] == ["step-10.pt", "step-30.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt", "last.pt", "step-10.pt", "step-30.pt",
    ]  # fmt: skip
    assert read(tmp_path / "last.pt").step == 30
    assert read(tmp_path / "best.pt").step == 4


def test_a_full_disk_names_the_checkpoint_and_leaves_the_one_before(tmp_path):
    save_step(checkpoint_of(new_model(), step=1), tmp_path, is_best=True)
    (tmp_path / ".step-2.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device while saving: '.*step-2.pt'"):
        save_step(checkpoint_of(new_model(), step=2), tmp_path, is_best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "step-1.pt"]
    assert read_latest(tmp_path)[1].step == 1


def test_what_a_kill_leaves_between_the_names_of_a_checkpoint_can_be_gone_on_from(
    tmp_path, monkeypatch
):
    best = {"top1": 1.0, "loss": 1.0, "step": 1, "weights": "raw"}
    save_step(checkpoint_of(new_model(), step=1, best=best), tmp_path, is_best=True)
    link, better = checkpoint_module._link, best | {"top1": 2.0, "step": 2}

    def die_before_last(source: Path, path: Path) -> None:
        if path.name == "last.pt":
            raise KeyboardInterrupt
        link(source, path)

    monkeypatch.setattr(checkpoint_module, "_link", die_before_last)
    (tmp_path / ".step-0.pt.tmp").touch()
    with pytest.raises(KeyboardInterrupt):
        save_step(checkpoint_of(new_model(), step=2, best=better), tmp_path, is_best=True)
    monkeypatch.undo()
    assert read_latest(tmp_path)[1].step == 1
    assert read_best(tmp_path) == better  # which the run will come to again
    save_step(checkpoint_of(new_model(), step=2, best=better), tmp_path, is_best=True)
    assert list(tmp_path.glob(".*")) == []


def test_saving_after_going_back_removes_the_checkpoints_of_later_steps(tmp_path):
    model = new_model()
    for step in (4, 6, 8, 5):
        save_step(checkpoint_of(model, step=step), tmp_path, is_best=False, ends_epoch=step == 4)
    assert [path.name for path in step_files(tmp_path)] == ["step-5.pt"]
    path, found, problems = read_latest(tmp_path)
    assert (path.name, found.step, problems) == ("last.pt", 5, [])
    assert read(tmp_path / "epoch.pt").step == 4


def test_last_and_best_are_copies_where_the_disk_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save_step(checkpoint_of(new_model(), step=3), tmp_path, is_best=True)
    assert read(tmp_path / "last.pt").step == read(tmp_path / "best.pt").step == 3


def test_a_full_disk_leaves_the_previous_checkpoint_alone(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(checkpoint_of(new_model(), step=1), path)
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", mode))  # noqa: PTH123
    with pytest.raises(OSError, match="No space left"):
        save(checkpoint_of(new_model(), step=2), path)
    monkeypatch.undo()
    assert read(path).step == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_before_the_rename_leaves_the_previous_checkpoint_alone(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(checkpoint_of(new_model(), step=1), path)

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint_of(new_model(), step=2), path)
    assert read(path).step == 1


def test_resuming_takes_last_else_the_newest_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        latest(tmp_path)
    for name in ("step-9.pt", "step-10.pt"):
        (tmp_path / name).touch()
    assert latest(tmp_path).name == "step-10.pt"
    (tmp_path / "last.pt").touch()
    assert latest(tmp_path).name == "last.pt"


# ---------------------------------------------------------------------------- refused files


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    save(checkpoint_of(new_model()), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="b.pt is (torn|damaged)"):
            read(tmp_path / "b.pt")


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    save(checkpoint_of(new_model()), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="a.pt is (torn|damaged)"):
        read(tmp_path / "a.pt")


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("exploited",))


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Exploit()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name} is"):
            load_weights(new_model(), tmp_path / name)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x02."])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="a.pt is torn or not a checkpoint"):
        load_weights(new_model(), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, not the weights"),
        ({"state_dict": {"a": 3}}, "holds no weights"),
        ({3: torch.zeros(1)}, "not the weights of a model"),
    ],
)
def test_torch_files_without_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(new_model(), tmp_path / "a.pt")


def test_foreign_old_and_incomplete_checkpoints_cannot_be_resumed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"state_dict": new_model().state_dict()}, path)
    with pytest.raises(ValueError, match="not a tokenlabel checkpoint"):
        read(path)
    torch.save({"format": checkpoint_module.FORMAT, "version": 99}, path)
    with pytest.raises(ValueError, match="version 99; this program reads version 1"):
        read(path)
    torch.save({"format": checkpoint_module.FORMAT, "version": 1, "step": 3}, path)
    with pytest.raises(ValueError, match="does not hold what a version 1 checkpoint does"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt does not exist"):
        load_weights(new_model(), tmp_path / "nowhere.pt")


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module."])
def test_published_files_load_bare_nested_and_prefixed(tmp_path, wrap):
    source = new_model(seed=1)
    weights: dict[str, Any] = dict(source.state_dict())
    if wrap == "module.":
        weights = {f"module.{name}": value for name, value in weights.items()}
    elif wrap != "bare":
        weights = {wrap: weights, "epoch": 300}
    torch.save(weights, tmp_path / "w.pth.tar")
    model = new_model()
    report = load_weights(model, tmp_path / "w.pth.tar")
    assert same_weights(model, source)
    assert (report.weights, report.resized, report.dropped) == ("published", (), ())
    assert str(report).endswith("w.pth.tar: published weights loaded; all fit")


def test_old_files_in_torchs_legacy_format_load(tmp_path):
    source = new_model(seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    model = new_model()
    load_weights(model, tmp_path / "w.pth")
    assert same_weights(model, source)


@pytest.mark.parametrize("nested", ["state_dict_ema", "ours"])
def test_averaged_weights_win_unless_raw_ones_are_asked_for(tmp_path, nested):
    raw, ema = new_model(seed=1), new_model(seed=2)
    if nested == "ours":
        save(checkpoint_of(raw, ema=ema), tmp_path / "a.pt")
    else:
        content = {"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}
        torch.save(content, tmp_path / "a.pt")
    model = new_model()
    load_weights(model, tmp_path / "a.pt")
    assert same_weights(model, ema)
    load_weights(model, tmp_path / "a.pt", ema=False)
    assert same_weights(model, raw)


def test_the_best_checkpoint_gives_the_weights_that_were_best(tmp_path):
    raw, ema = new_model(seed=1), new_model(seed=2)
    best = {"top1": 50.0, "loss": 1.0, "step": 7, "weights": "raw"}
    save(checkpoint_of(raw, ema=ema, step=7, best=best), tmp_path / "best.pt")
    save(checkpoint_of(raw, ema=ema, step=8, best=best), tmp_path / "last.pt")
    model = new_model()
    assert load_weights(model, tmp_path / "best.pt").weights == "raw"
    assert same_weights(model, raw)
    assert load_weights(model, tmp_path / "last.pt").weights == "ema"


def test_another_resolution_resizes_pos_embed_and_says_so(tmp_path):
    source = new_model(seed=1, image_size=64)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = new_model(image_size=(48, 32))
    report = load_weights(model, tmp_path / "w.pth")
    assert report.resized == ("pos_embed",)
    assert "pos_embed resized" in str(report)
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(source.pos_embed, (3, 2)))
    assert torch.equal(model.head.get_parameter("weight"), source.head.get_parameter("weight"))


def test_our_checkpoints_of_oblong_images_are_resized_from_their_own_grid(tmp_path):
    source = new_model(seed=1, image_size=(32, 128))  # 2 × 8 tokens: as many as 4 × 4
    save(checkpoint_of(source), tmp_path / "a.pt")
    model = new_model(image_size=48)
    load_weights(model, tmp_path / "a.pt")
    expected = resize_pos_embed(source.pos_embed, (3, 3), (2, 8))
    torch.testing.assert_close(model.pos_embed, expected)


def test_the_same_number_of_tokens_in_another_shape_is_resized_too(tmp_path):
    source = new_model(seed=1, image_size=(32, 128))
    save(checkpoint_of(source), tmp_path / "a.pt")
    model = new_model(image_size=64)
    assert load_weights(model, tmp_path / "a.pt").resized == ("pos_embed",)
    expected = resize_pos_embed(source.pos_embed, (4, 4), (2, 8))
    torch.testing.assert_close(model.pos_embed, expected)


def test_another_class_count_is_refused_with_both_numbers_or_drops_both_heads(tmp_path):
    source = new_model(seed=1, num_classes=9)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, before = new_model(seed=2), new_model(seed=2)
    with pytest.raises(ValueError, match="has 9 classes, the model 5"):
        load_weights(model, tmp_path / "w.pth")
    assert same_weights(model, before)
    report = load_weights(model, tmp_path / "w.pth", new_heads=True)
    assert set(report.dropped) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}
    assert "dropped" in str(report)
    assert torch.equal(model.head.get_parameter("weight"), before.head.get_parameter("weight"))
    assert torch.equal(model.cls_token, source.cls_token)


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path):
    weights = dict(new_model().state_dict())
    del weights["norm.bias"]
    weights["extra"] = torch.zeros(1)
    weights["cls_token"] = torch.zeros(1, 1, 3)
    torch.save(weights, tmp_path / "w.pth")
    expected = (
        "another architecture: missing: norm.bias; unexpected: extra; "
        "of another shape: cls_token 1×1×3 instead of 1×1×16"
    )
    for new_heads in (False, True):
        with pytest.raises(ValueError, match=expected):
            load_weights(new_model(), tmp_path / "w.pth", new_heads=new_heads)


def test_another_architecture_is_refused_with_a_few_names_and_a_count(tmp_path):
    torch.save(new_model(depth=3).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"unexpected: blocks.2.norm1.weight, .* and 7 more"):
        load_weights(new_model(), tmp_path / "deep.pth")
    torch.save(new_model(embed_dim=32).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="cls_token 1×1×32 instead of 1×1×16"):
        load_weights(new_model(image_size=64), tmp_path / "wide.pth")


def test_heads_missing_from_a_file_are_an_error_even_when_new_ones_are_allowed(tmp_path):
    weights = {k: v for k, v in new_model().state_dict().items() if not k.startswith("aux_head")}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="missing: aux_head.weight, aux_head.bias"):
        load_weights(new_model(), tmp_path / "w.pth", new_heads=True)


# ------------------------------------------------------------------------------ whole models


def test_our_checkpoints_know_their_model(tmp_path):
    source = new_model(seed=1, image_size=(32, 64))
    save(checkpoint_of(source), tmp_path / "a.pt")
    found = load_model(tmp_path / "a.pt")
    assert same_weights(found.model, source)
    assert found.model.grid == (2, 4)
    assert found.class_names == [f"class {i}" for i in range(5)]
    assert found.recipe is not None
    assert found.recipe.model.image_hw == (32, 64)
    assert load_model(tmp_path / "a.pt", image_size=96).model.grid == (6, 6)
    with pytest.raises(ValueError, match="a.pt holds lvvit_s, not lvvit_m"):
        load_model(tmp_path / "a.pt", name="lvvit_m")


def test_published_files_show_their_model_by_their_shapes(tmp_path):
    torch.manual_seed(0)
    source = create_model(ModelConfig(name="lvvit_t", num_classes=3, image_size=64))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "t.pth")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "t.safetensors")
    for file, name in [("t.pth", None), ("t.safetensors", "lvvit_t")]:
        found = load_model(tmp_path / file, name=name)
        assert found.name == "lvvit_t"
        assert same_weights(found.model, source)
        assert (found.recipe, found.class_names) == (None, None)


def test_files_that_show_no_model_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not show which model .*, e.g. --model resnet50"):
        load_model(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth is none of lvvit_t, .*: it has no head.bias"):
        load_model(tmp_path / "w.pth", name="lvvit_s")


def test_a_torn_safetensors_file_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match="w.safetensors is torn or not a safetensors file"):
        load_model(tmp_path / "w.safetensors")


def test_averaged_weights_that_are_not_there_are_not_replaced_by_raw_ones(tmp_path):
    save(checkpoint_of(new_model()), tmp_path / "a.pt")
    assert load_model(tmp_path / "a.pt").report.weights == "raw"
    with pytest.raises(ValueError, match="a.pt holds no averaged weights; take the raw ones"):
        load_model(tmp_path / "a.pt", ema=True)
