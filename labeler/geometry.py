"""Views, windows, token grids: the label of any crop of any map.

One convention everywhere: image fractions, x right, y down, the image is [0, 1] × [0, 1]. A pixel
is an area; its centre lies at (i + 0.5) / n. docs/geometry.md has the picture.

A view is a 2×3 matrix A: (x, y) in the image = A · (u, v, 1) for (u, v) in the crop's unit square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
    """The label maps of a batch of images, each image on its own palette, padded to the largest.

    b images, l levels (maps of one image at rising teacher scales, usually 1), u the largest
    palette, k top-k, mh and mw the largest grid in rows and columns.
    """

    palette: Int64[Tensor, "b u"]
    """Distinct classes of each image's maps, ascending, then padding."""
    palette_sizes: Int64[Tensor, " b"]
    indices: Int32[Tensor, "b l k mh mw"]
    """Position of each cell's classes in its image's palette."""
    scores: Float16[Tensor, "b l k mh mw"]
    """Raw teacher logits."""
    log_normalizer: Float16[Tensor, "b l mh mw"] | None
    """Logsumexp over all classes; None if one map of the batch has none."""
    grids: Int64[Tensor, "b l 2"]
    """(rows, cols) of each map before padding."""
    windows: Float32[Tensor, "b l 4"]
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
    def from_label_maps(images: Sequence[LabelMap | Sequence[LabelMap]]) -> "PaletteMaps":
        """Batch the map, or the levels, of several images; grids and windows may differ."""
        return PaletteMaps.from_arrays(to_arrays(images))

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
    frames: Float[Tensor, "b f 2 3"] | None = None,
    fill: Fill = "residual",
) -> TokenTargets:
    """Label every token of each view, and the view itself, from its image's label map.

    ReLabel (https://arxiv.org/abs/2101.05022) pools a crop to one label; token labeling
    (https://arxiv.org/abs/2104.10858, section 3.2) to one per token. Same operator, other grid.
    For a pure box inside the image the tokens' logits equal
    torchvision.ops.roi_align(…, aligned=True, sampling_ratio=2). Of a label pyramid, the two levels
    nearest to the view's zoom are read and blended (docs/geometry.md).

    Args:
        maps: Teacher scores on each image's palette, before softmax.
        views: Crop unit square → image unit square.
        grid: Token (rows, cols), e.g. (14, 14) for a 224 px crop at stride 16.
        frames: Crop unit square → unit squares that the point must lie in, too, to have been seen:
            a crop that was cut out and then turned shows nothing of the image beyond the cut.
        fill: What stands for classes outside a cell's top-k: the teacher's true remaining mass,
            spread evenly, or logit 0, as the published label sets assume.

    Raises:
        ValueError: If fill is residual and the maps have no log_normalizer.
    """
    # Logits are interpolated, not probabilities: the published recipe's choice, kept so that
    # zero fill reproduces it exactly.
    lower, upper, blend = _levels_of_views(maps, views)
    seen = _points_seen(frames, grid)
    sampled = _sample_level(maps, lower, views, grid, fill, seen)
    if maps.grids.shape[1] > 1:
        sampled = _blend(sampled, _sample_level(maps, upper, views, grid, fill, seen), blend)
    tokens, token_background = _softmax(sampled.tokens, sampled.outside[:, None])
    view, view_background = _softmax(sampled.view, sampled.outside)
    half = SAMPLES_PER_SIDE**2 / 2
    return TokenTargets(
        palette=maps.palette,
        tokens=tokens,
        token_background=token_background,
        token_weight=(sampled.counts >= half).float(),
        view=view,
        view_background=view_background,
        view_weight=(sampled.counts.sum(1) >= half * grid[0] * grid[1]).float(),
        num_classes=maps.num_classes,
    )


class _Sampled(NamedTuple):
    """One level read at the tokens' points. Last of the v = u + 1 planes: the fill.

    Planes beyond an image's palette hold -inf.
    """

    tokens: Float32[Tensor, "b n v"]
    view: Float32[Tensor, "b v"]
    counts: Float32[Tensor, "b n"]
    """Points of each token that lie inside the window."""
    outside: Float32[Tensor, " b"]
    """Log of the number of classes outside the palette, which share the fill; -inf for none."""


def _levels_of_views(
    maps: PaletteMaps, views: Float[Tensor, "b 2 3"]
) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"], Float32[Tensor, " b"]]:
    """The two levels that suit each view's zoom, and the share of the upper one.

    A teacher reads an object best at the size it was trained on. The first level shows it the
    whole image; a view of a quarter of the area wants cells half as large, and so on. Between two
    levels the share is linear in the logarithm of the scale.
    """
    rows_cols = maps.grids.float().prod(2)
    sides = maps.windows[..., 2:] - maps.windows[..., :2]
    scale = (rows_cols / sides.prod(2)).log() / 2  # log of cells per image side
    zoom = torch.linalg.det(views[:, :, :2].float()).abs().clamp(min=1e-6).log() / 2
    wanted = scale[:, 0] - zoom
    last = scale.shape[1] - 1
    upper = (scale < wanted[:, None]).sum(1).clamp(min=min(1, last), max=last)
    lower = (upper - 1).clamp(min=0)
    low, high = (scale.gather(1, level[:, None])[:, 0] for level in (lower, upper))
    blend = ((wanted - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return lower, upper, blend


def _sample_level(
    maps: PaletteMaps,
    level: Int64[Tensor, " b"],
    views: Float[Tensor, "b 2 3"],
    grid: tuple[int, int],
    fill: Fill,
    seen: Float32[Tensor, "#b ph pw"],
) -> _Sampled:
    """Read one level of each image: mean logits of every token and of the whole view."""
    planes = _expand(maps, level, fill)
    units, inside = _points_on_maps(maps, level, views, grid)
    inside = inside * seen.to(inside.device)
    # padding_mode is never used: points are already clamped to the outermost cell centres.
    sampled = F.grid_sample(planes, units, mode="bilinear", align_corners=False)
    sums = _sum_per_token(sampled * inside[:, None])
    counts = _sum_per_token(inside[:, None])[:, 0]
    unused = torch.arange(planes.shape[1], device=planes.device) >= maps.palette_sizes[:, None]
    unused[:, -1] = False
    tokens = sums / counts.clamp(min=1)[:, None]
    view = sums.sum(2) / counts.sum(1).clamp(min=1)[:, None]
    return _Sampled(
        tokens=tokens.transpose(1, 2).masked_fill(unused[:, None], -torch.inf),
        view=view.masked_fill(unused, -torch.inf),
        counts=counts,
        outside=(maps.num_classes - maps.palette_sizes).log(),
    )


def _blend(lower: _Sampled, upper: _Sampled, share: Float32[Tensor, " b"]) -> _Sampled:
    """Mix two levels log-linearly; where only one of them saw the token, take that one."""

    def mix(
        low: Float32[Tensor, "b *n v"],
        high: Float32[Tensor, "b *n v"],
        part: Float32[Tensor, "b *n"],
    ) -> Float32[Tensor, "b *n v"]:
        outside = lower.outside.reshape(-1, *[1] * (low.ndim - 2))
        low, high = (x - _log_total(x, outside)[..., None] for x in (low, high))
        return torch.where(low.isinf(), low, low.lerp(high, part[..., None]))

    low_counts = (1 - share)[:, None] * lower.counts
    high_counts = share[:, None] * upper.counts
    counts = low_counts + high_counts
    part = high_counts / counts.clamp(min=1e-6)
    view_part = high_counts.sum(1) / counts.sum(1).clamp(min=1e-6)
    return _Sampled(
        tokens=mix(lower.tokens, upper.tokens, part),
        view=mix(lower.view, upper.view, view_part),
        counts=counts,
        outside=lower.outside,
    )


def _expand(
    maps: PaletteMaps, level: Int64[Tensor, " b"], fill: Fill
) -> Float32[Tensor, "b v mh mw"]:
    """One plane of logits per palette class, and as last plane the fill itself; v = u + 1."""
    image = torch.arange(len(level), device=level.device)
    scores = maps.scores[image, level].float()
    if fill == "zero":
        outside = torch.zeros_like(scores[:, :1])
    elif maps.log_normalizer is None:
        raise ValueError(
            "these label maps keep no log_normalizer, so the teacher's remaining mass is unknown: "
            "use fill = 'zero' (the published choice) or make the labels anew"
        )
    else:
        log_normalizer = maps.log_normalizer[image, level].float()[:, None]
        outside = _residual_logit(scores, maps.indices[image, level], log_normalizer, maps)
    planes = outside.repeat(1, maps.palette.shape[1] + 1, 1, 1)
    # Padded cells hold index 0 k times over; they are never read, so it does not matter which wins.
    return planes.scatter_(1, maps.indices[image, level].long(), scores)


def _residual_logit(
    scores: Float32[Tensor, "b k mh mw"],
    indices: Int32[Tensor, "b k mh mw"],
    log_normalizer: Float32[Tensor, "b 1 mh mw"],
    maps: PaletteMaps,
) -> Float32[Tensor, "b 1 mh mw"]:
    """The logit that spreads a cell's remaining mass evenly over the classes outside its top-k."""
    mass = (scores - log_normalizer).exp()
    # A cell that keeps fewer than k classes repeats its last one; that counts once.
    mass[:, 1:] *= indices[:, 1:] != indices[:, :-1]
    num_kept = 1 + (indices[:, 1:] != indices[:, :-1]).sum(1, keepdim=True)
    # float16 leaves the mass uncertain by about half a percent; a floor keeps the logarithm finite.
    residual = (1 - mass.sum(1, keepdim=True)).clamp(min=1e-4)
    return (residual / (maps.num_classes - num_kept).clamp(min=1)).log() + log_normalizer


def _points_on_maps(
    maps: PaletteMaps,
    level: Int64[Tensor, " b"],
    views: Float[Tensor, "b 2 3"],
    grid: tuple[int, int],
) -> tuple[Float32[Tensor, "b ph pw 2"], Float32[Tensor, "b ph pw"]]:
    """Where the tokens' points fall on the padded maps (grid_sample's units), and whether inside.

    ph = rows · SAMPLES_PER_SIDE, pw = cols · SAMPLES_PER_SIDE.
    """
    image = torch.arange(len(level), device=level.device)
    window = maps.windows[image, level][:, None]
    cells = maps.grids[image, level].flip(1)[:, None].float()  # (cols, rows), as x comes first
    in_image = apply_view(views.float(), token_points(grid).to(views.device))
    in_window = (in_image - window[..., :2]) / (window[..., 2:] - window[..., :2])
    inside = ((in_window >= -_EDGE) & (in_window <= 1 + _EDGE)).all(2)
    # Inside the window the outermost half cell repeats the edge; padding is never touched.
    on_map = (in_window * cells).clamp(min=0.5).minimum(cells - 0.5)
    mh, mw = maps.scores.shape[-2:]
    units = on_map * 2 / torch.tensor([mw, mh], device=views.device) - 1
    shape = (len(views), grid[0] * SAMPLES_PER_SIDE, grid[1] * SAMPLES_PER_SIDE)
    return units.reshape(*shape, 2), inside.reshape(shape).float()


def _points_seen(
    frames: Float[Tensor, "b f 2 3"] | None, grid: tuple[int, int]
) -> Float32[Tensor, "#b ph pw"]:
    """Whether the tokens' points lie in the unit squares of all frames: 1 or 0."""
    shape = (grid[0] * SAMPLES_PER_SIDE, grid[1] * SAMPLES_PER_SIDE)
    if frames is None:
        return torch.ones(1, *shape)
    points = token_points(grid).to(frames.device)
    places = apply_view(frames.flatten(0, 1).float(), points).unflatten(0, frames.shape[:2])
    seen = ((places >= -_EDGE) & (places <= 1 + _EDGE)).all(3).all(1)
    return seen.float().reshape(-1, *shape)


def _sum_per_token(values: Float[Tensor, "b v ph pw"]) -> Float[Tensor, "b v n"]:
    return F.avg_pool2d(values, SAMPLES_PER_SIDE, divisor_override=1).flatten(2)


def _log_total(
    logits: Float32[Tensor, "*b v"], outside: Float32[Tensor, "*#b"]
) -> Float32[Tensor, "*b"]:
    """Logsumexp over the palette and over all classes outside it, which share the last logit."""
    return torch.logaddexp(logits[..., :-1].logsumexp(-1), logits[..., -1] + outside)


def _softmax(
    logits: Float32[Tensor, "*b v"], outside: Float32[Tensor, "*#b"]
) -> tuple[Float32[Tensor, "*b u"], Float32[Tensor, "*b"]]:
    """Probabilities of the palette, padding at the background's, and the background itself."""
    log_total = _log_total(logits, outside)
    background = (logits[..., -1] - log_total).exp()
    palette = logits[..., :-1]
    probabilities = (palette - log_total[..., None]).exp()
    return torch.where(palette.isinf(), background[..., None], probabilities), background
