"""Views, windows, token grids: the label of any crop of any map.

One convention everywhere: image fractions, x right, y down, the image is [0, 1] × [0, 1]. A pixel
is an area; its centre lies at (i + 0.5) / n. docs/geometry.md has the picture.

A view is a 2×3 matrix A: (x, y) in the image = A · (u, v, 1) for (u, v) in the crop's unit square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16, Float32, Int32, Int64
from torch import Tensor

from .label_map import LabelMap, PaletteArrays, to_arrays

Fill = Literal["residual", "zero"]

SAMPLES_PER_SIDE = 2
"""Points per side of a token's square; RoIAlign's sampling_ratio."""

_EDGE = 1e-4
"""Points this far outside the window (in window fractions) still count: it is rounding."""


def crop_view(boxes: Float[Tensor, "b 4"]) -> Float[Tensor, "b 2 3"]:
    """Views of plain crops.

    Args:
        boxes: (x0, y0, x1, y1) of each crop in image fractions.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    zero = torch.zeros_like(x0)
    rows = [torch.stack([x1 - x0, zero, x0], 1), torch.stack([zero, y1 - y0, y0], 1)]
    return torch.stack(rows, 1)


def flip_view(flipped: Bool[Tensor, " b"]) -> Float32[Tensor, "b 2 3"]:
    """Views that mirror left and right where flipped is set, and change nothing elsewhere.

    A crop that is then flipped is compose(crop_view(boxes), flip_view(flipped)).
    """
    mirror = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    same = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return torch.where(flipped[:, None, None].cpu(), mirror, same).to(flipped.device)


def compose(outer: Float[Tensor, "b 2 3"], inner: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 2 3"]:
    """Views through both: inner maps the crop into a square that outer maps into the image."""
    linear = outer[:, :, :2] @ inner[:, :, :2]
    offset = outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]
    return torch.cat([linear, offset], 2)


def apply_view(
    view: Float[Tensor, "b 2 3"], points: Float[Tensor, "p 2"]
) -> Float[Tensor, "b p 2"]:
    """Image fractions (x, y) of points (u, v) given in the crop's unit square."""
    return points @ view[:, :, :2].transpose(1, 2) + view[:, None, :, 2]


def token_points(
    grid: tuple[int, int], *, per_side: int = SAMPLES_PER_SIDE
) -> Float32[Tensor, "p 2"]:
    """The points at which tokens are sampled, as (u, v) in the crop's unit square.

    Each token's square holds per_side × per_side points at the centres of equal parts. Order:
    token row, point row, token column, point column; p = rows · cols · per_side².
    """
    rows, cols = grid
    v = (torch.arange(rows * per_side) + 0.5) / (rows * per_side)
    u = (torch.arange(cols * per_side) + 0.5) / (cols * per_side)
    return torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1], -1).reshape(-1, 2)


@dataclass(frozen=True, kw_only=True)
class PaletteMaps:
    """The label maps of a batch, each on its own palette, padded to the largest.

    b maps, u the largest palette, k top-k, mh and mw the largest grid in rows and columns.
    """

    palette: Int64[Tensor, "b u"]
    """Distinct classes of each map, ascending, then padding."""
    palette_sizes: Int64[Tensor, " b"]
    indices: Int32[Tensor, "b k mh mw"]
    """Position of each cell's classes in its map's palette."""
    scores: Float16[Tensor, "b k mh mw"]
    """Raw teacher logits."""
    log_normalizer: Float16[Tensor, "b mh mw"] | None
    """Logsumexp over all classes; None if one map of the batch has none."""
    grids: Int64[Tensor, "b 2"]
    """(rows, cols) of each map before padding."""
    windows: Float32[Tensor, "b 4"]
    """(x0, y0, x1, y1) in image fractions: what the grid covers."""
    num_classes: int

    @staticmethod
    def from_arrays(arrays: PaletteArrays) -> "PaletteMaps":
        """Wrap decoded arrays without copying."""
        normalizer = arrays.log_normalizer
        return PaletteMaps(
            palette=torch.from_numpy(arrays.palette),
            palette_sizes=torch.from_numpy(arrays.palette_sizes),
            indices=torch.from_numpy(arrays.indices),
            scores=torch.from_numpy(arrays.scores),
            log_normalizer=None if normalizer is None else torch.from_numpy(normalizer),
            grids=torch.from_numpy(arrays.grids),
            windows=torch.from_numpy(arrays.windows),
            num_classes=arrays.num_classes,
        )

    @staticmethod
    def from_label_maps(maps: Sequence[LabelMap]) -> "PaletteMaps":
        """Batch maps of several images; grids and windows may differ, k and classes may not."""
        return PaletteMaps.from_arrays(to_arrays(maps))

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> "PaletteMaps":
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PaletteMaps":
        """Copy every tensor to a device."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PaletteMaps":
        """Copy every tensor to pinned memory, so that `to` can be non-blocking."""
        return self._each_tensor(lambda tensor: tensor.pin_memory())

    def __getitem__(self, which: slice) -> "PaletteMaps":
        """Take some maps of the batch."""
        return self._each_tensor(lambda tensor: tensor[which])


@dataclass(frozen=True, kw_only=True)
class TokenTargets:
    """What each token, and the view as a whole, should answer: sparse distributions.

    Classes on the palette have a probability each; every other class has the background's.
    A distribution sums to 1: sum over the palette + (num_classes - palette size) · background.
    """

    palette: Int64[Tensor, "b u"]
    """Class ids. Padding repeats a class with probability = background, so it adds nothing."""
    tokens: Float32[Tensor, "b n u"]
    """Probabilities of the palette's classes per token, row-major, n = rows · cols."""
    token_background: Float32[Tensor, "b n"]
    token_weight: Float32[Tensor, "b n"]
    """1 where the map says something about the token; 0 where less than half of it lies inside."""
    view: Float32[Tensor, "b u"]
    """Class target: probabilities for the whole view."""
    view_background: Float32[Tensor, " b"]
    view_weight: Float32[Tensor, " b"]
    num_classes: int

    def dense_tokens(self) -> Float32[Tensor, "b n c"]:
        """Spread token targets over all classes; for pictures and tests, not for training."""
        index = self.palette[:, None].expand_as(self.tokens)
        dense = self.token_background[..., None].repeat(1, 1, self.num_classes)
        return dense.scatter_add_(2, index, self.tokens - self.token_background[..., None])

    def dense_view(self) -> Float32[Tensor, "b c"]:
        """Spread class targets over all classes; for pictures and tests, not for training."""
        dense = self.view_background[:, None].repeat(1, self.num_classes)
        return dense.scatter_add_(1, self.palette, self.view - self.view_background[:, None])


def sample_targets(
    maps: PaletteMaps,
    views: Float[Tensor, "b 2 3"],
    grid: tuple[int, int],
    *,
    fill: Fill = "residual",
) -> TokenTargets:
    """Label every token of each view, and the view itself, from its image's label map.

    ReLabel (https://arxiv.org/abs/2101.05022) pools a crop to one label; token labeling
    (https://arxiv.org/abs/2104.10858, section 3.2) to one per token. Same operator, other grid.
    For a pure box inside the image the tokens' logits equal
    torchvision.ops.roi_align(…, aligned=True, sampling_ratio=2).

    Args:
        maps: Teacher scores on each image's palette, before softmax.
        views: Crop unit square → image unit square.
        grid: Token (rows, cols), e.g. (14, 14) for a 224 px crop at stride 16.
        fill: What stands for classes outside a cell's top-k: the teacher's true remaining mass,
            spread evenly, or logit 0, as the published label sets assume.

    Raises:
        ValueError: If fill is residual and the maps have no log_normalizer.
    """
    # Logits are interpolated, not probabilities: the published recipe's choice, kept so that
    # zero fill reproduces it exactly.
    planes = _expand(maps, fill)
    points, inside = _points_on_maps(maps, views, grid)
    # padding_mode is never used: points are already clamped to the outermost cell centres.
    sampled = F.grid_sample(planes, points, mode="bilinear", align_corners=False)
    sums = _sum_per_token(sampled * inside[:, None], grid)
    counts = _sum_per_token(inside[:, None], grid)[:, 0]
    token_logits = (sums / counts.clamp(min=1)[:, None]).transpose(1, 2)
    view_logits = sums.sum(2) / counts.sum(1).clamp(min=1)[:, None]
    in_palette = (
        torch.arange(maps.palette.shape[1], device=maps.palette.device)
        < maps.palette_sizes[:, None]
    )
    num_outside = maps.num_classes - maps.palette_sizes
    tokens, token_background = _softmax(
        token_logits, in_palette[:, None], num_outside[:, None].expand_as(counts)
    )
    view, view_background = _softmax(view_logits, in_palette, num_outside)
    half = SAMPLES_PER_SIDE**2 / 2
    return TokenTargets(
        palette=maps.palette,
        tokens=tokens,
        token_background=token_background,
        token_weight=(counts >= half).float(),
        view=view,
        view_background=view_background,
        view_weight=(counts.sum(1) >= half * grid[0] * grid[1]).float(),
        num_classes=maps.num_classes,
    )


def fill_logits(maps: PaletteMaps, fill: Fill) -> Float32[Tensor, "b mh mw"]:
    """Logit that each class outside a cell's top-k is given."""
    if fill == "zero":
        return torch.zeros_like(maps.scores[:, 0], dtype=torch.float32)
    if maps.log_normalizer is None:
        raise ValueError(
            "these label maps keep no log_normalizer, so the teacher's remaining mass is unknown: "
            "use fill = 'zero' (the published choice) or make the labels anew"
        )
    log_normalizer = maps.log_normalizer.float()
    kept = (maps.scores.float() - log_normalizer[:, None]).exp().sum(1)
    num_outside = max(maps.num_classes - maps.scores.shape[1], 1)
    # float16 leaves the mass uncertain by about half a percent; a floor keeps the logarithm finite.
    residual = (1 - kept).clamp(min=1e-4)
    return (residual / num_outside).log() + log_normalizer


def _expand(maps: PaletteMaps, fill: Fill) -> Float32[Tensor, "b v mh mw"]:
    """One plane of logits per palette class, and as last plane the fill itself; v = u + 1."""
    outside = fill_logits(maps, fill)
    planes = outside[:, None].repeat(1, maps.palette.shape[1] + 1, 1, 1)
    # Padded cells hold index 0 k times over; they are never read, so it does not matter which wins.
    return planes.scatter_(1, maps.indices.long(), maps.scores.float())


def _points_on_maps(
    maps: PaletteMaps, views: Float[Tensor, "b 2 3"], grid: tuple[int, int]
) -> tuple[Float32[Tensor, "b ph pw 2"], Float32[Tensor, "b ph pw"]]:
    """Where the tokens' points fall on the padded maps (grid_sample's units), and whether inside.

    ph = rows · SAMPLES_PER_SIDE, pw = cols · SAMPLES_PER_SIDE.
    """
    in_image = apply_view(views.float(), token_points(grid).to(views.device))
    low, high = maps.windows[:, None, :2], maps.windows[:, None, 2:]
    in_window = (in_image - low) / (high - low)
    inside = ((in_window >= -_EDGE) & (in_window <= 1 + _EDGE)).all(2)
    cells = maps.grids.flip(1)[:, None].float()  # (cols, rows), as x comes first
    # Inside the window the outermost half cell repeats the edge; padding is never touched.
    on_map = (in_window * cells).clamp(min=0.5).minimum(cells - 0.5)
    _, _, mh, mw = maps.scores.shape
    units = on_map * 2 / torch.tensor([mw, mh], device=views.device) - 1
    shape = (len(views), grid[0] * SAMPLES_PER_SIDE, grid[1] * SAMPLES_PER_SIDE)
    return units.reshape(*shape, 2), inside.reshape(shape).float()


def _sum_per_token(
    values: Float[Tensor, "b v ph pw"], grid: tuple[int, int]
) -> Float[Tensor, "b v n"]:
    return F.avg_pool2d(values, SAMPLES_PER_SIDE, divisor_override=1).flatten(2)


def _softmax(
    logits: Float[Tensor, "*b v"],
    in_palette: Bool[Tensor, "*#b u"],
    num_outside: Int64[Tensor, "*b"],
) -> tuple[Float32[Tensor, "*b u"], Float32[Tensor, "*b"]]:
    """Softmax over the palette and num_outside classes that share the last logit."""
    palette, outside = logits[..., :-1], logits[..., -1]
    palette = palette.masked_fill(~in_palette, -torch.inf)
    log_total = torch.logaddexp(palette.logsumexp(-1), outside + num_outside.log())
    background = (outside - log_total).exp()
    return (
        torch.where(in_palette, (palette - log_total[..., None]).exp(), background[..., None]),
        background,
    )
