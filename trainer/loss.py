"""Token-label cross-entropy, exact, on sparse targets.

The dense target of one ImageNet batch of 256 would be 256 × 196 × 1000 floats. The loss needs only
the palette: with p its probabilities, b the background of all other classes and x the logits,

    cross-entropy = logsumexp(x) - Σ_u (p_u - b) · x_u - b · Σ_c x_c

because every target sums to 1.
"""

from typing import NamedTuple

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..labeler.geometry import TokenTargets
from .mix_token import MixBox


class TokenLabelLoss(NamedTuple):
    """Scalars, means over the batch."""

    total: Float32[Tensor, ""]
    """class_weight · class_loss + dense_weight · dense_loss; this one is minimised."""
    class_loss: Float32[Tensor, ""]
    dense_loss: Float32[Tensor, ""]


def token_label_loss(
    class_logits: Float[Tensor, "b c"],
    aux_logits: Float[Tensor, "b n c"] | None,
    targets: TokenTargets,
    *,
    box: MixBox | None = None,
    class_weight: float = 1.0,
    dense_weight: float = 1.0,
) -> TokenLabelLoss:
    """Teach the class token its view and every patch token its own part of it.

    L = L_class + β · L_dense of https://arxiv.org/abs/2104.10858, equation 4; the paper writes
    β = 0.5, its commands use 1. Both parts are divided by the constant number of images or tokens,
    not by the number that carry weight: so the mean over N processes is that of one.

    Args:
        class_logits: Of the class token.
        aux_logits: Of the patch tokens, row-major, each facing its own image (MixToken undone);
            None for a model without a dense head.
        targets: From targets.batch_targets.
        box: What MixToken swapped; the class target is mixed by the share of tokens kept.
        class_weight: Factor of the class part.
        dense_weight: β; 0 leaves the dense part out altogether.
    """
    class_loss = _class_losses(class_logits, targets, box).mean()
    dense_loss = class_loss.new_zeros(())
    if aux_logits is not None and dense_weight:
        per_token = sparse_cross_entropy(
            aux_logits, targets.palette, targets.tokens, targets.token_background
        )
        dense_loss = (per_token * targets.token_weight).mean()
    total = class_weight * class_loss + dense_weight * dense_loss
    return TokenLabelLoss(total, class_loss, dense_loss)


def _class_losses(
    logits: Float[Tensor, "b c"], targets: TokenTargets, box: MixBox | None
) -> Float32[Tensor, " b"]:
    """Cross-entropy of the class token; linear in the target, so mixing losses mixes targets."""

    def against(flip: bool) -> Float32[Tensor, " b"]:
        palette, view = targets.palette, targets.view
        background, weight = targets.view_background, targets.view_weight
        if flip:
            palette, view = palette.flip(0), view.flip(0)
            background, weight = background.flip(0), weight.flip(0)
        losses = sparse_cross_entropy(logits[:, None], palette, view[:, None], background[:, None])
        return losses[:, 0] * weight

    if box is None or box.kept == 1:
        return against(flip=False)
    return box.kept * against(flip=False) + (1 - box.kept) * against(flip=True)


def sparse_cross_entropy(
    logits: Float[Tensor, "b n c"],
    palette: Int64[Tensor, "b u"],
    probabilities: Float32[Tensor, "b n u"],
    background: Float32[Tensor, "b n"],
) -> Float32[Tensor, "b n"]:
    """Cross-entropy of targets that are given on a palette, in float32.

    Palette entries whose probability equals the background add nothing, so padding is free.
    """
    x = logits.float()
    on_palette = x.gather(2, palette[:, None].expand_as(probabilities))
    above_background = probabilities - background[..., None]
    return x.logsumexp(2) - (above_background * on_palette).sum(2) - background * x.sum(2)
