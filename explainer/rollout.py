"""Heatmaps from attention alone, the same for every class: attention rollout and raw attention.

Rollout (https://arxiv.org/abs/2005.00928) multiplies the attention of all blocks, each averaged
over its heads and mixed half and half with the identity, which stands for the residual connection.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .attention import Readout, Trace, class_readouts, trace

Heatmaps = Float[Tensor, "b rows cols"]


@torch.no_grad()
def rollout(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], *, start_layer: int = 0
) -> Heatmaps:
    """Follow attention from what the head reads down to the patches.

    Args:
        model: See attention.transformer_of.
        images: Normalised pixels.
        start_layer: First block that is followed, counted from 0.

    Raises:
        ValueError: As attention.trace, or no such layer.
    """
    seen = trace(model, images)
    layers = []
    for attention in seen.attentions[first_layer(seen, start_layer) :]:
        mixed = attention.mean(1) + torch.eye(attention.shape[-1]).to(attention)
        layers.append(mixed / mixed.sum(-1, keepdim=True))
    joint = layers[0]
    for layer in layers[1:]:
        joint = layer @ joint
    return on_grid(seen, _rows_of_head(seen, joint))


@torch.no_grad()
def raw(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Heatmaps:
    """Show where the head's token looks in the last block, on average over the heads."""
    seen = trace(model, images)
    return on_grid(seen, _rows_of_head(seen, seen.attentions[-1].mean(1)))


def first_layer(seen: Trace, start_layer: int) -> int:
    """Check the number of a block."""
    if not 0 <= start_layer < len(seen.blocks):
        raise ValueError(
            f"start_layer = {start_layer}; the model's blocks are 0 to {len(seen.blocks) - 1}"
        )
    return start_layer


def accumulate(layers: Sequence[Float[Tensor, "b t t"]]) -> Float[Tensor, "b t t"]:
    """Carry relevance through residual blocks: the product of all (layer + identity).

    Args:
        layers: What each block moves from column to row, lowest block first.

    Returns:
        How much token i, at the end, owes to patch or token j, without the identity: what it was
        itself from the start.
    """
    identity = torch.eye(layers[0].shape[-1]).to(layers[0])
    joint = layers[0] + identity
    for layer in layers[1:]:
        joint = joint + layer @ joint
    return joint - identity


def read_rows(seen: Trace, parts: Sequence[Readout], joint: Float[Tensor, "b t t"]) -> Heatmaps:
    """Sum what the tokens that heads read owe to each patch.

    Where a head reads a patch's own token, that patch counts as much as all that its token gathered
    from others: the balance of equations 8 and 9 of GAE. (The published methods know of class
    tokens only, which are no patch.)
    """
    rows = []
    for part in parts:
        gathered = torch.einsum("bt,bts->bs", part.weights, joint)
        rows.append(gathered + part.weights * joint.sum(-1))
    return on_grid(seen, torch.stack(rows).sum(0))


def on_grid(seen: Trace, tokens: Float[Tensor, "b t"]) -> Heatmaps:
    """Lay the patches among the tokens out as they lie in the image."""
    return tokens[:, seen.num_prefix :].unflatten(1, seen.grid).detach()


def _rows_of_head(seen: Trace, joint: Float[Tensor, "b t t"]) -> Float[Tensor, "b t"]:
    """Average the rows of what the heads for the whole image read."""
    rows = [torch.einsum("bt,bts->bs", part.weights, joint) for part in class_readouts(seen)]
    return torch.stack(rows).mean(0)
