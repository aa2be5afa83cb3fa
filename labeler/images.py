"""Is this image usable, and does every decoder read it alike?

The teacher reads images with Pillow, the training feed with DALI. Both agree on plain upright
JPEGs; whatever else an image folder holds is turned into one of these by `portable_jpeg`.
"""

import io
import struct
from typing import Literal

import numpy as np
from PIL import Image

MAX_PIXELS = 1 << 27
"""Images above 134 megapixels (400 MB decoded) are refused before memory is taken for them."""
DEFAULT_QUALITY = 95

Check = Literal["decode", "ends"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those are no frames
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})


class BadImage(ValueError):
    """The bytes are no usable image; the message is one line that says why."""


def load_image(data: bytes) -> Image.Image:
    """Decode a file to an upright RGB image.

    EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled to 8
    bits, of an animation the first frame is taken.

    Raises:
        BadImage: Whatever is wrong with the bytes: empty, unknown format, truncated, too large.
    """
    return _decode(_open(data))


def portable_jpeg(
    data: bytes,
    *,
    max_side_px: int | None = None,
    quality: int = DEFAULT_QUALITY,
    check: Check = "decode",
) -> tuple[bytes, str | None]:
    """Return bytes that Pillow and DALI decode alike, and what had to be changed for that.

    Upright 8-bit JPEGs in grey or YCbCr, baseline or progressive, come back untouched, but every
    one is checked, so that a truncated file is found here and not in the middle of a training.

    Args:
        data: An image file of any kind that load_image reads.
        max_side_px: Shrink images whose longer side is above this.
        quality: JPEG quality (1 to 95) of images that are encoded anew.
        check: "decode" decodes every image; "ends" trusts a JPEG that begins with a header in
            order and ends with the end-of-image marker, and decodes the others.

    Returns:
        The JPEG, and None when it is `data` itself or else the reason why it is not.

    Raises:
        BadImage: As load_image.
    """
    image = _open(data)
    reason = _reason_to_encode(image, data, max_side_px)
    if reason is None:
        if check == "decode" or not data.endswith(_END_OF_IMAGE):
            _check_pixels(image)
        return data, None
    upright = _decode(image)
    if max_side_px is not None:
        upright.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    # Full chroma: most of what is encoded anew is small, synthetic, or was never a JPEG.
    upright.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue(), reason


def portable_pixels(data: bytes) -> bytes:
    """Return bytes that Pillow and DALI decode alike, of the very pixels that the file has.

    A JPEG that portable_jpeg leaves as it is comes back untouched, anything else as PPM.

    Raises:
        BadImage: As load_image.
    """
    image = _open(data)
    if _reason_to_encode(image, data, None) is None:
        _check_pixels(image)
        return data
    upright = _decode(image)
    return b"P6\n%d %d\n255\n" % upright.size + upright.tobytes()


def _check_pixels(image: Image.Image) -> None:
    """Decode a JPEG to find out whether it is whole."""
    # An eighth of the size in grey costs half the time, and still reads every byte.
    image.draft("L", (1, 1))
    _decode(image)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(
            f"not a JPEG, PNG, WebP, BMP or GIF file (it begins with {data[:8]!r})"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise BadImage(f"unreadable header: {_one_line(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(
            f"too large: {image.width}x{image.height} px are more than {MAX_PIXELS} pixels"
        )
    return image


def _decode(image: Image.Image) -> Image.Image:
    """Return the opened image's pixels as upright RGB."""
    try:
        image.load()
        rgb = _to_rgb(image)
    except Exception as error:  # as above; among them OSError, SyntaxError, struct.error
        problem = _one_line(error)
        truncated = "truncated" in problem or isinstance(error, EOFError)
        raise BadImage(f"{'truncated' if truncated else 'damaged'}: {problem}") from error
    orientation = _orientation(image)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() clips 16-bit greys at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where the EXIF block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the pixels
        return 1
    return value if value in _UPRIGHT else 1


def _reason_to_encode(image: Image.Image, data: bytes, max_side_px: int | None) -> str | None:
    if image.format not in ("JPEG", "MPO"):
        return f"{image.format}, not JPEG"
    if image.mode not in ("L", "RGB"):
        return f"{image.mode} colours"
    frame, component_ids = _jpeg_frame(data)
    if frame not in _HUFFMAN_FRAMES:
        return "uncommon or damaged JPEG header"
    if len(component_ids) == 3 and _is_rgb_coded(image, component_ids):
        return "JPEG without YCbCr"
    if _orientation(image) != 1:
        return "EXIF orientation"
    if max_side_px is not None and max(image.size) > max_side_px:
        return f"longer side above {max_side_px} px"
    return None


def _is_rgb_coded(image: Image.Image, component_ids: bytes) -> bool:
    """Apply libjpeg's rule for a three-component file."""
    if "jfif" in image.info:
        return False
    if "adobe_transform" in image.info:
        return image.info["adobe_transform"] == 0
    return component_ids == b"RGB"


def _jpeg_frame(data: bytes) -> tuple[int, bytes]:
    """Return a JPEG's start-of-frame marker and its component ids.

    (0, b"") if there is anything but whole segments before the first scan: libjpeg skips stray
    bytes there, DALI's parser gives up.
    """
    frame, component_ids = 0, b""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, num_bytes = struct.unpack_from(">xBH", data, position)
        if marker == _START_OF_SCAN:
            return frame, component_ids
        if marker in _FRAME_MARKERS:
            frame = marker
            component_ids = data[position + 10 : position + 2 + num_bytes : 3]
        position += 2 + num_bytes
    return 0, b""
