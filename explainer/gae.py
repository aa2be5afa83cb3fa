"""GAE, generic attention explainability: attention × gradient, carried through the blocks.

Chefer et al., ICCV 2021 (https://arxiv.org/abs/2103.15679), equations 5 and 6 for self-attention.
One forward and one backward pass; no relevance rules.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .attention import Target, attention_gradients, readouts, trace
from .rollout import Heatmaps, accumulate, first_layer, read_rows


@torch.enable_grad()
def gae(
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    classes: Int64[Tensor, " b"],
    *,
    target: Target = "prediction",
    start_layer: int = 0,
) -> Heatmaps:
    """Show which patches speak for a class.

    Each block's attention counts as far as the class's logit would rise with it:
    mean over heads of max(gradient ⊙ attention, 0).

    Args:
        model: See attention.transformer_of.
        images: Normalised pixels.
        classes: The class of each image to explain.
        target: See attention.Target.
        start_layer: First block that counts, counted from 0.

    Raises:
        ValueError: As attention.trace, or no such layer.
    """
    seen = trace(model, images)
    parts = readouts(seen, classes, target)
    gradients = attention_gradients(seen, parts, classes)
    layers = [
        (gradient * attention.detach()).clamp(min=0).mean(1)
        for gradient, attention in zip(gradients, seen.attentions, strict=True)
    ]
    return read_rows(seen, parts, accumulate(layers[first_layer(seen, start_layer) :]))
