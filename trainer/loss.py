"""Token-label cross-entropy, exact, on sparse targets.

The dense target of one ImageNet batch of 256 would be 256 × 196 × 1000 floats. The loss needs only
the palette: with p its probabilities, b the background of all other classes and x the logits,

    cross-entropy = logsumexp(x) - Σ_u (p_u - b) · x_u - b · Σ_c x_c

because every target sums to 1.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..labeler.geometry import TokenTargets
from .mix_token import MixBox

_IMAGES_IN_CACHE = 8
"""Images whose logits a CPU looks at a few times while they are in its cache."""

_SURE = 1e-30
"""Probabilities above it have all of float32's digits."""


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
    class_loss = _class_loss(class_logits, targets, box)
    dense_loss = class_loss.new_zeros(())
    if aux_logits is not None and dense_weight:
        dense_loss = sparse_cross_entropy(
            aux_logits,
            targets.palette,
            targets.tokens,
            targets.token_background,
            targets.token_weight / targets.token_weight.numel(),
        )
    total = class_weight * class_loss + dense_weight * dense_loss
    return TokenLabelLoss(total, class_loss, dense_loss)


def _class_loss(
    logits: Float[Tensor, "b c"], targets: TokenTargets, box: MixBox | None
) -> Float32[Tensor, ""]:
    """Cross-entropy of the class token; linear in the target, so mixing losses mixes targets."""

    def against(flip: bool) -> Float32[Tensor, ""]:
        palette, view = targets.palette, targets.view
        background, weight = targets.view_background, targets.view_weight
        if flip:
            palette, view = palette.flip(0), view.flip(0)
            background, weight = background.flip(0), weight.flip(0)
        return sparse_cross_entropy(
            logits[:, None],
            palette,
            view[:, None],
            background[:, None],
            weight[:, None] / len(view),
        )

    if box is None or box.kept == 1:
        return against(flip=False)
    return box.kept * against(flip=False) + (1 - box.kept) * against(flip=True)


def sparse_cross_entropy(
    logits: Float[Tensor, "b n c"],
    palette: Int64[Tensor, "b u"],
    probabilities: Float32[Tensor, "b n u"],
    background: Float32[Tensor, "b n"],
    weights: Float32[Tensor, "b n"],
) -> Float32[Tensor, ""]:
    """Sum up the weighted cross-entropies of targets that are given on a palette, in float32.

    Palette entries whose probability equals the background add nothing, so padding is free. The
    gradient of the logits is formed along with the loss, in one visit of each token's logits;
    so it can be fetched by one backward pass only, and is not itself differentiable.
    """
    return _SparseCrossEntropy.apply(logits, palette, probabilities, background, weights)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        palette: Tensor,
        probabilities: Tensor,
        background: Tensor,
        weights: Tensor,
    ) -> Tensor:
        logits = logits.contiguous()
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        ctx.gradient = gradient
        given = (logits, palette, probabilities, background, weights)
        kernel = _kernel_for(logits)
        if kernel:
            return kernel(*given, gradient).sum()
        if logits.device.type != "cpu":
            return _losses(*given, gradient).sum()
        total = logits.new_zeros((), dtype=torch.float32)
        for i in range(0, len(logits), _IMAGES_IN_CACHE):
            rows = slice(i, i + _IMAGES_IN_CACHE)
            out = None if gradient is None else gradient[rows]
            few = [tensor[rows] for tensor in given]
            total += _losses(*few, gradient=out).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, factor: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError("the gradient of this loss has been fetched; compute the loss anew")
        gradient, ctx.gradient = ctx.gradient, None
        # The usual factor is 1; one look at it, where that is free, saves a pass over the logits.
        if factor.device.type != "cpu" or factor.item() != 1:
            gradient.mul_(factor)
        return gradient, None, None, None, None


def _kernel_for(logits: Tensor) -> Callable[..., Tensor] | None:
    """Find the fused kernel where there is one for this device and class count."""
    if logits.device.type != "cuda" or find_spec("triton") is None:
        return None
    from .loss_kernel import MOST_CLASSES, sparse_cross_entropies

    return sparse_cross_entropies if logits.shape[2] <= MOST_CLASSES else None


def _losses(
    logits: Float[Tensor, "b n c"],
    palette: Int64[Tensor, "b u"],
    probabilities: Float32[Tensor, "b n u"],
    background: Float32[Tensor, "b n"],
    weights: Float32[Tensor, "b n"],
    gradient: Float[Tensor, "b n c"] | None,
) -> Float32[Tensor, "b n"]:
    """Compute each token's weighted cross-entropy, and write the gradient of their sum."""
    x = logits.float()
    above = probabilities - background[..., None]
    index = palette[:, None].expand_as(above)
    linear = torch.linalg.vecdot(above, x.gather(2, index)) + background * x.sum(2)
    if gradient is None:
        return (x.logsumexp(2) - linear) * weights
    # softmax(x) - target, the target being background + above on the palette.
    exact = gradient if gradient.dtype == torch.float32 else torch.empty_like(x)
    torch.softmax(x, 2, out=exact)
    logsumexp = _logsumexp(x, exact)
    exact.sub_(background[..., None]).mul_(weights[..., None])
    exact.scatter_add_(2, index, above.mul_(-weights[..., None]))
    if exact is not gradient:
        gradient.copy_(exact)
    return (logsumexp - linear) * weights


def _logsumexp(x: Float32[Tensor, "b n c"], softmax: Float32[Tensor, "b n c"]) -> Tensor:
    """Logsumexp of logits whose softmax is known: x - log(softmax) of any class."""
    first = softmax[..., 0]
    # On a GPU a look would make the host wait; there (and after underflow) the likeliest class.
    if x.device.type == "cpu" and first.numel() and float(first.min()) > _SURE:
        return x[..., 0] - first.log()
    return x.amax(2) - softmax.amax(2).log()
