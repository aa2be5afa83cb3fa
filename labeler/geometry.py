"""Views, windows, token grids: the label of any crop of any map.

One convention everywhere: image fractions, x right, y down, the image is [0, 1] × [0, 1]. A pixel
is an area; its centre lies at (i + 0.5) / n. docs/geometry.md has the picture.

A view is a 2×3 matrix A: (x, y) in the image = A · (u, v, 1) for (u, v) in the crop's unit square.
"""

import math
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

_IMAGES_IN_CACHE = 16
"""Images whose targets are built at a time on a CPU."""

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
    grid: tuple[int, int],
    *,
    per_side: int = SAMPLES_PER_SIDE,
    device: torch.device | str = "cpu",
) -> Float32[Tensor, "p 2"]:
    """The points at which tokens are sampled, as (u, v) in the crop's unit square.

    Each token's square holds per_side × per_side points at the centres of equal parts. Order:
    token row, point row, token column, point column; p = rows · cols · per_side².
    """
    rows, cols = grid
    v = (torch.arange(rows * per_side, device=device) + 0.5) / (rows * per_side)
    u = (torch.arange(cols * per_side, device=device) + 0.5) / (cols * per_side)
    return torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1], -1).reshape(-1, 2)


@dataclass(frozen=True, kw_only=True)
class PaletteMaps:
    """The label maps of a batch of images, each image on its own palette, padded to the largest.

    b images, l levels (maps of one image at rising teacher scales, usually 1), u the largest
    palette, k top-k, mh and mw the largest grid in rows and columns.
    """

    palette: Int64[Tensor, "b u"]
    """Distinct classes of each image's maps, ascending, then padding; u is at most num_classes."""
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

    def __getitem__(self, which: slice | Int64[Tensor, " r"]) -> "PaletteMaps":
        """Take some maps of the batch."""
        return self._each_tensor(lambda tensor: tensor[which])

    def trimmed(self) -> "PaletteMaps":
        """Cut the palettes' padding to what the largest of them needs; the host waits for it."""
        return replace(self, palette=self.palette[:, : int(self.palette_sizes.max())])


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
    if views.device.type != "cpu":
        return _sample(maps, views, grid, frames, fill, are_boxes=False)
    # Few images at a time stay in the cache, and nearly all views are boxes, which are read in a
    # fraction of the time. (On a GPU neither holds, and asking would make the host wait.)
    boxes = _are_boxes(views, frames)
    by_size = maps.palette_sizes.argsort()  # images of similar palettes together: less padding
    targets = _empty_targets(maps, grid)
    for are_boxes in (True, False):
        chosen = by_size[boxes[by_size] == are_boxes]
        for rows in chosen.split(_IMAGES_IN_CACHE) if len(chosen) else ():
            few = None if frames is None else frames[rows]
            part = _sample(maps[rows].trimmed(), views[rows], grid, few, fill, are_boxes=are_boxes)
            _put(targets, rows, part)
    return targets


def _sample(
    maps: PaletteMaps,
    views: Float[Tensor, "b 2 3"],
    grid: tuple[int, int],
    frames: Float[Tensor, "b f 2 3"] | None,
    fill: Fill,
    *,
    are_boxes: bool,
) -> TokenTargets:
    """Do the work of sample_targets; are_boxes promises what `_are_boxes` found of every view."""
    # The palette's padding reads the fill, as one class more of those outside each: so nothing has
    # to be masked, and it gets the background's probability by itself.
    num_outside = maps.num_classes - maps.palette.shape[1]
    # Logits are interpolated, not probabilities: the published recipe's choice, kept so that
    # zero fill reproduces it exactly.
    lower, upper, blend = _levels_of_views(maps, views)
    points = _BoxPoints(views, frames, grid) if are_boxes else _FreePoints(views, frames, grid)
    sampled = _sample_level(maps, lower, points, fill)
    if maps.grids.shape[1] > 1:
        sampled = _blend(sampled, _sample_level(maps, upper, points, fill), blend, num_outside)
    tokens, token_background = _softmax(sampled.tokens, num_outside)
    view, view_background = _softmax(sampled.view, num_outside)
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


def _are_boxes(
    views: Float[Tensor, "b 2 3"], frames: Float[Tensor, "b f 2 3"] | None
) -> Bool[Tensor, " b"]:
    """Tell which views neither turn nor shear the image, and have frames that do not either."""
    matrices = views[:, None] if frames is None else torch.cat([views[:, None], frames], 1)
    return (matrices[..., 0, 1] == 0).all(1) & (matrices[..., 1, 0] == 0).all(1)


def _empty_targets(maps: PaletteMaps, grid: tuple[int, int]) -> TokenTargets:
    b, n, u = len(maps.palette), grid[0] * grid[1], maps.palette.shape[1]
    return TokenTargets(
        palette=maps.palette,
        tokens=torch.empty(b, n, u),
        token_background=torch.empty(b, n),
        token_weight=torch.empty(b, n),
        view=torch.empty(b, u),
        view_background=torch.empty(b),
        view_weight=torch.empty(b),
        num_classes=maps.num_classes,
    )


def _put(targets: TokenTargets, rows: Int64[Tensor, " r"], part: TokenTargets) -> None:
    """Write the targets of some images, which may have a narrower palette, into their places."""
    width = part.palette.shape[1]
    targets.tokens[rows, :, :width] = part.tokens
    targets.tokens[rows, :, width:] = part.token_background[..., None]
    targets.view[rows, :width] = part.view
    targets.view[rows, width:] = part.view_background[:, None]
    for name in ("token_background", "token_weight", "view_background", "view_weight"):
        getattr(targets, name)[rows] = getattr(part, name)


class _Sampled(NamedTuple):
    """One level read at the tokens' points. Last of the v = u + 1 planes: the fill.

    Planes beyond an image's palette hold the fill, too.
    """

    tokens: Float32[Tensor, "b n v"]
    view: Float32[Tensor, "b v"]
    counts: Float32[Tensor, "b n"]
    """Points of each token that lie inside the window."""


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
    points: "_BoxPoints | _FreePoints",
    fill: Fill,
) -> _Sampled:
    """Read one level of each image: mean logits of every token and of the whole view."""
    planes = _expand(maps, level, fill)
    sums, counts = points.read(planes, *_places(maps, level))
    view = sums.sum(1) / counts.sum(1).clamp(min=1)[:, None]
    return _Sampled(tokens=sums.div_(counts.clamp(min=1)[..., None]), view=view, counts=counts)


def _places(
    maps: PaletteMaps, level: Int64[Tensor, " b"]
) -> tuple[Float32[Tensor, "b 4"], Float32[Tensor, "b 2"]]:
    """The windows of one level of each image, and its cells as (cols, rows), as x comes first."""
    image = torch.arange(len(level), device=level.device)
    return maps.windows[image, level], maps.grids[image, level].flip(1).float()


def _blend(
    lower: _Sampled, upper: _Sampled, share: Float32[Tensor, " b"], num_outside: int
) -> _Sampled:
    """Mix two levels log-linearly; where only one of them saw the token, take that one."""

    def mix(
        low: Float32[Tensor, "b *n v"],
        high: Float32[Tensor, "b *n v"],
        part: Float32[Tensor, "b *n"],
    ) -> Float32[Tensor, "b *n v"]:
        low, high = (x - _log_total(x, num_outside)[..., None] for x in (low, high))
        return low.lerp(high, part[..., None])

    low_counts = (1 - share)[:, None] * lower.counts
    high_counts = share[:, None] * upper.counts
    counts = low_counts + high_counts
    part = high_counts / counts.clamp(min=1e-6)
    view_part = high_counts.sum(1) / counts.sum(1).clamp(min=1e-6)
    return _Sampled(
        tokens=mix(lower.tokens, upper.tokens, part),
        view=mix(lower.view, upper.view, view_part),
        counts=counts,
    )


def _expand(
    maps: PaletteMaps, level: Int64[Tensor, " b"], fill: Fill
) -> Float32[Tensor, "b mh mw v"]:
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
    planes = outside.permute(0, 2, 3, 1).expand(-1, -1, -1, maps.palette.shape[1] + 1)
    planes = planes.clone(memory_format=torch.contiguous_format)
    indices = maps.indices[image, level].long()
    # Padded cells hold index 0 k times over; they are never read, so it does not matter which wins.
    return planes.scatter_(3, indices.permute(0, 2, 3, 1), scores.permute(0, 2, 3, 1))


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


class _FreePoints:
    """The tokens' points under any views, read one by one.

    ph = rows · SAMPLES_PER_SIDE, pw = cols · SAMPLES_PER_SIDE.
    """

    def __init__(
        self,
        views: Float[Tensor, "b 2 3"],
        frames: Float[Tensor, "b f 2 3"] | None,
        grid: tuple[int, int],
    ) -> None:
        points = token_points(grid, device=views.device)
        self._shape = (grid[0] * SAMPLES_PER_SIDE, grid[1] * SAMPLES_PER_SIDE)
        self._in_image = apply_view(views.float(), points)
        self._seen = torch.ones_like(self._in_image[..., 0], dtype=torch.bool)
        if frames is not None:
            places = apply_view(frames.flatten(0, 1).float(), points).unflatten(0, frames.shape[:2])
            self._seen = _within_unit(places).all(3).all(1)

    def read(
        self,
        planes: Float32[Tensor, "b mh mw v"],
        windows: Float32[Tensor, "b 4"],
        cells: Float32[Tensor, "b 2"],
    ) -> tuple[Float32[Tensor, "b n v"], Float32[Tensor, "b n"]]:
        """Sum up what each token's points read, and count those that lie on the map."""
        windows, cells = windows[:, None], cells[:, None]
        in_window = (self._in_image - windows[..., :2]) / (windows[..., 2:] - windows[..., :2])
        inside = (_within_unit(in_window).all(2) & self._seen).float()
        mh, mw = planes.shape[1:3]
        x, y = (_on_map(in_window, cells) * 2).unbind(2)
        units = torch.stack([x / mw - 1, y / mh - 1], 2)  # grid_sample's
        # padding_mode is never used: points are already clamped to the outermost cell centres.
        sampled = F.grid_sample(
            planes.permute(0, 3, 1, 2), units.unflatten(1, self._shape), align_corners=False
        )
        inside = inside.unflatten(1, self._shape)[:, None]
        sums = _sum_per_token(sampled * inside).transpose(1, 2).contiguous()
        return sums, _sum_per_token(inside)[:, 0]


class _BoxPoints:
    """The tokens' points under views that are boxes: rows and columns are read in turn.

    For each token row only SAMPLES_PER_SIDE heights matter, and they are those of the whole row;
    so bilinear reading is two small matrix products, rows first, then columns.
    """

    def __init__(
        self,
        views: Float[Tensor, "b 2 3"],
        frames: Float[Tensor, "b f 2 3"] | None,
        grid: tuple[int, int],
    ) -> None:
        self._in_image, self._seen = [], []
        for axis, num_tokens in ((0, grid[1]), (1, grid[0])):
            points = (torch.arange(num_tokens * SAMPLES_PER_SIDE) + 0.5) / (
                num_tokens * SAMPLES_PER_SIDE
            )
            along = views[:, axis].float()
            self._in_image.append(along[:, axis, None] * points + along[:, 2, None])
            seen = torch.ones(len(views), len(points), dtype=torch.bool)
            if frames is not None:
                along = frames[:, :, axis].float()
                places = along[..., axis, None] * points + along[..., 2, None]
                seen = _within_unit(places).all(1)
            self._seen.append(seen)

    def read(
        self,
        planes: Float32[Tensor, "b mh mw v"],
        windows: Float32[Tensor, "b 4"],
        cells: Float32[Tensor, "b 2"],
    ) -> tuple[Float32[Tensor, "b n v"], Float32[Tensor, "b n"]]:
        """Sum up what each token's points read, and count those that lie on the map."""
        b, mh, mw, v = planes.shape
        (of_cols, num_x), (of_rows, num_y) = (
            self._weights(axis, windows, cells, num_cells) for axis, num_cells in ((0, mw), (1, mh))
        )
        by_rows = of_rows @ planes.reshape(b, mh, mw * v)
        sums = of_cols[:, None] @ by_rows.reshape(b, -1, mw, v)
        counts = num_y[:, :, None] * num_x[:, None]
        return sums.flatten(1, 2), counts.flatten(1)

    def _weights(
        self,
        axis: int,
        windows: Float32[Tensor, "b 4"],
        cells: Float32[Tensor, "b 2"],
        num_cells: int,
    ) -> tuple[Float32[Tensor, "b t m"], Float32[Tensor, "b t"]]:
        """How much of each cell the tokens along one axis read, and how many points are inside."""
        low, high = windows[:, axis, None], windows[:, axis + 2, None]
        in_window = (self._in_image[axis] - low) / (high - low)
        inside = (_within_unit(in_window) & self._seen[axis]).float()
        at = _on_map(in_window, cells[:, axis, None])
        centres = torch.arange(num_cells) + 0.5
        weights = (1 - (at[..., None] - centres).abs()).clamp(min=0) * inside[..., None]
        per_token = (-1, SAMPLES_PER_SIDE)
        return weights.unflatten(1, per_token).sum(2), inside.unflatten(1, per_token).sum(2)


def _within_unit(fractions: Float[Tensor, "*p"]) -> Bool[Tensor, "*p"]:
    return (fractions >= -_EDGE) & (fractions <= 1 + _EDGE)


def _on_map(in_window: Float[Tensor, "*p"], cells: Float[Tensor, "*#p"]) -> Float[Tensor, "*p"]:
    """Window fractions in cells; the outermost half cell repeats the edge, padding is not read."""
    return (in_window * cells).clamp(min=0.5).minimum(cells - 0.5)


def _sum_per_token(values: Float[Tensor, "b v ph pw"]) -> Float[Tensor, "b v n"]:
    return F.avg_pool2d(values, SAMPLES_PER_SIDE, divisor_override=1).flatten(2)


def _log_total(logits: Float32[Tensor, "*b v"], num_outside: int) -> Float32[Tensor, "*b"]:
    """Logsumexp over the palette and over all classes outside it, which share the last logit."""
    palette, fill = logits[..., :-1].logsumexp(-1), logits[..., -1]
    return torch.logaddexp(palette, fill + math.log(num_outside)) if num_outside else palette


def _softmax(
    logits: Float32[Tensor, "*b v"], num_outside: int
) -> tuple[Float32[Tensor, "*b u"], Float32[Tensor, "*b"]]:
    """Probabilities of the palette, and the background."""
    if not num_outside:  # images with padding have a background even so
        fill = logits[..., -1]
        return logits[..., :-1].softmax(-1), (fill - _log_total(logits, num_outside)).exp()
    logits[..., -1] += math.log(num_outside)
    probabilities = logits.softmax(-1)
    return probabilities[..., :-1], probabilities[..., -1] / num_outside
