"""From what the feed hands over to what the loss needs: sparse targets for tokens and views."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
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
    even = torch.tensor(1 / targets.num_classes, device=targets.palette.device)
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
