"""Cross-entropy of every pixel, for the main head and the auxiliary one."""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .uper_net import resize

Averaging = Literal["published", "standard"]


class SegLoss(NamedTuple):
    """Scalars."""

    total: Float32[Tensor, ""]
    """main + aux_weight · aux; this one is minimised."""
    main: Float32[Tensor, ""]
    aux: Float32[Tensor, ""]


def seg_loss(
    logits: Float[Tensor, "b c h4 w4"],
    aux_logits: Float[Tensor, "b c rows cols"],
    masks: Int64[Tensor, "b h w"],
    *,
    averaging: Averaging = "published",
    ignore_index: int = 255,
    aux_weight: int | float = 0.4,
) -> SegLoss:
    """Teach both heads the class of every pixel; their logits are resized to the masks.

    Args:
        logits: Of the main head, as UperNet computes them in training mode.
        aux_logits: Of the auxiliary head.
        masks: The class of each pixel.
        averaging: What the sum over the pixels is divided by, see `pixel_loss`.
        ignore_index: Of pixels that teach nothing.
        aux_weight: Factor of the auxiliary head's loss.
    """
    main = pixel_loss(logits, masks, averaging=averaging, ignore_index=ignore_index)
    aux = pixel_loss(aux_logits, masks, averaging=averaging, ignore_index=ignore_index)
    return SegLoss(main + aux_weight * aux, main, aux)


def pixel_loss(
    logits: Float[Tensor, "b c small_h small_w"],
    masks: Int64[Tensor, "b h w"],
    *,
    averaging: Averaging = "published",
    ignore_index: int = 255,
) -> Float32[Tensor, ""]:
    """Compute the mean cross-entropy over pixels, in float32.

    "published" divides by the number of all pixels, as the code did that the published models were
    trained with: crops with many ignored pixels count less. "standard" divides by the number of
    those that are taught. Over several processes, the mean of "published" means is that of the
    whole batch; of "standard" ones it is not quite, for they teach unequal numbers of pixels.

    Args:
        logits: At any resolution.
        masks: The class of each pixel.
        averaging: See above. A batch without a pixel to teach costs 0 by either.
        ignore_index: Of pixels that teach nothing.
    """
    size = (masks.shape[1], masks.shape[2])
    losses = F.cross_entropy(
        resize(logits.float(), size), masks, ignore_index=ignore_index, reduction="sum"
    )
    if averaging == "published":
        return losses / masks.numel()
    return losses / (masks != ignore_index).sum().clamp(min=1)
