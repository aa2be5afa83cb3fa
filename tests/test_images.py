"""Reading every kind of image file, and making all of them into JPEGs that DALI reads alike."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import UInt8
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from PIL import Image, ImageOps

from tokenlabel.labeler import images
from tokenlabel.labeler.images import BadImage, load_image, portable_jpeg

Pixels = UInt8[np.ndarray, "rows cols 3"]


def _photo(width: int = 96, height: int = 64) -> Image.Image:
    """Something smooth enough for JPEG, with no symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], axis=-1)
    return Image.fromarray((255 * planes).astype(np.uint8))


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _mean_difference(a: Image.Image | Pixels, b: Image.Image | Pixels) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


def _decode_with_dali(files: list[bytes]) -> list[Pixels]:
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    pipeline = Pipeline(batch_size=len(files), num_threads=2, device_id=None)
    with pipeline:
        encoded = fn.external_source(lambda: arrays, dtype=DALIDataType.UINT8, ndim=1)
        # Pillow's libjpeg upsamples chroma smoothly; DALI does so only when asked.
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", jpeg_fancy_upsampling=True))
    (decoded,) = pipeline.run()
    return [np.array(decoded[i]) for i in range(len(files))]


# ------------------------------------------------------------------------- what comes out as is


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"exif": _exif(1)}, {"optimize": True}],
    ids=str,
)
def test_plain_jpegs_are_not_touched(options: dict[str, Any]):
    data = _file(_photo(), "JPEG", **options)
    assert portable_jpeg(data) == (data, None)


def test_grey_jpegs_are_not_touched():
    data = _file(_photo().convert("L"), "JPEG")
    assert portable_jpeg(data) == (data, None)
    assert load_image(data).mode == "RGB"


def test_a_jpeg_below_the_allowed_side_is_not_touched():
    data = _file(_photo(96, 64), "JPEG")
    assert portable_jpeg(data, max_side_px=96) == (data, None)


# ------------------------------------------------------------------------------ what is repaired


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_other_formats_become_jpeg_whatever_their_suffix(kind: str):
    data = _file(_photo(), kind)
    jpeg, reason = portable_jpeg(data)
    assert reason == f"{kind}, not JPEG"
    assert portable_jpeg(jpeg) == (jpeg, None)
    assert _mean_difference(load_image(jpeg), load_image(data)) < 3  # GIF's dots cost most


def test_cmyk_jpegs_become_rgb():
    data = _file(_photo().convert("CMYK"), "JPEG", quality=95)
    jpeg, reason = portable_jpeg(data)
    assert reason == "CMYK colours"
    assert _mean_difference(load_image(jpeg), _photo()) < 4


def test_jpegs_coded_as_rgb_become_ycbcr():
    data = _file(_photo(), "JPEG", keep_rgb=True, quality=95)
    jpeg, reason = portable_jpeg(data)
    assert reason == "JPEG without YCbCr"
    assert _mean_difference(load_image(jpeg), _photo()) < 2


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotated_jpegs_are_set_upright(orientation: int):
    data = _file(_photo(), "JPEG", exif=_exif(orientation), quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(expected))
    jpeg, reason = portable_jpeg(data)
    assert reason == "EXIF orientation"
    assert not Image.open(io.BytesIO(jpeg)).getexif()
    assert _mean_difference(load_image(jpeg), expected) < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_cost_the_image():
    data = _file(_photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x07" * 20)
    assert load_image(data).size == (96, 64)


@pytest.mark.parametrize(("size", "shrunk"), [((300, 200), (100, 67)), ((20, 400), (5, 100))])
def test_large_images_are_shrunk_on_request(size: tuple[int, int], shrunk: tuple[int, int]):
    jpeg, reason = portable_jpeg(_file(_photo(*size), "JPEG"), max_side_px=100)
    assert reason == "longer side above 100 px"
    assert load_image(jpeg).size == shrunk
    assert _mean_difference(load_image(jpeg), _photo(*size).resize(shrunk)) < 4


def test_quality_governs_what_is_encoded_anew():
    data = _file(_photo(), "PNG")
    assert len(portable_jpeg(data, quality=30)[0]) < len(portable_jpeg(data, quality=95)[0])


def test_stray_bytes_between_jpeg_segments_are_removed():
    data = _file(_photo(), "JPEG")
    data = data[:20] + b"\0\0" + data[20:]  # behind the JFIF segment
    jpeg, reason = portable_jpeg(data)
    assert reason == "uncommon or damaged JPEG header"
    assert _mean_difference(load_image(jpeg), load_image(data)) < 2


# ---------------------------------------------------------------------------------- odd pixels


def test_transparency_is_laid_over_white():
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    pixels = np.asarray(load_image(_file(red, "PNG")))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[4, 4].tolist() == [255, 255, 255]


def test_a_palette_with_a_transparent_entry_is_laid_over_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.putpixel((0, 0), 0)
    pixels = np.asarray(load_image(_file(image, "PNG", transparency=1)))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_sixteen_bit_greys_keep_their_range():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = np.asarray(load_image(_file(Image.fromarray(ramp), "PNG")))
    np.testing.assert_array_equal(pixels, np.repeat(ramp[..., None] >> 8, 3, axis=-1))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = _file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20_000, 3)])
def test_tiny_and_very_wide_images_are_usable(size: tuple[int, int]):
    data = _file(Image.new("RGB", size, "teal"), "JPEG")
    assert load_image(data).size == size
    assert portable_jpeg(data) == (data, None)
    jpeg, _ = portable_jpeg(data, max_side_px=50)
    assert max(load_image(jpeg).size) <= 50


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("check", [load_image, portable_jpeg])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (
            b"<html>404</html>",
            r"not a JPEG, PNG, .* file \(it begins with b'<html>40'\)",
        ),
        (_file(_photo(), "JPEG")[:-200], "truncated: .* bytes not processed"),
        (_file(_photo(), "JPEG", progressive=True)[:-200], "truncated: "),
        (_file(_photo(), "PNG")[:-200], "truncated: "),
        (_file(_photo(), "JPEG")[:30], "not a JPEG|truncated|unreadable"),
        (_file(_photo(), "TIFF"), "not a JPEG"),
    ],
    ids=["empty", "html", "jpeg", "progressive", "png", "header only", "tiff"],
)
def test_unusable_files_are_refused_with_a_reason(
    check: Callable[[bytes], object], data: bytes, reason: str
):
    with pytest.raises(BadImage, match=reason) as caught:
        check(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side_px", [16_000, 65_000])
def test_images_too_large_to_decode_are_refused_from_their_header(side_px: int):
    data = bytearray(_file(_photo(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = side_px.to_bytes(2, "big") * 2
    with pytest.raises(BadImage, match="too large"):
        load_image(bytes(data))


def test_the_size_limit_is_exact(monkeypatch: pytest.MonkeyPatch):
    data = _file(_photo(96, 64), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 64)
    assert load_image(data).size == (96, 64)
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(BadImage, match="too large: 96x64 px are more than 6143 pixels"):
        load_image(data)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"]))
def test_random_bytes_raise_nothing_but_bad_image(data: bytes, start: bytes):
    for check in (load_image, portable_jpeg):
        try:
            check(start + data)
        except BadImage:
            pass


# ------------------------------------------------------------------------- two decoders, one view


def test_dali_and_pillow_agree_on_every_repaired_kind():
    files = [
        _file(_photo(), "JPEG"),
        _file(_photo(), "JPEG", progressive=True),
        _file(_photo(), "JPEG", subsampling="4:4:4"),
        _file(_photo(), "JPEG", exif=_exif(6)),
        _file(_photo(), "JPEG", keep_rgb=True),
        _file(_photo().convert("L"), "JPEG"),
        _file(_photo().convert("CMYK"), "JPEG"),
        _file(_photo(), "PNG"),
        _file(Image.new("RGB", (1, 1), "teal"), "JPEG"),
        _file(_photo(20_000, 3), "JPEG"),
        _file(_photo(), "MPO", save_all=True, append_images=[_photo(10, 10)]),
    ]
    portable = [portable_jpeg(file)[0] for file in files]
    for jpeg, seen_by_dali in zip(portable, _decode_with_dali(portable)):
        seen_by_pillow = np.asarray(load_image(jpeg))
        assert seen_by_dali.shape == seen_by_pillow.shape
        assert _mean_difference(seen_by_dali, seen_by_pillow) < 0.5


def test_what_passes_the_check_never_stops_dali():
    rng = np.random.default_rng(0)
    whole = [_file(_photo(), "JPEG"), _file(_photo(), "JPEG", progressive=True)]
    passed = []
    for number in range(600):
        data = bytearray(whole[number % 2])
        data[rng.integers(2, len(data))] = rng.integers(256)
        try:
            passed.append(portable_jpeg(bytes(data))[0])
        except BadImage:
            pass
    assert 100 < len(passed) < 600
    for jpeg, seen_by_dali in zip(passed, _decode_with_dali(passed)):
        assert seen_by_dali.shape == np.asarray(load_image(jpeg)).shape


def test_looking_at_the_ends_finds_what_is_cut_off_and_decodes_what_is_encoded_anew():
    data = _file(_photo(60, 40), "JPEG")
    assert portable_jpeg(data, check="ends") == (data, None)
    assert portable_jpeg(data + b"\0\0", check="ends") == (data + b"\0\0", None)
    with pytest.raises(BadImage, match="truncated"):
        portable_jpeg(data[:-100], check="ends")
    with pytest.raises(BadImage, match="not a JPEG"):
        portable_jpeg(b"cut" + data, check="ends")
    png = _file(_photo(60, 40), "PNG")
    assert portable_jpeg(png, check="ends") == portable_jpeg(png)


def test_only_decoding_finds_what_is_missing_in_the_middle():
    data = _file(_photo(60, 40), "JPEG")
    tables = data.index(b"\xff\xdb")  # of the quantisation
    end = tables + 2 + int.from_bytes(data[tables + 2 : tables + 4], "big")
    without = data[:tables] + data[end:]
    assert portable_jpeg(without, check="ends") == (without, None)
    with pytest.raises(BadImage):
        portable_jpeg(without)
