"""LV-ViT against the published facts: names, shapes, counts, arithmetic."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from tokenlabel.trainer.mix_token import MixBox
from tokenlabel.trainer.models import MODELS, create_model
from tokenlabel.trainer.models.lvvit import LVViT, resize_pos_embed, unwrap_state_dict
from tokenlabel.trainer.recipe import ModelConfig

TINY: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2, stem_width=8)


def from_timm(name: str, **kwargs) -> Any:
    return timm.create_model(name, **kwargs)


def tiny(**kwargs) -> Any:
    torch.manual_seed(0)
    return LVViT(**TINY | dict(img_size=64, num_classes=5) | kwargs)


def expected_shapes(depth: int, dim: int, stem: int, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """The state dict of the published weights, spelled out from the architecture's table."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, num_tokens, dim),
    }
    for index, conv in enumerate([(stem, 3, 7, 7), (stem, stem, 3, 3), (stem, stem, 3, 3)], 1):
        shapes[f"patch_embed.conv{index}.weight"] = conv
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{index}.{name}"] = (stem,)
        shapes[f"patch_embed.bn{index}.num_batches_tracked"] = ()
    shapes["patch_embed.proj.weight"] = (dim, stem, 8, 8)
    shapes["patch_embed.proj.bias"] = (dim,)
    for block in (f"blocks.{index}." for index in range(depth)):
        shapes[block + "attn.qkv.weight"] = (3 * dim, dim)
        shapes[block + "attn.proj.weight"] = (dim, dim)
        shapes[block + "attn.proj.bias"] = (dim,)
        shapes[block + "mlp.fc1.weight"] = (3 * dim, dim)
        shapes[block + "mlp.fc1.bias"] = (3 * dim,)
        shapes[block + "mlp.fc2.weight"] = (dim, 3 * dim)
        shapes[block + "mlp.fc2.bias"] = (dim,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + name] = (dim,)
    for name in ("norm.weight", "norm.bias"):
        shapes[name] = (dim,)
    for name in ("head", "aux_head"):
        shapes[f"{name}.weight"] = (1000, dim)
        shapes[f"{name}.bias"] = (1000,)
    return shapes


@pytest.mark.parametrize(
    "name, depth, dim, heads, stem, divisor, num_parameters",
    [
        ("lvvit_t", 12, 240, 4, 64, 1, 8_534_720),
        ("lvvit_s", 16, 384, 6, 64, 2, 26_151_824),
        ("lvvit_m", 20, 512, 8, 64, 2, 55_830_544),
        ("lvvit_l", 24, 768, 12, 128, 3, 150_021_968),
    ],
)
def test_variants_have_the_published_names_shapes_and_parameter_counts(
    name, depth, dim, heads, stem, divisor, num_parameters
):
    with torch.device("meta"):
        model = from_timm(name, img_size=224)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected_shapes(depth, dim, stem, 1 + 14 * 14)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert all(block.attn.num_heads == heads for block in model.blocks)
    assert all(block.residual_divisor == divisor for block in model.blocks)


@pytest.mark.parametrize(
    "tag, side_px, crop_pct",
    [
        ("lvvit_t.in1k", 224, 0.9),
        ("lvvit_s.in1k_384", 384, 0.9),
        ("lvvit_m.in1k_448", 448, 1.0),
        ("lvvit_l.in1k_512", 512, 1.0),
    ],
)
def test_timm_knows_each_published_file_with_its_resolution(tag, side_px, crop_pct):
    with torch.device("meta"):
        model = from_timm(tag)
    assert model.grid == (side_px // 16, side_px // 16)
    assert model.pretrained_cfg["crop_pct"] == crop_pct
    assert model.pretrained_cfg["url"].startswith("https://github.com/zihangJiang/TokenLabeling/")


def test_evaluation_matches_a_slow_reference_written_out():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    w = model.state_dict()

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = images
    for index, (stride, pad) in enumerate([(2, 3), (1, 1), (1, 1)], 1):
        x = F.conv2d(x, w[f"patch_embed.conv{index}.weight"], stride=stride, padding=pad)
        x = x / math.sqrt(1 + 1e-5)  # batch norm as initialised: mean 0, variance 1
        x = x.clamp(min=0)
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.stack([x[:, :, i, j] for i in range(4) for j in range(4)], dim=1)
    x = torch.cat([w["cls_token"].repeat(2, 1, 1), x], dim=1) + w["pos_embed"]
    for block in ("blocks.0.", "blocks.1."):
        q, k, v = (norm(x, block + "norm1") @ w[block + "attn.qkv.weight"].T).split(32, dim=2)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = q[..., head] @ k[..., head].mT / math.sqrt(16)
            heads.append(scores.softmax(-1) @ v[..., head])
        attended = torch.cat(heads, -1) @ w[block + "attn.proj.weight"].T
        x = x + (attended + w[block + "attn.proj.bias"]) / 2
        hidden = norm(x, block + "norm2") @ w[block + "mlp.fc1.weight"].T
        hidden = hidden + w[block + "mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + (hidden @ w[block + "mlp.fc2.weight"].T + w[block + "mlp.fc2.bias"]) / 2
    x = norm(x, "norm")
    dense = x[:, 1:] @ w["aux_head.weight"].T + w["aux_head.bias"]
    expected = x[:, 0] @ w["head.weight"].T + w["head.bias"] + 0.5 * dense.max(dim=1).values
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_training_returns_both_heads_and_the_box():
    model = tiny(img_size=(32, 64)).train()
    box = MixBox(top=0, left=1, bottom=1, right=3, grid=model.grid)
    class_logits, aux_logits, returned = model(torch.randn(2, 3, 32, 64), box)
    assert class_logits.shape == (2, 5)
    assert aux_logits.shape == (2, 2 * 4, 5)
    assert returned is box


def test_dense_logits_meet_their_own_image_after_mixing():
    # Without blocks no token sees another, so mixing and swapping back must leave no trace.
    model = tiny(depth=0).train()
    images = torch.randn(4, 3, 64, 64)
    box = MixBox(top=1, left=0, bottom=4, right=2, grid=model.grid)
    _, mixed, _ = model(images, box)
    _, plain, _ = model(images)
    torch.testing.assert_close(mixed, plain)


def test_the_class_token_sees_the_partners_tokens_inside_the_box():
    model = tiny().train()
    model.patch_embed.eval()  # batch statistics would depend on nothing but keep them out of it
    images = torch.randn(4, 3, 64, 64)
    everything = MixBox(top=0, left=0, bottom=4, right=4, grid=model.grid)
    mixed, _, _ = model(images, everything)
    swapped, _, _ = model(images.flip(0))
    torch.testing.assert_close(mixed, swapped)
    part = MixBox(top=0, left=0, bottom=2, right=4, grid=model.grid)
    assert not torch.allclose(model(images, part)[0], model(images)[0])


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = tiny(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        class_logits, aux_logits, _ = model(images)
        (class_logits.square().sum() + aux_logits.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_drop_path_rises_linearly_from_zero():
    model = tiny(depth=5, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_initial_weights_follow_the_published_recipe():
    model = tiny(embed_dim=128, num_heads=4)
    for name, parameter in model.named_parameters():
        if name in ("pos_embed", "cls_token") or name.endswith(
            ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight")
        ):
            if not name.startswith("patch_embed"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.startswith(("blocks", "head", "aux_head")) and name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("size", [100, (64, 40), 0])
def test_sizes_that_are_no_multiple_of_the_patch_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny(img_size=size)


def test_images_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"64 × 32 px.*built for 64 × 64 px"):
        tiny()(torch.randn(1, 3, 64, 32))


def test_without_classes_the_model_gives_features():
    model = tiny(num_classes=0).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 32)


def test_reset_classifier_replaces_both_heads():
    model = tiny().eval()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert model.aux_head.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_constant_pos_embed_stays_constant_under_resizing():
    resized = resize_pos_embed(torch.full((1, 1 + 16, 3), 2.5), (7, 5))
    torch.testing.assert_close(resized, torch.full((1, 1 + 35, 3), 2.5))


def test_resizing_pos_embed_keeps_the_class_part_and_interpolates_the_grid():
    pos_embed = torch.randn(1, 1 + 2 * 8, 3)
    resized = resize_pos_embed(pos_embed, (4, 4), (2, 8))
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    plane = pos_embed[0, 1:].reshape(2, 8, 3).permute(2, 0, 1)
    expected = F.interpolate(plane[None], (4, 4), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(resized[0, 1:].T.reshape(3, 4, 4), expected)


def test_a_pos_embed_that_is_no_square_grid_is_refused():
    with pytest.raises(ValueError, match="15 grid tokens"):
        resize_pos_embed(torch.zeros(1, 16, 3), (4, 4))


@pytest.mark.parametrize(
    "content, ema, value",
    [
        ({"a": 1}, True, 1),
        ({"module.a": 1}, True, 1),
        ({"state_dict": {"module.a": 1}, "state_dict_ema": {"a": 2}}, True, 2),
        ({"state_dict": {"module.a": 1}, "state_dict_ema": {"a": 2}}, False, 1),
        ({"state_dict": {"a": 1}, "epoch": 3}, True, 1),
        ({"model": {"a": 1}}, True, 1),
    ],
)
def test_weights_are_found_in_bare_nested_and_prefixed_files(content, ema, value):
    assert unwrap_state_dict(content, ema=ema) == {"a": value}


def test_timm_loads_a_published_file_at_another_resolution_and_class_count(tmp_path):
    source = tiny(img_size=64, num_classes=1000)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w"
    )
    overlay = {"file": str(tmp_path / "w")}
    model = from_timm(
        "lvvit_s",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        img_size=96,
        num_classes=3,
        **TINY,
    )
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(source.pos_embed, (6, 6)))
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 3)


def test_create_model_builds_what_the_recipe_says():
    config = ModelConfig(
        name="lvvit_t", num_classes=7, image_size=(32, 64), drop_path=0.2,
        grad_checkpointing=True, kwargs=TINY,
    )  # fmt: skip
    model: Any = create_model(config)
    assert model.grid == (2, 4)
    assert model.head.out_features == model.aux_head.out_features == 7
    assert model.blocks[0].residual_divisor == 1.0  # the T variant's, which TINY leaves alone
    assert model.blocks[-1].drop_path.drop_prob == 0.2
    assert model.grad_checkpointing


def test_unknown_models_and_arguments_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"did you mean lvvit_s, .*{', '.join(MODELS)}"):
        create_model(ModelConfig(name="lvvit_small"))
    with pytest.raises(ValueError, match="unknown key 'model.kwargs.dpth'; known: .*depth"):
        create_model(ModelConfig(kwargs={"dpth": 3}))
    with pytest.raises(ValueError, match="model.kwargs = .* does not build"):
        create_model(ModelConfig(kwargs={"depth": "three"}))
