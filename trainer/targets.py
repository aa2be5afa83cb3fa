"""From what the feed hands over to what the loss needs: sparse targets for tokens and views."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..labeler.geometry import Fill, PaletteMaps, TokenTargets, sample_targets

ClassTarget = Literal["pooled", "label"]


def batch_targets(
    maps: PaletteMaps | None,
    views: Float[Tensor, "b 2 3"],
    classes: Int64[Tensor, " b"],
    grid: tuple[int, int],
    *,
    num_classes: int,
    frames: Float[Tensor, "b f 2 3"] | None = None,
    smoothing: float = 0.1,
    fill: Fill = "residual",
    class_target: ClassTarget = "pooled",
) -> TokenTargets:
    """Build the targets of one batch on the device its tensors are on.

    Args:
        maps: Label maps of the images, or None: then tokens are not taught (weight 0) and the
            class target is the data set's label.
        views: Crop unit square → image unit square.
        classes: The data set's label of each image.
        grid: Token (rows, cols) of the student.
        num_classes: Classes of the student; the maps must have as many.
        frames: See sample_targets; None: the views show all that they cover.
        smoothing: Label smoothing ε: p becomes p · (1 - ε) + ε / num_classes.
        fill: See sample_targets.
        class_target: Where the class token's target comes from: the label map pooled over the
            view (ReLabel's choice, and the published code's), or the data set's label.

    Raises:
        ValueError: If the maps' class count is not num_classes.
    """
    if maps is None:
        targets = _labels_only(classes, grid, num_classes)
    elif maps.num_classes != num_classes:
        raise ValueError(
            f"the label maps have {maps.num_classes} classes and the model {num_classes}: "
            "set model.num_classes to the teacher's count, or use labels made for these classes"
        )
    else:
        targets = sample_targets(maps, views, grid, frames=frames, fill=fill)
        if class_target == "label":
            targets = _with_label_as_class_target(targets, classes)
    return smooth_(targets, smoothing)


def smooth_(targets: TokenTargets, smoothing: float) -> TokenTargets:
    """Give every class smoothing / num_classes and scale the rest down, in place; sums stay 1.

    The published code adds up to 1 + smoothing / num_classes; see docs/recipes.md.
    """
    even = torch.full((), 1 / targets.num_classes, device=targets.palette.device)
    for probabilities in (
        *(targets.tokens, targets.token_background),
        *(targets.view, targets.view_background),
    ):
        probabilities.lerp_(even, smoothing)
    return targets


def _labels_only(
    classes: Int64[Tensor, " b"], grid: tuple[int, int], num_classes: int
) -> TokenTargets:
    """Certain class targets, and tokens that are not taught."""
    b, n = len(classes), grid[0] * grid[1]
    return TokenTargets(
        palette=classes[:, None],
        tokens=torch.zeros(b, n, 1, device=classes.device),
        token_background=torch.zeros(b, n, device=classes.device),
        token_weight=torch.zeros(b, n, device=classes.device),
        view=torch.ones(b, 1, device=classes.device),
        view_background=torch.zeros(b, device=classes.device),
        view_weight=torch.ones(b, device=classes.device),
        num_classes=num_classes,
    )


def _with_label_as_class_target(
    targets: TokenTargets, classes: Int64[Tensor, " b"]
) -> TokenTargets:
    """Replace the class target by the label, which may not be on the palette: it is appended.

    For the tokens the appended class carries the background probability, so that it adds nothing
    even where the palette holds the label already.
    """
    background = targets.token_background[..., None]
    return TokenTargets(
        palette=torch.cat([targets.palette, classes[:, None]], 1),
        tokens=torch.cat([targets.tokens, background], 2),
        token_background=targets.token_background,
        token_weight=targets.token_weight,
        view=torch.cat([torch.zeros_like(targets.view), torch.ones_like(targets.view[:, :1])], 1),
        view_background=torch.zeros_like(targets.view_background),
        view_weight=torch.ones_like(targets.view_weight),
        num_classes=targets.num_classes,
    )


# --------------------------------------------------------------------- of several images


def pick(targets: TokenTargets, rows: Int64[Tensor, " r"]) -> TokenTargets:
    """Take the targets of some images of a batch, in the order given."""
    tensors = {n: v for n, v in vars(targets).items() if isinstance(v, Tensor)}
    return replace(targets, **{name: tensor[rows] for name, tensor in tensors.items()})


def blend_targets(
    targets: TokenTargets,
    partners: TokenTargets,
    *,
    kept_by_tokens: Float32[Tensor, " n"],
    kept: float,
) -> TokenTargets:
    """Make the targets of images that show two images each.

    A blended target has the weights of both in these shares, and its cross-entropy is the two
    cross-entropies, weighted so: what one of the two says nothing about, the other alone teaches.

    Args:
        targets: Of the first images.
        partners: Of the second images, in the same places.
        kept_by_tokens: Share of each token that shows the first image; the rest shows the second.
        kept: The same of the whole view.

    Returns:
        Targets on both palettes; a class on both is told once, and repeated as padding.
    """
    palette = torch.cat([targets.palette, partners.palette], 1)
    first = _first_places(palette)
    tokens, token_background, token_weight = _blend(
        (targets.tokens, targets.token_background, targets.token_weight),
        (partners.tokens, partners.token_background, partners.token_weight),
        kept_by_tokens,
        first,
    )
    view, view_background, view_weight = _blend(
        (targets.view[:, None], targets.view_background[:, None], targets.view_weight[:, None]),
        (partners.view[:, None], partners.view_background[:, None], partners.view_weight[:, None]),
        kept_by_tokens.new_full((1,), kept),
        first,
    )
    return TokenTargets(
        palette=palette,
        tokens=tokens,
        token_background=token_background,
        token_weight=token_weight,
        view=view[:, 0],
        view_background=view_background[:, 0],
        view_weight=view_weight[:, 0],
        num_classes=targets.num_classes,
    )


_Part = tuple[Float32[Tensor, "b n _"], Float32[Tensor, "b n"], Float32[Tensor, "b n"]]
"""Probabilities, background and weight of some tokens."""


def _blend(
    own: _Part, other: _Part, kept: Float32[Tensor, " n"], first: Int64[Tensor, "b v"]
) -> _Part:
    """Blend tokens; the palettes stand side by side, and `first` says where classes are told."""
    (tokens, background, weight), (other_tokens, other_background, other_weight) = own, other
    blended_weight = kept * weight + (1 - kept) * other_weight
    share = torch.where(blended_weight > 0, kept * weight / blended_weight, 1.0)
    blended_background = share * background + (1 - share) * other_background
    above = torch.cat(
        [
            share[..., None] * (tokens - background[..., None]),
            (1 - share)[..., None] * (other_tokens - other_background[..., None]),
        ],
        2,
    )
    index = first[:, None].expand_as(above)
    # Probabilities that are told again add to the first; in their own place nothing is left.
    told = torch.zeros_like(above).scatter_add_(2, index, above)
    return told + blended_background[..., None], blended_background, blended_weight


def _first_places(palette: Int64[Tensor, "b v"]) -> Int64[Tensor, "b v"]:
    """Find for each entry the first one of the same class."""
    ordered, order = palette.sort(dim=1, stable=True)
    begins = ordered != ordered.roll(1, 1)
    places = torch.arange(palette.shape[1], device=palette.device)
    begin = torch.where(begins, places, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))
