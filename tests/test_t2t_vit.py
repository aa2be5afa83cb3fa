"""T2T-ViT against the published facts: names, shapes, counts, arithmetic."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from tokenlabel.trainer.checkpoint import load_weights
from tokenlabel.trainer.mix_token import MixBox
from tokenlabel.trainer.models.lvvit import resize_pos_embed
from tokenlabel.trainer.models.t2t_vit import (
    T2TViT,
    add_dense_head,
    linear_attention,
    sinusoids,
    soft_split,
)
from tokenlabel.trainer.optim import make_optimizer
from tokenlabel.trainer.recipe import OptimConfig

TINY: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2, token_dim=8)


def from_timm(name: str, **kwargs) -> Any:
    return timm.create_model(name, **kwargs)


def tiny(**kwargs) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = TINY | {"img_size": 64, "num_classes": 5} | kwargs
    return T2TViT(**options)


# ------------------------------------------------------------------- names, shapes and counts


def expected_shapes(depth: int, dim: int, exact: bool) -> dict[str, tuple[int, ...]]:
    """The state dict of the published weights, spelled out; they have no dense head."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim)}
    for layer, in_dim in [("attention1", 3 * 7 * 7), ("attention2", 64 * 3 * 3)]:
        t2t = f"tokens_to_token.{layer}."
        first, second = ("mlp.fc1", "mlp.fc2") if exact else ("mlp.0", "mlp.2")
        proj = "attn.proj" if exact else "proj"
        if exact:
            shapes[t2t + "attn.qkv.weight"] = (3 * 64, in_dim)
        else:
            shapes[t2t + "w"] = (32, 64)
            shapes[t2t + "kqv.weight"] = (3 * 64, in_dim)
            shapes[t2t + "kqv.bias"] = (3 * 64,)
        for linear in (proj, first, second):
            shapes[f"{t2t}{linear}.weight"] = (64, 64)
            shapes[f"{t2t}{linear}.bias"] = (64,)
        for norm, width in [("norm1", in_dim), ("norm2", 64)]:
            shapes[f"{t2t}{norm}.weight"] = shapes[f"{t2t}{norm}.bias"] = (width,)
    shapes["tokens_to_token.project.weight"] = (dim, 64 * 3 * 3)
    shapes["tokens_to_token.project.bias"] = (dim,)
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
    shapes["norm.weight"] = shapes["norm.bias"] = (dim,)
    shapes["head.weight"], shapes["head.bias"] = (1000, dim), (1000,)
    return shapes


@pytest.mark.parametrize(
    "name, depth, dim, heads, num_parameters, num_trained",
    [
        # The authors count 21.5, 39.2 and 64.1 M parameters of both kinds. They are trained but
        # for pos_embed and w: 21.47, 39.08 and 64.00 M of the second kind in mmpretrain's table.
        ("t2t_vit_14", 14, 384, 6, 21_545_550, 21_465_806),
        ("t2t_vit_19", 19, 448, 7, 39_177_422, 39_085_070),
        ("t2t_vit_24", 24, 512, 8, 64_105_934, 64_000_974),
        ("t2t_vit_t_14", 14, 384, 6, 21_541_070, 21_465_422),
        ("t2t_vit_t_19", 19, 448, 7, 39_172_942, 39_084_686),
        ("t2t_vit_t_24", 24, 512, 8, 64_101_454, 64_000_590),
    ],
)
def test_variants_have_the_published_names_shapes_and_parameter_counts(
    name, depth, dim, heads, num_parameters, num_trained
):
    with torch.device("meta"):
        model = from_timm(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes.pop("aux_head.weight") == (1000, dim)
    assert shapes.pop("aux_head.bias") == (1000,)
    assert shapes == expected_shapes(depth, dim, exact="_t_" in name)
    parameters = [p for key, p in model.named_parameters() if not key.startswith("aux_head")]
    assert sum(p.numel() for p in parameters) == num_parameters
    assert sum(p.numel() for p in parameters if p.requires_grad) == num_trained
    assert all(block.attn.num_heads == heads for block in model.blocks)
    assert all(block.residual_divisor == 1 for block in model.blocks)


@pytest.mark.parametrize(
    "tag, side_px, file",
    [
        ("t2t_vit_14", 224, "81.5_T2T_ViT_14.pth.tar"),
        ("t2t_vit_14.in1k_384", 384, "83.3_T2T_ViT_14.pth.tar"),
        ("t2t_vit_24.token_label_in1k", 224, "84.2_T2T_ViT_24.pth.tar"),
        ("t2t_vit_t_19", 224, "82.4_T2T_ViTt_19.pth.tar"),
    ],
)
def test_timm_knows_each_published_file_with_its_resolution(tag, side_px, file):
    with torch.device("meta"):
        model = from_timm(tag)
    assert model.grid == (side_px // 16, side_px // 16)
    assert model.pretrained_cfg["url"].endswith(
        f"yitu-opensource/T2T-ViT/releases/download/main/{file}"
    )


# -------------------------------------------------------------------------------- arithmetic


def slow_linear_attention(q, k, v, w):
    """Performer attention of one image, written out token by token in double precision."""

    def features(x):
        half_norm = sum(float(value) ** 2 for value in x) / 2
        dots = [sum(float(a) * float(b) for a, b in zip(row, x)) for row in w]
        return [math.exp(dot - half_norm) / math.sqrt(len(w)) for dot in dots]

    rows, key_features = [], [features(key) for key in k]
    for query_features in map(features, q):
        weights = [sum(a * b for a, b in zip(query_features, key)) for key in key_features]
        total = sum(weights) + 1e-8
        columns = range(v.shape[1])
        rows.append([sum(p * float(x[c]) for p, x in zip(weights, v)) / total for c in columns])
    return torch.tensor(rows, dtype=torch.float64)


def test_linear_attention_matches_a_literal_sum_over_tokens():
    torch.manual_seed(0)
    q, k, v, w = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 3), torch.randn(2, 4)
    expected = torch.stack([slow_linear_attention(*rows, w) for rows in zip(q, k, v)])
    torch.testing.assert_close(linear_attention(q, k, v, w).double(), expected)


def test_linear_attention_approaches_exact_attention_with_many_directions():
    torch.manual_seed(0)
    q, k, v = 0.4 * torch.randn(3, 1, 8, 4)
    near = linear_attention(q, k, v, torch.randn(200_000, 4))
    exact = (q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(near, exact, rtol=0, atol=0.02)


def test_linear_attention_stays_in_single_precision_under_autocast():
    torch.manual_seed(0)
    q, k, v, w = *torch.randn(3, 2, 6, 4), torch.randn(2, 4)
    expected = linear_attention(q, k, v, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, w), expected)


def test_linear_attention_of_long_vectors_is_finite():
    q, k, v, w = *torch.full((3, 1, 6, 4), 1e4), torch.ones(2, 4)
    assert linear_attention(q, k, v, w).isfinite().all()


def test_directions_are_orthogonal_and_as_long_as_their_number_says():
    w = tiny().tokens_to_token.attention1.w
    torch.testing.assert_close(w @ w.T, 4 * torch.eye(4))


def slow_split(x, kernel, stride, padding):
    """Soft split by slicing: tokens row-major, each with channels, then rows, then columns."""
    padded = F.pad(x, [padding] * 4)
    rows = range(0, padded.shape[2] - kernel + 1, stride)
    cols = range(0, padded.shape[3] - kernel + 1, stride)
    patches = [padded[:, :, r : r + kernel, c : c + kernel].flatten(1) for r in rows for c in cols]
    return torch.stack(patches, dim=1)


@pytest.mark.parametrize("kernel, stride, padding", [(7, 4, 2), (3, 2, 1)])
def test_soft_split_matches_slicing(kernel, stride, padding):
    planes = torch.randn(2, 3, 16, 24)
    tokens = soft_split(planes, kernel=kernel, stride=stride, padding=padding)
    assert tokens.shape[1] == 16 * 24 // stride**2
    assert torch.equal(tokens, slow_split(planes, kernel, stride, padding))


def test_sinusoids_match_the_formula_entry_by_entry():
    table = sinusoids(1 + 24 * 24, 6)
    for place in (0, 1, 2, 197, 576):
        for pair in range(3):
            angle = place / 10_000 ** (2 * pair / 6)
            found = table[0, place, 2 * pair : 2 * pair + 2].tolist()
            assert found == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-7)


@pytest.mark.parametrize("exact", [False, True])
def test_evaluation_matches_a_slow_reference_written_out(exact):
    model = tiny(img_size=(32, 48), token_attention="exact" if exact else "performer").eval()
    for parameter in model.parameters():  # so that no norm or bias is at its trivial first value
        parameter.data += 0.1 * torch.randn_like(parameter)
    w = model.state_dict()

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def narrow(x, name):
        """An attention layer of the tokens-to-token module."""
        y = norm(x, f"{name}.norm1")
        if exact:
            q, k, v = (y @ w[f"{name}.attn.qkv.weight"].T).split(8, dim=2)
            attended = (q @ k.mT / math.sqrt(x.shape[2])).softmax(-1) @ v
            y = v + linear(attended, f"{name}.attn.proj")
            first, second = "mlp.fc1", "mlp.fc2"
        else:
            k, q, v = linear(y, f"{name}.kqv").split(8, dim=2)
            directions = w[f"{name}.w"]
            attended = [slow_linear_attention(*rows, directions).float() for rows in zip(q, k, v)]
            y = v + linear(torch.stack(attended), f"{name}.proj")
            first, second = "mlp.0", "mlp.2"
        hidden = gelu(linear(norm(y, f"{name}.norm2"), f"{name}.{first}"))
        return y + linear(hidden, f"{name}.{second}")

    def image_of(tokens, rows, cols):
        return torch.stack(
            [tokens[:, r * cols : (r + 1) * cols].transpose(1, 2) for r in range(rows)], dim=2
        )

    images = torch.randn(2, 3, 32, 48)
    x = narrow(slow_split(images, 7, 4, 2), "tokens_to_token.attention1")
    x = narrow(slow_split(image_of(x, 8, 12), 3, 2, 1), "tokens_to_token.attention2")
    x = linear(slow_split(image_of(x, 4, 6), 3, 2, 1), "tokens_to_token.project")
    assert x.shape == (2, 2 * 3, 32)
    x = torch.cat([w["cls_token"].repeat(2, 1, 1), x], dim=1) + w["pos_embed"]
    for block in ("blocks.0.", "blocks.1."):
        q, k, v = (norm(x, block + "norm1") @ w[block + "attn.qkv.weight"].T).split(32, dim=2)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = q[..., head] @ k[..., head].mT / math.sqrt(16)
            heads.append(scores.softmax(-1) @ v[..., head])
        x = x + linear(torch.cat(heads, -1), block + "attn.proj")
        x = x + linear(gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    x = norm(x, "norm")
    expected = linear(x[:, 0], "head") + 0.5 * linear(x[:, 1:], "aux_head").amax(dim=1)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, grid", [(224, (14, 14)), ((256, 192), (16, 12))])
@pytest.mark.parametrize("token_attention", ["performer", "exact"])
def test_any_size_of_whole_patches_gives_one_logit_a_class_and_token(size, grid, token_attention):
    model = tiny(img_size=size, depth=1, token_attention=token_attention)
    assert model.grid == grid
    height, width = 16 * grid[0], 16 * grid[1]
    class_logits, aux_logits, _ = model.train()(torch.randn(2, 3, height, width))
    assert class_logits.shape == (2, 5)
    assert aux_logits.shape == (2, grid[0] * grid[1], 5)
    assert model.eval()(torch.randn(2, 3, height, width)).shape == (2, 5)


def test_an_images_logits_do_not_depend_on_its_batch():
    model = tiny().eval()
    images = torch.randn(5, 3, 64, 64)
    together = model(images)
    for index in range(5):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index])


# ---------------------------------------------------------------------------------- training


def test_training_returns_both_heads_and_the_box():
    model = tiny(img_size=(32, 64)).train()
    box = MixBox(top=0, left=1, bottom=1, right=3, grid=model.grid)
    class_logits, aux_logits, returned = model(torch.randn(2, 3, 32, 64), box)
    assert class_logits.shape == (2, 5)
    assert aux_logits.shape == (2, 2 * 4, 5)
    assert returned is box


def test_dense_logits_meet_their_own_image_after_mixing():
    # Without blocks no token sees another after mixing, so swapping back must leave no trace.
    model = tiny(depth=0).train()
    model.tokens_to_token.eval()  # its dropout would differ between the two calls
    images = torch.randn(4, 3, 64, 64)
    box = MixBox(top=1, left=0, bottom=4, right=2, grid=model.grid)
    torch.testing.assert_close(model(images, box)[1], model(images)[1])


def test_the_class_token_sees_the_partners_tokens_inside_the_box():
    model = tiny().train()
    model.tokens_to_token.eval()
    images = torch.randn(4, 3, 64, 64)
    everything = MixBox(top=0, left=0, bottom=4, right=4, grid=model.grid)
    torch.testing.assert_close(model(images, everything)[0], model(images.flip(0))[0])
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
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_training_moves_everything_but_positions_and_random_directions():
    model = tiny().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig())
    class_logits, aux_logits, _ = model(torch.randn(2, 3, 64, 64))
    (class_logits.square().sum() + aux_logits.square().sum()).backward()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {
        "pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"
    }  # fmt: skip


def test_initial_linear_layers_are_small_normals_without_bias():
    model = tiny(embed_dim=128, num_heads=4, token_dim=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.requires_grad:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


# ---------------------------------------------------------------------------------- mistakes


def test_impossible_sizes_and_attention_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny(img_size=100)
    with pytest.raises(ValueError, match=r"64 × 32 px.*built for 64 × 64 px"):
        tiny()(torch.randn(1, 3, 64, 32))
    with pytest.raises(ValueError, match="'transformer'; allowed: 'performer', 'exact'"):
        tiny(token_attention="transformer")


# ----------------------------------------------------------------------- published checkpoints


def published(model: T2TViT) -> dict[str, Any]:
    """A file as the authors wrote theirs: nested, raw names prefixed, no dense head."""
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("aux_head")}
    raw = {f"module.{name}": torch.ones_like(tensor) for name, tensor in weights.items()}
    return {"epoch": 300, "arch": "t2t_vit_14", "state_dict": raw, "state_dict_ema": weights}


def test_timm_loads_a_published_file_and_says_that_it_has_no_dense_head(tmp_path, caplog):
    source = tiny(num_classes=1000).eval()
    torch.save(published(source), tmp_path / "w")
    overlay = {"file": str(tmp_path / "w")}
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    model = from_timm("t2t_vit_14", img_size=64, **kwargs).eval()
    assert [r.message for r in caplog.records if "dense head" in r.message] == [
        "the file holds no dense head: aux_head is zero until token labels train it"
    ]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), source.head(source.forward_features(images)[:, 0]))


def test_timm_loads_a_published_file_at_another_resolution_and_class_count(tmp_path):
    source = tiny(num_classes=1000)
    torch.save(published(source), tmp_path / "w")
    overlay = {"file": str(tmp_path / "w")}
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    model = from_timm("t2t_vit_14", img_size=96, num_classes=3, **kwargs)
    assert torch.equal(model.tokens_to_token.attention2.w, source.tokens_to_token.attention2.w)
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(source.pos_embed, (6, 6)))
    assert not model.pos_embed.requires_grad
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 3)


def test_a_published_file_loads_as_any_checkpoint_and_the_report_names_the_dense_head(tmp_path):
    source = tiny().eval()
    torch.save(published(source), tmp_path / "w.pth.tar")
    model = tiny().eval()
    report = load_weights(model, tmp_path / "w.pth.tar")
    assert (report.resized, report.begun) == ((), ("aux_head.weight", "aux_head.bias"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), source.head(source.forward_features(images)[:, 0]))


def test_positions_of_a_published_file_are_resized_and_stay_fixed(tmp_path):
    source = tiny()
    torch.save(published(source), tmp_path / "w.pth.tar")
    model = tiny(img_size=(32, 96))
    assert load_weights(model, tmp_path / "w.pth.tar").resized == ("pos_embed",)
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(source.pos_embed, (2, 6)))
    assert not model.pos_embed.requires_grad


def test_a_dense_head_that_a_file_has_is_kept():
    weights = tiny().state_dict()
    kept = dict(weights)
    assert add_dense_head(weights) == ()
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
