"""RandAugment: timm's draws, timm's pixels, and views that say where pixels came from."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_augment

from tokenlabel.labeler.geometry import apply_view, compose
from tokenlabel.trainer.augment_draws import (
    LAYER_NUMBERS,
    Layers,
    Operation,
    Policy,
    draw_layers,
    layer_views,
    parse_policy,
    uniforms,
)
from tokenlabel.trainer.rand_augment import apply_layers
from tokenlabel.trainer.recipe import AugmentConfig

S_POLICY, L_POLICY = "rand-m9-mstd0.5-inc1", "rand-n3-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
KEY = np.array([1, 2], np.uint64)
GEOMETRIC = [
    Operation.ROTATE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
]
WHOLE_ARGUMENTS = (Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD)
WITHOUT_ARGUMENT = (Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.INVERT)
OPERATIONS = [operation for operation in Operation if operation != Operation.NONE]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Photos of 96 × 96 and 70 × 96 pixels, and one without any contrast."""
    foolbox = pytest.importorskip("foolbox")
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))[:3]
    images = [Image.open(file).convert("RGB").resize((96, 96)) for file in files]
    images[1] = images[1].crop((0, 20, 96, 90))
    return [*(np.asarray(image) for image in images), np.full((96, 96, 3), 77, np.uint8)]


def layers_of(steps: Sequence[tuple[Operation, float, bool]]) -> Layers:
    """The layers of one sample."""
    operations, amounts, cubic = zip(*steps)
    return Layers(
        operations=np.array(operations, np.int64)[:, None],
        amounts=np.array(amounts, np.float64)[:, None],
        cubic=np.array(cubic)[:, None],
    )


def ours(image: np.ndarray, steps: Sequence[tuple[Operation, float, bool]], fill=FILL):
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous()
    apply_layers(pixels, layers_of(steps), fill=fill)
    return pixels[0].permute(1, 2, 0).numpy()


def timms(image: Image.Image, operation: Operation, amount: float, cubic: bool) -> Image.Image:
    """What timm's function makes of an image, whatever has drawn its argument."""
    name = timm_augment._RAND_INCREASING_TRANSFORMS[operation]
    arguments = [int(amount) if operation in WHOLE_ARGUMENTS else amount]
    return timm_augment.NAME_TO_OP[name](
        image,
        *([] if operation in WITHOUT_ARGUMENT else arguments),
        fillcolor=FILL,
        resample=Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR,
    )


def draws(text: str, count: int, interpolation: Any = "random") -> Layers:
    policy = parse_policy(text)
    numbers = uniforms(KEY, 0, range(count), policy.num_layers * LAYER_NUMBERS)
    return draw_layers(numbers, policy, interpolation)


# ----------------------------------------------------------------------- timm's notation


@pytest.mark.parametrize(
    "text",
    [
        *("rand", S_POLICY, L_POLICY, "rand-inc0-p0.25-m7", "rand-m12-mmax20-mstd1-n1"),
        *("rand-mstd101-m5", "rand-p1-m10-inc1", "rand-mstd100-p0"),
    ],
)
def test_the_notation_means_what_it_means_in_timm(text):
    theirs = timm_augment.rand_augment_transform(text)
    some = theirs.ops[0]
    assert parse_policy(text) == Policy(
        magnitude=int(some.magnitude),
        magnitude_std=float(some.magnitude_std),
        magnitude_max=some.magnitude_max or 10,
        num_layers=theirs.num_layers,
        probability=some.prob,
        increasing=any(op.name == "PosterizeIncreasing" for op in theirs.ops),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not known; allowed: 'none', or 'rand' followed by any of -mM"),
        ("original-mstd0.5", "'original-mstd0.5' is not known; allowed"),
        ("rand-m9-tweights", "'rand-m9-tweights', where 'tweights' is not supported; allowed"),
        ("rand-m9-w0", "where 'w0' is not supported"),
        ("rand-m9.5", "where 'm9.5' is not supported"),
        ("rand-n0", "where 'n0' is not supported"),
        ("rand-p1.5", "where 'p1.5' is not supported"),
        ("rand--m9", "where '' is not supported"),
        ("rand-m9-m8", "where 'm' stands twice"),
    ],
)
def test_any_other_notation_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^augment.auto_augment = .*{message}"):
        AugmentConfig(auto_augment=text)


def test_color_jitter_is_off_beside_rand_augment_and_else_0_4():
    assert AugmentConfig().jitter == 0.4
    assert AugmentConfig(auto_augment=S_POLICY).jitter == 0
    assert AugmentConfig(color_jitter=0.2).jitter == 0.2
    message = "augment.color_jitter = 0.4; allowed: 0 beside augment.auto_augment, or left out"
    with pytest.raises(ValueError, match=message):
        AugmentConfig(auto_augment=S_POLICY, color_jitter=0.4)


# ------------------------------------------------------------------------------- draws


def recorded_draws(text: str, count: int) -> dict[Operation, list[tuple[float, bool]]]:
    """What timm draws and applies: each operation's arguments, and whether bicubically."""
    drawn: dict[Operation, list[tuple[float, bool]]] = {operation: [] for operation in OPERATIONS}
    transform = timm_augment.rand_augment_transform(text)

    def recorder(operation):
        def record(image, *arguments, resample, **_):
            chosen = timm_augment._interpolation({"resample": resample})
            amount = float(arguments[0]) if arguments else 0.0
            drawn[operation].append((amount, chosen == Image.Resampling.BICUBIC))
            return image

        return record

    for operation, op in zip(OPERATIONS, transform.ops):
        op.aug_fn = recorder(operation)
    for _ in range(count):
        transform(None)
    return drawn


@pytest.mark.parametrize("text", [S_POLICY, L_POLICY, "rand-m7-mstd101-n1-p0.8"])
def test_draws_are_distributed_as_timms(text):
    np.random.seed(0)  # noqa: NPY002 - timm draws from both
    random.seed(0)
    count = 10_000
    theirs, layers = recorded_draws(text, count), draws(text, count)
    share = parse_policy(text).probability / len(OPERATIONS)
    total = layers.operations.size
    # 4.5 standard deviations: one of the 15 × 3 counts goes beyond in 1 of 3,000 runs.
    tolerance = 4.5 * math.sqrt(total * share * (1 - share))
    for operation in OPERATIONS:
        chosen = layers.operations == operation
        assert abs(np.count_nonzero(chosen) - total * share) < tolerance
        amounts, cubic = layers.amounts[chosen], layers.cubic[chosen]
        others = np.array([amount for amount, _ in theirs[operation]])
        # Kolmogorov and Smirnov's distance, at a level of 1e-5 (less where there are ties).
        bound = 2.47 * math.sqrt(1 / len(amounts) + 1 / len(others))
        places = np.union1d(amounts, others)
        ranks = (np.searchsorted(np.sort(a), places, "right") / len(a) for a in (amounts, others))
        assert np.abs(np.subtract(*ranks)).max() < bound, operation.name
        their_cubic = np.mean([is_cubic for _, is_cubic in theirs[operation]])
        assert abs(cubic.mean() - their_cubic) < 4.5 * math.sqrt(0.5 / min(len(cubic), len(others)))


@pytest.mark.parametrize("increasing", [True, False])
def test_each_magnitude_means_what_it_means_in_timm(increasing, monkeypatch):
    names = (
        timm_augment._RAND_INCREASING_TRANSFORMS if increasing else timm_augment._RAND_TRANSFORMS
    )
    for ours, theirs in ((0.1, 0.9), (0.9, 0.1)):  # below a half we negate, above it timm does
        monkeypatch.setattr(random, "random", lambda drawn=theirs: drawn)
        for magnitude in range(11):
            policy = Policy(
                magnitude=magnitude, num_layers=1, probability=1.0, increasing=increasing
            )
            for operation in OPERATIONS:
                numbers = np.array([[(operation + 0.5) / 15, 0.0, 0.0, 0.0, ours, 0.0]])
                layers = draw_layers(numbers, policy, "bicubic")
                assert layers.operations.item() == operation
                to_arguments = timm_augment.LEVEL_TO_ARG[names[operation]]
                arguments = to_arguments(magnitude, {}) if to_arguments else ()
                expected = float(arguments[0]) if arguments else 0.0
                assert layers.amounts.item() == pytest.approx(expected), (operation, magnitude)


def test_layers_and_samples_are_drawn_independently():
    layers = draws(S_POLICY, 20_000)
    first, second = layers.operations
    both = np.count_nonzero((first != Operation.NONE) & (second != Operation.NONE))
    assert both / 20_000 == pytest.approx(0.25, abs=0.014)  # 4.5 standard deviations
    pairs = Counter(zip(first[first >= 0].tolist(), second[first >= 0].tolist()))
    pairs = [count for (_, other), count in pairs.items() if other >= 0]
    expected = 20_000 * 0.25 / 225
    assert len(pairs) == 225
    statistic = sum((count - expected) ** 2 / expected for count in pairs)
    assert statistic < 224 + 4.5 * math.sqrt(2 * 224)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_geometric_operations_interpolate_as_the_crop_does(interpolation):
    assert np.all(draws(S_POLICY, 50, interpolation).cubic == (interpolation == "bicubic"))


def test_a_samples_numbers_depend_on_seed_batch_and_place_alone():
    whole = uniforms(KEY, 7, range(12), 33)
    parts = [uniforms(KEY, 7, range(start, start + 4), 33) for start in (0, 4, 8)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == whole.size
    for key, batch in ((KEY, 8), (KEY + np.uint64(1), 7)):
        assert not np.isin(uniforms(key, batch, range(12), 33), whole).any()


# ------------------------------------------------------------------------------- pixels

AMOUNTS = {
    Operation.ROTATE: (-30.0, -11.0, 0.0, 27.3),
    Operation.POSTERIZE: (1, 2, 3, 4, 8),
    Operation.SOLARIZE: (0, 26, 128, 256),
    Operation.SOLARIZE_ADD: (0, 20, 99, 128),
    Operation.COLOR: (0.1, 0.6, 1.0, 1.81),
    Operation.CONTRAST: (0.1, 0.6, 1.0, 1.81),
    Operation.BRIGHTNESS: (0.1, 0.6, 1.0, 1.81),
    Operation.SHARPNESS: (0.1, 0.6, 1.0, 1.81),
    Operation.SHEAR_X: (-0.3, 0.0, 0.27),
    Operation.SHEAR_Y: (-0.3, 0.0, 0.27),
    Operation.TRANSLATE_X: (-0.45, 0.0, 0.2, 0.405),
    Operation.TRANSLATE_Y: (-0.45, 0.0, 0.2, 0.405),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_timms_pixels(photos, operation):
    for photo in photos:
        for amount in AMOUNTS.get(operation, (0.0,)):
            for cubic in (False, True) if operation in GEOMETRIC else (False,):
                expected = np.asarray(timms(Image.fromarray(photo), operation, amount, cubic))
                found = ours(photo, [(operation, amount, cubic)])
                difference = np.abs(found.astype(int) - expected.astype(int))
                if operation in GEOMETRIC:  # Pillow cuts off sums of doubles, we of floats
                    assert difference.max() <= 1
                    assert difference.mean() < 0.1
                else:
                    assert difference.max() == 0


def test_layers_are_applied_in_order(photos):
    layers = draws("rand-n3-m9-mstd0.5-inc1-p1", 40)
    differences = []
    for i in range(40):
        photo = photos[i % 3]
        steps = list(zip(layers.operations[:, i], layers.amounts[:, i], layers.cubic[:, i]))
        if any(step[:2] == (Operation.POSTERIZE, 0) for step in steps):
            continue  # Pillow refuses it
        steps = [(Operation(step[0]), float(step[1]), bool(step[2])) for step in steps]
        expected = Image.fromarray(photo)
        for step in steps:
            expected = timms(expected, *step)
        difference = np.abs(ours(photo, steps).astype(int) - np.asarray(expected).astype(int))
        differences.append(difference.mean())
        assert difference.mean() < 0.5  # a table makes more of a difference of 1
    assert len(differences) > 30 and np.mean(differences) < 0.03


def test_posterizing_to_no_bits_is_drawn_and_gives_black(photos):
    layers = draws(S_POLICY, 10_000)
    bits = layers.amounts[layers.operations == Operation.POSTERIZE]
    assert np.mean(bits == 0) == pytest.approx(0.0228, abs=0.02)  # a magnitude of 10: 2 deviations
    assert ours(photos[0], [(Operation.POSTERIZE, 0, False)]).max() == 0
    with pytest.raises(ValueError):  # noqa: PT011 - Pillow's own words
        ImageOps.posterize(Image.fromarray(photos[0]), 0)


def test_the_number_of_images_at_once_changes_nothing(photos):
    count = 48
    layers = draws("rand-n2-m9-mstd0.5-inc1-p1", count)
    batch = np.stack([photo[:70:2, ::2] for photo in photos] * (count // 4))
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
    results = []
    for at_once in (1, 5, count):
        results.append(pixels.clone())
        apply_layers(results[-1], layers, fill=FILL, at_once=at_once)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    untouched = (layers.operations == Operation.NONE).all(0)
    assert not untouched.any()
    assert not torch.equal(results[0], pixels)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_the_same_pixels_on_a_gpu(photos, operation):
    count = 4
    steps = [(operation, AMOUNTS.get(operation, (0.0,))[0], i % 2 == 1) for i in range(count)]
    each = [layers_of([step]) for step in steps]
    layers = Layers(
        **{
            name: np.concatenate([getattr(one, name) for one in each], 1)
            for name in ("operations", "amounts", "cubic")
        }
    )
    pixels = torch.from_numpy(np.stack([photos[0]] * count)).permute(0, 3, 1, 2).contiguous()
    on_gpu = pixels.cuda()
    apply_layers(pixels, layers, fill=FILL)
    apply_layers(on_gpu, layers, fill=FILL)
    difference = (pixels.int() - on_gpu.cpu().int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.1


# ------------------------------------------------------------------------------- views


def geometric_steps(rng: np.random.Generator, count: int) -> list[tuple[Operation, float, bool]]:
    limits = dict(zip(GEOMETRIC, (30, 0.3, 0.3, 0.2, 0.2)))
    chosen = [GEOMETRIC[i] for i in rng.integers(0, len(GEOMETRIC), count)]
    return [(op, limits[op] * rng.uniform(-1, 1), bool(rng.integers(2))) for op in chosen]


def composed_view(steps: list[tuple[Operation, float, bool]], image_hw: tuple[int, int]):
    view = torch.eye(2, 3, dtype=torch.float64)[None]
    for layer in layer_views(layers_of(steps), image_hw):
        view = compose(view, torch.from_numpy(layer))
    return view


def centre_of(image: np.ndarray) -> np.ndarray:
    """Where the light is, as (x, y) in fractions."""
    light = image[..., 0].astype(float)
    rows, cols = light.shape
    v, u = (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols
    return np.array([light.sum(0) @ u, light.sum(1) @ v]) / light.sum()


@pytest.mark.parametrize("image_hw", [(96, 96), (70, 110)])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_marker_moves_to_where_the_view_says(image_hw, num_layers):
    rng = np.random.default_rng(num_layers)
    rows, cols = image_hw
    seen = Counter()
    for _ in range(40):
        steps = geometric_steps(rng, num_layers)
        place = rng.uniform(0.3, 0.7, 2)
        y, x = np.mgrid[:rows, :cols] + 0.5
        distance = (x - place[0] * cols) ** 2 + (y - place[1] * rows) ** 2
        light = 255 * np.exp(-distance / (2 * 2.5**2))
        image = np.repeat(np.rint(light).astype(np.uint8)[..., None], 3, 2)
        moved = ours(image, steps, fill=(0, 0, 0))
        edge = np.concatenate([moved[:2].ravel(), moved[-2:].ravel(), moved[:, :2].ravel()])
        if moved.max() < 200 or edge.max() or moved[:, -2:].max():
            continue  # it has left the image, or touches its edge
        view = composed_view(steps, image_hw)
        found = apply_view(view, torch.from_numpy(centre_of(moved))[None])[0, 0].numpy()
        assert np.abs((found - centre_of(image)) * [cols, rows]).max() < 0.5
        seen.update(operation for operation, _, _ in steps)
    assert set(seen) == set(GEOMETRIC)


def test_views_of_other_operations_and_of_none_are_the_identity():
    layers = draws("rand-n3-m9-mstd0.5-inc1", 200)
    views = layer_views(layers, (64, 48))
    moves = np.isin(layers.operations, GEOMETRIC)
    assert np.array_equal(views[~moves], np.broadcast_to(np.eye(2, 3), views[~moves].shape))
    assert not (views[moves] == np.eye(2, 3)).all((1, 2)).any()
