"""How images meet the teacher: sizes in whole cells, and windows that say what was looked at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenlabel.labeler.fit import FITS, MAX_ASPECT, place, resize

SIDES = st.integers(1, 30_000)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_photo_of_500_by_375_px_keeps_its_shape_in_16_by_21_cells():
    placement = place((500, 375), fit="native", teacher_size=576, stride=32)
    assert placement.size == (16 * 32, 21 * 32)
    assert placement.box == (0, 0, 500, 375)
    assert placement.window == (0, 0, 1, 1)


@given(width=SIDES, height=SIDES, fit=st.sampled_from(FITS), stride=st.sampled_from([14, 16, 32]))
def test_any_image_becomes_whole_cells_of_about_the_teachers_area(width, height, fit, stride):
    placement = place((width, height), fit=fit, teacher_size=576, stride=stride)
    rows, cols = placement.size[0] / stride, placement.size[1] / stride
    assert rows == int(rows) >= 1 and cols == int(cols) >= 1
    assert 0.85 < rows * cols * stride**2 / 576**2 < 1.15


@given(width=SIDES, height=SIDES)
def test_native_bends_a_shape_by_no_more_than_rounding_to_cells(width, height):
    size = place((width, height), fit="native", teacher_size=576, stride=32).size
    wanted = np.clip(width / height, 1 / MAX_ASPECT, MAX_ASPECT)
    # The shorter side of a 4:1 image has nine cells: half a cell is 1/18 of it.
    assert abs(np.log(size[1] / size[0]) - np.log(wanted)) < np.log(1 + 1 / 18) + np.log(1 + 1 / 70)


@given(width=SIDES, height=SIDES)
def test_turning_the_image_turns_the_placement(width, height):
    upright = place((width, height), fit="native", teacher_size=576, stride=32)
    turned = place((height, width), fit="native", teacher_size=576, stride=32)
    assert turned.size == upright.size[::-1]


@given(width=SIDES, height=SIDES, fit=st.sampled_from(FITS))
def test_the_window_is_the_box_in_image_fractions(width, height, fit):
    placement = place((width, height), fit=fit, teacher_size=576, stride=32)
    sides = np.array([width, height, width, height])
    assert np.allclose(placement.window, placement.box / sides)
    assert 0 <= placement.box[0] < placement.box[2] <= width
    assert 0 <= placement.box[1] < placement.box[3] <= height


@pytest.mark.parametrize(("width", "height"), [(20_000, 300), (300, 20_000), (30_000, 1)])
def test_a_strip_is_squeezed_to_four_to_one_and_covered_whole(width, height):
    placement = place((width, height), fit="native", teacher_size=576, stride=32)
    assert sorted(placement.size) == [288, 1152]
    assert placement.window == (0, 0, 1, 1)


def test_center_looks_at_the_middle_square_and_says_so():
    placement = place((400, 100), fit="center", teacher_size=64, stride=32)
    assert placement.size == (64, 64)
    assert placement.window == (0.375, 0, 0.625, 1)


def test_center_resizes_the_middle_as_if_it_had_been_cut_out_first():
    image = noise(90, 60)
    placement = place(image.size, fit="center", teacher_size=32, stride=32)
    cut = image.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    found = resize(image, placement, interpolation="bicubic")
    # At the rim the filter also reads the pixels beyond the cut, as it should.
    assert np.array_equal(found[:, 2:-2], np.asarray(cut)[:, 2:-2])


@pytest.mark.parametrize("teacher_size", [32, 64, 160])
@pytest.mark.parametrize("fit", ["native", "stretch"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "random"])
def test_whole_images_are_resized_as_pillow_does_it(interpolation, fit, teacher_size):
    image = noise(90, 60)
    placement = place(image.size, fit=fit, teacher_size=teacher_size, stride=16)
    height, width = placement.size
    named = "bicubic" if interpolation == "random" else interpolation
    wanted = image.resize((width, height), Image.Resampling[named.upper()])
    found = resize(image, placement, interpolation=interpolation)
    difference = found.astype(int) - np.asarray(wanted).astype(int)
    assert np.abs(difference).max() <= 2 and np.mean(difference != 0) < 0.1


def test_shrinking_takes_the_mean_of_pixels_instead_of_picking_some():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    placement = place((512, 512), fit="stretch", teacher_size=64, stride=32)
    shrunk = resize(Image.fromarray(stripes), placement, interpolation="bilinear")
    assert np.abs(shrunk[:, 4:-4].astype(int) - 127).max() <= 2


def test_a_teacher_size_between_cells_is_rounded_to_whole_ones():
    assert place((80, 80), fit="stretch", teacher_size=300, stride=32).size == (288, 288)
    assert place((80, 80), fit="stretch", teacher_size=5, stride=32).size == (32, 32)


def test_unknown_fits_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="fit 'squash' is not one of native, stretch, center"):
        place((80, 80), fit="squash", teacher_size=64, stride=32)
