"""Any timm classifier as a student: names, heads, mixing, published weights, use as a teacher."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed
from click.testing import CliRunner
from loop_runs import fixed_data
from PIL import Image
from shard_sets import NUM_CLASSES, make_samples, noise, write_split
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from tokenlabel import cli
from tokenlabel.trainer import run_log
from tokenlabel.trainer.checkpoint import load_weights, read
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.loop import fit, resolve
from tokenlabel.trainer.mix_token import MixBox, sample_box
from tokenlabel.trainer.models import (
    MODELS,
    create_model,
    guess_name,
    predict,
    pretrained_facts,
)
from tokenlabel.trainer.models.token_labeled import TokenLabeled
from tokenlabel.trainer.recipe import ModelConfig, load_recipe, parse_recipe

HERE = Place(device=torch.device("cpu"))
SWIN = dict(embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4)
DISTILLED = dict(embed_dim=24, depth=1, num_heads=2)
BACKBONES: dict[str, dict[str, Any]] = {
    "test_vit": {},
    "deit_tiny_distilled_patch16_224": DISTILLED,
    "swin_tiny_patch4_window7_224": SWIN,
    "test_convnext": {},
    "test_resnet": {},
    "test_efficientnet": {},
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """One thread, as the tensors are tiny; no pictures, as they would take most of the time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)


def config(
    name: str, *, image_size: Any = 64, kwargs: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    values: dict[str, Any] = {"num_classes": 5, "drop_path": 0.0} | changes
    kwargs = BACKBONES.get(name, {}) | (kwargs or {})
    return ModelConfig(name=name, image_size=image_size, kwargs=kwargs, **values)


def new_model(name: str, *, seed: int = 0, dense: bool = True, **changes) -> TokenLabeled:
    torch.manual_seed(seed)
    model = create_model(config(name, **changes), dense=dense)
    assert isinstance(model, TokenLabeled)
    return model


def new_volo(*, image_size: int = 32, seed: int = 0) -> TokenLabeled:
    torch.manual_seed(seed)
    backbone = VOLO(
        [1, 1, 1, 1], img_size=image_size, num_classes=5, embed_dims=[8, 16, 16, 16],
        num_heads=[2, 2, 2, 2], stem_hidden_dim=8, post_layers=("ca",),
    )  # fmt: skip
    return TokenLabeled(backbone, image_size=(image_size, image_size))


def images(num: int = 4, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


def without_randomness(model: Any) -> Any:
    """Training mode, but for dropout and batch norm."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return model


# -------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("name", BACKBONES)
def test_the_class_head_is_timms_own_and_every_cell_gets_an_answer(name):
    model = new_model(name)
    stride = 64 // model.grid[0]
    assert model.grid == (64 // stride, 64 // stride)
    batch = images()
    class_logits, aux_logits, box = without_randomness(model)(batch)
    assert box is None
    torch.testing.assert_close(class_logits, model.backbone(batch))
    assert aux_logits.shape == (4, model.grid[0] * model.grid[1], 5)
    shown_class_logits, shown_aux_logits = predict(model.eval(), batch)
    torch.testing.assert_close(model(batch), shown_class_logits)
    torch.testing.assert_close(aux_logits, shown_aux_logits)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("test_resnet", "fc"),
        ("test_byobnet", "head.fc"),
        ("swin_tiny_patch4_window7_224", "head.fc"),
    ],
)
def test_a_dense_head_with_the_classifiers_weights_says_of_cells_what_they_add_to_the_whole(
    name, classifier
):
    model = new_model(name).eval()
    backbone: Any = model.backbone
    backbone.aux_head.load_state_dict(backbone.get_submodule(classifier).state_dict())
    class_logits, aux_logits = model.predict(images())
    assert aux_logits is not None
    torch.testing.assert_close(aux_logits.mean(1), class_logits, rtol=1e-4, atol=1e-5)


def test_a_cell_answers_for_its_own_part_of_the_image():
    model = new_model("test_resnet", image_size=128).eval()
    batch = images(1, 128)
    changed = batch.clone()
    changed[:, :, 96:, 96:] += 5
    before, after = (predict(model, x)[1] for x in (batch, changed))
    assert before is not None and after is not None
    difference = (after - before).abs().sum(-1).view(model.grid)
    assert difference.argmax() == difference.numel() - 1


def test_an_oblong_image_has_an_oblong_grid():
    assert new_model("test_vit", image_size=(32, 64)).grid == (2, 4)
    assert new_model("test_resnet", image_size=(96, 32)).grid == (3, 1)


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_have_timms_names_and_a_dense_head_only_where_it_is_taught(name):
    own = set(timm.create_model(name, num_classes=5, **BACKBONES[name]).state_dict())
    assert set(new_model(name).state_dict()) - own == {"aux_head.weight", "aux_head.bias"}
    bare = new_model(name, dense=False)
    assert set(bare.state_dict()) == own
    assert bare.train()(images())[1] is None


def test_copies_and_state_dicts_hold_the_same_weights():
    model, other = new_model("test_vit", seed=1), new_model("test_vit", seed=2)
    twin = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
        assert torch.equal(value, other.state_dict()[name]), name
    assert twin.backbone is not model.backbone


def test_what_weight_decay_must_spare_is_named_as_the_optimizer_sees_it():
    model = new_model("test_vit")
    spared = model.no_weight_decay()
    assert "backbone.pos_embed" in spared
    assert "backbone.pos_embed" in dict(model.named_parameters())
    assert new_model("test_resnet").no_weight_decay() == set()


def test_volos_own_dense_head_is_used_and_can_be_silenced():
    model = new_volo()
    backbone: Any = model.backbone
    batch = images(3, 32)
    _, expected, _ = without_randomness(backbone).forward_train(batch)
    class_logits, aux_logits, _ = model(batch)
    torch.testing.assert_close(aux_logits, expected)
    whole = class_logits + 0.5 * aux_logits.amax(1)
    torch.testing.assert_close(model.eval()(batch), whole)
    model.silence_dense_head(zero=True)
    torch.testing.assert_close(model(batch), class_logits)
    assert not any(p.requires_grad for p in backbone.aux_head.parameters())


WITH_BATCH_NORM_IN_ITS_HEAD = "mobilenetv4_conv_small_035"


@pytest.mark.parametrize("name", ["test_mambaout", WITH_BATCH_NORM_IN_ITS_HEAD, "hrnet_w18_small"])
def test_unusual_networks_have_a_grid_that_tiles_the_image(name):
    model = without_randomness(new_model(name))
    class_logits, aux_logits, _ = model(images(), MixBox(0, 0, 1, 1, model.grid))
    assert model.grid == (2, 2)
    assert aux_logits.shape == (4, 4, 5)
    (class_logits.sum() + aux_logits.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_batch_norm_on_the_way_to_the_classifier_sees_whole_images_only():
    model = new_model(WITH_BATCH_NORM_IN_ITS_HEAD).train()
    plain = new_model(WITH_BATCH_NORM_IN_ITS_HEAD, dense=False).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "aux_head" not in k})
    model(images())
    plain(images())
    norm = "norm_head.running_mean"
    assert model.state_dict()[norm].abs().sum() > 0
    torch.testing.assert_close(model.state_dict()[norm], plain.state_dict()[norm])


# ---------------------------------------------------------------------------------- new heads


def first_loss(model: Any, batch: Tensor) -> tuple[float, float]:
    """Mean cross-entropy of both heads over all classes."""
    class_logits, aux_logits, _ = model.train()(batch)
    values = [-logits.log_softmax(-1).mean().item() for logits in (class_logits, aux_logits)]
    return values[0], values[1]


@pytest.mark.parametrize("name", [*BACKBONES, "tf_efficientnet_lite0", "rexnet_100", "lvvit_t"])
def test_losses_of_new_heads_begin_near_the_logarithm_of_the_class_count(name):
    torch.manual_seed(0)
    model = create_model(config(name, num_classes=4))
    assert first_loss(model, images()) == pytest.approx((math.log(4), math.log(4)), abs=0.15)


@pytest.mark.parametrize("num_classes", [1000, 4])
def test_heads_that_begin_narrow_enough_are_left_as_timm_draws_them(num_classes):
    torch.manual_seed(5)
    theirs = timm.create_model("test_resnet", num_classes=num_classes).state_dict()
    ours = new_model("test_resnet", seed=5, num_classes=num_classes).state_dict()
    assert torch.equal(theirs["fc.weight"], ours["fc.weight"])


def test_a_head_that_comes_with_published_weights_is_kept_however_wide(tmp_path):
    weights = timm.create_model("test_efficientnet", num_classes=9).state_dict()
    weights["classifier.weight"] *= 100
    torch.save(weights, tmp_path / "published.pt")
    kwargs = overlay(tmp_path / "published.pt")
    kept = create_model(config("test_efficientnet", num_classes=9, kwargs=kwargs), pretrained=True)
    assert torch.equal(kept.state_dict()["classifier.weight"], weights["classifier.weight"])
    new = create_model(config("test_efficientnet", num_classes=4, kwargs=kwargs), pretrained=True)
    assert new.state_dict()["classifier.weight"].std() < 0.02
    assert torch.equal(new.state_dict()["conv_stem.weight"], weights["conv_stem.weight"])


# ----------------------------------------------------------------------------------- MixToken


def swapped(maps: Tensor, box: MixBox) -> Tensor:
    """Swap a box of (b, d, h, w) maps between partners, cell by cell."""
    result = maps.clone()
    tall, wide = maps.shape[2] // box.grid[0], maps.shape[3] // box.grid[1]
    for row in range(box.top, box.bottom):
        for col in range(box.left, box.right):
            place = slice(row * tall, (row + 1) * tall), slice(col * wide, (col + 1) * wide)
            for i in range(len(maps)):
                result[i, :, *place] = maps[len(maps) - 1 - i, :, *place]
    return result


def swapped_logits(logits: Tensor, box: MixBox) -> Tensor:
    maps = logits.transpose(1, 2).unflatten(2, box.grid)
    return swapped(maps, box).flatten(2).transpose(1, 2)


def with_mixed_embedding(model: TokenLabeled, mixed: Callable[[Tensor], Tensor], batch: Tensor):
    """Run a model whose patch embedding's output is changed."""
    embedding: Any = model.backbone.patch_embed
    hook = embedding.register_forward_hook(lambda module, inputs, output: mixed(output))
    try:
        return model(batch)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_swapping_the_pixels_of_whole_patches_is_swapping_their_embeddings(name):
    model, batch = without_randomness(new_model(name)), images()
    box = MixBox(1, 0, 3, 3, (4, 4))

    def mixed(tokens: Tensor) -> Tensor:
        if tokens.ndim == 4:  # (b, rows, cols, d), from a ViT that takes any size
            return swapped_logits(tokens.flatten(1, 2), box).unflatten(1, box.grid)
        return swapped_logits(tokens, box)

    class_logits, aux_logits, given = model(batch, box)
    expected_class, expected_aux, _ = with_mixed_embedding(model, mixed, batch)
    assert given is box
    torch.testing.assert_close(class_logits, expected_class)
    torch.testing.assert_close(aux_logits, swapped_logits(expected_aux, box))
    assert not torch.allclose(class_logits, model(batch)[0])


def test_volo_swaps_embeddings_and_not_pixels_for_its_stem_looks_across_patches():
    model, batch = without_randomness(new_volo(image_size=64)), images()
    box = MixBox(1, 0, 3, 3, (4, 4))
    class_logits, aux_logits, _ = model(batch, box)
    expected_class, expected_aux, _ = with_mixed_embedding(
        model, lambda maps: swapped(maps, box), batch
    )
    torch.testing.assert_close(class_logits, expected_class)
    torch.testing.assert_close(aux_logits, swapped_logits(expected_aux, box))
    by_pixels = model(swapped(batch, box))[0]
    assert not torch.allclose(class_logits, by_pixels)


def test_a_cnn_mixes_pixels_and_every_cell_still_answers_for_its_own_image():
    model, batch = without_randomness(new_model("test_resnet", image_size=128)), images(5, 128)
    box = MixBox(0, 1, 2, 4, (4, 4))
    class_logits, aux_logits, _ = model(batch, box)
    expected_class, expected_aux, _ = model(swapped(batch, box))
    torch.testing.assert_close(class_logits, expected_class)
    torch.testing.assert_close(aux_logits, swapped_logits(expected_aux, box))


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "convnxt_tiny"}, "unknown model 'convnxt_tiny'; did you mean convnext_tiny"),
        ({"name": "lvvit_x"}, "unknown model 'lvvit_x'; did you mean lvvit_.*known: lvvit_t, "),
        ({"name": "resnet18.mine"}, "resnet18 has no weights 'mine'; known: resnet18.a1_in1k, "),
        ({"name": "vgg11", "drop_path": 0.1}, "vgg11 has no stochastic depth; --set model.drop_p"),
        ({"name": "test_resnet", "kwargs": {"dept": 3}}, "does not build test_resnet.*'dept'"),
        ({"name": "test_resnet", "image_size": 80}, "multiple of 32, .*--set labels.dense_weig"),
        ({"name": "test_vit", "image_size": 8}, "'test_vit'"),
        ({"name": "test_resnet", "num_classes": 0}, "model.num_classes = 0 stands for"),
        ({"name": "cait_xxs24_224", "grad_checkpointing": True, "kwargs": {"depth": 1}}, None),
        ({"name": "dla46_c", "grad_checkpointing": True}, "model.grad_checkpointing = true: dla46"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_built_say_why(changes, message):
    if message is None:
        create_model(config(**changes))
        return
    with pytest.raises(ValueError, match=message):
        create_model(config(**changes))


def test_without_a_dense_head_any_size_and_any_features_will_do():
    model = new_model("test_resnet", image_size=(80, 70), dense=False)
    assert model.train()(torch.zeros(2, 3, 80, 70))[0].shape == (2, 5)
    assert model.grid == (2, 2)


# ------------------------------------------------------------------------- published weights


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file as timm downloads it, of a ResNet with 9 classes."""
    torch.manual_seed(3)
    path = tmp_path / "published.pt"
    torch.save(timm.create_model("test_resnet", num_classes=9).state_dict(), path)
    return path


def overlay(path: Path) -> dict[str, Any]:
    return {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 9}}


@pytest.mark.parametrize("num_classes", [9, 5])
def test_published_weights_are_the_start_and_heads_of_another_class_count_are_new(
    published, num_classes
):
    wanted = config("test_resnet", num_classes=num_classes, kwargs=overlay(published))
    found = create_model(wanted, pretrained=True).state_dict()
    expected = torch.load(published, weights_only=True)
    same = {name for name in expected if torch.equal(expected[name], found[name])}
    heads = set() if num_classes == 9 else {"fc.weight", "fc.bias"}
    assert set(expected) - same == heads
    fresh = create_model(wanted).state_dict()
    assert not torch.equal(fresh["conv1.0.weight"], expected["conv1.0.weight"])


def test_weights_that_cannot_be_had_are_one_clear_error(tmp_path):
    wanted = config("test_resnet", kwargs=overlay(tmp_path / "no.pt"))
    with pytest.raises(OSError, match="weights of test_resnet could not be loaded .*give --init"):
        create_model(wanted, pretrained=True)


def test_a_run_begins_with_published_weights_once_and_not_again_when_resumed(published, tmp_path):
    recipe = recipe_of(
        "test_resnet",
        "schedule.duration=1 steps",
        "schedule.warmup=0 steps",
        "optim.lr=1e-12",
        "schedule.min_lr=0",
    )
    model = replace(recipe.model, pretrained=True, kwargs=overlay(published))
    recipe = replace(recipe, model=model)
    fit(recipe, fixed_data(), tmp_path / "run", HERE)
    found = read(tmp_path / "run" / "checkpoints" / "last.pt").model
    expected = torch.load(published, weights_only=True)["conv1.0.weight"]
    torch.testing.assert_close(found["conv1.0.weight"], expected, rtol=0, atol=1e-6)
    published.unlink()
    assert fit(recipe, fixed_data(), tmp_path / "run", HERE, resume=True).step == 1
    with pytest.raises(ValueError, match="--init x.pt and model.pretrained = true both give"):
        fit(recipe, fixed_data(), tmp_path / "other", HERE, init=Path("x.pt"))


def test_published_weights_bring_their_normalisation_unless_the_recipe_has_one(tmp_path):
    index = write_split(tmp_path, make_samples(["a"]))
    facts = pretrained_facts("test_resnet")
    assert facts["mean"] == (0.5, 0.5, 0.5) and facts["num_classes"] == 1000
    overrides = ["model.name=test_resnet", "model.pretrained=true"]
    assert resolve(load_recipe("class_labels", overrides), index).augment.mean == (0.5, 0.5, 0.5)
    overrides.append("augment.mean=[0.1,0.1,0.1]")
    assert resolve(load_recipe("class_labels", overrides), index).augment.mean == (0.1, 0.1, 0.1)
    unpretrained = load_recipe("class_labels", ["model.name=test_resnet"])
    assert resolve(unpretrained, index).augment == unpretrained.augment


def test_a_recipe_may_leave_the_class_count_to_the_data(tmp_path):
    index = write_split(tmp_path, make_samples(["a"]))
    recipe = load_recipe("class_labels")
    assert recipe.model.num_classes == 0
    assert resolve(recipe, index).model.num_classes == NUM_CLASSES
    assert (
        resolve(load_recipe("class_labels", ["model.num_classes=7"]), index).model.num_classes == 7
    )


@pytest.mark.parametrize("name", MODELS)
def test_published_files_of_our_models_show_which_they_are(name):
    with torch.device("meta"):
        weights = timm.create_model(name, img_size=32, num_classes=2).state_dict()
    assert guess_name(weights) == name


def test_files_of_other_models_show_nothing():
    assert guess_name(new_model("test_vit").state_dict()) is None
    assert guess_name({}) is None


# ------------------------------------------------------------------------------------ training


def recipe_of(name: str, *overrides: str) -> Any:
    return parse_recipe(
        f"""
        [model]
        name = "{name}"
        num_classes = {NUM_CLASSES}
        image_size = 64
        drop_path = 0.0
        [optim]
        batch_size = 4
        lr = 1e-3
        lr_batch_size = 4
        [schedule]
        duration = "6 steps"
        warmup = "1 steps"
        cooldown = "0 steps"
        [run]
        log_every = "1 steps"
        checkpoint_every = "3 steps"
        """,
        overrides,
    )


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_run_on_token_labels_learns_and_resumes_to_the_same_bits(name, tmp_path):
    recipe = recipe_of(name)
    fit(recipe, fixed_data(), tmp_path / "run", HERE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[-1]["dense_loss"] < lines[0]["dense_loss"]
    folder = tmp_path / "run" / "checkpoints"
    whole = read(folder / "last.pt")
    (folder / "last.pt").unlink()
    (folder / "step-6.pt").unlink()
    fit(recipe, fixed_data(), tmp_path / "run", HERE, resume=True)
    again = read(folder / "last.pt")
    assert again.step == whole.step == 6
    assert all(torch.equal(whole.model[name], again.model[name]) for name in whole.model)


STUDENTS: dict[str, Callable[[bool], Any]] = {
    name: lambda dense, name=name: new_model(name, dense=dense)
    for name in (*BACKBONES, WITH_BATCH_NORM_IN_ITS_HEAD)
}
STUDENTS["volo"] = lambda dense: new_volo(image_size=64)
STUDENTS["lvvit_t"] = lambda dense: create_model(
    config("lvvit_t", kwargs={"embed_dim": 16, "depth": 2, "num_heads": 2, "stem_width": 4})
)
STUDENTS["t2t_vit_14"] = lambda dense: create_model(
    config("t2t_vit_14", kwargs={"embed_dim": 16, "depth": 2, "num_heads": 2, "token_dim": 16})
)


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory) -> Iterator[None]:
    """A group of one: DistributedDataParallel does in it whatever it does in a larger one."""
    meeting = f"file://{tmp_path_factory.mktemp('group')}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "class-labels"])
@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_trains_under_distributed_data_parallel_in_bf16(name, dense):
    torch.manual_seed(0)
    model = STUDENTS[name](dense)
    if not dense:
        model.silence_dense_head(zero=True)
    trained = DistributedDataParallel(model.train())
    for step in range(2):  # the second fails if the first has left a parameter without a gradient
        box = sample_box(model.grid, np.random.default_rng(step))
        with torch.autocast("cpu", torch.bfloat16):
            class_logits, aux_logits, _ = trained(images(), box)
        loss = -class_logits.float().log_softmax(-1)[..., 0].mean()
        if dense:
            loss = loss - aux_logits.float().log_softmax(-1)[..., 0].mean()
        assert loss.isfinite()
        loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.usefixtures("_process_group")
def test_distributed_data_parallel_would_notice_a_parameter_without_a_gradient():
    model: Any = new_model("test_vit")
    model.unused = nn.Linear(2, 2)
    trained = DistributedDataParallel(model.train())
    trained(images())[0].sum().backward()
    with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
        trained(images())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "volo"])
def test_a_compiled_student_computes_the_same_and_is_compiled_once_whatever_the_box(name):
    model = without_randomness(STUDENTS[name](True))
    boxes = [sample_box(model.grid, np.random.default_rng(i)) for i in range(3)]
    expected = [model(images(), box)[:2] for box in boxes]
    counter = CompileCounterWithBackend("inductor")
    model.forward_train = torch.compile(model.forward_train, backend=counter)
    found, counts = [], []
    for box in boxes:
        found.append(model(images(), box)[:2])
        counts.append(counter.frame_count)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counts[0] > 0 and set(counts) == {counts[0]}


def test_weights_from_elsewhere_are_fitted_with_a_word_about_each_change(tmp_path):
    labels_only, taught = new_model("test_vit", dense=False), new_model("test_vit", seed=1)
    torch.save(labels_only.state_dict(), tmp_path / "bare.pt")
    torch.save(taught.state_dict(), tmp_path / "taught.pt")
    with pytest.raises(ValueError, match="missing: aux_head.weight, aux_head.bias"):
        load_weights(new_model("test_vit"), tmp_path / "bare.pt")
    report = load_weights(new_model("test_vit"), tmp_path / "bare.pt", new_heads=True)
    assert report.begun == ("aux_head.weight", "aux_head.bias")
    assert "aux_head.weight, aux_head.bias begun anew (not in the file)" in str(report)
    other = new_model("test_vit", dense=False)
    report = load_weights(other, tmp_path / "taught.pt", new_heads=True)
    assert "left out (the model has no dense head)" in str(report)
    assert torch.equal(other.state_dict()["head.weight"], taught.state_dict()["head.weight"])
    more = new_model("test_vit", num_classes=7)
    report = load_weights(more, tmp_path / "taught.pt", new_heads=True)
    assert set(report.dropped) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}


def test_position_embeddings_of_another_resolution_are_resized(tmp_path):
    for small, large in [
        (new_model("test_vit", image_size=32), new_model("test_vit", image_size=(64, 32))),
        (new_volo(image_size=32), new_volo(image_size=64)),
    ]:
        assert isinstance(small, TokenLabeled) and isinstance(large, TokenLabeled)
        torch.save(small.state_dict(), tmp_path / "small.pt")
        assert load_weights(large, tmp_path / "small.pt").resized == ("pos_embed",)
        found, source = large.state_dict()["pos_embed"], small.state_dict()["pos_embed"]
        assert found.shape != source.shape
        assert found.mean().item() == pytest.approx(source.mean().item(), abs=0.01)
        same = type(large)(copy.deepcopy(small.backbone), image_size=(32, 32))
        assert load_weights(same, tmp_path / "small.pt").resized == ()


def test_a_classifier_trained_on_class_labels_becomes_the_teacher_of_its_own_classes(tmp_path):
    data, photos, run = tmp_path / "shards", tmp_path / "photos", tmp_path / "run"
    data.mkdir()
    index = write_split(data, make_samples(f"t{i}" for i in range(6)))
    photos.mkdir()
    (photos / "classes.txt").write_text("\n".join(index.class_ids))
    for name in index.class_ids[:2]:
        (photos / name).mkdir(parents=True)
        Image.fromarray(noise(np.random.default_rng(0), 70, 64)).save(photos / name / "a.jpg")
    changes = ["model.name=test_resnet", "model.image_size=64", "optim.batch_size=4"]
    changes += ["schedule.duration=1 epochs", "schedule.warmup=0 steps", "run.workers=1"]
    words = ["run", "--recipe", "class_labels", "--data", str(data), "--out", str(run)]
    words += ["--val-split", "train", "--device", "cpu"]
    done = CliRunner().invoke(cli.train, words + [w for c in changes for w in ("--set", c)])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output
    assert f"num_classes = {NUM_CLASSES}" in (run / "recipe.toml").read_text()

    best = run / "checkpoints" / "best.pt"
    timm.create_model("test_resnet", num_classes=NUM_CLASSES).load_state_dict(read(best).model)
    words = ["generate", "--images", str(photos), "--out", str(tmp_path / "labels")]
    words += ["--teacher", "test_resnet", "--checkpoint", str(best), "--device", "cpu"]
    done = CliRunner().invoke(cli.label, words)
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "labels" / "index.json").read_text())
    assert made["num_classes"] == NUM_CLASSES
