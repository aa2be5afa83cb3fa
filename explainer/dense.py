"""The dense head's own map of a class: what the model says of every patch, in one forward pass."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..trainer.models import predict
from ..trainer.models.lvvit import LVViT
from ..trainer.models.token_labeled import DENSE_HEAD, TokenLabeled
from .attention import evaluating, has_dense_head
from .rollout import Heatmaps


def can_be_dense(model: nn.Module) -> bool:
    """Tell whether a model labels patches."""
    if isinstance(model, LVViT):
        return has_dense_head(model)
    return isinstance(model, TokenLabeled) and hasattr(model.backbone, DENSE_HEAD)


@torch.no_grad()
def dense(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], classes: Int64[Tensor, " b"]
) -> Heatmaps:
    """Compute the probability that the dense head gives to a class in each patch.

    Args:
        model: With a dense head.
        images: Normalised pixels.
        classes: The class of each image.

    Raises:
        ValueError: The model has no dense head.
    """
    if not can_be_dense(model):
        raise ValueError(
            f"{type(model).__name__} has no dense head that was taught, so it has no class map of "
            "its own; train one with token labels, or take gae"
        )
    student: Any = model
    with evaluating(model):
        _, tokens = predict(student, images)
    assert tokens is not None
    index = classes[:, None, None].expand(-1, tokens.shape[1], 1)
    return tokens.softmax(-1).gather(2, index)[..., 0].unflatten(1, student.grid)
