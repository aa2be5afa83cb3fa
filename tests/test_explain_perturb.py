"""Taking pixels away: against a slow loop, and on a model that is known to look at one corner."""

import math

import numpy as np
import pytest
import torch
from test_explain_attention import pictures, small_lvvit
from torch import Tensor

from tokenlabel.explainer.methods import explain, upsample
from tokenlabel.explainer.perturb import (
    CURVES,
    Perturber,
    Protocol,
    area_under,
    blurred,
    replaced,
)

SIDE, CORNER = 20, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def corner_model(images: Tensor) -> Tensor:
    """Give class 1 the probability that the corner's brightness is, from 0 (black) to 1."""
    std, mean = (torch.tensor(values, dtype=images.dtype)[:, None, None] for values in (STD, MEAN))
    bright = (images * std + mean)[:, :, :CORNER, :CORNER].mean((1, 2, 3)).clamp(1e-6, 1 - 1e-6)
    return torch.stack([torch.log(1 - bright), torch.log(bright)], 1)


def white() -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    return ((1 - mean) / std)[:, None, None].expand(3, SIDE, SIDE)


def corner_heat() -> Tensor:
    heat = torch.zeros(SIDE, SIDE)
    heat[:CORNER, :CORNER] = 1
    return heat


def perturber(image: Tensor, protocol: Protocol, batch_size: int = 32) -> Perturber:
    return Perturber(corner_model, image, protocol, mean=MEAN, std=STD, batch_size=batch_size)


def areas(heat: Tensor, protocol: Protocol) -> dict[str, float]:
    curves = perturber(white(), protocol).curves(heat, 1)
    right = {name: (points.answers == 1).double().numpy() for name, points in curves.items()}
    values = {
        name: right[name] if name in ("positive", "negative") else points.probability.numpy()
        for name, points in curves.items()
    }
    return {
        name: float(area_under(protocol.fractions(name), values[name][None])[0]) for name in curves
    }


def slow_curve(name: str, image: Tensor, heat: Tensor, protocol: Protocol) -> list[float]:
    """Change pixel after pixel, and ask about one image at a time."""
    places = [(heat[y, x].item(), y, x) for y in range(SIDE) for x in range(SIDE)]
    hottest_first = sorted(places, key=lambda place: -place[0])
    order = sorted(places, key=lambda place: place[0]) if name == "negative" else hottest_first
    black = [-m / s for m, s in zip(MEAN, STD)]
    start, end = image, torch.zeros_like(image)  # deletion to the mean
    if name in ("positive", "negative"):
        end = torch.tensor(black, dtype=image.dtype)[:, None, None].expand_as(image)
    if name == "insertion":
        start, end = blurred(image), image
    found = []
    for fraction in protocol.fractions(name):  # pyright: ignore[reportArgumentType]
        changed = start.clone()
        for _, y, x in order[: math.floor(fraction * SIDE * SIDE + 1e-9)]:
            changed[:, y, x] = end[:, y, x]
        found.append(corner_model(changed[None]).softmax(-1)[0, 1].item())
    return found


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_what_a_loop_over_pixels_gives(name):
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(3, SIDE, SIDE, generator=rng, dtype=torch.float64)
    heat = torch.rand(SIDE, SIDE, generator=rng)
    protocol = Protocol(num_steps=7)
    points = perturber(image, protocol).curves(heat, 1)[name]
    expected = torch.tensor(slow_curve(name, image, heat, protocol), dtype=torch.float64)
    torch.testing.assert_close(points.probability, expected)
    assert points.answers.tolist() == [int(p > 0.5) for p in expected]
    assert len(set(expected.tolist())) > 5  # the corner was touched at many steps


def test_areas_of_known_curves():
    falling, flat = np.linspace(1, 0, 11)[None], np.ones((1, 11))
    tenths = [i / 10 for i in range(11)]
    assert area_under(tenths, falling) == pytest.approx([50])
    assert area_under(tenths, flat) == pytest.approx([100])
    assert area_under(tenths[:10], flat[:, :10]) == pytest.approx([90])  # the published ceiling
    # An accuracy that falls to nothing at the first step is one half of a trapeze.
    assert area_under(tenths[:10], np.eye(10)[:1]) == pytest.approx([5])


def test_published_fractions_are_tenths_up_to_nine():
    assert Protocol().fractions("positive") == [i / 10 for i in range(10)]
    assert Protocol(num_steps=4).fractions("deletion") == [0, 0.25, 0.5, 0.75, 1]
    protocol = Protocol(num_steps=3)
    for name, points in perturber(white(), protocol).curves(corner_heat(), 1).items():
        assert len(points.answers) == len(protocol.fractions(name))


def test_a_perfect_map_reaches_the_extremes_and_its_inverse_the_opposite():
    protocol = Protocol(num_steps=16, insert_into="black", delete_to="black")
    perfect, inverse = areas(corner_heat(), protocol), areas(-corner_heat(), protocol)
    # The corner is a sixteenth of the image: one step, and less than the last tenth.
    assert perfect == pytest.approx(
        {"positive": 5, "negative": 90, "insertion": 100 - 100 / 32, "deletion": 100 / 32}, abs=1e-3
    )
    assert inverse == pytest.approx(
        {"positive": 90, "negative": 5, "insertion": 100 / 32, "deletion": 100 - 100 / 32}, abs=1e-3
    )


def test_random_heat_lies_in_the_middle():
    protocol = Protocol(insert_into="black", delete_to="black")
    noise = [torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    found = [areas(heat, protocol) for heat in noise]
    # Probability falls with the corner's pixels; the answer changes when half of them are gone.
    for name in CURVES:
        assert np.mean([each[name] for each in found]) == pytest.approx(50, abs=2)


def test_as_many_pixels_change_as_asked_the_hottest_first():
    heat = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    start, end = torch.zeros(3, 6, 7), torch.ones(3, 6, 7)
    counts = [0, 1, 20, 42]
    changed = replaced(start, end, heat, counts)
    assert changed.sum((1, 2, 3)).tolist() == [3 * count for count in counts]
    coldest = replaced(start, end, heat, counts, lowest_first=True)
    torch.testing.assert_close(coldest, replaced(start, end, -heat, counts))
    kept, gone = heat[changed[2, 0] == 0], heat[changed[2, 0] == 1]
    assert gone.min() > kept.max()


def test_equal_heat_is_taken_row_by_row():
    start, end = torch.zeros(3, 2, 3), torch.ones(3, 2, 3)
    for lowest_first in (False, True):
        changed = replaced(start, end, torch.ones(2, 3), [4], lowest_first=lowest_first)
        assert changed[0, 0].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_blur_is_a_gaussian_and_leaves_flat_images_alone():
    torch.testing.assert_close(blurred(torch.full((3, 30, 30), 2.5)), torch.full((3, 30, 30), 2.5))
    spot = torch.zeros(3, 31, 31, dtype=torch.float64)
    spot[:, 15, 15] = 1
    found = blurred(spot)
    weights = [math.exp(-(i**2) / 50) for i in range(-5, 6)]
    assert found[0, 13, 18].item() == pytest.approx(weights[3] * weights[8] / sum(weights) ** 2)
    assert found[0, 15, 21] == 0 and found.sum().item() == pytest.approx(3)


def test_the_number_of_images_at_a_time_changes_nothing():
    image = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()
    heat = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    at_once, one_by_one = (perturber(image, Protocol(), size).curves(heat, 0) for size in (99, 1))
    for name in CURVES:
        assert torch.equal(at_once[name].probability, one_by_one[name].probability)


def test_where_a_curve_shows_the_whole_image_it_has_its_answer():
    model, image = small_lvvit(), pictures(1)
    heat = upsample(explain("gae", model, image, torch.tensor([2])), (48, 48))[0]
    asked = Perturber(model, image[0], Protocol(num_steps=2), mean=MEAN, std=STD)
    with torch.no_grad():
        own = model(image)[0].softmax(-1)
    assert asked.best == int(own.argmax())
    assert asked.probability(2) == pytest.approx(float(own[2]))
    curves = asked.curves(heat, 2)
    for name in CURVES:
        end = -1 if name == "insertion" else 0
        assert curves[name].probability[end].item() == pytest.approx(float(own[2]))


def test_one_step_is_no_curve():
    with pytest.raises(ValueError, match="num_steps = 1; allowed: 2 or more"):
        Protocol(num_steps=1)
