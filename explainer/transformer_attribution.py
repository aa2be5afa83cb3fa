"""Transformer attribution: relevance, propagated layer by layer, weights the attention's gradient.

Chefer et al., CVPR 2021 (https://arxiv.org/abs/2012.09838). The rules below carry relevance from
the class down through each layer; what arrives at a block's attention matrix is kept, weighted by
the gradient, and accumulated over the blocks as in gae. docs/explanations.md has each rule, where
the published code differs, and a remark on the licence.

Bias is left out by all rules. Norms, activations, softmax, the attention's scale, layer scale and
LV-ViT's residual divisor pass relevance on as it is.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .attention import (
    BlockTrace,
    Readout,
    Target,
    Trace,
    attention_gradients,
    check_layers,
    head_input,
    logits,
    readouts,
    trace,
    transformer_of,
)
from .rollout import Heatmaps, accumulate, first_layer, read_rows

_EPSILON = 1e-9


def transformer_attribution(
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    classes: Int64[Tensor, " b"],
    *,
    target: Target = "prediction",
    start_layer: int = 0,
    alpha: int | float = 1.0,
) -> Heatmaps:
    """Show which patches speak for a class.

    Args:
        model: See attention.transformer_of; its blocks must be plain ones.
        images: Normalised pixels.
        classes: The class of each image to explain.
        target: See attention.Target. The published code explains the class head alone.
        start_layer: First block that counts, counted from 0. The paper's perturbation tests
            used 1, its notebooks 0.
        alpha: Weight of what excites in linear layers; what inhibits has alpha - 1.

    Raises:
        ValueError: As attention.trace, a kind of block without rules, no such layer, alpha < 1.
    """
    if alpha < 1:
        raise ValueError(f"alpha = {alpha}; allowed: alpha >= 1, the published value is 1")
    check_layers(transformer_of(model))
    with torch.enable_grad():
        seen = trace(model, images, inputs=True)
        parts = readouts(seen, classes, target)
        gradients = attention_gradients(seen, parts, classes)
    first = first_layer(seen, start_layer)
    with torch.no_grad():
        relevances = attention_relevances(seen, parts, classes, first_layer=first, alpha=alpha)
        layers = [
            (gradient * relevance).clamp(min=0).mean(1)
            for gradient, relevance in zip(gradients[first:], relevances, strict=True)
        ]
        return read_rows(seen, parts, accumulate(layers))


def attention_relevances(
    seen: Trace,
    parts: Sequence[Readout],
    classes: Int64[Tensor, " b"],
    *,
    first_layer: int = 0,
    alpha: int | float = 1.0,
) -> list[Float[Tensor, "b h t t"]]:
    """Propagate relevance 1 of each image's class down to the attention of each block.

    Returns:
        That of the blocks from first_layer on, lowest first.
    """
    relevance = _through_heads(seen, parts, classes, alpha)
    found: list[Tensor] = []
    for block in reversed(seen.blocks[first_layer:]):
        relevance, of_attention = _through_block(block, relevance, alpha)
        found.insert(0, of_attention)
    return found


# ---------------------------------------------------------------------------------------- rules


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide; 0 where b is 0. The 1e-9 is added whatever b's sign, as published."""
    shifted = b + _EPSILON
    shifted = torch.where(shifted == 0, _EPSILON, shifted)
    return torch.where(b == 0, 0.0, a / shifted)


def linear_rule(
    x: Float[Tensor, "*b i"],
    weight: Float[Tensor, "o i"],
    relevance: Float[Tensor, "*b o"],
    *,
    alpha: int | float = 1.0,
) -> Float[Tensor, "*b i"]:
    """Share each output's relevance among the inputs that push it up, in proportion.

    With alpha above 1, alpha of it, and alpha - 1 is taken from those that push it down.
    """
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    excited = _linear_share(x, up, down, relevance)
    if alpha == 1:
        return excited
    return alpha * excited - (alpha - 1) * _linear_share(x, down, up, relevance)


def _linear_share(x: Tensor, w_of_up: Tensor, w_of_down: Tensor, relevance: Tensor) -> Tensor:
    """Share relevance among positive inputs by one part of the weights, negative by the other."""
    x_up, x_down = x.clamp(min=0), x.clamp(max=0)
    share = divide(relevance, x_up @ w_of_up.mT + x_down @ w_of_down.mT)
    return x_up * (share @ w_of_up) + x_down * (share @ w_of_down)


def matmul_rule(
    a: Float[Tensor, "*b n m"], b: Float[Tensor, "*b m p"], relevance: Float[Tensor, "*b n p"]
) -> tuple[Float[Tensor, "*b n m"], Float[Tensor, "*b m p"]]:
    """Give half of the relevance of a product to each factor, in proportion to what each adds."""
    share = divide(relevance, a @ b)
    return a * (share @ b.mT) / 2, b * (a.mT @ share) / 2


def add_rule(
    x: Float[Tensor, "b *n"], y: Float[Tensor, "b *n"], relevance: Float[Tensor, "b *n"]
) -> tuple[Float[Tensor, "b *n"], Float[Tensor, "b *n"]]:
    """Share the relevance of a sum between its terms.

    In proportion to each element first; then both terms are scaled so that their totals of an image
    have the image's relevance and the ratio of the totals' magnitudes.
    """
    share = divide(relevance, x + y)
    x_part, y_part = x * share, y * share
    x_sum, y_sum = _per_image(x_part), _per_image(y_part)
    both, total = x_sum.abs() + y_sum.abs(), _per_image(relevance)
    x_scale = divide(divide(x_sum.abs(), both) * total, x_sum)
    y_scale = divide(divide(y_sum.abs(), both) * total, y_sum)
    return x_part * x_scale, y_part * y_scale


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1).view(-1, *[1] * (values.ndim - 1))


def clone_rule(x: Float[Tensor, "*n"], relevances: Sequence[Float[Tensor, "*n"]]) -> Tensor:
    """Add up the relevance that a value has in all the places where it is used."""
    return x * torch.stack([divide(relevance, x) for relevance in relevances]).sum(0)


# --------------------------------------------------------------------------------------- layers


def _through_heads(
    seen: Trace, parts: Sequence[Readout], classes: Int64[Tensor, " b"], alpha: int | float
) -> Float[Tensor, "b t d"]:
    outputs = logits(seen, parts)
    one = torch.zeros_like(outputs[0]).scatter_(1, classes[:, None], 1.0)
    shares = [one] if len(parts) == 1 else add_rule(outputs[0], outputs[1], one)
    found = []
    for part, share in zip(parts, shares, strict=True):
        pooled = torch.einsum("bt,btd->bd", part.weights, seen.tokens)
        weight: Tensor = part.head.weight
        relevance = linear_rule(head_input(seen, part), weight, share, alpha=alpha)
        weighted = part.weights[..., None] * seen.tokens
        found.append(weighted * divide(relevance, pooled)[:, None])
    return found[0] if len(found) == 1 else clone_rule(seen.tokens, found)


def _through_block(
    seen: BlockTrace, relevance: Float[Tensor, "b t d"], alpha: int | float
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h t t"]]:
    block, x = seen.block, seen.inputs
    middle, of_mlp = add_rule(x["norm2"], seen.branches["mlp"], relevance)
    of_mlp = linear_rule(x["fc2"], _weight(block, "mlp.fc2"), of_mlp, alpha=alpha)
    of_mlp = linear_rule(x["fc1"], _weight(block, "mlp.fc1"), of_mlp, alpha=alpha)
    relevance = clone_rule(x["norm2"], [middle, of_mlp])

    below, of_attn = add_rule(x["block"], seen.branches["attn"], relevance)
    of_attn = linear_rule(x["proj"], _weight(block, "attn.proj"), of_attn, alpha=alpha)
    heads = of_attn.unflatten(2, (seen.q.shape[1], -1)).transpose(1, 2)
    of_attention, of_v = matmul_rule(seen.attention, seen.v, heads)
    of_q, of_k = matmul_rule(seen.q, seen.k.mT, of_attention)
    qkv = torch.stack([of_q, of_k.mT, of_v], 2)  # b h 3 t d → b t 3 h d, as the layer's outputs lie
    qkv = qkv.permute(0, 3, 2, 1, 4).flatten(2)
    of_attn = linear_rule(x["qkv"], _weight(block, "attn.qkv"), qkv, alpha=alpha)
    return clone_rule(x["block"], [below, of_attn]), of_attention


def _weight(block: nn.Module, name: str) -> Tensor:
    return block.get_parameter(f"{name}.weight").detach()
