"""Masks: PNG files whose pixels are classes, as data sets have them and as shards hold them.

In a shard a mask is a PNG in grey, of 8 bits, or of 16 where 8 are too few. Its pixels are class
indices, or `ignore_index` where no class is given.
"""

import io

import numpy as np
from jaxtyping import Integer
from PIL import Image

from ..labeler.images import MAX_PIXELS

Mask = Integer[np.ndarray, "h w"]

_NUM_SHOWN = 5


class BadMask(ValueError):
    """The bytes are no mask of classes; the message goes on after "the mask"."""


def ignore_index_of(num_classes: int) -> int:
    """Choose what stands in a shard's masks for pixels without a class."""
    return 255 if num_classes <= 255 else 65535


def read_mask(data: bytes) -> Mask:
    """Read the value of each pixel: of a PNG with a palette its indices, otherwise grey levels.

    Raises:
        BadMask: It is no PNG, damaged, too large, or in colours.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise BadMask(f"is too large: {error}") from error
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise BadMask(f"is no PNG file (it begins with {data[:8]!r})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadMask(f"is too large: {image.width}x{image.height} px, allowed {MAX_PIXELS} px")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise BadMask(
            f"is in colours ({image.mode}), but expected is one number a pixel, its class: a PNG "
            "in grey or with a palette. If each colour stands for a class, convert it first"
        )
    try:
        return np.array(image).astype(np.int32)
    except Exception as error:  # as above
        raise BadMask(f"is damaged: {' '.join(str(error).split())}") from error


def write_mask(mask: Mask, num_classes: int) -> bytes:
    """Encode classes as a shard holds them."""
    kind = np.uint8 if ignore_index_of(num_classes) == 255 else np.uint16
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(kind)).save(buffer, "PNG")
    return buffer.getvalue()


def check_classes(mask: Mask, num_classes: int, ignore_index: int) -> None:
    """Check that each pixel is a class or to be ignored.

    Raises:
        BadMask: Some are not; names their values.
    """
    values = np.unique(mask)
    wrong = values[(values != ignore_index) & ((values < 0) | (values >= num_classes))]
    if len(wrong):
        raise BadMask(
            f"has pixels of value {shown(wrong)}; allowed: 0 to {num_classes - 1}, and "
            f"{ignore_index} for pixels to ignore"
        )


def shown(values: Integer[np.ndarray, " n"]) -> str:
    """List the first of some values."""
    more = ", …" if len(values) > _NUM_SHOWN else ""
    return ", ".join(map(str, values[:_NUM_SHOWN].tolist())) + more
