"""Windows, sizes and flips against naive loops written from the published rules."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenlabel.segmenter import inference
from tokenlabel.segmenter.inference import (
    PUBLISHED_SCALES,
    InferenceConfig,
    segment,
    slide_logits,
    view,
    view_hw,
    why_too_small,
    window_starts,
)
from tokenlabel.segmenter.uper_net import ModelConfig, UperNet, create_model

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = InferenceConfig(short_px=40, long_px=100, window_px=32, stride_px=21)


@pytest.fixture(scope="module")
def model() -> UperNet:
    torch.manual_seed(0)
    size = dict(embed_dim=8, depth=4, num_heads=2, stem_width=4, head_dim=6, deep_dim=8)
    kwargs = size | dict(out_blocks=[0, 1, 2, 3])
    built = create_model(ModelConfig(num_classes=4, image_size=32, kwargs=kwargs))
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 5
    torch.nn.init.normal_(built.decode_head.conv_seg.weight)
    return built.eval()


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Blobs of colour: neighbouring pixels are alike, as in a photo."""
    gen = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 9, generator=gen)
    pixels = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (pixels[0] * 255).clamp(0, 255).to(torch.uint8)


def naive_slide(model, images, window: int, stride: int):
    """The published rule, window by window, pixel by pixel."""
    _, _, height, width = images.shape
    total = torch.zeros(len(images), model.num_classes, height, width)
    count = torch.zeros(height, width)
    for i in range(max(height - window + stride - 1, 0) // stride + 1):
        for j in range(max(width - window + stride - 1, 0) // stride + 1):
            y2, x2 = min(i * stride + window, height), min(j * stride + window, width)
            y1, x1 = max(y2 - window, 0), max(x2 - window, 0)
            logits = model(images[:, :, y1:y2, x1:x2])
            for y in range(y1, y2):
                for x in range(x1, x2):
                    total[:, :, y, x] += logits[:, :, y - y1, x - x1]
                    count[y, x] += 1
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize("height, width", [(32, 32), (40, 71), (20, 75), (53, 33)])
@torch.no_grad()
def test_sliding_windows_match_a_naive_double_loop(model, height, width):
    images = torch.randn(2, 3, height, width)
    found = slide_logits(model, images, window_px=32, stride_px=21)
    torch.testing.assert_close(found, naive_slide(model, images, 32, 21), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "length_px, starts",
    [(100, [0]), (512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342])],
)
def test_the_last_window_ends_where_the_image_does(length_px, starts):
    assert window_starts(length_px, 512, 341) == starts


@pytest.mark.parametrize(
    "height, width, seen",
    [
        (512, 683, (512, 683)),
        (256, 341, (512, 682)),
        (640, 853, (512, 682)),
        (33, 500, (135, 2048)),
        (2000, 500, (2048, 512)),
        (4000, 500, (2048, 256)),
    ],
)
def test_the_shorter_side_is_resized_unless_the_longer_one_gets_too_long(height, width, seen):
    config = InferenceConfig()
    factor = min(2048 / max(height, width), 512 / min(height, width))
    assert view_hw((height, width), config) == seen
    assert seen == (int(height * factor + 0.5), int(width * factor + 0.5))


def test_sizes_scale_the_limits_and_not_the_image():
    sizes = [view_hw((640, 853), InferenceConfig(), scale=scale) for scale in PUBLISHED_SCALES]
    assert sizes == [(256, 341), (384, 512), (512, 682), (640, 853), (768, 1024), (896, 1194)]


def test_an_image_is_resized_bilinearly_without_antialiasing_to_whole_levels():
    image = photo(60, 90)
    found = view(image, SMALL, mean=MEAN, std=STD)
    assert found.shape == (3, 40, 60)
    pixels = image.double().numpy()
    for channel, y, x in [(0, 0, 0), (1, 17, 33), (2, 39, 59), (0, 5, 58)]:
        at_y, at_x = (y + 0.5) * 60 / 40 - 0.5, (x + 0.5) * 90 / 60 - 0.5
        y0, x0 = math.floor(at_y), math.floor(at_x)
        fy, fx = at_y - y0, at_x - x0
        corner = pixels[channel, y0 : y0 + 2, x0 : x0 + 2]
        level = np.round(np.array([1 - fy, fy]) @ corner @ np.array([1 - fx, fx]))
        expected = (level / 255 - MEAN[channel]) / STD[channel]
        # Halves may be rounded to either side.
        assert abs(found[channel, y, x].item() - expected) <= 1.01 / 255 / STD[channel]
    levels = (found * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@torch.no_grad()
def naive_multi_scale(model, image, config, scales) -> torch.Tensor:
    """Mean of the probabilities of all passes, each at the image's own size."""
    size = image.shape[1:]
    passes = []
    for scale in scales:
        for flipped in (False, True):
            pixels = view(image, config, mean=MEAN, std=STD, scale=scale)[None]
            pixels = pixels.flip(3) if flipped else pixels
            if config.mode == "slide":
                logits = naive_slide(model, pixels, config.window_px, config.stride_px)
            else:
                logits = model(pixels)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            probabilities = logits.softmax(1)
            passes.append(probabilities.flip(3) if flipped else probabilities)
    return torch.stack(passes).mean(0)[0]


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_several_sizes_and_flips_average_probabilities_at_the_images_own_size(model, mode):
    config = InferenceConfig(mode=mode, short_px=40, long_px=100, window_px=32, stride_px=21)
    image, scales = photo(50, 66), (0.5, 1.0, 1.25)
    found = segment(model, image, config, mean=MEAN, std=STD, scales=scales, flip=True)
    expected = naive_multi_scale(model, image, config, scales)
    best = expected.sort(dim=0, descending=True).values
    is_clear = best[0] - best[1] > 1e-4
    assert is_clear.float().mean() > 0.99
    assert torch.equal(found[is_clear], expected.argmax(0)[is_clear])
    assert len(found.unique()) > 1
    once = segment(model, image, config, mean=MEAN, std=STD)
    assert not torch.equal(found, once)


def test_a_mirrored_image_has_mirrored_classes_when_flips_are_averaged(model):
    image = photo(40, 60)
    one = segment(model, image, SMALL, mean=MEAN, std=STD, flip=True)
    other = segment(model, image.flip(2), SMALL, mean=MEAN, std=STD, flip=True)
    assert (one == other.flip(1)).float().mean() > 0.999


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("height, width", [(256, 341), (640, 853), (33, 500)])
def test_images_of_odd_sizes_get_a_class_for_every_pixel(model, mode, height, width):
    config = InferenceConfig(mode=mode, short_px=64, long_px=256, window_px=64, stride_px=43)
    image = photo(height, width)
    found = segment(model, image, config, mean=MEAN, std=STD)
    assert found.shape == (height, width)
    assert len(found.unique()) > 1
    pixels = view(image, config, mean=MEAN, std=STD)[None]
    with torch.no_grad():
        logits = naive_slide(model, pixels, 64, 43) if mode == "slide" else model(pixels)
    logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    assert (found == logits.argmax(1)[0]).float().mean() > 0.9999


def test_bands_of_rows_give_what_the_whole_image_gives(model, monkeypatch):
    image = photo(90, 50)
    whole = segment(model, image, SMALL, mean=MEAN, std=STD)
    twice = segment(model, image, SMALL, mean=MEAN, std=STD, flip=True)
    monkeypatch.setattr(inference, "_BAND_BYTES", 4 * 4 * 50 * 7)  # 7 of 90 rows
    assert torch.equal(segment(model, image, SMALL, mean=MEAN, std=STD), whole)
    assert torch.equal(segment(model, image, SMALL, mean=MEAN, std=STD, flip=True), twice)


def test_half_precision_changes_few_pixels(model):
    image = photo(40, 60)
    exact = segment(model, image, SMALL, mean=MEAN, std=STD)
    rough = segment(model, image, SMALL, mean=MEAN, std=STD, precision="bf16")
    assert (exact == rough).float().mean() > 0.95


def test_too_narrow_an_image_is_known_beforehand():
    assert why_too_small((33, 500), InferenceConfig()) is None
    assert why_too_small((3, 500), InferenceConfig()) == (
        "3 × 500 px (height × width) would be seen at 12 × 2048 px; both sides must have 15 px at "
        "least"
    )
    assert why_too_small((6, 800), InferenceConfig()) is None
    assert "8 × 1024 px" in str(why_too_small((6, 800), InferenceConfig(), scales=(1.0, 0.5)))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(short_px=9), "short_px = 9; allowed: 15 to inference.long_px = 2048"),
        (dict(long_px=500), "short_px = 512; allowed: 15 to inference.long_px = 500"),
        (dict(window_px=8), "window_px = 8; allowed: >= 15"),
        (dict(stride_px=513), "stride_px = 513; allowed: 1 to inference.window_px = 512"),
        (dict(stride_px=0), "stride_px = 0; allowed: 1 to"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**options)
