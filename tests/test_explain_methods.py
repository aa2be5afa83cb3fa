"""Heatmaps against slow, literal implementations, and against models that are known to look."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_explain_attention import MODELS, each_model, pictures, small_lvvit, small_timm
from torch import Tensor

from tokenlabel.explainer.attention import attention_gradients, readouts, trace
from tokenlabel.explainer.methods import METHODS, Options, explain, normalize, possible, upsample
from tokenlabel.explainer.transformer_attribution import (
    add_rule,
    attention_relevances,
    clone_rule,
    divide,
    linear_rule,
    matmul_rule,
)
from tokenlabel.trainer.models.lvvit import LVViT

CLASSES = torch.tensor([3, 1])
TIGHT: Any = {"rtol": 1e-6, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------- the rules, number by number


def slow_divide(a: float, b: float) -> float:
    return 0.0 if b == 0 else a / (b + 1e-9)


def slow_linear(x: Tensor, weight: Tensor, relevance: Tensor, alpha: float = 1.0) -> Tensor:
    """Share one token's relevance (o) by its inputs (i) and the weight (o, i)."""

    def part(sign: int) -> Tensor:
        found = torch.zeros_like(x)
        for o in range(len(weight)):
            pushes = [float(x[i] * weight[o, i].detach()) for i in range(len(x))]
            pushes = [push if push * sign > 0 else 0.0 for push in pushes]
            share = slow_divide(float(relevance[o]), sum(pushes))
            found += torch.tensor([push * share for push in pushes], dtype=x.dtype)
        return found

    return part(1) if alpha == 1 else alpha * part(1) - (alpha - 1) * part(-1)


def slow_linear_tokens(x: Tensor, weight: Tensor, relevance: Tensor, alpha: float = 1.0) -> Tensor:
    rows = zip(x, relevance, strict=True)
    return torch.stack([slow_linear(token, weight, of_token, alpha) for token, of_token in rows])


def slow_matmul(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    of_a, of_b = torch.zeros_like(a), torch.zeros_like(b)
    for row, col in itertools.product(range(len(a)), range(b.shape[1])):
        z = sum(float(a[row, m] * b[m, col]) for m in range(len(b)))
        share = slow_divide(float(relevance[row, col]), z)
        for m in range(len(b)):
            of_a[row, m] += a[row, m] * b[m, col] * share / 2
            of_b[m, col] += a[row, m] * b[m, col] * share / 2
    return of_a, of_b


def slow_add(x: Tensor, y: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """One image."""
    parts = [torch.zeros_like(x), torch.zeros_like(x)]
    for index in itertools.product(*map(range, x.shape)):
        share = slow_divide(float(relevance[index]), float(x[index] + y[index]))
        parts[0][index], parts[1][index] = x[index] * share, y[index] * share
    sums, total = [float(part.sum()) for part in parts], float(relevance.sum())
    both = abs(sums[0]) + abs(sums[1])
    scales = [slow_divide(slow_divide(abs(part), both) * total, part) for part in sums]
    return parts[0] * scales[0], parts[1] * scales[1]


def slow_clone(x: Tensor, relevances: list[Tensor]) -> Tensor:
    found = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        shares = [slow_divide(float(each[index]), float(x[index])) for each in relevances]
        found[index] = x[index] * sum(shares)
    return found


def test_division_is_the_published_one():
    values = torch.tensor([0.0, 1e-9, -1e-9, 2.0, -2.0, 3e-9], dtype=torch.float64)
    for a, b in itertools.product(values, values):
        expected = 0.0 if b == 0 else a / 1e-9 if b == -1e-9 else slow_divide(float(a), float(b))
        torch.testing.assert_close(divide(a, b), torch.as_tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_the_linear_rule(alpha: float):
    x, weight, relevance = random(2, 3, 6), random(5, 6, seed=1), random(2, 3, 5, seed=2)
    x[0, 0, :2], weight[4] = 0, 0
    found = linear_rule(x, weight, relevance, alpha=alpha)
    for image in range(2):
        expected = slow_linear_tokens(x[image], weight, relevance[image], alpha)
        torch.testing.assert_close(found[image], expected, **TIGHT)


def test_the_rule_of_products():
    a, b, relevance = random(2, 3, 4, 5), random(2, 3, 5, 6, seed=1), random(2, 3, 4, 6, seed=2)
    found = matmul_rule(a, b, relevance)
    for image, head in itertools.product(range(2), range(3)):
        expected = slow_matmul(a[image, head], b[image, head], relevance[image, head])
        for mine, slow in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[image, head], slow, **TIGHT)


def test_the_rule_of_sums_takes_each_image_by_itself():
    x, y, relevance = random(2, 3, 4), random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    found = add_rule(x, y, relevance)
    for image in range(2):
        for mine, slow in zip(found, slow_add(x[image], y[image], relevance[image]), strict=True):
            torch.testing.assert_close(mine[image], slow, **TIGHT)


def test_the_rule_of_copies():
    x, relevances = random(3, 4), [random(3, 4, seed=1), random(3, 4, seed=2)]
    x[0, 0] = 0
    torch.testing.assert_close(clone_rule(x, relevances), slow_clone(x, relevances), **TIGHT)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_no_rule_makes_or_loses_relevance(alpha: float):
    x, weight = random(2, 3, 8), random(5, 8, seed=1)
    relevance = random(2, 3, 5, seed=2)
    shared = linear_rule(x, weight, relevance, alpha=alpha)
    torch.testing.assert_close(shared.sum(-1), relevance.sum(-1), **TIGHT)
    of_a, of_b = matmul_rule(x, weight.mT.expand(2, -1, -1), relevance)
    torch.testing.assert_close(of_a.sum((1, 2)) + of_b.sum((1, 2)), relevance.sum((1, 2)), **TIGHT)
    torch.testing.assert_close(of_a.sum(), of_b.sum(), **TIGHT)
    y, of_sum = random(2, 3, 8, seed=3), random(2, 3, 8, seed=4)
    of_x, of_y = add_rule(x, y, of_sum)
    torch.testing.assert_close(of_x.sum((1, 2)) + of_y.sum((1, 2)), of_sum.sum((1, 2)), **TIGHT)
    torch.testing.assert_close(clone_rule(x, [of_sum, y]).sum(), (of_sum + y).sum(), **TIGHT)


# ------------------------------------------------------------ whole maps, one image at a time


class SlowViT:
    """One image through a tiny LV-ViT or timm ViT, written out; keeps all that rules need."""

    def __init__(self, model: Any, image: Tensor) -> None:
        self.model, self.blocks = model, []
        if isinstance(model, LVViT):
            x = torch.cat([model.cls_token[0], model.patch_embed(image[None])[0]])
            x = x + model.pos_embed[0]
        else:
            x = model._pos_embed(model.patch_embed(image[None]))[0]
        for block in model.blocks:
            x = self._block(block, x)
        self.tokens = model.norm(x)

    def _block(self, block: Any, x: Tensor) -> Tensor:
        divisor = getattr(block, "residual_divisor", 1.0)
        num_heads = block.attn.num_heads
        seen: dict[str, Any] = {"block": block, "x": x, "qkv_in": block.norm1(x)}
        q, k, v = block.attn.qkv(seen["qkv_in"]).view(len(x), 3, num_heads, -1).permute(1, 2, 0, 3)
        attention = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        attention.retain_grad()
        seen |= {"q": q, "k": k, "v": v, "attention": attention}
        seen["proj_in"] = (attention @ v).transpose(0, 1).reshape(len(x), -1)
        seen["y1"] = block.attn.proj(seen["proj_in"]) / divisor
        seen["middle"] = x + seen["y1"]
        seen["fc1_in"] = block.norm2(seen["middle"])
        seen["fc2_in"] = F.gelu(block.mlp.fc1(seen["fc1_in"]))
        seen["y2"] = block.mlp.fc2(seen["fc2_in"]) / divisor
        self.blocks.append(seen)
        return seen["middle"] + seen["y2"]

    def logit(self, index: int, target: str) -> tuple[Tensor, int | None]:
        """Return the class's logit, and the token of the dense head that counts, if one does."""
        of_class = self.model.head(self.tokens[0])[index]
        if target == "class" or not isinstance(self.model, LVViT):
            return of_class, None
        of_tokens = self.model.aux_head(self.tokens[1:])[:, index]
        best = int(of_tokens.argmax())
        return of_class + 0.5 * of_tokens[best], 1 + best

    def relevance_of_tokens(self, index: int, best: int | None, alpha: float) -> Tensor:
        def through(head: Any, token: int, share: Tensor) -> Tensor:
            x = self.tokens[token].detach()
            found = torch.zeros_like(self.tokens)
            of_token = slow_linear(x, head.weight, share, alpha)
            found[token] = slow_clone(x, [of_token])
            return found

        outputs = self.model.head(self.tokens[0]).detach()
        one = torch.zeros_like(outputs)
        one[index] = 1
        if best is None:
            return through(self.model.head, 0, one)
        dense = 0.5 * self.model.aux_head(self.tokens[best]).detach()
        of_class, of_dense = slow_add(outputs, dense, one)
        parts = [through(self.model.head, 0, of_class)]
        parts.append(through(self.model.aux_head, best, of_dense))
        return slow_clone(self.tokens.detach(), parts)

    def relevances(self, index: int, best: int | None, alpha: float) -> list[Tensor]:
        relevance, found = self.relevance_of_tokens(index, best, alpha), []
        for kept in reversed(self.blocks):
            seen = {name: v.detach() for name, v in kept.items() if isinstance(v, Tensor)}
            mlp, attn = kept["block"].mlp, kept["block"].attn
            middle, of_mlp = slow_add(seen["middle"], seen["y2"], relevance)
            of_mlp = slow_linear_tokens(seen["fc2_in"], mlp.fc2.weight, of_mlp, alpha)
            of_mlp = slow_linear_tokens(seen["fc1_in"], mlp.fc1.weight, of_mlp, alpha)
            relevance = slow_clone(seen["middle"], [middle, of_mlp])
            below, of_attn = slow_add(seen["x"], seen["y1"], relevance)
            of_attn = slow_linear_tokens(seen["proj_in"], attn.proj.weight, of_attn, alpha)
            num_heads, t, width = seen["q"].shape
            of_qkv = torch.zeros(t, 3, num_heads, width, dtype=torch.float64)
            of_attention = torch.zeros_like(seen["attention"])
            for head in range(num_heads):
                of_head = of_attn[:, head * width : (head + 1) * width]
                a, v = seen["attention"][head], seen["v"][head]
                of_attention[head], of_qkv[:, 2, head] = slow_matmul(a, v, of_head)
                q, k = seen["q"][head], seen["k"][head]
                of_qkv[:, 0, head], of_k = slow_matmul(q, k.mT, of_attention[head])
                of_qkv[:, 1, head] = of_k.mT
            of_attn = of_qkv.reshape(t, -1)
            of_attn = slow_linear_tokens(seen["qkv_in"], attn.qkv.weight, of_attn, alpha)
            relevance = slow_clone(seen["x"], [below, of_attn])
            found.insert(0, of_attention)
        return found


def slow_map(layers: list[Tensor], best: int | None) -> Tensor:
    """GAE's equations 5 and 6 for one image: R = I, then R = R + layer R, block by block."""
    identity = torch.eye(len(layers[0]), dtype=torch.float64)
    joint = identity
    for layer in layers:
        joint = joint + layer @ joint
    owed = joint - identity
    tokens = owed[0].clone()
    if best is not None:
        tokens += owed[best]
        tokens[best] += owed[best].sum()  # its own patch counts as much as all others together
    side = math.isqrt(len(tokens) - 1)
    return tokens[1:].view(side, side)


def slow_attribution(
    model: Any, image: Tensor, index: int, *, target: str, first: int = 0, alpha: float = 1.0
) -> Tensor:
    slow = SlowViT(model, image)
    logit, best = slow.logit(index, target)
    logit.backward()
    relevances = slow.relevances(index, best, alpha)
    layers = [
        (seen["attention"].grad * relevance).clamp(min=0).mean(0)
        for seen, relevance in zip(slow.blocks, relevances, strict=True)
    ]
    return slow_map(layers[first:], best).detach()


def slow_gae(model: Any, image: Tensor, index: int, *, target: str, first: int = 0) -> Tensor:
    slow = SlowViT(model, image)
    logit, best = slow.logit(index, target)
    logit.backward()
    layers = [
        (seen["attention"].grad * seen["attention"]).clamp(min=0).mean(0) for seen in slow.blocks
    ]
    return slow_map(layers[first:], best).detach()


@pytest.mark.parametrize(
    ("skip_lam", "target", "start_layer", "alpha"),
    [(1.0, "prediction", 0, 1.0), (2.0, "class", 1, 1.0), (3.0, "prediction", 0, 2.0)],
)
def test_transformer_attribution_is_its_rules_followed_literally(
    skip_lam: float, target: Any, start_layer: int, alpha: float
):
    model, images = small_lvvit(side_px=32, skip_lam=skip_lam), pictures(1, side_px=32)
    options = Options(target=target, start_layer=start_layer, alpha=alpha)
    found = explain("transformer_attribution", model, images, CLASSES[:1], options)
    expected = slow_attribution(
        model, images[0], int(CLASSES[0]), target=target, first=start_layer, alpha=alpha
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-15)


def test_transformer_attribution_of_a_timm_vit_follows_the_same_rules():
    model, images = small_timm("vit_tiny_patch16_224", img_size=32), pictures(1, side_px=32)
    found = explain("transformer_attribution", model, images, CLASSES[:1])
    expected = slow_attribution(model, images[0], int(CLASSES[0]), target="prediction")
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("skip_lam", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("target", ["prediction", "class"])
def test_gae_is_its_formula(skip_lam: float, target: Any):
    model, images = small_lvvit(skip_lam=skip_lam), pictures()
    for start_layer in (0, 1):
        options = Options(target=target, start_layer=start_layer)
        found = explain("gae", model, images, CLASSES, options)
        for heatmap, image, index in zip(found, images, CLASSES.tolist(), strict=True):
            expected = slow_gae(model, image, index, target=target, first=start_layer)
            torch.testing.assert_close(heatmap, expected)


def test_gradients_are_those_of_moving_the_attention():
    model, images = small_lvvit(side_px=32, depth=1), pictures(1, side_px=32)
    seen = trace(model, images)
    parts = readouts(seen, CLASSES[:1], "class")
    (gradient,) = attention_gradients(seen, parts, CLASSES[:1])
    block, step = SlowViT(model, images[0]).blocks[0], 1e-6

    def logit(attention: Tensor) -> float:
        x = (attention @ block["v"]).transpose(0, 1).reshape(5, -1)
        middle = block["x"] + block["block"].attn.proj(x) / 2
        mlp = block["block"].mlp
        tokens = middle + mlp.fc2(F.gelu(mlp.fc1(block["block"].norm2(middle)))) / 2
        return float(model.head(model.norm(tokens)[0])[CLASSES[0]].detach())

    for head, column in itertools.product(range(2), range(5)):
        moved = torch.zeros_like(block["attention"])
        moved[head, 0, column] = step
        rise = logit(block["attention"] + moved) - logit(block["attention"] - moved)
        assert gradient[0, head, 0, column] == pytest.approx(rise / (2 * step), rel=1e-5)


def test_rollout_and_raw_attention_are_their_formulas():
    model, images = small_lvvit(), pictures()
    for start_layer in (0, 1):
        found = explain("rollout", model, images, CLASSES, Options(start_layer=start_layer))
        for heatmap, image in zip(found, images, strict=True):
            joint = torch.eye(10, dtype=torch.float64)
            for seen in SlowViT(model, image).blocks[start_layer:]:
                joint = (seen["attention"].mean(0) / 2 + torch.eye(10) / 2) @ joint
            torch.testing.assert_close(heatmap, joint[0, 1:].view(3, 3).detach())
    for heatmap, image in zip(explain("raw", model, images, CLASSES), images, strict=True):
        last = SlowViT(model, image).blocks[-1]["attention"]
        torch.testing.assert_close(heatmap, last.mean(0)[0, 1:].view(3, 3).detach())


def test_dense_is_the_dense_heads_probability_of_each_patch():
    model, images = small_lvvit(), pictures()
    for heatmap, image, index in zip(
        explain("dense", model, images, CLASSES), images, CLASSES.tolist(), strict=True
    ):
        tokens = SlowViT(model, image).tokens[1:]
        expected = model.aux_head(tokens).softmax(-1)[:, index].view(3, 3)
        torch.testing.assert_close(heatmap, expected.detach())


# ---------------------------------------------------------------------- what holds of all maps


@each_model
def test_a_batch_has_the_maps_of_its_images_one_by_one(name: str):
    model, images = MODELS[name](), pictures(3)
    classes = torch.tensor([0, 4, 2])
    for method in possible(model):
        together = explain(method, model, images, classes)
        for i in range(3):
            alone = explain(method, model, images[i : i + 1], classes[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize(("side_px", "grid"), [(224, 14), (384, 24)])
def test_published_resolutions_have_their_grids(side_px: int, grid: int):
    model, images = small_lvvit(side_px=side_px, depth=1), pictures(1, side_px)
    for method in METHODS:
        heatmaps = explain(method, model, images, CLASSES[:1])
        assert heatmaps.shape == (1, grid, grid) and heatmaps.isfinite().all()


def test_oblong_images_have_oblong_maps():
    torch.manual_seed(0)
    model = LVViT(img_size=(32, 48), num_classes=5, embed_dim=8, depth=1, num_heads=2, stem_width=2)
    for method in METHODS:
        assert explain(method, model, torch.randn(1, 3, 32, 48), CLASSES[:1]).shape == (1, 2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_heads_changes_nothing(method: str):
    model, images = small_lvvit(), pictures()
    expected = explain(method, model, images, CLASSES)
    for block in model.blocks:
        qkv, proj = block.attn.qkv.weight, block.attn.proj.weight
        qkv.data = qkv.data.view(3, 2, 8, 16).flip(1).reshape(48, 16)
        proj.data = proj.data.view(16, 2, 8).flip(1).reshape(16, 16)
    torch.testing.assert_close(explain(method, model, images, CLASSES), expected, rtol=1e-6, atol=0)


def test_only_methods_of_a_class_tell_classes_apart():
    model, images = small_lvvit(), pictures()
    for name, method in METHODS.items():
        maps = [explain(name, model, images, torch.tensor([c, c])) for c in (0, 1)]
        assert torch.equal(*maps) != method.of_class, name


def test_a_dense_head_that_was_never_taught_takes_no_part():
    model, images = small_lvvit(), pictures()
    model.silence_dense_head(zero=True)
    for method in ("gae", "transformer_attribution"):
        maps = [
            explain(method, model, images, CLASSES, Options(target=target))
            for target in ("prediction", "class")
        ]
        assert torch.equal(*maps)
    assert "dense" not in possible(model)
    with pytest.raises(ValueError, match="LVViT has no dense head that was taught"):
        explain("dense", model, images, CLASSES)


def test_noise_depends_on_the_picture_and_the_seed_alone():
    model, images = small_lvvit(), pictures().float().double()
    noise = explain("random", model, images, CLASSES)
    single = explain("random", model.float(), images.float(), CLASSES)
    torch.testing.assert_close(single.double(), noise, rtol=1e-6, atol=1e-7)
    assert not torch.equal(noise[0], noise[1])
    other = explain("random", model.double(), images, CLASSES, Options(seed=1))
    assert not torch.equal(noise, other)
    assert 0 <= noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.2


def test_what_is_wrong_is_said():
    model, images = small_lvvit(), pictures()
    with pytest.raises(ValueError, match="unknown method 'gea'; known: gae, transformer"):
        explain("gea", model, images, CLASSES)
    with pytest.raises(ValueError, match="start_layer = 2; the model's blocks are 0 to 1"):
        explain("gae", model, images, CLASSES, Options(start_layer=2))
    with pytest.raises(ValueError, match=r"alpha = 0\.5; allowed: alpha >= 1"):
        explain("transformer_attribution", model, images, CLASSES, Options(alpha=0.5))


def test_upsampling_puts_a_patchs_value_at_its_centre_and_normalising_stretches():
    maps = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]])
    larger = upsample(maps, (6, 6))
    centres = [float(larger[0, y, x]) for y, x in [(1, 1), (1, 4), (4, 1), (4, 4)]]
    assert centres == pytest.approx([1, 3, 5, 1])
    assert larger[0, 0, 0] == 1 and float(larger[0, 1, 2]) == pytest.approx(1 + 2 / 3)
    assert normalize(maps).flatten().tolist() == [0, 0.5, 1, 0]
    assert normalize(torch.full((1, 2, 2), 7.0)).flatten().tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------- a model that is known to look


def corner_images(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """3 × 3 patches of random colours; the class is the colour of the last row's first patch."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.eye(3)
    chosen = torch.randint(3, (num, 3, 3), generator=generator)
    images = colours[chosen].permute(0, 3, 1, 2)
    images = images.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return images + 0.1 * torch.randn(images.shape, generator=generator), chosen[:, 2, 0]


@pytest.fixture(scope="module")
def corner_model() -> LVViT:
    """A model that was taught to name the colour of one corner, and of which patch it lies in."""
    torch.manual_seed(5)
    model = LVViT(img_size=48, num_classes=4, embed_dim=24, depth=2, num_heads=2, stem_width=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    images, classes = corner_images(512, seed=0)
    tokens = torch.full((512, 9), 3)
    tokens[:, 6] = classes
    for _ in range(80):
        chosen = torch.randint(512, (32,))
        of_class, of_tokens, _ = model(images[chosen])
        loss = F.cross_entropy(of_class, classes[chosen])
        loss = loss + 0.3 * F.cross_entropy(of_tokens.flatten(0, 1), tokens[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_looks_at_one_corner_is_explained_by_that_corner(
    method: str, corner_model: LVViT
):
    images, classes = corner_images(64, seed=1)
    with torch.no_grad():
        assert (corner_model(images).argmax(1) == classes).float().mean() > 0.95
    heatmaps = explain(method, corner_model, images, classes)
    found = (heatmaps.flatten(1).argmax(1) == 6).float().mean()
    assert found < 0.3 if method == "random" else found > 0.8


def test_single_precision_agrees_with_double_on_a_trained_model(corner_model: LVViT):
    images, classes = corner_images(16, seed=2)
    single = explain("transformer_attribution", corner_model, images, classes)
    corner_model.double()
    double = explain("transformer_attribution", corner_model, images.double(), classes)
    corner_model.float()
    for a, b in zip(single, double, strict=True):
        assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.999


def test_relevance_is_kept_for_the_blocks_that_count():
    model, images = small_lvvit(depth=3), pictures()
    seen = trace(model, images, inputs=True)
    parts = readouts(seen, CLASSES, "class")
    with torch.no_grad():
        every = attention_relevances(seen, parts, CLASSES)
        upper = attention_relevances(seen, parts, CLASSES, first_layer=2)
    assert len(every) == 3 and len(upper) == 1 and torch.equal(every[2], upper[0])
