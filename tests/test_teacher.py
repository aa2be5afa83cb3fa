"""Dense teachers: each cell says what the model would, with the weights that were asked for."""

import argparse
import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from timm.layers.std_conv import (
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import Tensor, nn

from tokenlabel.labeler.teacher import (
    Teacher,
    as_teacher,
    fold_standardization,
    load_teacher,
    load_timm,
    read_weights,
    resolve_device,
    round_to_stride,
)
from tokenlabel.trainer.checkpoint import Checkpoint, save
from tokenlabel.trainer.recipe import parse_recipe, to_toml

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def create(name: str, **options) -> Any:
    """Make a timm model with random weights."""
    return timm.create_model(name, **options)


def dense_teacher(model: nn.Module, **options) -> Teacher:
    return as_teacher(model, name="a_model", device=CPU, **options)


def normalized(images: Tensor, model: Any) -> Tensor:
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


@torch.inference_mode()
def own_logits(model: Any, images: Tensor) -> Tensor:
    return model.eval()(normalized(images, model))


@torch.inference_mode()
def own_features(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(normalized(images, model))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4 * wanted.std(), wanted.std()


# ---------------------------------------------------------------------- what the dense logits are


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {}),
        ("dm_nfnet_f0", {"depths": (1, 1, 1, 1)}),
        ("tf_efficientnet_lite0", {}),
        ("regnety_002", {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "strict_img_size": False}),
    ],
)
def test_with_a_linear_head_the_mean_over_cells_is_the_models_own_output(name, options):
    model = create(name, **options)
    images = torch.rand(2, 3, 64, 96)
    wanted = own_logits(model, images)
    dense = dense_teacher(model, image_size=64).dense(images)
    assert dense.shape == (2, 1000, 2, 3)
    assert_close(dense.mean((2, 3)), wanted)


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilenetv3_small_050"])
def test_a_head_that_is_not_linear_sees_each_cell_as_a_whole_image(name):
    model = create(name)
    teacher = dense_teacher(model, image_size=64)
    images = torch.rand(2, 3, 64, 96)
    features, dense = own_features(model, images), teacher.dense(images)
    with torch.inference_mode():
        for row in range(2):
            for col in range(3):
                cell = features[:, :, row : row + 1, col : col + 1]
                assert_close(dense[:, :, row, col], model.forward_head(cell))


def test_where_all_cells_agree_any_head_gives_the_models_own_output():
    model = create("test_convnext")
    teacher = dense_teacher(model)
    feature = torch.randn(1, model.num_features, 1, 1).expand(1, -1, 2, 3)
    with torch.inference_mode():
        wanted = model.forward_head(feature)
    cells = feature.permute(0, 2, 3, 1)
    assert_close(teacher.classify(cells).mean((1, 2)), wanted)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_clip_224"])
def test_patch_tokens_take_the_class_tokens_place(name):
    model = create(name, depth=2, dynamic_img_size=True)
    teacher = dense_teacher(model, image_size=32)
    images = torch.rand(2, 3, 32, 64)
    tokens = own_features(model, images)[:, 1:]
    wanted = model.head(tokens).transpose(1, 2).reshape(2, 1000, 2, 4)
    assert_close(teacher.dense(images), wanted)


def test_patch_tokens_pass_the_norm_that_follows_mean_pooling():
    model = create("test_vit", global_pool="avg", dynamic_img_size=True)
    nn.init.normal_(model.fc_norm.weight)
    teacher = dense_teacher(model, image_size=32)
    images = torch.rand(2, 3, 32, 64)
    tokens = own_features(model, images)[:, model.num_prefix_tokens :]
    wanted = model.head(model.fc_norm(tokens)).transpose(1, 2).reshape(2, 1000, 2, 4)
    assert_close(teacher.dense(images), wanted)


def test_attention_pooling_collects_one_patch_token():
    model = create("test_vit", global_pool="map", class_token=False)
    nn.init.normal_(model.attn_pool.latent)
    teacher = dense_teacher(model)
    images = torch.rand(1, 3, 160, 160)
    tokens = own_features(model, images)
    wanted = torch.cat([model.forward_head(tokens[:, i : i + 1]) for i in range(100)])
    assert_close(teacher.dense(images)[0].flatten(1).T, wanted)


def test_both_heads_of_a_distilled_transformer_read_the_patch_token():
    model = create("deit_tiny_distilled_patch16_224", depth=2, dynamic_img_size=True)
    teacher = dense_teacher(model)
    images = torch.rand(1, 3, 32, 64)
    tokens = own_features(model, images)[:, 2:]
    wanted = (model.head(tokens) + model.head_dist(tokens)) / 2
    assert_close(teacher.dense(images), wanted.transpose(1, 2).reshape(1, 1000, 2, 4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("deit_tiny_patch16_224", {"depth": 2, "dynamic_img_size": True}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "strict_img_size": False}),
        ("mambaout_femto", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_a_change_in_a_corner_of_the_image_shows_in_that_corner_of_the_map(name, options):
    teacher = dense_teacher(create(name, **options), image_size=128)
    images = torch.rand(1, 3, 128, 256)
    changed = images.clone()
    changed[:, :, :32, -32:] = torch.rand(3, 32, 32)
    change = (teacher.dense(changed) - teacher.dense(images)).norm(dim=1)[0]
    row, col = divmod(int(change.argmax()), change.shape[1])
    rows, cols = change.shape
    assert row < rows / 2 and col >= cols * 3 / 4


def test_bytes_and_fractions_of_one_image_get_the_same_logits():
    teacher = dense_teacher(create("test_resnet"))
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    assert_close(teacher.dense(images.float() / 255), teacher.dense(images))


def test_half_precision_changes_features_a_little_and_leaves_the_head_alone():
    model = create("test_efficientnet")
    images = torch.rand(2, 3, 64, 64)
    exact = dense_teacher(model).dense(images)
    teacher = dense_teacher(model, precision="bf16")
    logits = teacher.dense(images)
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - exact).abs().max() / exact.std() < 0.2
    cells = teacher.cells(images)
    assert cells.dtype == torch.bfloat16
    assert torch.equal(teacher.classify(cells), teacher.classify(cells.float()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (StdConv2d, {}),
        (StdConv2d, {"bias": True, "groups": 2}),
        (StdConv2dSame, {"stride": 2}),
        (ScaledStdConv2d, {"stride": 2, "padding": 1}),
        (ScaledStdConv2dSame, {"stride": 2, "gamma": 1.7}),
        (ScaledStdConv2dSame, {"dilation": 2}),
    ],
)
def test_convolutions_with_weights_standardised_once_give_the_same(kind, options):
    model: Any = nn.Sequential(kind(4, 6, 3, **options))
    if hasattr(model[0], "gain"):
        nn.init.normal_(model[0].gain)
    images = torch.randn(2, 4, 9, 12)
    with torch.inference_mode():
        wanted = model(images)
        fold_standardization(model)
        assert not isinstance(model[0], kind)
        assert_close(model(images), wanted)


# ----------------------------------------------------------------------- what the model is like


def test_size_and_normalisation_come_from_the_models_own_configuration():
    config = timm.get_pretrained_cfg("dm_nfnet_f6")
    assert config is not None
    teacher = dense_teacher(create("test_nfnet", pretrained_cfg_overlay=config.to_dict()))
    assert (teacher.image_size, teacher.stride) == (576, 32)
    assert teacher.mean == (0.485, 0.456, 0.406)
    assert teacher.interpolation == "bicubic"


def test_the_image_size_is_rounded_to_whole_cells():
    assert dense_teacher(create("test_resnet"), image_size=300).image_size == 288
    assert [round_to_stride(x, 32) for x in (1, 47, 48, 576)] == [32, 32, 64, 576]


def test_models_for_one_size_alone_say_so():
    assert dense_teacher(create("test_coatnet")).square_only
    assert not dense_teacher(create("test_resnet")).square_only
    assert not dense_teacher(create("test_vit", dynamic_img_size=True)).square_only


def test_a_transformer_is_loaded_so_that_it_takes_any_shape(tmp_path):
    weights = save_weights(tmp_path, create("test_vit"))
    teacher = load_teacher("test_vit", checkpoint=weights, image_size=96, device="cpu")
    assert not teacher.square_only
    assert teacher.dense(torch.rand(1, 3, 64, 128)).shape == (1, 1000, 4, 8)


def test_a_model_that_refuses_the_image_size_is_named_with_the_size():
    with pytest.raises(ValueError, match="a_model does not take images of 224x224 px"):
        dense_teacher(create("test_coatnet"), image_size=224)


def test_models_without_a_classifier_or_a_grid_are_refused():
    with pytest.raises(ValueError, match="a_model has no classifier"):
        dense_teacher(create("test_resnet", num_classes=0))
    with pytest.raises(ValueError, match=r"cannot be made dense: its features are \[1, 1, 256\]"):
        dense_teacher(create("pit_ti_224"))


def test_class_names_are_imagenets_or_come_with_the_weights():
    names = dense_teacher(create("test_resnet")).class_names
    assert names is not None and names[0] == "tench, Tinca tinca"
    own = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "an ant"}}
    model = create("test_resnet", num_classes=2, pretrained_cfg_overlay=own)
    assert dense_teacher(model).class_names == ["an ant", "n2"]
    assert dense_teacher(create("test_resnet", num_classes=2)).class_names is None


def test_devices_and_precisions_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="device 'gpu' cannot be used.*'cuda:N'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        resolve_device("cuda:99")
    model = create("test_resnet")
    with pytest.raises(ValueError, match="precision 'int8' is not one of auto, fp32, bf16, fp16"):
        dense_teacher(model, precision="int8")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        dense_teacher(model, precision="fp16")


def test_unknown_teachers_and_tags_are_refused_with_the_closest_names():
    with pytest.raises(ValueError, match="unknown teacher 'dm_nfnet_6'; did you mean.*dm_nfnet_f6"):
        load_teacher("dm_nfnet_6")
    with pytest.raises(ValueError, match="resnet50 has no weights 'in1k'.*resnet50.a1_in1k"):
        load_teacher("resnet50.in1k")


def test_without_a_network_the_error_says_to_give_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="weights of test_resnet could not be.*give --checkpoint"):
        load_teacher("test_resnet")


# ------------------------------------------------------------------------------------ checkpoints


def save_weights(folder: Path, model: nn.Module) -> Path:
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def small_model(**options) -> Any:
    return create("test_resnet", **options)


def load(path: Path) -> Teacher:
    return load_teacher("test_resnet", checkpoint=path, image_size=64, device="cpu")


@pytest.mark.parametrize(
    "nest",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.1)},
        lambda weights: {"state_dict_ema": weights, "state_dict": {"worse": torch.zeros(1)}},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"model": {f"_orig_mod.{n}": value for n, value in weights.items()}},
        lambda weights: {n: v for n, v in weights.items() if "num_batches_tracked" not in n},
    ],
    ids=["bare", "state_dict", "model", "ema", "module", "compiled", "old"],
)
def test_weights_are_found_however_they_were_saved(tmp_path, nest):
    model = small_model()
    images = torch.rand(1, 3, 64, 64)
    wanted = own_logits(model, images)
    torch.save(nest(model.state_dict()), tmp_path / "weights.pth")
    assert_close(load(tmp_path / "weights.pth").dense(images).mean((2, 3)), wanted)


def test_the_sha256_is_of_the_weights_and_not_of_the_file(tmp_path):
    model = small_model()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    shas = {load(tmp_path / name).weights_sha256 for name in ("weights.safetensors", "weights.pth")}
    assert len(shas) == 1
    weights["fc.bias"][3] += 1e-3
    torch.save(weights, tmp_path / "other.pth")
    assert load(tmp_path / "other.pth").weights_sha256 not in shas


def test_the_number_of_classes_is_read_off_the_checkpoint(tmp_path):
    assert load(save_weights(tmp_path, small_model(num_classes=7))).num_classes == 7


def test_weights_of_other_names_are_loaded_in_order_and_one_line_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = small_model()
    renamed = {
        f"layer_{i:03}.{name.rpartition('.')[2]}": value
        for i, (name, value) in enumerate(model.state_dict().items())
    }
    torch.save(renamed, tmp_path / "renamed.pth")
    images = torch.rand(1, 3, 64, 64)
    wanted = own_logits(model, images)
    assert_close(load(tmp_path / "renamed.pth").dense(images).mean((2, 3)), wanted)
    said = [record for record in caplog.messages if "loaded in that order" in record]
    assert len(said) == 1 and f"{len(renamed)} tensors" in said[0]


def test_weights_of_other_names_in_another_order_are_refused(tmp_path):
    weights = list(small_model().state_dict().items())
    weights[1], weights[2] = weights[2], weights[1]  # weight and bias of one norm, of one shape
    renamed = {f"layer_{i}.{n.rpartition('.')[2]}": v for i, (n, v) in enumerate(weights)}
    torch.save(renamed, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match="is not of this architecture"):
        load(tmp_path / "renamed.pth")


def test_missing_and_unknown_tensors_are_named(tmp_path):
    weights = small_model().state_dict()
    weights["surprise"] = weights.pop("fc.bias")
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"1 tensors are missing \(fc.bias\), 1 are unknown to it \(surprise\)"
    ):
        load(tmp_path / "weights.pth")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not of this architecture.*name the model"):
        load(save_weights(tmp_path, create("test_efficientnet")))


def test_tensors_of_another_shape_are_named_with_both_shapes(tmp_path):
    weights = small_model().state_dict()
    weights["bn1.weight"] = torch.zeros(5)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"bn1.weight is \(5,\) instead of \("):
        load(tmp_path / "weights.pth")


# ------------------------------------------------------------------------ checkpoints of tl-train

RECIPE = """
[model]
name = "{name}"
num_classes = 3
image_size = {size}
kwargs = {kwargs}
[augment]
mean = [0.5, 0.4, 0.3]
std = [0.1, 0.2, 0.3]
[evaluation]
interpolation = "bilinear"
"""


def save_trained(
    path: Path,
    model: Any,
    *,
    name: str = "test_resnet",
    size: str = "96",
    kwargs: str = "{}",
    **more,
) -> Path:
    """Write a checkpoint with the trainer's own functions."""
    recipe = parse_recipe(RECIPE.format(name=name, size=size, kwargs=kwargs))
    checkpoint = Checkpoint(
        recipe=to_toml(recipe),
        class_ids=["n1", "n2", "n3"],
        class_names=["an ant", "a bee", "n3"],
        grid=(3, 3),
        step=7,
        model=model.state_dict(),
        **more,
    )
    save(checkpoint, path)
    return path


def without_first_bias(model: Any) -> dict[str, Tensor]:
    """Other weights of the same model."""
    return {name: value * (name != "fc.bias") for name, value in model.state_dict().items()}


def test_a_teacher_that_was_trained_here_sees_and_names_things_as_in_training(tmp_path):
    path = save_trained(tmp_path / "best.pt", small_model(num_classes=3))
    teacher = load_teacher("test_resnet", checkpoint=path, device="cpu")
    assert (teacher.num_classes, teacher.image_size, teacher.interpolation) == (3, 96, "bilinear")
    assert (teacher.mean, teacher.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert teacher.class_ids == ["n1", "n2", "n3"]
    assert teacher.class_names == ["an ant", "a bee", "n3"]
    assert (
        load_teacher("test_resnet", checkpoint=path, image_size=64, device="cpu").image_size == 64
    )


@pytest.mark.parametrize(
    ("has_average", "best", "ema", "kind", "said"),
    [
        (True, None, None, "ema", "averaged"),
        (False, None, None, "raw", "raw"),
        (True, {"step": 7, "weights": "raw"}, None, "raw", "raw"),
        (True, {"step": 7, "weights": "ema"}, None, "ema", "averaged"),
        (True, {"step": 5, "weights": "raw"}, None, "ema", "averaged"),
        (True, None, False, "raw", "raw"),
    ],
)
def test_the_better_weights_are_taken_and_one_line_says_which(
    tmp_path, caplog, has_average, best, ema, kind, said
):
    caplog.set_level(logging.INFO)
    model = small_model(num_classes=3)
    nn.init.ones_(model.fc.bias)
    average = without_first_bias(model) if has_average else None
    path = save_trained(tmp_path / "best.pt", model, ema=average, best=best)
    loaded = load_timm("test_resnet", checkpoint=path, ema=ema)
    assert loaded.weights == kind
    assert loaded.model.get_parameter("fc.bias").sum() == (0 if kind == "ema" else 3)
    assert f"best.pt: taking the {said} weights of step 7 of test_resnet" in caplog.text


def test_a_trained_model_is_built_with_the_arguments_and_the_size_of_its_recipe(tmp_path):
    options: dict[str, Any] = {"num_classes": 3, "class_token": False, "global_pool": "avg"}
    model = create("test_vit", img_size=96, **options)
    kwargs = '{ class_token = false, global_pool = "avg" }'
    path = save_trained(tmp_path / "best.pt", model, name="test_vit", kwargs=kwargs)
    loaded = load_timm("test_vit", checkpoint=path)
    images = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        assert_close(loaded.model.eval()(images), model.eval()(images))


def test_the_dense_head_of_a_student_is_left_out_of_a_teacher(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = small_model(num_classes=3)
    path = tmp_path / "best.pt"
    with_head = small_model(num_classes=3)
    with_head.aux_head = nn.Linear(4, 3)
    save_trained(path, with_head)
    weights = load_timm("test_resnet", checkpoint=path).model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert "its class head labels the cells, its dense head is left out" in caplog.text


def test_a_checkpoint_that_was_trained_as_another_model_is_refused_by_name(tmp_path):
    path = save_trained(tmp_path / "best.pt", small_model(num_classes=3), name="lvvit_t")
    with pytest.raises(ValueError, match="best.pt was trained as lvvit_t, not as test_resnet"):
        load(path)


def test_a_checkpoint_of_tl_train_that_lacks_something_is_refused(tmp_path):
    path = save_trained(tmp_path / "best.pt", small_model(num_classes=3))
    content = torch.load(path, weights_only=True)
    for name in ("recipe", "ema", "class_ids"):
        torch.save({key: value for key, value in content.items() if key != name}, path)
        with pytest.raises(ValueError, match=f"best.pt lacks what tl-train writes: '{name}'"):
            load(path)


class _Payload:
    """Unpickling this would make the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": _Payload(tmp_path / "was_run")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds Python objects besides tensors"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "was_run").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder; give the file in it"):
        read_weights(tmp_path)
    (tmp_path / "text.pth").write_text("these are no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("these are no weights")
    for name in ("text.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_weights(tmp_path / name)


def test_a_torn_checkpoint_is_refused(tmp_path):
    path = save_weights(tmp_path, small_model())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="weights.pth is damaged"):
        read_weights(path)


def test_checkpoints_that_hold_something_else_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no weights but list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "dict.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors \(epoch, optimizer\)"):
        read_weights(tmp_path / "dict.pth")
