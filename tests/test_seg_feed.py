"""The training feed: crops as described, the same for any number of processes and after a stop."""

import colorsys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seg_sets import blocks, paint, tiny_recipe, write_shards

from tokenlabel.segmenter import feed as feeds
from tokenlabel.segmenter.feed import (
    SegAugmentConfig,
    SegBatch,
    SegSamples,
    SegTrainFeed,
    distort,
    eval_images,
    random_crop,
    resize_part,
)
from tokenlabel.segmenter.inference import InferenceConfig, view_hw
from tokenlabel.shards.index import read_index
from tokenlabel.trainer.recipe import IMAGENET_MEAN, IMAGENET_STD

STILL = SegAugmentConfig(
    scale=(1.0, 1.0), short_px=64, long_px=256, crop_px=64, cat_max_ratio=1.0, hflip=0.0,
    brightness=0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), num_train=7, num_val=5)


@pytest.fixture(scope="module")
def samples(data) -> SegSamples:
    return SegSamples(read_index(data), "train")


def make_feed(samples: SegSamples, **options) -> SegTrainFeed:
    given = dict(batch_size=4, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=3, num_workers=0)
    return SegTrainFeed(samples, tiny_recipe().augment, **given | options)  # pyright: ignore


def take(samples: SegSamples, num: int, **options) -> list[SegBatch]:
    with closing(make_feed(samples, **options)) as feed:
        return [next(feed) for _ in range(num)]


def photo(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = blocks(rng, height, width).astype(np.int32)
    return np.array(paint(mask, rng)), mask


def assert_same(one: SegBatch, other: SegBatch) -> None:
    assert one.keys == other.keys
    assert torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)


# -------------------------------------------------------------------------------------- order


def test_each_pass_has_every_sample_once_in_an_order_of_its_own(samples):
    keys = [key for batch in take(samples, 7) for key in batch.keys]
    passes = [keys[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(part) == sorted(passes[0]) and len(set(part)) == 7 for part in passes)
    assert len({tuple(part) for part in passes}) == 4


def test_a_feed_that_begins_at_a_step_goes_on_as_if_it_had_begun_at_the_first(samples):
    for late, whole in zip(take(samples, 3, step=2), take(samples, 5)[2:]):
        assert_same(late, whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_very_batch_that_one_would_have(samples, world_size):
    whole = take(samples, 3)
    parts = [take(samples, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert [key for share in shares for key in share.keys] == batch.keys
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.masks for share in shares]), batch.masks)


def test_helper_processes_change_nothing(samples):
    for one, other in zip(take(samples, 3), take(samples, 3, num_workers=1)):
        assert_same(one, other)


def test_another_seed_gives_other_crops(samples):
    assert not torch.equal(take(samples, 1)[0].images, take(samples, 1, seed=4)[0].images)


# -------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [(31, 40), (160, 90), (512, 683)])
def test_a_part_of_a_resized_image_is_what_torch_resizes_to_within_a_level(size):
    pixels, _ = photo(70, 83)
    whole = F.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), size, mode="bilinear"
    )
    expected = whole[0].round().permute(1, 2, 0).numpy()
    rows, cols = slice(3, size[0] - 5), slice(7, 30)
    found = resize_part(pixels, size, rows, cols)
    assert found.shape == expected[rows, cols].shape
    assert np.abs(found.astype(int) - expected[rows, cols].astype(int)).max() <= 1
    assert (found != expected[rows, cols]).mean() < 1e-3


def test_image_and_mask_stay_together():
    pixels, mask = photo(90, 120)
    config = replace(STILL, scale=(0.5, 2.0), hflip=0.5)
    colours = {tuple(c): i for i, c in enumerate([(200, 60, 40), (30, 180, 60), (60, 60, 220)])}
    for seed in range(12):
        crop, crop_mask = random_crop(pixels, mask, config, ignore_index=255, seed=[seed])
        assert crop.shape[:2] == crop_mask.shape
        for colour, index in colours.items():
            inside = crop[crop_mask == index]
            if len(inside) > 200:
                assert np.abs(np.median(inside, axis=0) - colour).max() < 8


def test_sizes_follow_the_rule_of_evaluation_and_a_small_image_gives_a_small_crop():
    pixels, mask = photo(48, 200)
    config = replace(STILL, scale=(0.5, 0.5))
    crop, crop_mask = random_crop(pixels, mask, config, ignore_index=255, seed=[0])
    assert view_hw((48, 200), InferenceConfig(short_px=64, long_px=256), scale=0.5) == (31, 128)
    assert crop.shape == (31, 64, 3) and crop_mask.shape == (31, 64)


def test_padding_is_0_after_normalisation_and_teaches_nothing(samples):
    config = replace(STILL, short_px=32, long_px=64)
    feed = SegTrainFeed(
        samples, config, batch_size=2, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, num_workers=0
    )
    batch = next(feed)
    assert batch.images.shape == (2, 3, 64, 64) and batch.masks.shape == (2, 64, 64)
    assert (batch.images[:, :, 32:] == 0).all() and (batch.masks[:, 32:] == 255).all()
    pixels, mask = samples.read([samples.key(i) for i in range(7)].index(batch.keys[0]))
    height, width = view_hw(mask.shape, InferenceConfig(short_px=32, long_px=64))
    resized = resize_part(pixels, (height, width), slice(0, height), slice(0, width))
    expected = (resized[:, : min(width, 64)] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    found = batch.images[0, :, :height, : min(width, 64)].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_crops_of_one_class_are_passed_over_where_others_can_be_had():
    """Left of the image is one class, right of it stripes of two."""
    mask = np.zeros((64, 640), np.int32)
    mask[:, 320:] = 1 + np.arange(320) // 10 % 2
    pixels = np.zeros((64, 640, 3), np.uint8)
    config = replace(STILL, short_px=64, long_px=640)

    def largest(cat_max_ratio: float) -> list[float]:
        shares = []
        for seed in range(60):
            one = replace(config, cat_max_ratio=cat_max_ratio)
            _, crop = random_crop(pixels, mask, one, ignore_index=255, seed=[seed])
            shares.append(np.bincount(crop.ravel()).max() / crop.size)
        return shares

    assert sum(share > 0.75 for share in largest(1.0)) > 20
    assert sum(share > 0.75 for share in largest(0.75)) <= 1
    only = np.zeros((64, 640), np.int32)  # nothing better can be had: the last try is taken
    _, crop = random_crop(
        pixels, only, replace(config, cat_max_ratio=0.75), ignore_index=255, seed=[0]
    )
    assert crop.shape == (64, 64)


def test_ignored_pixels_count_for_no_class():
    mask = np.full((8, 8), 255, np.int32)
    assert not feeds._is_varied(mask, 0.75, 255)
    mask[0] = [1, 1, 1, 1, 2, 2, 2, 255]
    assert feeds._is_varied(mask, 0.75, 255) and not feeds._is_varied(mask, 0.5, 255)


# ------------------------------------------------------------------------------------- colours


def settings(**changes) -> SegAugmentConfig:
    return replace(STILL, **changes)


def distorted(config: SegAugmentConfig, pixels: np.ndarray, num: int = 40) -> list[np.ndarray]:
    return [distort(pixels, config, np.random.default_rng(seed)) for seed in range(num)]


def test_brightness_adds_to_half_of_the_crops_and_contrast_multiplies_half():
    pixels = np.full((4, 4, 3), 100, np.uint8)
    for config, low, high in (
        (settings(brightness=32), 68, 132),
        (settings(contrast=(0.5, 1.5)), 50, 150),
    ):
        values = [int(crop[0, 0, 0]) for crop in distorted(config, pixels, 80)]
        changed = [value for value in values if value != 100]
        assert 24 < len(changed) < 56 and low <= min(values) < 84 and 116 < max(values) <= high
    assert max(crop.max() for crop in distorted(settings(contrast=(4.0, 4.0)), pixels)) == 255


def test_hue_is_turned_and_saturation_scaled_as_in_hsv():
    pixels = np.array([[[50, 200, 150]]], np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[0, 0] / 255))
    turned = {
        round((colorsys.rgb_to_hsv(*(crop[0, 0] / 255))[0] - hue) * 180)
        for crop in distorted(settings(hue=18), pixels, 200)
    }
    assert min(turned) in range(-20, -14) and max(turned) in range(15, 21)
    for crop in distorted(settings(saturation=(0.5, 1.5)), pixels):
        h, s, v = colorsys.rgb_to_hsv(*(crop[0, 0] / 255))
        assert abs(h - hue) < 0.02 and abs(v - value) < 0.01
        assert saturation * 0.48 < s <= 1


def test_nothing_is_distorted_where_nothing_may_be():
    pixels, _ = photo(20, 20)
    assert all(np.array_equal(crop, pixels) for crop in distorted(STILL, pixels, 10))


# ----------------------------------------------------------------------------------- the rest


def test_evaluation_sees_each_image_once_over_all_processes_at_its_own_size(data):
    samples = SegSamples(read_index(data), "val")
    shares = [list(eval_images(samples, rank=r, world_size=2, num_workers=0)) for r in range(2)]
    assert sorted(image.key for share in shares for image in share) == sorted(
        samples.key(i) for i in range(5)
    )
    for image in (image for share in shares for image in share):
        assert image.pixels.shape[1:] == image.mask.shape
        assert (image.mask[:2] == 255).all() and image.mask[2:].max() < 4


def test_a_sample_that_is_damaged_is_named(data, tmp_path, samples):
    shard = Path(samples._shards[0])
    torn = tmp_path / shard.name
    torn.write_bytes(shard.read_bytes())
    place = samples._places[0]
    with torn.open("rb+") as file:
        file.seek(int(place[3]))
        file.write(bytes(int(place[4])))
    damaged = SegSamples(read_index(data), "train")
    damaged._shards[0] = str(torn)
    for num_workers in (0, 1):
        feed = make_feed(damaged, num_workers=num_workers)
        with closing(feed), pytest.raises(ValueError, match="is damaged: its mask is no PNG") as e:
            for _ in range(3):
                next(feed)
        assert samples.key(0) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scale=(2.0, 0.5)), "augment.scale"),
        (dict(crop_px=8), "augment.crop_px = 8"),
        (dict(cat_max_ratio=1.5), "augment.cat_max_ratio = 1.5; allowed: 0 to 1"),
        (dict(hue=100), "augment.hue = 100"),
        (dict(short_px=9), "augment.short_px = 9; allowed: 15 to"),
        (dict(brightness=300), "augment.brightness"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)
