"""Attention is taken from models, and nothing stays behind in them."""

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers.mlp import SwiGLU
from torch import Tensor, nn

from tokenlabel.explainer.attention import logits, readouts, trace, transformer_of
from tokenlabel.explainer.methods import METHODS, explain, possible
from tokenlabel.trainer.models.lvvit import LVViT
from tokenlabel.trainer.models.token_labeled import TokenLabeled


def small_lvvit(*, side_px: int = 48, skip_lam: float = 2.0, depth: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = LVViT(
        img_size=side_px,
        num_classes=5,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        stem_width=2,
        residual_divisor=skip_lam,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "bn" not in name:
                parameter.normal_(0, 0.3)  # fresh weights look everywhere alike
    return model.double().eval()


def small_timm(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "img_size": 48,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = timm.create_model(name, **size | kwargs)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "norm" not in name_:
                parameter.normal_(0, 0.3)
    return model.double().eval()


MODELS = {
    "lvvit": small_lvvit,
    "vit": lambda: small_timm("vit_tiny_patch16_224"),
    "distilled deit": lambda: small_timm("deit_tiny_distilled_patch16_224"),
    "deit3 with layer scale": lambda: small_timm("deit3_small_patch16_224"),
    "vit with average pooling": lambda: small_timm("vit_base_patch16_gap_224"),
    "vit with registers": lambda: small_timm("vit_base_patch16_224", reg_tokens=3),
    "student around a vit": lambda: (
        TokenLabeled(small_timm("vit_tiny_patch16_224").float(), image_size=(48, 48))
        .double()
        .eval()
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def pictures(num: int = 2, side_px: int = 48) -> Tensor:
    return torch.randn(
        num, 3, side_px, side_px, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def attentions_by_hand(model: Any, images: Tensor) -> list[Tensor]:
    """Recompute each block's attention from its input, with a hook of the test's own."""
    seen: list[tuple[Any, Tensor]] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0])))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, x in seen:
        b, t, width = x.shape
        q, k, _ = layer.qkv(x).view(b, t, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / (width / layer.num_heads) ** 0.5
        found.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
    return found


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything in a model that something could stay behind in."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:
                        where = f"{name}.{key}"
                        yield where, (tensor.requires_grad, tensor.grad is None, tensor.clone())
            elif attribute.endswith("_hooks"):
                yield f"{name}.{attribute}", list(value)
            elif attribute != "_modules":
                yield f"{name}.{attribute}", value
        yield f"{name}.forward", module.forward


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and len(a) == 3 and isinstance(a[2], Tensor):
        return a[:2] == b[:2] and torch.equal(a[2], b[2])
    return a == b


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = dict(state_of(model))
    assert after.keys() == before.keys()
    assert [name for name in before if not same(before[name], after[name])] == []


@each_model
def test_attention_is_what_the_layers_compute_and_the_answer_stays_the_same(name: str):
    model, images = MODELS[name](), pictures()
    seen = trace(model, images)
    transformer = transformer_of(model)
    for attention, by_hand in zip(
        seen.attentions, attentions_by_hand(transformer, images), strict=True
    ):
        torch.testing.assert_close(attention, by_hand)
    torch.testing.assert_close(seen.tokens, transformer.forward_features(images))
    assert seen.grid == (3, 3)


@each_model
def test_the_heads_that_are_explained_make_the_models_answer(name: str):
    model, images = MODELS[name](), pictures()
    answer = model(images)
    for index in range(5):
        classes = torch.full((2,), index)
        seen = trace(model, images)
        parts = logits(seen, readouts(seen, classes, "prediction"))
        torch.testing.assert_close(torch.stack(parts).sum(0)[:, index], answer[:, index])


def test_the_class_head_alone_can_be_explained():
    model, images = small_lvvit(), pictures()
    seen = trace(model, images)
    (only,) = logits(seen, readouts(seen, torch.tensor([0, 1]), "class"))
    torch.testing.assert_close(only, model.head(seen.tokens[:, 0]))


@each_model
def test_nothing_is_left_on_a_model(name: str):
    model, images = MODELS[name](), pictures()
    before, answer = dict(state_of(model)), model(images)
    for method in possible(model):
        explain(method, model, images, torch.tensor([0, 1]))
        assert_untouched(model, before)
    assert torch.equal(model(images), answer)


@pytest.mark.parametrize("method", ["gae", "transformer_attribution", "rollout", "raw"])
def test_nothing_is_left_on_a_model_after_an_exception(method: str):
    model, images = small_timm("vit_tiny_patch16_224"), pictures()
    model.train()
    model.set_grad_checkpointing(True)
    model.blocks[0].attn.fused_attn = False
    model.blocks[1].mlp.fc2.weight.data = torch.zeros(3, 3, dtype=torch.float64)
    before = dict(state_of(model))
    with pytest.raises(RuntimeError):
        explain(method, model, images, torch.tensor([0, 1]))
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="doesn't match model"):
        explain(method, model, pictures(side_px=64), torch.tensor([0, 1]))
    assert_untouched(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_training_is_explained_as_in_evaluation_and_goes_on_training(method: str):
    model, images, classes = small_lvvit(), pictures(), torch.tensor([0, 1])
    expected = explain(method, model, images, classes)
    model.train()
    model.blocks[1].eval()  # as someone who trains a part of it would have it
    before = dict(state_of(model))
    assert torch.equal(explain(method, model, images, classes), expected)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_and_callers_without_gradients_get_the_same_maps(method: str):
    model, images, classes = small_lvvit(), pictures(), torch.tensor([0, 1])
    expected = explain(method, model, images, classes)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(explain(method, model, images, classes), expected)


def test_attention_that_timm_does_not_fuse_is_taken_as_well():
    model, images = small_timm("vit_tiny_patch16_224"), pictures()
    expected = explain("gae", model, images, torch.tensor([0, 1]))
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(explain("gae", model, images, torch.tensor([0, 1])), expected)
    assert not any(block.attn.fused_attn for block in model.blocks)


def test_what_has_no_attention_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="ResNet has no attention .* vision transformer"):
        transformer_of(timm.create_model("test_resnet"))
    with pytest.raises(ValueError, match="has no classifier"):
        transformer_of(LVViT(img_size=32, embed_dim=8, num_heads=2, depth=1, num_classes=0))
    with pytest.raises(ValueError, match="pools tokens by 'map'"):
        transformer_of(small_timm("vit_base_patch16_siglip_224"))
    with pytest.raises(ValueError, match="of the kind ParallelThingsBlock"):
        transformer_of(small_timm("vit_small_patch16_18x2_224"))


def test_blocks_without_rules_are_refused_by_the_method_that_needs_rules():
    model = small_timm("vit_base_patch14_dinov2", patch_size=16, mlp_layer=SwiGLU)
    assert "gae" in possible(model) and "transformer_attribution" not in possible(model)
    with pytest.raises(ValueError, match="not Block with SwiGLU; gae needs no rules"):
        explain("transformer_attribution", model, pictures(), torch.tensor([0, 1]))
