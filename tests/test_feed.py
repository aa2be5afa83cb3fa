"""The feed: every sample once, labels with their pixels, resume to the bit, timm's view."""

import gc
import io
import random
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import NUM_CLASSES, jpeg, make_samples, noise, painted, write_split
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from tokenlabel.labeler.geometry import apply_view, sample_targets
from tokenlabel.labeler.label_map import LabelMap, decode, encode
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.trainer import feed as feed_module
from tokenlabel.trainer.augment_draws import (
    COLOR_NUMBERS,
    ERASING_NUMBERS,
    Layers,
    Operation,
    draw_colors,
    draw_erased,
)
from tokenlabel.trainer.feed import Batch, EvalFeed, TrainFeed
from tokenlabel.trainer.rand_augment import apply_layers
from tokenlabel.trainer.recipe import AugmentConfig

PLAIN = AugmentConfig(
    hflip=0.0,
    color_jitter=0.0,
    random_erasing=0.0,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 labelled samples in five shards."""
    folder = tmp_path_factory.mktemp("data")
    return write_split(folder, make_samples(f"folder/sample{i:02d}" for i in range(23)))


@pytest.fixture
def train_feed() -> Iterator[Callable[..., TrainFeed]]:
    feeds: list[TrainFeed] = []

    def build(index: ShardIndex, **options) -> TrainFeed:
        defaults: dict[str, Any] = {
            "image_size": (16, 24),
            "batch_size": 4,
            "augment": AugmentConfig(),
            "num_threads": 1,
            "shuffle_buffer": 8,
        }
        feeds.append(TrainFeed(index, **defaults | options))
        return feeds[-1]

    yield build
    for feed in feeds:
        feed.close()


def eval_feed(index: ShardIndex, split: str = "train", **options) -> EvalFeed:
    defaults: dict[str, Any] = {
        "image_size": (16, 16),
        "crop_pct": 0.875,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "batch_size": 4,
        "num_threads": 1,
    }
    return EvalFeed(index, split, **defaults | options)


def assert_same(batch: Batch, other: Batch) -> None:
    assert batch.keys == other.keys
    assert torch.equal(batch.images, other.images)
    assert torch.equal(batch.classes, other.classes)
    assert torch.equal(batch.views, other.views)
    assert batch.maps is not None and other.maps is not None
    for name, value in vars(batch.maps).items():
        same = value == getattr(other.maps, name)
        assert same.all() if isinstance(same, torch.Tensor) else same, name


# ------------------------------------------------------------------ pixels and their view


def misplacement_px(batch: Batch, image_hw: tuple[int, int]) -> float:
    """Largest distance between where a pixel says it is from and where the view says.

    In pixels of the image or of the crop, whichever are larger. At the crop's edge filters are cut
    off, so one such pixel is left out there.
    """
    rows, cols = batch.images.shape[2:]
    v, u = (torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols
    points = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).reshape(-1, 2)
    expected = apply_view(batch.views, points)
    found = batch.images[:, :2].flatten(2).transpose(1, 2)
    source_px = 1 / torch.tensor(image_hw[::-1])
    crop_sides = batch.views[:, :, :2].abs().sum(2)
    pixel = torch.maximum(source_px, crop_sides / torch.tensor([cols, rows]))[:, None]
    margin = pixel / crop_sides[:, None]
    inner = ((points > margin) & (points < 1 - margin)).all(2, keepdim=True)
    assert inner.float().mean() > 0.5
    return float(((found - expected).abs() / pixel * inner).max())


@pytest.mark.parametrize("image_hw", [(24, 40), (36, 20), (32, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_come_from_where_the_view_says(tmp_path, train_feed, image_hw, interpolation):
    image = jpeg(painted(*image_hw), quality=100)
    index = write_split(tmp_path, [{f"{i}.jpg": image, f"{i}.cls": b"0"} for i in range(6)])
    augment = AugmentConfig(
        hflip=0.5,
        color_jitter=0.0,
        random_erasing=0.0,
        interpolation=interpolation,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    feed = train_feed(index, image_size=(16, 24), batch_size=20, augment=augment, with_labels=False)
    batch = next(feed)
    assert misplacement_px(batch, image_hw) < 0.5
    flipped = batch.views[:, 0, 0] < 0
    assert 2 <= int(flipped.sum()) <= 18


def test_a_rotated_photo_is_seen_upright_and_its_view_is_of_the_upright_image(tmp_path, train_feed):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    stored = np.rot90(painted(40, 24)).copy()
    image = jpeg(stored, quality=100, exif=exif)
    index = write_split(tmp_path, [{"a.jpg": image, "a.cls": b"0"}])
    feed = train_feed(index, image_size=(16, 16), batch_size=8, augment=PLAIN, with_labels=False)
    assert misplacement_px(next(feed), (40, 24)) < 0.5


def test_interpolation_random_draws_one_of_the_two_for_each_sample(data, train_feed):
    batches = {}
    for kind in ("random", "bilinear", "bicubic"):
        augment = AugmentConfig(color_jitter=0.0, random_erasing=0.0, interpolation=kind)
        batches[kind] = next(train_feed(data, augment=augment, batch_size=16))
    is_kind = {
        kind: (batches["random"].images == batches[kind].images).flatten(1).all(1)
        for kind in ("bilinear", "bicubic")
    }
    assert torch.equal(is_kind["bilinear"], ~is_kind["bicubic"])
    assert 2 <= int(is_kind["bicubic"].sum()) <= 14


# --------------------------------------------------------------------------- RandAugment

RAND_AUGMENT = "rand-n3-m9-mstd0.5-inc1-p1"


def geometric_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let RandAugment draw as ever, but leave colours alone: they tell where a pixel is from."""
    draw = feed_module.draw_layers
    geometric = (Operation.ROTATE, *range(Operation.SHEAR_X, Operation.TRANSLATE_Y + 1))

    def drawn(*arguments) -> Layers:
        layers = draw(*arguments)
        chosen = np.isin(layers.operations, geometric)
        return replace(layers, operations=np.where(chosen, layers.operations, Operation.NONE))

    monkeypatch.setattr(feed_module, "draw_layers", drawn)


def coordinate_map(rows: int, cols: int) -> LabelMap:
    """A label map whose logits of two of three classes are the cells' x and y, the third's 0."""
    logits = np.zeros((3, rows, cols))
    logits[0] = (np.arange(cols) + 0.5) / cols
    logits[1] = (np.arange(rows)[:, None] + 0.5) / rows
    order = np.argsort(-logits, axis=0, kind="stable")
    return LabelMap(
        scores=np.take_along_axis(logits, order, 0).astype(np.float16),
        classes=order.astype(np.uint32),
        num_classes=NUM_CLASSES,
        log_normalizer=np.log(np.exp(logits).sum(0) + NUM_CLASSES - 3).astype(np.float16),
    )


def test_rand_augment_moves_pixels_view_and_labels_together(tmp_path, train_feed, monkeypatch):
    geometric_only(monkeypatch)
    height, width = image_hw = (30, 40)
    label = encode(coordinate_map(30, 40))
    image = jpeg(painted(*image_hw), quality=100)
    samples = [{f"{i}.jpg": image, f"{i}.cls": b"0", f"{i}.tlm": label} for i in range(6)]
    index = write_split(tmp_path, samples)
    augment = replace(PLAIN, auto_augment="rand-m9-mstd0.5-p1", hflip=0.5, scale=(0.5, 1.0))
    grid, patch_px = (4, 6), 12
    image_size = (grid[0] * patch_px, grid[1] * patch_px)
    feed = train_feed(index, image_size=image_size, batch_size=60, augment=augment)
    batch = next(feed)
    assert int((batch.views[:, 0, 1] != 0).sum()) >= 10  # sheared or turned

    # Pixels: those that neither the fill, black here, nor the end of the crop's filter comes near.
    hidden = torch.nn.functional.pad((batch.images[:, 2:] < 0.45).float(), (4, 4, 4, 4), value=1)
    inner = 1 - torch.nn.functional.max_pool2d(hidden, 9, stride=1)
    v, u = ((torch.arange(side) + 0.5) / side for side in image_size)
    points = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).reshape(-1, 2)
    expected = apply_view(batch.views, points)
    found = batch.images[:, :2].flatten(2).transpose(1, 2)
    error_px = (
        (found - expected).abs() * torch.tensor([width, height]) * inner.flatten(1, 3)[..., None]
    )
    assert float(inner.mean()) > 0.3
    assert float(error_px.max()) < 0.5  # 0.15 is one of 255 values, and each layer cuts one off

    # Labels: where the map says a token is, against where its pixels say they are from.
    assert batch.maps is not None
    targets = sample_targets(batch.maps, batch.views, grid)
    logits = targets.tokens[..., :2].log() - targets.tokens[..., 2:3].log()
    tokens = torch.nn.functional.avg_pool2d(batch.images[:, :2], patch_px)
    whole = torch.nn.functional.avg_pool2d(inner, patch_px).flatten(1) > 0.99
    seen = sample_targets(batch.maps, batch.views, grid, frames=batch.frames).token_weight == 1
    fill = torch.nn.functional.avg_pool2d((batch.images[:, 2:] < 0.2).float(), patch_px).flatten(1)
    assert torch.equal(seen & (fill > 0.9), torch.zeros_like(seen))
    assert bool(((targets.token_weight == 1) & (fill > 0.9)).any())  # they lie in the image
    assert bool(seen[whole & (targets.token_weight == 1)].all())
    taught = whole & seen
    assert taught.float().mean() > 0.15
    distance = (logits - tokens.flatten(2).transpose(1, 2))[taught].abs()
    sides = batch.views[:, :, :2].abs().sum(2)  # of the crop's box in the image
    token = (sides / torch.tensor([grid[1], grid[0]]))[:, None].expand(*taught.shape, 2)[taught]
    assert float((distance / token).max()) < 0.5
    assert float((distance / token).mean()) < 0.05


def with_light(place: tuple[float, float], rows: int, cols: int) -> np.ndarray:
    """A black image with a small light whose centre is (x, y) in image fractions."""
    y, x = np.mgrid[:rows, :cols] + 0.5
    squares = (x - place[0] * cols) ** 2 + (y - place[1] * rows) ** 2
    light = np.rint(255 * np.exp(-squares / (2 * 3.0**2))).astype(np.uint8)
    return np.repeat(light[..., None], 3, 2)


def test_a_light_is_where_crop_flip_resize_and_all_layers_have_moved_it(
    tmp_path, train_feed, monkeypatch
):
    geometric_only(monkeypatch)
    rows, cols = 110, 140
    places = {f"{i}": (0.35 + 0.06 * i, 0.6 - 0.04 * i) for i in range(6)}
    lights = {key: with_light(place, rows, cols) for key, place in places.items()}
    samples = [
        {f"{key}.jpg": jpeg(light, quality=100), f"{key}.cls": b"0"}
        for key, light in lights.items()
    ]
    augment = replace(
        PLAIN,
        auto_augment="rand-n3-m5-mstd2-p1",
        hflip=0.5,
        scale=(0.5, 1.0),
        interpolation="random",
    )
    feed = train_feed(
        write_split(tmp_path, samples),
        image_size=(100, 90),
        batch_size=90,
        augment=augment,
        with_labels=False,
    )
    batch = next(feed)
    layers = feed._choose._draw(0).layers
    assert layers is not None
    seen: set[int] = set()
    num_seen, worst_px = 0, 0.0
    for i, key in enumerate(batch.keys):
        found = batch.images[i, 0].double()
        found = torch.where(found > 4 / 255, found, 0)  # not what JPEG adds
        # The crop shows all of the light, unless some has been moved out; layers cut off fractions.
        share = float(batch.views[i, :, :2].det().abs()) * rows * cols / (100 * 90)
        if float(found.sum()) * share < 0.94 * lights[key][..., 0].sum() / 255:
            continue
        v, u = ((torch.arange(side).double() + 0.5) / side for side in found.shape)
        centre = torch.stack([found.sum(0) @ u, found.sum(1) @ v]) / found.sum()
        in_image = apply_view(batch.views[i : i + 1].double(), centre[None])[0, 0]
        error_px = (in_image - torch.tensor(places[key])) * torch.tensor([cols, rows])
        worst_px = max(worst_px, float(error_px.abs().max()))
        seen |= set(layers.operations[:, i].tolist()) - {Operation.NONE}
        num_seen += 1
    assert worst_px < 0.5
    assert num_seen > 80
    assert len(seen) == 5  # all that move anything


def test_a_sample_is_augmented_alike_by_any_number_of_processes(data, train_feed):
    augment = AugmentConfig(auto_augment=RAND_AUGMENT, random_erasing=1.0)
    draws = {}
    for world_size in (1, 2, 4):
        options = {"world_size": world_size, "batch_size": 8 // world_size, "augment": augment}
        feeds = [train_feed(data, rank=rank, **options) for rank in range(world_size)]
        draws[world_size] = [[feed._choose._draw(num) for feed in feeds] for num in (0, 5)]
    for several in (2, 4):
        for (whole,), parts in zip(draws[1], draws[several]):
            for name in ("flips", "cubic", "erased", "noise_seeds"):
                found = np.concatenate([getattr(part, name) for part in parts])
                assert np.array_equal(found, getattr(whole, name))
            for name in ("operations", "amounts", "cubic"):
                found = np.concatenate([getattr(part.layers, name) for part in parts], 1)
                assert np.array_equal(found, getattr(whole.layers, name))


def test_torch_takes_one_core_in_the_feeds_thread_and_what_it_took_elsewhere(data, train_feed):
    torch.set_num_threads(2)
    feed = train_feed(data)
    next(feed)
    assert feed._worker.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


# ---------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("image_hw", [(120, 180), (128, 128), (180, 90)])
def test_crops_are_distributed_as_torchvisions(tmp_path, train_feed, image_hw):
    height, width = image_hw
    samples = [{"a.jpg": jpeg(painted(height, width)), "a.cls": b"0"}]
    index = write_split(tmp_path, samples)
    feed = train_feed(
        index, image_size=(8, 8), batch_size=500, augment=PLAIN, with_labels=False, num_threads=2
    )
    views = torch.cat([next(feed).views for _ in range(8)]).double()
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    boxes = torch.tensor(
        [
            RandomResizedCrop.get_params(image, [*PLAIN.scale], [*PLAIN.ratio])  # pyright: ignore[reportArgumentType]
            for _ in range(len(views))
        ]
    ).double()
    top, left, rows, cols = boxes.T
    theirs = torch.stack(
        [
            rows * cols / (height * width),
            (cols / rows).log(),
            (left + cols / 2) / width,
            (top + rows / 2) / height,
        ]
    )
    part_x, part_y = views[:, 0, 0], views[:, 1, 1]
    ours = torch.stack(
        [
            part_x * part_y,
            (part_x * width / (part_y * height)).log(),
            views[:, 0, 2] + part_x / 2,
            views[:, 1, 2] + part_y / 2,
        ]
    )
    for found, expected in zip(ours, theirs):
        error = float((found.var() / len(found) + expected.var() / len(expected)).sqrt())
        # Both round sides to whole pixels, each in its own way: 0.003 for that.
        assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=4 * error + 0.003)
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.06)
    # Large crops lie near the middle, in both alike: area against distance from it.
    for axis in (2, 3):
        correlations = [
            float(torch.corrcoef(torch.stack([crops[0], (crops[axis] - 0.5).abs()]))[0, 1])
            for crops in (ours, theirs)
        ]
        assert correlations[0] < -0.2
        assert correlations[0] == pytest.approx(correlations[1], abs=0.06)


# ------------------------------------------------------------------------ colour, erasing


def test_color_jitter_is_torchvisions_in_every_order():
    rng = np.random.default_rng(0)
    images = [noise(rng, 30, 40) for _ in range(24)]
    numbers = np.random.default_rng(1).random((len(images), COLOR_NUMBERS))
    layers = draw_colors(numbers, 0.4)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    apply_layers(pixels, layers, fill=(0, 0, 0))
    functions: dict[int, Any] = {
        Operation.BRIGHTNESS: vision.adjust_brightness,
        Operation.CONTRAST: vision.adjust_contrast,
        Operation.COLOR: vision.adjust_saturation,
    }
    for i, image in enumerate(images):
        expected: Any = Image.fromarray(image)
        for operation, factor in zip(layers.operations[:, i], layers.amounts[:, i]):
            expected = functions[operation](expected, float(factor))
        np.testing.assert_array_equal(pixels[i].permute(1, 2, 0).numpy(), np.asarray(expected))
    orders = {tuple(order) for order in layers.operations.T}
    assert len(orders) == 6
    assert 0.6 <= layers.amounts.min() < 0.7 and 1.3 < layers.amounts.max() <= 1.4


def test_random_erasing_draws_timms_rectangles():
    size, count = (48, 64), 4000
    numbers = np.random.default_rng(0).random((count, ERASING_NUMBERS))
    some = draw_erased(numbers, 0.25, size)
    assert np.count_nonzero(some[:, 2]) / count == pytest.approx(0.25, abs=0.03)

    boxes = draw_erased(numbers, 1.0, size)
    ours, theirs = torch.zeros(count, *size), torch.ones(count, 1, *size)
    for mask, (top, left, height, width) in zip(ours, boxes):
        mask[top : top + height, left : left + width] = 1
    random.seed(0)
    reference = RandomErasing(probability=1, mode="const", device="cpu")
    for mask in theirs:
        reference(mask)
    theirs = 1 - theirs[:, 0]
    for axis in (1, 2):  # widths, then heights
        found, expected = (masks.amax(axis).sum(1) for masks in (ours, theirs))
        assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.04)
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.04)
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=0.05)  # where they lie


def test_erased_pixels_are_normal_noise_and_all_others_stay(data, train_feed):
    images = {}
    for probability in (0.0, 1.0):
        augment = AugmentConfig(random_erasing=probability)
        feed = train_feed(data, augment=augment, image_size=(64, 64), batch_size=16)
        images[probability] = next(feed).images
    changed = images[1.0] != images[0.0]
    assert torch.equal(changed.any(1), changed.all(1))
    values = images[1.0][changed]
    assert 0.02 < float(changed.float().mean()) < 1 / 3
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------------ order and passes


def keys_of_pass(feed: TrainFeed, num_batches: int) -> list[str]:
    return [key for batch in islice(feed, num_batches) for key in batch.keys]


@pytest.mark.parametrize("shuffle_buffer", [1, 8, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_pass_has_each_sample_once_over_all_ranks(
    data, train_feed, world_size, shuffle_buffer
):
    num_passes, total = 4, data.splits["train"].num_samples
    passes: list[list[str]] = [[] for _ in range(num_passes)]
    for rank in range(world_size):
        feed = train_feed(
            data, rank=rank, world_size=world_size, shuffle_buffer=shuffle_buffer, augment=PLAIN
        )
        share = total * (rank + 1) // world_size - total * rank // world_size
        keys = keys_of_pass(feed, -(-share * num_passes // 4))
        for i in range(num_passes):
            passes[i] += keys[i * share : (i + 1) * share]
    for keys in passes:
        assert sorted(keys) == [f"folder/sample{i:02d}" for i in range(total)]
    assert len({tuple(keys) for keys in passes}) == num_passes


def test_a_batch_larger_than_the_split_repeats_samples(tmp_path, train_feed):
    index = write_split(tmp_path, make_samples(["a", "b", "c"]))
    batch = next(train_feed(index, batch_size=9))
    assert Counter(batch.keys) == {"a": 3, "b": 3, "c": 3}


def test_the_seed_decides_everything(data, train_feed):
    first, again, other = (train_feed(data, seed=seed) for seed in (3, 3, 4))
    for _ in range(3):
        assert_same(next(first), next(again))
    assert next(first).keys != next(other).keys


def test_ranks_augment_differently(tmp_path, train_feed):
    sample = make_samples(["a"])[0]
    twin = {name.replace("a.", "b."): data for name, data in sample.items()}
    index = write_split(tmp_path, [sample, twin])
    feeds = [train_feed(index, rank=rank, world_size=2, batch_size=8) for rank in (0, 1)]
    views = [next(feed).views for feed in feeds]
    assert not torch.isclose(views[0], views[1]).flatten(1).all(1).any()


# ------------------------------------------------------------------- repeated augmentation


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_comes_repeats_times_in_a_batch_and_in_a_pass(data, train_feed, world_size):
    num_passes, total, repeats = 2, data.splits["train"].num_samples, 3
    augment = replace(AugmentConfig(auto_augment=RAND_AUGMENT), repeats=repeats)
    passes: list[Counter[str]] = [Counter() for _ in range(num_passes)]
    for rank in range(world_size):
        feed = train_feed(
            data, rank=rank, world_size=world_size, batch_size=2 * repeats, augment=augment
        )
        share = total * (rank + 1) // world_size - total * rank // world_size
        read = []
        for batch in islice(feed, -(-share * num_passes // 2)):
            assert batch.keys == batch.keys[:2] * repeats
            read += batch.keys[:2]
            for i in range(2):
                views = {tuple(view.flatten().tolist()) for view in batch.views[i::2]}
                assert len(views) == repeats
                assert len(set(batch.classes[i::2].tolist())) == 1
                assert int(batch.classes[i]) == int(batch.keys[i][-2:])
        for i in range(num_passes):
            for key in read[i * share : (i + 1) * share]:
                passes[i][key] += repeats
    for counts in passes:
        assert counts == {f"folder/sample{i:02d}": repeats for i in range(total)}


def test_repeated_crops_have_the_views_of_their_pixels_and_the_labels_of_their_image(
    tmp_path, train_feed
):
    image_hw = (32, 40)
    samples = make_samples(["0", "1", "2"])
    for i, sample in enumerate(samples):
        sample[f"{i}.jpg"] = jpeg(painted(*image_hw), quality=100)
    augment = replace(PLAIN, hflip=0.5, repeats=4)
    batch = next(train_feed(write_split(tmp_path, samples), batch_size=12, augment=augment))
    assert misplacement_px(batch, image_hw) < 0.5
    flipped = (batch.views[:, 0, 0] < 0).unflatten(0, (4, 3))
    assert bool((flipped.any(0) & ~flipped.all(0)).any())
    assert batch.maps is not None
    for i, key in enumerate(batch.keys):
        (label_map,) = decode(samples[int(key)][f"{key}.tlm"])
        assert torch.equal(batch.maps.scores[i, 0], torch.from_numpy(label_map.scores))
        assert int(batch.classes[i]) == int(key)


def test_repeats_that_do_not_divide_the_batch_leave_one_crop_out_for_the_last_images(
    data, train_feed
):
    augment = replace(PLAIN, repeats=3)
    batch = next(train_feed(data, batch_size=7, augment=augment))
    assert len(batch.keys) == len(batch.images) == len(batch.views) == len(batch.classes) == 7
    assert batch.maps is not None and len(batch.maps.palette) == 7
    counts = Counter(batch.keys)
    assert [counts[key] for key in batch.keys[:3]] == [3, 2, 2]


def test_impossible_and_changed_repeats_are_refused(data, train_feed):
    with pytest.raises(ValueError, match="augment.repeats = 5: a process has only 4 images in"):
        train_feed(data, augment=replace(PLAIN, repeats=5))
    with pytest.raises(ValueError, match="augment.repeats = 0; allowed: >= 1"):
        replace(PLAIN, repeats=0)
    state = train_feed(data, augment=PLAIN).state()
    with pytest.raises(ValueError, match="saved with repeats = 1, now it is 2"):
        train_feed(data, augment=replace(PLAIN, repeats=2), state=state)


# --------------------------------------------------------------------- classes, maps, keys


def test_classes_maps_and_keys_belong_together(tmp_path, train_feed):
    keys = ["n01/plain", "naïve/日本", "a%20b/c%2Ed:e", "x.tar:12:y/z"]
    samples = make_samples(keys)
    index = write_split(tmp_path, samples, shard_size=2)
    batch = next(train_feed(index, batch_size=8))
    assert set(batch.keys) == set(keys)
    maps = batch.maps
    assert maps is not None
    for i, key in enumerate(batch.keys):
        number = keys.index(key)
        assert int(batch.classes[i]) == number
        (label_map,) = decode(samples[number][f"{key}.tlm"])
        found = maps.palette[i][maps.indices[i, 0].long()]
        assert torch.equal(found, torch.from_numpy(label_map.classes.astype(np.int64)))
        assert torch.equal(maps.scores[i, 0], torch.from_numpy(label_map.scores))


def test_without_labels_maps_are_not_read(data, train_feed):
    assert next(train_feed(data, with_labels=False)).maps is None


# --------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_feed_gives_the_same_bits(data, train_feed, world_size):
    # A pass is 5.75 batches on one rank, 6 on the second of two: 5 → 6 straddles its end.
    augment = AugmentConfig()
    if world_size == 2:
        augment = AugmentConfig(auto_augment=RAND_AUGMENT, repeats=2)
    options = {"rank": world_size - 1, "world_size": world_size, "seed": 5, "augment": augment}
    feed = train_feed(data, **options)
    states, batches = [feed.state()], []
    for _ in range(14):
        batches.append(next(feed))
        states.append(feed.state())
    for start in (0, 1, 2, 3, 5, 6, 11):
        file = io.BytesIO()
        torch.save(states[start], file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        resumed = train_feed(data, **options, num_threads=2, state=state)
        assert resumed.state() == states[start]
        for expected in batches[start : start + 3]:
            assert_same(next(resumed), expected)
        assert resumed.state() == states[start + 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "saved with batch_size = 4, now it is 5; resume with the same"),
        ({"world_size": 2}, "saved with world_size = 1, now it is 2"),
        ({"seed": 1}, "saved with seed = 0, now it is 1"),
    ],
)
def test_a_state_of_another_feed_is_refused(data, train_feed, change, message):
    state = train_feed(data).state()
    with pytest.raises(ValueError, match=message):
        train_feed(data, state=state, **change)


def test_closing_frees_the_pipeline_and_its_threads(data, train_feed):
    gc.collect()
    before = threading.active_count()
    feed = train_feed(data)
    next(feed)
    pipeline = weakref.ref(feed._pipeline)
    feed.close()
    assert pipeline() is None
    assert threading.active_count() == before


# --------------------------------------------------------------------------------- errors


def test_missing_labels_and_too_many_processes_are_refused(tmp_path, data, train_feed):
    plain = [{"a.jpg": jpeg(painted(8, 8)), "a.cls": b"0"}]
    index = write_split(tmp_path, plain)
    with pytest.raises(ValueError, match="split 'train' of .* has no label maps; pack it with"):
        train_feed(index)
    with pytest.raises(ValueError, match="has 1 samples, too few for 2 processes"):
        train_feed(index, world_size=2, with_labels=False)
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        train_feed(data, split="test")
    with pytest.raises(ValueError, match="batch_size = 0; allowed: >= 1"):
        train_feed(data, batch_size=0)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("b.tlm", b"no map", r"label map b\.tlm in train-000000\.tar cannot be used: "),
        ("b.cls", b"40", r"b\.cls in train-000000\.tar holds b'40', expected a class index below"),
        ("b.cls", b"", r"b\.cls in train-000000\.tar holds b''"),
        ("b.jpg", b"half", r"cannot decode an image of .*train-000000\.tar:\d+:b\.jpg; `tl-shard"),
        ("b.jpg", b"no JPEG", r"cannot decode an image of split 'train' of .*; `tl-shard verify"),
    ],
)
def test_bad_data_is_named(tmp_path, train_feed, member, content, message):
    samples = make_samples(["a", "b", "c"])
    whole = samples[1][member]
    samples[1][member] = whole[: len(whole) // 2] if content == b"half" else content
    feed = train_feed(write_split(tmp_path, samples))
    for _ in range(2):  # asking again after a failure fails again
        with pytest.raises(ValueError, match=message):
            next(feed)


def test_a_missing_member_or_a_foreign_idx_is_refused(tmp_path, train_feed):
    samples = make_samples(["a", "b", "c"])
    index = write_split(tmp_path, samples)
    idx = tmp_path / "train-000000.idx"
    text = idx.read_text()
    idx.write_text(text.replace("v1.2 3", "v1.2 2"))
    with pytest.raises(ValueError, match="list 2 samples, index.json 3; run `tl-shard verify"):
        train_feed(index)
    idx.write_text(text.replace(" b.tlm", " b.xyz").replace("tlm", "xyz", 2))
    with pytest.raises(ValueError, match="DALI cannot open split 'train' of .*Underful"):
        train_feed(index)


# ----------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The 20 photos that come with foolbox, packed; some of them cut to other shapes."""
    foolbox = pytest.importorskip("foolbox")
    root = tmp_path_factory.mktemp("photos")
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    for i, file in enumerate(files):
        folder = root / "images" / file.stem.split("_")[2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
        if i in (3, 10):
            image = Image.open(file)
            image.crop((0, 0, 333, 501)).save(folder / "tall.png")
            image.crop((0, 9, 401, 210)).save(folder / "wide.png")
    pack(open_source(root / "images"), root / "shards", split="val", num_workers=1)
    return read_index(root / "shards")


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "interpolation", "crop_mode"),
    [
        ((224, 224), 0.9, "bicubic", "center"),
        ((96, 96), 0.875, "bilinear", "center"),
        ((128, 128), 1.0, "bicubic", "center"),
        ((96, 128), 0.9, "bicubic", "center"),
        ((112, 112), 0.956, "bicubic", "squash"),
    ],
)
def test_the_evaluation_view_is_timms(photos, image_size, crop_pct, interpolation, crop_mode):
    square = image_size[0] == image_size[1]
    transform: Any = create_transform(
        image_size[0] if square else image_size,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    members = {}
    for path in photos.shard_paths("val"):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    feed = eval_feed(
        photos,
        "val",
        image_size=image_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode=crop_mode,
    )
    num_images = 0
    for batch in feed:
        for key, image in zip(batch.keys, batch.images):
            photo = Image.open(io.BytesIO(members[f"{key}.jpg"])).convert("RGB")
            difference = (image - transform(photo)) * torch.tensor(IMAGENET_STD)[:, None, None]
            assert 255 * float(difference.abs().mean()) < 0.3  # 0.15 is usual, 0.5 allowed
            num_images += 1
    assert num_images == 24


@pytest.mark.parametrize("image_hw", [(24, 40), (36, 20)])
@pytest.mark.parametrize("image_size", [(16, 16), (16, 20)])
def test_evaluation_pixels_come_from_where_the_view_says(tmp_path, image_hw, image_size):
    image = jpeg(painted(*image_hw), quality=100)
    index = write_split(tmp_path, [{"a.jpg": image, "a.cls": b"0"}])
    (batch,) = eval_feed(index, image_size=image_size, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert misplacement_px(batch, image_hw) < 0.5


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 30])
def test_evaluation_sees_each_sample_once_over_all_ranks(data, world_size):
    keys, sizes = [], []
    for rank in range(world_size):
        feed = eval_feed(data, rank=rank, world_size=world_size)
        batches = list(feed)
        assert len(batches) == len(feed)
        assert all(len(batch.keys) == len(batch.images) <= 4 for batch in batches)
        keys += [key for batch in batches for key in batch.keys]
        sizes += [sum(len(batch.keys) for batch in batches)]
    assert sorted(keys) == [f"folder/sample{i:02d}" for i in range(23)]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_can_be_repeated_and_has_classes(data):
    feed = eval_feed(data)
    first, second = list(feed), list(feed)
    for batch, again in zip(first, second, strict=True):
        assert torch.equal(batch.images, again.images)
        assert batch.classes.tolist() == [int(key[-2:]) for key in batch.keys]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_pct": 1.2}, "crop_pct = 1.2; allowed: 0 < crop_pct <= 1"),
        ({"interpolation": "nearest"}, "interpolation = 'nearest'; allowed: bilinear, bicubic"),
        ({"crop_mode": "border"}, "crop_mode = 'border'; allowed: center, squash"),
        ({"num_threads": 0}, "num_threads = 0; allowed: >= 1"),
    ],
)
def test_impossible_evaluation_views_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        eval_feed(data, **options)


@pytest.mark.gpu
def test_the_gpu_feed_gives_the_cpus_batches(data, train_feed):
    cpu, gpu = (train_feed(data, device=device) for device in ("cpu", "cuda"))
    for _ in range(3):
        ours, theirs = next(cpu), next(gpu)
        assert theirs.images.is_cuda and theirs.maps is not None and theirs.maps.scores.is_cuda
        assert ours.keys == theirs.keys
        assert torch.equal(ours.views, theirs.views.cpu())
        difference = (ours.images - theirs.images.cpu()).abs().flatten(1).median(1).values
        assert float(difference.max()) < 0.05  # medians: random erasing has its own noise
