"""UperNet on LV-ViT against the published facts: names, shapes, counts, arithmetic, weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenlabel.segmenter import uper_net
from tokenlabel.segmenter.backbone import Features, token_grid
from tokenlabel.segmenter.class_sets import CLASS_SETS, class_set_of, generated_colours
from tokenlabel.segmenter.loss import pixel_loss, seg_loss
from tokenlabel.segmenter.uper_net import ModelConfig, UperNet, create_model
from tokenlabel.segmenter.weights import load_model, start_from
from tokenlabel.trainer import checkpoint
from tokenlabel.trainer.checkpoint import Checkpoint
from tokenlabel.trainer.models.lvvit import LVViT
from tokenlabel.trainer.models.t2t_vit import T2TViT

TINY: dict[str, Any] = dict(
    embed_dim=16,
    depth=5,
    num_heads=2,
    stem_width=4,
    out_blocks=[0, 2, 3, 4],
    head_dim=8,
    deep_dim=12,
)
CLASSIFIER: dict[str, Any] = dict(embed_dim=16, depth=5, num_heads=2, stem_width=4, num_classes=7)


def tiny(num_classes: int = 5, seed: int = 0, **options: Any) -> UperNet:
    """A small model whose norms are not those of a fresh one, so that tests see them."""
    torch.manual_seed(seed)
    config = ModelConfig(num_classes=num_classes, image_size=64, kwargs=TINY, **options)
    model = create_model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 5
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


# --------------------------------------------------------------------------- names and shapes


def conv_norm(prefix: str, shape: tuple[int, ...], conv: str, norm: str) -> dict[str, Any]:
    dim = shape[1] if conv.startswith("up") else shape[0]
    shapes: dict[str, Any] = {f"{prefix}{conv.removeprefix('up')}.weight": shape}
    shapes |= {f"{prefix}{norm}.{n}": (dim,) for n in ("weight", "bias")}
    shapes |= {f"{prefix}{norm}.{n}": (dim,) for n in ("running_mean", "running_var")}
    return shapes | {f"{prefix}{norm}.num_batches_tracked": ()}


def published_shapes(depth: int, dim: int, stem: int, tokens: int, head: int) -> dict[str, Any]:
    """The state dict of the published checkpoints, spelled out from the description."""
    shapes: dict[str, Any] = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    for number, conv in enumerate([(stem, 3, 7, 7), (stem, stem, 3, 3), (stem, stem, 3, 3)], 1):
        shapes |= conv_norm("patch_embed.", conv, f"conv{number}", f"bn{number}")
    shapes |= {"patch_embed.proj.weight": (dim, stem, 8, 8), "patch_embed.proj.bias": (dim,)}
    for block in (f"blocks.{number}." for number in range(depth)):
        shapes |= {f"{block}norm{n}.{w}": (dim,) for n in (1, 2) for w in ("weight", "bias")}
        shapes[f"{block}attn.qkv.weight"] = (3 * dim, dim)
        for layer, (rows, cols) in {
            "attn.proj": (dim, dim), "mlp.fc1": (3 * dim, dim), "mlp.fc2": (dim, 3 * dim)
        }.items():  # fmt: skip
            shapes |= {f"{block}{layer}.weight": (rows, cols), f"{block}{layer}.bias": (rows,)}
    for number, side in ((1, 4), (2, 2)):
        shapes |= conv_norm(f"side_layer{number}.", (dim, dim, side, side), "up0", "1")
        shapes |= conv_norm(f"side_layer{number}.", (dim, dim, 1, 1), "3", "4")
    shapes |= conv_norm("side_layer3.", (dim, dim, 1, 1), "0", "1")
    shapes |= conv_norm("side_layer4.", (2048, dim, 1, 1), "0", "1")
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()}
    convs = {f"decode_head.psp_modules.{n}.1.": (head, 2048, 1, 1) for n in range(4)}
    convs["decode_head.bottleneck."] = (head, 2048 + 4 * head, 3, 3)
    convs["decode_head.fpn_bottleneck."] = (head, 4 * head, 3, 3)
    convs |= {f"decode_head.lateral_convs.{n}.": (head, dim, 1, 1) for n in range(3)}
    convs |= {f"decode_head.fpn_convs.{n}.": (head, head, 3, 3) for n in range(3)}
    convs["auxiliary_head.convs.0."] = (head, dim, 3, 3)
    for prefix, shape in convs.items():
        shapes |= conv_norm(prefix, shape, "conv", "bn")
    for name in ("decode_head", "auxiliary_head"):
        shapes |= {f"{name}.conv_seg.weight": (150, head, 1, 1), f"{name}.conv_seg.bias": (150,)}
    return shapes


@pytest.mark.parametrize(
    "size, depth, dim, heads, stem, tokens, head, divisor, num_entries, num_parameters",
    [
        ("s", 16, 384, 6, 64, 1025, 256, 2, 316, 44_452_076),
        ("m", 20, 512, 8, 64, 1025, 256, 2, 360, 77_274_988),
        ("l", 24, 768, 12, 128, 785, 512, 1, 404, 208_554_156),
    ],
)
def test_models_have_the_published_names_shapes_and_settings(
    size, depth, dim, heads, stem, tokens, head, divisor, num_entries, num_parameters
):
    with torch.device("meta"):
        model = create_model(ModelConfig(name=f"upernet_lvvit_{size}"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == num_entries
    assert shapes == published_shapes(depth, dim, stem, tokens, head)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    blocks: Any = model.backbone.blocks
    assert all(block.attn.num_heads == heads for block in blocks)
    assert all(block.residual_divisor == divisor for block in blocks)
    assert all(block.norm1.eps == block.norm2.eps == 1e-6 for block in blocks)
    assert model.backbone.out_blocks == tuple(depth - 1 - 3 * n for n in (3, 2, 1, 0))


def test_synchronised_norms_keep_every_name():
    model = tiny()
    names = list(model.state_dict())
    assert list(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == names


# ----------------------------------------------------------------------------------- arithmetic


def batch_norm(x, w, name):
    shape = (1, -1, 1, 1)
    mean, var = w[f"{name}.running_mean"].view(shape), w[f"{name}.running_var"].view(shape)
    scaled = (x - mean) / (var + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def conv_module(x, w, prefix):
    kernel = w[f"{prefix}.conv.weight"]
    y = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    return batch_norm(y, w, f"{prefix}.bn").clamp(min=0)


def bilinear(x, height, width):
    """Resize by hand: pixels are areas, samples at their centres, the edge repeated."""

    def along(x, dim, new):
        old = x.shape[dim]
        out = []
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0)
            low = min(int(at), old - 1)
            high = min(low + 1, old - 1)
            pair = x.select(dim, low), x.select(dim, high)
            out.append(pair[0] + (at - low) * (pair[1] - pair[0]))
        return torch.stack(out, dim)

    return along(along(x, 2, height), 3, width)


def mean_of_parts(x, parts):
    """Adaptive pooling by hand: part i of n reaches from floor(i·size/n) to ceil((i+1)·size/n)."""
    height, width = x.shape[2:]

    def reach(i, size):
        return slice(i * size // parts, -(-(i + 1) * size // parts))

    rows = [
        [x[:, :, reach(i, height), reach(j, width)].mean((2, 3)) for j in range(parts)]
        for i in range(parts)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def slow_uper_head(f: list[torch.Tensor], w) -> torch.Tensor:
    deep = f[3]
    pools = [
        bilinear(conv_module(mean_of_parts(deep, parts), w, f"psp_modules.{n}.1"), *deep.shape[2:])
        for n, parts in enumerate((1, 2, 3, 6))
    ]
    top = conv_module(torch.cat([deep, *pools], 1), w, "bottleneck")
    lateral = [conv_module(f[n], w, f"lateral_convs.{n}") for n in range(3)]
    lateral[2] = lateral[2] + bilinear(top, *lateral[2].shape[2:])
    lateral[1] = lateral[1] + bilinear(lateral[2], *lateral[1].shape[2:])
    lateral[0] = lateral[0] + bilinear(lateral[1], *lateral[0].shape[2:])
    out = [conv_module(lateral[n], w, f"fpn_convs.{n}") for n in range(3)] + [top]
    x = torch.cat([bilinear(level, *out[0].shape[2:]) for level in out], 1)
    x = conv_module(x, w, "fpn_bottleneck")
    return F.conv2d(x, w["conv_seg.weight"], w["conv_seg.bias"])


def random_features(rows: int, cols: int) -> Features:
    gen = torch.Generator().manual_seed(1)
    sides = [(16, 4), (16, 2), (16, 1), (12, 1)]
    return Features(*(torch.randn(2, d, k * rows, k * cols, generator=gen) for d, k in sides))


@pytest.mark.parametrize("rows, cols", [(4, 4), (3, 7), (1, 2)])
def test_the_main_head_matches_a_slow_reference_written_from_its_description(rows, cols):
    head, features = tiny().decode_head, random_features(rows, cols)
    nn.init.normal_(head.conv_seg.weight)
    expected = slow_uper_head(list(features), head.state_dict())
    assert expected.shape == (2, 5, 4 * rows, 4 * cols)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)


def test_the_auxiliary_head_is_a_convolution_and_a_classifier():
    head, tokens = tiny().auxiliary_head, random_features(3, 5).tokens
    w = head.state_dict()
    expected = F.conv2d(conv_module(tokens, w, "convs.0"), w["conv_seg.weight"], w["conv_seg.bias"])
    torch.testing.assert_close(head(tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_matches_a_slow_reference_written_out():
    backbone = tiny().backbone
    images = torch.randn(2, 3, 40, 71)
    w = backbone.state_dict()

    def norm(x, name):
        return F.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = images
    for number, (stride, pad) in enumerate([(2, 3), (1, 1), (1, 1)], 1):
        x = F.conv2d(x, w[f"patch_embed.conv{number}.weight"], stride=stride, padding=pad)
        x = batch_norm(x, w, f"patch_embed.bn{number}").clamp(min=0)
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    assert x.shape[2:] == (2, 4)
    positions = w["pos_embed"][:, 1:].transpose(1, 2).reshape(1, 16, 4, 4)
    positions = F.interpolate(positions, (2, 4), mode="bicubic", align_corners=False)
    x = torch.cat(
        [
            (w["cls_token"] + w["pos_embed"][:, :1]).repeat(2, 1, 1),
            (x + positions).flatten(2).transpose(1, 2),
        ],
        1,
    )
    maps = []
    for number in range(5):
        block = f"blocks.{number}."
        q, k, v = (norm(x, block + "norm1") @ w[block + "attn.qkv.weight"].T).split(16, dim=2)
        heads = [
            (q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(-1) @ v[..., part]
            for part in (slice(0, 8), slice(8, 16))
        ]
        attended = torch.cat(heads, -1) @ w[block + "attn.proj.weight"].T
        x = x + (attended + w[block + "attn.proj.bias"]) / 2
        hidden = (
            norm(x, block + "norm2") @ w[block + "mlp.fc1.weight"].T + w[block + "mlp.fc1.bias"]
        )
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + (hidden @ w[block + "mlp.fc2.weight"].T + w[block + "mlp.fc2.bias"]) / 2
        if number in (0, 2, 3, 4):
            maps.append(x[:, 1:].transpose(1, 2).reshape(2, 16, 2, 4))
    expected = []
    for number, (map_, side) in enumerate(zip(maps, (4, 2, 1, 1)), 1):
        layer, kernel = f"side_layer{number}.", w[f"side_layer{number}.0.weight"]
        y = F.conv_transpose2d(map_, kernel, stride=side) if side > 1 else F.conv2d(map_, kernel)
        y = batch_norm(y, w, f"{layer}1").clamp(min=0)
        if side > 1:
            y = batch_norm(F.conv2d(y, w[f"{layer}3.weight"]), w, f"{layer}4").clamp(min=0)
        expected.append(y)
    for got, wanted in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side_px", [15, 16, 30, 31, 32, 47, 341, 512])
def test_the_token_grid_is_what_the_stem_makes(side_px):
    stem = tiny().backbone.patch_embed
    num_tokens = stem(torch.zeros(1, 3, side_px, 16)).shape[1]
    assert token_grid((side_px, 16)) == (num_tokens, 1)


def test_too_small_an_image_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"14 × 90 px .* must have 15 px at least"):
        tiny()(torch.zeros(1, 3, 14, 90))


# ------------------------------------------------------------------------------------- options


def test_mlp_dropout_and_stochastic_depth_are_separate_and_rise_with_depth():
    blocks: Any = tiny(mlp_drop=0.4).backbone.blocks
    assert [block.mlp.drop.p for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all(isinstance(block.drop_path, nn.Identity) for block in blocks)
    blocks = tiny(drop_path=0.2).backbone.blocks
    assert [block.mlp.drop.p for block in blocks] == [0] * 5
    assert [block.drop_path.drop_prob for block in blocks[1:]] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2]
    )


def test_mlp_dropout_stands_behind_both_layers_and_acts_in_training_only():
    mlp: Any = tiny(mlp_drop=0.5).backbone.blocks[4].mlp
    x = torch.randn(1, 3, 16)
    assert torch.equal(mlp.eval()(x), mlp(x))
    mlp.train()
    torch.manual_seed(3)
    got = mlp(x)
    torch.manual_seed(3)
    hidden = F.dropout(F.gelu(mlp.fc1(x)), 0.5)
    assert torch.equal(got, F.dropout(mlp.fc2(hidden), 0.5))


def test_training_gives_both_heads_logits_and_every_weight_a_gradient():
    model = tiny().train()
    logits, aux_logits = model(torch.randn(2, 3, 64, 48))
    assert logits.shape == (2, 5, 16, 12)
    assert aux_logits.shape == (2, 5, 4, 3)
    seg_loss(logits, aux_logits, torch.randint(0, 5, (2, 64, 48))).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_checkpointed_blocks_have_the_same_gradients():
    def gradients(**options: bool) -> list[torch.Tensor]:
        model = tiny(head_drop=0.0, **options).train()
        torch.manual_seed(1)
        logits, aux_logits = model(torch.randn(2, 3, 32, 32))
        (logits.square().mean() + aux_logits.mean()).backward()
        return [p.grad for p in model.backbone.parameters() if p.grad is not None]

    for plain, saved in zip(gradients(), gradients(grad_checkpointing=True), strict=True):
        torch.testing.assert_close(saved, plain)


def test_one_image_per_process_cannot_be_trained_on():
    with pytest.raises(ValueError, match="one image per process.*larger batch"):
        tiny().train()(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(name="upernet_lvvit_xl"), "unknown segmentation model 'upernet_lvvit_xl'; did you"),
        (dict(num_classes=0), "stands for a data set's count"),
        (dict(kwargs=dict(width=3)), r"unknown key 'model.kwargs.width'; known: .*head_dim.*depth"),
        (
            dict(kwargs=TINY | dict(out_blocks=[0, 2, 2, 4])),
            r"\[0, 2, 2, 4\]; allowed: four rising",
        ),
        (dict(kwargs=TINY | dict(out_blocks=[1, 2, 3, 5])), "from 0 to 4, the last of 5 blocks"),
        (dict(kwargs=TINY | dict(num_heads=3)), "embed_dim = 16 is not divisible by num_heads = 3"),
    ],
)
def test_impossible_models_are_refused(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model(ModelConfig(**config))


@pytest.mark.parametrize("option", ["mlp_drop", "drop_path", "head_drop"])
def test_rates_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"model.{option} = 1.0; allowed: 0 <= rate < 1"):
        ModelConfig(**{option: 1.0})  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------- loss


def masks_with_ignored() -> torch.Tensor:
    masks = torch.randint(0, 5, (2, 12, 8), generator=torch.Generator().manual_seed(0))
    masks[0, :5] = 255
    return masks


def test_cross_entropy_divides_by_all_pixels_or_by_the_taught_ones():
    logits, masks = torch.randn(2, 5, 12, 8), masks_with_ignored()
    log_p = logits.log_softmax(1)
    total, taught = 0.0, 0
    for b in range(2):
        for y in range(12):
            for x in range(8):
                if masks[b, y, x] != 255:
                    total -= log_p[b, int(masks[b, y, x]), y, x].item()
                    taught += 1
    assert taught == 2 * 12 * 8 - 40
    assert pixel_loss(logits, masks).item() == pytest.approx(total / (2 * 12 * 8), rel=1e-5)
    standard = pixel_loss(logits, masks, averaging="standard")
    assert standard.item() == pytest.approx(total / taught, rel=1e-5)
    torch.testing.assert_close(standard, F.cross_entropy(logits, masks, ignore_index=255))


def test_the_loss_resizes_both_heads_to_the_masks_and_weighs_the_auxiliary_one():
    logits, aux_logits, masks = (
        torch.randn(2, 5, 6, 4),
        torch.randn(2, 5, 3, 2),
        masks_with_ignored(),
    )
    found = seg_loss(logits, aux_logits, masks, aux_weight=0.4)
    torch.testing.assert_close(found.main, pixel_loss(bilinear(logits, 12, 8), masks))
    torch.testing.assert_close(found.aux, pixel_loss(bilinear(aux_logits, 12, 8), masks))
    torch.testing.assert_close(found.total, found.main + 0.4 * found.aux)


@pytest.mark.parametrize("averaging", ["published", "standard"])
def test_a_batch_with_nothing_to_teach_costs_nothing_and_has_gradients(averaging):
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 4, 4), 255), averaging=averaging)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


# ------------------------------------------------------------------------------------- weights


def classifier(seed: int = 3, **options: Any) -> LVViT:
    torch.manual_seed(seed)
    return LVViT(**CLASSIFIER | dict(img_size=48) | options)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def own_checkpoint(path: Path, weights: Any, recipe: str, grid: tuple[int, int], **more) -> Path:
    names = more.pop("names", [f"thing {n}" for n in range(5)])
    checkpoint.save(
        Checkpoint(
            recipe=recipe,
            class_ids=names,
            class_names=names,
            grid=grid,
            step=3,
            model=weights,
            **more,
        ),
        path,
    )
    return path


NEW = (
    *("backbone.side_layer1", "backbone.side_layer2", "backbone.side_layer3"),
    *("backbone.side_layer4", "decode_head", "auxiliary_head"),
)
UNUSED = tuple(f"{m}.{w}" for m in ("norm", "head", "aux_head") for w in ("weight", "bias"))


def test_a_published_classifier_starts_the_backbone_and_the_report_is_exact(tmp_path):
    theirs, model = classifier(), tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefixed = {f"module.{name}": t for name, t in theirs.state_dict().items()}
    report = start_from(model, saved(tmp_path / "c.pth", {"state_dict": prefixed}))
    after = model.state_dict()
    assert report.kind == "classifier"
    assert report.weights == "published"
    assert report.resized == ("backbone.pos_embed",)
    assert report.unused == UNUSED
    assert set(report.new) == {name for name in before if name.startswith(NEW)}
    for name, tensor in theirs.state_dict().items():
        if name not in (*UNUSED, "pos_embed"):
            assert torch.equal(after[f"backbone.{name}"], tensor), name
    for name in report.new:
        assert torch.equal(after[name], before[name]), name
    grid = theirs.pos_embed[:, 1:].detach().transpose(1, 2).reshape(1, 16, 3, 3)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after["backbone.pos_embed"][:, 1:], grid.flatten(2).transpose(1, 2))
    assert str(report) == (
        f"{tmp_path}/c.pth: published weights of a classifier; backbone.pos_embed resized; "
        f"norm, head, aux_head unused; {', '.join(NEW)} begun anew"
    )


def test_our_own_classifier_tells_its_grid_its_average_and_its_settings(tmp_path):
    theirs, averaged = classifier(img_size=(32, 64)), classifier(seed=4, img_size=(32, 64))
    options = "embed_dim = 16, depth = 5, num_heads = 2, stem_width = 4, residual_divisor = 3.0"
    recipe = f'[model]\nname = "lvvit_s"\nnum_classes = 7\nkwargs = {{ {options} }}\n'
    recipe += "image_size = [32, 64]"
    path = own_checkpoint(
        tmp_path / "c.pt", theirs.state_dict(), recipe, (2, 4), ema=averaged.state_dict()
    )
    model = tiny()
    report = start_from(model, path)
    assert report.weights == "ema"
    grid = averaged.pos_embed[:, 1:].detach().transpose(1, 2).reshape(1, 16, 2, 4)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.backbone.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    assert report.differs == (
        "residual_divisor is 2 here, 3 in the classifier",
        "layer norm eps is 1e-06 here, 1e-05 in the classifier",
    )
    assert start_from(model, path, ema=False).weights == "raw"
    assert torch.equal(model.backbone.cls_token, theirs.cls_token)


def test_a_model_for_other_classes_gives_all_but_the_last_layers(tmp_path):
    theirs, model = tiny(num_classes=9, seed=5), tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = start_from(model, saved(tmp_path / "s.pth", {"state_dict": theirs.state_dict()}))
    last = [
        f"{h}.conv_seg.{w}" for h in ("decode_head", "auxiliary_head") for w in ("weight", "bias")
    ]
    assert sorted(report.new) == sorted(last)
    assert report.unused == report.resized == report.differs == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in last else theirs.state_dict()[name])


def test_another_architecture_is_refused_and_the_model_untouched(tmp_path):
    torch.manual_seed(0)
    other = T2TViT(img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = saved(tmp_path / "t2t.pth", other.state_dict())
    with pytest.raises(ValueError, match=r"another architecture: missing: backbone\.patch_embed"):
        start_from(model, path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.fixture
def small_t(monkeypatch):
    """Let a published T be small in all but its width, by which it is known."""
    size = TINY | dict(embed_dim=240, num_heads=4, image_hw=(64, 64))
    monkeypatch.setitem(uper_net._SIZES, "upernet_lvvit_t", size)
    torch.manual_seed(7)
    return create_model(ModelConfig(name="upernet_lvvit_t", num_classes=6, image_size=48))


def test_a_published_checkpoint_loads_as_it_is(small_t, tmp_path):
    names = [f"kind {n} " for n in range(6)]
    colours = [[n, 2 * n, 3 * n] for n in range(6)]
    content = {"meta": {"CLASSES": names, "PALETTE": colours}, "state_dict": small_t.state_dict()}
    found = load_model(saved(tmp_path / "published.pth", content))
    assert found.config.name == "upernet_lvvit_t"
    assert found.config.num_classes == 6
    assert found.model.grid == (3, 3)
    assert not found.model.training
    assert found.classes.names == tuple(f"kind {n}" for n in range(6))
    assert found.classes.colours[2] == (2, 4, 6)
    assert (found.inference.window_px, found.inference.stride_px) == (512, 341)
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(found.model(images), small_t.eval()(images))


def test_classes_of_a_published_checkpoint_are_taken_for_ade20ks_or_numbered(small_t, tmp_path):
    found = load_model(saved(tmp_path / "p.pth", {"state_dict": small_t.state_dict()}))
    assert found.classes.names[5] == "class 5"
    model = create_model(ModelConfig(name="upernet_lvvit_t", num_classes=150))
    found = load_model(saved(tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": None}))
    assert found.classes == CLASS_SETS["ade20k"]
    assert found.classes.names[:3] == ("wall", "building", "sky")


def test_a_published_checkpoint_with_other_names_or_shapes_is_refused_by_name(small_t, tmp_path):
    weights = small_t.state_dict()
    weights["decode_head.extra"] = weights.pop("backbone.cls_token")
    weights["backbone.side_layer3.0.weight"] = torch.zeros(1)
    path = saved(tmp_path / "p.pth", {"state_dict": weights})
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert "missing: backbone.cls_token" in str(caught.value)
    assert "unexpected: decode_head.extra" in str(caught.value)
    assert "backbone.side_layer3.0.weight 1 instead of 240×240×1×1" in str(caught.value)


OWN_RECIPE = """
[model]
name = "upernet_lvvit_s"
num_classes = 0
image_size = 64
mlp_drop = 0.1
mean = [0.5, 0.5, 0.5]
kwargs = { embed_dim = 16, depth = 5, num_heads = 2, stem_width = 4, out_blocks = [0, 2, 3, 4], \
head_dim = 8, deep_dim = 12 }
[inference]
mode = "whole"
short_px = 64
[optim]
lr = 1
"""


def test_our_own_checkpoint_comes_back_with_all_that_its_recipe_says(tmp_path):
    model, averaged = tiny(), tiny(seed=9)
    path = own_checkpoint(
        tmp_path / "own.pt", model.state_dict(), OWN_RECIPE, (4, 4), ema=averaged.state_dict()
    )
    found = load_model(path)
    assert found.weights == "ema"
    assert found.config.num_classes == 5
    assert found.config.mean == (0.5, 0.5, 0.5)
    assert (found.inference.mode, found.inference.short_px) == ("whole", 64)
    assert found.classes == class_set_of([f"thing {n}" for n in range(5)])
    assert found.classes.colours == generated_colours(5)
    images = torch.randn(1, 3, 33, 80)
    assert torch.equal(found.model(images), averaged(images))
    assert torch.equal(load_model(path, ema=False).model(images), model(images))
    assert start_from(tiny(seed=2), path).new == ()


def test_a_classifier_is_no_segmentation_model(tmp_path):
    path = saved(tmp_path / "c.pth", classifier().state_dict())
    with pytest.raises(ValueError, match="no segmentation model: it has no decode_head.*--init"):
        load_model(path)
