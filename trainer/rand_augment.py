"""RandAugment's operations on batches of bytes, as timm and Pillow compute them.

What happens to which sample is drawn elsewhere (augment_draws.py). Here each layer is a handful of
torch calls for all samples that share a kind of operation, so one definition serves CPU and GPU:
eight operations are a table of 256 bytes per channel, four geometric ones a shift of each row or
column, rotation a gather (on a CPU Pillow's own), saturation and sharpness a blend. docs/feed.md
says how close each is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor

from .augment_draws import NUM_OPERATIONS, Layers, Operation, layer_views


def _flags(*kinds: Operation) -> Bool[np.ndarray, "16"]:
    """For each operation whether it is one of these; the last is for NONE, which is -1."""
    return np.array([kind in kinds for kind in (*range(NUM_OPERATIONS), Operation.NONE)])


_TABLES = _flags(
    Operation.AUTO_CONTRAST,
    Operation.EQUALIZE,
    Operation.INVERT,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.SOLARIZE_ADD,
    Operation.CONTRAST,
    Operation.BRIGHTNESS,
)
_ALONG_ROWS = _flags(Operation.SHEAR_X, Operation.TRANSLATE_X)
_ALONG_COLS = _flags(Operation.SHEAR_Y, Operation.TRANSLATE_Y)
_ROTATE = _flags(Operation.ROTATE)


def apply_layers(
    images: UInt8[Tensor, "b 3 h w"],
    layers: Layers,
    *,
    fill: tuple[int, int, int],
    at_once: int | None = None,
) -> None:
    """Apply RandAugment's layers, in place.

    Args:
        images: RGB.
        layers: What to do to each of them.
        fill: Colour of what geometric operations move in from outside.
        at_once: Images in one call of torch; no effect on the result. None takes what is fastest:
            a CPU wants what fits its caches, a GPU few calls.
    """
    at_once = at_once or (len(images) if images.is_cuda else 1)
    views = layer_views(layers, (images.shape[2], images.shape[3]))
    color = torch.tensor(fill, dtype=torch.uint8, device=images.device)[:, None, None]
    change = partial(_change, images, at_once)
    for layer, operations in enumerate(layers.operations):
        amounts, cubic, from_where = layers.amounts[layer], layers.cubic[layer], views[layer]
        change(_TABLES[operations], _mapped, operations, amounts)
        change(operations == Operation.COLOR, _saturated, amounts)
        change(operations == Operation.SHARPNESS, _sharpened, amounts)
        for taps, has_taps in ((2, ~cubic), (4, cubic)):
            for kinds, function in (
                (_ALONG_ROWS, _moved_rows),
                (_ALONG_COLS, _moved_cols),
                (_ROTATE, _rotated),
            ):
                moved = partial(function, taps=taps, fill=color)
                change(kinds[operations] & has_taps, moved, from_where)


def _change(
    images: UInt8[Tensor, "b 3 h w"],
    at_once: int,
    which: Bool[np.ndarray, " b"],
    function: Callable[..., UInt8[Tensor, "g 3 h w"]],
    *arguments: Shaped[np.ndarray, "b ..."],
) -> None:
    """Replace some images by what a function makes of them and of their rows of the arguments."""
    places = np.flatnonzero(which)
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        index = _index(part, images)
        images[index] = function(images[index], *(values[part] for values in arguments))


def _index(places: Int64[np.ndarray, " p"], images: UInt8[Tensor, "g 3 h w"]) -> Any:
    """Pick images; of one a slice, which looks at the image itself and copies nothing."""
    if len(places) == 1:
        return slice(places[0], places[0] + 1)
    return torch.from_numpy(places).to(images.device)


# ---------------------------------------------------------------------- tables and blends


def _mapped(
    images: UInt8[Tensor, "g 3 h w"],
    operations: Int64[np.ndarray, " g"],
    amounts: Float64[np.ndarray, " g"],
) -> UInt8[Tensor, "g 3 h w"]:
    """Replace every value by its entry in the table of its image and channel."""
    fixed = [_fixed_table(*pair) for pair in zip(operations, amounts)]
    tables = torch.from_numpy(np.stack(fixed)).to(images.device)[:, None]
    for operation, function in (
        (Operation.AUTO_CONTRAST, _stretching_tables),
        (Operation.EQUALIZE, _equalizing_tables),
        (Operation.CONTRAST, _contrast_tables),
    ):
        places = np.flatnonzero(operations == operation)
        if len(places):
            tables = tables.repeat(1, 3 // tables.shape[1], 1)
            index = _index(places, images)
            factors = _per_image(amounts[places], images.device)
            tables[index] = function(images[index], factors)
    return _looked_up(images, tables)


def _looked_up(
    images: UInt8[Tensor, "g 3 h w"], tables: UInt8[Tensor, "g c 256"]
) -> UInt8[Tensor, "g 3 h w"]:
    """Look values up in a table for each channel, or for all of them."""
    pixels = images.reshape(*tables.shape[:2], -1)
    if images.is_cuda:
        return tables.gather(2, pixels.long()).view_as(images)
    # On a CPU a tenth of gather, which wants its indices as 64-bit integers.
    planes = zip(pixels.flatten(0, 1).numpy(), tables.flatten(0, 1).numpy())
    mapped = b"".join(plane.tobytes().translate(table.tobytes()) for plane, table in planes)
    return torch.frombuffer(bytearray(mapped), dtype=torch.uint8).view_as(images)


def _histograms(images: UInt8[Tensor, "g 3 h w"]) -> Int32[Tensor, "g 3 256"]:
    if images.is_cuda:
        pixels = images.flatten(2).long()
        one = torch.ones((), dtype=torch.int32, device=images.device).expand_as(pixels)
        return one.new_zeros(len(images), 3, 256).scatter_add_(2, pixels, one)
    planes = [Image.fromarray(plane).histogram() for plane in images.flatten(0, 1).numpy()]
    return torch.tensor(planes, dtype=torch.int32).view(-1, 3, 256)


def _fixed_table(operation: np.int64, amount: np.float64) -> UInt8[np.ndarray, "256"]:
    """The table of an operation that needs to know nothing of the image; else the identity."""
    values = np.arange(256)
    match operation:
        case Operation.INVERT:
            values = 255 - values
        case Operation.POSTERIZE:  # to 0 bits, too: black
            values &= -(1 << (8 - int(amount)))
        case Operation.SOLARIZE:
            values = np.where(values < amount, values, 255 - values)
        case Operation.SOLARIZE_ADD:
            values = np.where(values < 128, np.minimum(255, values + int(amount)), values)
        case Operation.BRIGHTNESS:
            values = np.minimum(255, np.float32(amount) * values.astype(np.float32))
    return values.astype(np.uint8)


def _stretching_tables(
    images: UInt8[Tensor, "g 3 h w"], factors: Float32[Tensor, "g 1 1 1"]
) -> UInt8[Tensor, "g 3 256"]:
    pixels = images.flatten(2)
    low, high = (limit(2, keepdim=True).double() for limit in (pixels.amin, pixels.amax))
    scale = low.new_tensor(255) / (high - low).clamp(min=1)  # 255 / tensor is less exact in torch
    values = torch.arange(256, device=images.device)
    stretched = _to_bytes(values * scale + -low * scale)
    return torch.where(high > low, stretched, values.to(torch.uint8))


def _equalizing_tables(
    images: UInt8[Tensor, "g 3 h w"], factors: Float32[Tensor, "g 1 1 1"]
) -> UInt8[Tensor, "g 3 256"]:
    counts = _histograms(images)
    values = torch.arange(256, device=images.device)
    last = counts.gather(2, (values * (counts > 0)).amax(2, keepdim=True))
    step = (images.shape[2] * images.shape[3] - last) // 255
    below = counts.cumsum(2) - counts
    equalized = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, equalized.clamp(max=255), values).to(torch.uint8)


def _contrast_tables(
    images: UInt8[Tensor, "g 3 h w"], factors: Float32[Tensor, "g 1 1 1"]
) -> UInt8[Tensor, "g 3 256"]:
    gray = _gray(images).flatten(1)
    mean = (gray.sum(1, dtype=torch.float64) / gray.shape[1] + 0.5).floor().float()
    values = torch.arange(256, dtype=torch.float32, device=images.device)
    return _blend(mean[:, None, None], values, factors[..., 0]).repeat(1, 3, 1)


def _saturated(
    images: UInt8[Tensor, "g 3 h w"], factors: Float64[np.ndarray, " g"]
) -> UInt8[Tensor, "g 3 h w"]:
    return _blend(_gray(images), images.float(), _per_image(factors, images.device))


def _sharpened(
    images: UInt8[Tensor, "g 3 h w"], factors: Float64[np.ndarray, " g"]
) -> UInt8[Tensor, "g 3 h w"]:
    """Blend with the image smoothed by 3×3; the outermost pixels stay."""
    values = images.to(torch.int16)
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = values[:, :, 1:-1, 1:-1]
    smooth = ((box + 4 * inner).float() / 13 + 0.5).floor()
    sharpened = images.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(smooth, inner.float(), _per_image(factors, images.device))
    return sharpened


def _gray(images: UInt8[Tensor, "g 3 h w"]) -> Float32[Tensor, "g 1 h w"]:
    """Pillow's luma, rounded to whole numbers; all sums are below 2^24, so float32 is exact."""
    red, green, blue = images.float().split(1, dim=1)
    gray = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return gray.mul_(1 / 65536).floor_()


def _blend(
    low: Float32[Tensor, "..."], high: Float32[Tensor, "..."], factors: Float32[Tensor, "..."]
) -> UInt8[Tensor, "..."]:
    """Pillow's blend: 0 gives low, 1 high, others lie on the line through both."""
    return _to_bytes(low + factors * (high - low))


def _to_bytes(values: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    # Cuts off the fraction, as Pillow does; by way of 16 bits a CPU has vector instructions.
    return values.clamp(0, 255).to(torch.int16).to(torch.uint8)


def _per_image(
    amounts: Float64[np.ndarray, " g"], device: torch.device
) -> Float32[Tensor, "g 1 1 1"]:
    return torch.from_numpy(amounts.astype(np.float32)).to(device)[:, None, None, None]


# ------------------------------------------------------------------------------- geometry


def _moved_rows(
    images: UInt8[Tensor, "g 3 h w"],
    views: Float64[np.ndarray, "g 2 3"],
    *,
    taps: int,
    fill: UInt8[Tensor, "3 1 1"],
) -> UInt8[Tensor, "g 3 h w"]:
    """Shear or translate along x: each row moves by a length of its own."""
    width = images.shape[3]
    offsets = _offsets_px(images, views[:, 0], width)
    whole = offsets.floor()
    columns = torch.arange(width + taps - 1, dtype=torch.int32, device=images.device)
    source = (whole.int() - (taps // 2 - 1) + columns).clamp_(0, width - 1).long()
    pixels = images.gather(3, source[:, None].expand(-1, 3, -1, -1)).float()
    moved = torch.zeros_like(pixels[..., :width])
    for tap, weight in enumerate(_weights((offsets - whole).float()[:, None], taps)):
        moved.addcmul_(pixels[..., tap : tap + width], weight)
    # A pixel is inside where its centre, moved, is at least 0 and less than the width.
    first, end = ((side - 0.5 - offsets).ceil().int() for side in (0, width))
    inside = (columns[:width] >= first) & (columns[:width] < end)
    return _filled(moved, inside, fill)


def _moved_cols(
    images: UInt8[Tensor, "g 3 h w"],
    views: Float64[np.ndarray, "g 2 3"],
    *,
    taps: int,
    fill: UInt8[Tensor, "3 1 1"],
) -> UInt8[Tensor, "g 3 h w"]:
    """Shear or translate along y: the same with rows and columns exchanged."""
    turned = views[:, ::-1][:, :, [1, 0, 2]]
    return _moved_rows(images.transpose(2, 3), turned, taps=taps, fill=fill).transpose(2, 3)


def _offsets_px(
    images: UInt8[Tensor, "g 3 h w"], rows_of_views: Float64[np.ndarray, "g 3"], width: int
) -> Float64[Tensor, "g h 1"]:
    """How far right of itself each row of the output reads the input."""
    height = images.shape[2]
    v = (np.arange(height) + 0.5) / height
    offsets = (rows_of_views[:, 1:2] * v + rows_of_views[:, 2:]) * width
    return torch.from_numpy(offsets).to(images.device)[..., None]


def _rotated(
    images: UInt8[Tensor, "g 3 h w"],
    views: Float64[np.ndarray, "g 2 3"],
    *,
    taps: int,
    fill: UInt8[Tensor, "3 1 1"],
) -> UInt8[Tensor, "g 3 h w"]:
    """Apply any affine view, each pixel on its own."""
    if not images.is_cuda:
        return _rotated_by_pillow(images, views, taps=taps, fill=fill)
    height, width = images.shape[2:]
    device = images.device
    view = torch.from_numpy(views.astype(np.float32)).to(device)[..., None, None]
    v, u = ((torch.arange(side, device=device) + 0.5) / side for side in (height, width))
    x, y = (
        (row[:, 0] * u + row[:, 1] * v[:, None] + row[:, 2]) * side
        for row, side in ((view[:, 0], width), (view[:, 1], height))
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # The edge is repeated, so that all neighbours of a place lie at one distance from its first.
    margin = taps // 2
    rows, columns = (
        torch.arange(-margin, side + margin, device=device).clamp(0, side - 1)
        for side in (height, width)
    )
    padded = images.index_select(2, rows).index_select(3, columns).flatten(2)
    left, top = (
        (places - 0.5).floor().clamp(-1, side - 1) for places, side in ((x, width), (y, height))
    )
    first = ((top.long() + 1) * len(columns) + left.long() + 1).flatten(1)
    source = first[:, None].expand(-1, 3, -1)
    across, down = _weights(x - 0.5 - left, taps), _weights(y - 0.5 - top, taps)
    turned = torch.zeros(images.shape, device=device)
    for row, row_weight in enumerate(down):
        line = torch.zeros_like(turned)
        for column, column_weight in enumerate(across):
            neighbours = padded[:, :, row * len(columns) + column :].gather(2, source)
            line.addcmul_(neighbours.view_as(images), column_weight[:, None])
        turned.addcmul_(line, row_weight[:, None])
    return _filled(turned, inside, fill)


def _rotated_by_pillow(
    images: UInt8[Tensor, "g 3 h w"],
    views: Float64[np.ndarray, "g 2 3"],
    *,
    taps: int,
    fill: UInt8[Tensor, "3 1 1"],
) -> UInt8[Tensor, "g 3 h w"]:
    """The same on a CPU, where Pillow's loops take less than half of torch's time."""
    height, width = images.shape[2:]
    resample = Image.Resampling.BILINEAR if taps == 2 else Image.Resampling.BICUBIC
    color = tuple(fill.flatten().tolist())
    rotated = []
    for image, ((xu, xv, x0), (yu, yv, y0)) in zip(images.permute(0, 2, 3, 1).numpy(), views):
        places = (xu, xv * width / height, x0 * width, yu * height / width, yv, y0 * height)
        source = Image.fromarray(np.ascontiguousarray(image))
        turned = source.transform(
            (width, height), Image.Transform.AFFINE, places, resample, fillcolor=color
        )
        rotated.append(np.asarray(turned))
    return torch.from_numpy(np.stack(rotated)).permute(0, 3, 1, 2)


def _weights(part: Float32[Tensor, "*g w"], taps: int) -> tuple[Float32[Tensor, "*g w"], ...]:
    """What neighbours count at `part` of the way between the middle two, from left to right.

    2 of them are bilinear, 4 bicubic with Pillow's slope of -1.
    """
    if taps == 2:
        return 1 - part, part
    square = part * part
    cube = square * part
    return (
        2 * square - cube - part,
        1 - 2 * square + cube,
        part + square - cube,
        cube - square,
    )


def _filled(
    values: Float32[Tensor, "g 3 h w"],
    inside: Bool[Tensor, "g h w"],
    fill: UInt8[Tensor, "3 1 1"],
) -> UInt8[Tensor, "g 3 h w"]:
    """Bytes of weighted sums, and the fill outside."""
    shown = inside[:, None].to(torch.uint8)
    # Weights add up to 1 but for rounding, and a flat area shall keep its value.
    pixels = _to_bytes(values.add_(1e-3))
    return pixels.mul_(shown).add_(fill * (1 - shown))  # on a CPU a tenth of torch.where
